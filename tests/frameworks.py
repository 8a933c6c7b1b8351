"""Training the baseline in other frameworks, as their users write it: prints the images per second of a warm epoch in
fp32, batch 64. benchmark.py runs it, in an environment of its own for each.

    python tests/frameworks.py FRAMEWORK IMAGES      a function of this file: keras, jax, lightning
"""

import sys
import time

import numpy as np

BATCH = 64


def random_digits(count):
    """float32 (count, 28, 28, 1) from 0 to 1, and labels: what they show does not matter for the speed."""
    rng = np.random.default_rng(0)
    return rng.random((count, 28, 28, 1), dtype=np.float32), rng.integers(10, size=count)


def best_speed(train_epoch, count):
    """Of three epochs after a first one, which compiles."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        train_epoch()
        seconds.append(time.perf_counter() - started)
    return count / min(seconds[1:])


def keras(count):
    """With the backend that KERAS_BACKEND names."""
    from keras import Input, Sequential, layers, losses, optimizers

    model = Sequential(
        [
            Input((28, 28, 1)),
            *[layers.Conv2D(32, 3, padding="same", activation="relu"), layers.MaxPooling2D()],
            *[layers.Conv2D(64, 3, padding="same", activation="relu"), layers.MaxPooling2D()],
            *[layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dropout(0.5), layers.Dense(10)],
        ]
    )
    model.compile(optimizers.Adam(1e-3), losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    images, labels = random_digits(count)
    return best_speed(lambda: model.fit(images, labels, batch_size=BATCH, verbose=0), count)


def max_pool(x):
    from jax import lax

    return lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def max_of_blocks(x):
    """The same by a reshape: XLA's backward pass of reduce_window is slow on a CPU."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def jax(count, pool=max_pool):
    import jax
    import optax
    from jax import lax, nn
    from jax import numpy as jnp

    shapes = {"conv1": (3, 3, 1, 32), "conv2": (3, 3, 32, 64), "hidden": (3136, 128), "last": (128, 10)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = {n: nn.initializers.he_normal()(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    parameters = {name: (weight, jnp.zeros(weight.shape[-1])) for name, weight in weights.items()}
    optimizer = optax.adam(1e-3)

    def block(x, weight, bias):
        x = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return pool(nn.relu(x + bias))

    def loss_of(parameters, images, labels, key):
        x = block(block(images, *parameters["conv1"]), *parameters["conv2"]).reshape(len(images), -1)
        weight, bias = parameters["hidden"]
        x = nn.relu(x @ weight + bias)
        x = x * jax.random.bernoulli(key, 0.5, x.shape) * 2
        weight, bias = parameters["last"]
        return optax.softmax_cross_entropy_with_integer_labels(x @ weight + bias, labels).mean()

    @jax.jit
    def step(parameters, state, images, labels, key):
        key, own = jax.random.split(key)
        gradients = jax.grad(loss_of)(parameters, images, labels, own)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, key

    images, labels = random_digits(count)
    rng = np.random.default_rng(0)
    now = [parameters, optimizer.init(parameters), jax.random.key(1)]

    def train_epoch():
        order = rng.permutation(count)
        for rows in np.split(order, range(BATCH, count, BATCH)):
            now[0], now[1], now[2] = step(now[0], now[1], images[rows], labels[rows], now[2])
        jax.block_until_ready(now[0])

    return best_speed(train_epoch, count)


def jax_rewritten(count):
    return jax(count, max_of_blocks)


def lightning(count):
    import logging
    import warnings

    import torch
    from lightning import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Baseline(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(
                *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
                *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
                *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)],
            )

        def training_step(self, batch):
            images, labels = batch
            return nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = random_digits(count)
    loader = DataLoader(
        TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)), BATCH, shuffle=True
    )
    model = Baseline()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, **quiet}
    return best_speed(lambda: Trainer(**trainer).fit(model, loader), count)


if __name__ == "__main__":
    print(globals()[sys.argv[1]](int(sys.argv[2])))
