"""All recorded results and measurements as tables, and what accuracy costs as a plot: writes RESULTS.md beside itself
and q2_variants/training_cost.png.

python tests/results.py
"""

import csv
import json
import math
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
from q2_variants import variant1_kernel_sizes as variant1
from q2_variants import variant2_batchnorm_gap as variant2
from q2_variants import variant4_under_25k as variant4
from q2_variants import variant5_under_10k as variant5
from q2_variants import variant6_fastest as variant6
from q2_variants import variant7_smallest as variant7
from q2_variants import variant8_most_accurate as variant8

PATTERNS = "q1*.json", "q2_variants/*.json", "q3*.json", "q4_break/*.json"
FILES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
RECORDED = {found["script"]: found for found in (json.loads(path.read_text(encoding="utf-8")) for path in FILES)}
BENCHMARK = json.loads((ROOT / "tests" / "benchmark.json").read_text(encoding="utf-8"))
TEST = "one run, best epoch on test"
SELECTED = next(run for run in RECORDED["q3_tuning.py"]["runs"] if run.endswith("final"))
TARGETS = [  # what, published accuracy, how it was obtained, target mean, script, run
    ("baseline, one-cycle learning rate", 99.35, TEST, 99.25, "q1_baseline", "baseline"),
    ("5x5 and 1x1 kernels", None, "", 98.9, "variant1_kernel_sizes", "5x5 and 1x1 kernels"),
    ("BatchNorm and GAP", None, "", 99.0, "variant2_batchnorm_gap", "BatchNorm and GAP"),
    ("AdvancedComboCNN, published recipe", 98.0, "or more", 98.7, "variant3_advanced_combo", "published recipe"),
    ("AdvancedComboCNN, improved recipe", None, "", 99.3, "variant3_advanced_combo", "improved recipe"),
    ("AdvancedComboCNN, selected in Q3", 98.0, "or more", 99.3, "q3_tuning", SELECTED),
    ("24,488 parameters", 99.26, TEST, 99.26, "variant4_under_25k", "narrow-head improved"),
    ("24,210 parameters, published recipe", 98.16, "on training images", 98.9, "variant4_under_25k", "squeeze"),
    ("24,210 parameters, improved recipe", None, "", 98.9, "variant4_under_25k", "squeeze improved"),
    ("MnistNet_1", 98.49, TEST, 98.6, "variant5_under_10k", "MnistNet_1 improved"),
    ("MnistNet_2", 99.39, TEST, 99.39, "variant5_under_10k", "MnistNet_2 improved"),
    ("MnistNet_3", 99.45, TEST, 99.45, "variant5_under_10k", "MnistNet_3 improved"),
    ("one epoch of variant 6", 99.04, "mean of 30 seeds", 99.0, "variant6_fastest", "one epoch"),
    ("six epochs of variant 6", None, "", 99.4, "variant6_fastest", "six epochs"),
    ("at most 3,762 parameters", 99.52, TEST, 99.52, "variant7_smallest", "2,910 parameters"),
    ("at most 2,000 parameters", 99.1, "one run, last epoch", 99.3, "variant7_smallest", "1,840 parameters"),
    ("at most 697 parameters", 99.03, "best of 700 runs, on test", 99.0, "variant7_smallest", "692 parameters"),
    ("most accurate single network", 99.64, "mean of 1,500 runs", 99.72, "variant8_most_accurate", "strided CNN"),
]


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def accuracy(run):
    return common.format_accuracy([seed["test_accuracy"] for seed in run["seeds"]])


def results_table(found):
    rows = []
    for name, run in found["runs"].items():
        seeds = run["seeds"]
        epochs = sum(seed["epochs"] for seed in seeds) / len(seeds)
        minutes = sum(seed["seconds"] for seed in seeds) / len(seeds) / 60
        best = max(seed["test_accuracy"] for seed in seeds)
        alarms = Counter(seed["health"][0].partition(" (")[0] for seed in seeds if seed["health"])
        texts = [f"{alarm} ({count}x)" for alarm, count in alarms.items()]
        numbers = f"{run['parameters']:,}", accuracy(run), f"{best:.2f} %", f"{epochs:.1f}", f"{minutes:.2g}"
        rows.append((name, *numbers, ", ".join(texts) or "none"))
    head = "run", "parameters", "test accuracy", "best seed", "epochs", "minutes", "first alarm"
    return table(head, rows)


def targets_table():
    stems = {Path(script).stem: found for script, found in RECORDED.items()}
    rows = []
    for what, published, how, target, script, name in TARGETS:
        run = stems[script]["runs"][name]
        reached = "yes" if round(run["mean"], 2) >= target else "missed"
        rows.append((what, f"{published} %, {how}" if published else "", f"{target} %", accuracy(run), reached))
    return table(("network", "published", "target", "ours", "reached"), rows)


def ensemble_accuracy():
    """Of the networks of variant 8, from its list of errors."""
    with (ROOT / "q2_variants" / "variant8_most_accurate_errors.csv").open(encoding="utf-8") as file:
        wrong = sum(row["ensemble"] != row["label"] for row in csv.DictReader(file))
    return 100 - wrong / 100  # of 10,000 images


def other_targets():
    """Rows of targets that are not a mean test accuracy: what, target, ours, whether it is reached."""
    fastest = RECORDED["q2_variants/variant6_fastest.py"]["runs"]
    seconds = {name: statistics.median(seed["seconds"] for seed in run["seeds"]) for name, run in fastest.items()}
    speedup = seconds["published"] / seconds["one epoch"]
    baseline = max(seed["test_accuracy"] for seed in RECORDED["q1_baseline.py"]["runs"]["baseline"]["seeds"])
    ensemble, synthetic = ensemble_accuracy(), BENCHMARK["synthetic"]
    rows = [
        ("baseline, best of five seeds", "99.35 %", f"{baseline:.2f} %", baseline >= 99.35),
        ("variant 8, ensemble of five", "99.80 %", f"{ensemble:.2f} %", ensemble >= 99.8),
        ("variant 6, one epoch", "under 1 s", f"{seconds['one epoch']:.2f} s", seconds["one epoch"] < 1),
        ("variant 6, six epochs", "under 15 s", f"{seconds['six epochs']:.1f} s", seconds["six epochs"] < 15),
        ("variant 6, times as fast as the published recipe in fp32", "5", f"{speedup:.2f}", speedup >= 5),
        ("MNIST, trained on synthetic digits", "95 %", f"{synthetic['mean']:.2f} %", synthetic["mean"] >= 95),
        ("70,000 synthetic digits drawn", "under 10 s", f"{synthetic['seconds']} s", synthetic["seconds"] < 10),
    ]
    assignment = BENCHMARK["assignment"]
    what = f"default runs of ten scripts, times as fast as with {assignment['before']}{assignment.get('remark', '')}"
    ratio = assignment["ratio of the sums"]
    rows.append((what, 1.5, ratio, ratio >= 1.5))
    first = BENCHMARK["first script"]
    memory = max(run["GiB"] for run in first["now"])
    what = f"q1_baseline.py, seconds of the default run / those of {first['before is']}"
    rows.append((what, "at most 0.5", first["ratio of seconds"], first["ratio of seconds"] <= 0.5))
    for goal, target in {"99.4 %": 0.5, "99.0 %": 0.7}.items():
        ratio = BENCHMARK["fastest"][goal]["ratio"]
        what = f"variant 6, seconds to {goal} / those of {BENCHMARK['fastest']['before is']}"
        rows.append((what, f"at most {target}", ratio, ratio <= target))
    fresh = BENCHMARK["fresh seeds"]
    what = "AdvancedComboCNN, selected in Q3, with seeds 5 to 9"
    rows.append((what, "99.3 %", accuracy_of(fresh), fresh["mean"] >= 99.3))
    rows.append(("q1_baseline.py, memory of two workers and the script", "1.2 GiB", f"{memory} GiB", memory <= 1.2))
    for name, target in {"baseline": 2.5, "narrow-head": 4, "MnistNet_3": 4}.items():
        ratio = BENCHMARK["training"][f"{name}, fp32"]["fit / DataLoader"]
        rows.append((f"{name}, times as fast as a per-sample DataLoader", target, ratio, ratio >= target))
    for name, found in BENCHMARK["training"].items():
        if name != "environment":
            target = 0.95 if name.startswith("baseline") else 0.8  # with augmentation
            rows.append((f"{name}, `fit` / bare step", target, found["fit / step"], found["fit / step"] >= target))
    frameworks = BENCHMARK["frameworks"]
    tensorflow, rewritten = (frameworks[name] for name in ("Keras on TensorFlow", "JAX with optax, pooling rewritten"))
    names = "Keras on JAX", "Keras on PyTorch", "JAX with optax", "Lightning", "per-sample DataLoader"
    closest = min(names, key=lambda name: frameworks[name]["fit, fp32 / it"])
    for what, ratio, target in (
        ("Keras on TensorFlow, fp32", tensorflow["fit, fp32 / it"], 1.1),
        ("Keras on TensorFlow, bf16", tensorflow["fit, bf16 / it"], 1.6),
        ("JAX with pooling rewritten, fp32", rewritten["fit, fp32 / it"], 1.4),
        (f"the others, fp32 (the closest: {closest})", frameworks[closest]["fit, fp32 / it"], 2.5),
    ):
        rows.append((f"baseline, times as fast as {what}", target, ratio, ratio >= target))
    for script in ("q1_baseline.py", "q2_variants/variant5_under_10k.py", "q4_break/fail_bad_init.py"):
        ratio = BENCHMARK["workers"][script]["ratio"]
        rows.append((f"{script}, two workers, times as fast as one", 1.3, ratio, ratio >= 1.3))
    found = BENCHMARK["photos"]["network for photos"]
    kinds = [kind for kind in found if kind not in ("mean", "at 99 %", "wrong", "test images themselves")]
    worst = min(kinds, key=found.get)
    share = 100 * found["wrong"] / found["at 99 %"]
    rows += [
        ("photos, mean of all kinds", "97.5 %", f"{found['mean']} %", found["mean"] >= 97.5),
        ("photos, mixture of dark and light ink", "99 %", f"{found['mixture']} %", found["mixture"] >= 99),
        (f"photos, worst kind: {worst}", "95 %", f"{found[worst]} %", found[worst] >= 95),
        ("photos, wrong at 99 % confidence", "at most 0.5 %", f"{share:.2f} %", share <= 0.5),
    ]
    return [(what, target, ours, "yes" if reached else "missed") for what, target, ours, reached in rows]


def frameworks_table():
    rows = []
    for name, found in BENCHMARK["frameworks"].items():
        if name != "environment":
            ratios = [found[f"fit, {precision} / it"] for precision in ("fp32", "bf16")]
            rows.append((name, f"{found['images per second']:,}", *ratios, ", ".join(found["packages"])))
    head = "training", "images per second", "`fit` in fp32 / it", "`fit` in bf16 / it", "packages"
    return table(head, rows)


def faults_table():
    rows = [
        (fault, found["tries"], found["losses"]) for fault, found in BENCHMARK["faults"].items() if "tries" in found
    ]
    return table(("fault", "tries", "losses"), rows)


def surroundings_table():
    found = {kind: row for kind, row in BENCHMARK["surroundings"].items() if "cases" in row}
    return table(("what went wrong", "cases", "failed"), [(kind, *row.values()) for kind, row in found.items()])


def photos_table():
    both = [BENCHMARK["photos"][name] for name in ("network for photos", "baseline")]
    return table(("photos", "network for photos", "baseline"), [(kind, *(f[kind] for f in both)) for kind in both[0]])


def accuracy_of(found):
    return f"{found['mean']:.2f} ± {found['std']:.2f} %"


def preprocessing_table():
    rows = [(kind, accuracy_of(row)) for kind, row in BENCHMARK["preprocessing"].items() if "mean" in row]
    return table(("test images", "test accuracy"), rows)


def test_split_table():
    found = BENCHMARK["test split"]
    wrong = found["images wrong in 1, 2, .. seeds"]
    rows = [
        ("errors by thousand test images", ", ".join(map(str, found["errors by thousand, mean"]))),
        ("errors in the first half, and in the second", ", ".join(map(str, found["errors by half, mean"]))),
        ("images that are wrong in 1, 2, .. seeds", ", ".join(map(str, wrong))),
        ("of those wrong in all, with one answer", found["of those wrong in all, with one answer"]),
        ("of those wrong in all, with a disputed label", found["of those wrong in all, with a disputed label"]),
        ("accuracy of a seed", accuracy_of(found["accuracy"])),
        ("accuracy of the mean of their probabilities", f"{found['accuracy of the mean probability']:.2f} %"),
    ]
    return table(("five baselines", "mean or number"), rows)


def writers_table():
    rows = []
    for kind in ("random images", "whole writers"):
        found = BENCHMARK["writers"][kind]
        accuracies = [accuracy_of(found[part]) for part in ("validation", "test")]
        difference = f"{found['validation - test']['mean']:+.2f} ± {found['validation - test']['std']:.2f}"
        halves = [f"{found[f'test, {half} half']:.2f} %" for half in ("first", "second")]
        rows.append((f"{kind} ({found['images']:,})", *accuracies, difference, *halves))
    return table(("validation split by", "validation", "test", "difference", "test, first half", "second half"), rows)


# ---- What accuracy costs ---------------------------------------------------------------------------------------------
PUBLISHED = [  # name, accuracy and how it was obtained, network, epochs of all 60,000 images
    ("train_mnist_fast", 99.04, variant6.published_cnn, 1),  # mean of 30 seeds, github.com/tuomaso/train_mnist_fast
    ("Deotte", 99.64, variant8.strided_cnn, 45),  # mean of 1,500 networks, kaggle.com/code/cdeotte
    ("MnistNet_2", 99.39, variant5.mnist_net_2, 15),  # this one and the next: one run, best epoch on test
    ("narrow-head", 99.26, variant4.narrow_head_cnn, 10),
]


def network_of(script, config):
    """A function that builds the network of a recorded run; None for Q4, which breaks it."""
    if "variant6" in script and config["network"] != "published":
        return partial(variant6.FixedFiltersCNN, torch.zeros(config["filters"], 1, 5, 5), config["channels"])
    if "variant7" in script:
        return partial(variant7.SharedCNN, config["channels"], config["narrow"])
    networks = {
        "q1": common.baseline_cnn,
        "variant1": variant1.kernel_sizes_cnn,
        "variant2": variant2.batchnorm_gap_cnn,
        "variant3": common.advanced_combo_cnn,
        "variant4": variant4.NETWORKS.get(config.get("network")),
        "variant5": variant5.NETWORKS.get(config.get("network")),
        "variant6": variant6.published_cnn,
        "variant8": variant8.strided_cnn,
    }
    return next((build for key, build in networks.items() if Path(script).name.startswith(key)), None)


def training_cost(build):
    """Multiply-adds of a step with one image, forward and backward, in convolutions and matrix products."""
    images = torch.zeros(2, 1, 28, 28)  # BatchNorm needs two
    with FlopCounterMode(display=False) as counter:
        build()(images).sum().backward()
    return counter.get_total_flops() / 2 / len(images)  # a multiply-add is two operations


def plot_cost(points):
    """Test accuracy by the multiply-adds of the training; `points` of (name, parameters, multiply-adds, accuracy,
    whether it is ours)."""
    figure = common.new_figure(11, 6.5)
    axes = figure.subplots()
    for name, size, cost, accuracy, ours in points:
        color = common.COLORS[0 if ours else 1]
        axes.plot(cost, accuracy, "o" if ours else "s", color=color, fillstyle="full" if ours else "none")
        text = name if "parameters" in name else f"{name}, {size:,}"
        error = 100 - accuracy  # of points beside this one, the costs; the axis is that of the errors' logarithm
        level = [p[2] for p in points if abs(math.log(error / (100 - p[3]))) < 0.0245]
        shift, side, height = (6, 0), "left", "center"
        if any(cost < other < 6 * cost for other in level):
            shift, side = (-6, 0), "right"
            if any(cost / 6 < other < cost for other in level):
                shift, height = (4, -5), "top"
        place = {"xytext": shift, "textcoords": "offset points", "ha": side, "va": height}
        axes.annotate(text, (cost, accuracy), color=color, fontsize=8, **place)
    axes.set(xscale="log", xlabel="multiply-adds of the training, forward and backward", ylabel="test accuracy (%)")
    axes.margins(0.2, 0.12)
    common.accuracy_axis(axes)
    axes.grid(True)
    figure.supxlabel("dots: ours, means of five seeds or more; squares: published; with parameters", fontsize=9)
    return figure


def save_cost():
    """training_cost.png: of each network of Q1 and Q2 the best run of ours, and published ones."""
    best = {}
    for script, found in RECORDED.items():
        for name, run in found["runs"].items():
            build = None if name.startswith("published") else network_of(script, run["config"])
            if build and run["mean"] > best.get(run["parameters"], (0, 0, 0, 0))[3]:
                epochs = statistics.fmean(seed["epochs"] for seed in run["seeds"])
                cost = training_cost(build) * epochs * (run["config"].get("images") or found["data"]["train"])
                label = name.removesuffix(" improved").replace("improved recipe", "AdvancedComboCNN")
                label = f"fixed filters, {label}" if "variant6" in script else label
                best[run["parameters"]] = label, run["parameters"], cost, run["mean"], True
    points = list(best.values())
    for name, published, build, epochs in PUBLISHED:
        size = common.count_parameters(build())
        points.append((name, size, training_cost(build) * epochs * 60_000, published, False))
    costs = {goal: min(point[2] for point in points if round(point[3], 1) >= goal) for goal in (99.0, 99.4, 99.7)}
    factors = [costs[goal] / costs[99.0] for goal in (99.4, 99.7)]
    title = f"99.4 % costs {factors[0]:.0f} times the multiply-adds of 99.0 %, and 99.7 % {factors[1]:,.0f} times"
    common.save_plot(ROOT / "q2_variants" / "training_cost.png", title, "MNIST", plot_cost, points)


def document():
    parts = [
        "# Recorded results",
        "Written by `python tests/results.py` from the results files beside the scripts. Test accuracy on real MNIST: "
        "mean and sample standard deviation over the seeds. Minutes are those of one seed's training. The first "
        "alarm of a training is its diagnosis.",
        "## Targets",
        targets_table(),
        table(("what", "target", "ours", "reached"), other_targets()),
        "![Test accuracy by the multiply-adds of the training](../q2_variants/training_cost.png)",
        "## Other frameworks",
        "The baseline, batch 64, all cores, a warm epoch ([frameworks.py](frameworks.py)); others in fp32.",
        frameworks_table(),
        "## Where errors lie, and what validation says of them",
        "Of the five baselines of q1_baseline.py ([facts.py](facts.py)). MNIST's test images are of other writers than "
        "its training images: the first half is of students, the second of employees.",
        test_split_table(),
        "If test images are prepared otherwise than training images:",
        preprocessing_table(),
        "Validation images drawn at random share their writers with the training images. Five baselines each:",
        writers_table(),
        "## Faults",
        "Scripts killed or out of disk space at random moments, then resumed ([faults.py](faults.py)). A loss is "
        "anything that differs from a run without a fault, a half-written file or a temporary file that is left.",
        faults_table(),
        "## Photos",
        f"Of {BENCHMARK['photos']['photos of each kind']} photos of each kind ([photos.py](photos.py)), made of test "
        "images, the share that is read right, in percent; how many of them, without a doubt and with a probability of "
        "99 %, are wrong; and the test images themselves.",
        photos_table(),
        "## Where people run the scripts",
        "Kinds of trouble that users of other programs for MNIST have reported, each as tests. A case fails if results "
        "are lost, if it ends in a traceback, or if its message does not help.",
        surroundings_table(),
    ]
    for script, found in RECORDED.items():
        environment = found["environment"]
        count = len(next(iter(found["runs"].values()))["seeds"])
        settings = f"{count} seeds, {environment['device']}, {environment['threads']} thread(s) each"
        parts += [f"## {script}", f"{settings}, {environment['precision']}, torch {environment['torch']}."]
        parts.append(results_table(found))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    save_cost()
    (ROOT / "tests" / "RESULTS.md").write_text(document(), encoding="utf-8")
