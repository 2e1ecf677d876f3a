#!/usr/bin/env bash
# A Ray head on this machine's loopback, then the command given; everything ends with it.
#   unshare --net --pid --fork --kill-child --mount-proc bash ray_head.sh RAY COMMAND [ARG ...]      (root; RAY: the ray program)
# In a network namespace that has nothing but the loopback, Ray keeps to it; elsewhere it listens on the machine's address.
set -eu
ip link set lo up
ray=$1 base=$(mktemp -d)
shift
"$ray" start --head --node-ip-address=127.0.0.1 --port=6399 --dashboard-host=127.0.0.1 --dashboard-port=8299 --num-cpus=2 \
  --disable-usage-stats --temp-dir="$base" > "$base/start.log" 2>&1 || { cat "$base/start.log" >&2; exit 1; }
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8299 RAY_ADDRESS=127.0.0.1:6399
"$@"
