#!/usr/bin/env bash
# SmolLM2-135M-Instruct on all of real TOFU, forget10, from a start that has memorised less: two epochs of fine-tuning at lr 6e-4, and two retrained models of
# the same recipe; then npo+rt and npo+kl at half of that rate, three seeds each, ga+rt and simnpo+rt. Two runs at a time, a thread each. Weights as for
# run_smollm2.sh. From the root; it goes on where it stopped:
#     bash results/run_smollm2_two_epochs.sh TOFU_DIR FILE.gguf        # about fourteen hours on two cores, in float32
set -euo pipefail
export OMP_NUM_THREADS=1
tofu=$1 base=runs/smollm2-two-epochs out=results/smollm2_two_epochs_forget10.json
[ -e "$base/SmolLM2-135M-Instruct" ] || python data/gguf_to_folder.py "$2" "$base/SmolLM2-135M-Instruct"
run() {  # run NAME FLAGS...: interrupted or new
  local folder=$base/$1; shift
  if [ -e "$folder/config.json" ]; then python train_npo.py --resume "$folder"
  else python train_npo.py --data "$tofu" --template llama2 --batch-size 16 --eval-every end --out "$folder" "$@"; fi
}
learn=(--model "smollm2-135m=$base/SmolLM2-135M-Instruct" --loss sft --lr 6e-4 --epochs 2 --warmup-epochs 0.25 --micro-batch-size 8)
run full "${learn[@]}" --split full &
run retain90 "${learn[@]}" --split retain90 &
wait
log=$(ls "$base"/retain90/eval/*.json)
run retain90_again "${learn[@]}" --split retain90 --seed 1 --retain-log "$log" &
unlearn=(--model "$base/full/model" --retain-log "$log" --retain-weight 5 --lr 3e-4 --epochs 4)
run npo+rt_seed0 "${unlearn[@]}" --loss npo --beta 0.05 &
wait
run npo+rt_seed1 "${unlearn[@]}" --loss npo --beta 0.05 --seed 1 &
run npo+rt_seed2 "${unlearn[@]}" --loss npo --beta 0.05 --seed 2 &
wait
run ga+rt_seed0 "${unlearn[@]}" --loss ga &
run simnpo+rt_seed0 "${unlearn[@]}" --loss simnpo &
wait
run simnpo+rt_weight0.15_seed0 "${unlearn[@]}" --loss simnpo --retain-weight 0.15 &
run npo+kl_seed0 "${unlearn[@]}" --loss npo --beta 0.05 --retain-weight 0 --kl-weight 5 &
wait
run npo+kl_seed1 "${unlearn[@]}" --loss npo --beta 0.05 --retain-weight 0 --kl-weight 5 --seed 1 &
run npo+kl_seed2 "${unlearn[@]}" --loss npo --beta 0.05 --retain-weight 0 --kl-weight 5 --seed 2 &
wait
torchrun --nproc_per_node=2 evaluate_tofu.py --model "$base/full/model" --data "$tofu" --split forget10 --retain-log "$log" --out "$base/start.json"
for folder in "$base"/*_seed*; do cp "$base/start.json" "$folder/eval/step_000000.json"; done
python figures_tofu.py --out "$out" --collect "$base"/{retain90,retain90_again,npo+rt_seed{0,1,2},{ga+rt,simnpo+rt,simnpo+rt_weight0.15}_seed0,npo+kl_seed{0,1,2}}
