#!/usr/bin/env bash
# Expected: torchmetrics.Accuracy(task="multiclass") and MulticlassAccuracy, the class that it makes, agree.
# Happens: the first counts images (micro average), the second averages the classes' accuracies (macro), each by its
# default. With 90 digits of one class and 10 of another, all predicted as the first, they say 0.9 and 0.5.
# Seen with torchmetrics 1.9.0, torch 2.14.1: micro 0.9, macro 0.5.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchmetrics==1.9.0
"$folder/env/bin/python" - <<'EOF'
import sys

import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy

predicted = torch.zeros(100, dtype=torch.long)
labels = torch.tensor([0] * 90 + [1] * 10)
by_task = torchmetrics.Accuracy(task="multiclass", num_classes=2)
by_class = MulticlassAccuracy(num_classes=2)
values = round(by_task(predicted, labels).item(), 4), round(by_class(predicted, labels).item(), 4)
print(f"torchmetrics {torchmetrics.__version__}: {type(by_task).__name__} by task {values[0]}, by class {values[1]}")
sys.exit(values != (0.9, 0.5))
EOF
