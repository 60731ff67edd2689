#!/usr/bin/env bash
# Built-in data, tiny, forget10: the paper's objectives with a retain term and newer ones, tuned alike, three seeds; attacks on each result; all four attacks with
# their reports on three of them. From the root; it goes on where it was stopped:
#     bash results/run_beyond.sh        # an hour and a half on two cores
set -euo pipefail
export OMP_NUM_THREADS=1
runs() {  # METHOD SEED FOLDER of the reported runs
  python - <<'E2'
import json
from study.grid import FIGURES
from study.verdicts import chosen_runs
study = json.load(open("results/tofu/builtin_tiny.json"))
for seed in (1, 2, 3):
    for method in FIGURES["objectives"][1]:
        for run in chosen_runs(study, "forget10", method):
            if run["seed"] == seed:
                print(method, seed, f"runs/tofu/forget10_{method}_seed{seed}_{run['key'][:8]}")
E2
}
attack() {  # attack SEED FOLDER OUT FLAGS...
  python robustness_tofu.py --model "$2/model" --start "$(echo runs/models/tiny-full-seed0-*/model)" \
    --retrained "$(echo runs/models/tiny-retain90-seed"$1"-*/model)" --out "${@:3}" > /dev/null
}
export -f attack
python figures_tofu.py --figure objectives --seeds 3
runs | while read -r _ seed folder; do echo "attack $seed $folder $folder/robustness --shares 100"; done | xargs -P 2 -I{} bash -c '{}'
python figures_tofu.py --figure objectives --seeds 3 # takes the attacks into the JSON
runs | grep -E '^(npo|ga|undial)\+rt 1 ' | while read -r method seed folder; do echo "attack $seed $folder results/robustness/$method"; done |
  xargs -P 2 -I{} bash -c '{}'
