#!/usr/bin/env bash
# Built-in data, tiny, forget10: the paper's objectives with a retain term and newer ones, at the preset's lr and their published betas, five seeds, and each
# tuned, three seeds; then all attacks on them: on the first seed of each at the preset's lr and on two more of four, and on the three tuned ones. From the
# root; it goes on where it was stopped:
#     bash results/run_beyond.sh        # about two hours on two cores, beside the runs of the study's own
set -euo pipefail
export OMP_NUM_THREADS=1
folders() {  # folders JSON: of the reported runs that are attacked, with their seeds
  python - "$1" <<'E2'
import json, sys
from study.grid import FIGURES
from study.verdicts import chosen_runs
study, tuned = json.load(open(sys.argv[1])), "preset" not in sys.argv[1]
for method in FIGURES["objectives"][1]:
    thrice = tuned or method in ("kto+rt", "npo+rt", "simnpo+rt", "ceu+rt")
    for run in chosen_runs(study, "forget10", method):
        if run["seed"] <= (3 if thrice else 1):
            print(f"runs/tofu/forget10_{method}_seed{run['seed']}_{run['key'][:8]}", run["seed"])
E2
}
attack() {  # attack FOLDER SEED
  python robustness_tofu.py --model "$1/model" --start "$(echo runs/models/tiny-full-seed0-*/model)" \
    --retrained "$(echo runs/models/tiny-retain90-seed"$2"-*/model)" --out "$1/robustness" --shares 100 > /dev/null
}
export -f attack
objectives() {  # objectives JSON FLAGS...
  local json=$1; shift
  python figures_tofu.py --figure objectives "$@"
  folders "results/tofu/$json" | xargs -P 2 -L 1 bash -c 'attack "$0" "$1"'
  python figures_tofu.py --figure objectives "$@" # takes the attacks into the JSON
}
objectives builtin_tiny_preset.json --choices preset
objectives builtin_tiny.json --seeds 3
