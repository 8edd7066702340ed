#!/bin/bash
# Everything that prove.sh needs, for a machine that has a driver, bash and python3 and nothing else:
#
#   tests/gpu/bundle.sh OUT.tar.gz          there: tar xzf OUT.tar.gz && rwkv_proof/tests/gpu/prove.sh OUT_DIR
#
# Programs without debug information, the shared libraries of this machine that they use, and its loader. NCCL is found
# in LD_LIBRARY_PATH or where the loader of that machine finds it.
set -euo pipefail
if [[ $# -ne 1 || $1 == -* ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
programs=(tests/gpu/device_tests tests/gpu/prover/prover tests/bench/{engine_bench,make_model}
  services/{state_store/state_store,router/router,rwkvctl/rwkvctl,worker/worker,worker/testing/emulated_worker})
out=$(realpath "$1")
readonly here programs out
if [[ -x $here/tests/bench/engine_bench ]]; then
  bin=$here
else
  (cd "$here" && bazel build "${programs[@]/#/\/\/}" >&2)
  bin=$(cd "$here" && bazel info bazel-bin 2> /dev/null)
fi
readonly bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
readonly tree=$work/rwkv_proof
mkdir -p "$tree/lib" "$tree/tests/gpu" "$tree/tests/golden"
for program in "${programs[@]}"; do
  mkdir -p "$tree/$(dirname "$program")"
  strip -o "$tree/$program.bin" "$bin/$program"
  ldd "$bin/$program" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | xargs -r cp -nLt "$tree/lib"
  cat > "$tree/$program" << 'WRAPPER'
#!/bin/bash
# The program beside this one, with the libraries and the loader that came with it.
self=$(realpath "${BASH_SOURCE[0]}")
lib=$(dirname "$self")
while [[ ! -e $lib/lib/ld.so ]]; do lib=$(dirname "$lib"); done
lib=$lib/lib
exec "$lib/ld.so" --library-path "$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" --argv0 "$self" "$self.bin" "$@"
WRAPPER
  chmod +x "$tree/$program"
done
cp -L "$(ldd "$bin/tests/bench/make_model" | sed -n 's/^\s*\(\/[^ ]*ld-linux[^ ]*\) .*/\1/p')" "$tree/lib/ld.so"
cp -L "$here"/tests/gpu/{prove.sh,cluster.py,goals.py,bits.txt} "$tree/tests/gpu/"
cp -L "$here"/tests/golden/*.* "$tree/tests/golden/"
chmod -R u+w "$tree"
tar -C "$work" -czf "$out" rwkv_proof
echo "$(($(stat -c %s "$out") / 1000)) kB: $out" >&2
