"""Health checks: what is wrong with a training that ended, found in its data, losses, updates and network.

`common.fit` calls `check_health` after every training; `fault_gallery.py` shows what each check finds. A split is a
pair of images, uint8 (N, 1, 28, 28), and labels (N,).
"""

import copy
import math
import sys

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm
ALARMS = {  # causes before effects: the first alarm of a training is its diagnosis. And what to look at first
    "identical images": "Look at the images as the network gets them: they are blank, or copies of a few.",
    "wrong labels": "Look at images beside their labels: similar images have different labels.",
    "not shuffled": "Shuffle the training set before each epoch: batches hold one class only.",
    "validation data differ": "Prepare validation images exactly as training images (scale, polarity, orientation).",
    "number of outputs": "Give the last layer one output for each class.",
    "softmax before the loss": "Remove the softmax: the cross-entropy of PyTorch expects logits.",
    "ReLU before the loss": "Remove the activation after the last layer: logits must be able to be negative.",
    "gradients not reset": "Call optimizer.zero_grad() before each backward pass.",
    "initial loss too high": "Scale initial weights and inputs down: the first loss should be near ln 10.",
    "diverged": "Lower the learning rate, or clip the gradients.",
    "learning rate too high": "Lower the learning rate: the weights are far longer than usual, and the loss is high.",
    "initial weights too small": "Scale the initial weights up: training takes long to leave chance level.",
    "symmetric units": "Initialise the layer with random weights: units that start equal stay equal.",
    "dead ReLUs": "Look at biases and learning rate: no image reaches the units of this layer.",
    "saturated activations": "Scale down the weights before tanh or sigmoid: its gradient is nearly zero.",
    "parameters not updated": "Check requires_grad, optimizer.step() and the parameters given to the optimizer.",
    "learning rate too low": "Raise the learning rate: the weights hardly change.",
    "weights decayed": "Lower the weight decay: it shrinks the weights to nearly zero.",
    "exploding gradients": "Lower the learning rate, clip the gradients, or normalise.",
    "vanishing gradients": "Use ReLU, BatchNorm or residual connections: the first layers get almost no gradient.",
    "batch statistics": "Check model.eval() and BatchNorm's momentum: training and evaluation mode disagree.",
    "dropout too strong": "Lower the dropout rate: in training mode the network loses most of its accuracy.",
    "oscillating": "Lower the learning rate: the loss rises again.",
    "constant predictions": "Compare the outputs of two images: the network ignores its input.",
    "not learning": "Train on a single batch: a sound training memorises it.",
    "underfitting": "Train longer, raise the learning rate, or enlarge the network.",
    "overfitting": "Use more images, augmentation or dropout.",
}
PROBE = 500  # training images on which a network is measured
PART = 125  # of them at once, when gradients are computed: activations take memory
KNOWN = 1_000  # other training images, among which their nearest neighbours are sought
WINDOWS = 20  # parts of a training, over which the loss of the steps is averaged


class Recorder:
    """What the checks need to know of a training while it runs; a checkpoint keeps its `state_dict`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.symmetric = symmetric_layers(model)  # before the training
        self.updates = []  # each epoch's: a parameter's length before, after, and the distance between
        self.batch_labels = []  # of an epoch's last batch

    def start_epoch(self):
        self.before = [p.detach().clone() for p in self.model.parameters()]

    def end_epoch(self, batch_labels: Tensor):
        pairs = zip(self.before, self.model.parameters(), strict=True)
        self.updates.append([torch.stack([a.norm(), b.norm(), (b - a).norm()]).tolist() for a, b in pairs])
        self.batch_labels = batch_labels.tolist()

    def state_dict(self) -> dict:
        return {"symmetric": self.symmetric, "updates": self.updates, "batch_labels": self.batch_labels}

    def load_state_dict(self, state: dict):
        vars(self).update(state)


def check_health(model: nn.Module, history, recorder: Recorder, optimizer, train, val, normalize) -> list[str]:
    """The `ALARMS` that a training which just ended sets off, the cause first, with the layers in brackets.

    `history` has the rows of the log, the loss of each step and whether it diverged; `normalize` makes of images what
    the network gets. The loss alone names no cause: at ln 10, chance level, healthy networks begin and dead ones end.
    Thresholds were set on trainings of the calibration networks of the gallery; beside them stand the extremes of
    healthy trainings (the recorded ones and tests/healthy.py) and of faulty ones. That of the initial loss was raised
    after a healthy recorded run.
    """
    classes = 1 + max(labels.max().item() for _, labels in (train, val))
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
    order = order[: PROBE + KNOWN].to(train[1].device)
    images, labels = (tensor[order] for tensor in train)
    found = {
        **check_data((images, labels), val, recorder.batch_labels, classes),
        **check_course(model, history, recorder.updates, classes, optimizer),
    }
    if not history.diverged:
        probe = normalize(images[:PROBE]), labels[:PROBE]
        found.update(check_network(model, history, recorder.symmetric, probe, classes))
    names = [name for name in ALARMS if found.get(name)]
    return [f"{name} ({', '.join(found[name])})" if isinstance(found[name], list) else name for name in names]


def alarm_names(health: list[str]) -> list[str]:
    """Alarms without their layers."""
    return [alarm.partition(" (")[0] for alarm in health]


def check_data(train, val, batch_labels: list[int], classes: int) -> dict:
    """Faults of images and labels, found without the network: how many labels agree with the nearest neighbour's."""
    images, labels = train
    size = min(PROBE, len(labels) // 2)
    pixels = images[size:].flatten(1).float()
    accuracies = []
    for queries, expected in ((images[:size], labels[:size]), (val[0][:PROBE], val[1][:PROBE])):
        nearest = size + torch.cdist(queries.flatten(1).float(), pixels).argmin(1)
        accuracies.append((labels[nearest] == expected).float().mean().item() if size >= 100 else 1)
    return {
        "identical images": 2 * len(pixels.unique(dim=0)) < len(pixels),
        "wrong labels": accuracies[0] < 0.6,  # 0.88; 0.37
        "not shuffled": 5 * len(set(batch_labels)) <= min(classes, len(batch_labels)),
        "validation data differ": accuracies[0] - accuracies[1] > 0.15,  # 0; 0.72
    }


def check_course(model: nn.Module, history, updates: list, classes: int, optimizer) -> dict:
    """Faults that the losses, the gradients' reset and the updates of the parameters show."""
    optimizer.zero_grad()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    losses = torch.tensor(history.step_losses)
    means = torch.stack([losses[0], *(part.mean() for part in losses.tensor_split(WINDOWS) if len(part))])
    names = [name for name, _ in model.named_parameters()]
    updates = torch.tensor(updates)
    start, end, moved = updates[0, :, 0], updates[-1, :, 1], updates[:, :, 2].sum(0)
    shapes = [parameter.shape for parameter in model.parameters()]
    layers = [i for i, shape in enumerate(shapes) if len(shape) > 1 and start[i] > 0]
    # PyTorch's default weights, uniform within 1 / sqrt(inputs) of 0, have the length sqrt(units / 3).
    usual = [math.sqrt(shape[0] / 3) if len(shape) > 1 else 0 for shape in shapes]
    # Weights that start too small grow to about that length, with a learning rate too high they grow far beyond it.
    small = [i for i in layers if start[i] < 0.03 * usual[i]]  # 0.05, Q3's "small normal"; 0.001
    excess = max([end[i] / max(start[i], usual[i]) for i in layers], default=1)
    return {
        "gradients not reset": any(gradient.any() for gradient in gradients),
        "initial loss too high": not losses[0] < 5 * math.log(classes),  # 6.4, with He's weights; 3,000
        "diverged": history.diverged,
        # BatchNorm's weights may grow 100 times in a healthy training, but then the last loss is below 0.5
        "learning rate too high": excess > 6 and means[-1] > 0.5 * math.log(classes),  # 5; 12, and a loss of 1.6
        "initial weights too small": max([end[i] / start[i] for i in small], default=1) > 200,  # 4; 700
        "parameters not updated": [name for name, distance in zip(names, moved, strict=True) if distance == 0],
        "learning rate too low": 0 < max([moved[i] / start[i] for i in layers], default=0) < 0.02,  # 0.56; 0.0005
        "weights decayed": min([end[i] / start[i] for i in layers], default=1) < 0.05,  # 1; 0.0006
        "oscillating": (means - means.cummin(0).values).max() > 0.5,  # 0.28; 0.69
    }


def check_network(model: nn.Module, history, symmetric: list[str], probe, classes: int) -> dict:
    """Faults that the trained network shows on some training images."""
    images, labels = probe
    training = model.training
    stays_in_training = any(layer.training for layer in model.eval().modules())
    sizes = gradient_sizes(model, images, labels)
    model.train(training)
    with torch.no_grad():
        outputs, logits = layer_outputs(model, images, share_at_fault)
    dead = [name for name, layer, share in outputs if isinstance(layer, nn.ReLU) and share > 0.9]
    saturated = [name for name, layer, share in outputs if isinstance(layer, (nn.Tanh, nn.Sigmoid)) and share > 0.8]
    drifts = [drift for _, layer, drift in outputs if isinstance(layer, BatchNorm) and layer.affine]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trained = copy.deepcopy(model).train()(images)  # with dropout
    accuracy, in_training = ((x.argmax(1) == labels).float().mean().item() for x in (logits, trained))
    chance = labels.bincount().max().item() / len(labels)
    last = history.rows[-1]
    gap = last["train_accuracy"] - last["val_accuracy"]
    return {
        "number of outputs": logits.shape[1] != classes,
        "softmax before the loss": logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-3,
        "ReLU before the loss": logits.min() >= 0 and (logits == 0).float().mean() > 0.1,
        "symmetric units": sorted({*symmetric, *symmetric_layers(model)}),
        "dead ReLUs": dead,  # 0.66; 1
        "saturated activations": saturated,  # 0.5; 0.88
        "exploding gradients": not max(sizes) < 1,  # 0.15; 1.35
        "vanishing gradients": min(sizes) <= 5e-3 * max(sizes),  # 0.03; 0.0014
        # a drift of 0.19; 0.65. Better in training mode by 0.03; 0.22
        "batch statistics": stays_in_training or max(drifts, default=0) > 0.4 or in_training - accuracy > 0.1,
        "dropout too strong": accuracy - in_training > 0.25,  # 0.09; 0.42
        "constant predictions": len(logits.argmax(1).unique()) == 1 and chance < 0.9,
        "not learning": last["train_accuracy"] < 200 * chance,
        "underfitting": accuracy < 0.6,  # 0.86
        # 25 times the loss with a gap of 0.7 points, or 3.5 points; 36 times with 3.6, or 28 points
        "overfitting": (last["val_loss"] > 10 * last["train_loss"] and gap > 1) or gap > 10,
    }


def layer_outputs(model: nn.Module, images: Tensor, measure=None):
    """(name, layer, its output, or `measure(layer, output)`) of all layers that contain no others, and the logits; in
    evaluation mode, for `images`, float (N, 1, 28, 28), at once."""
    outputs, hooks = [], []
    for name, layer in model.named_modules():
        if not list(layer.children()):

            def note(layer, _, output, name=name):
                outputs.append((name, layer, measure(layer, output) if measure else output))

            hooks.append(layer.register_forward_hook(note))
    training = model.training
    logits = model.eval()(images)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return outputs, logits


def share_at_fault(layer: nn.Module, output: Tensor) -> float | None:
    """Of a ReLU layer the share of dead units; of tanh and sigmoid that of saturated outputs; of BatchNorm the median
    over channels of |log(standard deviation of its outputs / weight)|: 0 if its running statistics fit the data."""
    if isinstance(layer, nn.ReLU):
        return dead_share(output)
    if isinstance(layer, (nn.Tanh, nn.Sigmoid)):
        symmetric = output if isinstance(layer, nn.Tanh) else 2 * output - 1
        return (symmetric.abs() > 0.95).float().mean().item()
    if isinstance(layer, BatchNorm) and layer.affine:
        return (output.transpose(0, 1).flatten(1).std(1) / layer.weight).abs().log().abs().median().item()


def gradient_sizes(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Root mean square of the gradient of the loss by each layer's weights, but for frozen ones (all frozen: [0.1])."""
    weights = [weight for weight in layer_weights(model).values() if weight.requires_grad]
    if not weights:
        return [0.1]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for part, expected in zip(images.split(PART), labels.split(PART), strict=True):
        loss = nn.functional.cross_entropy(model(part), expected, reduction="sum") / len(labels)
        for gradient, share in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
            gradient += share
    return [gradient.square().mean().sqrt().item() for gradient in gradients]


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the layers by name, a row for each unit, from the first to the last, without biases and
    BatchNorm."""
    return {name: p for name, p in model.named_parameters() if p.dim() > 1 and name.endswith("weight")}


def symmetric_layers(model: nn.Module) -> list[str]:
    """Names of the hidden layers' weights of which less than half of the units (rows) are distinct. Units of the last
    layer may start equal: each class has other labels."""
    hidden = list(layer_weights(model).items())[:-1]
    return [name for name, weight in hidden if 2 * distinct_units(weight) < len(weight)]


def dead_share(output: Tensor) -> float:
    """The share of units (channels) of a ReLU layer's output (N, units, ...) that are 0 for all images."""
    return (output.transpose(0, 1).flatten(1).amax(1) <= 0).float().mean().item()


def distinct_units(weight: Tensor) -> int:
    """How many rows of a layer's weights differ from every row before them by more than a thousandth of the longer
    one's length."""
    rows = weight.detach().flatten(1).double()
    lengths = rows.norm(dim=1)
    same = torch.cdist(rows, rows) <= 1e-3 * torch.maximum(lengths, lengths[:, None])
    return int((~same.tril(-1).any(1)).sum())


# ---- Claims of the scripts of Q4, which fail on purpose --------------------------------------------------------------
def health_claims(expected_alarms: dict[str, str], results: dict) -> list[tuple[str, bool]]:
    """For `check_claims`: the alarm that every run of a name is to set off; all others are to set off none."""
    claims = []
    for name, result in [(name, result) for name, group in results.items() for result in group]:
        expected = expected_alarms.get(name)
        found = alarm_names(result.history.health)
        holds = expected in found if expected else not found
        claims.append((f"{name}, seed {result.seed}: {expected or 'no alarm'}", holds))
    return claims


def check_claims(claims: list[tuple[str, bool]]):
    """Print what a script claims and whether it is so; exit code 1 if something is not."""
    for claim, holds in claims:
        print(f"{'yes' if holds else 'NO':<4}{claim}")
    if not all(holds for _, holds in claims):
        sys.exit("failure not reproduced: see the lines with NO")
    print("failure reproduced")
