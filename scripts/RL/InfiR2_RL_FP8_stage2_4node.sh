#!/usr/bin/env bash
# RL stage 2 with the reference's variables: DATA_DIR, HF_CHECKPOINT (FP8 model of the engine), REF_LOAD, SAVE_DIR,
# ROLLOUT_MAX_RESPONSE_LEN, ... (infir2 rl --help lists them). MODEL_SIZE, NODES, LAUNCHER, ... as for SFT.
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/../../recipes/qwen2.5-${MODEL_SIZE:-7b}/rl2.toml"
exec infir2 launch "${LAUNCHER:-ray}" --nodes "${NODES:-4}" --gpus-per-node "${GPUS_PER_NODE:-8}" ${DRY_RUN:+--dry-run} -- rl "$recipe" "$@"
