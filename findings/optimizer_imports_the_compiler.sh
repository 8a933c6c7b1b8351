#!/usr/bin/env bash
# Expected: torch.optim.SGD needs what "import torch" has loaded.
# Happens: making the first optimizer of a process imports torch._dynamo and with it sympy and hundreds of modules,
# although nothing is compiled.
# Seen with torch 2.14.1: the compiler is loaded: after import torch False, after SGD True.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy
"$folder/env/bin/python" - <<'EOF'
import sys
import time

import torch

before = len(sys.modules), "torch._dynamo" in sys.modules
started = time.perf_counter()
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
seconds = time.perf_counter() - started
after = len(sys.modules), "torch._dynamo" in sys.modules
print(f"torch {torch.__version__}: the compiler is loaded: after import torch {before[1]}, after SGD {after[1]}")
print(f"{after[0] - before[0]} more modules in {seconds:.1f} s")
sys.exit((before[1], after[1]) != (False, True))
EOF
