#!/usr/bin/env bash
# Built-in data, tiny, forget10: npo+rt by the preset on eleven further starts, each with a retrained model of its own. From the root, after README's first
# command, whose run stands beside them:
#     bash results/run_builtin.sh            # forty minutes on two cores; SEEDS after it: these alone
set -euo pipefail
export OMP_NUM_THREADS=1
seeds=${*:-1 2 3 4 5 6 7 8 9 10 11}
run() {  # run FOLDER SEED FLAGS...: interrupted or new
  if [ -e "runs/$1/config.json" ]; then python train_npo.py --resume "runs/$1"; else python train_npo.py --out "runs/$1" --seed "${@:2}"; fi
}
from_start() {  # from_start N: seed N throughout
  run "starts/npo+rt-start$1" "$1" --loss npo --retain-weight 1 --model "runs/starts/full$1/model" --retain-log runs/starts/retain90-"$1"/eval/*.json
}
export -f run from_start
for seed in $seeds; do
  echo "run starts/full$seed $seed --loss sft --split full"
  echo "run starts/retain90-$seed $seed --loss sft --split retain90"
done | xargs -P 2 -I{} bash -c '{} > /dev/null'
printf "%s\n" $seeds | xargs -P 2 -I{} bash -c 'from_start {} > /dev/null'
python figures_tofu.py --collect runs/npo+rt_forget10 runs/starts/npo+rt-* runs/models/tiny-retain90-seed0-* runs/starts/retain90-* --out results/builtin_starts.json
