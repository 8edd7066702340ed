#!/bin/bash
# A cluster of this machine under an even load for an hour: does memory grow, do descriptors or threads?
#
#   tests/bench/soak.sh OUT [--duration 1h] [--rate X] [--sessions N] [--warm-up N] [--programs DIR] [--results FILE]
#                       [-- ARGUMENT...]
#
#   OUT             gets samples.jsonl, soak.svg, load.json and the cluster's folder
#   --duration D    of the load (default 1h)
#   --warm-up N     requests before it, as fast as they go, for pools and caches to fill (default 1500)
#   --rate X        requests a second (default: half of what four streams reach in ten seconds)
#   --sessions N    conversations at a time (default 20)
#   --programs DIR  as that of deploy/local/run.sh; default: builds
#   --results FILE  gets the result as a line of JSON too (default: tests/bench/results/ of this month)
#   ARGUMENT...     of deploy/local/run.sh (default: --routers 2 --pipelines 2 --stages 1)
#
# Exit status 1: something grows (soak.py says what counts as that), a process died, or a request failed.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
readonly root
duration=1h rate='' sessions=20 warm_up=1500 out='' results=$root/tests/bench/results/$(date -u +%Y-%m).jsonl
programs=() cluster=(--routers 2 --pipelines 2 --stages 1)
usage_error() {
  echo "soak.sh: $* (see --help)" >&2
  exit 2
}
while (($# > 0)); do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --duration) duration=${2:-}; shift ;;
    --rate) rate=${2:-}; shift ;;
    --sessions) sessions=${2:-}; shift ;;
    --warm-up) warm_up=${2:-}; shift ;;
    --programs) programs=(--programs "${2:-}"); shift ;;
    --results) results=${2:-}; shift ;;
    --) shift; cluster=("$@"); break ;;
    -*) usage_error "unknown argument '$1'" ;;
    *) [[ -z $out ]] || usage_error "more than one OUT"; out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || usage_error "OUT is missing"
mkdir -p "$out"
out=$(cd "$out" && pwd -P)
finish() { "$root/deploy/local/stop.sh" --data-dir "$out/cluster" >&2 || true; }
trap finish EXIT
"$root/deploy/local/run.sh" --data-dir "$out/cluster" "${programs[@]}" "${cluster[@]}"
python3 "$root/tests/bench/soak.py" "$out" --duration "$duration" --sessions "$sessions" --results "$results" \
  --warm_up "$warm_up" ${rate:+--rate "$rate"} --cluster "${cluster[*]}"
