"""Q4, fault gallery: the health checks name the cause of 29 common faults; no healthy training sets off an alarm.

Expect  a matrix of faults and alarms with its entries on a diagonal: the first alarm of a training names its fault.
Why     Most faults of a training end in the same symptom, chance level or a few points too little, and the loss does
        not tell them apart. The images, the first loss, the gradients, the updates and the units of the trained
        network do. Each fault is trained with two or more networks on 3,000 images, beside the same networks without
        a fault. Thresholds of the checks were set on the baseline and the MLPs; the other networks are held out.
Fix     One sentence for each alarm says what to look at first.
Run     python q4_break/fault_gallery.py     two minutes on two CPU cores
        python q4_break/fault_gallery.py --only "weight decay 10, LeNet"
"""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common
from q1_baseline import baseline_cnn
from q2_variants.variant3_advanced_combo import advanced_combo_cnn

BatchNorm = nn.modules.batchnorm._BatchNorm


# ---- Health checks: what is wrong with a training that ended; `common.fit` calls them --------------------------------
ALARMS = {  # causes before effects: the first alarm of a training is its diagnosis. And what to look at first
    "identical images": "Look at the images as the network gets them: they are blank, or copies of a few.",
    "wrong labels": "Look at images beside their labels: similar images have different ones.",
    "not shuffled": "Shuffle the training set before each epoch: batches hold one class only.",
    "validation data differ": "Prepare validation images exactly as training images (scale, polarity, orientation).",
    "number of outputs": "Give the last layer one output for each class.",
    "softmax before the loss": "Remove the softmax: the cross-entropy of PyTorch expects logits.",
    "ReLU before the loss": "Remove the activation after the last layer: logits must be able to be negative.",
    "gradients not reset": "Call optimizer.zero_grad() before each backward pass.",
    "initial loss too high": "Scale initial weights and inputs down: the first loss should be near ln 10.",
    "diverged": "Lower the learning rate, or clip the gradients.",
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


def check_health(
    model: nn.Module, history: common.History, data: common.Dataset, optimizer: torch.optim.Optimizer
) -> list[str]:
    """The `ALARMS` that a training which just ended sets off, the cause first, with the layers in brackets.

    The loss alone names no cause: at ln 10, chance level, healthy networks begin and dead ones end. The thresholds were
    set on trainings of the networks in CALIBRATION; beside them stand the extremes of healthy trainings (the recorded
    ones and tests/healthy.py) and of faulty ones. That of the initial loss was raised after a healthy recorded run.
    """
    classes = 1 + max(split.labels.max().item() for split in (data.train, data.val))
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    order = order[: PROBE + KNOWN].to(data.train.labels.device)
    sample = common.Split(*(tensor[order] for tensor in data.train))
    found = {**check_data(sample, data.val, history, classes), **check_course(model, history, classes, optimizer)}
    if not history.diverged:
        found.update(check_network(model, history, common.first(sample, PROBE), classes))
    names = [name for name in ALARMS if found.get(name)]
    return [f"{name} ({', '.join(found[name])})" if isinstance(found[name], list) else name for name in names]


def check_data(sample: common.Split, val: common.Split, history: common.History, classes: int) -> dict:
    """Faults of images and labels, found without the network: how many labels agree with the nearest neighbour's."""
    size = min(PROBE, len(sample.labels) // 2)
    pixels = sample.images[size:].flatten(1).float()
    accuracies = []
    for split in (common.first(sample, size), common.first(val, PROBE)):
        nearest = size + torch.cdist(split.images.flatten(1).float(), pixels).argmin(1)
        accuracies.append((sample.labels[nearest] == split.labels).float().mean().item() if size >= 100 else 1)
    return {
        "identical images": 2 * len(pixels.unique(dim=0)) < len(pixels),
        "wrong labels": accuracies[0] < 0.6,  # 0.88; 0.37
        "not shuffled": 5 * len(set(history.batch_labels)) <= min(classes, len(history.batch_labels)),
        "validation data differ": accuracies[0] - accuracies[1] > 0.15,  # 0; 0.72
    }


def check_course(model: nn.Module, history: common.History, classes: int, optimizer: torch.optim.Optimizer) -> dict:
    """Faults that the losses, the gradients' reset and the updates of the parameters show."""
    optimizer.zero_grad()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    losses = torch.tensor(history.step_losses)
    means = torch.stack([losses[0], *(part.mean() for part in losses.tensor_split(WINDOWS) if len(part))])
    names = [name for name, _ in model.named_parameters()]
    updates = torch.tensor(history.updates)
    start, end, moved = updates[0, :, 0], updates[-1, :, 1], updates[:, :, 2].sum(0)
    layers = [i for i, parameter in enumerate(model.parameters()) if parameter.dim() > 1 and start[i] > 0]
    return {
        "gradients not reset": any(gradient.any() for gradient in gradients),
        "initial loss too high": not losses[0] < 5 * math.log(classes),  # 6.4, with He's weights; 3,000
        "diverged": history.diverged,
        "initial weights too small": max([end[i] / start[i] for i in layers], default=1) > 200,  # 4; 700
        "parameters not updated": [name for name, distance in zip(names, moved, strict=True) if distance == 0],
        "learning rate too low": 0 < max([moved[i] / start[i] for i in layers], default=0) < 0.02,  # 0.56; 0.0005
        "weights decayed": min([end[i] / start[i] for i in layers], default=1) < 0.05,  # 1; 0.0006
        "oscillating": (means - means.cummin(0).values).max() > 0.5,  # 0.28; 0.69
    }


def check_network(model: nn.Module, history: common.History, probe: common.Split, classes: int) -> dict:
    """Faults that the trained network shows on some training images."""
    training = model.training
    stays_in_training = any(layer.training for layer in model.eval().modules())
    sizes = gradient_sizes(model, probe)
    model.train(training)
    with torch.no_grad():
        outputs, logits = layer_outputs(model, probe.images, share_at_fault)
    dead = [name for name, layer, share in outputs if isinstance(layer, nn.ReLU) and share > 0.9]
    saturated = [name for name, layer, share in outputs if isinstance(layer, (nn.Tanh, nn.Sigmoid)) and share > 0.8]
    drifts = [drift for _, layer, drift in outputs if isinstance(layer, BatchNorm) and layer.affine]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trained = copy.deepcopy(model).train()(common.normalize(probe.images))  # with dropout
    accuracy, in_training = ((x.argmax(1) == probe.labels).float().mean().item() for x in (logits, trained))
    chance = probe.labels.bincount().max().item() / len(probe.labels)
    last = history.rows[-1]
    gap = last["train_accuracy"] - last["val_accuracy"]
    return {
        "number of outputs": logits.shape[1] != classes,
        "softmax before the loss": logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-3,
        "ReLU before the loss": logits.min() >= 0 and (logits == 0).float().mean() > 0.1,
        "symmetric units": sorted({*history.symmetric, *symmetric_layers(model)}),
        "dead ReLUs": dead,  # 0.66; 1
        "saturated activations": saturated,  # 0.5; 0.88
        "exploding gradients": not max(sizes) < 1,  # 0.15; 1.35
        "vanishing gradients": min(sizes) <= 5e-3 * max(sizes),  # 0.03; 0.0014
        "batch statistics": max(drifts, default=0) > 0.4 or stays_in_training,  # 0.19; 0.65
        "dropout too strong": accuracy - in_training > 0.25,  # 0.09; 0.42
        "constant predictions": len(logits.argmax(1).unique()) == 1 and chance < 0.9,
        "not learning": last["train_accuracy"] < 200 * chance,
        "underfitting": accuracy < 0.6,  # 0.86
        # 25 times the loss with a gap of 0.7 points, or 3.5 points; 36 times with 3.6, or 28 points
        "overfitting": (last["val_loss"] > 10 * last["train_loss"] and gap > 1) or gap > 10,
    }


def layer_outputs(model: nn.Module, images: torch.Tensor, measure=lambda layer, output: output):
    """(name, layer, `measure` of its output) of all layers without inner ones, in evaluation mode, and the logits, for
    `images`, uint8 (N, 1, 28, 28), at once."""
    outputs, hooks = [], []
    training = model.training
    for name, layer in model.named_modules():
        if not list(layer.children()):
            note = lambda layer, _, output, name=name: outputs.append((name, layer, measure(layer, output)))
            hooks.append(layer.register_forward_hook(note))
    logits = model.eval()(common.normalize(images))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return outputs, logits


def share_at_fault(layer: nn.Module, output: torch.Tensor) -> float | None:
    """Of a ReLU layer the share of dead units; of tanh and sigmoid that of saturated outputs; of BatchNorm how far the
    standard deviation of its outputs is from `weight`, where it is with the right averages (median of the logarithms).
    """
    if isinstance(layer, nn.ReLU):
        return dead_share(output)
    if isinstance(layer, (nn.Tanh, nn.Sigmoid)):
        symmetric = output if isinstance(layer, nn.Tanh) else 2 * output - 1
        return (symmetric.abs() > 0.95).float().mean().item()
    if isinstance(layer, BatchNorm) and layer.affine:
        return (output.transpose(0, 1).flatten(1).std(1) / layer.weight).abs().log().abs().median().item()


def gradient_sizes(model: nn.Module, probe: common.Split) -> list[float]:
    """Root mean square of the gradient of the loss by each layer's weights, but for frozen ones (all frozen: [0.1])."""
    weights = [weight for weight in layer_weights(model).values() if weight.requires_grad]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for images, labels in zip(probe.images.split(PART), probe.labels.split(PART), strict=True):
        loss = nn.functional.cross_entropy(model(common.normalize(images)), labels, reduction="sum") / len(probe.labels)
        for gradient, part in zip(gradients, torch.autograd.grad(loss, weights) if weights else (), strict=True):
            gradient += part
    return [gradient.square().mean().sqrt().item() for gradient in gradients] or [0.1]


def layer_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the layers by name, a row for each unit, from the first to the last; no biases, nothing of
    BatchNorm's."""
    return {name: p for name, p in model.named_parameters() if p.dim() > 1 and name.endswith("weight")}


def symmetric_layers(model: nn.Module) -> list[str]:
    """Names of the hidden layers' weights of which less than half of the units (rows) are distinct. Units of the last
    layer may start equal: each class has other labels."""
    hidden = list(layer_weights(model).items())[:-1]
    return [name for name, weight in hidden if 2 * distinct_units(weight) < len(weight)]


def dead_share(output: torch.Tensor) -> float:
    """The share of units (channels) of a ReLU layer's output (N, units, ...) that are 0 for all images."""
    return (output.transpose(0, 1).flatten(1).amax(1) <= 0).float().mean().item()


def distinct_units(weight: torch.Tensor) -> int:
    """How many rows of a layer's weights differ from every row before them by more than a thousandth of the longer
    one's length."""
    rows = weight.detach().flatten(1).double()
    lengths = rows.norm(dim=1)
    same = torch.cdist(rows, rows) <= 1e-3 * torch.maximum(lengths, lengths[:, None])
    return int((~same.tril(-1).any(1)).sum())


# ---- Networks: (B, 1, 28, 28) -> logits (B, 10) ----------------------------------------------------------------------
def mlp(activation=nn.ReLU, batchnorm=False, sizes=(784, 128, 64)):
    layers = [nn.Flatten()]
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if batchnorm else []), activation()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(sizes[-1], 10))


def lenet():
    """With tanh and average pooling, after LeCun et al. 1998."""
    return nn.Sequential(
        *[nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)],  # -> (B, 6, 14, 14)
        *[nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()],  # -> (B, 400)
        *[nn.Linear(400, 120), nn.Tanh(), nn.Dropout(0.1), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)],
    )


def deep_cnn(activation=nn.ReLU):
    """Eight layers without normalisation."""
    layers = [nn.Conv2d(1, 16, 3, stride=2, padding=1), activation()]  # -> (B, 16, 14, 14)
    for stride in (1, 2, 1, 2):
        layers += [nn.Conv2d(16, 16, 3, stride=stride, padding=1), activation()]
    layers += [nn.Flatten(), nn.Linear(256, 64), activation(), nn.Dropout(0.1), nn.Linear(64, 32), activation()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


CALIBRATION = {
    "baseline": baseline_cnn,
    "MLP": mlp,
    "MLP, tanh": partial(mlp, nn.Tanh),
    "MLP, BatchNorm": partial(mlp, batchnorm=True),
    "deep MLP": partial(mlp, sizes=(784, 64, 64, 64, 64, 64, 64)),
}
HELD_OUT = {"AdvancedComboCNN": partial(advanced_combo_cnn, dropout=0.1), "LeNet": lenet, "deep CNN": deep_cnn}
NETWORKS = {**CALIBRATION, **HELD_OUT}


# ---- Faults: of the data, of the network, of the optimizer -----------------------------------------------------------
def change(part, data, images=None, labels=None):
    """The data set with images and labels of a part, "train" or "val", passed through these functions."""
    split = getattr(data, part)
    images = images(split.images) if images else split.images
    labels = labels(split.labels) if labels else split.labels
    return data._replace(**{part: common.Split(images, labels)})


def sort_by_label(data):
    order = data.train.labels.argsort(stable=True)
    return change("train", data, lambda images: images[order], lambda labels: labels[order])


def wrong_labels(labels, share):
    wrong = torch.rand(len(labels)) < share
    return torch.where(wrong, torch.randint_like(labels, 10), labels)


DATA = {  # each gets and returns the data set
    "labels shuffled": partial(change, "train", labels=lambda labels: labels[torch.randperm(len(labels))]),
    "40 % wrong labels": partial(change, "train", labels=partial(wrong_labels, share=0.4)),
    "blank images": partial(change, "train", images=torch.zeros_like),
    "one image for all": partial(change, "train", images=lambda images: images[:1].expand_as(images)),
    "validation inverted": partial(change, "val", images=lambda images: 255 - images),
    "validation scaled twice": partial(change, "val", images=lambda images: images // 255),
    "validation transposed": partial(change, "val", images=lambda images: images.transpose(2, 3)),
    "sorted, not shuffled": sort_by_label,
    "only 60 images": lambda data: data._replace(train=common.first(data.train, 60)),
}


def layers_of(model):
    return [layer for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]


def scale_weights(model, factor, layers=slice(None)):
    for layer in layers_of(model)[layers]:
        layer.weight.data *= factor


def set_dropout(model, p):
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = p


def keep_first_averages(model):
    for layer in model:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.momentum = 0.0


def stay_in_training_mode(model):
    model.eval = lambda: model


def replace_activations(model, activation):
    for i, layer in enumerate(model):
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.Tanh)):
            model[i] = activation()


NETWORK = {  # each changes a network
    "softmax before the loss": lambda model: model.append(nn.Softmax(1)),
    "ReLU before the loss": lambda model: model.append(nn.ReLU()),
    "100 outputs": lambda model: model.append(nn.Linear(10, 100)),
    "weights 30x too large": partial(scale_weights, factor=30.0),
    "weights 1000x too small": partial(scale_weights, factor=1e-3),
    "second layer constant": lambda model: nn.init.constant_(layers_of(model)[1].weight, 0.01),
    "first biases -100": lambda model: nn.init.constant_(layers_of(model)[0].bias, -100.0),
    "hidden weights 20x": lambda model: scale_weights(model, 20.0, slice(0, -1)),
    "sigmoid activations": lambda model: replace_activations(model, nn.Sigmoid),
    "dropout 0.97": partial(set_dropout, p=0.97),
    "first layer frozen": lambda model: layers_of(model)[0].requires_grad_(False),
    "averages not updated": keep_first_averages,
    "never in evaluation mode": stay_in_training_mode,
}


def forget(method):
    return lambda optimizer: setattr(optimizer, method, lambda *_, **__: None)


def last_layer_only(optimizer):
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][-2:]


def set_option(name, value):
    return lambda optimizer: optimizer.param_groups[0].update({name: value})


OPTIMIZER = {  # each changes an Adam optimizer
    "learning rate 1e-7": set_option("lr", 1e-7),
    "learning rate 0": set_option("lr", 0.0),
    "learning rate 0.3": set_option("lr", 0.3),
    "zero_grad forgotten": forget("zero_grad"),
    "step forgotten": forget("step"),
    "last layer only": last_layer_only,
    "weight decay 10": set_option("weight_decay", 10.0),
}
PLAIN = "baseline", "MLP", "LeNet", "deep CNN"
TANH = "MLP, tanh", "LeNet"
NORMALISED = "MLP, BatchNorm", "AdvancedComboCNN"
FAULTS = {  # its networks, and the alarms that name it
    "labels shuffled": (PLAIN, {"wrong labels"}),
    "40 % wrong labels": (PLAIN, {"wrong labels"}),
    "blank images": (PLAIN, {"identical images"}),
    "one image for all": (PLAIN, {"identical images"}),
    "validation inverted": (PLAIN, {"validation data differ"}),
    "validation scaled twice": (PLAIN, {"validation data differ"}),
    "validation transposed": (PLAIN, {"validation data differ"}),
    "sorted, not shuffled": (PLAIN, {"not shuffled"}),
    "only 60 images": (PLAIN, {"overfitting"}),
    "softmax before the loss": (PLAIN, {"softmax before the loss"}),
    "ReLU before the loss": (PLAIN, {"ReLU before the loss"}),
    "100 outputs": (PLAIN, {"number of outputs"}),
    "weights 30x too large": (PLAIN, {"initial loss too high", "saturated activations"}),
    "weights 1000x too small": (PLAIN, {"initial weights too small"}),
    "second layer constant": (PLAIN, {"symmetric units"}),
    "first biases -100": (("baseline", "MLP", "deep CNN"), {"dead ReLUs"}),
    "hidden weights 20x": (TANH, {"saturated activations"}),
    "sigmoid activations": (("deep MLP", "deep CNN"), {"vanishing gradients"}),
    "dropout 0.97": (PLAIN, {"dropout too strong"}),
    "first layer frozen": (PLAIN, {"parameters not updated"}),
    "averages not updated": (NORMALISED, {"batch statistics"}),
    "never in evaluation mode": (NORMALISED, {"batch statistics"}),
    "learning rate 1e-7": (PLAIN, {"learning rate too low"}),
    "learning rate 0": (PLAIN, {"parameters not updated"}),
    "learning rate 0.3": (PLAIN, {"oscillating", "dead ReLUs", "saturated activations", "diverged"}),
    "zero_grad forgotten": (PLAIN, {"gradients not reset"}),
    "step forgotten": (PLAIN, {"parameters not updated"}),
    "last layer only": (PLAIN, {"parameters not updated"}),
    "weight decay 10": (PLAIN, {"weights decayed"}),
}


def config_of(network, fault=None):
    return {
        "network": network,
        "fault": fault,
        "epochs": 100 if fault == "only 60 images" else 3,
        "batch_size": 64,
        "lr": 1e-3,
        "images": 3_000,
    }


RUNS = {
    **{f"no fault, {network}": config_of(network) for network in NETWORKS},
    **{f"{fault}, {network}": config_of(network, fault) for fault in FAULTS for network in FAULTS[fault][0]},
}


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    fault = config["fault"]
    unchanged = lambda thing: thing
    data = DATA.get(fault, unchanged)(data._replace(val=common.first(data.val, 1_000)))
    model = NETWORKS[config["network"]]()
    NETWORK.get(fault, unchanged)(model)
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    OPTIMIZER.get(fault, unchanged)(optimizer)
    return model, common.fit(
        model,
        data,
        optimizer,
        epochs=config["epochs"],
        batch_size=config["batch_size"],
        seed=seed,
        shuffle=fault != "sorted, not shuffled",
        **settings,
    )


# ---- The matrix of faults and alarms ---------------------------------------------------------------------------------
def diagnoses(results, networks):
    """Of the faulty trainings of `networks`: (fault, names of its alarms) of each."""
    seeds = [seed for group in results.values() for seed in group if seed.config["network"] in networks]
    return [(seed.config["fault"], common.alarm_names(seed.history.health)) for seed in seeds if seed.config["fault"]]


def count_diagnoses(results, networks):
    """(trainings, with an alarm, with the right alarm first) of the faulty trainings of `networks`."""
    found = diagnoses(results, networks)
    named = [fault for fault, alarms in found if alarms and alarms[0] in FAULTS[fault][1]]
    return len(found), sum(bool(alarms) for _, alarms in found), len(named)


def plot_matrix(results):
    """Rows: faults; columns: alarms. Shade: the share of a fault's trainings with the alarm; marks: it came first."""
    figure = common.new_figure(14, 11)
    axes = figure.subplots()
    rows = list(dict.fromkeys(seeds[0].config["fault"] for seeds in results.values()))
    shades = torch.zeros(len(rows), len(ALARMS))
    for y, fault in enumerate(rows):
        seeds = [seed for group in results.values() if group[0].config["fault"] == fault for seed in group]
        health = [common.alarm_names(seed.history.health) for seed in seeds]
        for x, alarm in enumerate(ALARMS):
            shades[y, x] = sum(alarm in alarms for alarms in health) / len(seeds)
            if first := sum(alarms[:1] == [alarm] for alarms in health):
                right = fault and alarm in FAULTS[fault][1]
                axes.plot(
                    x, y, "o" if right else "X", color=common.COLORS[0 if right else 1], ms=5 + 7 * first / len(seeds)
                )
        accuracies = common.test_accuracies(seeds)
        axes.text(len(ALARMS) - 0.3, y, f"{min(accuracies):.0f} to {max(accuracies):.0f} %", va="center")
    axes.imshow(shades.numpy(), cmap="Greys", vmax=2, aspect="auto")
    axes.text(len(ALARMS) - 0.3, -1, "test accuracy", va="center")
    axes.set_xlabel("alarm, causes first; dot: the first alarm of a training, and right; cross: the first, but wrong")
    axes.set_xticks(range(len(ALARMS)), ALARMS, rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), [fault or "no fault" for fault in rows])
    return figure


def print_advice(results):
    """What to look at first, for each first alarm."""
    seen = {alarms[0] for _, alarms in diagnoses(results, NETWORKS) if alarms}
    for alarm in ALARMS:
        if alarm in seen:
            print(f"{alarm}: {ALARMS[alarm]}")


def check_findings(results):
    false = [
        f"{name}: {alarm}"
        for name in results
        if name.startswith("no fault")
        for seed in results[name]
        for alarm in seed.history.health
    ]
    count, flagged, named = count_diagnoses(results, HELD_OUT)
    claims = [
        (f"no false alarm {false or ''}", not false),
        (f"{flagged} of {count} faulty trainings of held-out networks set off an alarm", flagged >= 0.95 * count),
        (f"{named} of {count} set off the right one first", named >= 0.85 * count),
    ]
    common.check_claims(claims)


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)

    calibration, held_out = count_diagnoses(results, CALIBRATION), count_diagnoses(results, HELD_OUT)
    title = f"The first alarm names the fault in {held_out[2]} of {held_out[0]} trainings of held-out networks"
    common.save_figure(f"{args.stem}_matrix.png", plot_matrix(results), title, data.name)
    common.report(results, args, data, expected_to_diverge=results)
    print_advice(results)
    for name, (count, flagged, named) in (("calibration", calibration), ("held-out", held_out)):
        print(f"{name} networks: {count} faulty trainings, {flagged} with an alarm, {named} with the right one first")
    if args.unchanged and data.name == "MNIST":
        check_findings(results)


if __name__ == "__main__":
    main()
