#!/usr/bin/env bash
# RL stage 1. Arguments are options of infir2 rl. Variables: MODEL_SIZE (7b, 1.5b), NODES,
# GPUS_PER_NODE, LAUNCHER (ray, slurm, torchrun), DRY_RUN, and the reference's DATA_DIR,
# HF_CHECKPOINT (FP8 model of the engine), REF_LOAD, SAVE_DIR, ROLLOUT_MAX_RESPONSE_LEN, ...
# (infir2 rl --help lists them).
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/../../recipes/qwen2.5-${MODEL_SIZE:-7b}/rl1.toml"
exec infir2 launch "${LAUNCHER:-ray}" \
  --nodes "${NODES:-4}" --gpus-per-node "${GPUS_PER_NODE:-8}" \
  ${DRY_RUN:+--dry-run} -- rl "$recipe" "$@"
