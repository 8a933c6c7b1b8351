#!/usr/bin/env bash
# Expected: the state of a network in channels-last memory can be saved: no tensor has a gap or shares memory.
# Happens: safetensors.torch.save raises "You are trying to save a non contiguous tensor". Its save_model saves the
# same network, and load_model restores it.
# Seen with safetensors 0.8.0, torch 2.14.1: save: ValueError; save_model: equal weights.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy safetensors==0.8.0
"$folder/env/bin/python" - <<'EOF'
import sys
import tempfile

import safetensors
import torch
from safetensors.torch import load_model, save, save_model

model = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
refused = ""
try:
    save(model.state_dict())
except ValueError as error:
    refused = str(error)[:60]
with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    save_model(model, file.name)
    other = torch.nn.Conv2d(2, 4, 3)
    load_model(other, file.name)
equal = torch.equal(model.weight, other.weight)
print(f"safetensors {safetensors.__version__}: save: {refused!r}; save_model: equal weights {equal}")
sys.exit("non contiguous" not in refused or not equal)
EOF
