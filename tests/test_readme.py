"""README's numbers are those of the committed results files, and of nothing else."""

import importlib
import json
from collections import Counter

import pytest
from conftest import ROOT

import common

README = (ROOT / "README.md").read_text()
PATTERNS = "q*.json", "q2_variants/*.json", "q4_break/*.json"
RESULTS = {
    path: json.loads(path.read_text()) for path in sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
}
BENCHMARK = json.loads((ROOT / "tests" / "benchmark.json").read_text())


def results_table():
    lines = ["| script | run | parameters | test accuracy, mean ± std | best seed |"]
    lines += ["|---|---|---:|---:|---:|"]
    for found in RESULTS.values():
        if found["script"].startswith("q4_break/"):
            continue  # they are in the table of alarms
        for label, run in found["runs"].items():
            mean = f"{run['mean']:.2f} ± {run['std']:.2f} %"
            best = max(seed["test_accuracy"] for seed in run["seeds"])
            script = f"`{found['script']}`"
            cells = script, label, f"{run['parameters']:,}", mean, f"{best:.2f} %"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def alarm_table():
    """How many runs set off which alarm: a row for each script of healthy runs, and for
    each label of Q4."""
    rows = []
    for found in RESULTS.values():
        script, runs = f"`{found['script']}`", found["runs"]
        if script.startswith("`q4_break/"):
            for label, run in runs.items():
                mean = f"{run['mean']:.2f} ± {run['std']:.2f} %"
                rows.append(([script, label, mean], run["seeds"]))
        else:
            seeds = [seed for run in runs.values() for seed in run["seeds"]]
            rows.append(([script, f"all {len(seeds)} runs", "above"], seeds))
    lines = [f"| script | run | test accuracy | {' | '.join(common.ALARMS)} |"]
    lines += ["|---|---|---:|" + ":---:|" * len(common.ALARMS)]
    for cells, seeds in rows:
        counts = Counter(name for seed in seeds for name in seed["health"])
        cells += [str(counts[name] or "") for name in common.ALARMS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table():
    lines = ["| network | precision | usual way | `fit` | ratio | reference | ratio |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    networks = {"training": "baseline", "augmentation": "narrow-head, augmented"}
    for part, network in networks.items():
        for precision, found in BENCHMARK[part].items():
            names, rates = zip(*found["samples_per_second"].items(), strict=True)
            usual, ours, reference = (f"{rate:,}/s" for rate in rates)
            ratios = [f"{found[f'fit over {names[i]}']:.2f}" for i in (0, 2)]
            reference = f"{names[2]}: {reference}"
            cells = network, precision, usual, ours, ratios[0], reference, ratios[1]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check(expected):
    assert expected in README, f"README should hold:\n\n{expected}\n"


def test_results_table():
    check(results_table())


def test_alarm_table():
    check(alarm_table())


@pytest.mark.parametrize("found", RESULTS.values(), ids=lambda found: found["script"])
def test_no_alarm_is_false_and_none_is_missed(found):
    intended = {}
    if found["script"].startswith("q4_break/"):
        name = found["script"].removesuffix(".py").replace("/", ".")
        intended = importlib.import_module(name).INTENDED
    for label, run in found["runs"].items():
        for seed in run["seeds"]:
            if label in intended:
                assert intended[label] in seed["health"]
            else:
                assert seed["health"] == [], label


def test_speed_table():
    check(speed_table())


def test_benchmark_sentences():
    startup, transfer = BENCHMARK["startup"], BENCHMARK["transfer"]
    check(f"{BENCHMARK['sweep']['workers over one process']:.2f} times the rate")
    check(f"{BENCHMARK['sweep']['elsewhere']:.2f} of the workers' time")
    check(f"{transfer['mean']:.2f} ± {transfer['std']:.2f} %")
    check(f"{BENCHMARK['drawing']['seconds']:.1f} s")
    check(f"{startup['help_seconds']:.1f} s")
    check(f"{startup['peak_memory_gib']:.2f} GiB")


def test_tuning_sentences():
    runs = RESULTS[ROOT / "q3_tuning.json"]["runs"]
    final = next(label for label in runs if label.endswith(", final"))
    for label in ("published", final.removesuffix(", final")):
        accuracies = [seed["val_accuracy"] for seed in runs[label]["seeds"]]
        check("{:.2f} ± {:.2f} %".format(*common.mean_std(accuracies)))
    check(f"{runs[final]['mean']:.2f} % of the test images")


def test_results_are_five_or_more_whole_runs_on_mnist():
    assert RESULTS
    for path, found in RESULTS.items():
        sizes = {"train": 55_000, "val": 5_000, "test": 10_000}
        assert found["data"] == {"source": "MNIST", **sizes}, path
        for run in found["runs"].values():
            assert [s["seed"] for s in run["seeds"]] == list(range(len(run["seeds"])))
            assert len(run["seeds"]) >= 5, path


def test_pictures_in_readme_exist():
    pictures = [part.split(")")[0] for part in README.split("](") if ".png)" in part[:200]]
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).exists(), picture
