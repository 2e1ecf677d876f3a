#!/usr/bin/env bash
# Start a Ray head on the loopback of this machine, run a command, and stop Ray with it. Needs root.
#
#   unshare --net --pid --fork --kill-child --mount-proc bash ray_head.sh RAY COMMAND [ARG ...]
#
# RAY is the ray program. Inside a network namespace with only the loopback, Ray listens on it;
# elsewhere it would listen on the machine's address.
set -eu
ip link set lo up
ray=$1 base=$(mktemp -d)
shift
"$ray" start --head --node-ip-address=127.0.0.1 --port=6399 --num-cpus=2 \
  --dashboard-host=127.0.0.1 --dashboard-port=8299 --disable-usage-stats --temp-dir="$base" \
  > "$base/start.log" 2>&1 || { cat "$base/start.log" >&2; exit 1; }
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8299 RAY_ADDRESS=127.0.0.1:6399
"$@"
