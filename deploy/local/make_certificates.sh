#!/bin/bash
# Makes an authority and a certificate for each role, for a cluster without cert-manager: trying TLS, or one machine.
#
#   deploy/local/make_certificates.sh DIR [NAME...]
#
#   DIR      gets ROLE/tls.crt, ROLE/tls.key and ROLE/ca.crt for router, worker, state-store, operator and client, and
#            authority/, whose key signs them: keep that one elsewhere. Called again it signs new ones, valid for 90
#            days, by the same authority; processes read them again while they run.
#            And api_key, an API key with the role operator, which rwkvctl shows by --api-key-file, beside api_keys with
#            its hash, for the router's --api_keys. Both stay as they are when called again.
#   NAME...  what clients call the routers, besides localhost, 127.0.0.1, router and routers
#
# For Kubernetes, of each ROLE:
#   kubectl create secret generic ROLE-tls --from-file=DIR/ROLE/tls.crt --from-file=DIR/ROLE/tls.key \
#     --from-file=DIR/ROLE/ca.crt
set -euo pipefail
umask 077
die() {
  echo "make_certificates.sh: $*" >&2
  exit 2
}
case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
  '' | -*) die "wants a folder (see --help)" ;;
esac
readonly directory=$1
shift
names=DNS:localhost,IP:127.0.0.1,DNS:router,DNS:routers
for name in "$@"; do
  [[ $name =~ ^[A-Za-z0-9.*-]+$ ]] || die "'$name' is no name of a host"
  names+=,DNS:$name
done
mkdir -p "$directory/authority"

# new_key FILE
new_key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null ||
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

readonly authority=$directory/authority
if [[ ! -f $authority/tls.crt ]]; then
  new_key "$authority/tls.key"
  openssl req -x509 -new -key "$authority/tls.key" -days 3650 -subj "/CN=rwkv-serving" -sha256 \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$authority/tls.crt"
fi

# issue FOLDER ROLE NAMES: writes beside, then renames, so that a process that reads them finds whole files.
issue() {
  local folder=$directory/$1 new
  mkdir -p "$folder"
  new=$(mktemp -d "$directory/.new.XXXXXX")
  new_key "$new/tls.key"
  openssl req -new -key "$new/tls.key" -subj "/CN=$1" -out "$new/request"
  printf 'subjectAltName=URI:spiffe://rwkv-serving/rwkv/%s%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$2" "$3" \
    >"$new/extensions"
  openssl x509 -req -in "$new/request" -CA "$authority/tls.crt" -CAkey "$authority/tls.key" -days 90 -sha256 \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$new/extensions" -out "$new/tls.crt" 2>/dev/null
  cp "$authority/tls.crt" "$new/ca.crt"
  for file in tls.key tls.crt ca.crt; do mv "$new/$file" "$folder/$file"; done
  rm -rf "$new"
}
issue router router ",$names"
issue worker worker ""
issue state-store store ""
issue operator operator ""
issue client client ""

if [[ ! -f $directory/api_key || ! -f $directory/api_keys ]]; then
  openssl rand -hex 32 >"$directory/.api_key.new"
  hash=$(tr -d '\n' <"$directory/.api_key.new" | sha256sum | cut -d ' ' -f 1)
  echo "sha256:$hash name=operator role=operator" >"$directory/.api_keys.new"
  mv "$directory/.api_keys.new" "$directory/api_keys"
  mv "$directory/.api_key.new" "$directory/api_key"
fi
