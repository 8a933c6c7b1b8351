"""What the project claims about speed, memory and the stand-in, measured. By hand, on
an otherwise idle machine:

    python tests/benchmark.py                    all parts; 40 minutes on two CPU cores
    python tests/benchmark.py --only training    one of training, augmentation, startup,
                                                 drawing, transfer, sweep

The ways to train take turns, and the medians of their ratios are what counts: machines
differ and are noisy. `transfer` trains the baseline on the synthetic stand-in alone and
reads it on the real MNIST test images; `sweep` runs trials of Q3. Both need MNIST in
--data-dir, MNIST_DIR or data/.
Writes benchmark.json and benchmark_standin.png beside itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import ROOT, load, write_mnist

import common
import q1_baseline
import q3_tuning
from q2_variants import variant4_under_25k

HERE = Path(__file__).resolve().parent
SCRIPT = ROOT / "q1_baseline.py"
IMAGES, BATCH, ROUNDS = 12_800, 64, 5


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def model_and_optimizer(network):
    model = network().to(memory_format=torch.channels_last)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def our_way(digits, network, **options):
    """Samples/s of an epoch of `common.fit`, all of it but validation, which is tiny."""
    model, optimizer = model_and_optimizer(network)
    common.fit(model, *few(digits), optimizer, epochs=1, **options)  # warms up
    history = common.fit(model, *digits[:2], optimizer, epochs=1, **options)
    return len(digits.train.labels) / history.rows[0]["seconds"]


def few(digits):
    """The first 1,000 training digits, and the validation digits."""
    return common.first(digits.train, 1000), digits.val


def bare_limit(digits, precision):
    """Samples/s of the same step over one batch that lies ready: no data work, no log."""
    model, optimizer = model_and_optimizer(common.baseline_cnn)
    images = common.normalize(digits.train.images[:BATCH])
    labels = digits.train.labels[:BATCH]

    def steps(count):
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    steps(16)  # warms up
    started = time.perf_counter()
    steps(IMAGES // BATCH)
    return IMAGES / (time.perf_counter() - started)


def small_mnist(folder):
    """IMAGES training digits, drawn and written to `folder`; one to validate."""
    write_mnist(Path(folder), train=IMAGES * 12 // 11 + 12)
    digits = load(folder, limit=IMAGES)
    return digits._replace(val=common.first(digits.val, 1))


def summarize(rates, reference):
    """Rounds of (usual way, fit, reference) samples/s by precision -> their medians and
    the medians of the ratios, which were taken round by round."""
    results, names = {}, ("usual way", "fit", reference)
    for precision, rows in rates.items():
        medians = [round(statistics.median(c)) for c in zip(*rows, strict=True)]
        found = {"samples_per_second": dict(zip(names, medians, strict=True))}
        for i in (0, 2):
            ratio = statistics.median(row[1] / row[i] for row in rows)
            found[f"fit over {names[i]}"] = round(ratio, 2)
        results[precision] = found
    return results


def measure_training(_):
    rates = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        digits = small_mnist(folder)
        for _ in range(ROUNDS):
            for precision, rows in rates.items():
                usual = float(run(HERE / "usual_way.py", "baseline", folder, IMAGES))
                options = {"batch_size": BATCH, "precision": precision}
                ours = our_way(digits, common.baseline_cnn, **options)
                rows.append((usual, ours, bare_limit(digits, precision)))
    return summarize(rates, "bare limit")


def measure_augmentation(_):
    """Variant 4's larger network with its augmentation, and without."""
    network, augment = (variant4_under_25k.narrow_head_cnn, variant4_under_25k.TURN_OR_CROP)
    rates = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        digits = small_mnist(folder)
        for _ in range(ROUNDS):
            for precision, rows in rates.items():
                usual = float(run(HERE / "usual_way.py", "augmented", folder, IMAGES))
                options = {"batch_size": 256, "precision": precision}
                ours = our_way(digits, network, **options, augment=augment)
                rows.append((usual, ours, our_way(digits, network, **options)))
    return summarize(rates, "no augmentation")


# In a small process of its own: a child's peak begins with the size of its parent.
PEAK = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
print(os.wait4(process.pid, 0)[2].ru_maxrss)
"""


def measure_startup(_):
    """Wall time of --help, and the peak memory of a whole run on full-size data."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run(SCRIPT, "--help")
        seconds.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), 60_000, 10_000)
        where = "--data-dir", folder, "--out-dir", folder
        peak = int(run("-c", PEAK, SCRIPT, *where, "--epochs", 1)) / 2**20
    seconds = round(statistics.median(seconds), 2)
    return {"help_seconds": seconds, "peak_memory_gib": round(peak, 2)}


def measure_drawing(_):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        common.draw_digits(60_000, seed=0), common.draw_digits(10_000, seed=1)
        seconds.append(time.perf_counter() - started)
    return {"images": 70_000, "seconds": round(statistics.median(seconds), 2)}


def measure_transfer(data_dir):
    """Test accuracy on real MNIST of the Q1 baseline that has only seen the stand-in,
    which also chose its weights; 5 seeds."""
    real = load(data_dir, "mnist")
    drawn = load(data_dir, "synthetic")
    figure = common.Figure(figsize=(12, 6), layout="constrained")
    for axes, (images, labels) in zip(figure.subplots(1, 2), (drawn.train, real.train)):
        rows = [images[labels == digit][:10] for digit in range(10)]
        common.draw_images(axes, torch.cat(rows), columns=10)
    options = SimpleNamespace(stem=HERE / "benchmark")
    title = "Left: the synthetic stand-in, drawn by the program. Right: MNIST"
    common.save_figure(figure, "standin", title, real, options)

    accuracies = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--device", "cpu", "--out-dir", folder]
        how = {"recipe": q1_baseline.RECIPE}
        options = common.parse_options(SCRIPT, "", arguments, **how)
        for seed in range(5):
            model, _ = q1_baseline.train(drawn, options, "baseline", seed)
            accuracies.append(common.evaluate(model, real.test).accuracy)
            print(f"seed {seed}: {accuracies[-1]:.2f} % on the real MNIST test images")
    mean, std = (round(value, 2) for value in common.mean_std(accuracies))
    return {"test_accuracy_on_mnist": accuracies, "mean": mean, "std": std}


def measure_sweep(data_dir, trials=24):
    """Trials of Q3's study by one worker for each core, over trials one after the other
    with all threads; and the share of the workers' time that went elsewhere."""
    digits, threads, rates = load(data_dir, "mnist"), torch.get_num_threads(), []
    config = q3_tuning.PUBLISHED | q3_tuning.STUDY | {"improved": False, "test": False}
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--device", "cpu", "--out-dir", folder, "--data-dir", data_dir]
        options = common.parse_options(q3_tuning.__file__, "", map(str, arguments))
        for options.workers in (0, threads):
            torch.set_num_threads(1 if options.workers else threads)
            sweep = q3_tuning.Sweep(digits, options)
            sweep.run({"the workers start": config}, range(threads))
            started, before = time.perf_counter(), sweep.trained
            sweep.run({"timed": config}, range(threads, threads + trials))
            seconds = time.perf_counter() - started
            rates.append(trials / seconds)
            elsewhere = 1 - (sweep.trained - before) / (threads * seconds)
            sweep.stop()
    torch.set_num_threads(threads)
    found = {"workers": threads, "workers over one process": rates[1] / rates[0]}
    return {k: round(v, 2) for k, v in (found | {"elsewhere": elsewhere}).items()}


def main():
    parts = {
        "training": measure_training,
        "augmentation": measure_augmentation,
        "startup": measure_startup,
        "drawing": measure_drawing,
        "transfer": measure_transfer,
        "sweep": measure_sweep,
    }
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--only", choices=parts)
    data_dir = os.environ.get("MNIST_DIR") or ROOT / "data"
    parser.add_argument("--data-dir", type=Path, default=data_dir)
    options = parser.parse_args()
    path = HERE / "benchmark.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in [options.only] if options.only else parts:
        results[part] = parts[part](options.data_dir)
        results["environment"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        print(part, json.dumps(results[part], indent=1))
        common.write_file(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
