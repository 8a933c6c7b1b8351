"""Q4, fault gallery: the health checks name the cause of 31 common faults; no healthy training sets off an alarm.

Expect  a matrix of faults and alarms with its entries on a diagonal: the first alarm of a training names its fault.
Why     Most faults of a training end in the same symptom, chance level or a few points too little, and the loss does
        not tell them apart. The images, the first loss, the gradients, the updates and the units of the trained
        network do. Each fault is trained with two or more networks on 3,000 images, beside the same networks without
        a fault. Thresholds of the checks were set on the baseline and the MLPs; the other networks are held out.
        Without update_bn, averaged weights lose 27 to 36 points of validation accuracy with AdvancedComboCNN and set
        off an alarm; the MLP loses 1 to 4 points, and no check sees it.
Fix     One sentence for each alarm says what to look at first.
Run     python q4_break/fault_gallery.py     two minutes on two CPU cores
        python q4_break/fault_gallery.py --only "weight decay 10, LeNet"
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common
from q4_break.health import ALARMS, alarm_names, check_claims


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
    "baseline": common.baseline_cnn,
    "MLP": mlp,
    "MLP, tanh": partial(mlp, nn.Tanh),
    "MLP, BatchNorm": partial(mlp, batchnorm=True),
    "deep MLP": partial(mlp, sizes=(784, 64, 64, 64, 64, 64, 64)),
}
HELD_OUT = {"AdvancedComboCNN": partial(common.advanced_combo_cnn, dropout=0.1), "LeNet": lenet, "deep CNN": deep_cnn}
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


OPTIMIZER = {  # each changes an Adam optimizer, or SGD with momentum if its name begins so
    "learning rate 1e-7": set_option("lr", 1e-7),
    "learning rate 0": set_option("lr", 0.0),
    "learning rate 0.3": set_option("lr", 0.3),
    "SGD, learning rate 10": set_option("lr", 10.0),
    "zero_grad forgotten": forget("zero_grad"),
    "step forgotten": forget("step"),
    "last layer only": last_layer_only,
    "weight decay 10": set_option("weight_decay", 10.0),
}


def average_weights(model, optimizer, images, steps, fault):
    """After the last of `steps` the network gets its mean weights over all of them. BatchNorm's statistics do not fit
    them, until `update_bn` computes them anew: on `images`, as the network gets them."""
    trace = {"means": [torch.zeros_like(p) for p in model.parameters()]}  # kept in checkpoints

    def average(*_):
        step = int(optimizer.state[next(model.parameters())]["step"])
        for mean, p in zip(trace["means"], model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 / step)
        if step == steps:
            model.load_state_dict(dict(zip(dict(model.named_parameters()), trace["means"], strict=True)), strict=False)
            if fault != FORGOTTEN:
                update_bn([images], model)

    optimizer.register_step_post_hook(average)
    return trace


FORGOTTEN = "averaged, update_bn forgotten"
FEW = "only 60 images"
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
    FEW: (PLAIN, {"overfitting"}),
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
    FORGOTTEN: (NORMALISED, {"batch statistics"}),
    "learning rate 1e-7": (PLAIN, {"learning rate too low"}),
    "learning rate 0": (PLAIN, {"parameters not updated"}),
    "learning rate 0.3": (PLAIN, {"learning rate too high"}),
    "SGD, learning rate 10": (PLAIN, {"learning rate too high", "diverged"}),
    "zero_grad forgotten": (PLAIN, {"gradients not reset"}),
    "step forgotten": (PLAIN, {"parameters not updated"}),
    "last layer only": (PLAIN, {"parameters not updated"}),
    "weight decay 10": (PLAIN, {"weights decayed"}),
}


def make_config(network, fault=None, averaged=False):
    return {
        "network": network,
        "fault": fault,
        "averaged": averaged or fault == FORGOTTEN,
        "epochs": 100 if fault == FEW else 3,
        "batch_size": 64,
        "lr": 1e-3,
        "images": 60 if fault == FEW else 3_000,
    }


RUNS = {
    **{f"no fault, {network}": make_config(network) for network in NETWORKS},
    **{f"no fault, averaged, {network}": make_config(network, averaged=True) for network in NORMALISED},
    **{f"{fault}, {network}": make_config(network, fault) for fault in FAULTS for network in FAULTS[fault][0]},
}


def unchanged(thing):
    return thing


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    fault = config["fault"]
    data = DATA.get(fault, unchanged)(data._replace(val=data.val.head(1_000)))
    model = NETWORKS[config["network"]]()
    NETWORK.get(fault, unchanged)(model)
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    if fault and fault.startswith("SGD"):
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    OPTIMIZER.get(fault, unchanged)(optimizer)
    trace = None
    if config["averaged"]:
        steps = config["epochs"] * data.steps(config["batch_size"])
        trace = average_weights(model, optimizer, common.normalize(data.train.images), steps, fault)
    settings["shuffle"] = fault != "sorted, not shuffled"
    settings["keep_last"] = config["averaged"]  # averages are there after the last step
    return model, common.fit(model, data, optimizer, config, seed=seed, trace=trace, **settings)


# ---- The matrix of faults and alarms ---------------------------------------------------------------------------------
def diagnoses(results, networks):
    """Of the faulty trainings of `networks`: (fault, names of its alarms) of each."""
    faulty = [result for group in results.values() for result in group if result.config["fault"]]
    chosen = [result for result in faulty if result.config["network"] in networks]
    return [(result.config["fault"], alarm_names(result.history.health)) for result in chosen]


def count_diagnoses(results, networks):
    """(trainings, with an alarm, with the right alarm first) of the faulty trainings of `networks`."""
    found = diagnoses(results, networks)
    named = [fault for fault, alarms in found if alarms and alarms[0] in FAULTS[fault][1]]
    return len(found), sum(bool(alarms) for _, alarms in found), len(named)


def plot_matrix(results):
    """Rows: faults; columns: alarms. Shade: the share of a fault's trainings with the alarm; marks: it came first."""
    figure = common.new_figure(14, 11)
    axes = figure.subplots()
    rows = list(dict.fromkeys(group[0].config["fault"] for group in results.values()))
    shades = torch.zeros(len(rows), len(ALARMS))
    for y, fault in enumerate(rows):
        trainings = [result for group in results.values() for result in group if result.config["fault"] == fault]
        health = [alarm_names(result.history.health) for result in trainings]
        for x, alarm in enumerate(ALARMS):
            shades[y, x] = sum(alarm in alarms for alarms in health) / len(trainings)
            if first := sum(alarms[:1] == [alarm] for alarms in health):
                right = fault and alarm in FAULTS[fault][1]
                marker, color = ("o", common.COLORS[0]) if right else ("X", common.COLORS[1])
                axes.plot(x, y, marker, color=color, ms=5 + 7 * first / len(trainings))
        accuracies = common.test_accuracies(trainings)
        axes.text(len(ALARMS) - 0.3, y, f"{min(accuracies):.0f} to {max(accuracies):.0f} %", va="center")
    axes.imshow(shades.numpy(), cmap="Greys", vmax=2, aspect="auto")
    axes.text(len(ALARMS) - 0.3, -1, "test accuracy", va="center")
    shade = "grey: share of the trainings with the alarm, the darkest is all"
    marks = "dot: the first alarm of a training, and right; cross: the first, but wrong; the larger, the more often"
    axes.set_xlabel(f"alarm, causes first. {marks}; {shade}")
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
        for result in results[name]
        for alarm in result.history.health
    ]
    count, flagged, named = count_diagnoses(results, HELD_OUT)
    claims = [
        (f"no false alarm {false or ''}", not false),
        (f"{flagged} of {count} faulty trainings of held-out networks set off an alarm", flagged >= 0.95 * count),
        (f"{named} of {count} set off the right one first", named >= 0.85 * count),
    ]
    check_claims(claims)


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)

    calibration, held_out = count_diagnoses(results, CALIBRATION), count_diagnoses(results, HELD_OUT)
    title = f"The first alarm names the fault in {held_out[2]} of {held_out[0]} trainings of held-out networks"
    plots = {"matrix": (title, plot_matrix, results)}
    common.report(results, args, data, plots, expected_to_diverge=results)
    print_advice(results)
    for name, (count, flagged, named) in (("calibration", calibration), ("held-out", held_out)):
        print(f"{name} networks: {count} faulty trainings, {flagged} with an alarm, {named} with the right one first")
    if args.is_default and data.name == "MNIST":
        check_findings(results)


if __name__ == "__main__":
    main()
