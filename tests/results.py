"""All recorded results as tables: writes RESULTS.md beside itself.

python tests/results.py
"""

import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = "q1*.json", "q2_variants/*.json", "q3*.json", "q4_break/*.json"
FILES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
RECORDED = {found["script"]: found for found in (json.loads(path.read_text(encoding="utf-8")) for path in FILES)}
TEST = "one run, best epoch on test"
TARGETS = [  # what, published accuracy, how it was obtained, target mean, script, run
    ("baseline, decaying learning rate", 99.35, TEST, 99.25, "q1_baseline.py", "baseline"),
    ("5x5 and 1x1 kernels", None, "", 98.9, "q2_variants/variant1_kernel_sizes.py", "5x5 and 1x1 kernels"),
    ("BatchNorm and GAP", None, "", 99.0, "q2_variants/variant2_batchnorm_gap.py", "BatchNorm and GAP"),
    (
        "AdvancedComboCNN, published recipe",
        98.0,
        "more than",
        98.7,
        "q2_variants/variant3_advanced_combo.py",
        "published recipe",
    ),
    ("AdvancedComboCNN, improved recipe", None, "", 99.3, "q2_variants/variant3_advanced_combo.py", "improved recipe"),
    ("24,488 parameters", 99.26, TEST, 99.26, "q2_variants/variant4_under_25k.py", "narrow-head improved"),
    (
        "24,210 parameters, published recipe",
        98.16,
        "on training images",
        98.9,
        "q2_variants/variant4_under_25k.py",
        "squeeze",
    ),
    ("24,210 parameters, improved recipe", None, "", 98.9, "q2_variants/variant4_under_25k.py", "squeeze improved"),
    ("MnistNet_1", 98.49, TEST, 98.6, "q2_variants/variant5_under_10k.py", "MnistNet_1 improved"),
    ("MnistNet_2", 99.39, TEST, 99.39, "q2_variants/variant5_under_10k.py", "MnistNet_2 improved"),
    ("MnistNet_3", 99.45, TEST, 99.45, "q2_variants/variant5_under_10k.py", "MnistNet_3 improved"),
    (
        "at most 2,000 parameters",
        99.10,
        "one run, last epoch",
        99.3,
        "q2_variants/variant7_smallest.py",
        "1,840 parameters",
    ),
    ("at most 1,000 parameters", 98.76, "mean of 223 runs", 99.0, "q2_variants/variant7_smallest.py", "996 parameters"),
]


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def accuracy(run):
    return f"{run['mean']:.2f} ± {run['std']:.2f} %"


def results_table(found):
    rows = []
    for name, run in found["runs"].items():
        seeds = run["seeds"]
        epochs = sum(seed["epochs"] for seed in seeds) / len(seeds)
        minutes = sum(seed["seconds"] for seed in seeds) / len(seeds) / 60
        best = max(seed["test_accuracy"] for seed in seeds)
        alarms = Counter(seed["health"][0].partition(" (")[0] for seed in seeds if seed["health"])
        texts = [f"{alarm} ({count}x)" for alarm, count in alarms.items()]
        numbers = f"{run['parameters']:,}", accuracy(run), f"{best:.2f} %", f"{epochs:.1f}", f"{minutes:.1f}"
        rows.append((name, *numbers, ", ".join(texts) or "none"))
    head = "run", "parameters", "test accuracy", "best seed", "epochs", "minutes", "first alarm"
    return table(head, rows)


def targets_table():
    rows = []
    for what, published, how, target, script, name in TARGETS:
        run = RECORDED[script]["runs"][name]
        reached = "yes" if round(run["mean"], 2) >= target else "missed"
        rows.append((what, f"{published} %, {how}" if published else "", f"{target} %", accuracy(run), reached))
    return table(("network", "published", "target", "ours", "reached"), rows)


def document():
    parts = [
        "# Recorded results",
        "Written by `python tests/results.py` from the results files beside the scripts. Test accuracy on real MNIST: "
        "mean and sample standard deviation over the seeds. Minutes are those of one seed's training. The first "
        "alarm of a training is its diagnosis.",
        "## Targets",
        targets_table(),
    ]
    for script, found in RECORDED.items():
        environment = found["environment"]
        count = len(next(iter(found["runs"].values()))["seeds"])
        settings = f"{count} seeds, {environment['device']}, {environment['threads']} thread(s) each"
        parts += [f"## {script}", f"{settings}, {environment['precision']}, torch {environment['torch']}."]
        parts.append(results_table(found))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "tests" / "RESULTS.md").write_text(document(), encoding="utf-8")
