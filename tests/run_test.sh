#!/bin/bash
# What run.sh, and .ci/run in front of it, hand on to bazel, and what they refuse. Nothing is built: bazel and the
# set-up are stand-ins.
set -euo pipefail
readonly folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
readonly tree=$folder/tree
mkdir -p "$folder/bin" "$tree/tests" "$tree/.ci" "$tree/deploy/local"
cp -L tests/run.sh tests/count_results.py "$tree/tests/"
cp -L .ci/run "$tree/.ci/"
printf '#!/bin/bash\necho "$@" >>"%s"\n' "$folder/set_up" >"$tree/deploy/local/setup.sh"
printf '#!/bin/bash\nprintf "%%s\\n" "$@" >"%s"\n' "$folder/bazel_got" >"$folder/bin/bazel"
chmod +x "$tree/deploy/local/setup.sh" "$folder/bin/bazel"
export PATH=$folder/bin:$PATH

fail() {
  echo "FAILED: $*" >&2
  cat "$folder/says" >&2
  exit 1
}

for script in "$tree/tests/run.sh" "$tree/.ci/run"; do
  for arguments in word "services/router:all" "//tests/... word" "--test_filter Word" "--config asan word"; do
    status=0
    # shellcheck disable=SC2086 # Words.
    "$script" $arguments >"$folder/says" 2>&1 || status=$?
    [[ $status == 2 ]] || fail "$script $arguments: status $status, not 2"
    grep -qF "'${arguments##* }' is neither a target" "$folder/says" || fail "$script $arguments: says no more than"
    [[ ! -e $folder/set_up && ! -e $folder/bazel_got ]] || fail "$script $arguments: began to work"
  done

  # Nothing ran, so its status says that it failed.
  "$script" --test_filter='A word' //tests/testing:all --jobs=2 >"$folder/says" 2>&1 || true
  for argument in test '--test_filter=A word' --jobs=2 -- //tests/testing:all; do
    grep -qxFe "$argument" "$folder/bazel_got" || fail "$script: bazel did not get $argument: $(<"$folder/bazel_got")"
  done
  ! grep -qxFe '//...' "$folder/bazel_got" || fail "$script: //... in spite of a target"
  tail -n 1 "$folder/says" | grep -qx '0 passed, 0 failed, 0 skipped' || fail "$script: the last line is another one"

  "$script" >"$folder/says" 2>&1 || true
  grep -qxFe '//...' "$folder/bazel_got" || fail "$script: without arguments, not everything"
  rm "$folder/set_up" "$folder/bazel_got"
done
