#!/bin/bash
# What only a GPU can prove, in ten minutes:
#
#   tests/gpu/prove.sh [--seconds N] OUT_DIR [DEVICE [PEERS_DIR]]
#
# It ends after N seconds (600); what it has not come to by then is not run. First comes what is right or wrong, then
# what is fast or slow, the goals' models before others.
# DEVICE is what --device takes: cuda:0, or for the rehearsal without a GPU cuda/emulated. PEERS_DIR has a folder for
# each other program that is to be measured beside ours, with a run.sh: `run.sh MODEL BATCHES`, of 0.4b, 1.5b or 7.2b,
# prints lines like {"case": "decode", "batch": 8, "tokens_per_s": {"best": 1.0}}, or "NOT RUN: why". OUT_DIR gets a log
# for each step, prove.jsonl (a line a step: line, what, result, seconds, why), rates.jsonl, ops.jsonl, speed.jsonl and
# peers.jsonl with what was measured, and summary.txt: every line of the list as proved, measured (a number, and nobody
# says which it should be), failed or not run, and why. After a failure of lines 1 to 5 nothing more is run. Ends with 0
# if nothing failed.
# Programs are those beside this tree (what bundle.sh makes, for a machine that has only a driver); else Bazel builds
# them.
set -uo pipefail
whole=600
if [[ ${1:-} == --seconds && ${2:-} =~ ^[1-9][0-9]{0,5}$ ]]; then
  whole=$2
  shift 2
fi
if [[ $# -lt 1 || $# -gt 3 || $1 == -* ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
device=${2:-cuda:0}
peers=${3:+$(cd "$3" && pwd)} || exit 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
programs=(tests/gpu/device_tests tests/gpu/prover/prover tests/bench/{engine_bench,make_model}
  services/{state_store/state_store,router/router,rwkvctl/rwkvctl,worker/worker})
[[ $device != cuda/emulated ]] || programs+=(services/worker/testing/emulated_worker)
readonly out device peers here programs whole
if [[ -x $here/tests/bench/engine_bench ]]; then
  bin=$here
else
  (cd "$here" && timeout -k 60 7200 bazel build "${programs[@]/#/\/\/}") 2> "$out/build.log" ||
    { tail "$out/build.log" >&2; exit 2; }
  bin=$(cd "$here" && bazel info bazel-bin 2> /dev/null)
fi
readonly bin name=${device//[^a-zA-Z0-9]/_}
emulated=false
[[ $device != cuda/emulated ]] || emulated=true
# Of another call of this.
rm -f "$out"/{prove,rates,ops,speed,peers}.jsonl "$out"/summary.txt "$out"/{1,2,3,4,5,6,7,8,9,10}-*.log
: > "$out/prove.jsonl"
unset "${!GTEST_@}" "${!TEST_SHARD@}" "${!TEST_TOTAL@}"  # They could leave out cases.
rm -rf "$out/tmp"
export TEST_TMPDIR=$out/tmp TEST_SRCDIR=${TEST_SRCDIR:-$here/..} TEST_WORKSPACE=${TEST_WORKSPACE:-$(basename "$here")}
mkdir -p "$TEST_TMPDIR"
stopped='' failures=0 word=proved spare=20
SECONDS=0

json() {  # TEXT, without control characters
  local text=${1//[[:cntrl:]]/ }
  text=${text//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
record() {  # LINE WHAT RESULT SECONDS WHY
  printf '{"line": %d, "what": %s, "result": "%s", "seconds": %s, "why": %s}\n' "$1" "$(json "$2")" "$3" "$4" \
    "$(json "$5")" >> "$out/prove.jsonl"
  printf '%2d  %-8s %6.1f s  %s%s\n' "$1" "$3" "$4" "$2" "${5:+: $5}"
}

# LINE WHAT LIMIT COMMAND...: proved if it ends well in time. A command that says "NOT RUN: why" is not run, and what it
# says behind "SAYS: " is kept. Who does not end when told to is killed 5 seconds later, and so are all it has started.
step() {
  local line=$1 what=$2 limit=$3 begin tenths log result=$word why='' left=$((whole - SECONDS - spare)) cut=false
  shift 3
  log=$out/$line-${what//[^a-zA-Z0-9]/_}.log
  [[ -z $stopped ]] || { record "$line" "$what" 'not run' 0 "line $stopped failed"; return; }
  [[ $left -gt 0 ]] || { record "$line" "$what" 'not run' 0 "$whole s are over"; return; }
  [[ $limit -le $left ]] || { limit=$left; cut=true; }
  begin=${EPOCHREALTIME//[!0-9]/}
  timeout -k 5 "$limit" bash -o pipefail -c '"$@"' step "$@" > "$log" 2>&1 < /dev/null &
  local group=$! status
  wait "$group"
  status=$?
  kill -KILL -- "-$group" 2> /dev/null  # Whoever it has left behind would be in the way of what follows.
  why=$(sed -n 's/^SAYS: //p' "$log" | head -n 1)
  if [[ $status -eq 124 || $status -eq 137 ]] && $cut; then
    result='not run'
    why="$whole s were over after $limit s of it"
  elif [[ $status -ne 0 ]]; then
    result=failed
    why="status $status: $(tail -n 1 "$log" | cut -c1-200)"
    [[ $status -ne 124 && $status -ne 137 ]] || why="not done in $limit s"
    failures=$((failures + 1))
    [[ $line -gt 5 ]] || stopped=$line
  elif grep -q '^NOT RUN: ' "$log"; then
    result='not run'
    why=$(sed -n 's/^NOT RUN: //p' "$log" | head -n 1)
  fi
  tenths=$(((${EPOCHREALTIME//[!0-9]/} - begin) / 100000))
  record "$line" "$what" "$result" "$((tenths / 10)).$((tenths % 10))" "$why"
}
measure() {
  word=measured step "$@"
}

# FILE MORE COMMAND...: keeps the lines of JSON that the command says, each with MORE at its beginning. None is a
# failure.
keep() {
  local text lines=0
  while IFS= read -r text; do
    printf '%s\n' "$text"
    [[ $text != 'NOT RUN: '* ]] || lines=1
    [[ $text == '{'* ]] || continue
    printf '{%s%s\n' "$2" "${text#'{'}" >> "$out/$1"
    lines=1
  done < <("${@:3}")
  wait $! || return
  [[ $lines -eq 1 ]] || { echo 'nothing was measured'; return 1; }
}

# COMMAND... of cases of this device. None that is run is not a success.
passed() {
  "$@" --gtest_brief=1 > "$out/tmp/cases" 2>&1
  local status=$? count
  cat "$out/tmp/cases"
  [[ $status -eq 0 ]] || return "$status"
  count=$(sed -n 's/^\[  PASSED  \] \([1-9][0-9]*\) tests\{0,1\}\.$/\1/p' "$out/tmp/cases")
  [[ -z $count ]] || { echo "SAYS: $count cases"; return; }
  local filter=${*: -1}
  echo "NOT RUN: no case is called ${filter#*=}"
  $emulated  # Of a GPU there must be some.
}
cases() {  # FILTER
  passed "$bin/tests/gpu/device_tests" "--gtest_filter=$1"
}

machine() {
  if $emulated; then
    echo 'NOT RUN: no GPU'
    return
  fi
  nvidia-smi -q && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
}
proof() {  # PROOF ARGUMENT...
  "$bin/tests/gpu/prover/prover" "$1" "$device" "${@:2}"
}
bits() {  # Without tensor cores, whose sums are their own.
  "$bin/tests/gpu/prover/prover" bits "$device/fma" "$TEST_TMPDIR" "$here/tests/gpu/bits.txt"
}
rates() {
  keep rates.jsonl '' proof rates
}
model() {  # SHAPE: whole, or not there.
  local path=$TEST_TMPDIR/$1.safetensors
  [[ -f $path ]] || { "$bin/tests/bench/make_model" "$1" "$path.part" && mv "$path.part" "$path"; }
}
bench() {  # SHAPE BATCHES LENGTHS [DEVICE'S TWIN]
  model "$1" || return
  keep speed.jsonl "\"model\": \"$1${4:-}\", " \
    "$bin/tests/bench/engine_bench" "$TEST_TMPDIR/$1.safetensors" "$device${4:-}" 1 "$seconds" "$2" "$3"
}
sanitize() {  # TOOL
  if $emulated || ! command -v compute-sanitizer > /dev/null; then
    echo "NOT RUN: $($emulated && echo 'no GPU' || echo 'compute-sanitizer is not in $PATH')"
    return
  fi
  local of=EqualsTheFormula/${name}  # The last two: products of every kind of weights.
  passed compute-sanitizer --tool "$1" --error-exitcode 9 "$bin/tests/gpu/device_tests" \
    "--gtest_filter=*${of}_base:*${of}_one_row:*BlockTest*/$name:*${of}_*_rows_5_inputs_33:*${of}_*_rows_17_inputs_33"
}
graphs() {
  proof graphs "$TEST_TMPDIR"
}
library() {  # COMMAND...: with cuBLASLt, if it is there.
  proof library > "$out/tmp/library" || { cat "$out/tmp/library"; return 1; }
  cat "$out/tmp/library"
  grep -q '^NOT RUN: ' "$out/tmp/library" || [[ $# -eq 0 ]] || "$@"
}
op_times() {  # WIDTH ROWS
  keep ops.jsonl '' proof op_times "$1" "$2" "$seconds"
}
goals() {
  python3 "$here/tests/gpu/goals.py" "$out" "$($emulated && echo emulated || nvidia-smi --query-gpu=name \
    --format=csv,noheader | head -n 1)" "$1"
}
cluster() {  # SHAPE TOKENS
  model "$1" && python3 "$here/tests/gpu/cluster.py" "$bin" "$device" "$TEST_TMPDIR/$1.safetensors" \
    "$TEST_TMPDIR/cluster" "$2"
}
serve() {  # SHAPE STREAMS TOKENS
  model "$1" || return
  keep speed.jsonl "\"model\": \"$1\", " python3 "$here/tests/gpu/cluster.py" load "$bin" "$device" \
    "$TEST_TMPDIR/$1.safetensors" "$TEST_TMPDIR/serve" "$2" "$3"
}
peer() {  # NAME SHAPE
  keep peers.jsonl "\"peer\": \"$1\", \"model\": \"$2\", " "$peers/$1/run.sh" "$2" "$batches"
}

seconds=2 epochs=1000 drawn=2000 served=(1.5b 256 256) widths=(1024 2048 4096) rows=(1 32 256)
layers=(1024 2048 2560 4096)
small=0.4b shapes=(1.5b 7.2b 0.4b)
batches=1,8,32,64,256,1024
lengths=128,1024,4096,32x1024
laws="*LawTest*/$name*"
every=''
if $emulated; then
  seconds=0.01 epochs=12 drawn=24 served=(tiny 2 4) widths=(128) rows=(3) layers=(128)
  small=tiny shapes=(tiny) batches=1,2 lengths=16,2x8
  laws="*LawTest.AnyNumberOfStages*/$name*:*LawTest.SaveRestore*/$name*"  # The others take long.
  every=base  # CI has held the emulated device to every case.
fi

export bin name device peers out here emulated seconds batches
export -f cases passed keep machine proof bits rates model bench sanitize graphs library op_times goals cluster serve \
  peer

step 1 'driver, clocks and card' 30 machine
measure 1 'copy bandwidth and matrix rate' 60 rates
step 2 'primitives of device.cuh one by one, against the emulation' 60 proof probes
step 3 'bits of small models against those of the emulation' 120 bits
for op in LayerNorm Embed MixInput Wkv4 Wkv6 Wkv7 DeepEmbed DeepEmbedAttention; do
  step 3 "conformance of $op" 120 cases "$op/*/${name}_${every:-*}"
done
step 3 'conformance of Products' 300 cases "Products/*/${name}_${every:-*}"
step 3 'laws of Products' 120 cases "*ProductLawsTest.*/$name"
step 3 'a block against the paper' 120 cases "*BlockTest.*/$name"
step 3 'conformance of products with rounded inputs' 300 \
  cases "RoundingProducts*/${name}_rounded_$($emulated && echo bf16_rows_8_inputs_31_outputs_1 || echo '*')"
step 3 'conformance of products by cuBLASLt' 300 library cases "*LibraryProductsTest*/${name}_lt"
step 4 'small models: logits and states of the oracle' 180 cases "*GoldenGpuTest*/$name"
for width in "${layers[@]}"; do
  step 4 "a layer of width $width" 90 proof layers "$TEST_TMPDIR" "$width"
done
for tool in memcheck racecheck synccheck initcheck; do
  step 5 "compute-sanitizer $tool" 90 sanitize "$tool"
done
step 6 'the same bits in every company, cut and chunk' 120 cases "$laws"
step 6 'by cuBLASLt: the same bits beside any rows of a bucket, and at any place' 120 \
  library cases "*LibraryProductsTest.ARow*/${name}_lt"
step 6 'what is drawn on the device is what the host draws' 60 cases "*DeviceDrawsTest*/$name*"
step 7 'graphs of decode steps: made, and with the bits of launches' 60 graphs
step 9 'rows by NCCL: right, and after kill -9 and silence' 120 proof pair
step 9 'clusters of one worker and of two: the same tokens, also after kill -9' 180 cluster "$small" "$drawn"
step 10 'saves beside a running batch, memory after many epochs' 120 proof epochs "$TEST_TMPDIR" "$epochs"

for shape in "${shapes[@]}"; do
  measure 7 "decode steps of $shape" 120 bench "$shape" "$batches" -
  measure 8 "prefill of $shape" 90 bench "$shape" - "$lengths"
  measure 8 "prefill of $shape with rounded inputs" 60 bench "$shape" - "${lengths##*,}" /rounded
  measure 8 "prefill of $shape by cuBLASLt" 60 library bench "$shape" - "${lengths##*,}" /lt
  [[ $shape != "${served[0]}" ]] || measure 7 "serving path of $shape" 120 serve "${served[@]}"
  for folder in ${peers:+"$peers"/*/}; do
    measure 7 "peer $(basename "$folder") at $shape" 120 peer "$(basename "$folder")" "$shape"
  done
  measure 7 "decode steps of $shape, whose kernels do not overlap" 60 bench "$shape" "${batches%%,*}" - /serial
  rm -f "$TEST_TMPDIR/$shape.safetensors"
done
for width in "${widths[@]}"; do
  for count in "${rows[@]}"; do
    measure 7 "time of each kernel at width $width, $count rows" 60 op_times "$width" "$count"
  done
done
spare=5  # The goals only compare.
measure 7 'kernels against what bytes and operations need' 10 goals kernels
[[ -z $peers ]] || measure 7 'peers beside ours' 10 goals peers
for goal in decode_1.5b_1 decode_1.5b_32 decode_7.2b_1 prefill_1.5b prefill_1.5b_rounded prefill_1.5b_lt \
  serving_1.5b; do
  step 7 "goal $goal" 10 goals "$goal"
done

rm -rf "$TEST_TMPDIR"
python3 - "$out" "$device" << 'PYTHON'
import json
import pathlib
import sys
out, device = pathlib.Path(sys.argv[1]), sys.argv[2]
lines = [json.loads(line) for line in (out / "prove.jsonl").read_text().splitlines()]
text = [f"device {device}"]
if device == "cuda/emulated":
    text.append("a rehearsal on a CPU: of a GPU nothing is proved here")
for result in ("failed", "proved", "measured", "not run"):
    of_it = [line for line in lines if line["result"] == result]
    text.append(f"{result}: {len(of_it)}")
    text += [f"  {line['line']:2}  {line['what']}" + (f": {line['why']}" if line["why"] else "") for line in of_it]
(out / "summary.txt").write_text("\n".join(text) + "\n")
print("\n".join(text))
PYTHON
summed=$?
[[ $failures -eq 0 && $summed -eq 0 ]]
