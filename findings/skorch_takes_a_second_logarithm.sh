#!/usr/bin/env bash
# Expected: a network that ends in log-softmax trains with NLLLoss, as PyTorch's documentation of that loss asks.
# Happens: skorch's NeuralNetClassifier has NLLLoss as its default criterion, but takes the logarithm of the network's
# output itself, since it expects probabilities. The logarithm of a negative number is not a number: the loss is nan
# in every epoch, the weights are lost, and no error is raised. With softmax instead the same network learns.
# Seen with skorch 1.4.0, torch 2.14.1: log-softmax: loss nan; softmax: loss falls from 0.85 to 0.59.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 skorch==1.4.0
"$folder/env/bin/python" - <<'EOF'
import math
import sys

import numpy as np
import skorch
import torch
from torch import nn

images = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
labels = (images[:, 0] > 0).astype("int64")
losses = {}
for name, last in {"log-softmax": nn.LogSoftmax(1), "softmax": nn.Softmax(1)}.items():
    torch.manual_seed(0)
    network = skorch.NeuralNetClassifier(nn.Sequential(nn.Linear(4, 2), last), max_epochs=5, lr=0.1, verbose=0)
    network.fit(images, labels)
    losses[name] = [float(row["train_loss"]) for row in network.history]
    print(f"skorch {skorch.__version__}, {name}: {[round(loss, 3) for loss in losses[name]]}")
as_seen = all(map(math.isnan, losses["log-softmax"])) and losses["softmax"][-1] < losses["softmax"][0]
sys.exit(not as_seen)
EOF
