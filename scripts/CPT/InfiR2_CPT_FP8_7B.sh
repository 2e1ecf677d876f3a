#!/usr/bin/env bash
# The reference's newest name of InfiR2_CPT_FP8_7b.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_CPT_FP8_7b.sh" "$@"
