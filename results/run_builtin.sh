#!/usr/bin/env bash
# Built-in data, tiny model, forget10: npo+rt by the preset on further starts, each with its own retrained model. From the root, after README's first command,
# whose run is collected too:
#     bash results/run_builtin.sh [SEEDS]        # default: 1 to 11; forty minutes on two cores
set -euo pipefail
export OMP_NUM_THREADS=1
run() {  # run NAME FLAGS...: begins the run or resumes it
  if [ -e "runs/starts/$1/config.json" ]; then python train_npo.py --resume "runs/starts/$1"; else python train_npo.py --out "runs/starts/$1" "${@:2}"; fi
}
from_start() {  # from_start SEED: a start, its retrained model, the unlearned model
  run "full$1" --loss sft --split full --seed "$1"
  run "retain90-$1" --loss sft --split retain90 --seed "$1"
  run "npo+rt-$1" --loss npo --retain-weight 1 --seed "$1" --model "runs/starts/full$1/model" --retain-log runs/starts/retain90-"$1"/eval/*.json
}
export -f run from_start
printf "%s\n" "${@:-1 2 3 4 5 6 7 8 9 10 11}" | tr " " "\n" | xargs -P 2 -I{} bash -c 'from_start {} > /dev/null'
python figures_tofu.py --collect runs/npo+rt_forget10 runs/starts/npo+rt-* runs/starts/retain90-* --out results/builtin_starts.json
