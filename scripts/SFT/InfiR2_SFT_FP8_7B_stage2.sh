#!/usr/bin/env bash
# The reference's newest name of InfiR2_SFT_FP8_stage2.sh with MODEL_SIZE=7b.
MODEL_SIZE=7b exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_SFT_FP8_stage2.sh" "$@"
