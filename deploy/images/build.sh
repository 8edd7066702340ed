#!/bin/bash
# Builds the image of the cluster's programs from this clone, with no registry: router, worker, state_store and rwkvctl,
# the libraries that they load, out of this Debian 12, and nothing else. No shell, no package manager, uid 10001.
#
#   deploy/images/build.sh [--flavour cpu|cuda] [--no-build] [--programs DIR] [--output FILE.tar]
#
#   --flavour    cuda: insists on a worker built with nvcc, and adds libnccl.so.2 if it is here (default: cpu)
#   --no-build   takes the programs as they were built last
#   --programs   takes those in DIR: router, worker, state_store, rwkvctl
#   --output     writes an OCI archive (default: rwkv-serving-FLAVOUR.oci.tar in the current folder); load it by
#                `podman load`, or copy it to a registry by `skopeo copy oci-archive:FILE docker://...`
#
# Needs buildah (apt-get install buildah). The same clone and packages give the same layer: times are set to the last
# commit's. The image is named localhost/rwkv-serving-FLAVOUR:local, as the overlay `local` of deploy/kubernetes wants.
set -euo pipefail
readonly root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
readonly cache=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}/.cache/rwkv-serving
say() { echo "build.sh: $*" >&2; }
die() {
  say "$*"
  exit 1
}

flavour=cpu build=true output='' programs_in=''
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --flavour) flavour=${2:-}; shift ;;
    --flavour=*) flavour=${1#*=} ;;
    --output) output=${2:-}; shift ;;
    --output=*) output=${1#*=} ;;
    --no-build) build=false ;;
    --programs) programs_in=${2:-} build=false; shift ;;
    --programs=*) programs_in=${1#*=} build=false ;;
    *) say "unknown argument '$1' (see --help)"; exit 2 ;;
  esac
  shift
done
[[ $flavour == cpu || $flavour == cuda ]] || { say "--flavour is cpu or cuda"; exit 2; }
output=$(readlink -m "${output:-rwkv-serving-$flavour.oci.tar}")
command -v buildah >/dev/null || die "needs buildah: apt-get install buildah"

readonly programs=(router worker state_store rwkvctl)
if $build; then
  options=()
  if [[ $flavour == cuda ]]; then options=(--repo_env=RWKV_CUDA=required); fi
  (cd "$root" && bazel build --curses=no "${options[@]}" "${programs[@]/#///services/}") || die "the build failed"
fi

readonly work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
readonly tree=$work/tree
mkdir -p "$tree"/{usr/bin,usr/share/rwkv,etc/ssl/certs,tmp,data,model}
for program in "${programs[@]}"; do
  install -m 755 "${programs_in:-$root/.bazel/bin/services/$program}/$program" "$tree/usr/bin/$program" ||
    die "$program is not built"
  strip --strip-unneeded "$tree/usr/bin/$program"
done
if [[ $flavour == cuda ]]; then
  grep -q cudaErrorInsufficientDriver "$tree/usr/bin/worker" || die "this worker was built without nvcc"
fi

# Every library under the name by which it is looked for.
add_library() {
  [[ ! -e $tree$1 ]] || return 0
  install -D -m 755 "$(readlink -f "$1")" "$tree$1"
}
while read -r library; do add_library "$library"; done < <(
  for program in "${programs[@]}"; do ldd "$tree/usr/bin/$program"; done |
    sed -n 's/^.* => \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p' | sort -u)
if [[ $flavour == cuda ]]; then
  nccl=$(/sbin/ldconfig -p | sed -n 's/.*libnccl\.so\.2 .*=> //p' | head -n 1)
  if [[ -n $nccl ]]; then add_library "$nccl"; else say "no libnccl.so.2 here: stages will use gRPC"; fi
fi

install -m 644 /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/"
for file in rwkv_vocab_v20230424.txt 20B_tokenizer.json; do
  [[ ! -f $cache/vocabulary/$file ]] || install -m 644 "$cache/vocabulary/$file" "$tree/usr/share/rwkv/"
done
install -m 644 "$root/LICENSE" "$tree/usr/share/rwkv/"
echo 'rwkv:x:10001:10001::/:/nonexistent' >"$tree/etc/passwd"
echo 'rwkv:x:10001:' >"$tree/etc/group"
echo 'hosts: files dns' >"$tree/etc/nsswitch.conf"
chmod 1777 "$tree/tmp"

# The driver's libcuda.so.1 is not in the image: the machine's container runtime brings its own, if asked for it.
settings='ENV PATH=/usr/bin'
[[ $flavour == cpu ]] || settings+=' NVIDIA_DRIVER_CAPABILITIES=compute,utility'
readonly commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
readonly seconds=$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)
find "$tree" -exec touch --no-dereference --date="@$seconds" {} +
cat >"$work/Containerfile" <<CONTAINER
FROM scratch
COPY tree/ /
USER 10001:10001
$settings
LABEL org.opencontainers.image.revision=$commit org.opencontainers.image.title=rwkv-serving-$flavour
CONTAINER
readonly storage=(--root "$work/storage" --runroot "$work/run" --storage-driver vfs)
readonly image=localhost/rwkv-serving-$flavour:local
buildah "${storage[@]}" bud --isolation chroot --timestamp "$seconds" --quiet -t "$image" -f "$work/Containerfile" \
  "$work" >/dev/null || die "buildah failed"
rm -f "$output"
buildah "${storage[@]}" push -q "$image" "oci-archive:$output:$image" || die "cannot write $output"
say "$image: $(du -sm "$tree" | cut -f1) MB of files, $(du -m "$output" | cut -f1) MB packed, in $output"
