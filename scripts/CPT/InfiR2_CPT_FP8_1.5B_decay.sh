#!/usr/bin/env bash
# The reference's newest name of InfiR2_CPT_FP8_1.5b_decay.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_CPT_FP8_1.5b_decay.sh" "$@"
