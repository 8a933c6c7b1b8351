#!/usr/bin/env bash
# Expected: a convolution that is applied six times has its parameters once.
# Happens: torchsummary adds them at each application: 13,920 instead of 2,320. torchinfo counts them once.
# Seen with torchsummary 1.5.1: 13,920; torchinfo 1.8.0: 2,320; torch 2.14.1.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy torchsummary==1.5.1 torchinfo==1.8.0
"$folder/env/bin/python" - <<'EOF'
import contextlib
import io
import sys

import torchinfo
import torchsummary
from torch import nn


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        for _ in range(6):
            x = self.convolution(x)
        return x


with contextlib.redirect_stdout(io.StringIO()) as printed:
    torchsummary.summary(Shared(), (16, 8, 8), device="cpu")
(line,) = [line for line in printed.getvalue().splitlines() if line.startswith("Total params")]
once = torchinfo.summary(Shared(), (1, 16, 8, 8), verbose=0).total_params
print(f"torchsummary: {line}; torchinfo: {once:,}")
sys.exit("13,920" not in line or once != 2320)
EOF
