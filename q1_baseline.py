"""Q1, the baseline: two conv layers with max-pooling, a fully connected layer, dropout 0.5 and an output layer.

Expect  98 % after the first epoch and about 99.2 % at the end; the validation accuracy levels off after some ten
        epochs while the training accuracy goes on rising, and early stopping ends the run.
Why     Two 3x3 convolutions see local strokes, pooling makes them indifferent to small shifts, and dropout keeps the
        wide fully connected layer (95 % of the 421,642 parameters) from learning the training images by heart.
Run     python q1_baseline.py               one run, a minute or two on two CPU cores
        python q1_baseline.py --seeds 5     the recorded results
        python q1_baseline.py --resume      continue after a stop, to the same bits
"""

import torch
from matplotlib.figure import Figure

from common import (
    baseline_cnn,
    count_confusions,
    describe,
    draw_images,
    fit,
    load_digits,
    most_confused,
    parse_options,
)
from common import (
    plot_confusion,
    plot_curves,
    print_layers,
    report,
    save_figure,
    train_all,
)

EPOCHS = 20  # at most: early stopping usually ends the run earlier
PATIENCE = 3  # epochs without a better validation accuracy
BATCH_SIZE = 64
LEARNING_RATE = 1e-3  # Adam's default


def checkpoint_path(options, seed):
    return options.stem.with_name(f"{options.stem.name}_baseline_seed{seed}.pt")


def train(digits, options, seed):
    checkpoint = checkpoint_path(options, seed)
    torch.manual_seed(seed)
    model = baseline_cnn(dropout=0.5).to(
        options.device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    history = fit(
        model,
        digits.train,
        digits.val,
        optimizer,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=seed,
        patience=PATIENCE,
        precision=options.precision,
        checkpoint=checkpoint,
        # Of several seeds, those after the one that was stopped have no checkpoint yet and start afresh.
        resume=options.resume and (checkpoint.exists() or seed == options.seeds[0]),
    )
    return model, history


def plot_samples(path, digits):
    """Ten training images of each class, a row per class."""
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    rows = [
        digits.train.images[digits.train.labels == digit][:10] for digit in range(10)
    ]
    for axes, images in zip(figure.subplots(10, 10), rows, strict=True):
        draw_images(axes, images)
    save_figure(
        path,
        figure,
        "What the network learns from: ten training images of each digit",
        digits.source,
    )


def plot_mistakes(path, logits, test, source, most=40):
    """The wrong predictions of which the model was most confident, the most confident first."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != test.labels).nonzero().flatten()
    shown = wrong[confidence[wrong].argsort(descending=True, stable=True)][:most]
    captions = [
        f"{test.labels[i]} read as {predicted[i]}\n{100 * confidence[i]:.1f} %"
        for i in shown
    ]
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    draw_images(figure.subplots(5, 8).flat, test.images[shown], captions)
    title = f"{len(wrong)} of {len(test.labels):,} test digits are misread; the {len(shown)} most confident mistakes"
    save_figure(path, figure, title, source)


def main(argv=None):
    options = parse_options(
        __file__,
        __doc__,
        argv,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        resumable=True,
    )
    digits = load_digits(options.data_dir, options.data, options.limit, options.device)
    if not options.resume:
        for seed in (
            options.seeds
        ):  # what an older run left must not be resumed later as part of this one
            checkpoint_path(options, seed).unlink(missing_ok=True)
    print_layers(baseline_cnn())
    plot_samples(f"{options.stem}_samples.png", digits)

    runs = train_all({"baseline": train}, digits, options)

    accuracy = describe([run.test.accuracy for run in runs["baseline"]])
    title = (
        f"Baseline CNN: {accuracy} % on the test images"
        + f" ({len(options.seeds)} seeds)" * (len(options.seeds) > 1)
    )
    plot_curves(
        f"{options.stem}_curves.png",
        {"baseline": [run.history for run in runs["baseline"]]},
        title,
        digits.source,
    )
    chosen = max(
        runs["baseline"], key=lambda run: run.val.accuracy
    )  # of several seeds, show the best on validation
    counts = count_confusions(chosen.test_logits, digits.test.labels)
    pairs = ", ".join(
        f"{pair['true']} read as {pair['predicted']} ({pair['count']}x)"
        for pair in most_confused(counts)
    )
    title = f"Most often confused: {pairs.split(', ')[0]}"
    plot_confusion(f"{options.stem}_confusion.png", counts, title, digits.source)
    plot_mistakes(
        f"{options.stem}_mistakes.png", chosen.test_logits, digits.test, digits.source
    )
    print(f"most confused pairs (seed {chosen.seed}): {pairs}\n")
    report(runs, digits, options)


if __name__ == "__main__":
    main()
