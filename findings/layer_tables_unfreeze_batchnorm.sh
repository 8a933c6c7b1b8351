#!/usr/bin/env bash
# Expected: tools that print a table of layers or count operations leave the network as it was.
# Happens: torchinfo and thop put every layer into the mode of the whole network. BatchNorm that was frozen by eval(),
# as in fine-tuning, is in training mode after the table was printed, and goes on changing its statistics. thop also
# leaves buffers, total_ops and total_params, which then stand in every saved state. torchinfo moves the random state.
# Seen with torchinfo 1.8.0, thop 0.1.1.post2209072238, torch 2.14.1: BatchNorm in training mode True of both.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy torchinfo==1.8.0 thop==0.1.1.post2209072238
"$folder/env/bin/python" - <<'EOF'
import sys

import thop
import torch
import torchinfo
from torch import nn

SIZE = 1, 28, 28
TOOLS = {
    "torchinfo": lambda model: torchinfo.summary(model, (2, *SIZE), verbose=0),
    "thop": lambda model: thop.profile(model, (torch.zeros(2, *SIZE),), verbose=False),
}
as_seen = True
for name, look in TOOLS.items():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(2704, 10))
    model[1].eval()
    keys = set(model.state_dict())
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    look(model)
    moved = not torch.equal(torch.random.get_rng_state(), state)
    new = sorted(set(model.state_dict()) - keys)
    print(f"{name}: BatchNorm in training mode {model[1].training}, random state moved {moved}, new in the state {new}")
    as_seen = as_seen and model[1].training
sys.exit(not as_seen)
EOF
