"""Q4, high learning rate: Adam at 0.1 instead of 0.001, and SGD at 1000.

Expect  Adam at 0.1 dies in its first steps and stays at chance, 11 %, for good; SGD at
        1000 ends in a loss that is not a number. BatchNorm lets Adam live with the same
        0.1, clipping lets SGD live with the same 1000.
Why     Adam's step is as long as its rate, whatever the gradient. A hundred times the
        weights' own size, it throws every ReLU to the side where its gradient is zero:
        nothing can move any more but the last biases, and the loss rests at ln 10. SGD's
        step grows with the gradient, and the gradient with the step before. BatchNorm
        undoes the size of the weights before every ReLU; clipping bounds the step.
Run     python q4_break/fail_high_lr.py     under three minutes on two CPU cores
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # common.py lives one level up

import common

RECIPE = {"epochs": 2, "batch_size": 64}  # the control passes 98 % in two epochs
RUNS = {
    "control": {"optimizer": "Adam", "lr": 0.001},
    "Adam 0.1": {"optimizer": "Adam", "lr": 0.1},
    "Adam 0.1, BatchNorm": {"optimizer": "Adam", "lr": 0.1, "batchnorm": True},
    "SGD 1000": {"optimizer": "SGD", "lr": 1000.0},
    "SGD 1000, clipped": {"optimizer": "SGD", "lr": 1000.0},
}
CLIP = 1e-4  # on the norm of the gradient: a step of SGD is no longer than 0.1
INTENDED = {"Adam 0.1": "not learning", "SGD 1000": "diverged"}
SWEEP = [  # optimizer, with BatchNorm or without, rates
    ("Adam", False, [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    ("Adam", True, [1e-3, 1e-2, 1e-1, 1e0]),
    ("SGD", False, [1e-3, 1e-2, 1e-1, 3e-1, 1e0, 1e1]),
]


def build(options, seed, optimizer, lr, batchnorm=False):
    """The network with its first weights, and its optimizer."""
    torch.manual_seed(seed)  # BatchNorm draws no numbers: all share the first weights
    model = common.baseline_cnn()
    if batchnorm:
        layers = []
        for layer in model:
            layers.append(layer)
            if isinstance(layer, nn.Conv2d):
                layers.append(nn.BatchNorm2d(layer.out_channels))
            elif isinstance(layer, nn.Linear) and layer.out_features > 10:
                layers.append(nn.BatchNorm1d(layer.out_features))
        model = nn.Sequential(*layers)
    model.to(options.device, memory_format=torch.channels_last)
    if optimizer == "Adam":
        return model, torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)


def watch(model, optimizer, images):
    """What happens inside during the training, at every step at first, later at every
    twentieth: lists by name, which fill as `optimizer` steps."""
    names = "step", "gradient norm", "update / weights", "dead ReLUs (%)"
    trace, weights, before = {name: [] for name in names}, common.weights_of(model), []
    count = 0

    def norm(tensors):
        return torch.stack([t.norm() for t in tensors]).norm().item()

    def note_gradient(*_):
        nonlocal count
        count += 1
        if count <= 20 or count % 20 == 0:
            trace["step"].append(count)
            trace["gradient norm"].append(norm([w.grad for w in weights]))
            before[:] = [w.detach().clone() for w in weights]

    def note_update(*_):
        if before:
            moves = [w.detach() - old for w, old in zip(weights, before, strict=True)]
            trace["update / weights"].append(norm(moves) / norm(before))
            dead = max(common.dead_relus(model, images))
            trace["dead ReLUs (%)"].append(100 * dead)
            before.clear()

    optimizer.register_step_pre_hook(note_gradient)
    optimizer.register_step_post_hook(note_update)
    return trace


def train(traces, digits, options, label, seed):
    recipe = RUNS[label] | ({"lr": options.lr} if options.lr else {})
    model, optimizer = build(options, seed, **recipe)
    traces[label, seed] = watch(model, optimizer, digits.train.images[:200])
    if "clipped" in label:

        def clip(*_):
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)

        optimizer.register_step_pre_hook(clip)
    history = common.fit(
        model,
        digits.train,
        digits.val,
        optimizer,
        epochs=options.epochs,
        batch_size=options.batch_size,
        **common.run_settings(options, label, seed),
    )
    return model, history


LIMITS = {  # what goes beyond, SGD's way to infinity, would flatten the rest
    "loss": (1e-2, 1e3),
    "gradient norm": (1e-4, 1e3),
    "update / weights": (1e-4, 1e3),
    "dead ReLUs (%)": (-3, 103),
}


def plot_steps(traces, runs, digits, options):
    """The inside of the first seed's runs, step by step."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = zip(figure.subplots(2, 2, sharex=True).flat, LIMITS, strict=True)
    for axes, name in panels:
        ends = []
        for i, (label, seeds) in enumerate(runs.items()):
            trace = traces[label, options.seeds[0]]
            losses = seeds[0].history.step_losses
            steps = [step for step in trace["step"] if step <= len(losses)]
            trace = trace | {"loss": [losses[step - 1] for step in steps]}
            values = trace[name][: len(steps)]
            axes.plot(steps, values, color=common.COLORS[i], lw=1.5)
            low, high = LIMITS[name]
            shown = [
                (x, y) for x, y in zip(steps, values, strict=True) if low < y < high
            ]
            if shown and name == "loss":
                ends.append((*shown[-1], label, common.COLORS[i]))
        scale = "linear" if name == "dead ReLUs (%)" else "log"
        axes.set(xscale="log", yscale=scale, ylim=LIMITS[name], title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        common.label_ends(axes, ends)
    figure.supxlabel("step")
    title = "Adam at 0.1 kills the ReLUs in its first steps; SGD at 1000 explodes"
    common.save_figure(figure, "steps", title, digits, options)


def main(argv=None):
    options = common.parse_options(
        __file__, __doc__, argv, recipe=RECIPE, resumable=False
    )
    digits = common.load_digits(options)
    traces = {}
    runs = common.train_all(partial(train, traces), RUNS, digits, options)

    accuracies = common.test_accuracies(runs)
    stuck, saved = accuracies["Adam 0.1"], accuracies["Adam 0.1, BatchNorm"]
    control, clipped = accuracies["control"], accuracies["SGD 1000, clipped"]
    title = (
        f"Adam at 0.1 guesses, {max(stuck):.1f} %, and SGD at 1000 diverges; BatchNorm "
        f"saves the one, {min(saved):.1f} %, clipping the other, {min(clipped):.1f} %"
    )
    common.plot_curves(common.histories_of(runs), title, digits, options)
    plot_steps(traces, runs, digits, options)
    common.report(runs, digits, options, broken=INTENDED)

    settings = [
        {"optimizer": optimizer, "batchnorm": batchnorm, "lr": lr}
        for optimizer, batchnorm, rates in SWEEP
        for lr in rates
    ]
    lines = {}
    for row in common.sweep(build, settings, digits, options):
        name = row["optimizer"] + ", BatchNorm" * row["batchnorm"]
        lines.setdefault(name, []).append(row)
    highest = {
        name: max(common.values_that_learn(rows, "lr"), default="none")
        for name, rows in lines.items()
    }
    highest = "; ".join(f"{name} {rate}" for name, rate in highest.items())
    title = f"Highest rate that learns: {highest}"
    name = f"learning rate (one epoch on {common.SWEEP_IMAGES:,} images)"
    common.plot_sweep(lines, "lr", name, title, digits, options)

    dead_after = []
    for seed in options.seeds:
        trace = traces["Adam 0.1", seed]
        pairs = zip(trace["step"], trace["dead ReLUs (%)"], strict=True)
        dead_after.append(next((step for step, dead in pairs if dead > 90), math.inf))
    loss = max(run.history.rows[-1]["train_loss"] for run in runs["Adam 0.1"])
    claims = [
        (f"the control reads {min(control):.2f} %, over 97", min(control) > 97),
        (f"Adam at 0.1 reads {max(stuck):.2f} %, below 12", max(stuck) < 12),
        (f"its loss ends at {loss:.3f}, near ln 10", abs(loss - math.log(10)) < 0.1),
        (f"its ReLUs are dead by step {max(dead_after)}", max(dead_after) <= 100),
        (f"BatchNorm at 0.1 reads {min(saved):.2f} %, over 95", min(saved) > 95),
        (f"clipped SGD reads {min(clipped):.2f} %, over 95", min(clipped) > 95),
    ]
    common.check_claims(claims, INTENDED, runs, digits, options)


if __name__ == "__main__":
    main()
