#!/bin/bash
# The bundle is small and needs nothing of this machine; prove.sh out of it, on the emulated GPU, proves what can be
# proved there and says of the rest why it is not run; and a wrong bit fails.
set -euo pipefail
readonly here=$PWD
cd "$TEST_TMPDIR"
"$here/tests/gpu/bundle.sh" bundle.tar.gz
bytes=$(stat -c %s bundle.tar.gz)
[[ $bytes -lt 64000000 ]] || { echo "the bundle has $bytes bytes, 64 MB and more" >&2; exit 1; }
tar xzf bundle.tar.gz

readonly tree=$TEST_TMPDIR/rwkv_proof out=$TEST_TMPDIR/out
mkdir -p peers/other
cat > peers/other/run.sh << 'PEER'
#!/bin/bash
echo '{"case": "decode", "batch": 1, "tokens_per_s": {"best": 0.5}}'
PEER
chmod +x peers/other/run.sh
prove() {
  # Not in ten minutes: without a GPU, beside other tests.
  env -i PATH=/usr/bin:/bin HOME=/nonexistent "$tree/tests/gpu/prove.sh" --seconds 3000 "$out" cuda/emulated \
    "$TEST_TMPDIR/peers"
}
prove || { cat "$out"/*.log | tail -50 >&2; exit 1; }
python3 - "$out" << 'PYTHON'
import json
import pathlib
import sys
out = pathlib.Path(sys.argv[1])
lines = [json.loads(line) for line in (out / "prove.jsonl").read_text().splitlines()]
assert {line["line"] for line in lines} == set(range(1, 11)), "a line of the list is missing"
not_run = {line["what"]: line["why"] for line in lines if line["result"] == "not run"}
assert all(not_run.values()), not_run
# What a rehearsal cannot do, and nothing else.
wanted = {"driver, clocks and card", "goal decode_1.5b_1", "goal decode_1.5b_32", "goal decode_7.2b_1",
          "goal prefill_1.5b", "goal prefill_1.5b_rounded", "goal prefill_1.5b_lt", "goal serving_1.5b"}
wanted |= {f"compute-sanitizer {tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")}
assert set(not_run) == wanted, set(not_run) ^ wanted
assert len(lines) - len(wanted) >= 23, f"{len(lines)} lines"
says = {line["what"]: line["why"] for line in lines if line["result"] in ("proved", "measured")}
measured = [line["what"] for line in lines if line["result"] == "measured"]
assert "decode steps of tiny" in measured and "peers beside ours" in measured, measured
assert not [what for what in says if "conformance" in what and what in measured]
library = says["conformance of products by cuBLASLt"]
assert library.startswith("family cuda/tensor/sm_90/lt-130100-"), library
assert says["conformance of Wkv7"].endswith(" cases"), says["conformance of Wkv7"]
assert '"model": "tiny/lt"' in (out / "speed.jsonl").read_text()
cluster = says["clusters of one worker and of two: the same tokens, also after kill -9"]
assert cluster == "24 tokens, the same four times; rows between workers by nccl", cluster
assert "of other's 0.5 at tiny, decode, batch 1" in says["peers beside ours"], says["peers beside ours"]
assert '"case": "serving"' in (out / "speed.jsonl").read_text()
for name in ("rates", "ops", "speed", "peers"):
    assert (out / f"{name}.jsonl").read_text().count("\n") > 0, name
PYTHON

# One other hash is told, and ends it.
sed -i '1s/.$/x/' "$tree/tests/gpu/bits.txt"
if prove > said; then
  echo 'a wrong bit was not seen' >&2
  exit 1
fi
grep -q 'bits of small models.*other bits: v4, than in' "$out/summary.txt" || { cat "$out/summary.txt" >&2; exit 1; }

# Goals are judged by what was measured.
goals() { python3 "$here/tests/gpu/goals.py" "$@"; }
mkdir -p measured
echo '{"copy_gb_per_s": 4300.0, "matrix_tflop_per_s": 600.0}' > measured/rates.jsonl
cat > measured/speed.jsonl << 'LINES'
{"model": "1.5b", "case": "decode", "batch": 1, "tokens_per_s": {"best": 1100, "median": 1000}}
{"model": "1.5b", "case": "decode", "batch": 32, "tokens_per_s": {"best": 9000, "median": 9000}}
{"model": "7.2b", "case": "decode", "batch": 1, "tokens_per_s": {"best": 280, "median": 270}}
{"model": "1.5b", "case": "prefill", "length": 1024, "sequences": 32, "tokens_per_s": {"best": 100000, "median": 1}}
{"model": "1.5b/lt", "case": "prefill", "length": 1024, "sequences": 32, "tokens_per_s": {"best": 150000}}
{"model": "1.5b", "case": "serving", "streams": 256, "tokens_per_s": {"best": 41000}}
LINES
goals measured 'NVIDIA H200' decode_1.5b_1 | grep -q '^SAYS: 1100 tokens/s of 1070$'
goals measured 'NVIDIA H200' decode_7.2b_1 | grep -q '91% of the copies'
goals measured 'NVIDIA H200' serving_1.5b | grep -q '^SAYS: 41000 tokens/s of 40000$'
goals measured 'NVIDIA H200' prefill_1.5b_lt | grep -q '^SAYS: 150000 tokens/s, 70% of the matrix rate'
goals measured 'NVIDIA H200' prefill_1.5b_rounded | grep -q '^NOT RUN: not measured$'
goals measured 'NVIDIA L4' decode_1.5b_1 | grep -q '^NOT RUN: no goal for NVIDIA L4$'
for missed in decode_1.5b_32 prefill_1.5b; do
  if goals measured 'NVIDIA H200' "$missed"; then
    echo "$missed is not missed" >&2
    exit 1
  fi
done
