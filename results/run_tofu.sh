#!/usr/bin/env bash
# Real TOFU (a folder with its published files, see data/README.md), tiny, forget10: one start and one retrained model; beta for npo+rt scanned on seed 0; then
# five methods on seeds 1 and 2, one learning rate for all, each evaluated every other epoch. From the root; finished runs are not made again:
#     bash results/run_tofu.sh TOFU_DIR        # two hours on two cores: so small a model's answers seldom end, and evaluating them takes most of it
set -euo pipefail
export data=$1 OMP_NUM_THREADS=1
run() {  # run NAME FLAGS...: interrupted or new
  if [ -e "runs/tofu/$1/config.json" ]; then python train_npo.py --resume "runs/tofu/$1" >> "runs/tofu/$1.log"
  else python train_npo.py --data "$data" --out "runs/tofu/$1" "${@:2}" > "runs/tofu/$1.log"; fi
}
unlearn() {  # unlearn NAME FLAGS...
  run "$1" --model runs/tofu/full/model --retain-log runs/tofu/retain90/eval/*.json --eval-every 25 "${@:2}"
}
export -f run unlearn
two_at_a_time() { xargs -P 2 -I{} bash -c '{}'; }
mkdir -p runs/tofu
sft="--loss sft --weight-decay 0.2"
printf "%s\n" "run full $sft --split full --seed 0 --eval-every never" "run retain90 $sft --split retain90 --seed 1" | two_at_a_time
printf "unlearn s%s --seed 0 --loss npo --retain-weight 5 --beta %s\n" 1 0.02 2 0.03 | two_at_a_time
for seed in 1 2; do
  echo "unlearn npo+rt-seed$seed --seed $seed --loss npo --retain-weight 5 --beta 0.02"
  echo "unlearn ga+rt-seed$seed --seed $seed --loss ga --retain-weight 5"
  echo "unlearn ga-seed$seed --seed $seed --loss ga"
  echo "unlearn npo-seed$seed --seed $seed --loss npo --beta 0.02"
  echo "unlearn dpo+rt-seed$seed --seed $seed --loss dpo --retain-weight 5 --beta 0.02"
done | two_at_a_time
python figures_tofu.py --collect runs/tofu/*-seed? --out results/tofu_forget10.json
python figures_tofu.py --collect runs/tofu/s? --out results/tofu_forget10_tried.json
