#!/bin/bash
# Tests of the demo model: shipped files (any Python 3), training (skipped, saying so, where PyTorch is missing).
# PYTHON names another interpreter, for example that of a virtual environment with PyTorch.
set -u
cd "$(dirname "$0")" || exit 1
python="${PYTHON:-/usr/bin/python3}"
failed=0
for name in model_test train_test; do
  echo "== $name"
  if "$python" -B "$name.py"; then echo "passed: $name"; else echo "FAILED: $name"; failed=1; fi
done
exit "$failed"
