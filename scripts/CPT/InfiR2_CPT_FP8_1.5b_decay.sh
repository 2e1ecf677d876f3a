#!/usr/bin/env bash
# Continual pre-training of Qwen2.5-1.5b (cpt-decay.toml) with torchrun; run it on every node.
# Variables: NODES, GPUS_PER_NODE, MASTER_ADDR, MASTER_PORT, LAUNCHER, DRY_RUN, and the reference's
# DATA_DIR, HF_CHECKPOINT, SAVE_DIR, LOAD_DIR, MAX_TOKENS_PER_GPU (infir2 cpt --help lists them).
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/../../recipes/qwen2.5-1.5b/cpt-decay.toml"
exec infir2 launch "${LAUNCHER:-torchrun}" \
  --nodes "${NODES:-1}" --gpus-per-node "${GPUS_PER_NODE:-8}" \
  ${DRY_RUN:+--dry-run} -- cpt "$recipe" "$@"
