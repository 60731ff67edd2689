#!/usr/bin/env bash
# Real TOFU (a folder with its published files, see data/README.md), tiny model, forget10: one start and one retrained model; two betas of npo+rt on seed 0; then
# five methods on seeds 1 and 2 with one learning rate, evaluated every other epoch. From the root; finished runs are not made again:
#     bash results/run_tofu.sh TOFU_DIR        # two hours on two cores
set -euo pipefail
export data=$1 base=runs/real_tofu OMP_NUM_THREADS=1
run() {  # run NAME FLAGS...: begins the run or resumes it
  if [ -e "$base/$1/config.json" ]; then python train_npo.py --resume "$base/$1" >> "$base/$1.log"
  else python train_npo.py --data "$data" --out "$base/$1" "${@:2}" > "$base/$1.log"; fi
}
unlearn() {  # unlearn NAME FLAGS...
  run "$1" --model "$base/full/model" --retain-log "$base"/retain90/eval/*.json --eval-every 25 "${@:2}"
}
export -f run unlearn
python data/make_tiny.py --data "$data" --out "$base" --only untrained
sft="--loss sft --weight-decay 0.2 --model tiny=$base/tiny/untrained"
printf "%s\n" "run full $sft --split full --seed 0 --eval-every never" "run retain90 $sft --split retain90 --seed 1" | xargs -P 2 -I{} bash -c '{}'
printf "unlearn tried%s --seed 0 --loss npo --retain-weight 5 --beta %s\n" 1 0.02 2 0.03 | xargs -P 2 -I{} bash -c '{}'
for seed in 1 2; do
  echo "unlearn npo+rt-seed$seed --seed $seed --loss npo --retain-weight 5 --beta 0.02"
  echo "unlearn ga+rt-seed$seed --seed $seed --loss ga --retain-weight 5"
  echo "unlearn ga-seed$seed --seed $seed --loss ga"
  echo "unlearn npo-seed$seed --seed $seed --loss npo --beta 0.02"
  echo "unlearn dpo+rt-seed$seed --seed $seed --loss dpo --retain-weight 5 --beta 0.02"
done | xargs -P 2 -I{} bash -c '{}'
python figures_tofu.py --collect "$base"/*-seed? --out results/tofu_forget10.json
python figures_tofu.py --collect "$base"/tried? --out results/tofu_forget10_tried.json
