#!/bin/bash
# Starts a cluster on this machine (state stores, workers, routers; each its own process) and streams an answer.
# Installs what is missing and builds first. Called again, it finds the running cluster and restarts what died.
#
#   deploy/local/run.sh [--model PATH] [--tokenizer FILE] [--routers R] [--pipelines P] [--stages S]
#                       [--stores K --postgres URL --s3 URL --s3-credentials FILE]
#                       [--data-dir DIR] [--lora FILE --lora-alpha A]
#                       [--initial-state NAME=FILE]... [--group-norm-eps X] [--device NAME] [--threads N]
#                       [--tls [--tenants FILE]] [--programs DIR] [--again] [PROMPT]
#
#   --model PATH    an RWKV checkpoint: .pth, .safetensors, GGUF or .bin of rwkv.cpp; of one in several files the
#                   folder, the index or a part. Default: the small model in deploy/demo_model
#   --tokenizer FILE
#                   a vocabulary in World format, a 20B_tokenizer.json, or a GGUF that brings one. Default: the first
#                   that fits the model of what a GGUF brings itself, MODEL.vocab.txt, rwkv_vocab_v20230424.txt and
#                   20B_tokenizer.json beside it, and the published ones
#   --stages S      worker processes of a pipeline, each with a share of the layers (1 to 64, default 2)
#   --pipelines P   pipelines, each with S workers of its own (1 to 64, default 1)
#   --routers R     routers that share the pipelines (1 to 16, default 1); one more than pipelines stands by
#   --stores K      state stores (1 to 16, default 1). Several share what is in PostgreSQL and S3, so they need:
#   --postgres URL  postgres://USER[:PASSWORD]@HOST:PORT/DATABASE: sessions and token logs are there, not in DIR
#   --s3 URL        http://HOST:PORT/BUCKET[/PREFIX] (or https): states are there; a bucket that exists
#   --s3-credentials FILE
#                   two lines: access key, secret key
#   --lora FILE --lora-alpha A
#                   a LoRA adapter to merge into the model, and the alpha that it was trained with
#   --initial-state NAME=FILE
#                   a tuned state that sessions may begin with (rwkvctl sessions create --initial-state NAME); may be
#                   given often
#   --group-norm-eps X
#                   epsilon of the group norm behind the recurrence; 1e-5 for what rwkv.cpp computes of an RWKV-5
#   --device NAME   what the workers compute on, as their own --device (default: auto, the fastest here)
#   --threads N     threads of each worker's CPU device (1 to 1024; default: the processors that it may use)
#   --tls           every connection encrypted, with certificates on both sides, and an API key for clients, all made by
#                   make_certificates.sh in DIR/tls; rwkvctl finds them
#   --tenants FILE  only the tenants in it are served, within its limits, and operators; keys of tenants are lines of
#                   DIR/tls/api_keys (services/docs/operating.md)
#   --again         what is not said here is as the cluster had it that was stopped in DIR last; its routers listen
#                   where they did
#   --programs DIR  installs and builds nothing: DIR has state_store, worker, router and rwkvctl
#   --data-dir DIR  where sessions and logs live (default: ~/.local/share/rwkv-serving/default)
#   PROMPT          streams the model's answer on standard output; everything else goes to standard error
#
# The cluster keeps running; deploy/local/stop.sh [--data-dir DIR] stops it.
set -euo pipefail
readonly here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly root=$(cd "$here/../.." && pwd)
source "$here/cluster.sh"
readonly default_model=$root/deploy/demo_model/rwkv7_demo.safetensors
default=([model]=$default_model [stages]=2 [pipelines]=1 [routers]=1 [stores]=1)
readonly start_seconds=300 # For one process to come up; a large model takes long to map and check.
readonly tell_seconds=5    # Then it is said what it waits for: a store waits for PostgreSQL and S3.

exec 3>&1 1>&2 # Standard output is for the answer alone.

# ---- Arguments. -----------------------------------------------------------------------------------------------------
data_dir=$default_data_dir prompt='' has_prompt=false programs='' postgres_password='' again=false
set_prompt() {
  $has_prompt && usage_error "more than one prompt: '$1'; quote it"
  prompt=$1 has_prompt=true
}
# set_file KEY FLAG FILE: a file by its full path, which is what a running cluster is compared by.
set_file() {
  [[ -f $3 && -r $3 ]] || usage_error "$2 '$3' is no readable file"
  [[ $3 != *$'\n'* ]] || usage_error "$2: a path with a line break"
  given[$1]=$(readlink -f "$3")
}
# set_model FLAG PATH: also a folder with a model in several files.
set_model() {
  [[ -d $2 ]] || { set_file model "$1" "$2"; return; }
  [[ -r $2 && $2 != *$'\n'* ]] || usage_error "$1 '$2' is no readable folder"
  given[model]=$(readlink -f "$2")
}
# set_flag FLAG VALUE
set_flag() {
  case $1 in
    --model) set_model "$1" "$2" ;;
    --tokenizer)
      set_file tokenizer "$1" "$2"
      [[ ${given[tokenizer]} != *,* ]] || usage_error "$1 '$2' has a comma in its path"
      ;;
    --stages | --pipelines | --routers | --stores)
      local most=64
      [[ $1 != --routers && $1 != --stores ]] || most=16
      [[ $2 =~ ^[1-9][0-9]?$ && $2 -le $most ]] || usage_error "$1 '$2' is not in 1 .. $most"
      given[${1#--}]=$2
      ;;
    --postgres)
      [[ $2 =~ ^postgres(ql)?://[^/@]+@[^/@]+/.+$ && $2 != *$'\n'* ]] ||
        usage_error "$1: want postgres://USER[:PASSWORD]@HOST:PORT/DATABASE"
      split_password "$2"
      given[postgres]=$url_without postgres_password=$url_password
      ;;
    --s3)
      [[ $2 =~ ^https?://[^/]+/[^/].*$ && $2 != *$'\n'* ]] || usage_error "$1 '$2' is not http://HOST:PORT/BUCKET"
      given[s3]=${2%/}
      ;;
    --s3-credentials) set_file s3_credentials "$1" "$2" ;;
    --tenants) set_file tenants "$1" "$2" ;;
    --lora) set_file lora "$1" "$2" ;;
    --lora-alpha | --group-norm-eps)
      [[ $2 =~ ^[0-9.]+([eE][-+]?[0-9]+)?$ ]] || usage_error "$1 '$2' is no positive number"
      local key=${1#--}
      given[${key//-/_}]=$2
      ;;
    --device)
      [[ $2 =~ ^[a-z0-9/:]+$ ]] || usage_error "$1 '$2' is no name of a device"
      given[device]=$2
      ;;
    --threads)
      [[ $2 =~ ^[1-9][0-9]{0,3}$ && $2 -le 1024 ]] || usage_error "--threads '$2' is not in 1 .. 1024"
      given[threads]=$2
      ;;
    --initial-state)
      local others=${given[initial_state]:-}
      [[ $2 == ?*=?* && ${2%%=*} != *,* ]] || usage_error "$1 '$2' is not NAME=FILE"
      set_file initial_state "$1" "${2#*=}"
      [[ ${given[initial_state]} != *,* ]] || usage_error "$1 '$2' has a comma in its path"
      given[initial_state]=${others:+$others,}${2%%=*}=${given[initial_state]}
      ;;
    --programs)
      [[ -x $2/router ]] || usage_error "$1 '$2' has no program 'router'"
      programs=$(cd "$2" && pwd -P)
      ;;
    --data-dir)
      [[ -n $2 && $2 != *$'\n'* ]] || usage_error "$1 '$2' is no path"
      data_dir=$2
      ;;
    *) usage_error "unknown argument '$1'" ;;
  esac
}
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help)
      print_help >&3
      exit 0
      ;;
    --)
      shift
      for argument in "$@"; do set_prompt "$argument"; done
      break
      ;;
    --tls) given[tls]=on ;;
    --again) again=true ;;
    --*=*) set_flag "${1%%=*}" "${1#*=}" ;;
    -*)
      set_flag "$1" "${2:-}"
      shift
      ;;
    *) set_prompt "$1" ;;
  esac
  shift
done
[[ ${given[lora]:+set} == "${given[lora_alpha]:+set}" ]] || usage_error "--lora and --lora-alpha: one without the other"
if $has_prompt && [[ -z $prompt ]]; then usage_error "the prompt is empty"; fi
check_stores() {
  local missing
  missing=$(missing_of_stores)
  [[ -z $missing ]] || usage_error "$missing"
}
check_tenants() {
  [[ -z ${given[tenants]:-} || -n ${given[tls]:-} ]] ||
    usage_error "--tenants wants --tls: without it nobody says who calls"
}
$again && [[ ! -f $data_dir/stopped.env && ! -f $data_dir/cluster.env ]] &&
  usage_error "--again: no cluster was stopped in $data_dir"
# Before the build; what an earlier cluster had is not known yet.
$again || [[ -f $data_dir/cluster.env ]] || { check_stores; check_tenants; }

# ---- Install and build. ---------------------------------------------------------------------------------------------
readonly binaries=(state_store worker router rwkvctl)
if [[ -z $programs ]]; then
  "$here/setup.sh"
  say "building (minutes the first time, seconds afterwards)"
  cd "$root"
  # Bazel's server stays behind: with descriptor 3 it would keep whoever reads the answer waiting for its end.
  bazel build --show_progress --show_progress_rate_limit=10 --curses=no \
    //services/state_store //services/worker //services/router //services/rwkvctl 3>&- ||
    die "the build failed"
fi
# built NAME: where the program is.
built() { if [[ -n $programs ]]; then echo "$programs/$1"; else echo "$root/.bazel/bin/services/$1/$1"; fi; }

mkdir -p "$data_dir" || die "cannot create $data_dir"
data_dir=$(cd "$data_dir" && pwd -P)
readonly data_dir
mkdir -p "$data_dir"/{state,logs,bin,run} || die "cannot write to $data_dir"
lock_cluster "$data_dir"
if [[ -n $postgres_password ]]; then
  (umask 077 && printf '%s\n' "$postgres_password" >"$data_dir/run/postgres_password") ||
    die "cannot write to $data_dir"
fi

# ---- Starting one process. ------------------------------------------------------------------------------------------
started=() # By this call, so that it can clean up behind itself.
declare -A log_begin=() # NAME -> bytes of its log before this call.

# start NAME FLAG...: runs bin/<NAME without number> and waits until its port file says where it listens.
start() {
  local name=$1 port_file=$data_dir/run/$1.ports log=$data_dir/logs/$1.log deadline=$((SECONDS + start_seconds))
  local tell=$((SECONDS + tell_seconds))
  shift
  rm -f "$port_file"
  if [[ -f $log && $(stat -c %s "$log") -gt 16777216 ]]; then mv "$log" "$log.old"; fi
  log_begin[$name]=$(stat -c %s "$log" 2>/dev/null || echo 0)
  # Its own session, so that a Ctrl-C here does not reach it; no descriptor of ours, so that nobody waits for it.
  setsid "$data_dir/bin/${name%-*}" --name="$name" --port_file="$port_file" "$@" \
    </dev/null >>"$log" 2>&1 3>&- 9>&- &
  local pid=$!
  disown "$pid"
  cluster[$name.pid]=$pid
  cluster[$name.started]=$(start_time "$pid")
  started+=("$name")
  save_cluster "$data_dir"
  while [[ ! -s $port_file ]]; do
    is_running "$name" || fail_start "$name" "died while starting"
    ((SECONDS < deadline)) || fail_start "$name" "is not up after $start_seconds s"
    if ((SECONDS >= tell)); then
      say "$name is not up yet; its log ends: $(tail -c "+$((log_begin[$name] + 1))" "$log" | tail -n 1)"
      tell=$((deadline + 1)) # Once.
    fi
    sleep 0.02
  done
  cluster[$name.grpc]=$(sed -n 's/^grpc=//p' "$port_file")
  cluster[$name.metrics]=$(sed -n 's/^metrics=//p' "$port_file")
  save_cluster "$data_dir"
  say "$name: pid $pid, grpc ${cluster[$name.grpc]}, metrics http://${cluster[$name.metrics]}/metrics"
}

# fail_start NAME MESSAGE...: shows what NAME said, undoes this call, fails.
fail_start() {
  local name=$1 log=$data_dir/logs/$1.log
  shift
  say "$name $*; the end of $log:"
  tail -c "+$((${log_begin[$name]:-0} + 1))" "$log" | tail -n 20 | sed 's/^/    /' >&2
  undo_start
  exit 1
}

undo_start() {
  local i name
  for ((i = ${#started[@]} - 1; i >= 0; --i)); do
    if is_running "${started[i]}"; then stop_process "${started[i]}" 15; fi
  done
  for name in "${started[@]}"; do unset "cluster[$name.pid]" "cluster[$name.started]"; done
  for name in $(process_names); do is_running "$name" && { save_cluster "$data_dir"; return; }; done
  rm -f "$data_dir/cluster.env" # Nothing of it is left.
}
trap 'trap "" INT TERM; say "interrupted"; undo_start; exit 130' INT TERM

# address KIND NAME: where NAME listened before, or any free port.
address() { echo "${cluster[$2.$1]:-127.0.0.1:0}"; }

# make_certificates: what DIR/tls lacks, or what expires within a month; running processes take it up.
make_certificates() {
  [[ -n ${cluster[tls]:-} ]] || return 0
  if [[ -f $data_dir/tls/api_key ]] &&
    openssl x509 -checkend 2592000 -noout -in "$data_dir/tls/client/tls.crt" >/dev/null 2>&1; then
    return
  fi
  say "making certificates and an API key in $data_dir/tls"
  "$here/make_certificates.sh" "$data_dir/tls" || die "cannot make certificates"
}

start_state_store() {
  local flags
  mapfile -t flags < <(store_flags "$data_dir"; tls_flags "$data_dir" state-store)
  start "state_store-$1" --listen="$(address grpc "state_store-$1")" \
    --metrics_listen="$(address metrics "state_store-$1")" "${flags[@]}"
}
start_worker() {
  local flags
  mapfile -t flags < <(worker_flags; tls_flags "$data_dir" worker)
  start "worker-$1" --listen="$(address grpc "worker-$1")" --metrics_listen="$(address metrics "worker-$1")" \
    --stage="$(($1 % cluster[stages]))/${cluster[stages]}" \
    --state_store="$(stores)" "${flags[@]}"
}

# tokenizers_of MODEL: the files that may be its tokenizer, by commas, the likeliest first.
tokenizers_of() {
  local candidates=("${1%.*}.vocab.txt") files=() folder=${1%/*} name file
  if [[ -d $1 ]]; then
    folder=$1
  elif [[ $(head -c 4 "$1" | tr -d '\0') == GGUF ]]; then
    candidates=("$1")
  fi
  for name in rwkv_vocab_v20230424.txt 20B_tokenizer.json; do
    if [[ -f $folder/$name ]]; then candidates+=("$folder/$name"); else candidates+=("$cache/vocabulary/$name"); fi
  done
  for file in "${candidates[@]}"; do
    [[ -f $file ]] || continue
    if [[ $file == *,* ]]; then say "note: $file is not used: it has a comma in its path"; else files+=("$file"); fi
  done
  (IFS=,; echo "${files[*]}")
}
start_router() {
  local workers=() tls i
  mapfile -t tls < <(tls_flags "$data_dir" router)
  for ((i = 0; i < cluster[pipelines] * cluster[stages]; ++i)); do workers+=("${cluster[worker-$i.grpc]}"); done
  start "router-$1" --listen="$(address grpc "router-$1")" --metrics_listen="$(address metrics "router-$1")" \
    --workers="$(IFS=,; echo "${workers[*]}")" --state_store="$(stores)" \
    --tokenizer="${cluster[tokenizer]:-$(tokenizers_of "${cluster[model]}")}" --allow_logits \
    "${tls[@]}"
}
start_by_name() {
  case $1 in
    state_store-*) start_state_store "${1#state_store-}" ;;
    worker-*) start_worker "${1#worker-}" ;;
    router-*) start_router "${1#router-}" ;;
  esac
}

# ---- What runs already? ---------------------------------------------------------------------------------------------
running=0
crashed=false
if load_cluster "$data_dir"; then
  crashed=true # Only stop.sh removes cluster.env.
  for name in $(process_names); do
    if is_running "$name"; then running=$((running + 1)); fi
  done
fi

if ((running > 0)); then
  differs=$(differing_settings)
  [[ -z $differs ]] ||
    die "a cluster with $differs runs in $data_dir; stop it first: $here/stop.sh --data-dir $data_dir"
  for binary in "${binaries[@]}"; do
    cmp -s "$(built "$binary")" "$data_dir/bin/$binary" ||
      { say "note: the running cluster was built from other sources; stop and start it to run these"; break; }
  done
  make_certificates
  all=$(process_names | wc -l)
  if ((running == all)); then
    say "the cluster is running already: model ${cluster[model]}, ${cluster[stages]} stages"
  else
    say "$((all - running)) of $all processes died; restarting them where they were"
    for name in $(process_names); do is_running "$name" || start_by_name "$name"; done
  fi
else
  if $crashed; then
    say "the last cluster here died without being stopped; starting it again"
    inherit_settings
    check_stores
    check_tenants
  elif load_cluster "$data_dir" stopped.env; then
    if $again; then
      inherit_settings
      check_stores
      check_tenants
    elif left_out=$(settings_left_out) && [[ -n $left_out ]]; then
      say "note: the cluster that was stopped here had $left_out (--again: as it was)"
    fi
  fi
  declare -A places=()
  if $again; then
    for ((i = 0; i < cluster[routers]; ++i)); do places[router-$i.grpc]=${cluster[router-$i.grpc]:-}; done
  fi
  cluster=()
  for key in "${!default[@]}"; do cluster[$key]=${default[$key]}; done
  for key in "${!places[@]}"; do cluster[$key]=${places[$key]}; done
  for key in "${!given[@]}"; do cluster[$key]=${given[$key]}; done
  if [[ -n ${cluster[postgres]:-} && -n $(ls -A "$data_dir/state") ]]; then
    say "note: sessions in $data_dir/state are not those in PostgreSQL; to take them along: rwkvctl store move"
  fi
  for binary in "${binaries[@]}"; do
    install -m 755 "$(built "$binary")" "$data_dir/bin/$binary.new" || die "cannot copy to $data_dir/bin"
    mv "$data_dir/bin/$binary.new" "$data_dir/bin/$binary"
  done
  make_certificates
  say "starting ${cluster[pipelines]} x ${cluster[stages]} stages of ${cluster[model]}; logs in $data_dir/logs"
  for name in $(process_names); do start_by_name "$name"; done
fi
[[ ${cluster[model]} != "$default_model" ]] ||
  say "this is the demo model of 6 million weights: it makes sentences, not sense. For sense: --model PATH"

# ---- Until the pipelines serve. -------------------------------------------------------------------------------------
router=$(routers)
call=("$data_dir/bin/rwkvctl" --router "$router")
[[ -z ${cluster[tls]:-} ]] ||
  call+=(--tls-authorities "$data_dir/tls/client/ca.crt" --api-key-file "$data_dir/tls/api_key")
readonly router call
# "serving" when each pipeline is driven, by as many routers as can have one, else what the first router says.
readonly read_state='
import json, sys
status = json.load(sys.stdin)
routers, pipelines = map(int, sys.argv[1:])
serving = sum(p["role"] == "router" and p["health"] == "serving" for p in status["processes"])
lanes = len(status["lanes"])
missing = f"{lanes} of {pipelines} pipelines are driven, {serving} of {routers} routers serve"
print(status["pipeline_state"] if not serving else
      "serving" if lanes == pipelines and serving >= min(routers, pipelines) else missing)'
deadline=$((SECONDS + start_seconds))
until state=$("${call[@]}" status --json 2>/dev/null |
  python3 -c "$read_state" "${cluster[routers]}" "${cluster[pipelines]}" 2>/dev/null) &&
  [[ $state == serving ]]; do
  for name in $(process_names); do
    is_running "$name" || fail_start "$name" "died"
  done
  if ((SECONDS >= deadline)); then
    "${call[@]}" status >/dev/null || true  # It says why.
    die "the pipeline does not serve after $start_seconds s: ${state:-no answer}"
  fi
  sleep 0.05
done
trap - INT TERM
announce_cluster "$data_dir"
say "serving on $router; logs in $data_dir/logs; stop with: $here/stop.sh --data-dir $data_dir"
exec 9>&- # Others may look now.

if $has_prompt; then
  how=()
  # Drawn greedily, what so small a model says goes round in circles. The seed: the same answer each time.
  [[ ${cluster[model]} != "$default_model" ]] ||
    how=(--temperature 0.9 --top-p 0.6 --presence-penalty 0.4 --frequency-penalty 0.4 --seed 15)
  exec "${call[@]}" generate --prompt "$prompt" "${how[@]}" >&3 3>&-
fi
