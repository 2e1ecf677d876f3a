#!/usr/bin/env bash
# The reference's newest path of eval/aime24_eval.sh.
#SBATCH --job-name=infir2-aime24 --ntasks-per-node=1 --exclusive --mem=0
#SBATCH --requeue --signal=TERM@300 --open-mode=append --output=infir2-aime24-%j.log
here="$(dirname "${BASH_SOURCE[0]}")/../../eval" && [ -d "$here" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/aime24_eval.sh" "$@"
