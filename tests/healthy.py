"""Healthy trainings of other networks, optimizers, widths and lengths, on which no threshold of a check was set."""

from functools import partial

import torch
from conftest import be_silent
from torch import nn

import common
from common import advanced_combo_cnn, baseline_cnn
from q2_variants import variant1_kernel_sizes, variant2_batchnorm_gap
from q2_variants import variant4_under_25k as variant4
from q2_variants import variant5_under_10k as variant5
from q4_break.fault_gallery import deep_cnn, lenet, mlp

Adam, AdamW, RMSprop = torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
SGD = partial(torch.optim.SGD, momentum=0.9)
Nesterov = partial(torch.optim.SGD, momentum=0.9, nesterov=True)


class ResidualCNN(nn.Module):
    """Two residual blocks (He et al. 2016)."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = x + second(first(x.relu()).relu())
        return self.head(x.relu().amax((2, 3)))


def small_cnn(activation=nn.ReLU, width=8, norm=None, pool=nn.MaxPool2d):
    layers = []
    for inputs, outputs in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3), *([norm(outputs)] if norm else []), activation(), pool(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(50 * width, 10))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def group_norm(width):
    return nn.GroupNorm(4, width)


TRAININGS = {  # network, optimizer, learning rate, batch size, images, epochs
    "linear, SGD": (linear, SGD, 0.01, 64, 4000, 2),
    "linear, Adam": (linear, Adam, 1e-3, 32, 4000, 3),
    "MLP, AdamW": (mlp, AdamW, 1e-3, 32, 4000, 2),
    "MLP, SGD": (mlp, SGD, 0.02, 64, 4000, 3),
    "MLP, RMSprop": (mlp, RMSprop, 1e-3, 64, 4000, 2),
    "MLP, wide": (partial(mlp, sizes=(784, 512, 256)), Adam, 1e-3, 128, 4000, 2),
    "MLP, narrow": (partial(mlp, sizes=(784, 32, 32)), Adam, 3e-3, 64, 4000, 3),
    "MLP, GELU": (partial(mlp, nn.GELU), Adam, 1e-3, 64, 4000, 2),
    "MLP, sigmoid": (partial(mlp, nn.Sigmoid, sizes=(784, 128)), Adam, 3e-3, 64, 4000, 3),
    "MLP, ELU": (partial(mlp, nn.ELU), SGD, 0.01, 64, 4000, 2),
    "MLP, BatchNorm, SGD": (partial(mlp, batchnorm=True), SGD, 0.05, 64, 4000, 2),
    "MLP, four layers": (partial(mlp, sizes=(784, 128, 128, 128, 64)), Adam, 1e-3, 64, 4000, 3),
    "LeNet, SGD": (lenet, SGD, 0.03, 64, 4000, 3),
    "LeNet, Nesterov": (lenet, Nesterov, 0.03, 32, 4000, 2),
    "LeNet, Adam 3e-3": (lenet, Adam, 3e-3, 128, 6000, 2),
    "deep CNN, RMSprop": (deep_cnn, RMSprop, 5e-4, 64, 6000, 3),
    "deep CNN, ELU": (partial(deep_cnn, nn.ELU), Adam, 1e-3, 64, 6000, 2),
    "deep CNN, GELU": (partial(deep_cnn, nn.GELU), Adam, 2e-3, 64, 6000, 2),
    "residual CNN": (ResidualCNN, Adam, 3e-3, 64, 6000, 2),
    "residual CNN, SGD": (partial(ResidualCNN, 24), SGD, 0.02, 64, 6000, 2),
    "small CNN, one epoch": (small_cnn, Adam, 3e-3, 64, 6000, 1),
    "small CNN, tanh": (partial(small_cnn, nn.Tanh), Adam, 2e-3, 64, 4000, 2),
    "small CNN, SiLU": (partial(small_cnn, nn.SiLU), AdamW, 3e-3, 64, 4000, 2),
    "small CNN, LeakyReLU, SGD": (partial(small_cnn, nn.LeakyReLU), SGD, 0.05, 128, 6000, 2),
    "small CNN, BatchNorm": (partial(small_cnn, norm=nn.BatchNorm2d), SGD, 0.05, 64, 4000, 1),
    "small CNN, GroupNorm": (partial(small_cnn, norm=group_norm), Adam, 3e-3, 64, 4000, 2),
    "small CNN, InstanceNorm": (partial(small_cnn, norm=nn.InstanceNorm2d), Adam, 3e-3, 64, 4000, 2),
    "small CNN, average pooling": (partial(small_cnn, pool=nn.AvgPool2d), RMSprop, 2e-3, 64, 4000, 2),
    "small CNN, wide": (partial(small_cnn, width=24), Nesterov, 0.02, 64, 4000, 2),
    "small CNN, batch 256": (small_cnn, Adam, 1e-2, 256, 8000, 2),
    "small CNN, batch 8": (small_cnn, SGD, 2e-3, 8, 3000, 1),
    "baseline, SGD": (baseline_cnn, SGD, 0.02, 64, 4000, 2),
    "baseline, one epoch": (baseline_cnn, AdamW, 1e-3, 32, 5000, 1),
    "kernel sizes": (variant1_kernel_sizes.kernel_sizes_cnn, Adam, 1e-3, 64, 3000, 2),
    "BatchNorm and GAP": (variant2_batchnorm_gap.batchnorm_gap_cnn, Adam, 3e-3, 64, 3000, 3),
    "AdvancedComboCNN, SGD": (advanced_combo_cnn, SGD, 0.05, 64, 3000, 3),
    "narrow-head": (variant4.narrow_head_cnn, Adam, 3e-3, 64, 5000, 2),
    "squeeze": (variant4.squeeze_cnn, Adam, 2e-3, 64, 5000, 3),
    "MnistNet_2": (variant5.mnist_net_2, SGD, 0.05, 64, 3000, 3),
    "MnistNet_3": (variant5.mnist_net_3, Adam, 0.01, 64, 3000, 3),
}


def train(name, data, seed=0):
    """(model, history) of one of TRAININGS."""
    network, optimizer, lr, batch_size, images, epochs = TRAININGS[name]
    torch.manual_seed(seed)
    model = network()
    part = data._replace(train=data.train.head(images), val=data.val.head(1_000))
    optimizer = optimizer(model.parameters(), lr=lr)
    config = {"epochs": epochs, "batch_size": batch_size}
    return model, common.fit(model, part, optimizer, config, seed=seed, progress=be_silent)
