#!/usr/bin/env bash
# How deep npo+rt goes on the built-in set: one setting of the preset is changed at a time. It took 32 minutes on two cores that had other work too.
#     bash results/run_depth.sh
set -euo pipefail
export OMP_NUM_THREADS=1
run() {  # run FLAG VALUE: begins the run or resumes it
  out="runs/depth/npo+rt$1$2"
  if [ -e "$out/config.json" ]; then python train_npo.py --resume "$out"; else
    python train_npo.py --loss npo --retain-weight 1 --eval-every 25 --out "$out" "$1" "$2"; fi
}
export -f run
printf "%s\n" "--seed 0" "--beta 0.1" "--beta 0.25" "--beta 1" "--beta 2" "--lr 5e-4" "--lr 2e-3" "--retain-weight 0.5" "--retain-weight 2" \
  "--retain-weight 5" "--epochs 5" "--epochs 20" | xargs -P 2 -L 1 bash -c 'run $0 $1 > /dev/null'
python figures_tofu.py --collect runs/depth/* --out results/depth.json
