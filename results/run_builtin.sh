#!/usr/bin/env bash
# Built-in data, tiny, forget10: one learning rate grid for every method (seed 0), then three fresh seeds at each method's best. From the root:
#     bash results/run_builtin.sh        # about 30 minutes on two cores; what is there already is not run again
set -euo pipefail
run() {  # run FOLDER METHOD FLAGS...: finished before, interrupted, or new
  local folder=$1 method=$2; shift 2
  local retain=0; [[ $method == *+rt ]] && retain=1
  if [ -e "$folder" ]; then torchrun --nproc_per_node=2 train_npo.py --resume "$folder"
  else torchrun --nproc_per_node=2 train_npo.py --loss "${method%+rt}" --retain-weight $retain --out "$folder" "$@"; fi
}
for lr in 5e-4 1e-3 2e-3; do
  for method in npo+rt npo ga ga+rt; do run "runs/grid/$method-$lr" $method --lr $lr --eval-every 25; done
done
python figures_tofu.py --collect runs/grid/* runs/models/tiny-retain90-* --out results/builtin_forget10_grid.json
# Each method's learning rate: the one with the best forget quality at its last step, and not at its best one, since
# nobody who unlearns knows beforehand when to stop.
pick='import json, sys
runs = sorted(json.load(open(sys.argv[1]))["runs"], key=lambda run: (run["forget_quality_log10"][-1], run["lr"]))
for method, lr in {run["method"]: run["lr"] for run in runs}.items(): print(method, lr)'
python -c "$pick" results/builtin_forget10_grid.json | while read -r method lr; do
  for seed in 1 2 3; do run "runs/seeds/$method-$seed" "$method" --lr "$lr" --seed $seed < /dev/null; done
done
python figures_tofu.py --collect runs/seeds/* runs/models/tiny-retain90-* --out results/builtin_forget10.json
