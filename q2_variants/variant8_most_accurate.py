"""Q2, variant 8: five networks reach 99.69 % test accuracy on average, and 99.76 % as an ensemble.

Expect  the above, after 14 minutes of training on one core for each network. Published was a mean of 99.64 % of 1,500
        networks of this kind. Fifteen test digits are misclassified by all five.
Why     Two convolutions of 3x3 see as much as one of 5x5, with fewer parameters and one more nonlinearity; a strided
        convolution learns how to reduce the image, where max-pooling is fixed. Rotated, scaled and shifted images, of
        which no two epochs show the same, keep 326,122 parameters from overfitting. Networks that differ in their seed
        err on different digits: the mean of their predictions is better than any of them but one.
Tried   one seed, judged by validation loss and accuracy; the first three with ReLU, dropout 0.3, learning rate 0.002:
          elastic deformations, 1 pixel (14 epochs)             0.0126  99.56 %, without them 0.0100  99.76 %
          rotation 15, shift 2.5, scale and shear (24 epochs)   0.0105  99.66 %, as here      0.0094  99.70 %
          48 and 96 channels in the same time (15 epochs)       0.0098  99.72 %, 32 and 64    0.0094  99.70 %
          SiLU, dropout 0.4, learning rate 0.003 (24 epochs)    0.0093  99.72 %, which is used here
        Five seeds, 24 epochs, each image classified as such and as the mean over variant 7's nine views: 99.68 and
        99.70 % in validation, 99.67 ± 0.03 % in test with the views, 99.76 % together: no gain, so not used. Missed:
        99.72 % for one network, 99.80 % for five.
Run     python q2_variants/variant8_most_accurate.py               one network: nine minutes on two CPU cores
        python q2_variants/variant8_most_accurate.py --seeds 5     as recorded, with the ensemble: 45 minutes
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common

RUNS = {"strided CNN": {"epochs": 30, "batch_size": 128, "lr": 3e-3}}


def block(channels_in, channels_out, kernel=3, **settings):
    convolution = nn.Conv2d(channels_in, channels_out, kernel, bias=False, **settings)
    return convolution, nn.BatchNorm2d(channels_out), nn.SiLU()


def strided_cnn():
    """(B, 1, 28, 28) -> logits (B, 10), with 326,122 parameters.

    After Chris Deotte 2018 (kaggle.com/code/cdeotte/25-million-images-0-99757-mnist); there ReLU comes before each
    normalisation, here SiLU after it.
    """
    return nn.Sequential(
        *block(1, 32),  # -> (B, 32, 26, 26)
        *block(32, 32),  # -> (B, 32, 24, 24)
        *block(32, 32, 5, stride=2, padding=2),  # -> (B, 32, 12, 12)
        nn.Dropout(0.4),
        *block(32, 64),  # -> (B, 64, 10, 10)
        *block(64, 64),  # -> (B, 64, 8, 8)
        *block(64, 64, 5, stride=2, padding=2),  # -> (B, 64, 4, 4)
        nn.Dropout(0.4),
        *[nn.Flatten(), nn.Linear(1024, 128), nn.BatchNorm1d(128), nn.SiLU(), nn.Dropout(0.4)],
        nn.Linear(128, 10),
    )


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = strided_cnn().to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], fused=True)
    steps = max(6, config["epochs"] * data.steps(config["batch_size"]))  # with five OneCycleLR divides by zero
    return model, common.fit(
        model,
        data,
        optimizer,
        config,
        seed=seed,
        scheduler=OneCycleLR(optimizer, config["lr"], total_steps=steps, pct_start=0.2),
        augment=partial(common.random_affine, **common.ROTATE_AND_SHIFT),
        keep_last=True,  # the late epochs differ by less than the noise of 5,000 images
        **settings,
    )


def list_errors(results, labels):
    """A row for each test image that the ensemble, or any network, misclassifies. The ensemble averages the networks'
    log-probabilities."""
    logits = torch.stack([result.test_logits for result in results])  # (results, N, 10)
    ensemble, networks = logits.log_softmax(2).mean(0).argmax(1), logits.argmax(2)
    wrong = (networks != labels).sum(0)
    return [
        {"image": i, "label": labels[i].item(), "ensemble": ensemble[i].item(), "networks_wrong": wrong[i].item()}
        for i in ((wrong > 0) | (ensemble != labels)).nonzero().flatten().tolist()
    ]


def plot_errors(errors, images):
    """Digits with their label and the ensemble's prediction."""
    captions = [f"labelled {row['label']}\npredicted {row['ensemble']}" for row in errors]
    columns = 8
    figure = common.new_figure(10, 0.6 + 1.6 * math.ceil(max(1, len(errors)) / columns))
    common.draw_images(figure.subplots(), images[[row["image"] for row in errors]], columns, captions)
    return figure


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)

    (group,) = results.values()
    errors = list_errors(group, data.test.labels.cpu())
    if errors:
        common.write_csv(f"{args.stem}_errors.csv", errors)
    always = [row for row in errors if row["networks_wrong"] == len(group)]
    title = f"{len(always)} test digits are misclassified"
    if len(group) > 1:
        wrong = sum(row["ensemble"] != row["label"] for row in errors)
        accuracy = 100 - 100 * wrong / len(data.test.labels)
        title += f" by all {len(group)} networks; their ensemble reaches {accuracy:.2f} %"
    plots = {
        "curves": (common.summarize(results), common.plot_curves, results),
        "errors": (title, plot_errors, always, data.test.images),
    }
    common.report(results, args, data, plots)
    print(title)


if __name__ == "__main__":
    main()
