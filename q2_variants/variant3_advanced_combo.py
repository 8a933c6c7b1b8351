"""Q2, variant 3, AdvancedComboCNN: 98.7 % test accuracy with the published recipe, 99.3 % with an improved one.

Expect  29,386 parameters; the kernels of variant 1 with the BatchNorm, LeakyReLU and GAP of variant 2.
Why     The weak point of the published recipe is its constant learning rate: validation accuracy still varies by up to
        half a point between the last epochs. (Training accuracy in the log is low because half of the features are
        dropped; without dropout it is 99.6 %.) The improved recipe has no dropout, a learning rate that rises to
        twenty times as much and falls to zero (one-cycle), and images that are randomly rotated, shifted and scaled.
Run     python q2_variants/variant3_advanced_combo.py     five minutes on two CPU cores
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch.optim.lr_scheduler import OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common

RUNS = {
    "published recipe": {
        "epochs": 25,  # how many is not published; accuracy still rises slowly
        "batch_size": 64,
        "lr": 1e-3,
        "schedule": "constant",
        "dropout": 0.5,
        "augment": None,
    },
    "improved recipe": {
        "epochs": 25,
        "batch_size": 128,
        "lr": 2e-2,  # the peak
        "schedule": "one-cycle",
        "dropout": 0.0,
        "augment": common.ROTATE_AND_SHIFT,
    },
}


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = common.advanced_combo_cnn(dropout=config["dropout"])
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    scheduler = None
    augment = None
    if config["schedule"] == "one-cycle":
        scheduler = OneCycleLR(optimizer, config["lr"], config["epochs"] * data.steps(config["batch_size"]))
    if config["augment"]:
        augment = partial(common.random_affine, **config["augment"])
    return model, common.fit(
        model, data, optimizer, config, seed=seed, scheduler=scheduler, augment=augment, **settings
    )


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    common.print_layers(common.advanced_combo_cnn())
    results = common.run_all(train, args, data)
    common.report(results, args, data, {"curves": (common.summarize(results), common.plot_curves, results)})


if __name__ == "__main__":
    main()
