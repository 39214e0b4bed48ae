#!/usr/bin/env bash
# Uses the API with curl 7.76 or newer: a PNG file, a ZIP archive, an event stream, recognition, and retries.
#
# Run: examples/curl.sh [FOLDER]
set -euo pipefail

url=${UNFOG_URL:-http://127.0.0.1:8000}
mkdir -p -- "${1:-.}"
cd -- "${1:-.}"
options=(--silent --show-error --max-time 60)
if [[ -n ${UNFOG_API_KEY:-} ]]; then
  options+=(--header "Authorization: Bearer $UNFOG_API_KEY")
fi
json='Content-Type: application/json'

# post FILE PATH OPTION...: sends a POST request and writes the response to a file. curl retries it after a refused
# connection, and after 408, 429, 500, 502, 503 and 504. It waits for the time in the header Retry-After, but at most
# 120 s in total. All attempts have the same Idempotency-Key, so they get the same images.
post() {
  local status
  status=$(curl "${options[@]}" --retry 4 --retry-connrefused --retry-max-time 120 \
    --header "Idempotency-Key: $(date +%s)-$RANDOM$RANDOM" \
    --output "$1.part" --write-out '%{http_code}' "$url$2" "${@:3}")
  # curl 8.14 returns 0 if it gives up because Retry-After is too long, even with --fail. So the status is checked here.
  if [[ $status != 200 ]]; then
    printf 'status %s: %s\n' "$status" "$(cat "$1.part")" >&2
    rm -- "$1.part"
    exit 1
  fi
  mv -- "$1.part" "$1" # An error does not replace an earlier file.
  echo "wrote $1"
}

post seven.png /generate --header "$json" --header 'Accept: image/png' \
  --data '{"digit": 7, "sampler": "dpmpp", "num_steps": 10, "scale": 4}'

post zeros.zip /generate --header "$json" --header 'Accept: application/zip' \
  --data '{"digit": 0, "count": 3, "seed": 2, "sampler": "dpmpp", "num_steps": 10}'

# An event stream, without retries. An event has a line "event: <name>" and a line "data: <JSON object>".
curl "${options[@]}" --no-buffer --fail-with-body "$url/generate?previews=5" \
  --header "$json" --header 'Accept: text/event-stream' \
  --data '{"digit": 5, "sampler": "dpmpp", "num_steps": 10, "scale": 4}' |
  while read -r field value; do
    if [[ $field == event: ]]; then
      event=$value
    elif [[ ${event:-} == progress && $value =~ \"step\":\ ([0-9]+) ]]; then
      echo "step ${BASH_REMATCH[1]}"
    elif [[ ${event:-} == image && $value =~ \"png\":\ \"([^\"]+) ]]; then
      base64 --decode <<<"${BASH_REMATCH[1]}" >stream.png
      echo 'wrote stream.png'
    elif [[ ${event:-} == error || $field == '{'* ]]; then # an error after or before the first event
      echo "$field $value" >&2
      exit 1
    fi
  done

post recognised.json /recognize --form image=@seven.png
echo "recognised $(sed 's/.*"digit": *\([0-9]\).*/\1/' recognised.json)"
