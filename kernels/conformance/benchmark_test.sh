#!/bin/bash
# One short round on every backend of this machine: each must measure something and report no error.
set -euo pipefail
report=$("$1" --benchmark_filter='bf16/out:768/in:768/rows:(1|32)/real_time$' --benchmark_min_time=0.001)
report+=$("$2" --benchmark_filter='sequences:1/tokens:1$' --benchmark_min_time=0.001)
echo "$report"
if grep -q ERROR <<<"$report"; then exit 1; fi
grep -q 'products/cpu/portable/bf16/out:768/in:768/rows:32/real_time .*GFLOP/s' <<<"$report"
grep -q 'wkv7/cpu/portable/sequences:1/tokens:1 .*head_token=' <<<"$report"
