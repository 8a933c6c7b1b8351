"""Q4, bad initialisation: all weights zero, or all the same constant.

Expect  zero weights stay at chance, 11 %, and a constant without dropout below 30 %, with
        all 32 filters of the first layer one and the same. With dropout the constant
        learns, to over 90 %, and its filters are still one filter. He's random weights,
        or a little noise on the constant, cure it.
Why     Units that begin alike receive like gradients and stay alike: the network is as
        wide as one unit. From zero not even that one moves, since every gradient is
        multiplied with a zero on its way. Dropout's masks differ from hidden unit to
        hidden unit and so set these apart, but all channels of a convolution feed the
        same hidden units with the same weights: nothing ever tells them apart.
Run     python q4_break/fail_bad_init.py     under three minutes on two CPU cores
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # common.py lives one level up

import common

# At the baseline's rate, 1e-3, the constant's ReLUs die on the way for some of the seeds.
RECIPE = {"epochs": 2, "batch_size": 64, "lr": 5e-4}
IMAGES = 40_000  # of the 55,000, with which the six runs take less than three minutes
CONSTANT = 0.01  # about the deviation of PyTorch's own first weights of the large layer
RUNS = {
    "control": {},  # PyTorch's own initialisation
    "He": {"he": True},
    "zero": {"constant": 0.0},
    "constant": {"constant": CONSTANT},
    "constant, no dropout": {"constant": CONSTANT, "dropout": 0.0},
    "constant + noise, no dropout": {
        "constant": CONSTANT,
        "dropout": 0.0,
        "noise": 1e-2,
    },
}
INTENDED = dict.fromkeys(
    ("zero", "constant", "constant, no dropout"), "symmetric units"
)
NOISES = [1e-5, 1e-4, 3e-4, 1e-3, 1e-2]  # deviations, added to the constant


def build(options, seed, he=False, constant=None, dropout=0.5, noise=0.0):
    """The network with its first weights, and its optimizer."""
    torch.manual_seed(seed)
    model = common.baseline_cnn(dropout=dropout)
    for layer in model if he or constant is not None else ():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)
            if he:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, constant, noise)
    model.to(options.device, memory_format=torch.channels_last)
    return model, torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)


def train(digits, options, label, seed):
    model, optimizer = build(options, seed, **RUNS[label])
    history = common.fit(
        model,
        common.first(digits.train, IMAGES),
        digits.val,
        optimizer,
        epochs=options.epochs,
        batch_size=options.batch_size,
        **common.run_settings(options, label, seed),
    )
    return model, history


def print_symmetry(runs, digits, options):
    """Distinct units of each layer, before and after training, and distinct rows in the
    first gradient of the first layer, for the first seed."""
    images, labels = (tensor[: options.batch_size] for tensor in digits.train)
    for label, seeds in runs.items():
        model, _ = build(options, options.seeds[0], **RUNS[label])
        loss = F.cross_entropy(model(common.normalize(images)), labels)
        gradient = torch.autograd.grad(loss, common.weights_of(model)[0])[0]
        before, after = (
            [common.distinct_units(weight) for weight in common.weights_of(network)]
            for network in (model, seeds[0].model)
        )
        rows = common.distinct_units(gradient)
        print(f"{label}: distinct units by layer {before}, after training {after}")
        print(f"  distinct rows in the first layer's first gradient: {rows} of 32")


def plot_filters(runs, digits, options):
    """The 32 filters of the first layer, before and after training, of the first seed."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    shown = "He", "constant", "constant, no dropout"
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for row, label in zip(panels, shown, strict=True):
        first, _ = build(options, options.seeds[0], **RUNS[label])
        for axes, model, when in zip(
            row, (first, runs[label][0].model), ("before", "after"), strict=True
        ):
            weight = common.weights_of(model)[0].detach().cpu()
            tiles = F.pad(weight, (1, 0, 1, 0), value=math.nan)
            tiles = tiles.view(4, 8, 4, 4).transpose(1, 2).reshape(16, 32)
            limit = weight.abs().max().item() or 1
            axes.imshow(tiles.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
            distinct = common.distinct_units(weight)
            axes.set_title(f"{label}, {when}: {distinct} distinct of 32", fontsize=10)
            axes.axis("off")
    title = "The first layer's filters: a constant stays one filter, with dropout or without"
    common.save_figure(figure, "filters", title, digits, options)


def main(argv=None):
    options = common.parse_options(
        __file__, __doc__, argv, recipe=RECIPE, resumable=False
    )
    digits = common.load_digits(options)
    runs = common.train_all(train, RUNS, digits, options)

    accuracies = common.test_accuracies(runs)
    one, learns = accuracies["constant, no dropout"], accuracies["constant"]
    title = (
        f"One constant for all weights: {max(one):.1f} %; with dropout "
        f"{min(learns):.1f} %, and still one filter; He {min(accuracies['He']):.1f} %"
    )
    common.plot_curves(common.histories_of(runs), title, digits, options)
    plot_filters(runs, digits, options)
    common.report(runs, digits, options)
    print_symmetry(runs, digits, options)

    settings = [
        {"constant": CONSTANT, "dropout": dropout, "noise": noise}
        for dropout in (0.0, 0.5)
        for noise in NOISES
    ]
    rows = common.sweep(build, settings, digits, options)
    lines = {
        f"dropout {dropout}": [row for row in rows if row["dropout"] == dropout]
        for dropout in (0.0, 0.5)
    }
    alone = lines["dropout 0.0"]
    least = min(common.values_that_learn(alone, "noise"), default="none")
    title = f"Least noise with which the constant learns without dropout: {least}"
    name = f"deviation of the noise (one epoch on {common.SWEEP_IMAGES:,} images)"
    common.plot_sweep(lines, "noise", name, title, digits, options)

    zero, chance = accuracies["zero"], math.log(10)
    digits_read = {
        tuple(run.test_logits.argmax(1).unique().tolist()) for run in runs["zero"]
    }
    loss = max(run.history.rows[-1]["train_loss"] for run in runs["zero"])
    start = max(run.history.step_losses[0] for run in runs["control"])
    claims = [
        (
            f"zero reads one digit everywhere, {max(zero):.2f} %",
            all(len(d) == 1 for d in digits_read),
        ),
        (
            f"its loss rests at {loss:.4f}, ln 10 = {chance:.4f}",
            abs(loss - chance) < 0.01,
        ),
        (f"where the control's begins: {start:.4f}", abs(start - chance) < 0.1),
        (f"the constant, no dropout, reads {max(one):.2f} %, below 30", max(one) < 30),
        (f"with dropout it reads {min(learns):.2f} %, over 80", min(learns) > 80),
    ]
    for cure in ("control", "He", "constant + noise, no dropout"):
        least = min(accuracies[cure])
        claims.append((f"{cure} reads {least:.2f} %, over 95", least > 95))
    common.check_claims(claims, INTENDED, runs, digits, options)


if __name__ == "__main__":
    main()
