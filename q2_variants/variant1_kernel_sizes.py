"""Q2, variant 1, kernel sizes: 5x5 and 1x1 kernels instead of two 3x3 reach 99.2 %, less than the baseline.

Expect  4 % fewer parameters than the baseline, and 0.1 points less accuracy.
Why     The first layer sees 5x5 pixels, a stroke with both its edges, but the 1x1 layer only mixes channels. So a
        single layer detects shapes, where the baseline has two, the second with a receptive field of 8x8 pixels.
        Padding, the fully connected layers and the recipe are the baseline's, which reaches 99.4 %.
Run     python q2_variants/variant1_kernel_sizes.py     one minute on two CPU cores
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common

RUNS = {"5x5 and 1x1 kernels": {"epochs": 6, "batch_size": 64, "lr": 3e-3}}  # as the baseline


def kernel_sizes_cnn():
    """(B, 1, 28, 28) -> logits (B, 10), with 405,770 parameters."""
    return nn.Sequential(
        *[nn.Conv2d(1, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()],  # -> (B, 32, 14, 14)
        *[nn.Conv2d(32, 64, 1), nn.MaxPool2d(2), nn.ReLU()],  # -> (B, 64, 7, 7)
        nn.Flatten(),  # -> (B, 3136)
        *[nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5)],
        nn.Linear(128, 10),
    )


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = kernel_sizes_cnn().to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    scheduler = common.one_cycle(optimizer, config, data)
    return model, common.fit(model, data, optimizer, config, seed=seed, scheduler=scheduler, **settings)


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    common.print_layers(kernel_sizes_cnn())
    results = common.run_all(train, args, data)
    common.report(results, args, data, {"curves": (common.summarize(results), common.plot_curves, results)})


if __name__ == "__main__":
    main()
