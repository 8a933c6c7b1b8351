"""Q4, no dropout: the baseline learns its training images by heart.

Expect  on 2,000 training images the network without dropout comes to read them all, with
        a validation loss of more than ten times its training loss; augmentation reads
        more test images. On all images training accuracy passes 99.3 % without dropout
        and stays below that with it.
Why     The fully connected layer has 400,000 weights, 200 for each image: enough to
        recognise every image by its accidents. Dropout takes a random half of the
        hidden units away, so that no few of them can agree on an image; augmentation
        never shows the same image twice.
Run     python q4_break/fail_no_dropout.py     under three minutes on two CPU cores
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # common.py lives one level up

import common

RECIPE = {"batch_size": 64, "lr": 1e-3}  # the baseline's
IMAGES = 2_000  # few enough to be learnt by heart within half a minute
FEW = {"no dropout": 0.0, "dropout 0.5": 0.5, "no dropout, augmented": 0.0}
ALL = {"all images, no dropout": 0.0, "all images, dropout 0.5": 0.5}
EPOCHS = dict.fromkeys(FEW, 16) | dict.fromkeys(ALL, 5)
AUGMENT = partial(common.random_affine, degrees=(10,), shift=2, scale=0.1)
INTENDED = {"no dropout": "overfitting"}


def train(digits, options, label, seed):
    torch.manual_seed(seed)
    model = common.baseline_cnn(dropout=(FEW | ALL)[label])
    model.to(options.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    history = common.fit(
        model,
        digits.train,
        digits.val,
        optimizer,
        epochs=options.epochs or EPOCHS[label],
        batch_size=options.batch_size,
        augment=AUGMENT if "augmented" in label else None,
        **common.run_settings(options, label, seed),
    )
    return model, history


def plot_gaps(runs, digits, options):
    """Training and test accuracy of the kept weights, and the gap between them."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes, means = figure.subplots(), {}
    place = {"textcoords": "offset points", "ha": "center"}
    for y, (label, seeds) in enumerate(runs.items()):
        trains, tests = (
            [run.scores[f"{part}_accuracy"] for run in seeds]
            for part in ("train", "test")
        )
        for values, name, i in ((trains, "training", 0), (tests, "test", 1)):
            look = {"color": common.COLORS[i], "marker": common.MARKERS[i]}
            axes.plot(values, [y] * len(values), ls="", **look)
            if y == 0:
                axes.annotate(
                    name, (values[0], y), (0, 10), color=look["color"], **place
                )
        gaps = [a - b for a, b in zip(trains, tests, strict=True)]
        means[label], std = common.mean_std(gaps)
        spread = "" if std is None else f" ± {std:.2f}"
        left, right = statistics.fmean(tests), statistics.fmean(trains)
        axes.hlines(y, left, right, color="0.8", zorder=0)
        text = f"{means[label]:.2f}{spread} points"
        axes.annotate(text, ((left + right) / 2, y), (0, -14), **place)
    axes.set(xlabel="accuracy of the kept weights (%)", ylim=(len(runs) - 0.4, -0.6))
    axes.set_yticks(range(len(runs)), list(runs))
    axes.spines[["top", "right"]].set_visible(False)
    title = (
        f"Training and test accuracy: a gap of {means['no dropout']:.1f} points on "
        f"{IMAGES:,} images, {means['all images, no dropout']:.1f} on all"
    )
    common.save_figure(figure, "gap", title, digits, options)


def main(argv=None):
    options = common.parse_options(
        __file__, __doc__, argv, recipe=RECIPE, resumable=False
    )
    digits = common.load_digits(options)
    few = digits._replace(train=common.first(digits.train, IMAGES))
    runs = common.train_all(train, FEW, few, options)
    runs |= common.train_all(train, ALL, digits, options)

    histories, accuracies = common.histories_of(runs), common.test_accuracies(runs)
    ends = {label: [h.rows[-1] for h in seeds] for label, seeds in histories.items()}
    times = min(
        row["val_loss"] / (row["train_loss"] or 1) for row in ends["no dropout"]
    )
    title = (
        f"{IMAGES:,} images, no dropout: the validation loss ends at {times:.0f} times "
        "the training loss"
    )
    common.plot_curves({k: histories[k] for k in FEW}, title, digits, options)
    title = "All images: without dropout training accuracy runs away from validation"
    common.plot_curves({k: histories[k] for k in ALL}, title, digits, options, "all")
    plot_gaps(runs, digits, options)
    common.report(runs, digits, options)
    for label, seeds in histories.items():
        losses = [[row["val_loss"] for row in history.rows] for history in seeds]
        least = statistics.fmean(one.index(min(one)) + 1 for one in losses)
        rise = statistics.fmean(one[-1] / min(one) for one in losses)
        print(f"{label}: validation loss is least in epoch {least:.1f}, ", end="")
        print(f"and ends at {rise:.2f} times that")

    learnt = min(row["train_accuracy"] for row in ends["no dropout"])
    none, half = ([row["train_accuracy"] for row in ends[label]] for label in ALL)
    cured = accuracies["no dropout, augmented"]
    gain = statistics.fmean(cured) - statistics.fmean(accuracies["no dropout"])
    claims = [
        (f"it learns {learnt:.2f} % of its images by heart, over 99.5", learnt > 99.5),
        (f"validation loss is {times:.0f} times training loss, over 10", times > 10),
        (f"augmentation gains {gain:.2f} points, over 0.3", gain > 0.3),
        (f"all images: training reads {min(none):.2f} %, over 99.3", min(none) > 99.3),
        (f"with dropout 0.5 {max(half):.2f} %, below that", max(half) < min(none)),
    ]
    common.check_claims(claims, INTENDED, runs, digits, options)


if __name__ == "__main__":
    main()
