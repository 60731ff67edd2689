#!/usr/bin/env bash
# A pretrained model on all of real TOFU, forget10: SmolLM2-135M-Instruct learns the 4000 rows, another copy the 3600 that are not to be forgotten, and
# npo+rt with three betas and two weights, ga+rt with two weights, npo and ga unlearn the rest, with one lr; two runs at a time, a thread each. Weights as for
# run_smollm2.sh. From the root; it goes on where it stopped:
#     bash results/run_smollm2_whole.sh TOFU_DIR FILE.gguf        # about eight hours on two cores that multiply bf16 (amx_bf16)
set -euo pipefail
export OMP_NUM_THREADS=1
tofu=$1 base=runs/smollm2-whole start=runs/smollm2-whole/full/model
[ -e "$base/SmolLM2-135M-Instruct" ] || python data/gguf_to_folder.py "$2" "$base/SmolLM2-135M-Instruct"
run() {  # run NAME FLAGS...: interrupted or new
  local folder=$base/$1; shift
  if [ -e "$folder/config.json" ]; then python train_npo.py --resume "$folder"
  else python train_npo.py --data "$tofu" --template llama2 --dtype bf16 --compile --batch-size 16 --out "$folder" "$@"; fi
}
learn=(--model "smollm2-135m=$base/SmolLM2-135M-Instruct" --loss sft --lr 4e-4 --epochs 4 --warmup-epochs 0.5 --micro-batch-size 16)
run full "${learn[@]}" --split full --eval-every never &
run retain90 "${learn[@]}" --split retain90 &
wait
unlearn=(--model "$start" --retain-log "$(ls "$base"/retain90/eval/*.json)" --lr 5e-5 --epochs 6 --eval-every 38)
run npo+rt "${unlearn[@]}" --loss npo --retain-weight 5 --beta 0.05 &
run ga+rt "${unlearn[@]}" --loss ga --retain-weight 5 &
wait
run npo+rt_beta0.02 "${unlearn[@]}" --loss npo --retain-weight 5 --beta 0.02 &
run ga+rt_weight1 "${unlearn[@]}" --loss ga --retain-weight 1 &
wait
run npo+rt_beta0.02_weight20 "${unlearn[@]}" --epochs 10 --eval-every 63 --loss npo --retain-weight 20 --beta 0.02 &
run npo+rt_beta0.01_weight20 "${unlearn[@]}" --eval-every 50 --loss npo --retain-weight 20 --beta 0.01 &
wait
run npo "${unlearn[@]}" --loss npo --beta 0.05 &
run ga "${unlearn[@]}" --loss ga &
wait
python figures_tofu.py --out results/smollm2_whole_forget10.json \
  --collect "$base"/{retain90,npo+rt,npo+rt_beta0.02,npo+rt_beta0.02_weight20,npo+rt_beta0.01_weight20,ga+rt,ga+rt_weight1,npo,ga}
