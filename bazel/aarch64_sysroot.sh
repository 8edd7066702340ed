#!/bin/bash
# Unpacks Debian's aarch64 libraries that kernels and their tests need into ~/.cache/rwkv-serving/aarch64, for builds on
# another processor (.bazelrc, --config=aarch64). Called by deploy/local/setup.sh --aarch64; nothing to do when they are
# there. The machine's own packages are not touched.
set -euo pipefail
readonly target=$HOME/.cache/rwkv-serving/aarch64
readonly packages=(
  libabsl-dev libabsl20220623 libbenchmark-dev libbenchmark1debian libboost-context1.74-dev libboost-context1.74.0
  libboost1.74-dev libc6 libc6-dev libcrypt-dev libcrypt1 libgcc-12-dev libgcc-s1 libgmock-dev libgtest-dev
  libstdc++-12-dev libstdc++6 linux-libc-dev
)
readonly recipe="bookworm ${packages[*]} 1"

say() { echo "aarch64_sysroot: $*" >&2; }
die() {
  say "$*"
  exit 1
}

[[ -f $target/stamp && $(<"$target/stamp") == "$recipe" ]] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt downloads as another user.

# A private apt for the other architecture, with the mirror that this machine has.
mkdir -p "$work"/apt/{lists/partial,cache/archives/partial,parts} "$work/debs"
chmod 777 "$work/debs"
: >"$work/apt/status"
mirror=$(apt-get indextargets --format '$(SITE)' 'Release: bookworm' 'Component: main' | head -n 1)
[[ -n $mirror ]] || die "apt knows no mirror of bookworm main"
echo "deb $mirror bookworm main" >"$work/apt/sources.list"
cat >"$work/apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "$work/apt/parts";
Dir::State::lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
CONF
export APT_CONFIG=$work/apt/apt.conf
say "downloading ${#packages[@]} packages of aarch64 from $mirror"
apt-get update -q >&2 || die "cannot read $mirror"
(cd "$work/debs" && apt-get download -q "${packages[@]}" >&2) || die "cannot download aarch64's packages"
rm -rf "$target"
mkdir -p "$target"
for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$target"; done
# Links from / would leave the folder.
find "$target" -type l -lname '/*' -print0 | while IFS= read -r -d '' link; do
  ln -sfn "$target$(readlink "$link")" "$link"
done
echo "$recipe" >"$target/stamp"
