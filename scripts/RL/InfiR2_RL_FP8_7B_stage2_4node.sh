#!/usr/bin/env bash
# The reference's newest name of InfiR2_RL_FP8_stage2_4node.sh with MODEL_SIZE=7b.
MODEL_SIZE=7b exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_RL_FP8_stage2_4node.sh" "$@"
