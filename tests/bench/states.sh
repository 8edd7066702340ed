#!/bin/bash
# Measures how fast states are saved and restored on this machine, and what that costs tokens beside them.
#
#   tests/bench/states.sh OUT [--cases transfer,resume,beside] [--shapes 0.1b,1.5b,7.2b] [ARGUMENT...]
#
# OUT, on the disk to measure, gets states.txt and states.jsonl; the lines are appended to tests/bench/results/ as well,
# to keep. All arguments: tests/bench/states.sh --help. On a machine with nothing else to do; some minutes.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
readonly root
caller=$PWD
for argument in "$@"; do
  [[ $argument != -h && $argument != --help ]] || exec python3 "$root/tests/bench/states.py" --binaries . --help
done
cd "$root"
deploy/local/setup.sh >&2
bazel build --show_progress --show_progress_rate_limit=10 --curses=no //services/state_store //services/worker \
  //services/router //services/rwkvctl //tests/bench:state_bench //tests/bench:make_model >&2
cd "$caller"
exec python3 "$root/tests/bench/states.py" --binaries "$root/.bazel/bin" \
  --results "$root/tests/bench/results/$(date -u +%Y-%m).jsonl" "$@"
