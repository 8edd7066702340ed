#!/bin/bash
# Runs the whole cluster from an image, as pods of `podman kube play`, and asks it: a state store, a pipeline of two
# stages and two routers, TLS between all, each with a read-only root, no capability, as uid 10001. What is generated
# has to be what the same model says in processes of this machine.
#
#   deploy/images/play.sh [--programs DIR] [ARCHIVE]
#
#   --programs DIR   router, worker, state_store and rwkvctl; default: as they were built last
#   ARCHIVE          of the same programs, as build.sh writes it; default: makes one
#
# Needs podman, buildah, runc and catatonit (apt-get install podman buildah runc catatonit): without one of them it says
# so and ends with status 77. It leaves nothing behind; its images and containers are in a folder of its own.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
readonly root
say() { echo "play.sh: $*" >&2; }
die() {
  say "$*"
  exit 1
}
archive='' programs=''
while (($# > 0)); do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --programs) programs=$(cd "${2:-}" && pwd -P); shift ;;
    -*) say "unknown argument '$1' (see --help)"; exit 2 ;;
    *) archive=$1 ;;
  esac
  shift
done
for tool in podman buildah runc catatonit; do
  command -v "$tool" >/dev/null || { say "skipped: there is no $tool here"; exit 77; }
done
((EUID == 0)) || { say "skipped: pods with an uid of their own want root here"; exit 77; }

work=$(mktemp -d)
readonly work
# As the tools are on a machine without systemd and with hybrid control groups; elsewhere these do no harm.
cat >"$work/containers.conf" <<'CONF'
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
export CONTAINERS_CONF=$work/containers.conf
pods=()
podman_() { podman --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
finish() {
  local status=$? pod
  trap - EXIT
  if ((status != 0)); then
    for pod in "${pods[@]}"; do
      say "the end of what $pod said:"
      podman_ logs --tail 15 "$pod-main" 2>&1 | sed 's/^/    /' >&2 || true
    done
  fi
  if [[ -f $work/local/cluster.env ]]; then "$root/deploy/local/stop.sh" --data-dir "$work/local" 2>/dev/null; fi
  podman_ pod rm --all --force --time 20 >/dev/null 2>&1 || true
  podman_ rmi --all --force >/dev/null 2>&1 || true
  rm -rf "$work"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

if [[ -z $programs ]]; then
  programs=$work/bin
  mkdir "$programs"
  for program in router worker state_store rwkvctl; do
    ln -s "$root/.bazel/bin/services/$program/$program" "$programs/$program"
  done
fi
if [[ -z $archive ]]; then
  archive=$work/image.tar
  "$root/deploy/images/build.sh" --programs "$programs" --output "$archive"
fi
image=$(podman_ load --quiet --input "$archive" | sed -n 's/^Loaded image: *//p' | head -n 1)
[[ -n $image ]] || die "$archive holds no image"
size=$(podman_ image inspect --format '{{.Size}}' "$image")
say "$image: $size bytes"
# NCCL, which is most of the other flavour, is not ours.
[[ $image != *-cpu:* ]] || ((size <= 200000000)) || die "$image has $size bytes, more than 200 MB"

"$root/deploy/local/make_certificates.sh" "$work/tls" >/dev/null
mkdir -p "$work"/{model,ports,data}
cp "$root/deploy/demo_model/rwkv7_demo.safetensors" "$root/deploy/demo_model/rwkv7_demo.vocab.txt" "$work/model/"
chown -R 10001:10001 "$work"/{ports,data,tls}
chmod 755 "$work"

# play NAME ROLE PROGRAM ARGUMENT...: one pod, and waits until it listens. Every pod is on the machine's network, on
# ports that are free.
play() {
  local name=$1 role=$2 program=$3 argument deadline=$((SECONDS + 120))
  shift 3
  {
    cat <<YAML
apiVersion: v1
kind: Pod
metadata:
  name: $name
spec:
  hostNetwork: true
  restartPolicy: Never
  containers:
    - name: main
      image: $image
      command: ["/usr/bin/$program"]
      args:
        - --name=$name
        - --port_file=/ports/$name
        - --tls_certificate=/tls/tls.crt
        - --tls_key=/tls/tls.key
        - --tls_authorities=/tls/ca.crt
YAML
    for argument in "$@"; do echo "        - $argument"; done
    cat <<YAML
      securityContext:
        runAsUser: 10001
        runAsGroup: 10001
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: ["ALL"]
      volumeMounts:
        - {name: tls, mountPath: /tls, readOnly: true}
        - {name: model, mountPath: /model, readOnly: true}
        - {name: ports, mountPath: /ports}
        - {name: data, mountPath: /data}
  volumes:
    - {name: tls, hostPath: {path: $work/tls/$role}}
    - {name: model, hostPath: {path: $work/model}}
    - {name: ports, hostPath: {path: $work/ports}}
    - {name: data, hostPath: {path: $work/data}}
YAML
  } >"$work/$name.yaml"
  [[ " ${pods[*]} " == *" $name "* ]] || pods+=("$name")
  podman_ kube play --quiet "$work/$name.yaml" >/dev/null || die "podman does not play $name"
  until [[ -s $work/ports/$name ]]; do
    [[ $(podman_ inspect --format '{{.State.Status}}' "$name-main") == running ]] || die "$name does not run"
    ((SECONDS < deadline)) || die "$name does not listen after two minutes"
    sleep 0.1
  done
}
address() { sed -n 's/^grpc=//p' "$work/ports/$1"; }

cp "$work/tls/api_keys" "$work/model/api_keys"
chmod 644 "$work/model/api_keys" # It holds hashes.
play store-0 state-store state_store --data_dir=/data
for stage in 0 1; do
  play "worker-$stage" worker worker --model=/model/rwkv7_demo.safetensors --stage=ordinal/2 \
    "--state_store=$(address store-0)"
done
worker_1=$(address worker-1)
readonly worker_1
for router in 0 1; do
  play "router-$router" router router "--workers=$(address worker-0),$(address worker-1)" \
    "--state_store=$(address store-0)" --tokenizer=/model/rwkv7_demo.vocab.txt --api_keys=/model/api_keys
done

ask() {
  "$programs/rwkvctl" --router "$(address router-0),$(address router-1)" \
    --tls-authorities "$work/tls/client/ca.crt" --api-key-file "$work/tls/api_key" "$@"
}
deadline=$((SECONDS + 120))
until ask status --json 2>/dev/null | grep -q '"pipeline_state": *"serving"'; do
  ((SECONDS < deadline)) || die "no pipeline serves after two minutes: $(ask status 2>&1)"
  sleep 0.2
done

readonly how=(--session s --temperature 0.9 --seed 15 --max-tokens 40)
ask sessions create s >/dev/null
first=$(ask generate "${how[@]}" --prompt "Once upon a time")
[[ -n $first ]] || die "nothing is generated"

# A router and a worker go; the session goes on, from the log and the saved state.
podman_ pod stop --time 20 router-0 >/dev/null
podman_ pod stop --time 20 worker-1 >/dev/null
rm "$work/ports/worker-1"
podman_ pod rm --force worker-1 >/dev/null
play worker-1 worker worker --model=/model/rwkv7_demo.safetensors --stage=ordinal/2 \
  "--state_store=$(address store-0)" "--listen=$worker_1"
second=$(ask generate "${how[@]}" --prompt "And then" --request-id second)

# What the images may not have: a shell, a compiler, a writable root, another user.
for path in /bin/sh /usr/bin/sh /bin/bash /usr/bin/gcc /usr/bin/apt; do
  if podman_ run --rm --network none --entrypoint "$path" "$image" -c true >/dev/null 2>&1; then die "it has $path"; fi
done
user=$(podman_ image inspect --format '{{.User}}' "$image")
[[ $user == 10001:10001 ]] || die "it runs as '$user'"

# The same from processes of this machine.
"$root/deploy/local/run.sh" --data-dir "$work/local" --programs "$programs" --stages 2 2>/dev/null
here() { "$programs/rwkvctl" --router "$(sed -n 's/^router-0.grpc=//p' "$work/local/cluster.env")" "$@"; }
here sessions create s >/dev/null
expected=$(here generate "${how[@]}" --prompt "Once upon a time"; here generate "${how[@]}" --prompt "And then")
"$root/deploy/local/stop.sh" --data-dir "$work/local" 2>/dev/null
[[ $first$second == "$expected" ]] ||
  die "the pods say '$first' and '$second', processes of this machine '$expected'"

for pod in "${pods[@]}"; do
  podman_ pod stop --time 20 "$pod" >/dev/null
  status=$(podman_ inspect --format '{{.State.ExitCode}}' "$pod-main")
  [[ $status == 0 ]] || die "$pod ended with $status"
done
say "passed: $image, ${#pods[@]} pods: ${first//$'\n'/ }..."
