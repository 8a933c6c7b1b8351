"""Q2, variant 5: three published networks with fewer than 10,000 parameters reach 99.0, 99.4 and 99.4 %.

Expect  98.5 %, 99.3 % and 99.3 % test accuracy of MnistNet_1, 2 and 3 with the published recipes, for which 98.49 %,
        99.39 % and 99.45 % were published, of one run each, chosen on the test images; the above with improved ones.
Why     MnistNet_1 has neither BatchNorm nor augmentation and spends a third of its parameters on the last, 5x5 layer.
        MnistNet_2 has global average pooling instead, BatchNorm after every 3x3 layer, and randomly rotated images;
        MnistNet_3 has fewer channels in its second block. The improved recipes rotate the images less but also shift
        and scale them, and raise the learning rate further and lower it to zero (one-cycle).
Tried   rotations of 7 and 15 degrees in the improved recipes, too: MnistNet_3 has a validation loss of 0.0177 instead
        of 0.0154, and the same test accuracy (99.44 and 99.43 %, five seeds each). Validation accuracy of MnistNet_3
        improved, two seeds: 99.44, 99.53 and 99.51 % after 12, 20 and 30 epochs; with label smoothing of 0.05, which
        gains in AdvancedComboCNN, 99.44 % after 20; with digits straightened as in variant 7 99.40 % after 12. The
        mean over variant 7's nine views gains 0.05 points, over six networks.
Run     python q2_variants/variant5_under_10k.py     nine minutes on two CPU cores
        python q2_variants/variant5_under_10k.py --only MnistNet_3
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common

PUBLISHED = {"MnistNet_1": 98.49, "MnistNet_2": 99.39, "MnistNet_3": 99.45}  # test accuracy, one run, chosen on test
# step, gamma: epochs after which the learning rate is multiplied by gamma. None: it rises to lr and falls to zero
# (one-cycle). degrees, shift, scale: of the random augmentation.
ROTATE = {"degrees": [7, 15], "shift": 0, "scale": 0}  # twice in a row, as published
RUNS = {
    "MnistNet_1": {"epochs": 15, "lr": 0.01, "step": 15, "gamma": 1.0, "augment": None},
    "MnistNet_2": {"epochs": 15, "lr": 0.075, "step": 2, "gamma": 0.65, "augment": ROTATE},
    "MnistNet_3": {"epochs": 15, "lr": 0.05, "step": 4, "gamma": 0.35, "augment": ROTATE},
    "MnistNet_1 improved": {"epochs": 12, "lr": 0.03, "step": None, "gamma": None, "augment": common.ROTATE_AND_SHIFT},
    "MnistNet_2 improved": {"epochs": 15, "lr": 0.15, "step": None, "gamma": None, "augment": common.ROTATE_AND_SHIFT},
    "MnistNet_3 improved": {"epochs": 20, "lr": 0.15, "step": None, "gamma": None, "augment": common.ROTATE_AND_SHIFT},
}
RUNS = {name: {"network": name.split()[0], "batch_size": 128, **config} for name, config in RUNS.items()}


class FastDropout(nn.Dropout):
    """Dropout of images (B, C, H, W) in channels-last memory: each element is kept if a random 16-bit integer says so,
    and four of these are drawn at once. PyTorch draws a number for each element, which takes a fifth of a step here."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()]
        keep = torch.ge(bits, round(self.p * 2**16) - 2**15, out=torch.empty_like(bits, dtype=x.dtype))
        batch, channels, height, width = x.shape
        return x * keep.div_(1 - self.p).view(batch, height, width, channels).permute(0, 3, 1, 2)


def conv(channels_in, channels_out, kernel=3):
    return nn.Conv2d(channels_in, channels_out, kernel, bias=False)


def block(channels_in, channels_out, dropout, kernel=3):
    return conv(channels_in, channels_out, kernel), nn.ReLU(), nn.BatchNorm2d(channels_out), FastDropout(dropout)


# Published with log-softmax and negative log-likelihood: the cross-entropy of logits.
def mnist_net_1():
    """(B, 1, 28, 28) -> logits (B, 10), with 8,620 parameters."""
    return nn.Sequential(
        *[conv(1, 8), nn.ReLU()],
        *[conv(8, 16), nn.ReLU()],
        *[conv(16, 16), nn.ReLU()],
        *[conv(16, 8, kernel=1), nn.MaxPool2d(2)],  # -> (B, 8, 11, 11)
        *[conv(8, 8), nn.ReLU()],
        *[conv(8, 8), nn.ReLU()],
        *[conv(8, 16), nn.ReLU()],
        *[conv(16, 10, kernel=1), nn.ReLU()],  # -> (B, 10, 5, 5)
        *[conv(10, 10, kernel=5), nn.Flatten()],
    )


def mnist_net_2(dropout=0.05):
    """(B, 1, 28, 28) -> logits (B, 10), with 7,416 parameters."""
    return nn.Sequential(
        *block(1, 8, dropout),
        *block(8, 16, dropout),
        *[conv(16, 8, kernel=1), nn.MaxPool2d(2)],  # -> (B, 8, 12, 12)
        *block(8, 16, dropout),
        *block(16, 16, dropout),
        *block(16, 16, dropout),
        *[nn.AdaptiveAvgPool2d(1), conv(16, 10, kernel=1), nn.Flatten()],
    )


def mnist_net_3(dropout=0.01):
    """(B, 1, 28, 28) -> logits (B, 10), with 6,560 parameters."""
    return nn.Sequential(
        *block(1, 8, dropout),
        *block(8, 16, dropout),
        *[*block(16, 8, dropout=0, kernel=1), nn.MaxPool2d(2)],  # -> (B, 8, 12, 12)
        *block(8, 12, dropout),
        *block(12, 16, dropout),
        *block(16, 16, dropout),
        *[nn.AdaptiveAvgPool2d(1), conv(16, 10, kernel=1), nn.Flatten()],
    )


NETWORKS = {"MnistNet_1": mnist_net_1, "MnistNet_2": mnist_net_2, "MnistNet_3": mnist_net_3}


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = NETWORKS[config["network"]]()
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    nesterov = config["network"] == "MnistNet_2"
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9, nesterov=nesterov, fused=True)
    steps = data.steps(config["batch_size"])
    if config["step"]:
        scheduler = StepLR(optimizer, config["step"] * steps, config["gamma"])
    else:
        scheduler = OneCycleLR(optimizer, config["lr"], total_steps=config["epochs"] * steps)
    augment = partial(common.random_affine, **config["augment"]) if config["augment"] else None
    return model, common.fit(
        model, data, optimizer, config, seed=seed, scheduler=scheduler, augment=augment, **settings
    )


def plot_sizes(results):
    """Test accuracy by number of parameters, beside the published accuracy."""
    figure = common.new_figure(8, 5)
    axes = figure.subplots()
    networks = list(dict.fromkeys(group[0].config["network"] for group in results.values()))
    ticks = {}
    for name, group in results.items():
        network = group[0].config["network"]
        place = networks.index(network)
        ticks[place] = f"{network}\n{group[0].parameters:,} parameters"
        mean, std = common.mean_std(common.test_accuracies(group))
        i = int(name.endswith("improved"))
        color = common.COLORS[i]
        x = place + (0.1 if i else -0.1)
        axes.errorbar(x, mean, std, capsize=4, color=color, marker=common.MARKERS[i])
        texts = [("improved recipe, ours" if i else "published recipe, ours", mean, color)]
        if not i:
            axes.hlines(PUBLISHED[network], place - 0.25, place + 0.25, color="0.3")
            texts.append(("as published", PUBLISHED[network], "0.3"))
        for text, y, color in texts if place == 0 else ():  # one network's labels serve all
            axes.text(0.3, y, text, va="center", color=color)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.margins(x=0.15, y=0.1)
    axes.set_ylabel("test accuracy (%): mean and standard deviation")
    return figure


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    for name in dict.fromkeys(config["network"] for config in args.runs.values()):
        print(name)
        common.print_layers(NETWORKS[name]())
    results = common.run_all(train, args, data)

    best = max(results, key=lambda name: sum(common.test_accuracies(results[name])))
    accuracy = common.format_accuracy(common.test_accuracies(results[best]))
    title = f"Fewer than 10,000 parameters: {best} reaches {accuracy}"
    plots = {**common.plots_by_recipe(results), "sizes": (title, plot_sizes, results)}
    common.report(results, args, data, plots)


if __name__ == "__main__":
    main()
