#!/bin/bash
# How much one tenant's flood moves another's time between tokens. A cluster of this machine, whose slots two tenants
# share: the quiet one with 8 streams, the other with 56, which is all there is, then with ten times as many. In turns,
# so that what else the machine does meets both alike.
#
#   tests/bench/flood.sh [--pairs N] [--seconds N] [--programs DIR] [--results FILE]
#
#   --pairs N       of measurements (default 5)
#   --seconds N     of each (default 12)
#   --programs DIR  as that of deploy/local/run.sh; default: builds
#   --results FILE  gets a line of JSON too (default: tests/bench/results/ of this month)
#
# Exit status 1: the median of the pairs' ratios of p99 is over 1.1.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
readonly root
pairs=5 seconds=12 results=$root/tests/bench/results/$(date -u +%Y-%m).jsonl programs=()
while (($# > 0)); do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --pairs) pairs=${2:-}; shift ;;
    --seconds) seconds=${2:-}; shift ;;
    --programs) programs=(--programs "${2:-}"); shift ;;
    --results) results=${2:-}; shift ;;
    *) echo "flood.sh: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
  shift
done
folder=$(mktemp -d)
readonly folder
finish() {
  "$root/deploy/local/stop.sh" --data-dir "$folder/data" >&2 || true
  tail -n 5 "$folder/log" >&2 || true
  rm -rf "$folder"
}
trap finish EXIT
# A flood comes from other machines: making it is not to cost the cluster its processors, nor the quiet tenant's client
# its own. So clients have half of the processors, and the flood's gives way.
mapfile -t processors < <(taskset -cp $$ | sed 's/.*: //' | python3 -c 'import sys
for part in sys.stdin.read().split(","):
    low, _, high = part.partition("-")
    print(*range(int(low), int(high or low) + 1), sep="\n")')
half=$(((${#processors[@]} + 1) / 2))
for_cluster=$(IFS=,; echo "${processors[*]:0:half}")
for_clients=$(IFS=,; echo "${processors[*]: -half}")
readonly half for_cluster for_clients
taskset -c "$for_cluster" "$root/deploy/local/run.sh" --tls --stages 1 --data-dir "$folder/data" "${programs[@]}"
for tenant in quiet flood; do
  openssl rand -hex 32 >"$folder/$tenant"
  hash=$(tr -d '\n' <"$folder/$tenant" | sha256sum | cut -d ' ' -f 1)
  echo "sha256:$hash name=$tenant tenant=$tenant" >>"$folder/data/tls/api_keys"
done
router=$(sed -n 's/^router-0.grpc=//p' "$folder/data/cluster.env")
readonly router
readonly connection=(--router "$router" --tls-authorities "$folder/data/tls/client/ca.crt")
call() { "$folder/data/bin/rwkvctl" "${connection[@]}" --api-key-file "$folder/$1" "${@:2}"; }
# The router reads its keys again within seconds.
for ((i = 0; i < 100; ++i)); do
  if call quiet usage >/dev/null 2>&1 && call flood usage >/dev/null 2>&1; then break; fi
  sleep 0.1
done
# load TENANT STREAMS SECONDS: the report.
load() {
  local priority=0
  [[ $1 != flood ]] || priority=10
  nice -n "$priority" taskset -c "$for_clients" "$folder/data/bin/rwkvctl" "${connection[@]}" \
    --api-key-file "$folder/$1" load --streams "$2" --duration "$3s" --prompt-tokens 16 --max-tokens 64 --json \
    --retry 2>>"$folder/log"
}
# beside STREAMS: the quiet tenant's report while the other one has so many streams.
beside() {
  load flood "$1" $((seconds + 8)) >"$folder/other" &
  local other=$!
  sleep 4 # Until all of them are there; nothing depends on how exactly.
  load quiet 8 "$seconds"
  wait "$other" || true
}
for ((pair = 0; pair < pairs; ++pair)); do
  beside 56 >"$folder/before"
  beside 560 >"$folder/flooded"
  python3 -c 'import json, sys
print(json.dumps([json.load(open(path)) for path in sys.argv[1:]]))' \
    "$folder/before" "$folder/flooded" "$folder/other" >>"$folder/pairs"
  echo "flood.sh: pair $((pair + 1)) of $pairs" >&2
done
python3 - "$root/tests/bench" "$folder/pairs" "$results" "$pairs" "$seconds" <<'EOF_PYTHON'
import json, statistics, sys
sys.path.insert(0, sys.argv[1])
import bench
pairs = [json.loads(line) for line in open(sys.argv[2])]
of = lambda report, what: report["inter_token_seconds"][what]
for report in sum(([before, flooded] for before, flooded, _ in pairs), []):
    assert report["requests"]["completed"] > 0, report
line = {**bench.machine(), "command": f"tests/bench/flood.sh --pairs {sys.argv[4]} --seconds {sys.argv[5]}",
        "what": "flood", "quiet_streams": 8, "other_streams": [56, 560]}
for what in ("p50", "p99"):
    line[f"inter_token_{what}_s"] = [[of(before, what), of(flooded, what)] for before, flooded, _ in pairs]
    line[f"ratio_{what}"] = round(statistics.median(of(b, what) / of(a, what) for a, b, _ in pairs), 3)
line["quiet_failed"] = sum(b["requests"]["failed"] for _, b, _ in pairs)
line["quiet_tokens_per_s"] = [[round(r["tokens"]["generated_per_second"], 1) for r in pair[:2]] for pair in pairs]
line["refusals_of_the_flood"] = sum(other["requests"]["refusals"] for _, _, other in pairs)
with open(sys.argv[3], "a") as file:
    file.write(json.dumps(line) + "\n")
print(json.dumps(line))
sys.exit(1 if line["ratio_p99"] > 1.1 else 0)
EOF_PYTHON
