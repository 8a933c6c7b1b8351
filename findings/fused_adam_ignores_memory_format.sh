#!/usr/bin/env bash
# Expected: a network may be converted to channels-last memory between two steps: only the order in memory changes.
# Happens: a fused optimizer on a CPU walks through parameter, gradient and moments in the order in which they lie.
# After the conversion the moments still lie in the old order, so each weight gets another weight's momentum: no
# error, and other weights than with the optimizer that is not fused.
# Seen with torch 2.14.1: largest difference to the unfused optimizer: converted before the first step 0, after it
# 0.0274.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy
"$folder/env/bin/python" - <<'EOF'
import sys

import torch
from torch import nn


def train(fused, convert_after):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    images = torch.randn(8, 3, 10, 10)
    for step in range(3):
        if step == convert_after:
            model.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return model.weight.detach().contiguous()


differences = [(train(True, step) - train(False, step)).abs().max().item() for step in (0, 1)]
print(f"torch {torch.__version__}: converted before the first step {differences[0]:.4f}, after it {differences[1]:.4f}")
sys.exit(not differences[0] < 1e-5 < 1e-3 < differences[1])
EOF
