#!/usr/bin/env bash
# SFT stage 2 with the reference's variables: DATA_DIR, HF_CHECKPOINT, SAVE_DIR, MAX_TOKENS_PER_GPU, ... (infir2 sft --help lists them).
# MODEL_SIZE 7b or 1.5b, NODES and GPUS_PER_NODE as the cluster has them, LAUNCHER ray, slurm or torchrun; words given are passed on.
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/../../recipes/qwen2.5-${MODEL_SIZE:-7b}/sft2.toml"
exec infir2 launch "${LAUNCHER:-ray}" --nodes "${NODES:-2}" --gpus-per-node "${GPUS_PER_NODE:-8}" ${DRY_RUN:+--dry-run} -- sft "$recipe" "$@"
