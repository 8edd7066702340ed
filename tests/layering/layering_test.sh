#!/bin/bash
# layering_test.sh SUBJECTS VIOLATIONS ALLOW_NONE WHY: see layering_test.bzl.
set -euo pipefail
readonly subjects=$1 violations=$2 allow_none=$3 why=$4
if [[ -s $violations ]]; then
  echo "The rule \"$why\" is broken. Reached:"
  sed 's/^/  /' "$violations"
  echo "How: bazel query 'somepath(FROM, TARGET)'"
  exit 1
fi
if [[ ! -s $subjects && $allow_none != true ]]; then
  echo "The rule \"$why\" looks at no target at all; has something been renamed?"
  exit 1
fi
