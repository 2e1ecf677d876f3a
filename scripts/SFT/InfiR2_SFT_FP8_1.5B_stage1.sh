#!/usr/bin/env bash
# The reference's newest name of InfiR2_SFT_FP8_stage1.sh with MODEL_SIZE=1.5b.
MODEL_SIZE=1.5b exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_SFT_FP8_stage1.sh" "$@"
