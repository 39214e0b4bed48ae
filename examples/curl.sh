#!/usr/bin/env bash
# The API with curl 7.76 or newer: a PNG file, a ZIP archive, an event stream, recognition, and retries.
#
# Run: examples/curl.sh [FOLDER]
set -euo pipefail

url=${UNFOG_URL:-http://127.0.0.1:8000}
cd -- "${1:-.}"

# After 408, 429, 500, 502, 503 and 504, curl tries again. It waits as long as the header Retry-After says. The
# Idempotency-Key is the same in all attempts of a request, so they get the same images. If the last attempt fails, the
# output file contains the error.
post() {
  local key=()
  if [[ -n ${UNFOG_API_KEY:-} ]]; then
    key=(--header "Authorization: Bearer $UNFOG_API_KEY")
  fi
  curl --silent --show-error --fail-with-body --max-time 60 --retry 4 --retry-max-time 120 \
    --header "Idempotency-Key: $(date +%s)-$RANDOM$RANDOM" ${key[@]+"${key[@]}"} "$@"
}
json='Content-Type: application/json'

post "$url/generate" --header "$json" --header 'Accept: image/png' --output seven.png \
  --data '{"digit": 7, "sampler": "dpmpp", "num_steps": 10, "scale": 4}'
echo 'wrote seven.png'

post "$url/generate" --header "$json" --header 'Accept: application/zip' --output zeros.zip \
  --data '{"digit": 0, "count": 3, "seed": 1, "sampler": "dpmpp", "num_steps": 10}'
echo 'wrote zeros.zip'

# An event has a line "event: <name>" and a line "data: <JSON object>".
post "$url/generate?previews=5" --no-buffer --header "$json" --header 'Accept: text/event-stream' \
  --data '{"digit": 5, "sampler": "dpmpp", "num_steps": 10, "scale": 4}' |
  while read -r field value; do
    if [[ $field == event: ]]; then
      event=$value
    elif [[ ${event:-} == progress && $value =~ \"step\":\ ([0-9]+) ]]; then
      echo "step ${BASH_REMATCH[1]}"
    elif [[ ${event:-} == image && $value =~ \"png\":\ \"([^\"]+) ]]; then
      base64 --decode <<<"${BASH_REMATCH[1]}" >stream.png
    elif [[ ${event:-} == error ]]; then
      echo "$value" >&2
      exit 1
    fi
  done
echo 'wrote stream.png'

post "$url/recognize" --form image=@seven.png --output recognised.json
echo "recognised $(sed 's/.*"digit": *\([0-9]\).*/\1/' recognised.json)"
