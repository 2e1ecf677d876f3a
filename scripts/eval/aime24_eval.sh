#!/usr/bin/env bash
# The reference's newest path of eval/aime24_eval.sh.
here="$(dirname "${BASH_SOURCE[0]}")/../../eval" && [ -d "$here" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/aime24_eval.sh" "$@"
