#!/usr/bin/env bash
# Built-in data, tiny, forget10, everything by the preset: npo+rt on five seeds; npo, ga and ga+rt on one. From the root, after README's first command, which
# leaves the fine-tuned and the retrained model in runs/models:
#     bash results/run_builtin.sh        # ten minutes on two cores: a collapsed model's answers never end
set -euo pipefail
run() {  # run NAME SEED FLAGS...
  local folder=runs/builtin/$1-seed$2 seed=$2; shift 2
  [ -e "$folder/model" ] || OMP_NUM_THREADS=1 python train_npo.py --out "$folder" --seed "$seed" "$@"
}
export -f run
{ for seed in 0 1 2 3 4; do echo "npo+rt $seed --loss npo --retain-weight 1"; done
  echo "npo 0 --loss npo"
  echo "ga 0 --loss ga"
  echo "ga+rt 0 --loss ga --retain-weight 1"; } | xargs -P 2 -I{} bash -c 'run {} > /dev/null'
python figures_tofu.py --collect runs/builtin/* runs/models/tiny-retain90-seed0-* --out results/builtin_forget10.json
