#!/usr/bin/env bash
# LiveCodeBench v5, 2024-08-01 to 2025-02-01, on this machine or by `sbatch [--nodes=N] eval/livecodebenchv5_eval.sh`; run_benchmark.sh has the variables.
#SBATCH --job-name=infir2-livecodebenchv5 --ntasks-per-node=1 --exclusive --mem=0
#SBATCH --requeue --signal=TERM@300 --open-mode=append --output=infir2-livecodebenchv5-%j.log
here="$(dirname "${BASH_SOURCE[0]}")" && [ -f "$here/run_benchmark.sh" ] || here="$SLURM_SUBMIT_DIR/eval"  # sbatch runs a copy
exec bash "$here/run_benchmark.sh" live_code_bench 8 "$@"
