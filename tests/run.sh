#!/bin/bash
# Installs what is missing, builds everything and runs every test that needs no GPU.
#
#   tests/run.sh [--config asan|ubsan|tsan|aarch64] [BAZEL_TEST_ARGUMENT...]
#
# aarch64: the kernels' tests, built for that processor and run by an emulator.
# Arguments go to `bazel test`: targets, which replace //..., and options (--option=VALUE). The last line is "N passed,
# N failed, N skipped", in test cases. Ends with a status other than 0 when anything failed, did not build, or nothing
# ran.
set -euo pipefail
readonly root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"

config='' arguments=() targets=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --config)
      [[ $# -ge 2 ]] || { echo "run.sh: --config needs a value (see --help)" >&2; exit 2; }
      config=$2
      shift
      ;;
    --config=*) config=${1#*=} ;;
    //* | @* | :*) targets+=("$1") ;;
    -*) arguments+=("$1") ;;
    *)
      echo "run.sh: '$1' is neither a target (//...) nor an option (a value is written --option=VALUE; see --help)" >&2
      exit 2
      ;;
  esac
  shift
done
case $config in
  '' | asan | ubsan | tsan | aarch64) ;;
  *)
    echo "run.sh: --config '$config' is none of asan, ubsan, tsan, aarch64 (see --help)" >&2
    exit 2
    ;;
esac

# Whatever happens below, the last line tells the counts and the status is honest.
events=$(mktemp) || exit 1
finish() {
  local status=$1
  trap - EXIT
  python3 "$root/tests/count_results.py" "$events" "$status" || status=$((status == 0 ? 1 : status))
  rm -f "$events"
  exit "$status"
}
trap 'finish $?' EXIT

setup=("$root/deploy/local/setup.sh")
[[ $config != tsan && $config != aarch64 ]] || setup+=("--$config")
"${setup[@]}"
if [[ $config == aarch64 ]]; then
  readonly sysroot=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}/.cache/rwkv-serving/aarch64
  arguments+=("--copt=--sysroot=$sysroot" "--linkopt=--sysroot=$sysroot" "--run_under=qemu-aarch64-static -L $sysroot")
  # Test scripts would be run by the emulator too.
  [[ ${#targets[@]} -gt 0 ]] || mapfile -t targets < <(bazel query 'kind(cc_test, //kernels/...)' 2>/dev/null)
fi
[[ -z $config ]] || arguments=("--config=$config" "${arguments[@]}")
# Data of published models, where this checkout lies beside it; tests that want it skip otherwise.
[[ ! -d $root/../shared ]] || arguments+=("--test_env=RWKV_SHARED=$(readlink -f "$root/../shared")")
[[ ${#targets[@]} -gt 0 ]] || targets=(//...)
# What no test uses is not built: asking for a library by name would compile it a second time, for a shared object that
# nobody loads. One failure hides no other.
bazel test --keep_going --build_tests_only --show_progress --show_progress_rate_limit=10 --curses=no \
  --build_event_json_file="$events" "${arguments[@]}" -- "${targets[@]}"
