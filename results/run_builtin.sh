#!/usr/bin/env bash
# Built-in data, tiny, forget10, everything by the preset: npo+rt on five seeds, npo, ga and ga+rt on three; then npo+rt on two further starts, each with
# a retrained model of its own. From the root:
#     bash results/run_builtin.sh        # about 20 minutes on two cores; what is there already is not run again
set -euo pipefail
run() {  # run FOLDER FLAGS...: finished before, interrupted, or new
  local folder=$1; shift
  if [ -e "$folder" ]; then torchrun --nproc_per_node=2 train_npo.py --resume "$folder"
  else torchrun --nproc_per_node=2 train_npo.py --out "$folder" "$@"; fi
}
for seed in 0 1 2 3 4; do run runs/builtin/npo+rt-$seed --loss npo --retain-weight 1 --seed $seed; done
for seed in 0 1 2; do
  run runs/builtin/npo-$seed --loss npo --seed $seed
  run runs/builtin/ga-$seed --loss ga --seed $seed
  run runs/builtin/ga+rt-$seed --loss ga --retain-weight 1 --seed $seed
done
python figures_tofu.py --collect runs/builtin/* runs/models/tiny-retain90-seed0-* --out results/builtin_forget10.json
for start in 1 2; do
  base=runs/starts/$start
  run $base/full --loss sft --split full --seed $start
  run $base/retain90 --loss sft --split retain90 --seed $start
  run $base/npo+rt --model tiny=$base/full/model --loss npo --retain-weight 1 --retain-log "$(ls $base/retain90/eval/*.json)"
done
python figures_tofu.py --collect runs/starts/*/npo+rt --out results/builtin_starts.json
