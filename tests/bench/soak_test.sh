#!/bin/bash
# soak.sh and flood.sh for seconds, so that they cannot rot: what they find in so short a time means nothing. And what
# soak.py calls growth.
set -euo pipefail
readonly out=$TEST_TMPDIR/out programs=$TEST_TMPDIR/bin
fail() { echo "soak_test: $*" >&2; exit 1; }
export HOME=$TEST_TMPDIR/home
mkdir -p "$programs" "$HOME"
for program in router worker state_store rwkvctl; do cp -L "services/$program/$program" "$programs/$program"; done

python3 - "$PWD/tests/bench" <<'EOF_PYTHON'
import random, sys
sys.path.insert(0, sys.argv[1])
import soak
random.seed(1)
def process(memory, descriptors=lambda t: 20, threads=lambda t: 40):
    of = lambda t: {"memory": memory(t), "descriptors": descriptors(t), "threads": threads(t)}
    return [(t, of(t)) for t in range(0, 3600, 30)]
MIB = 1 << 20
noise = lambda: random.randint(-MIB, MIB)
cases = {
    "flat": (process(lambda t: 100 * MIB + noise()), 0),
    "grows before, then stays": (process(lambda t: (50 + min(t, 290) / 6) * MIB), 0),
    "a small step": (process(lambda t: (100 if t < 2000 else 103) * MIB + noise()), 0),
    "a spike": (process(lambda t: (300 if 1000 < t < 1500 else 100) * MIB + noise()), 0),
    "leaks 10 MiB an hour": (process(lambda t: (100 + t / 360) * MIB + noise()), 1),
    "leaks descriptors": (process(lambda t: 100 * MIB, descriptors=lambda t: 20 + t // 200), 1),
    "leaks threads": (process(lambda t: 100 * MIB, threads=lambda t: 40 + t // 600), 1),
}
for name, (points, expected) in cases.items():
    _, broken = soak.judge({"p": points}, 3600)
    assert len(broken) == expected, (name, broken)
try:
    soak.judge({"p": process(lambda t: 1)[:5]}, 3600)
    raise SystemExit("a process of which little is known passes")
except ValueError:
    pass
EOF_PYTHON

status=0
tests/bench/soak.sh "$out" --duration 5s --warm-up 4 --sessions 2 --rate 2 --programs "$programs" \
  --results "$TEST_TMPDIR/results" -- --stages 2 || status=$?
((status <= 1)) || fail "soak.sh ended with $status"
status=0
tests/bench/flood.sh --pairs 1 --seconds 1 --programs "$programs" --results "$TEST_TMPDIR/results" || status=$?
((status <= 1)) || fail "flood.sh ended with $status"
python3 - "$TEST_TMPDIR/results" "$out" <<'EOF_PYTHON'
import json, sys, xml.etree.ElementTree as tree
soak, flood = map(json.loads, open(sys.argv[1]))
assert soak["what"] == "soak" and soak["requests"]["completed"] > 0 and not soak["requests"]["failed"], soak
assert sorted(soak["processes"]) == ["router-0", "state_store-0", "worker-0", "worker-1"], soak
assert all(of["memory"]["first"] > 0 and of["threads"]["first"] > 0 for of in soak["processes"].values()), soak
assert len(tree.parse(sys.argv[2] + "/soak.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")) == 4
assert flood["what"] == "flood" and flood["ratio_p99"] > 0 and flood["quiet_failed"] == 0, flood
EOF_PYTHON
if tests/bench/soak.sh 2>/dev/null; then fail "soak.sh without OUT"; fi
