#!/bin/bash
# Writes tests/gpu/static_report.{json,md} anew, from the kernels as they are.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
bazel build //tests/gpu:launches //tests/gpu:traffic //kernels/cuda:resources //kernels/cuda:ptx
readonly bin=$(bazel info bazel-bin)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$bin"/tests/gpu/launches "$folder" > "$folder/launches.jsonl"
"$bin"/tests/gpu/traffic > "$folder/traffic.jsonl"
mapfile -t resources < <(find -L "$bin"/kernels/cuda/kernels_cuda_objects -name '*.ptxas.txt' | sort)
mapfile -t ptx < <(find -L "$bin"/kernels/cuda/kernels_cuda_objects -name '*.ptx' | sort)
python3 tests/gpu/report.py --resources "${resources[@]}" --ptx "${ptx[@]}" --launches "$folder/launches.jsonl" \
  --traffic "$folder/traffic.jsonl" --out tests/gpu
