#!/bin/bash
# Measures speed on this machine: the engine alone, a whole cluster, and the machine's own limits, on synthetic models.
#
#   tests/bench/run.sh OUT [--llama_cpp DIR] [--shapes 0.1b,0.4b,1.5b] [--formats bf16,int8,int4] [ARGUMENT...]
#
# OUT gets table.txt, results.jsonl and charts (batch, length, threads, size: .svg); the lines are appended to
# tests/bench/results/ as well, to keep. All arguments: tests/bench/run.sh --help. On a machine with nothing else to do:
# what shares it shows in the numbers. About an hour for all shapes and formats; --shapes 0.1b takes ten minutes.
set -euo pipefail
readonly root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
caller=$PWD
for argument in "$@"; do
  [[ $argument != -h && $argument != --help ]] || exec python3 "$root/tests/bench/bench.py" --binaries . --help
done
cd "$root"
deploy/local/setup.sh >&2
bazel build --show_progress --show_progress_rate_limit=10 --curses=no \
  //services/state_store //services/worker //services/router //services/rwkvctl //tests/bench:engine_bench \
  //tests/bench:limits //tests/bench:make_model //tests/bench:step_timeline >&2
cd "$caller"
exec python3 "$root/tests/bench/bench.py" --binaries "$root/.bazel/bin" \
  --results "$root/tests/bench/results/$(date -u +%Y-%m).jsonl" "$@"
