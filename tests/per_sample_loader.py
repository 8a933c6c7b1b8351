"""What benchmark.py compares with: training as in most tutorials.

Per-sample transforms in a DataLoader, ReLU before max-pool, plain Adam or SGD, fp32, and none of common.py's settings.
Prints the training images per second of a short epoch.

    python tests/per_sample_loader.py NETWORK FOLDER IMAGES

NETWORK is a key of TRAININGS; FOLDER holds MNIST in torchvision's layout, of which IMAGES are trained on.
"""

import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms


def baseline():
    return nn.Sequential(
        *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)],
    )


def narrow_head():
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(384, 50), nn.ReLU(), nn.Linear(50, 10)],
    )


def mnist_net_3():
    def block(inputs, outputs, kernel=3, dropout=0.01):
        convolution = nn.Conv2d(inputs, outputs, kernel, bias=False)
        return convolution, nn.ReLU(), nn.BatchNorm2d(outputs), nn.Dropout(dropout)

    return nn.Sequential(
        *[*block(1, 8), *block(8, 16), *block(16, 8, kernel=1, dropout=0), nn.MaxPool2d(2)],
        *[*block(8, 12), *block(12, 16), *block(16, 16)],
        *[nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 10, 1, bias=False), nn.Flatten()],
    )


crop_or_rotate = [
    transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
    transforms.Resize((28, 28)),
    transforms.RandomRotation(15),
]
rotate_twice = [transforms.RandomRotation(7), transforms.RandomRotation(15)]
Adam = partial(torch.optim.Adam, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
TRAININGS = {  # network, augmentation, batch size, optimizer
    "baseline": (baseline, [], 64, Adam),
    "narrow-head": (narrow_head, crop_or_rotate, 256, Adam),
    "MnistNet_3": (mnist_net_3, rotate_twice, 128, SGD),
}


def main(name, folder, count):
    network, augmentation, batch_size, optimizer = TRAININGS[name]
    normalize = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([*augmentation, transforms.ToTensor(), normalize])
    dataset = Subset(datasets.MNIST(folder, transform=transform), range(count))
    model = network()
    optimizer = optimizer(model.parameters())
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        for images, labels in DataLoader(dataset, batch_size, shuffle=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - started
    print(count / seconds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
