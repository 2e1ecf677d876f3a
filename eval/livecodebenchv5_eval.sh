#!/usr/bin/env bash
# LiveCodeBench v5, 2024-08-01 to 2025-02-01, with the variables of aime24_eval.sh. Code of the model runs on this machine.
window='"extra_params": {"start_date": "2024-08-01", "end_date": "2025-02-01"}'
here="$(dirname "${BASH_SOURCE[0]}")" && [ -f "$here/run_evalscope.sh" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/run_evalscope.sh" live_code_bench 27000 8 "\"filters\": {\"remove_until\": \"</think>\"}, $window"
