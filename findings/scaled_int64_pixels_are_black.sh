#!/usr/bin/env bash
# Expected: pixels from 0 to 255, whatever their integer type, become floats from 0 to 1 by v2.ToDtype(scale=True).
# Happens: the scale is the greatest value of the type. python-mnist returns lists, of which torch.tensor makes int64:
# white, 255, becomes 2.8e-17, and a network sees blank images. No warning.
# Seen with torchvision 0.29.1, python-mnist 0.7, torch 2.14.1: uint8 1.0, int64 2.8e-17.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy python-mnist==0.7
"$folder/env/bin/python" - <<'EOF'
import struct
import sys
import tempfile
from pathlib import Path

import mnist
import torch
from torchvision.transforms import v2

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 1, 28, 28) + bytes([255]) * 784)
    Path(folder, "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 1) + bytes([7]))
    images, _ = mnist.MNIST(folder).load_training()
scale = v2.ToDtype(torch.float32, scale=True)
pixels = torch.tensor(images).view(1, 28, 28)
values = scale(pixels.to(torch.uint8)).max().item(), scale(pixels).max().item()
print(f"{pixels.dtype}; white is {values[0]} from uint8 and {values[1]:.1e} from int64")
sys.exit(not (values[0] == 1 and values[1] < 1e-6))
EOF
