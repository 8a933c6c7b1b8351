"""What the project claims about speed, memory, health checks and synthetic digits, measured. On a quiet machine:

    python tests/benchmark.py                    all parts; two and a half hours on two CPU cores
    python tests/benchmark.py --only training    one of them

The ways to train take turns, and the medians of their ratios are what counts: machines differ and are noisy. Parts
`workers`, `assignment`, `first script`, `fastest`, `fresh seeds`, `health`, `synthetic`, `photos`, `test split`,
`preprocessing` and `writers` need MNIST in --data-dir, MNIST_DIR or data/, `photos` also a network that
q1_baseline.py has trained, `writers` QMNIST's label files in QMNIST/raw.
Writes benchmark.json and benchmark_digits.png beside itself, and q1_baseline_board.png.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ENVIRONMENT = dict(os.environ)  # for other processes; conftest limits the threads of tests

import facts
import faults
from conftest import ROOT, SCRIPTS, be_silent, load, write_mnist

import common
import q1_baseline
import q3_tuning
from q2_variants import variant4_under_25k as variant4
from q2_variants import variant5_under_10k as variant5

HERE = Path(__file__).resolve().parent
IMAGES, ROUNDS = 12_800, 3


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT).stdout


def median(values, digits=2):
    return round(statistics.median(values), digits)


# ---- Training: images per second -------------------------------------------------------------------------------------
def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)


rotate_twice = partial(common.random_affine, degrees=(7, 15))
TRAININGS = {  # network, optimizer, batch size, augmentation
    "baseline": (common.baseline_cnn, adam, 64, None),
    "narrow-head": (variant4.narrow_head_cnn, adam, 256, variant4.rotate_or_crop),
    "MnistNet_3": (variant5.mnist_net_3, sgd, 128, rotate_twice),
}


def speed_of_fit(data, network, optimizer, batch_size, augment, precision):
    """An epoch of `common.fit`, all of it but validation and health checks, which are one epoch's only."""
    model = network().to(memory_format=torch.channels_last)
    config = {"epochs": 1, "batch_size": batch_size}
    options = {"augment": augment, "precision": precision, "progress": be_silent}
    warm_up = data._replace(train=data.train.head(1_000))
    common.fit(model, warm_up, optimizer(model), config, **options)
    history = common.fit(model, data, optimizer(model), config, **options)
    return len(data.train.labels) / history.rows[0]["seconds"]


def speed_of_step(data, network, optimizer, batch_size, precision):
    """The bare limit: the same step over one batch that lies ready; no data work, no log."""
    model = network().to(memory_format=torch.channels_last)
    optimizer = optimizer(model)
    images = common.normalize(data.train.images[:batch_size])
    labels = data.train.labels[:batch_size]

    def steps(count):
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    steps(10)  # warms up
    started = time.perf_counter()
    steps(IMAGES // batch_size)
    return IMAGES / (time.perf_counter() - started)


def measure_training(_):
    """Images per second of a per-sample DataLoader, of `fit` and of the bare step, and their ratios, taken in turns."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), train=IMAGES * 12 // 11 + 12)
        data = load(folder, limit=IMAGES)
        data = data._replace(val=data.val.head(1))
        rounds = {}
        for _ in range(ROUNDS):
            for name, (network, optimizer, batch_size, augment) in TRAININGS.items():
                loader = float(run(HERE / "per_sample_loader.py", name, folder, IMAGES))
                for precision in ("fp32", "bf16"):
                    fit = speed_of_fit(data, network, optimizer, batch_size, augment, precision)
                    step = speed_of_step(data, network, optimizer, batch_size, precision)
                    rounds.setdefault(f"{name}, {precision}", []).append((loader, fit, step))
        for name, rows in rounds.items():
            loader, fit, step = (round(statistics.median(column)) for column in zip(*rows, strict=True))
            speeds = {"per-sample DataLoader": loader, "fit": fit, "bare step": step}
            ratios = {
                "fit / DataLoader": median(f / d for d, f, _ in rows),
                "fit / step": median(f / s for _, f, s in rows),
            }
            found[name] = {"images per second": speeds, **ratios}
    return found


# ---- Other frameworks ------------------------------------------------------------------------------------------------
FRAMEWORKS = {  # function of frameworks.py, backend of Keras, packages
    "Keras on TensorFlow": ("keras", "tensorflow", ["keras==3.15.1", "tensorflow-cpu==2.21.0"]),
    "Keras on JAX": ("keras", "jax", ["keras==3.15.1", "jax==0.10.2"]),
    "Keras on PyTorch": ("keras", "torch", ["keras==3.15.1", "torch==2.14.1"]),
    "JAX with optax": ("jax", "", ["jax==0.10.2", "optax==0.2.8"]),
    "JAX with optax, pooling rewritten": ("jax_rewritten", "", ["jax==0.10.2", "optax==0.2.8"]),
    "Lightning": ("lightning", "", ["lightning==2.6.6", "torch==2.14.1", "numpy"]),
}


def make_environments(folder):
    """A virtual environment for each list of packages in FRAMEWORKS: {packages: its Python}."""
    pythons = {}
    for packages in sorted({tuple(packages) for *_, packages in FRAMEWORKS.values()}):
        place = Path(folder) / f"environment {len(pythons)}"
        run("-m", "venv", place)
        pythons[packages] = place / "bin" / "python"
        command = [pythons[packages], "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True)
    return pythons


def measure_frameworks(_):
    """Images per second of the baseline, batch 64, all cores, in other frameworks and by `fit`, in turns, and the
    medians of the ratios of `fit` to each."""
    network, optimizer, batch_size, augment = TRAININGS["baseline"]
    rounds = {}
    with tempfile.TemporaryDirectory() as folder:
        data = load(write_mnist(Path(folder), train=IMAGES * 12 // 11 + 12), limit=IMAGES)
        data = data._replace(val=data.val.head(1))
        pythons = make_environments(folder)
        for _ in range(ROUNDS):
            for precision in ("fp32", "bf16"):
                fit = speed_of_fit(data, network, optimizer, batch_size, augment, precision)
                rounds.setdefault(f"fit, {precision}", []).append(fit)
            loader = run(HERE / "per_sample_loader.py", "baseline", folder, IMAGES)
            rounds.setdefault("per-sample DataLoader", []).append(float(loader))
            for name, (function, backend, packages) in FRAMEWORKS.items():
                environment = {**ENVIRONMENT, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
                command = [pythons[tuple(packages)], HERE / "frameworks.py", function, str(IMAGES)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                rounds.setdefault(name, []).append(float(done.stdout.split()[-1]))
    found = {}
    for name, speeds in rounds.items():
        ratios = {
            f"{fit} / it": median(a / b for a, b in zip(rounds[fit], speeds, strict=True))
            for fit in ("fit, fp32", "fit, bf16")
        }
        packages = FRAMEWORKS.get(name, ("", "", []))[2]
        found[name] = {"images per second": round(statistics.median(speeds)), **ratios, "packages": packages}
    return found


# ---- Workers: side by side against one after the other ---------------------------------------------------------------
def proportional_memory(pid):
    """Proportional set size of a process and its descendants, in GiB (Linux)."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/smaps_rollup"):
        try:
            parents = []
            process = path.parent.name
            while process not in ("0", "1"):
                parents.append(process)
                process = (Path("/proc") / process / "stat").read_text().rpartition(")")[2].split()[1]
            if str(pid) in parents:
                total += next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
    return total / 2**20


def run_script(script, folder, data_dir, *options):
    """Seconds and peak memory of a script."""
    command = [sys.executable, ROOT / script, "--data-dir", data_dir, "--out-dir", folder, *options]
    started = time.perf_counter()
    peak = 0.0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        while process.poll() is None:
            peak = max(peak, proportional_memory(process.pid))
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"{script} ended with exit code {process.returncode}")
    return time.perf_counter() - started, peak


WORK = {  # of about a minute each, so that the start of the processes weighs little, as in the scripts' own runs
    "q1_baseline.py": ("--epochs", 3, "--seeds", 2, "--limit", 40_000),
    "q2_variants/variant5_under_10k.py": ("--epochs", 1, "--limit", 40_000),
    "q4_break/fail_bad_init.py": (),
}


def measure_workers(data_dir):
    """Scripts with one worker for each core against one run after the other with all threads: ratio of the times, of
    the whole scripts with start and plots, and the peak memory of all processes together."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for script, options in WORK.items():
            ratios, memory = [], []
            for _ in range(2):
                one, _ = run_script(script, folder, data_dir, *options, "--workers", 1)
                many, peak = run_script(script, folder, data_dir, *options, "--workers", common.CORES)
                ratios.append(one / many)
                memory.append(peak)
            found[script] = {"ratio": median(ratios), "GiB": round(max(memory), 2)}
    return {"workers": common.CORES, **found}


# ---- The whole assignment and the first script, now and before -------------------------------------------------------
BEFORE = "066ac12"  # the commit to compare with


def images_trained(folder):
    """Training images of all epochs in the logs that a script left, Q3's study included."""
    total = 0
    for path in folder.glob("*.json"):
        contents = json.loads(path.read_text(encoding="utf-8"))
        every = contents["data"]["train"]
        for row in csv.DictReader(path.with_suffix(".csv").read_text(encoding="utf-8").splitlines()):
            total += contents["runs"][row["run"]]["config"].get("images") or every
    for path in folder.glob("q3_tuning_study.csv"):
        trials = len(path.read_text(encoding="utf-8").splitlines()) - 1
        total += trials * q3_tuning.STUDY["images"] * q3_tuning.STUDY["epochs"]  # BEFORE has the same
    return total


@contextlib.contextmanager
def checkout(commit):
    """A folder with the project as it was at `commit`."""
    git = "git", "-C", ROOT, "worktree"
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run([*git, "add", "--detach", before, commit], check=True, capture_output=True)
        try:
            yield before
        finally:
            subprocess.run([*git, "remove", "--force", before], check=True)


def measure_assignment(data_dir):
    """Seconds and images of the default runs of the scripts that BEFORE has, too, with its code and with this one,
    script by script in turns: 80 minutes."""
    found = {}
    with checkout(BEFORE) as before, tempfile.TemporaryDirectory() as folder:
        for script in [script for script in SCRIPTS if (before / script).exists()]:
            found[script] = {}
            for name, root in (("before", before), ("now", ROOT)):
                out = Path(folder) / f"{name} {Path(script).stem}"
                out.mkdir()
                seconds, _ = run_script(root / script, out, data_dir)
                found[script][name] = {"seconds": round(seconds, 1), "images": images_trained(out)}
            print(script, found[script], flush=True)
    sums = {name: sum(times[name]["seconds"] for times in found.values()) for name in ("before", "now")}
    return {**found, "before": f"commit {BEFORE}", "ratio of the sums": round(sums["before"] / sums["now"], 2)}


FIRST = "28de7b5"  # the commit to compare the first script with


def measure_first_script(data_dir):
    """Seconds and peak memory of q1_baseline.py's default run, with the code of FIRST and with this one, in turns."""
    found = {"before": [], "now": []}
    with checkout(FIRST) as before, tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            for name, root in (("before", before), ("now", ROOT)):
                seconds, memory = run_script(root / "q1_baseline.py", folder, data_dir)
                found[name].append({"seconds": round(seconds, 1), "GiB": round(memory, 2)})
    ratio = median(now["seconds"] / old["seconds"] for old, now in zip(*found.values(), strict=True))
    return {**found, "before is": f"commit {FIRST}", "ratio of seconds": ratio}


def measure_fastest(data_dir):
    """Seconds to 99.4 % and to 99.0 %: of two trainings of each recipe of variant 6 with the code of FIRST and with
    this one, in turns, and the medians of the ratios."""
    recipes = {"99.4 %": ("eight epochs", "six epochs"), "99.0 %": ("one epoch", "one epoch")}
    found = {}
    with checkout(FIRST) as before, tempfile.TemporaryDirectory() as folder:
        for goal, names in recipes.items():
            seconds = []
            for root, name in [(before, names[0]), (ROOT, names[1])] * ROUNDS:
                script = root / "q2_variants" / "variant6_fastest.py"
                run_script(script, folder, data_dir, "--only", name, "--seeds", 2)
                runs = json.loads((Path(folder) / "variant6_fastest.json").read_text(encoding="utf-8"))["runs"]
                seconds.append(round(min(seed["seconds"] for seed in runs[name]["seeds"]), 2))
            ratio = median(now / old for old, now in zip(seconds[::2], seconds[1::2], strict=True))
            found[goal] = {"before": seconds[::2], "now": seconds[1::2], "ratio": ratio}
    return {**found, "before is": f"commit {FIRST}"}


# ---- Health checks ---------------------------------------------------------------------------------------------------
def measure_fresh_seeds(data_dir):
    """Test accuracy of the configuration that Q3 has selected, with seeds 5-9: nothing was chosen with them."""
    runs = json.loads((ROOT / "q3_tuning.json").read_text(encoding="utf-8"))["runs"]
    name = next(name for name in runs if name.endswith("final"))
    seeds = list(range(5, 10))
    with tempfile.TemporaryDirectory() as folder:
        args = common.parse_args(q3_tuning.__file__, "", q3_tuning.RUNS, ["--out-dir", folder])
        configs = {name: runs[name]["config"]}
        results = common.run_all(q3_tuning.train, args, load(data_dir), configs, seeds)[name]
    accuracies = common.test_accuracies(results)
    mean, std = (round(value, 2) for value in common.mean_std(accuracies))
    return {"run": name, "seeds": seeds, "test_accuracy": accuracies, "mean": mean, "std": std}


def measure_health(data_dir):
    """Ours and the rules of two other tools on the same trainings: faulty and healthy, calibration and held-out; and
    the time of the checks as a share of an epoch of the baseline."""
    import healthy
    import peers

    from q4_break import fault_gallery as gallery
    from q4_break import health

    data = load(data_dir)
    tools = ["ours", *peers.PEERS]
    part = dict.fromkeys(gallery.CALIBRATION, "calibration") | dict.fromkeys(gallery.HELD_OUT, "held out")
    found = {
        name: {"trainings": 0, "named by ours": 0, **dict.fromkeys(tools, 0)}
        for name in ("faulty, calibration", "faulty, held out", "healthy, of the gallery", "healthy, others")
    }

    def judge(group, model, history, named=False):
        probe = data.train.head(health.PROBE)
        found[group]["trainings"] += 1
        found[group]["named by ours"] += named
        found[group]["ours"] += bool(history.health)
        for name, rules in peers.PEERS.items():
            found[group][name] += bool(rules(model, history, probe))

    for config in gallery.RUNS.values():
        images = data._replace(train=data.train.head(config["images"]))
        model, history = gallery.train(config, images, seed=0, progress=be_silent)
        fault = config["fault"]
        first = health.alarm_names(history.health[:1])
        group = f"faulty, {part[config['network']]}" if fault else "healthy, of the gallery"
        judge(group, model, history, bool(fault) and bool(first) and first[0] in gallery.FAULTS[fault][1])
    for name in healthy.TRAININGS:
        judge("healthy, others", *healthy.train(name, data))

    torch.manual_seed(0)
    model = common.baseline_cnn()
    optimizer = adam(model)
    history = common.fit(model, data, optimizer, {"epochs": 1, "batch_size": 64}, progress=be_silent)
    recorder = health.Recorder(model)
    recorder.start_epoch()
    recorder.end_epoch(data.train.labels[:64])
    started = time.perf_counter()
    health.check_health(model, history, recorder, optimizer, data.train, data.val, common.normalize)
    share = (time.perf_counter() - started) / history.rows[0]["seconds"]
    return {**found, "checks, share of an epoch of the baseline": round(share, 4)}


# ---- Start, and the synthetic digits ---------------------------------------------------------------------------------
def measure_start(_):
    """Seconds of --help beyond a bare `import torch`."""

    def seconds(*command):
        started = time.perf_counter()
        run(*command)
        return time.perf_counter() - started

    pairs = [(seconds(ROOT / "q1_baseline.py", "--help"), seconds("-c", "import torch")) for _ in range(7)]
    return {"help_seconds": median(a for a, _ in pairs), "beyond import torch": median(a - b for a, b in pairs)}


def measure_synthetic(data_dir):
    """Time to draw the synthetic digits, and the test accuracy on real MNIST of the baseline that was trained on them
    alone, which also chose its weights; five seeds. No network sees a real image."""
    started = time.perf_counter()
    drawn = load(data_dir, "synthetic")
    seconds = time.perf_counter() - started
    real = load(data_dir, "mnist")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--only", "baseline", "--seeds", "5", "--out-dir", folder]
        args = common.parse_args(q1_baseline.__file__, "", q1_baseline.RUNS, arguments)
        mixed = drawn._replace(test=real.test)
        accuracies = common.test_accuracies(common.run_all(q1_baseline.train, args, mixed)["baseline"])
    mean, std = (round(value, 2) for value in common.mean_std(accuracies))
    title = f"Trained on synthetic digits alone (left), the baseline reaches {mean} % test accuracy on MNIST (right)"
    common.save_plot(HERE / "benchmark_digits.png", title, "MNIST", plot_digits, drawn.train, real.train)
    return {"seconds": round(seconds, 1), "test_accuracy_on_mnist": accuracies, "mean": mean, "std": std}


def plot_digits(*splits):
    """Ten digits of each class, of one split beside the other."""
    figure = common.new_figure(12, 6)
    for axes, (images, labels) in zip(figure.subplots(1, 2), splits, strict=True):
        rows = [images[labels == digit][:10] for digit in range(10)]
        common.draw_images(axes, torch.cat(rows), columns=10)
    return figure


def save_board(model):
    """q1_baseline_board.png, for README: the board of --draw after a four of two strokes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from test_photos import draw_line

    figure = common.new_figure(9, 3.3)
    canvas = FigureCanvasAgg(figure)
    q1_baseline.make_board(figure, model)
    canvas.draw()
    down = torch.linspace(0, 1, 12)[:, None]
    corners = torch.tensor([[105.0, 50], [75, 160], [195, 150]])
    angle = torch.cat([a + down * (b - a) for a, b in zip(corners, corners[1:], strict=False)])
    stem = torch.tensor([165.0, 85]) + down * torch.tensor([-18.0, 150])
    for stroke in (angle, stem):
        draw_line(figure, figure.axes[0], stroke.tolist())
    figure.savefig(ROOT / "q1_baseline_board.png", dpi=100, metadata={"Software": None})


def measure_photos(data_dir, count=150):
    """Digits read correctly, in percent, by kind of photo (tests/photos.py, made of MNIST test images), by the network
    for photos and by the best baseline that q1_baseline.py has left; how many of the photos without a doubt and with a
    probability of 99 % are read wrongly; the mixture merely resized; and seconds for a photo of 12 megapixels."""
    from photos import KINDS, make_photos, mixture, resize_naively
    from PIL import Image

    data = load(data_dir)
    options = ["--data-dir", str(data_dir)]
    models = {
        "network for photos": q1_baseline.photo_network(
            common.parse_args(q1_baseline.__file__, "", q1_baseline.RUNS, options)
        )[0],
        "baseline": common.baseline_cnn().eval(),
    }
    states = [common.load_checkpoint(path, {}) for path in (ROOT / "q1_baseline_runs").glob("*.pt")]
    best = max(states, key=lambda state: state["result"]["scores"]["val_accuracy"])
    models["baseline"].load_state_dict(best["best"])
    save_board(models["network for photos"])
    found = {"photos of each kind": count}
    photos = {}  # kind: (prepared digits, doubts, labels) of each photo
    for seed, kind in enumerate(KINDS):
        made = make_photos(kind, data.test, count, torch.Generator().manual_seed(seed))
        photos[kind] = [
            (*q1_baseline.prepare_photo(q1_baseline.read_photo(io.BytesIO(content))), labels)
            for content, labels in made
        ]
    for name, model in models.items():
        right, sure, wrong = {}, 0, 0
        for kind in KINDS:
            digits = hits = 0
            for images, doubts, labels in photos[kind]:
                probabilities, _ = q1_baseline.classify(model, images, doubts)
                predicted = probabilities.argmax(1).tolist()
                digits += len(labels)
                if len(predicted) == len(labels):
                    hits += sum(a == b for a, b in zip(predicted, labels, strict=True))
                if not doubts and probabilities.amax(1).min() >= 0.99:
                    sure += 1
                    wrong += predicted != labels
            right[kind] = round(100 * hits / digits, 2)
        mean = round(statistics.fmean(right.values()), 2)
        images = round(common.evaluate(model, data.test)[1], 2)
        found[name] = {**right, "mean": mean, "at 99 %": sure, "wrong": wrong, "test images themselves": images}

    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data.test.labels), generator=generator)[:1_000]
    photos = [mixture(image, generator) for image in data.test.images[chosen]]
    resized = [resize_naively(q1_baseline.read_photo(io.BytesIO(photo))) for photo in photos]
    split = common.Split(torch.stack(resized), data.test.labels[chosen])
    found["mixture, merely resized"] = round(common.evaluate(models["baseline"], split)[1], 2)
    large = Image.open(io.BytesIO(photos[0])).resize((4000, 3000)).convert("RGB")
    seconds = {"JPEG": [], "PNG": []}
    for name, times in seconds.items():
        large.save(content := io.BytesIO(), name)
        for _ in range(7):
            started = time.perf_counter()
            q1_baseline.classify(model, *q1_baseline.prepare_photo(q1_baseline.read_photo(content)))
            times.append(time.perf_counter() - started)
    return {**found, "seconds for 12 megapixels": {name: median(times) for name, times in seconds.items()}}


def measure_faults(_, count=32):
    """Kills and full disks at random moments of scripts, which are then resumed: tries and losses. A loss is anything
    that differs from an undisturbed run, a half-written file or a temporary file that is left."""
    with tempfile.TemporaryDirectory() as folder:
        found, losses = faults.inflict(count, write_mnist(Path(folder) / "data"), Path(folder))
    print("\n".join(losses))
    return {fault: {"tries": tries, "losses": lost} for fault, (tries, lost) in found.items()}


# ---- Where people run the scripts: kinds of trouble ------------------------------------------------------------------
TROUBLES = {  # what goes wrong, and the tests of it: a file, and how their names go on after "test_"
    "A: other programs' files are deleted": ("surroundings", "A_"),
    "B: fonts, locales or backends decide whether results exist": ("surroundings", "B_"),
    "C: a file that is there but unusable is taken for missing": ("surroundings", "C_"),
    "D: other data are called MNIST": ("surroundings", "D_"),
    "E: limits of the machine are not seen": ("limits", ""),
    "F: one machine needs a network": ("surroundings", "F_"),
    "G: a process that cannot start ends in a traceback": ("surroundings", "G_"),
    "H: a closed output ends the training": ("surroundings", "H_"),
    "I: a foreseeable mistake ends in a traceback": ("surroundings", "I_"),
    "J: a failed download hides its reason": ("surroundings", "J_"),
    "K: isolated Python does not find common.py": ("surroundings", "K_"),
    "L: unusual formats of photos are decoded wrongly": ("photos", ".*(format|depth|deep_pixels|bad_photos)"),
    "M: warnings of libraries reach the user": ("surroundings", "M_"),
    "N: a learning rate far too high has another name": ("health", ".*(learning_rate|blow_up)"),
}


def measure_surroundings(_):
    """Cases tried and failed of each kind of trouble."""
    files = {f"test_{file}.py" for file, _ in TROUBLES.values()}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}"]
        subprocess.run([*command, *(HERE / name for name in sorted(files))], check=False, env=ENVIRONMENT)
        cases = [case for case in xml.etree.ElementTree.parse(report).iter("testcase") if case.find("skipped") is None]
    found = {}
    for kind, (file, name) in TROUBLES.items():
        mine = [case for case in cases if re.fullmatch(f".*test_{file}", case.get("classname"))]
        mine = [case for case in mine if re.match(f"test_{name}", case.get("name"))]
        failed = [case for case in mine if case.find("failure") is not None or case.find("error") is not None]
        found[kind] = {"cases": len(mine), "failed": len(failed)}
    return found


def main():
    parts = {
        "training": measure_training,
        "frameworks": measure_frameworks,
        "workers": measure_workers,
        "assignment": measure_assignment,
        "first script": measure_first_script,
        "fastest": measure_fastest,
        "fresh seeds": measure_fresh_seeds,
        "health": measure_health,
        "start": measure_start,
        "synthetic": measure_synthetic,
        "photos": measure_photos,
        "test split": facts.measure_test_split,
        "preprocessing": facts.measure_preprocessing,
        "writers": facts.measure_writers,
        "faults": measure_faults,
        "surroundings": measure_surroundings,
    }
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("MNIST_DIR") or ROOT / "data")
    args = parser.parse_args()
    common.setup(common.CORES)
    path = HERE / "benchmark.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in [args.only] if args.only else parts:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": common.CORES}
        results[part] = {**parts[part](args.data_dir), "environment": versions}
        print(part, json.dumps(results[part], indent=1))
        common.write_file(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
