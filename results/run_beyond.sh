#!/usr/bin/env bash
# Built-in data, tiny, forget10: the paper's objectives with a retain term and newer ones, at the preset's lr and their published betas, five seeds; then all
# attacks on each method's first seed, and on two more seeds of four methods. From the root; it goes on where it was stopped:
#     bash results/run_beyond.sh        # half an hour on two cores, beside the runs of the study's own
set -euo pipefail
export OMP_NUM_THREADS=1
folders() {  # of the reported runs that are attacked, with their seeds
  python - <<'E2'
import json
from study.grid import FIGURES
from study.verdicts import chosen_runs
study = json.load(open("results/tofu/builtin_tiny_preset.json"))
for method in FIGURES["objectives"][1]:
    for run in chosen_runs(study, "forget10", method):
        if run["seed"] == 1 or run["seed"] <= 3 and method in ("kto+rt", "npo+rt", "simnpo+rt", "ceu+rt"):
            print(f"runs/tofu/forget10_{method}_seed{run['seed']}_{run['key'][:8]}", run["seed"])
E2
}
attack() {  # attack FOLDER SEED
  python robustness_tofu.py --model "$1/model" --start "$(echo runs/models/tiny-full-seed0-*/model)" \
    --retrained "$(echo runs/models/tiny-retain90-seed"$2"-*/model)" --out "$1/robustness" --shares 100 > /dev/null
}
export -f attack
python figures_tofu.py --choices preset --figure objectives
folders | xargs -P 2 -L 1 bash -c 'attack "$0" "$1"'
python figures_tofu.py --choices preset --figure objectives # takes the attacks into the JSON
