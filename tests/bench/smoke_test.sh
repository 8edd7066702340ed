#!/bin/bash
# The whole bench at a shape that takes no time, so that it cannot rot; its numbers mean nothing.
set -euo pipefail
readonly here=$PWD/tests/bench out=$TEST_TMPDIR/out
fail() { echo "smoke_test: $*" >&2; exit 1; }

# A llama.cpp that says what the real one would, and for what it was asked.
readonly llama=$TEST_TMPDIR/llama
mkdir -p "$llama"
cat >"$llama/llama-bench" <<'EOF'
#!/bin/bash
echo "$*" >>"${0%/*}/asked"
echo 'noise before [{"n_prompt": 16, "n_gen": 0, "samples_ts": [100, 300, 200], "build_commit": "c0ffee"},
  {"n_prompt": 0, "n_gen": 4, "samples_ts": [10, 20, 15]}]' | sed 's/noise before //'
EOF
cat >"$llama/llama-batched-bench" <<'EOF'
#!/bin/bash
echo "|  PP |  TG |  B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |"
echo "|-----|-----|----|------|--------|----------|--------|----------|-----|-------|"
echo "|   4 |   4 |  2 |   16 |  0.100 |    80.00 |  0.200 |    40.00 | 0.3 |  53.3 |"
EOF
cat >"$llama/llama-quantize" <<'EOF'
#!/bin/bash
cp "$1" "$2"
EOF
chmod +x "$llama"/llama-*

python3 "$here/bench.py" "$out" --binaries "$PWD" --shapes tiny --formats bf16,int8,int4 --batches 1,2 --lengths 16 \
  --positions 3,2000 --threads 1,2 --seconds 0.01 --cluster_seconds 0.2 --answer_tokens 4 --repeats 2 \
  --models "$TEST_TMPDIR/models" --llama_cpp "$llama" --results "$TEST_TMPDIR/kept.jsonl"

python3 - "$out" "$TEST_TMPDIR/kept.jsonl" <<'EOF'
import json, sys, xml.etree.ElementTree as tree
out, kept = sys.argv[1:]
lines = [json.loads(line) for line in open(kept)]
assert open(kept).read() == open(out + "/results.jsonl").read()
counts = {}
for line in lines:
    for key in ("date", "commit", "commit_date", "cpu", "processors", "command"):
        assert line[key], (key, line)
    if "case" in line:
        assert 0 < line["tokens_per_s"]["median"] <= line["tokens_per_s"]["best"], line
    counts[line["what"]] = counts.get(line["what"], 0) + 1
# By format: 2 numbers of threads for the limit; those times 2 batches and a length for the engine; 3 of the cluster at
# the most threads; 3 of llama.cpp at each. The engine's 2 positions at the most threads.
assert counts == {"limit": 6, "engine": 24, "cluster": 9, "llama.cpp": 18, "start": 3, "engine's start": 3, "llama.cpp's start": 3,
                  "memory": 3, "beside a busy process": 3, "twice the load": 3}, counts
for line in lines:
    if line["what"] == "memory":  # The law: the file, the states and 64 MiB, and a tenth of that.
        assert line["bytes"] <= line["allowed_bytes"], line
    if line["what"] == "twice the load":
        assert 0 < line["requests_per_s"] and 0 < line["peak_requests_per_s"] and line["slowest_status_s"] < 60, line
    if line["what"].endswith("start"):
        assert 0 < line["seconds_to_first_token"] < 60, line
    if line["what"] == "beside a busy process":
        assert line["of_alone"] > 0, line
sizes = {line["format"]: line["weight_bytes"] for line in lines if line["what"] == "limit"}
assert sizes["int4"] < 0.7 * sizes["int8"] < 0.6 * sizes["bf16"], sizes
for line in lines:
    if line["what"] == "cluster":
        assert line["load"]["requests"]["failed"] == 0 and line["load"]["requests"]["completed"] > 0, line
table = open(out + "/table.txt").read().splitlines()
assert len(table) == 2 + 3 * (3 * 2 + 2) + 3 * 6, table
assert sum("seconds_to_first_token" in line for line in table) == 9, table
assert "300 (200)" in "".join(table) and "20 (15)" in "".join(table), table
for chart in ("batch", "length", "position", "threads", "size"):
    root = tree.parse(f"{out}/{chart}.svg").getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3, (chart, len(lines))
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 80 <= x <= 550 and 40 <= y <= 400, (chart, point)
EOF

# A timeline for the fewest and the most sequences: each kind of operation is a lane, the lanes lie in the picture and
# their shares are all of the step.
python3 - "$out" <<'EOF'
import re, sys, xml.etree.ElementTree as tree
for batch in (1, 2):
    root = tree.parse(f"{sys.argv[1]}/timeline-tiny-int8-{batch}.svg").getroot()
    texts = [text.text for text in root.findall("{http://www.w3.org/2000/svg}text")]
    for lane in ("embed", "mix_input", "wkv7", "layer_norm", "between"):
        assert lane in texts, (lane, texts)
    assert any(text.startswith("products ") and " x 3" in text for text in texts), texts
    shares = [float(share) for text in texts for share in re.findall(r" us, ([0-9.]+)%", text)]
    assert 98 < sum(shares) < 102, shares
    assert any("GB/s" in text for text in texts), texts
    for rect in root.findall("{http://www.w3.org/2000/svg}rect")[1:]:
        x, width = float(rect.get("x")), float(rect.get("width"))
        assert 330 <= x and x + width <= 330 + 640 + 0.5, (x, width)
EOF

# What llama.cpp is given is the same model: our own reader finds every tensor of it, with the same numbers.
grep -q -- '-t 2 -p 16 -n 4 -r 2 -o json' "$llama/asked" || fail "llama-bench was asked: $(cat "$llama/asked")"
readonly rwkvctl=$PWD/services/rwkvctl/rwkvctl
"$rwkvctl" inspect "$TEST_TMPDIR/models/rwkv7-tiny-bf16.gguf"
"$rwkvctl" convert "$TEST_TMPDIR/models/rwkv7-tiny-bf16.gguf" "$TEST_TMPDIR/back.safetensors" --dtype bf16
python3 - "$TEST_TMPDIR/models/rwkv7-tiny-bf16.safetensors" "$TEST_TMPDIR/back.safetensors" "$here" <<'EOF'
import sys
sys.path.insert(0, sys.argv[3])
import gguf
def tensors(path):
    header, begin = gguf.read_header(path)
    data = open(path, "rb").read()[begin:]
    return {name: (t["dtype"], [s for s in t["shape"] if s != 1], data[slice(*t["data_offsets"])])
            for name, t in header.items()}
ours, back = map(tensors, sys.argv[1:3])
for name, (dtype, shape, data) in ours.items():
    if back[name][0] == "F32":  # As the GGUF has vectors.
        dtype, data = "F32", gguf._as_fp32(data)
    assert back[name] == (dtype, shape, data), (name, dtype, shape, back[name][:2])
assert all(name in ours or name.startswith("blocks.0.att.v") for name in back), back.keys() - ours.keys()
EOF

# Wrong usage is told.
if "$PWD/tests/bench/limits" 0 1 1 2>/dev/null; then fail "limits of nothing"; fi
if "$PWD/tests/bench/make_model" huge "$TEST_TMPDIR/huge" 2>/dev/null; then fail "a shape that there is none of"; fi
if python3 "$here/bench.py" "$out" --binaries "$PWD" --llama_cpp "$TEST_TMPDIR" 2>/dev/null; then
  fail "no llama-bench"
fi

# A worker and the engine alone, in turns: both have run, and what is told is of both.
python3 "$here/overhead.py" --binaries "$PWD" --model "$TEST_TMPDIR/models/rwkv7-tiny-bf16.safetensors" --streams 2 \
  --seconds 1 --turn 0.1 >"$TEST_TMPDIR/overhead.json"
python3 - "$TEST_TMPDIR/overhead.json" <<'EOF'
import json, sys
line = json.load(open(sys.argv[1]))
assert line["what"] == "overhead" and line["failed"] == 0, line
assert line["engine_step_ms"] > 0 and line["inter_token_p50_ms"] > 0, line
assert abs(line["inter_token_p50_ms"] / line["engine_step_ms"] - 1 - line["overhead"]) < 1e-9, line
EOF

# States: each case once, and what came back is what was saved (state_bench compares).
python3 "$here/states.py" "$TEST_TMPDIR/states" --binaries "$PWD" --models "$TEST_TMPDIR/models" --model tiny \
  --shapes 0.1b --count 2 --rounds 1 --threads 1 --resume_tokens 200 --answer_tokens 32 \
  --results "$TEST_TMPDIR/kept_states.jsonl"
python3 - "$TEST_TMPDIR/kept_states.jsonl" "$TEST_TMPDIR/states/states.txt" <<'EOF'
import json, sys
lines = {line["case"]: line for line in map(json.loads, open(sys.argv[1]))}
assert sorted(lines) == ["beside", "resume", "transfer"], sorted(lines)
transfer = lines["transfer"]
assert transfer["what"] == "states" and transfer["bytes"] == 12 * (12 * 64 * 64 + 2 * 768) * 4, transfer
assert sorted(transfer["mb_per_s"]) == ["copy", "disk read", "disk write", "disk write, direct", "restore",
                                        "restore, 4 at once", "restore, at once", "save",
                                        "save, 4 at once"], transfer
assert all(rate > 0 for rate in transfer["mb_per_s"].values()) and all(transfer["of_slower"].values()), transfer
assert len(lines["resume"]["resume_seconds"]) == 5 and lines["resume"]["read_seconds"] > 0, lines["resume"]
assert lines["beside"]["saves"] > 0 and lines["beside"]["ratio_p99"] > 0, lines["beside"]
assert transfer["command"].startswith("tests/bench/states.sh OUT"), transfer["command"]
assert "0.1b" in open(sys.argv[2]).read()
EOF
if "$PWD/tests/bench/state_bench" save 127.0.0.1:1 huge 1 . 2>/dev/null; then fail "states of no shape"; fi
