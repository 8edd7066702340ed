#!/bin/bash
# Builds Debian's own Abseil sources with thread-sanitizer instrumentation into ~/.cache/rwkv-serving/abseil-tsan, where
# bazel/rules/abseil_tsan.bzl finds it. Called by deploy/local/setup.sh --tsan; nothing to do when it is there.
#
# Why: absl::Mutex is made of atomics inside libabsl. In Debian's library the sanitizer does not see them, so everything
# that such a mutex guards would look like a race.
set -euo pipefail
readonly target=$HOME/.cache/rwkv-serving/abseil-tsan
version=$(dpkg-query -W -f='${source:Version}' libabsl-dev)
readonly version
readonly compiler=clang++-14
# Whatever changes the result; the first line of the stamp that says the library is complete.
readonly recipe="abseil $version $compiler -std=c++17 -O1 -g1 -DNDEBUG -fsanitize=thread, hidden but locks, 2"

say() { echo "abseil_tsan: $*" >&2; }
die() {
  say "$*"
  exit 1
}

[[ -f $target/libabseil_tsan.a && -f $target/stamp && $(<"$target/stamp") == "$recipe" ]] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt downloads as another user.

# A private apt: the machine's own mirrors and keys, but as sources of source packages, which /etc rarely has.
mkdir -p "$work"/apt/{lists/partial,cache/archives/partial,parts}
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [[ ! -f $file ]] || sed -n 's/^deb /deb-src /p' "$file"
done >"$work/apt/sources.list"
for file in /etc/apt/sources.list.d/*.sources; do
  [[ ! -f $file ]] || sed 's/^Types:.*/Types: deb-src/' "$file" >"$work/apt/parts/${file##*/}"
done
cat >"$work/apt/apt.conf" <<CONF
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "$work/apt/parts";
Dir::State::lists "$work/apt/lists";
Dir::Cache "$work/apt/cache";
CONF
export APT_CONFIG=$work/apt/apt.conf
say "fetching the sources of abseil $version"
apt-get -q update >&2 || die "apt-get update failed for source packages"
(cd "$work" && apt-get -q source "abseil=$version" >&2) || die "cannot fetch the sources of abseil $version"
sources=$(echo "$work"/abseil-*/)
# The same configuration, or the library would not fit the headers in /usr/include.
cmp -s "$sources/absl/base/options.h" /usr/include/absl/base/options.h ||
  die "absl/base/options.h of the sources and of libabsl-dev differ"

say "building it with -fsanitize=thread (about two minutes)"
cd "$sources"
mkdir -p "$work/objects"
compile() {
  local flags=()
  # libgrpc, which is not instrumented, shall lock with these locks, so that the sanitizer sees who waits for whom; but
  # it shall keep its own statuses and cords, whose reference counts would look like races.
  [[ $1 == absl/@(base|debugging|synchronization)/* ]] || flags+=(-fvisibility=hidden -fvisibility-inlines-hidden)
  # The hardware generator of absl/random; the rest of the library finds out at run time whether it may be called.
  [[ $1 != *randen_hwaes.cc || $(uname -m) != x86_64 ]] || flags+=(-maes -msse4.1)
  "$compiler" -std=c++17 -O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fsanitize=thread -w -I. "${flags[@]}" \
    -c "$1" -o "$work/objects/$(tr / _ <<<"${1%.cc}").o"
}
export -f compile
export compiler work
find absl -name '*.cc' |
  grep -vE '(_test|_test_[a-z]+|_testing|test_util|test_instance_tracker)\.cc$' |
  grep -vE '(_mock|benchmarks?|_gentables|chi_square|print_hash_of)\.cc$' |
  xargs -P "$(nproc)" -I{} bash -c 'compile {}' || die "a file does not compile"
mkdir -p "$target"
rm -f "$target/stamp"
llvm-ar-14 crs "$target/libabseil_tsan.a" "$work"/objects/*.o
echo "$recipe" >"$target/stamp"
say "done: $target/libabseil_tsan.a"
