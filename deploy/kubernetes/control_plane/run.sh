#!/bin/bash
# The manifests on a real Kubernetes control plane, with our real programs as pods. The first run builds the control
# plane into a cache (build.sh: some ten minutes); then it takes five.
#
#   deploy/kubernetes/control_plane/run.sh [BAZEL_TEST_ARGUMENT...]
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly here
case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
esac
"$here/build.sh" >/dev/null
cd "$here/../../.."
exec bazel test --show_progress --curses=no --test_output=streamed "$@" \
  //deploy/kubernetes/control_plane/...
