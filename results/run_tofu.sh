#!/usr/bin/env bash
# Real TOFU (a folder with its published files, see data/README.md), tiny, forget10: npo+rt and ga, evaluated every epoch. From the root:
#     bash results/run_tofu.sh TOFU_DIR        # about an hour on two cores, most of it fine-tuning and retraining; goes on where it stopped
set -euo pipefail
for method in npo+rt ga; do
  folder=runs/tofu/$method; retain=0; [[ $method == *+rt ]] && retain=1
  if [ -e "$folder" ]; then torchrun --nproc_per_node=2 train_npo.py --resume "$folder"
  else torchrun --nproc_per_node=2 train_npo.py --data "$1" --loss "${method%+rt}" --retain-weight $retain --out "$folder"; fi
done
python results/collect.py runs/tofu/* --out results/tofu_forget10.json
