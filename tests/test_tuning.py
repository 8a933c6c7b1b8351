"""Q3: what the study leaves, what it selects by, and how it compares."""

import csv
import math

import pytest
from conftest import assert_identical, call_script, make_run, results_in, write_mnist

import common
import q3_tuning

PLOTS = "curves", "hyperparameters", "final", "finalists", "learning_rates"
ARGUMENTS = "--epochs 1 --seeds 1 --precision fp32 --threads 1"


def run_small_study(arguments, data_dir, out_dir):
    """Run Q3 with seven configurations and short trials."""
    values = {"dropout": ([0.0, 0.5], [1]), "batch_size": ([32, 64], [1]), "init": (["Xavier", "He"], [1])}
    rates = {"Adam": [1e-3, 1e-2], "SGD": [1e-2], "RMSprop": [1e-3]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q3_tuning, "LEARNING_RATES", rates)
        patch.setattr(q3_tuning, "VALUES", values)
        patch.setattr(q3_tuning, "STUDY", {"images": 64, "epochs": 2, "improved": False})
        patch.setattr(q3_tuning, "FINALISTS", {"images": 100, "epochs": 2, "improved": True})
        call_script("q3_tuning.py", f"{ARGUMENTS} {arguments}", data_dir, out_dir)


@pytest.fixture(scope="module")
def finished(mnist_folder, tmp_path_factory):
    """The folder of a complete small study."""
    folder = tmp_path_factory.mktemp("finished")
    run_small_study("", mnist_folder, folder)
    return folder


def test_study_leaves_its_log_its_results_and_its_plots(finished):
    names = [*(f"_{plot}.png" for plot in PLOTS), ".csv", ".json", "_study.csv", "_runs"]
    assert {path.name for path in finished.iterdir()} == {f"q3_tuning{name}" for name in names}
    runs, log = results_in(finished, "q3_tuning")
    assert {"published", "SGD 0.01", "published, constant learning rate"} < set(runs)
    means = {}  # validation accuracy of the finalists
    for name, run in runs.items():
        assert [seed["seed"] for seed in run["seeds"]] == [0]
        if run["config"]["images"] == 100:
            means[name] = sum(seed["val_accuracy"] for seed in run["seeds"])
    assert [name for name in runs if name.endswith(", final")] == [f"{max(means, key=means.get)}, final"]
    assert {(row["run"], row["seed"]) for row in log} == {(name, "0") for name in runs}
    with (finished / "q3_tuning_study.csv").open() as file:
        study = list(csv.DictReader(file))
    assert len(study) == 7 and all(0 <= float(row["val_accuracy"]) <= 100 for row in study)


@pytest.mark.slow
def test_test_labels_do_not_influence_the_selection(finished, mnist_folder, tmp_path):
    folder = write_mnist(tmp_path / "wrong labels")
    path = folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes((label + 1) % 10 for label in content[8:]))
    run_small_study("", folder, tmp_path)
    (runs, log), (expected, expected_log) = (results_in(path, "q3_tuning") for path in (tmp_path, finished))
    assert list(runs) == list(expected)  # the finalists in their order, and the selected one
    assert log == expected_log
    for name, run in runs.items():
        for seed, other in zip(run["seeds"], expected[name]["seeds"], strict=True):
            assert seed["val_accuracy"] == other["val_accuracy"]
            assert seed["test_loss"] != other["test_loss"]


@pytest.mark.slow
def test_study_with_half_of_its_runs_finished_resumes_to_a_bit_identical_end(finished, mnist_folder, tmp_path):
    (tmp_path / "q3_tuning_runs").mkdir()
    for path in sorted((finished / "q3_tuning_runs").iterdir())[::2]:
        (tmp_path / "q3_tuning_runs" / path.name).write_bytes(path.read_bytes())
    run_small_study("--resume", mnist_folder, tmp_path)
    assert_identical(finished, tmp_path, "q3_tuning")


def test_whole_study_has_33_configurations():
    study = q3_tuning.study_of(q3_tuning.PUBLISHED)
    assert len(study) == 33
    assert study["published"] == q3_tuning.PUBLISHED


# ---- The selection, by hand ------------------------------------------------------------------------------------------
def results_of(*accuracies):
    """Results of seeds with these validation accuracies, best in the second epoch."""
    rows = [[{"epoch": 1, "val_accuracy": 5.0}, {"epoch": 2, "val_accuracy": value}] for value in accuracies]
    return [make_run(history=common.History(rows=two, best_epoch=2)) for two in rows]


def test_two_standard_errors_of_a_difference():
    # Variances 1 and 4, three seeds each: 2 sqrt(1/3 + 4/3).
    found = q3_tuning.two_standard_errors(results_of(97, 98, 99), results_of(94, 96, 98))
    assert found == pytest.approx(2 * math.sqrt(5 / 3))
    assert q3_tuning.two_standard_errors(results_of(97), results_of(94, 96)) == math.inf


@pytest.mark.parametrize(
    ("finalists", "words"),
    [
        ({"x": [98.9, 99.1], "published": [97.9, 98.1]}, "x is 1.00 points better"),
        ({"x": [98.0, 99.0], "published": [97.9, 98.1]}, "no finalist is better than"),
        ({"x": [99.0], "published": [97.9]}, "no finalist is better than"),
        ({"published": [97.9, 98.1], "x": [97.0, 97.1]}, "published is the best"),
    ],
)
def test_conclusion(finalists, words):
    finalists = {name: results_of(*values) for name, values in finalists.items()}
    assert words in q3_tuning.conclusion(finalists, q3_tuning.PUBLISHED)


def test_every_configuration_has_a_name_of_its_own():
    for base in (q3_tuning.PUBLISHED, {**q3_tuning.PUBLISHED, "lr": 0.02}):
        tried = []
        for key in q3_tuning.TERMS:
            for configs in q3_tuning.candidates(key, base).values():
                tried += [config for config in configs if config not in tried]
        assert len(q3_tuning.by_name(tried)) == len(tried)
        assert base in tried


def test_combinations_take_the_best_value_of_each_hyperparameter():
    base = q3_tuning.PUBLISHED
    found = {name: results_of(90) for name in q3_tuning.study_of(base)}
    found |= {
        "published": results_of(96),
        "Adam 0.01": results_of(99),
        "SGD 0.1": results_of(97),
        "SGD 0.3": results_of(96, 97),
        "dropout 0": results_of(97),
        "Adam 0.003, batch 32": results_of(95),
        "Adam 0.03, batch 128": results_of(99.5),
        "Xavier init": results_of(96.5, 96.7),
    }
    best = {"dropout": 0.0, "batch_size": 128, "init": "Xavier"}
    assert q3_tuning.combinations(base, found) == [
        {**best, "optimizer": "Adam", "lr": 0.03},  # the learning rate of the best batch size
        {**best, "optimizer": "SGD", "lr": 0.1},
        {**best, "optimizer": "RMSprop", "lr": 3e-4},  # all tie: the first
    ]


def test_best_value_on_the_edge_of_its_range_is_named():
    base = q3_tuning.PUBLISHED
    assert not q3_tuning.edge_warning("lr", base)
    assert "0.1 on the edge" in q3_tuning.edge_warning("lr", {**base, "lr": 0.1})
    sgd = {**base, "optimizer": "SGD", "lr": 0.03}
    assert not q3_tuning.edge_warning("optimizer", sgd)
    best = {**base, "batch_size": 32, "lr": 0.03}
    assert "batch size 32 and learning rate 0.03 on the edge" in q3_tuning.edge_warning("batch_size", best)
    assert not q3_tuning.edge_warning("init", base)


def test_first_epochs():
    reached, never = results_of(98, 99), results_of(98, 90)
    assert q3_tuning.first_epochs(reached, 97) == "97 % in epoch 2.0"
    assert q3_tuning.first_epochs(never, 97) == "97 % by 1 of 2 seeds"
