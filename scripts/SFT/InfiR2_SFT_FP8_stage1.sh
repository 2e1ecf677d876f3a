#!/usr/bin/env bash
# SFT stage 1. Arguments are options of infir2 sft. Variables: MODEL_SIZE (7b, 1.5b), NODES,
# GPUS_PER_NODE, LAUNCHER (ray, slurm, torchrun), DRY_RUN, and the reference's DATA_DIR,
# HF_CHECKPOINT, SAVE_DIR, MAX_TOKENS_PER_GPU, ... (infir2 sft --help lists them).
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/../../recipes/qwen2.5-${MODEL_SIZE:-7b}/sft1.toml"
exec infir2 launch "${LAUNCHER:-ray}" \
  --nodes "${NODES:-2}" --gpus-per-node "${GPUS_PER_NODE:-8}" \
  ${DRY_RUN:+--dry-run} -- sft "$recipe" "$@"
