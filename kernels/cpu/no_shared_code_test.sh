#!/bin/bash
# Reads what nm says of the objects of every instruction set; fails if one defines code that other objects could be linked
# to, which is what weak and global functions are. (Weak data, as ubsan adds it, is the same in every build.)
set -euo pipefail
symbols=$(<"$1")
for name in kPortableKernels kAvx2Kernels kAvx512Kernels; do
  if ! grep -q "::$name\$" <<<"$symbols"; then
    echo "$name is not among the symbols: are these the right files?" >&2
    exit 1
  fi
done
if shared=$(grep -E '^[0-9a-f]+ [TWi] ' <<<"$symbols"); then
  printf 'code that is not its own:\n%s\n' "$shared" >&2
  exit 1
fi
