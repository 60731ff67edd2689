#!/usr/bin/env bash
# Built-in data, tiny model, forget10: the objectives with a retain term, and attacks on their results. First with the preset's lr, and the published betas of the newer ones
# (five seeds), then tuned for each method (three seeds). From the root; finished runs are not made again:
#     bash results/run_beyond.sh OUT        # a new folder; hours on two cores
set -euo pipefail
python figures_tofu.py --out "$1" --figure objectives
python figures_tofu.py --out "$1" --figure attacks --seeds 1
python figures_tofu.py --out "$1" --figure attacks --seeds 3 --methods kto+rt npo+rt simnpo+rt ceu+rt
python figures_tofu.py --out "$1" --figure objectives attacks --seeds 3 --choices tuned
