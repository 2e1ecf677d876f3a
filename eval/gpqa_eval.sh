#!/usr/bin/env bash
# GPQA Diamond, with the variables of aime24_eval.sh.
here="$(dirname "${BASH_SOURCE[0]}")" && [ -f "$here/run_evalscope.sh" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/run_evalscope.sh" gpqa_diamond 26000 8 '"filters": {"remove_until": "</think>"}'
