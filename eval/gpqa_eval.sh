#!/usr/bin/env bash
# GPQA Diamond, on this machine or by `sbatch [--nodes=N] eval/gpqa_eval.sh`; run_benchmark.sh has the variables.
#SBATCH --job-name=infir2-gpqa --ntasks-per-node=1 --exclusive --mem=0
#SBATCH --requeue --signal=TERM@300 --open-mode=append --output=infir2-gpqa-%j.log
here="$(dirname "${BASH_SOURCE[0]}")" && [ -f "$here/run_benchmark.sh" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/run_benchmark.sh" gpqa_diamond 32 "$@"
