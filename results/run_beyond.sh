#!/usr/bin/env bash
# Built-in data, tiny, forget10: the paper's objectives with a retain term and newer ones, lr by the preset and beta as published, one seed; then attacks on
# three of the results. From the root, after README's first command, which leaves the start and the retrained model in runs/models:
#     bash results/run_beyond.sh        # half an hour on two cores
set -euo pipefail
start=$(echo runs/models/tiny-full-seed0-*/model) retrained=$(echo runs/models/tiny-retain90-seed0-*/model)
mkdir -p runs/beyond
[ -e runs/beyond/retrained.json ] ||
  python evaluate_tofu.py --model "$retrained" --split forget10 --reference "$start" --out runs/beyond/retrained.json > /dev/null
run() {  # run LOSS FLAGS...
  [ -e "runs/beyond/$1+rt/model" ] || OMP_NUM_THREADS=1 python train_npo.py --out "runs/beyond/$1+rt" --loss "$@" --retain-weight 1 \
    --model "$start" --retain-log runs/beyond/retrained.json --eval-every 25
}
attack() {  # attack METHOD
  OMP_NUM_THREADS=1 python robustness_tofu.py --model "runs/beyond/$1/model" --start "$start" --retrained "$retrained" --out "results/robustness/$1"
}
export -f run attack
export start retrained
for loss in npo ga idk dpo kto "simnpo --beta 2.5" wga satimp tnpo ceu undial; do echo "run $loss"; done | xargs -P 2 -I{} bash -c '{} > /dev/null'
for method in npo+rt ga+rt undial+rt; do echo "attack $method"; done | xargs -P 2 -I{} bash -c '{} > /dev/null'
python figures_tofu.py --collect runs/beyond/*+rt --out results/beyond_forget10.json
