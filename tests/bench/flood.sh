#!/bin/bash
# How much one tenant's flood moves another's time between tokens. A cluster of this machine, whose slots two tenants
# share: the quiet one with 8 streams, the other with 56, which is all there is, then with ten times as many. In turns,
# so that what else the machine does meets both alike. Beside the times it tells what the cluster itself did meanwhile:
# processor seconds of each process, refusals, turns that gave their slot away. These say what a flood costs on a
# machine that others use, too, where the times say what everybody did.
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
# did FILE: what the cluster has done since its start, in JSON.
did() {
  python3 - "$folder/data/cluster.env" <<'EOF_DID' >"$1"
import json, os, re, sys, urllib.request
env = dict(line.strip().partition("=")[::2] for line in open(sys.argv[1]) if "=" in line)
def seconds(name):
    fields = open(f"/proc/{env[name + '.pid']}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
metrics = urllib.request.urlopen(f"http://{env['router-0.metrics']}/metrics", timeout=10).read().decode()
def counter(name):
    return float(re.search(rf"^{name}\S* (\S+)$", metrics, re.MULTILINE).group(1))
print(json.dumps({**{name: seconds(f"{name}-0") for name in ("router", "worker", "state_store")},
                  "refusals": counter('rwkv_router_errors_total\\{[^}]*cause="overload"'),
                  "yields": counter("rwkv_router_yielded_turns_total"),
                  "tokens": counter('rwkv_router_tokens_total\\{[^}]*kind="generated"')}))
EOF_DID
}
# beside STREAMS: the quiet tenant's report while the other one has so many streams, and what the cluster did meanwhile.
beside() {
  load flood "$1" $((seconds + 8)) >"$folder/other" &
  local other=$!
  sleep 4 # Until all of them are there; nothing depends on how exactly.
  did "$folder/did_begin"
  load quiet 8 "$seconds" >"$folder/quiet_report"
  did "$folder/did_end"
  wait "$other" || true
  python3 -c 'import json, sys
report, begin, end = (json.load(open(path)) for path in sys.argv[1:])
print(json.dumps({**report, "cluster": {what: end[what] - begin[what] for what in begin}}))' \
    "$folder/quiet_report" "$folder/did_begin" "$folder/did_end"
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
for what in ("router", "worker", "state_store"):
    line[f"{what}_cpu_s"] = [[round(report["cluster"][what], 2) for report in pair[:2]] for pair in pairs]
line["yields"] = [[round(report["cluster"]["yields"]) for report in pair[:2]] for pair in pairs]
line["refusals"] = [round(flooded["cluster"]["refusals"]) for _, flooded, _ in pairs]
# What a flood costs the router beyond the tokens, which cost it what they cost without one.
line["router_us_per_refusal"] = [
    round(1e6 * (b["cluster"]["router"] - a["cluster"]["router"] * b["cluster"]["tokens"] / a["cluster"]["tokens"]) /
          max(1, b["cluster"]["refusals"])) for a, b, _ in pairs]
line["refusals_of_the_flood"] = sum(other["requests"]["refusals"] for _, _, other in pairs)
with open(sys.argv[3], "a") as file:
    file.write(json.dumps(line) + "\n")
print(json.dumps(line))
sys.exit(1 if line["ratio_p99"] > 1.1 else 0)
EOF_PYTHON
