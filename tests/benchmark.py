"""What the project claims about speed, memory and the stand-in, measured. Run by hand, on an otherwise idle machine:

    python tests/benchmark.py                    everything; about 20 minutes on two CPU cores
    python tests/benchmark.py --only training    one part: training, startup, drawing or transfer

Machines differ and are noisy, so the ways of training take turns and the medians of their ratios are what counts.
`transfer` trains the baseline on the synthetic stand-in alone and reads it on the real MNIST test images (five seeds);
it needs MNIST in --data-dir, $MNIST_DIR or data/. Results go to benchmark.json and benchmark_standin.png beside this.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import ROOT, write_mnist
from torch import nn

import common

HERE = Path(__file__).resolve().parent
IMAGES, BATCH, ROUNDS = 6_400, 64, 7


def usual_way(folder, precision):
    """Samples/s of the usual tutorial: per-sample transforms in a DataLoader, a plain model and optimizer, fp32."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((common.MEAN,), (common.STD,))]
    )
    dataset = Subset(datasets.MNIST(folder, transform=transform), range(IMAGES))
    layers = list(common.baseline_cnn())
    model = nn.Sequential(
        layers[0],
        nn.ReLU(),
        nn.MaxPool2d(2),
        layers[3],
        nn.ReLU(),
        nn.MaxPool2d(2),
        *layers[6:],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    started = time.perf_counter()
    for images, labels in DataLoader(dataset, batch_size=BATCH, shuffle=True):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return IMAGES / (time.perf_counter() - started)


def our_way(digits, precision):
    """Samples/s of `common.fit`, all of it: batches, step, log, validation on a single image."""
    model = common.baseline_cnn().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    common.fit(
        model,
        digits.train,
        digits.val,
        optimizer,
        epochs=1,
        batch_size=BATCH,
        precision=precision,
    )
    return IMAGES / (time.perf_counter() - started)


def bare_limit(digits, precision):
    """Samples/s of the same step repeated on one batch that lies ready: no data work, no log."""
    model = common.baseline_cnn().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    images, labels = (
        common.normalize(digits.train.images[:BATCH]),
        digits.train.labels[:BATCH],
    )
    started = time.perf_counter()
    for _ in range(IMAGES // BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return IMAGES / (time.perf_counter() - started)


def measure_training():
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), train=IMAGES * 12 // 11 + 12)
        digits = common.load_digits(Path(folder), "mnist", limit=IMAGES)
        digits = digits._replace(
            val=common.Split(*(tensor[:1] for tensor in digits.val))
        )
        results = {}
        for precision in ("fp32", "bf16"):
            rates = [
                (
                    usual_way(folder, precision),
                    our_way(digits, precision),
                    bare_limit(digits, precision),
                )
                for _ in range(ROUNDS)
            ]
            usual, ours, bare = (
                round(statistics.median(column)) for column in zip(*rates, strict=True)
            )
            results[precision] = {
                "samples_per_second": {
                    "DataLoader": usual,
                    "fit": ours,
                    "bare limit": bare,
                },
                "fit_over_DataLoader": round(
                    statistics.median(ours / usual for usual, ours, _ in rates), 2
                ),
                "fit_over_bare_limit": round(
                    statistics.median(ours / bare for _, ours, bare in rates), 3
                ),
            }
    return results


def measure_startup():
    """Wall time of --help, and peak memory of a whole run (one epoch, full size)."""
    script = ROOT / "q1_baseline.py"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, script, "--help"], check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), 60_000, 10_000)
        command = [
            sys.executable,
            script,
            "--data-dir",
            folder,
            "--out-dir",
            folder,
            "--epochs",
            "1",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {
        "help_seconds": round(statistics.median(seconds), 2),
        "peak_memory_gib": round(peak, 2),
    }


def measure_drawing():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        common.draw_digits(60_000, seed=0), common.draw_digits(10_000, seed=1)
        seconds.append(time.perf_counter() - started)
    return {"images": 70_000, "seconds": round(statistics.median(seconds), 2)}


def measure_transfer(data_dir):
    """Real MNIST test accuracy of the baseline of q1_baseline.py, trained and chosen on stand-in digits alone."""
    real, drawn = (
        common.load_digits(data_dir, "mnist"),
        common.load_digits(data_dir, "synthetic"),
    )
    plot_sheet(drawn, real)
    accuracies = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            ROOT / "q1_baseline.py",
            "--data",
            "synthetic",
            "--seeds",
            "5",
            "--out-dir",
            folder,
        ]
        subprocess.run(command, check=True)
        for seed in range(5):
            model = common.baseline_cnn()
            state = torch.load(
                f"{folder}/q1_baseline_baseline_seed{seed}.pt", weights_only=True
            )
            model.load_state_dict(state["best"])
            accuracies.append(common.evaluate(model, real.test).accuracy)
    mean, std = common.mean_std(accuracies)
    return {
        "real_mnist_test_accuracy": accuracies,
        "mean": round(mean, 2),
        "std": round(std, 2),
    }


def plot_sheet(drawn, real):
    figure = common.Figure(figsize=(12, 6), layout="constrained")
    grid = figure.subplots(10, 21)
    for column, digits in ((0, drawn), (11, real)):
        for digit in range(10):
            images = digits.train.images[digits.train.labels == digit][:10]
            common.draw_images(grid[digit, column : column + 10], images)
    for axes in grid[:, 10]:
        axes.axis("off")
    title = "Left: the synthetic stand-in, drawn by the program. Right: MNIST, written by people"
    common.save_figure(HERE / "benchmark_standin.png", figure, title, "MNIST")


def main():
    parts = ["training", "startup", "drawing", "transfer"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=parts)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("MNIST_DIR") or ROOT / "data"),
    )
    options = parser.parse_args()
    path = HERE / "benchmark.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for part in [options.only] if options.only else parts:
        measure = {
            "training": measure_training,
            "startup": measure_startup,
            "drawing": measure_drawing,
        }.get(part)
        results[part] = measure() if measure else measure_transfer(options.data_dir)
        print(part, json.dumps(results[part], indent=1))
        common.write_file(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
