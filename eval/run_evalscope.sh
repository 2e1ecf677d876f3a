#!/usr/bin/env bash
# run_evalscope.sh DATASET MAX_TOKENS SAMPLES DATASET_ARGS: one benchmark against the server at
# API_PORT (docs/recipe.md, section 3). Start the server first; MODEL_PATH only names the model in
# the error message. API_KEY travels in the environment: arguments are visible to every user.
set -euo pipefail
url="http://127.0.0.1:${API_PORT:-30000}/v1" served="${SERVED_NAME:-infir2}"
generation="{\"max_tokens\": ${MAX_NEW_TOKENS:-$2}, \"temperature\": ${TEMPERATURE:-0.65}, \"top_p\": ${TOP_P:-0.95}}"
command=(evalscope eval --model "$served" --api-url "$url" --api-key "" --eval-type openai_api --datasets "$1"
  --repeats "${GENERATED_NUM:-$3}" --eval-batch-size "${EVAL_BATCH:-64}" --work-dir "${EVAL_WORK_DIR:-runs/eval-$1}"
  --dataset-args "{\"$1\": {${DATASET_LOCAL:+\"local_path\": \"$DATASET_LOCAL\", }$4}}" --generation-config "$generation")
[ -z "${DRY_RUN:-}" ] || { echo 'EVALSCOPE_API_KEY="${API_KEY:-EMPTY}"' "$(printf '%q ' "${command[@]}")" && exit; }
command -v evalscope > /dev/null || { echo "evalscope is not installed: pip install evalscope, best in an environment of its own" >&2; exit 2; }
printf 'Authorization: Bearer %s\n' "${API_KEY:-EMPTY}" | curl -sf -o /dev/null -m 5 --noproxy '*' -H @- "$url/models" \
  || { echo "no server answers at $url: serve ${MODEL_PATH:-the model} with SGLang or vLLM under --served-model-name $served" >&2; exit 2; }
EVALSCOPE_API_KEY="${API_KEY:-EMPTY}" exec "${command[@]}"
