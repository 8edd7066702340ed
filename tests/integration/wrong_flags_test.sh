#!/bin/bash
# What is said to wrong flags, files that are not there and certificates of others: one line that names what is wrong, at
# once, before a model is loaded or a store is opened.
set -euo pipefail
readonly store=$PWD/services/state_store/state_store worker=$PWD/services/worker/worker router=$PWD/services/router/router
readonly model=$PWD/deploy/demo_model/rwkv7_demo.safetensors
readonly tls=$TEST_TMPDIR/tls
"$PWD/deploy/local/make_certificates.sh" "$tls"

failed=0
# refused EXPECTED PROGRAM FLAG...: ends by itself, with one line that has EXPECTED.
refused() {
  local expected=$1 output status=0
  shift
  output=$(timeout 60 "$@" 2>&1 </dev/null) || status=$?
  if [[ $status != [12] || $(wc -l <<<"$output") != 1 || $output != *"$expected"* ]]; then
    echo "wrong_flags_test: ${*##*/}: status $status, wanted \"$expected\":" >&2
    echo "$output" >&2
    failed=1
  fi
}
# files ROLE: the flags of its certificate.
files() { echo --tls_certificate="$tls/$1/tls.crt" --tls_key="$tls/$1/tls.key" --tls_authorities="$tls/$1/ca.crt"; }

readonly store_flags=(--data_dir="$TEST_TMPDIR/store")
readonly worker_flags=(--model="$model")
readonly router_flags=(--workers=127.0.0.1:1 --state_store=127.0.0.1:1)

# Of every process alike.
for kind in store worker router; do
  flags=${kind}_flags[@]
  refused "unexpected argument \"extra\"" "${!kind}" "${!flags}" extra
  refused "Unknown command line flag 'bogus'" "${!kind}" "${!flags}" --bogus=1
  refused "--listen: \"nonsense\" is not HOST:PORT" "${!kind}" "${!flags}" --listen=nonsense
  refused "--metrics_listen: \"127.0.0.1:70000\" is not HOST:PORT" "${!kind}" "${!flags}" --metrics_listen=127.0.0.1:70000
  refused "--health_listen: \":1\" is not HOST:PORT" "${!kind}" "${!flags}" --health_listen=:1
  refused "--drain_timeout: -5s is negative" "${!kind}" "${!flags}" --drain_timeout=-5s
  refused "all three or none" "${!kind}" "${!flags}" --tls_key="$tls/worker/tls.key"
  refused "is of the role client, this process is a $kind" "${!kind}" "${!flags}" $(files client)
done

refused "--data_dir is required" "$store"
refused "is not a directory" "$store" --data_dir="$model"
refused "--when_full=maybe" "$store" "${store_flags[@]}" --when_full=maybe
refused "--orphan_age: 0 is less than a minute" "$store" "${store_flags[@]}" --orphan_age=0
refused "--sweep_interval is negative" "$store" "${store_flags[@]}" --sweep_interval=-1s
refused "--catalog and --records: one without the other" "$store" --catalog=postgres://u@127.0.0.1:1/d
refused "--records wants --s3_endpoint and --s3_credentials_file" "$store" --catalog=postgres://u@127.0.0.1:1/d \
  --records=s3://bucket
refused "/nonexistent" "$store" --catalog=postgres://u@127.0.0.1:1/d --records=s3://bucket \
  --s3_endpoint=http://127.0.0.1:1 --s3_credentials_file=/nonexistent

refused "--model" "$worker"
refused "/nonexistent" "$worker" --model=/nonexistent
refused "--state_store: \"nonsense\" is not HOST:PORT" "$worker" "${worker_flags[@]}" --state_store=nonsense

refused "--workers is required" "$router"
refused "--name is empty" "$router" "${router_flags[@]}" --name=
refused "--max_wait: 0 is not positive" "$router" "${router_flags[@]}" --max_wait=0
refused "--slot_quantum: -1s is not positive" "$router" "${router_flags[@]}" --slot_quantum=-1s
refused "--max_generated_tokens" "$router" "${router_flags[@]}" --max_generated_tokens=0
refused "/nonexistent" "$router" "${router_flags[@]}" --tokenizer=/nonexistent
refused "tenants want TLS" "$router" "${router_flags[@]}" --tenants=/dev/null

exit "$failed"
