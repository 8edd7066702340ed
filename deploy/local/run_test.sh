#!/bin/bash
# run.sh --tls: the cluster comes up encrypted, rwkvctl finds it and its key by itself, who has neither is kept out, a
# process that died comes back as it was, so does a cluster that was stopped, and no log holds the key.
#
#   run_test.sh PROGRAM...   state_store, worker, router and rwkvctl
set -euo pipefail
readonly folder=$(mktemp -d)
export HOME=$folder/home # Nothing of the user's is touched.
readonly data=$folder/data local_scripts=$folder/tree/deploy/local
mkdir -p "$HOME" "$folder/programs" "$local_scripts"
for program in "$@"; do cp -L "$program" "$folder/programs/"; done
cp -L deploy/local/*.sh "$local_scripts/"
cp -L deploy/demo_model/rwkv7_demo.* "$folder/"

finish() {
  "$local_scripts/stop.sh" --data-dir "$data" >"$folder/stop" 2>&1 || cat "$folder/stop"
  rm -rf "$folder"
}
trap finish EXIT
fail() {
  echo "FAILED: $*"
  tail -n 20 "$data"/logs/* "$folder"/says 2>/dev/null || true
  exit 1
}
run() {
  "$local_scripts/run.sh" --programs "$folder/programs" --data-dir "$data" "$@" 2>"$folder/says" ||
    fail "run.sh $*: $(tail -n 5 "$folder/says")"
}
rwkvctl() { timeout 60 "$folder/programs/rwkvctl" "$@" 2>"$folder/says"; }

run --model "$folder/rwkv7_demo.safetensors" --tls --threads 1
session=$(rwkvctl sessions create) || fail "rwkvctl does not find the cluster: $(<"$folder/says")"
rwkvctl status >/dev/null || fail "an operator's call is refused: $(<"$folder/says")"
readonly turn=(generate --session "$session" --request-id first --prompt "The harbor was" --max-tokens 8)
first=$(rwkvctl "${turn[@]}") || fail "no answer: $(<"$folder/says")"
[[ -n $first ]] || fail "an empty answer"

# Others: without TLS, with TLS and no key, with another key.
address=$(sed -n 's/^router=//p' "$HOME"/.cache/rwkv-serving/clusters/*)
if HOME=$folder rwkvctl --router "$address" status >/dev/null; then fail "a caller without TLS is let in"; fi
authorities=$data/tls/client/ca.crt
if rwkvctl --router "$address" --tls-authorities "$authorities" sessions list >/dev/null; then
  fail "a caller without key and certificate is let in"
fi
grep -q UNAUTHENTICATED "$folder/says" || fail "refused otherwise: $(<"$folder/says")"
openssl rand -hex 32 >"$folder/wrong"
if rwkvctl --router "$address" --tls-authorities "$authorities" --api-key-file "$folder/wrong" sessions list; then
  fail "a wrong key is let in"
fi

# Tenants: the commands of services/docs/operating.md. They see their own, within their limits; the file changes.
echo "name=acme max_tokens=8" >"$folder/tenants"
if "$local_scripts/run.sh" --programs "$folder/programs" --data-dir "$folder/none" --tenants "$folder/tenants" \
  2>"$folder/says"; then
  fail "tenants without TLS"
fi
grep -q "wants --tls" "$folder/says" || fail "refused otherwise: $(<"$folder/says")"
"$local_scripts/stop.sh" --data-dir "$data" 2>"$folder/stop"
run --again --tenants "$folder/tenants"
openssl rand -hex 32 >"$folder/acme.key"
echo "sha256:$(tr -d '\n' <"$folder/acme.key" | sha256sum | cut -d ' ' -f 1) name=alice tenant=acme" \
  >>"$data/tls/api_keys"
as_acme() { rwkvctl "$@" --tls-authorities "$authorities" --api-key-file "$folder/acme.key"; }
# until_it_says WORD COMMAND...: the files are read again within a second.
until_it_says() {
  local word=$1 deadline=$((SECONDS + 60))
  shift
  until "$@" >"$folder/told" || true; grep -q "$word" "$folder/told" "$folder/says"; do
    ((SECONDS < deadline)) || fail "$*: not $word: $(<"$folder/told") $(<"$folder/says")"
  done
}
until_it_says acme as_acme usage
[[ $(as_acme sessions list) != *"$session"* ]] || fail "a tenant sees sessions of nobody's: $(as_acme sessions list)"
if as_acme sessions show "$session"; then fail "a tenant reads another's session"; fi
grep -q NOT_FOUND "$folder/says" || fail "refused otherwise: $(<"$folder/says")"
if as_acme generate --prompt "The" --max-tokens 9; then fail "a longer answer than the tenant may have"; fi
grep -q "at most 8" "$folder/says" || fail "refused otherwise: $(<"$folder/says")"
echo "name=acme max_tokens=many" >"$folder/tenants.new" && mv "$folder/tenants.new" "$folder/tenants"
metrics=$(sed -n 's/^router-0.metrics=//p' "$data/cluster.env")
until_it_says 'file_unusable.*tenants.* 1' curl -s "http://$metrics/metrics"
as_acme generate --prompt "The" --max-tokens 8 >/dev/null || fail "a broken file takes the tenant away"
echo "name=other" >"$folder/tenants.new" && mv "$folder/tenants.new" "$folder/tenants"
until_it_says PERMISSION_DENIED as_acme sessions list
rwkvctl sessions show "$session" >/dev/null || fail "an operator is refused: $(<"$folder/says")"

# A worker dies and is started again with its certificate; the session goes on.
kill -KILL "$(sed -n 's/^worker-1.pid=//p' "$data/cluster.env")"
run
[[ $(rwkvctl "${turn[@]}") == "$first" ]] ||
  fail "the answer is another one after a worker died: $(<"$folder/says")"
rwkvctl generate --session "$session" --max-tokens 4 >/dev/null || fail "the session does not go on: $(<"$folder/says")"

# Stopped and started again as it was: the key of before is good, the session is there, and the router where it was.
before=$(<"$data/tls/api_key")
"$local_scripts/stop.sh" --data-dir "$data" 2>"$folder/stop"
run --again
[[ $(<"$data/tls/api_key") == "$before" ]] || fail "a restart changes the key"
grep -qx "router=$address" "$HOME"/.cache/rwkv-serving/clusters/* || fail "the router is not at $address any more"
for setting in tls=on threads=1 "model=$folder/rwkv7_demo.safetensors" "tenants=$folder/tenants"; do
  grep -qx "$setting" "$data/cluster.env" || fail "started again without $setting"
done
rwkvctl sessions show "$session" >/dev/null ||
  fail "the session is gone: $(<"$folder/says")"

# Whoever leaves it to memory is told what is left out.
"$local_scripts/stop.sh" --data-dir "$data" 2>"$folder/stop"
run --model "$folder/rwkv7_demo.safetensors"
grep -q "had --threads 1 --tls --tenants $folder/tenants " "$folder/says" || fail "nobody says that TLS is off now: $(<"$folder/says")"
"$local_scripts/stop.sh" --data-dir "$data" 2>"$folder/stop"
if "$local_scripts/run.sh" --programs "$folder/programs" --data-dir "$folder/none" --again 2>"$folder/says"; then
  fail "--again where nothing was"
fi
grep -q "no cluster was stopped in $folder/none" "$folder/says" || fail "said otherwise: $(<"$folder/says")"

[[ $(stat -c %a "$data/tls/api_key") == 600 ]] || fail "others may read the key"
if grep -rqF "$before" "$data/logs" "$data/cluster.env" "$HOME"; then fail "the key stands in a log or an open file"; fi
echo "all passed"
