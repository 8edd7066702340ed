#!/bin/bash
# Tests of cluster.sh: what is remembered of a cluster, and which process is really one of ours.
set -euo pipefail
HOME=$(mktemp -d) # Nothing of the user's is touched.
export HOME
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

failures=0
expect() { # expect WHAT ACTUAL EXPECTED
  if [[ $2 != "$3" ]]; then
    echo "FAILED: $1: got '$2', expected '$3'"
    failures=$((failures + 1))
  fi
}
running() { if is_running "$1"; then echo yes; else echo no; fi; }
# await COMMAND...: until it succeeds, ten seconds at most.
await() {
  local deadline=$((SECONDS + 10))
  until "$@"; do
    if ((SECONDS >= deadline)); then
      echo "FAILED: waited in vain for: $*"
      exit 1
    fi
    sleep 0.02
  done
}

dir=$(mktemp -d)
trap 'rm -rf "$dir" "$HOME"' EXIT

# What is saved is loaded, whatever characters a path has.
load_cluster "$dir" && expect "a folder without cluster.env" loaded "not loaded"
cluster=([model]="/models/a b=c \$HOME \`date\` 'x' \"y\".pth" [stages]=2 [router-0.grpc]=127.0.0.1:4711)
save_cluster "$dir"
cluster=()
load_cluster "$dir"
expect "model" "${cluster[model]}" "/models/a b=c \$HOME \`date\` 'x' \"y\".pth"
expect "address" "${cluster[router-0.grpc]}" 127.0.0.1:4711
expect "order" "$(process_names | tr '\n' ' ')" "state_store-0 worker-0 worker-1 router-0 "
expect "an older cluster.env" "${cluster[routers]} ${cluster[pipelines]}" "1 1"
cluster[routers]=2 cluster[pipelines]=2 cluster[router-1.grpc]=127.0.0.1:4712
expect "more of each" "$(process_names | tr '\n' ' ')" \
  "state_store-0 worker-0 worker-1 worker-2 worker-3 router-0 router-1 "
expect "all routers" "$(routers)" 127.0.0.1:4711,127.0.0.1:4712
cluster[stores]=2 cluster[state_store-0.grpc]=127.0.0.1:5001 cluster[state_store-1.grpc]=127.0.0.1:5002
expect "two stores" "$(process_names | head -n 3 | tr '\n' ' ')" "state_store-0 state_store-1 worker-0 "
expect "all stores" "$(stores)" 127.0.0.1:5001,127.0.0.1:5002

# Where the stores keep things.
cluster=([stores]=1)
expect "a folder" "$(store_flags /d)" "--data_dir=/d/state"
cluster=([stores]=2 [postgres]=postgres://u@h:5/db [s3]=http://h:9/bucket/a/b [s3_credentials]=/c)
expect "PostgreSQL and S3" "$(store_flags "$dir" | tr '\n' ' ')" \
  "--catalog=postgres://u@h:5/db --records=s3://bucket/a/b --s3_endpoint=http://h:9 --s3_credentials_file=/c "
mkdir -p "$dir/run"
echo secret >"$dir/run/postgres_password"
expect "with a password" "$(store_flags "$dir" | tail -n 1)" "--catalog_password_file=$dir/run/postgres_password"
split_password 'postgresql://test:p%40ss\n%25@127.0.0.1:5/db?sslmode=disable'
expect "the URL without password" "$url_without" "postgresql://test@127.0.0.1:5/db?sslmode=disable"
expect "the password" "$url_password" 'p@ss\n%'
split_password postgres://test@h:5/db
expect "no password" "$url_without $url_password" "postgres://test@h:5/db "
given=()
expect "one store needs nothing" "$(missing_of_stores)" ""
given=([stores]=2)
expect "several stores" "$(missing_of_stores)" \
  "--stores 2 needs --postgres, --s3, --s3-credentials: several share one PostgreSQL and one S3, a folder has one"
given=([postgres]=postgres://u@h/db [s3]=http://h/b)
expect "a part of it" "$(missing_of_stores)" \
  "--postgres, --s3 and --s3-credentials go together; missing: --s3-credentials"
given[s3_credentials]=/c given[stores]=3
expect "all of it" "$(missing_of_stores)" ""

# What a call may ask of a cluster: a setting that it has otherwise is named, one that is left open is as it was.
cluster=([model]=/m.pth [stages]=2 [lora]=/a.pth [lora_alpha]=32 [initial_state]=poet=/p.pth,judge=/j.pth)
given=()
expect "nothing asked" "$(differing_settings)" ""
given=([model]=/m.pth [lora]=/a.pth [initial_state]=poet=/p.pth,judge=/j.pth)
expect "the same asked" "$(differing_settings)" ""
given=([stages]=3 [lora_alpha]=16 [group_norm_eps]=1e-5 [initial_state]=poet=/p.pth)
expect "others asked" "$(differing_settings)" \
  "--stages 2 and --lora-alpha 32 and no --group-norm-eps and --initial-state poet=/p.pth,judge=/j.pth"
given=([group_norm_eps]=1e-5 [device]=reference)
inherit_settings
expect "left open" \
  "${given[model]} ${given[lora]} ${given[lora_alpha]} ${given[group_norm_eps]} ${given[initial_state]}" \
  "/m.pth /a.pth 32 1e-5 poet=/p.pth,judge=/j.pth"
expect "a device asked for" "$(differing_settings)" "no --group-norm-eps and no --device"
expect "never set" "${given[tokenizer]-unset}" unset
given=([model]=/other.pth)
cluster[postgres]=postgres://u@h/db
inherit_settings
expect "and where the sessions are" "${given[postgres]}" postgres://u@h/db
unset 'given[postgres]' 'cluster[postgres]'
expect "another model takes the stages" "${given[model]} ${given[stages]} ${#given[@]}" "/other.pth 2 2"
expect "flags of a worker" "$(worker_flags | tr '\n' ' ')" \
  "--model=/m.pth --lora=/a.pth --lora_alpha=32 --initial_states=poet=/p.pth,judge=/j.pth "
cluster=([model]="/a b.pth" [stages]=1 [group_norm_eps]=1e-5 [device]=cpu/avx2 [threads]=3)
expect "fewer flags" "$(worker_flags)" "--model=/a b.pth
--group_norm_eps=1e-5
--device=cpu/avx2
--threads=3"
cluster=([model]=/m.pth [stages]=2 [router-0.grpc]=127.0.0.1:4711)

# A process is ours by pid and start time.
sleep 1000 &
cluster[worker-0.pid]=$! cluster[worker-0.started]=$(start_time $!)
expect "a live process" "$(running worker-0)" yes
cluster[worker-1.pid]=${cluster[worker-0.pid]} cluster[worker-1.started]=$((${cluster[worker-0.started]} - 1))
expect "another process with the same number" "$(running worker-1)" no
expect "a process never started" "$(running router-0)" no
stop_process worker-1 1 2>"$dir/says"
expect "a foreign process is left alone" "$(running worker-0)" yes

# Stopping: by SIGTERM, by SIGKILL, not at all.
stop_process worker-0 10 2>"$dir/says"
expect "stopped" "$(running worker-0)" no
expect "says so" "$(<"$dir/says")" "$program: worker-0 (pid ${cluster[worker-0.pid]}) stopped"
stop_process worker-0 10 2>"$dir/says"
expect "stopped already" "$(<"$dir/says")" "$program: worker-0 was not running"
bash -c 'trap "" TERM; touch "$0/deaf"; exec sleep 1000' "$dir" &
cluster[router-0.pid]=$! cluster[router-0.started]=$(start_time $!)
disown # Or this shell would announce its death.
await test -f "$dir/deaf"
stop_process router-0 1 2>"$dir/says"
expect "killed" "$(running router-0)" no
expect "says that" "$(<"$dir/says")" \
  "$program: router-0 (pid ${cluster[router-0.pid]}) did not stop in 1 s and was killed"

# A dead process that its parent has not waited for is dead.
bash -c 'exit 0' &
readonly short_lived=$!
is_gone() { [[ -z $(start_time "$short_lived") ]]; }
await is_gone

# What rwkvctl finds: one file a cluster, and none once it is withdrawn; other clusters keep theirs.
expect "announced" "$(announce_cluster "$dir" && sed -n 's/^data_dir=//p' "$clusters/$(cluster_id "$dir")")" "$dir"
expect "the router's address" "$(sed -n 's/^router=//p' "$clusters/$(cluster_id "$dir")")" "${cluster[router-0.grpc]}"
cluster[routers]=2 cluster[router-1.grpc]=127.0.0.1:9 cluster[router-1.pid]=4711 cluster[router-1.started]=5
announce_cluster "$dir"
expect "two routers" "$(grep -E '^(router|pid|started)=' "$clusters/$(cluster_id "$dir")" | tr '\n' ' ')" \
  "router=${cluster[router-0.grpc]},127.0.0.1:9 pid=${cluster[router-0.pid]},4711 started=${cluster[router-0.started]},5 "
cluster[routers]=1
announce_cluster "$dir/other"
withdraw_cluster "$dir"
expect "withdrawn, the other stays" "$(ls "$clusters")" "$(cluster_id "$dir/other")"
withdraw_cluster "$dir/other"

# The lock keeps a second one out until the first has ended.
(lock_cluster "$dir" && touch "$dir/held" && await test -f "$dir/let_go") &
await test -f "$dir/held"
expect "a held lock" "$(flock -n "$dir/lock" true && echo free || echo held)" held
touch "$dir/let_go"
wait $!
expect "a lock that was let go" "$(flock -n "$dir/lock" true && echo free || echo held)" free

[[ $failures -eq 0 ]] || exit 1
echo "all passed"
