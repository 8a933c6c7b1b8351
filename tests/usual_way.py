"""The yardstick of benchmark.py: training the way most tutorials do.

Per-sample transforms in a DataLoader, ReLU before max-pool, plain Adam, fp32, and none
of common.py's set-up. Prints the training samples per second of a short epoch.

    python tests/usual_way.py baseline FOLDER IMAGES     Q1's network and batch size
    python tests/usual_way.py augmented FOLDER IMAGES    variant 4's larger network

FOLDER holds MNIST in torchvision's layout; IMAGES of it are trained on.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

BASELINE = [
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(3136, 128),
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.Linear(128, 10),
]
NARROW_HEAD = [
    nn.Conv2d(1, 8, 3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3),
    nn.ReLU(),
    nn.Conv2d(16, 24, 3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(384, 50),
    nn.ReLU(),
    nn.Linear(50, 10),
]
AUGMENTATION = [
    transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
    transforms.Resize((28, 28)),
    transforms.RandomRotation(15),
]
WAYS = {"baseline": (BASELINE, [], 64), "augmented": (NARROW_HEAD, AUGMENTATION, 256)}


def main(way, folder, count):
    layers, augmentation, batch_size = WAYS[way]
    normalize = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([*augmentation, transforms.ToTensor(), normalize])
    dataset = Subset(datasets.MNIST(folder, transform=transform), range(count))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
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
