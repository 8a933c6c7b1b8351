"""The yardstick of benchmark.py: the baseline trained the way most tutorials do.

Per-sample transforms in a DataLoader, ReLU before max-pool, plain Adam, fp32, and none
of common.py's set-up. Prints the training samples per second of some short epochs.

    python tests/usual_way.py FOLDER IMAGES     with MNIST in torchvision's layout
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms


def main(folder, count):
    normalize = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([transforms.ToTensor(), normalize])
    dataset = Subset(datasets.MNIST(folder, transform=transform), range(count))
    model = nn.Sequential(
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
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        for images, labels in DataLoader(dataset, batch_size=64, shuffle=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - started
    print(count / seconds)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
