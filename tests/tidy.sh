#!/bin/bash
# Runs clang-tidy (.clang-tidy) over the C++ files given, or over all of them. Slow: ten seconds a file.
#
#   tests/tidy.sh [FILE.cc...]
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
command -v clang-tidy-14 >/dev/null || { echo "tidy.sh: needs the package clang-tidy-14" >&2; exit 1; }
bazel build --keep_going //... >&2 # For the generated headers.
binaries=$(bazel info bazel-bin 2>/dev/null)
externals=$(bazel info output_base 2>/dev/null)/external
[[ $# -gt 0 ]] || mapfile -t files < <(git ls-files '*.cc')
[[ $# -eq 0 ]] || files=("$@")
flags=(-std=c++17 -I. "-I$binaries" "-I$binaries/proto" "-I$binaries/external/googleapis" "-I$externals/googleapis"
  -DSPDLOG_COMPILED_LIB -DSPDLOG_FMT_EXTERNAL)
printf '%s\0' "${files[@]}" |
  xargs -0 -P "$(nproc)" -I{} clang-tidy-14 --quiet {} -- "${flags[@]}"
