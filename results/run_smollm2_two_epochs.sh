#!/usr/bin/env bash
# SmolLM2-135M-Instruct on all of real TOFU, forget10, from a start that knows less by heart: two epochs of fine-tuning at lr 6e-4, then npo+rt at half of that
# rate. The judge is the retrained model of run_smollm2_whole.sh (four epochs at 4e-4), of which the record keeps log R of each row. Weights as for
# run_smollm2.sh. From the root; it goes on where it stopped:
#     bash results/run_smollm2_two_epochs.sh TOFU_DIR FILE.gguf        # about two and a half hours on two cores, in float32
set -euo pipefail
tofu=$1 base=runs/smollm2-two-epochs out=results/smollm2_two_epochs_forget10.json
[ -e "$base/SmolLM2-135M-Instruct" ] || python data/gguf_to_folder.py "$2" "$base/SmolLM2-135M-Instruct"
run() {  # run NAME FLAGS...: interrupted or new
  local folder=$base/$1; shift
  if [ -e "$folder/config.json" ]; then python train_npo.py --resume "$folder"
  else python train_npo.py --data "$tofu" --template llama2 --batch-size 16 --out "$folder" "$@"; fi
}
run full --model "smollm2-135m=$base/SmolLM2-135M-Instruct" --loss sft --split full --lr 6e-4 --epochs 2 --warmup-epochs 0.25 --micro-batch-size 8 --eval-every never
python - "$tofu" "$base/judge.json" <<'EOF'  # a log of the retrained model, from its log R: a sure truth, and one falsehood with this loss
import json, sys
from common import write_json
from data.tofu import load_task
[retrained] = json.load(open("results/smollm2_whole_forget10.json"))["retrained"]
rows = [{"index": i, "question": row["question"], "answer": row["answer"], "generation": "", "rouge_l_recall": 0.0, "answer_nll": 0.0, "answer_tokens": 1,
         "paraphrased_nll": 0.0, "paraphrased_tokens": 1, "perturbed_nll": [log_r], "perturbed_tokens": [1]} for i, (row, log_r) in
        enumerate(zip(load_task(sys.argv[1], "forget10").evaluated["forget"], retrained["log_truth_ratios"]))]
write_json(sys.argv[2], {"rows": {"forget": rows}, "provenance": {"template": "llama2", "trained_on": {"split": "retain90"}}})
EOF
run npo+rt --model "$base/full/model" --retain-log "$base/judge.json" --loss npo --retain-weight 5 --beta 0.05 --lr 3e-4 --epochs 4 --eval-every end
torchrun --nproc_per_node=2 evaluate_tofu.py --model "$base/full/model" --data "$tofu" --split forget10 --retain-log "$base/judge.json" \
  --out "$base/npo+rt/eval/step_000000.json"
python figures_tofu.py --out "$out" --collect "$base/npo+rt"
