#!/bin/bash
# Stops the local cluster that deploy/local/run.sh started. Its sessions stay and are found by the next start.
#
#   deploy/local/stop.sh [--data-dir DIR]    DIR: as given to run.sh (default: ~/.local/share/rwkv-serving/default)
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/cluster.sh"

data_dir=$default_data_dir
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help)
      print_help
      exit 0
      ;;
    --data-dir)
      [[ $# -ge 2 && -n $2 ]] || usage_error "--data-dir needs a folder"
      data_dir=$2
      shift
      ;;
    --data-dir=?*) data_dir=${1#*=} ;;
    *) usage_error "unknown argument '$1'" ;;
  esac
  shift
done

if [[ ! -d $data_dir ]]; then
  say "no cluster runs in $data_dir"
  exit 0
fi
data_dir=$(cd "$data_dir" && pwd -P)
lock_cluster "$data_dir"
if ! load_cluster "$data_dir"; then
  say "no cluster runs in $data_dir"
  exit 0
fi
# Front to back: the router lets its turns end or saves them, then nobody calls the workers, then the store.
# A process drains for 10 s at most by itself.
for name in $(process_names | tac); do stop_process "$name" 15; done
withdraw_cluster "$data_dir"
mv "$data_dir/cluster.env" "$data_dir/stopped.env"
say "the cluster in $data_dir is stopped; its sessions stay there"
