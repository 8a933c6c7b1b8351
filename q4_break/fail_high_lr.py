"""Q4, high learning rate: with Adam at 0.1 all ReLUs of a layer are dead within 100 steps; accuracy stays at 10 %.

Expect  chance level with Adam at 0.1; a loss that is not a number with SGD at 1000.
Why     Adam moves each weight by about the learning rate, whatever the gradient. At 0.1 that is ten times the size of
        the large layer's weights: it moves all inputs of the ReLUs below zero, where their gradient is zero. Only the
        last biases still learn, and the loss stays at ln 10. SGD's step grows with the gradient, and the gradient
        with the weights, until the loss overflows.
Fix     BatchNorm, which normalises the inputs of each ReLU: 97.2 % with Adam at 0.1. Gradient clipping, which bounds
        the step: 97.7 % with SGD at 1000.
Run     python q4_break/fail_high_lr.py     a minute on two CPU cores
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common
from q4_break.health import check_claims, dead_share, health_claims, layer_outputs, layer_weights


def make_config(optimizer, lr, batchnorm=False, clip=None):
    """clip: limit on the norm of the gradient; at 1e-4 it moves the weights by at most 0.1 with SGD at 1000; with
    momentum 0.9 such steps add up to at most 1."""
    config = {"epochs": 2, "batch_size": 64, "optimizer": optimizer, "lr": lr, "images": 40_000}
    return {**config, "batchnorm": batchnorm, "clip": clip}


RUNS = {
    "control": make_config("Adam", 0.001),
    "Adam 0.1": make_config("Adam", 0.1),
    "Adam 0.1, BatchNorm": make_config("Adam", 0.1, batchnorm=True),
    "SGD 1000": make_config("SGD", 1000.0),
    "SGD 1000, clipped": make_config("SGD", 1000.0, clip=1e-4),
}
EXPECTED_ALARMS = {"Adam 0.1": "not learning", "SGD 1000": "diverged"}


def add_batchnorm(model):
    """BatchNorm after every layer but the last. It draws no random numbers: the first weights stay the same."""
    layers = []
    for layer in model[:-1]:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
        elif isinstance(layer, nn.Linear):
            layers.append(nn.BatchNorm1d(layer.out_features))
    return nn.Sequential(*layers, model[-1])


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = common.baseline_cnn()
    if config["batchnorm"]:
        model = add_batchnorm(model)
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    if config["optimizer"] == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9, fused=True)
    trace = {}
    watch_steps(model, optimizer, data.train.images[:200], trace)
    if config["clip"]:
        optimizer.register_step_pre_hook(partial(clip_gradients, model, config["clip"]))
    return model, common.fit(model, data, optimizer, config, seed=seed, trace=trace, **settings)


def clip_gradients(model, limit, *_):
    nn.utils.clip_grad_norm_(model.parameters(), limit)


@torch.inference_mode()
def dead_shares(model, images):
    """The share of dead ReLUs in each ReLU layer."""
    outputs, _ = layer_outputs(model, common.normalize(images))
    return [dead_share(output) for _, layer, output in outputs if isinstance(layer, nn.ReLU)]


def watch_steps(model, optimizer, images, trace):
    """Record in `trace`, at every step at first and later at every twentieth, the norm of the gradient, the length of
    the update by the length of the weights, and the share of dead ReLUs."""
    weights = list(layer_weights(model).values())
    before = []
    trace.update({"steps": [0], "step": [], "gradient norm": [], "update / weights": [], "dead ReLUs (%)": []})

    def norm(tensors):
        return torch.stack([t.norm() for t in tensors]).norm().item()

    def before_step(*_):
        trace["steps"][0] += 1
        if trace["steps"][0] <= 20 or trace["steps"][0] % 20 == 0:
            trace["step"].append(trace["steps"][0])
            trace["gradient norm"].append(norm([w.grad for w in weights]))
            before[:] = [w.detach().clone() for w in weights]

    def after_step(*_):
        if before:
            update = [w.detach() - old for w, old in zip(weights, before, strict=True)]
            trace["update / weights"].append(norm(update) / norm(before))
            trace["dead ReLUs (%)"].append(100 * max(dead_shares(model, images)))
            before.clear()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


LIMITS = {  # SGD at 1000 exceeds them, and would flatten the rest
    "loss": (1e-2, 1e3),
    "gradient norm": (1e-4, 1e3),
    "update / weights": (1e-4, 1e3),
    "dead ReLUs (%)": (-3, 103),
}


def plot_steps(results):
    """Loss, gradient, update and dead ReLUs of the first seed's runs, step by step."""
    figure = common.new_figure(12, 8)
    for axes, (name, (low, high)) in zip(figure.subplots(2, 2, sharex=True).flat, LIMITS.items(), strict=True):
        ends = []
        for i, (label, group) in enumerate(results.items()):
            history = group[0].history
            finite = sum(map(math.isfinite, history.step_losses))  # a loss that overflowed stays so
            steps = [step for step in history.trace["step"] if step <= finite]
            losses = [history.step_losses[step - 1] for step in steps]
            values = losses if name == "loss" else history.trace[name][: len(steps)]
            axes.plot(steps, values, color=common.COLORS[i], lw=1.5)
            shown = [point for point in zip(steps, values, strict=True) if low < point[1] < high]
            if shown and name == "loss":
                ends.append((*shown[-1], label, common.COLORS[i]))
        axes.set(xscale="log", yscale="linear" if low < 0 else "log", ylim=(low, high), title=name)
        common.label_ends(axes, ends)
    figure.supxlabel("step")
    return figure


def check_findings(results):
    accuracy = {name: common.test_accuracies(group) for name, group in results.items()}
    dead_by = []
    for result in results["Adam 0.1"]:
        pairs = zip(result.history.trace["step"], result.history.trace["dead ReLUs (%)"], strict=True)
        dead_by.append(next((step for step, dead in pairs if dead > 90), math.inf))
    loss = max(result.history.rows[-1]["train_loss"] for result in results["Adam 0.1"])
    control, stuck = min(accuracy["control"]), max(accuracy["Adam 0.1"])
    batchnorm, clipped = min(accuracy["Adam 0.1, BatchNorm"]), min(accuracy["SGD 1000, clipped"])
    claims = [
        (f"the control reaches {control:.2f} %, over 97", control > 97),
        (f"Adam at 0.1 stays at {stuck:.2f} %, below 12", stuck < 12),
        (f"its loss ends at {loss:.3f}, near ln 10", abs(loss - math.log(10)) < 0.1),
        (f"all ReLUs of a layer are dead by step {max(dead_by)}, at most 100", max(dead_by) <= 100),
        (f"with BatchNorm it reaches {batchnorm:.2f} %, over 95", batchnorm > 95),
        (f"clipped SGD reaches {clipped:.2f} %, over 95", clipped > 95),
    ]
    check_claims(claims + health_claims(EXPECTED_ALARMS, results))


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)

    title = common.summarize(results)
    if len(results) == len(RUNS):
        names = "Adam 0.1", "Adam 0.1, BatchNorm"
        dead, fixed = (common.format_accuracy(common.test_accuracies(results[name])) for name in names)
        title = f"Adam at 0.1 stays at chance level, {dead}; BatchNorm fixes it: {fixed}"
    steps = "Adam at 0.1: all ReLUs of a layer are dead after few steps. SGD at 1000: the loss explodes"
    plots = {"curves": (title, common.plot_curves, results), "steps": (steps, plot_steps, results)}
    common.report(results, args, data, plots, expected_to_diverge=EXPECTED_ALARMS)
    if args.is_default and data.name == "MNIST":
        check_findings(results)


if __name__ == "__main__":
    main()
