"""Q2, variant 3, AdvancedComboCNN: the kernels of variant 1 and the BatchNorm, LeakyReLU
and GAP of variant 2 in one network of 29,386 parameters.

Expect  98.8 % with the published recipe, and 99.0 % with an improved one.
Why     At the published, constant learning rate the validation accuracy jumps by half
        a point from epoch to epoch. The improved recipe rises to three times the rate,
        comes down to zero (one-cycle), and shows every image a little turned, moved and
        scaled, in three fifths of the epochs. Both train with half of the 128 features
        dropped: with 7 % of the baseline's parameters there is little to learn the
        training images by heart with, and training accuracy stays below validation.
Run     python q2_variants/variant3_advanced_combo.py     six minutes on two CPU cores
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # common.py lives one level up

import common

RECIPE = {"batch_size": 64, "lr": 1e-3}  # published
EPOCHS = {
    "published recipe": 25,  # how many is not published; accuracy creeps up for long
    "improved recipe": 15,  # the length of its cycle
}
PEAK = 3  # the improved recipe's cycle rises to this multiple of the rate
AUGMENT = partial(common.random_affine, degrees=(10,), shift=2, scale=0.1)


def train(digits, options, label, seed):
    torch.manual_seed(seed)
    model = common.advanced_combo_cnn(dropout=0.5)
    model.to(options.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    epochs = options.epochs or EPOCHS[label]
    scheduler = augment = None
    if label == "improved recipe":
        steps = math.ceil(len(digits.train.labels) / options.batch_size)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK * options.lr, total_steps=steps * epochs
        )
        augment = AUGMENT
    history = common.fit(
        model,
        digits.train,
        digits.val,
        optimizer,
        epochs=epochs,
        batch_size=options.batch_size,
        seed=seed,
        scheduler=scheduler,
        augment=augment,
        precision=options.precision,
    )
    return model, history


def main(argv=None):
    options = common.parse_options(__file__, __doc__, argv, recipe=RECIPE)
    digits = common.load_digits(options)
    common.print_layers(common.advanced_combo_cnn())

    runs = common.train_all(train, EPOCHS, digits, options)

    published, improved = (
        common.describe([run.scores for run in seeds]) for seeds in runs.values()
    )
    title = f"AdvancedComboCNN: {published} as published, {improved} improved"
    common.plot_runs(runs, title, digits, options)
    common.report(runs, digits, options)


if __name__ == "__main__":
    main()
