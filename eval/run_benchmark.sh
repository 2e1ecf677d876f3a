#!/usr/bin/env bash
# run_benchmark.sh BENCHMARK BATCH [OPTION ...]: infir2 eval with the reference's variables: MODEL_PATH (a directory, or the URL of a server,
# its key in API_KEY), DATASET_LOCAL, SERVED_NAME, API_PORT, TP_SIZE, EVAL_BATCH, EVAL_WORK_DIR, MAX_NEW_TOKENS, GENERATED_NUM,
# TEMPERATURE, TOP_P; and ENGINE (sglang where python3 has it, else native), ENGINE_PYTHON, ENGINES (of each node), DRY_RUN=1.
set -euo pipefail
[ "${MODEL_PATH:-}" ] && [ "${DATASET_LOCAL:-}" ] || { echo "set MODEL_PATH to a model or a URL, DATASET_LOCAL to the questions" >&2; exit 2; }
[[ "$MODEL_PATH" == *://* ]] || SERVED_NAME="${SERVED_NAME:-$(basename "$MODEL_PATH")}"
python="$(python3 -c 'import importlib.util as u, sys; print(sys.executable if u.find_spec("sglang") else "")' 2> /dev/null || true)"
set -- eval "$MODEL_PATH" --benchmarks "$1" --data "$DATASET_LOCAL" --run.dir "${EVAL_WORK_DIR:-runs/eval}/$1" --model "${SERVED_NAME:-}" \
  --parallel "${EVAL_BATCH:-$2}" --samples "${GENERATED_NUM:-0}" --max-tokens "${MAX_NEW_TOKENS:-0}" --temperature "${TEMPERATURE:-0.65}" \
  --top-p "${TOP_P:-0.95}" --engine "${ENGINE:-$([ "$python" ] && echo sglang || echo native)}" --python "${ENGINE_PYTHON:-$python}" \
  --engines "${ENGINES:-1}" --tensor-parallel "${TP_SIZE:-1}" --port "${API_PORT:-8801}" "${@:3}"
[ -z "${SLURM_JOB_ID:-}" ] || set -- launch slurm --in-job -- "$@"
[ -z "${DRY_RUN:-}" ] || { printf '%s\n' "${API_KEY:+INFIR2_ENGINE_KEY=\"\$API_KEY\" }infir2$(printf ' %q' "$@")" && exit; }
INFIR2_ENGINE_KEY="${API_KEY:-${INFIR2_ENGINE_KEY:-}}" exec infir2 "$@"
