"""Q4, no dropout: on 2,000 images the baseline memorises its training set.

Expect  training accuracy 100 % without dropout, and a validation loss 40 to 118 times as high as the training loss. On
        all images training accuracy, evaluated without dropout, is 99.6 % with it and without; dropout gains 0.1
        points of test accuracy. The log's training accuracy is lower, since it is measured with units dropped.
Why     The fully connected layer has 400,000 weights, 200 for each of the 2,000 images: enough to memorise them.
        Dropout removes a random half of the hidden units at each step, so that no small group can memorise an image.
Fix     Augmentation, which never shows the same image twice, gains a point of test accuracy; dropout gains little.
Run     python q4_break/fail_no_dropout.py     a minute on two CPU cores
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common
from q4_break.health import check_claims, health_claims

FEW = {"epochs": 16, "batch_size": 64, "lr": 1e-3, "images": 2_000}  # few enough to be memorised in half a minute
ALL = {"epochs": 5, "batch_size": 64, "lr": 1e-3, "images": None}
RUNS = {
    "no dropout": {**FEW, "dropout": 0.0, "augment": None},
    "dropout 0.5": {**FEW, "dropout": 0.5, "augment": None},
    "no dropout, augmented": {**FEW, "dropout": 0.0, "augment": common.ROTATE_AND_SHIFT},
    "all images, no dropout": {**ALL, "dropout": 0.0, "augment": None},
    "all images, dropout 0.5": {**ALL, "dropout": 0.5, "augment": None},
}
EXPECTED_ALARMS = {"no dropout": "overfitting"}


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = common.baseline_cnn(dropout=config["dropout"])
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    augment = partial(common.random_affine, **config["augment"]) if config["augment"] else None
    return model, common.fit(model, data, optimizer, config, seed=seed, augment=augment, **settings)


def gaps_of(results):
    """Training minus test accuracy of each, in points."""
    return [result.scores["train_accuracy"] - result.scores["test_accuracy"] for result in results]


def gaps_in_words(results):
    return ", ".join(f"{statistics.fmean(gaps_of(group)):.1f} ({name})" for name, group in results.items()) + " points"


def plot_gaps(results):
    """Training and test accuracy of the kept weights, and the gap between them."""
    figure = common.new_figure(9, 4.5)
    axes = figure.subplots()
    place = {"textcoords": "offset points", "ha": "center"}
    for y, group in enumerate(results.values()):
        means = []
        for i, part in enumerate(("train", "test")):
            values = [result.scores[f"{part}_accuracy"] for result in group]
            axes.plot(values, [y] * len(values), common.MARKERS[i], color=common.COLORS[i])
            means.append(statistics.fmean(values))
            if y == 0:
                name = {"train": "training", "test": "test"}[part]
                axes.annotate(name, (values[0], y), (0, 10), color=common.COLORS[i], **place)
        mean, std = common.mean_std(gaps_of(group))
        axes.hlines(y, *sorted(means), color="0.8", zorder=0)
        text = f"{mean:.2f} points" if std is None else f"{mean:.2f} ± {std:.2f} points"
        axes.annotate(text, (statistics.fmean(means), y), (0, -14), **place)
    axes.set(xlabel="accuracy of the kept weights (%)", ylim=(len(results) - 0.4, -0.6))
    axes.set_yticks(range(len(results)), list(results))
    return figure


def loss_ratio(results):
    """The least ratio of validation loss to training loss after the last epoch."""
    last_rows = [result.history.rows[-1] for result in results]
    return min(row["val_loss"] / (row["train_loss"] or 1) for row in last_rows)


def print_losses(results):
    for name, group in results.items():
        losses = [[row["val_loss"] for row in result.history.rows] for result in group]
        epoch = statistics.fmean(line.index(min(line)) + 1 for line in losses)
        rise = statistics.fmean(line[-1] / min(line) for line in losses)
        print(f"{name}: the validation loss is lowest in epoch {epoch:.1f} and ends at {rise:.2f} times that")


def check_findings(results):
    def last(name):
        return [result.history.rows[-1]["train_accuracy"] for result in results[name]]

    ratio = loss_ratio(results["no dropout"])
    memorised = min(last("no dropout"))
    augmented, plain = (
        statistics.fmean(common.test_accuracies(results[name])) for name in ("no dropout, augmented", "no dropout")
    )
    none = min(last("all images, no dropout"))
    half = max(last("all images, dropout 0.5"))
    gap = min(gaps_of(results["all images, no dropout"]))
    claims = [
        (f"it memorises {memorised:.2f} % of its images, over 99.5", memorised > 99.5),
        (f"validation loss is {ratio:.0f} times training loss, over 10", ratio > 10),
        (f"augmentation gains {augmented - plain:.2f} points, over 0.3", augmented - plain > 0.3),
        (f"all images: training accuracy in the log reaches {none:.2f} %, over 99.3", none > 99.3),
        (f"with dropout 0.5, units dropped, {half:.2f} %, below that", half < none),
        (f"without dropout it exceeds test accuracy by {gap:.2f} points, over 0.3", gap > 0.3),
    ]
    check_claims(claims + health_claims(EXPECTED_ALARMS, results))


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)

    plots = {}
    few = {name: group for name, group in results.items() if group[0].config["images"]}
    everything = {name: group for name, group in results.items() if name not in few}
    if few:
        ratios = ", ".join(f"{loss_ratio(group):.1f} ({name})" for name, group in few.items())
        count = min(FEW["images"], len(data.train.labels))
        title = f"{count:,} images: validation loss ends at no less than {ratios} times the training loss"
        plots["curves"] = title, common.plot_curves, few
    if everything:
        title = f"All images: training exceeds test accuracy by {gaps_in_words(everything)}"
        plots["all"] = title, common.plot_curves, everything
    title = f"Training accuracy exceeds test accuracy by {gaps_in_words(few or everything)}"
    plots["gap"] = title, plot_gaps, results
    common.report(results, args, data, plots)
    print_losses(results)
    if args.is_default and data.name == "MNIST":
        check_findings(results)


if __name__ == "__main__":
    main()
