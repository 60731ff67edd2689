#!/usr/bin/env bash
# Real TOFU (a folder with its published files, see data/README.md), tiny, forget10: npo+rt and ga, evaluated every epoch. From the root:
#     bash results/run_tofu.sh TOFU_DIR [EPOCHS]        # goes on where it stopped; most of the time is fine-tuning and retraining
# EPOCHS of fine-tuning and retraining, 10 by default: fewer than the tiny preset's, since real TOFU has three times the text.
set -euo pipefail
data=$1 epochs=${2:-10}
run() {  # run FOLDER FLAGS...: interrupted or new
  local folder=$1; shift
  if [ -e "$folder" ]; then torchrun --nproc_per_node=2 train_npo.py --resume "$folder"
  else torchrun --nproc_per_node=2 train_npo.py --data "$data" --micro-batch-size 4 --out "$folder" "$@"; fi
}
run runs/tofu/full --loss sft --split full --epochs "$epochs" --eval-every never
run runs/tofu/retain90 --loss sft --split retain90 --epochs "$epochs"
retain_log=$(ls runs/tofu/retain90/eval/*.json)
run runs/tofu/npo+rt --model runs/tofu/full/model --loss npo --retain-weight 1 --retain-log "$retain_log"
run runs/tofu/ga --model runs/tofu/full/model --loss ga --retain-log "$retain_log"
python figures_tofu.py --collect runs/tofu/npo+rt runs/tofu/ga --out results/tofu_forget10.json
