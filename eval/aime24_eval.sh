#!/usr/bin/env bash
# AIME 2024: MODEL_PATH, DATASET_LOCAL, SERVED_NAME, API_PORT, EVAL_BATCH, EVAL_WORK_DIR, MAX_NEW_TOKENS, GENERATED_NUM, TEMPERATURE, TOP_P.
# The server's chat template has to begin the assistant's turn with <think> and a newline.
prompt='"system_prompt": "Please reason step by step, and put your final answer within \\boxed{}.", "filters": {"remove_until": "</think>"}'
here="$(dirname "${BASH_SOURCE[0]}")" && [ -f "$here/run_evalscope.sh" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/run_evalscope.sh" aime24 31000 32 "$prompt"
