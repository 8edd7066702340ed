#!/bin/bash
# The kernels as they are against the committed report; and that what got worse is seen.
set -euo pipefail
readonly here=tests/gpu
"$here/launches" "$TEST_TMPDIR" > "$TEST_TMPDIR/launches.jsonl"
"$here/traffic" > "$TEST_TMPDIR/traffic.jsonl"
mapfile -t resources < <(find -L kernels/cuda -name '*.ptxas.txt' | sort)
mapfile -t ptx < <(find -L kernels/cuda -name '*.ptx' | sort)
traffic=$TEST_TMPDIR/traffic.jsonl
check() {
  python3 "$here/report.py" --resources "${@:2}" --ptx "${ptx[@]}" --launches "$1" --traffic "$traffic" --check "$here"
}
check "$TEST_TMPDIR/launches.jsonl" "${resources[@]}"

expect_worse() {
  if check "$2" "${@:3}" > "$TEST_TMPDIR/out" 2>&1; then
    echo "not seen: $1" >&2
    exit 1
  fi
  grep -q "$1" "$TEST_TMPDIR/out" || { cat "$TEST_TMPDIR/out" >&2; exit 1; }
}
mkdir -p "$TEST_TMPDIR/worse"
cat "${resources[@]}" > "$TEST_TMPDIR/all.txt"
sed 's/0 bytes spill stores/8 bytes spill stores/' "$TEST_TMPDIR/all.txt" > "$TEST_TMPDIR/worse/spills.txt"
expect_worse '8 bytes of spills' "$TEST_TMPDIR/launches.jsonl" "$TEST_TMPDIR/worse/spills.txt"
sed 's/Used [0-9]* registers/Used 200 registers/' "$TEST_TMPDIR/all.txt" > "$TEST_TMPDIR/worse/registers.txt"
expect_worse 'warps an SM' "$TEST_TMPDIR/launches.jsonl" "$TEST_TMPDIR/worse/registers.txt"
{
  cat "$TEST_TMPDIR/launches.jsonl"
  grep '"layers": 3' "$TEST_TMPDIR/launches.jsonl" | grep wkv7 | sort -u
} > "$TEST_TMPDIR/more.jsonl"
expect_worse 'kernels per_layer' "$TEST_TMPDIR/more.jsonl" "${resources[@]}"
traffic=$TEST_TMPDIR/narrow.jsonl
sed 's/"wide": [0-9.]*/"wide": 0.1/' "$TEST_TMPDIR/traffic.jsonl" > "$traffic"
expect_worse 'wkv7, 1: wide 0.1' "$TEST_TMPDIR/launches.jsonl" "${resources[@]}"
sed 's/"conflicts": [0-9.]*/"conflicts": 3/' "$TEST_TMPDIR/traffic.jsonl" > "$traffic"
expect_worse 'tensor_products, 16: conflicts 3' "$TEST_TMPDIR/launches.jsonl" "${resources[@]}"

# What a GPU's threads wait for: a line less, or one that comes too late.
traffic=$TEST_TMPDIR/traffic.jsonl
of_nvcc=("${ptx[@]}")
ptx=("$TEST_TMPDIR/changed.ptx")
expect_changed() {
  cat "${of_nvcc[@]}" | awk "$2" > "$TEST_TMPDIR/changed.ptx"
  expect_worse "$1" "$TEST_TMPDIR/launches.jsonl" "${resources[@]}"
}
expect_changed 'Kernel.*: waits 0 times for the kernel before' '!/griddepcontrol.wait/'
expect_changed 'Kernel.*: lets the next kernel begin 0 times' '!/griddepcontrol.launch_dependents/'
expect_changed 'Kernel.*: barriers [0-9]*, [0-9]* in the report' '!/bar.sync/ || seen++'
expect_changed 'FixedProductsKernel.*: warp_barriers 0, 2 in the report' '!/bar.warp.sync/'
expect_changed 'SampleKernel: atomics 0, ' '!/atom/'
expect_changed 'EmbedKernel: ld.global.* before it waits for the kernel before' \
  '/griddepcontrol/ { kept = kept $0 "\n"; next } { print } /ld.global/ { printf "%s", kept; kept = "" }'
ptx=("${of_nvcc[@]}")

# What the design has to reach on paper: with so many kernels more a layer it would not.
traffic=$TEST_TMPDIR/traffic.jsonl
{
  cat "$TEST_TMPDIR/launches.jsonl"
  grep '"layers": 3' "$TEST_TMPDIR/launches.jsonl" | grep wkv7 | sort -u | awk '{for (i = 0; i < 8; ++i) print}'
} > "$TEST_TMPDIR/many.jsonl"
expect_worse '1.5B at 1 row on H200: .*% of the achievable bandwidth, less than 70%' "$TEST_TMPDIR/many.jsonl" \
  "${resources[@]}"
