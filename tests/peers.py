"""The published rules of two other tools, to be judged on the same trainings as our health checks.

AUTOTRAINER: Zhang et al., "AUTOTRAINER: An automatic DNN training problem detection and repair system", ICSE 2021.
UMLAUT: Schoop et al., "UMLAUT: Debugging deep learning programs using program structure and model behavior", CHI 2021.
Thresholds are the published ones. Each function returns the names of the problems that its tool would report.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import normalize
from q4_break.health import layer_outputs, layer_weights


def autotrainer(model, history, probe):
    """Vanishing and exploding gradients, dying ReLUs, oscillating and slow training."""
    rows = history.rows
    accuracies = [row["train_accuracy"] / 100 for row in rows]
    steps = [after - before for before, after in zip(accuracies, accuracies[1:], strict=False)]
    stalled = not steps or max(steps) < 0.01
    problems = {
        "exploding": history.diverged,
        "oscillating": len(steps) > 0 and sum(step <= -0.03 for step in steps) >= 0.2 * len(steps),
        "slow": bool(steps) and max(steps) < 0.01,
    }
    if not history.diverged and (accuracies[-1] < 0.6 or stalled):
        norms, zero = gradients_of(model, probe)
        problems["vanishing"] = norms[0] < 1e-4 and norms[0] < 1e-3 * norms[-1]
        problems["exploding"] = not max(norms) <= 70
        problems["dying ReLU"] = zero >= 0.7 and any(isinstance(layer, nn.ReLU) for layer in model.modules())
    return [name for name, found in problems.items() if found]


def gradients_of(model, probe):
    """The norms of the gradients of the layers' weights, and the share of zeros in all of them."""
    weights = [weight for weight in layer_weights(model).values() if weight.requires_grad]
    _, logits = layer_outputs(model, normalize(probe.images))
    gradients = torch.autograd.grad(F.cross_entropy(logits, probe.labels), weights)
    zeros = torch.cat([gradient.flatten() == 0 for gradient in gradients]).float().mean().item()
    return [gradient.norm().item() for gradient in gradients], zeros


def umlaut(model, history, probe):
    """Rules on input, learning rate, validation, dropout and structure. Its rule that inputs lie in [-1, 1] is omitted:
    it would report every training on images with mean 0 and standard deviation 1."""
    rows, layers = history.rows, list(model.modules())
    losses = [row["val_loss"] for row in rows]
    trainable = nn.Conv2d, nn.Linear
    chain = [layer for layer in layers if not list(layer.children()) and not passes_through(layer)]
    pairs = list(zip(chain, chain[1:], strict=False))
    problems = {
        "NaN in loss": any(not math.isfinite(row["train_loss"]) for row in rows),
        "NaN in input": not normalize(probe.images).isfinite().all(),
        "learning rate out of range": any(not 1e-7 <= row["lr"] <= 0.01 for row in rows),
        "overfitting": any(after > before for before, after in zip(losses, losses[1:], strict=False)),
        "validation accuracy suspiciously high": max(row["val_accuracy"] for row in rows) > 95,
        "dropout too high": any(isinstance(layer, nn.Dropout) and layer.p > 0.5 for layer in layers),
        "missing activation": any(isinstance(a, trainable) and isinstance(b, trainable) for a, b in pairs),
        "doubled activation": any(not isinstance(a, trainable) and not isinstance(b, trainable) for a, b in pairs),
        "activation after the last layer": not isinstance(chain[-1], trainable),
    }
    return [name for name, found in problems.items() if found]


def passes_through(layer):
    """Whether a layer is neither a layer with weights nor an activation function."""
    return isinstance(layer, (nn.Flatten, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)) or (
        "Norm" in type(layer).__name__
    )


PEERS = {"AUTOTRAINER": autotrainer, "UMLAUT": umlaut}
