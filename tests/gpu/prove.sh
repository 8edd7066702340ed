#!/bin/bash
# What only a GPU can prove, in about ten minutes:
#
#   tests/gpu/prove.sh OUT_DIR [DEVICE]
#
# DEVICE is what --device takes: cuda:0, or for the rehearsal without a GPU cuda/emulated. OUT_DIR gets a log for each
# step, prove.jsonl (a line a step: line, what, result, seconds, why) and summary.txt: every line of the list as proved,
# failed or not run, and why. After a failure of lines 1 to 5 nothing more is run. Ends with 0 if nothing failed.
# Programs are those beside this tree (a test's runfiles, or a folder of that form); else Bazel builds them.
set -uo pipefail
if [[ $# -lt 1 || $# -gt 2 || $1 == -* ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
device=${2:-cuda:0}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
programs=(kernels/conformance/{block,deep_embed,mix_input,norm,products,wkv4,wkv6,wkv7}_test
  services/worker/engine/{golden,stage_laws}_test tests/bench/{engine_bench,make_model}
  tests/integration/emulated_gpu_test)
readonly out device here programs
if [[ -x $here/tests/bench/engine_bench ]]; then
  bin=$here
else
  (cd "$here" && bazel build "${programs[@]/#/\/\/}") 2> "$out/build.log" || { tail "$out/build.log" >&2; exit 2; }
  bin=$(cd "$here" && bazel info bazel-bin 2> /dev/null)
fi
readonly bin name=${device//[^a-zA-Z0-9]/_}
emulated=false
[[ $device != cuda/emulated ]] || emulated=true
: > "$out/prove.jsonl"
export TEST_TMPDIR=$out/tmp TEST_SRCDIR=${TEST_SRCDIR:-$here/..} TEST_WORKSPACE=${TEST_WORKSPACE:-$(basename "$here")}
mkdir -p "$TEST_TMPDIR"
stopped='' failures=0

record() {  # LINE WHAT RESULT SECONDS WHY
  python3 - "$@" >> "$out/prove.jsonl" << 'PYTHON'
import json
import sys
line, what, result, seconds, why = sys.argv[1:]
print(json.dumps({"line": int(line), "what": what, "result": result, "seconds": float(seconds), "why": why}))
PYTHON
  printf '%2d  %-8s %6.1f s  %s%s\n' "$1" "$3" "$4" "$2" "${5:+: $5}"
}
not_run() { record "$1" "$2" 'not run' 0 "$3"; }

# LINE WHAT LIMIT COMMAND...: proved if it ends well in time. A command that says "NOT RUN: why" is not run.
step() {
  local line=$1 what=$2 limit=$3 begin log result='proved' why=''
  shift 3
  log=$out/$line-${what//[^a-zA-Z0-9]/_}.log
  [[ -z $stopped ]] || { not_run "$line" "$what" "line $stopped failed"; return; }
  begin=$(date +%s.%N)
  timeout "$limit" bash -o pipefail -c '"$@"' step "$@" > "$log" 2>&1
  local status=$?
  if [[ $status -ne 0 ]]; then
    result=failed
    why="status $status: $(tail -n 1 "$log" | cut -c1-200)"
    [[ $status -ne 124 ]] || why="not done in $limit s"
    failures=$((failures + 1))
    [[ $line -gt 5 ]] || stopped=$line
  elif grep -q '^NOT RUN: ' "$log"; then
    result='not run'
    why=$(sed -n 's/^NOT RUN: //p' "$log" | head -n 1)
  fi
  record "$line" "$what" "$result" "$(python3 -c "import time; print(round(time.time() - $begin, 1))")" "$why"
}

# A test's cases of this device. None is not a success.
cases() {
  local test=$1 filter=$2
  "$bin/$test" --gtest_filter="$filter" --gtest_brief=1 > "$out/tmp/cases" 2>&1
  local status=$?
  cat "$out/tmp/cases"
  [[ $status -eq 0 ]] || return "$status"
  ! grep -q '0 tests from 0 test suites ran' "$out/tmp/cases" && return
  echo "NOT RUN: $test has no case for $device"
  $emulated  # Of a GPU there must be some.
}

machine() {
  if $emulated; then
    echo 'NOT RUN: no GPU'
    return
  fi
  nvidia-smi -q && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
}
bench() {  # SHAPE BATCHES LENGTHS
  "$bin/tests/bench/make_model" "$1" "$TEST_TMPDIR/$1.safetensors" &&
    "$bin/tests/bench/engine_bench" "$TEST_TMPDIR/$1.safetensors" "$device" 1 "$seconds" "$2" "$3" |
    tee -a "$out/speed.jsonl"
}
sanitize() {  # TOOL
  if $emulated || ! command -v compute-sanitizer > /dev/null; then
    echo "NOT RUN: $($emulated && echo 'no GPU' || echo 'compute-sanitizer is not in $PATH')"
    return
  fi
  for op in norm mix_input products wkv4 wkv6 wkv7; do
    compute-sanitizer --tool "$1" --error-exitcode 9 "$bin/kernels/conformance/${op}_test" \
      --gtest_filter="*/$name:*/${name}_*" --gtest_brief=1 || return
  done
}
two_workers() {
  if ! $emulated; then
    echo 'NOT RUN: no program yet that gives each worker a GPU of its own'
    return
  fi
  local runfiles=$bin/tests/integration/emulated_gpu_test.runfiles  # If Bazel built it, and not runs it.
  if [[ -d $runfiles/rwkv_serving ]]; then
    export TEST_SRCDIR=$runfiles TEST_WORKSPACE=rwkv_serving
  fi
  "$bin/tests/integration/emulated_gpu_test" --gtest_filter='DisturbedTest.WorkersAreKilledInEveryPhase' \
    --gtest_brief=1
}

seconds=2
shapes=(0.4b 1.5b)
batches=1,8,32,64,256
lengths=128,1024,4096
if $emulated; then
  seconds=0.01 shapes=(tiny) batches=1,2 lengths=16
fi

export bin name device out emulated seconds
export -f cases machine bench sanitize two_workers

step 1 'driver, clocks and card' 30 machine
not_run 1 'copy bandwidth and matrix rate' 'no program for it yet'
not_run 2 'primitives of device.cuh one by one' 'no program for it yet; line 3 uses them all'
for op in block deep_embed mix_input norm products wkv4 wkv6 wkv7; do
  step 3 "conformance of $op" 300 cases "kernels/conformance/${op}_test" "*/$name:*/${name}_*"
done
not_run 3 'bit hashes against the emulation' 'no hashes are kept yet'
step 4 'small models: logits and states of the oracle' 180 cases services/worker/engine/golden_test \
  'GoldenTest.CudaDevicesMatchTheOracle'
for tool in memcheck racecheck synccheck initcheck; do
  step 5 "compute-sanitizer $tool" 120 sanitize "$tool"
done
step 6 'the same bits in every company, cut and chunk' 120 cases services/worker/engine/stage_laws_test "*$name*"
not_run 7 'graphs' 'there are none yet'
for shape in "${shapes[@]}"; do
  step 7 "decode steps of $shape" 120 bench "$shape" "$batches" -
  step 8 "prefill of $shape" 60 bench "$shape" - "$lengths"
done
not_run 7 'time of each kernel against static_report.json' 'no program for it yet'
step 9 'two workers and NCCL: tokens, kill -9, silence' 240 two_workers
not_run 10 'saves beside a running batch, memory after 1,000 epochs' 'no program for it yet'

rm -rf "$TEST_TMPDIR"
python3 - "$out" "$device" << 'PYTHON'
import json
import pathlib
import sys
out, device = pathlib.Path(sys.argv[1]), sys.argv[2]
lines = [json.loads(line) for line in (out / "prove.jsonl").read_text().splitlines()]
text = [f"device {device}"]
for result in ("failed", "proved", "not run"):
    of_it = [line for line in lines if line["result"] == result]
    text.append(f"{result}: {len(of_it)}")
    text += [f"  {line['line']:2}  {line['what']}" + (f": {line['why']}" if line["why"] else "") for line in of_it]
(out / "summary.txt").write_text("\n".join(text) + "\n")
print("\n".join(text))
PYTHON
[[ $failures -eq 0 ]]
