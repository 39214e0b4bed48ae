#!/usr/bin/env bash
# Runs a load test with oha (https://github.com/hatoo/oha) or hey (apt install hey).
#
# Run: examples/load.sh [REQUESTS [CLIENTS]]
set -euo pipefail

if ! tool=$(command -v oha || command -v hey); then
  echo 'Install oha (https://github.com/hatoo/oha) or hey (apt install hey)' >&2
  exit 1
fi
key=()
if [[ -n ${UNFOG_API_KEY:-} ]]; then
  key=(-H "Authorization: Bearer $UNFOG_API_KEY")
fi

# Both tools have these options.
"$tool" -n "${1:-200}" -c "${2:-8}" -m POST -T application/json -d '{"digit": 7, "sampler": "dpmpp", "num_steps": 10}' \
  ${key[@]+"${key[@]}"} "${UNFOG_URL:-http://127.0.0.1:8000}/generate"
