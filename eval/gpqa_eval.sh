#!/usr/bin/env bash
# GPQA Diamond, with the variables of aime24_eval.sh.
here="${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/eval}" && here="${here:-$(dirname "${BASH_SOURCE[0]}")}"  # sbatch runs a copy
exec bash "$here/run_evalscope.sh" gpqa_diamond 26000 8 '"filters": {"remove_until": "</think>"}'
