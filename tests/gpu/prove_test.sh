#!/bin/bash
# What prove.sh makes of programs that do well, fail, hang, or have nothing for the device: stand-ins for the real ones.
set -euo pipefail
readonly tree=$TEST_TMPDIR/tree
mkdir -p "$tree/tests/gpu"
cp tests/gpu/prove.sh "$tree/tests/gpu/"
program() {  # PATH BODY
  mkdir -p "$tree/$(dirname "$1")"
  printf '#!/bin/bash\n%s\n' "$2" > "$tree/$1"
  chmod +x "$tree/$1"
}
# Of some cases all are left out.
program tests/gpu/device_tests 'case "$*" in
  *LawTest*) echo "[  PASSED  ] 0 tests." ;;
  *DrawsTest*) echo "[  PASSED  ] 0 tests."; echo "[  SKIPPED ] 3 tests, listed below:" ;;
  *) echo "[  PASSED  ] 7 tests." ;;
esac'
program tests/gpu/prover/prover 'case $1 in
  rates) echo "{\"copy_gb_per_s\": 1, \"matrix_tflop_per_s\": 1}" ;;
  op_times) echo "{\"op\": \"key\", \"width\": 1, \"rows\": 1, \"us\": 1, \"bytes\": 1, \"flop\": 1}" ;;
esac'
program tests/bench/make_model 'echo > "$2"'
program tests/bench/engine_bench 'echo "{\"tokens_per_s\": 1}"'
cp tests/gpu/{goals.py,bits.txt} "$tree/tests/gpu/"
cat > "$tree/tests/gpu/cluster.py" << 'PYTHON'
import sys
print('{"case": "serving", "tokens_per_s": {"best": 1}}' if sys.argv[1] == "load" else "SAYS: the same")
PYTHON

out=$TEST_TMPDIR/out
fail() {
  echo "prove_test: $1" >&2
  cat "$out/summary.txt" >&2
  exit 1
}
expect() { grep -q "$1" "$out/summary.txt" || fail "the summary does not say: $1"; }

mkdir -p "$out"
echo 'proved: 99' > "$out/summary.txt"  # Of another call.
GTEST_TOTAL_SHARDS=9 "$tree/tests/gpu/prove.sh" "$out" cuda/emulated > /dev/null || fail 'it does not end well'
expect '^failed: 0'
expect ' 3  conformance of Wkv7: 7 cases$'
expect 'no case is called .*LawTest'
expect 'what the host draws: no case is called .*DrawsTest'
if grep -q 'proved: 99' "$out/summary.txt"; then fail 'it says what another call has said'; fi
grep -q tokens_per_s "$out/speed.jsonl" || fail 'no speed was kept'
python3 - "$out/prove.jsonl" << 'PYTHON' || fail 'prove.jsonl is not as it should be'
import json
import sys
lines = [json.loads(line) for line in open(sys.argv[1])]
assert {line["line"] for line in lines} == set(range(1, 11)), "a line of the list is missing"
assert all(line["why"] for line in lines if line["result"] in ("failed", "not run")), "a reason is missing"
result = {line["what"]: line["result"] for line in lines}
assert result["decode steps of tiny"] == result["kernels against what bytes and operations need"] == "measured", result
PYTHON

# A failure behind a pipe is one; behind line 5 the others are still run.
program tests/bench/engine_bench 'exit 3'
out=$TEST_TMPDIR/late
if "$tree/tests/gpu/prove.sh" "$out" cuda/emulated > /dev/null; then fail 'a failure was not told'; fi
expect 'decode steps of tiny: status 3'
expect ' 9  clusters of one worker and of two.*: the same$'

# Who measures nothing has failed, though he says nothing of it.
program tests/bench/engine_bench true
out=$TEST_TMPDIR/silent
if "$tree/tests/gpu/prove.sh" "$out" cuda/emulated > /dev/null; then fail 'nothing was measured, and that is well'; fi
expect 'decode steps of tiny: status 1: nothing was measured'

# Who hangs is killed when the time is over, with all that he has started, and what comes later is not run.
program tests/bench/engine_bench "trap '' TERM; sleep 600 & echo \$! > $TEST_TMPDIR/left; wait"
out=$TEST_TMPDIR/hanging
"$tree/tests/gpu/prove.sh" --seconds 24 "$out" cuda/emulated > /dev/null || fail 'what is not run is no failure'
expect 'decode steps of tiny: 24 s were over after [1-4] s of it$'
expect 'prefill of tiny: 24 s are over$'
expect ' 9  clusters of one worker and of two.*: the same$'
if kill -0 "$(cat "$TEST_TMPDIR/left")" 2> /dev/null; then fail 'a process is left'; fi

# Peers are measured in the same call; one that fails, or cannot run here, is told, and is nothing of ours.
peers=$TEST_TMPDIR/peers
mkdir -p "$peers"/{good,bad,none}
cat > "$peers/good/run.sh" << 'PEER'
#!/bin/bash
echo '{"case": "decode", "batch": 1, "tokens_per_s": {"best": 2}}'
PEER
printf '#!/bin/bash\nexit 4\n' > "$peers/bad/run.sh"
printf '#!/bin/bash\necho "NOT RUN: no such model"\n' > "$peers/none/run.sh"
chmod +x "$peers"/*/run.sh
program tests/bench/engine_bench 'echo "{\"case\": \"decode\", \"batch\": 1, \"tokens_per_s\": {\"best\": 3}}"'
out=$TEST_TMPDIR/beside
if "$tree/tests/gpu/prove.sh" "$out" cuda/emulated "$peers" > /dev/null; then fail 'a failing peer was not told'; fi
expect 'peer bad at tiny: status 4'
expect 'peer none at tiny: no such model'
expect "peers beside ours: 150% of good's 2 at tiny, decode, batch 1$"

# One of lines 1 to 5 stops the rest.
program tests/gpu/device_tests 'case "$*" in *Norm*) echo "rows differ"; exit 1 ;; *) echo "[  PASSED  ] 1 test." ;; esac'
out=$TEST_TMPDIR/early
if "$tree/tests/gpu/prove.sh" "$out" cuda/emulated > /dev/null; then fail 'a failure was not told'; fi
expect 'conformance of LayerNorm: status 1: rows differ'
expect 'prefill of tiny: line 3 failed'

# Without a GPU nothing is proved of one.
out=$TEST_TMPDIR/none
if PATH=/usr/bin:/bin "$tree/tests/gpu/prove.sh" "$out" cuda:99 > /dev/null; then fail 'no GPU, and no failure'; fi
expect '^proved: 0'
