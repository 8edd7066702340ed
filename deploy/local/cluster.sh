# shellcheck shell=bash disable=SC2034
# What run.sh and stop.sh share: where a local cluster keeps its things, and which of its processes are alive. Sourced.
#
# A cluster's folder (--data-dir) holds
#   state/          the state store's data: sessions, token logs, snapshots
#   tls/            with --tls: certificates and an API key, as make_certificates.sh writes them
#   logs/           one file a process
#   bin/            the programs it runs, copied at the start so that a later build changes nothing under it
#   run/            port files
#   cluster.env     what was started: settings, and per process its pid, start time and addresses
#   stopped.env     the same, of the cluster that was stopped here last
#   lock            held while a cluster is started or stopped
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
readonly cache=$HOME/.cache/rwkv-serving
readonly clusters=$cache/clusters # A file for each cluster that runs, for rwkvctl (services/rwkvctl/local_clusters.h).
readonly default_data_dir=${XDG_DATA_HOME:-$HOME/.local/share}/rwkv-serving/default
readonly program=${0##*/}

say() { echo "$program: $*" >&2; }
die() {
  say "$*"
  exit 1
}
usage_error() {
  say "$* (see --help)"
  exit 2
}
# The comment at the top of the script.
print_help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

# Everything known about the cluster, as in cluster.env. Keys: the settings, and for every process NAME (router-0,
# worker-I, state_store-K): NAME.pid, NAME.started, NAME.grpc, NAME.metrics.
declare -A cluster=()

# What a call asks for, by setting; unset: it does not say.
#   model; stores, routers, pipelines, and the stages of each; postgres (no password in it), s3, s3_credentials: where
#   the stores keep things (unset: in the folder); tokenizer (unset: run.sh looks for it); lora and lora_alpha;
#   group_norm_eps; device; threads; initial_state: NAME=FILE,...; tls: on; tenants
declare -A given=()
readonly settings=(model tokenizer stores routers pipelines stages postgres s3 s3_credentials
  lora lora_alpha group_norm_eps device threads initial_state tls tenants)
# What run.sh takes where nobody says.
declare -A default=()
# What stays when another model is served: how many processes, where the sessions are, and TLS.
readonly settings_of_any_model=(stores routers pipelines stages postgres s3 s3_credentials tls tenants)

# differing_settings: what the cluster has otherwise than `given` asks; empty: nothing.
differing_settings() {
  local key text=''
  for key in "${settings[@]}"; do
    [[ -z ${given[$key]:-} || ${given[$key]} == "${cluster[$key]:-}" ]] && continue
    text+="${text:+ and }"
    if [[ -z ${cluster[$key]:-} ]]; then text+="no --${key//_/-}"; else text+="--${key//_/-} ${cluster[$key]}"; fi
  done
  echo "$text"
}

# settings_left_out: what the cluster has and `given` does not say; empty: nothing.
settings_left_out() {
  local key text=''
  for key in "${settings[@]}"; do
    [[ -n ${given[$key]:-} || -z ${cluster[$key]:-} || ${cluster[$key]} == "${default[$key]:-}" ]] ||
      text+="${text:+ }--${key//_/-} ${cluster[$key]}"
  done
  echo "${text//--tls on/--tls}"
}

# inherit_settings: what `given` leaves open is as the cluster had it; with another model only what fits any.
inherit_settings() {
  local key keys=("${settings[@]}")
  if [[ -n ${given[model]:-} && ${given[model]} != "${cluster[model]}" ]]; then keys=("${settings_of_any_model[@]}"); fi
  for key in "${keys[@]}"; do
    if [[ -z ${given[$key]:-} && -n ${cluster[$key]:-} ]]; then given[$key]=${cluster[$key]}; fi
  done
}

# worker_flags: what the settings are for a worker, a flag a line.
worker_flags() {
  echo "--model=${cluster[model]}"
  if [[ -n ${cluster[lora]:-} ]]; then printf '%s\n' "--lora=${cluster[lora]}" "--lora_alpha=${cluster[lora_alpha]}"; fi
  if [[ -n ${cluster[group_norm_eps]:-} ]]; then echo "--group_norm_eps=${cluster[group_norm_eps]}"; fi
  if [[ -n ${cluster[device]:-} ]]; then echo "--device=${cluster[device]}"; fi
  if [[ -n ${cluster[threads]:-} ]]; then echo "--threads=${cluster[threads]}"; fi
  if [[ -n ${cluster[initial_state]:-} ]]; then echo "--initial_states=${cluster[initial_state]}"; fi
}

# tls_flags DIR ROLE: what a process needs for TLS, a flag a line; nothing without TLS. The role is as in
# make_certificates.sh.
tls_flags() {
  [[ -n ${cluster[tls]:-} ]] || return 0
  printf '%s\n' "--tls_certificate=$1/tls/$2/tls.crt" "--tls_key=$1/tls/$2/tls.key" "--tls_authorities=$1/tls/$2/ca.crt"
  [[ $2 == router ]] || return 0
  echo "--api_keys=$1/tls/api_keys"
  if [[ -n ${cluster[tenants]:-} ]]; then echo "--tenants=${cluster[tenants]}"; fi
}

# load_cluster DIR [FILE]: fills `cluster`; false if there is no cluster.env, or FILE.
load_cluster() {
  cluster=()
  local file=$1/${2:-cluster.env} key value
  [[ -f $file ]] || return 1
  while IFS='=' read -r key value; do
    [[ -z $key || $key == \#* ]] || cluster[$key]=$value
  done <"$file"
  : "${cluster[stores]:=1}" "${cluster[routers]:=1}" "${cluster[pipelines]:=1}"
}

# save_cluster DIR: writes `cluster` so that a reader sees the old file or the new one.
save_cluster() {
  local key
  {
    echo "# A local cluster, written by deploy/local/run.sh."
    for key in "${!cluster[@]}"; do echo "$key=${cluster[$key]}"; done | LC_ALL=C sort
  } >"$1/cluster.env.new" && mv "$1/cluster.env.new" "$1/cluster.env"
}

# process_names: the processes of `cluster` in the order in which they start. Of S stages, worker-I is stage I % S.
process_names() {
  local i
  for ((i = 0; i < ${cluster[stores]:-1}; ++i)); do echo "state_store-$i"; done
  for ((i = 0; i < ${cluster[pipelines]:-1} * cluster[stages]; ++i)); do echo "worker-$i"; done
  for ((i = 0; i < ${cluster[routers]:-1}; ++i)); do echo "router-$i"; done
}

# of_each KIND COUNT KEY: that of KIND-0 to KIND-COUNT-1, by commas.
of_each() {
  local i list=
  for ((i = 0; i < $2; ++i)); do list+=${list:+,}${cluster[$1-$i.$3]:-}; done
  echo "$list"
}
routers() { of_each router "${cluster[routers]:-1}" grpc; }
stores() { of_each state_store "${cluster[stores]:-1}" grpc; }

# missing_of_stores: what `given` leaves out that its stores need; empty: nothing.
missing_of_stores() {
  local key missing=
  for key in postgres s3 s3_credentials; do
    if [[ -z ${given[$key]:-} ]]; then missing+="${missing:+, }--${key//_/-}"; fi
  done
  if [[ -z $missing ]]; then return; fi
  if [[ ${given[stores]:-1} == 1 && $missing == "--postgres, --s3, --s3-credentials" ]]; then return; fi
  if ((${given[stores]:-1} > 1)); then
    echo "--stores ${given[stores]} needs $missing: several share one PostgreSQL and one S3, a folder has one"
  else
    echo "--postgres, --s3 and --s3-credentials go together; missing: $missing"
  fi
}

# split_password URL: sets url_without and url_password (decoded; empty: none) of postgres://USER[:PASSWORD]@HOST...
split_password() {
  url_without=$1 url_password=
  if [[ $1 =~ ^(postgres(ql)?://[^/@:]+):([^@]*)(@.*)$ ]]; then
    url_without=${BASH_REMATCH[1]}${BASH_REMATCH[4]}
    url_password=${BASH_REMATCH[3]//\\/\\\\}
    url_password=$(printf '%b' "${url_password//%/\\x}")
  fi
}

# store_flags DIR: what the settings are for a store, a flag a line. DIR is the cluster's.
store_flags() {
  if [[ -z ${cluster[postgres]:-} ]]; then
    echo "--data_dir=$1/state"
    return
  fi
  local bucket=${cluster[s3]#*://*/}
  printf '%s\n' "--catalog=${cluster[postgres]}" "--records=s3://$bucket" "--s3_endpoint=${cluster[s3]%"/$bucket"}" \
    "--s3_credentials_file=${cluster[s3_credentials]}"
  if [[ -s $1/run/postgres_password ]]; then echo "--catalog_password_file=$1/run/postgres_password"; fi
}

# announce_cluster DIR, withdraw_cluster DIR: lets rwkvctl find it without --router, and no longer.
announce_cluster() {
  local file
  file=$clusters/$(cluster_id "$1")
  mkdir -p "$clusters"
  printf '%s\n' "router=$(routers)" "pid=$(of_each router "${cluster[routers]:-1}" pid)" \
    "started=$(of_each router "${cluster[routers]:-1}" started)" "data_dir=$1" "model=${cluster[model]}" >"$file.new"
  if [[ -n ${cluster[tls]:-} ]]; then
    printf '%s\n' "tls_authorities=$1/tls/client/ca.crt" "api_key_file=$1/tls/api_key" >>"$file.new"
  fi
  mv "$file.new" "$file"
}
withdraw_cluster() { rm -f "$clusters/$(cluster_id "$1")"; }
cluster_id() { sha1sum <<<"$1" | cut -c 1-16; }

# start_time PID: in clock ticks since boot; with the pid it names a process for good. Empty if there is none, or a dead
# one that nobody has waited for.
start_time() {
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  read -ra fields <<<"${stat##*) }" # The name before it may hold blanks and brackets.
  [[ ${fields[0]} == [ZX] ]] || echo "${fields[19]}"
}

# is_running NAME: whether this very process, not another with its number, is alive.
is_running() {
  local pid=${cluster[$1.pid]:-}
  [[ -n $pid && -n ${cluster[$1.started]:-} && $(start_time "$pid") == "${cluster[$1.started]}" ]]
}

# lock_cluster DIR: one start or stop at a time. Released when the script ends or closes descriptor 9.
lock_cluster() {
  exec 9>"$1/lock" || die "cannot write to $1"
  flock -n 9 && return
  say "waiting for another start or stop of this cluster"
  flock -w 600 9 || die "$1/lock is still held after ten minutes"
}

# stop_process NAME SECONDS: SIGTERM, then SIGKILL. Says what it did.
stop_process() {
  local name=$1 pid=${cluster[$1.pid]:-} deadline=$((SECONDS + $2))
  if ! is_running "$name"; then
    say "$name was not running"
    return
  fi
  kill -TERM "$pid" 2>/dev/null || true
  while is_running "$name"; do
    if ((SECONDS >= deadline)); then
      kill -KILL "$pid" 2>/dev/null || true
      while is_running "$name"; do sleep 0.02; done
      say "$name (pid $pid) did not stop in $2 s and was killed"
      return
    fi
    sleep 0.02
  done
  say "$name (pid $pid) stopped"
}
