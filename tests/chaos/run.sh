#!/bin/bash
# The long form of chaos_test: two pipelines of two stages and a spare, two routers, two stores over PostgreSQL and S3,
# streaming clients with sessions, and random kill -9, SIGSTOP and restarts of anything, servers too. In the end every
# stream is held to an undisturbed run.
#
#   tests/chaos/run.sh [--seconds N] [--clients N] [--seed N]
#
#   --seconds N   of faults (default 600)
#   --clients N   that stream at once (default 64)
#   --seed N      of the schedule (default: any; it is printed)
#
# RWKV_SHARED=DIR: DIR/tools/s3-server starts a real S3, else it is tests/testing/s3_server.py.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly here
seconds=600 clients=64 seed=
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --seconds | --clients | --seed)
      [[ ${2:-} =~ ^[0-9]{1,10}$ ]] || { echo "$0: $1 '${2:-}' is no number" >&2; exit 2; }
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    *)
      echo "$0: unknown argument '$1' (see --help)" >&2
      exit 2
      ;;
  esac
  shift
done
cd "$here/../.."
flags=(--test_env=CHAOS_SECONDS="$seconds" --test_env=CHAOS_CLIENTS="$clients")
if [[ -n $seed ]]; then flags+=(--test_env=CHAOS_SEED="$seed"); fi
if [[ -n ${RWKV_SHARED:-} ]]; then flags+=(--test_env=RWKV_SHARED="$RWKV_SHARED"); fi
exec bazel test --show_progress --curses=no --test_output=streamed --nocache_test_results \
  --test_timeout=$((2 * seconds + 1200)) "${flags[@]}" //tests/chaos:chaos_test
