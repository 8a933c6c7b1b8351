"""Q3's sweep: as a user runs it, with workers, under torchrun, killed and gone on with; and how it chooses."""

import argparse
import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script, start_script, write_mnist

import common
import q3_tuning

SMALL = "tests/small_study.py"
QUICK = "--epochs 1 --seeds 1"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as many as a worker has
PLOTS = "curves", "factors", "final", "finalists", "rates"


def results_in(folder):
    """Results, log and study, but for the times."""
    results = json.loads((folder / "q3_tuning.json").read_text())
    for run in results["runs"].values():
        for seed in run["seeds"]:
            del seed["seconds"]
    with (folder / "q3_tuning.csv").open() as file:
        log = [row | {"seconds": ""} for row in csv.DictReader(file)]
    return results["runs"], log, (folder / "q3_tuning_study.csv").read_text()


@pytest.fixture(scope="module")
def whole(mnist_folder, tmp_path_factory):
    """The folder of a sweep by two workers that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = f"--data-dir {mnist_folder} --out-dir {folder} --workers 2 {QUICK}"
    code, out, err = run_script(SMALL, arguments, cwd=folder, env=ONE_THREAD)
    assert code == 0, err
    return folder, out


def test_what_a_sweep_leaves(whole):
    folder, out = whole
    names = [*(f"_{plot}.png" for plot in PLOTS), ".csv", ".json", "_study.csv"]
    assert {p.name for p in folder.iterdir()} == {*(f"q3_tuning{name}" for name in names), "q3_tuning_trials"}
    runs, log, study = results_in(folder)
    assert {"published", "SGD 0.01", "published, constant rate"} < set(runs)
    final = [name for name in runs if name.endswith(", final")]
    means = {}  # of validation, for the finalists
    for name, run in runs.items():
        assert [seed["seed"] for seed in run["seeds"]] == [0]
        if run["config"]["images"] == 100:
            means[name] = sum(seed["val_accuracy"] for seed in run["seeds"])
    assert final == [f"{max(means, key=means.get)}, final"]
    assert {(row["run"], row["seed"]) for row in log} == {(name, "0") for name in runs}
    assert len(study.splitlines()) == 1 + 7  # seven configurations, one seed
    assert "published: SGD reaches about 99 %" in out


def test_one_process_and_other_test_labels_end_in_the_same_choice(whole, mnist_folder, tmp_path):
    folder = write_mnist(tmp_path / "poisoned")
    path = folder / "MNIST" / "raw" / common.MNIST_FILES[3]
    content = bytearray(path.read_bytes())
    content[8:] = bytes((label + 1) % 10 for label in content[8:])
    path.write_bytes(content)
    arguments = f"--data-dir {folder} --out-dir out --workers 0 {QUICK}"
    code, _, err = run_script(SMALL, arguments, cwd=tmp_path, env=ONE_THREAD)
    assert code == 0, err
    found, expected = results_in(tmp_path / "out"), results_in(whole[0])
    assert list(found[0]) == list(expected[0])  # finalists in their order, the choice
    assert found[1:] == expected[1:]
    for label, run in found[0].items():
        for seed, other in zip(run["seeds"], expected[0][label]["seeds"], strict=True):
            assert seed["val_accuracy"] == other["val_accuracy"]
            assert seed["test_loss"] != other["test_loss"]


def torchrun(arguments, cwd, *more, **environment):
    """Start the small study under torchrun, with its output in the file "log"."""
    command = [sys.executable, "-m", "torch.distributed.run", *more, ROOT / SMALL]
    with open(cwd / "log", "a") as log:
        return subprocess.Popen(
            [*command, *arguments.split()], cwd=cwd, stdout=log, stderr=log, env=ONE_THREAD | environment
        )


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def two_machines(rank, port):
    address = "--master-addr=localhost", f"--master-port={port}"
    return "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", *address


def test_two_machines_end_in_the_same(whole, mnist_folder, tmp_path):
    attempts, port = tmp_path / "attempts", free_port()
    arguments = f"--data-dir {mnist_folder} --out-dir out {QUICK}"
    processes = [torchrun(arguments, tmp_path, *two_machines(rank, port), ATTEMPTS=str(attempts)) for rank in (0, 1)]
    for process in processes:
        assert process.wait(170) == 0, (tmp_path / "log").read_text()
    assert results_in(tmp_path / "out") == results_in(whole[0])
    lines = attempts.read_text().splitlines()
    trials = list((tmp_path / "out" / "q3_tuning_trials").iterdir())
    assert len(lines) == len(set(lines)) == len(trials)  # every trial exactly once


def wait_for_trials(folder, count, process):
    """Until that many trials are recorded: {file: when it was written}."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list((folder / "q3_tuning_trials").glob("[!.]*.json"))
        if len(found) >= count:
            return {path: path.stat().st_mtime_ns for path in found}
        time.sleep(0.02)
    pytest.fail(f"no {count} trials: exit code {process.poll()}")


def children_of(process, pattern):
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", pattern], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def test_interrupted_sweep_says_how_to_go_on(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --workers 2 {QUICK}"
    with start_script(SMALL, arguments, tmp_path, env=ONE_THREAD) as process:
        wait_for_trials(tmp_path / "out", 1, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in out
    assert "Traceback" not in err


def alive(pid):
    try:  # the state follows the name, which is in brackets
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker with pgrep")
def test_killed_sweep_takes_its_workers_along_and_goes_on(whole, mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --workers 2 {QUICK}"
    endless = ONE_THREAD | {"ENDLESS": "Xavier"}
    with start_script(SMALL, arguments, tmp_path, env=endless) as process:
        before = wait_for_trials(tmp_path / "out", 6, process)  # of seven
        workers = children_of(process, "spawn_main")
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(map(alive, workers))
    arguments += " --resume"
    code, _, err = run_script(SMALL, arguments, cwd=tmp_path, env=ONE_THREAD)
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert results_in(tmp_path / "out") == results_in(whole[0])


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank with pgrep")
def test_killed_rank_loses_nothing(whole, mnist_folder, tmp_path):
    attempts = tmp_path / "attempts"
    arguments = f"--data-dir {mnist_folder} --out-dir out {QUICK}"
    start = "--standalone", "--nproc-per-node=4", "--max-restarts=1"
    process = torchrun(arguments, tmp_path, *start, ATTEMPTS=str(attempts))
    before = wait_for_trials(tmp_path / "out", 3, process)
    os.kill(children_of(process, "small_study")[-1], signal.SIGKILL)
    assert process.wait(170) == 0, (tmp_path / "log").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert results_in(tmp_path / "out") == results_in(whole[0])
    lines = attempts.read_text().splitlines()
    assert len(lines) <= len(set(lines)) + 4  # what the four were at, not more


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker with pgrep")
def test_trials_of_workers_that_die_are_tried_twice(whole, mnist_folder, tmp_path):
    attempts = tmp_path / "attempts"
    environment = ONE_THREAD | {"DEADLY": "Xavier", "ATTEMPTS": str(attempts)}
    arguments = f"--data-dir {mnist_folder} --out-dir out --workers 2 {QUICK}"
    with start_script(SMALL, arguments, tmp_path, env=environment) as process:
        wait_for_trials(tmp_path / "out", 2, process)
        os.kill(children_of(process, "spawn_main")[0], signal.SIGKILL)
        out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert "Xavier init, seed 0: FAILED: a worker died, exit code 3\n" in out
    assert sum("Xavier" in line for line in attempts.read_text().splitlines()) == 2
    study = results_in(tmp_path / "out")[2].splitlines()
    expected = results_in(whole[0])[2].splitlines()
    assert study == [line for line in expected if "Xavier" not in line]


def test_script_itself(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --epochs 1 --seed 3 --limit 40"
    code, out, err = run_script("q3_tuning.py", arguments, cwd=tmp_path)
    assert code == 0, err
    study = list(csv.DictReader((tmp_path / "out/q3_tuning_study.csv").open()))
    assert len(study) == 33
    assert {row["seed"] for row in study} == {"3"}
    assert "learning rate: scientific, the rest fixed" in out
    assert "optimizer: scientific, learning rate nuisance, the rest fixed" in out


# -- Trials and their files, in this process ------------------------------------------
CONFIG = q3_tuning.PUBLISHED | {"images": 40, "epochs": 1, "test": False}
CONFIG |= {"improved": False}


def sweep_in(folder, digits, resume=False):
    device = torch.device("cpu")
    options = {"stem": folder / "q3_tuning", "resume": resume, "workers": 0}
    options |= {"device": device, "precision": "fp32"}
    return q3_tuning.Sweep(digits, argparse.Namespace(**options))


def test_trial_is_reused_by_the_same_sweep_alone(tiny, tmp_path, monkeypatch):
    sweep_in(tmp_path, tiny).run({"it": CONFIG}, [0])
    trained = []

    def note(config, *_):
        trained.append(config)
        return {"error": "not trained"}

    monkeypatch.setattr(q3_tuning, "run_trial", note)
    assert sweep_in(tmp_path, tiny, resume=True).run({"it": CONFIG}, [0])
    assert not trained
    sweep_in(tmp_path, tiny, resume=True).run({"it": CONFIG | {"lr": 0.01}}, [0])
    assert len(trained) == 1
    labels = tiny.val.labels.flip(0)
    other = tiny._replace(val=common.Split(tiny.val.images, labels))
    sweep_in(tmp_path, other, resume=True).run({"it": CONFIG}, [0])
    assert len(trained) == 2
    sweep_in(tmp_path, tiny).run({"it": CONFIG}, [0])  # without --resume: afresh
    assert len(trained) == 3


def test_files_of_others_are_not_touched(tiny, tmp_path):
    sweep = sweep_in(tmp_path, tiny)
    sweep.run({"it": CONFIG}, [0])
    (ours,) = sweep.folder.iterdir()
    others = {"notes.txt": "mine", "other.json": "{}", "copy.json": ours.read_text()}
    for name, text in others.items():
        (sweep.folder / name).write_text(text)
    sweep_in(tmp_path, tiny)
    assert not ours.exists()
    for name, text in others.items():
        assert (sweep.folder / name).read_text() == text
    ours.write_text("not a trial")
    with pytest.raises(SystemExit, match="is no trial of this sweep"):
        sweep_in(tmp_path, tiny).run({"it": CONFIG}, [0])
    assert ours.read_text() == "not a trial"


def test_error_in_a_trial_is_reported(tiny, tmp_path, capsys, monkeypatch):
    def train(*_):
        raise RuntimeError("no memory left\nat all")

    monkeypatch.setattr(q3_tuning, "train", train)
    assert not sweep_in(tmp_path, tiny).run({"it": CONFIG}, [0])
    assert "it, seed 0: FAILED: no memory left\n" in capsys.readouterr().out


def test_diverged_trial_is_a_result(tiny, tmp_path, capsys):
    config = CONFIG | {"optimizer": "SGD", "lr": 1e30, "images": 200}
    found = sweep_in(tmp_path, tiny).run({"too high": config}, [0])
    assert found["too high"][0]["history"]["diverged"]
    assert ", DIVERGED" in capsys.readouterr().out
    assert sweep_in(tmp_path, tiny, resume=True).run({"too high": config}, [0])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [("--workers -1", 2, "'-1' is not a whole number of at least 0"), ("--resume", 1, "cannot resume: there is no")],
)
def test_bad_input_is_one_line(arguments, code, words, mnist_folder, tmp_path):
    arguments += f" --data-dir {mnist_folder} --out-dir out"
    found, _, err = run_script("q3_tuning.py", arguments, cwd=tmp_path)
    assert found == code
    assert words in err
    assert len(err.strip().splitlines()) == 1


# -- The choice, by hand --------------------------------------------------------------
def results_of(*accuracies):
    """Results of seeds that validate at `accuracies`, best in the second epoch."""
    return [
        {
            "history": {
                "rows": [{"epoch": 1, "val_accuracy": 5.0}] + [{"epoch": 2, "val_accuracy": accuracy}],
                "best_epoch": 2,
            }
        }
        for accuracy in accuracies
    ]


def test_noise_is_two_standard_errors():
    # Variances 1 and 4, three seeds each: 2 sqrt(1/3 + 4/3).
    found = q3_tuning.noise(results_of(97, 98, 99), results_of(94, 96, 98))
    assert found == pytest.approx(2 * math.sqrt(5 / 3))
    assert q3_tuning.noise(results_of(97), results_of(94, 96)) == math.inf


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ({"x": [98.9, 99.1], "published": [97.9, 98.1]}, "x is 1.00 points better"),
        ({"x": [98.0, 99.0], "published": [97.9, 98.1]}, "no finalist is better than"),
        ({"x": [99.0], "published": [97.9]}, "no finalist is better than"),
        ({"published": [97.9, 98.1], "x": [97.0, 97.1]}, "published is the best"),
    ],
)
def test_verdict(again, words):
    again = {name: results_of(*values) for name, values in again.items()}
    assert words in q3_tuning.verdict(again, q3_tuning.PUBLISHED)


def test_every_configuration_has_a_name_of_its_own():
    for base in (q3_tuning.PUBLISHED, q3_tuning.PUBLISHED | {"lr": 0.02}):
        tried = []
        for factor in q3_tuning.WORDS:
            for configs in q3_tuning.arms(factor, base).values():
                tried += [config for config in configs if config not in tried]
        assert len(q3_tuning.by_name(tried)) == len(tried)
        assert base in tried


def test_combinations_take_the_best_of_each_factor():
    base = q3_tuning.PUBLISHED
    found = {
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
        best | {"optimizer": "Adam", "lr": 0.03},  # the rate of the best batch
        best | {"optimizer": "SGD", "lr": 0.1},
    ]


def test_best_on_the_edge_of_its_range_is_said():
    base = q3_tuning.PUBLISHED
    assert not q3_tuning.edge("lr", base)
    assert "0.1 is on the edge" in q3_tuning.edge("lr", base | {"lr": 0.1})
    sgd = base | {"optimizer": "SGD", "lr": 0.03}
    assert not q3_tuning.edge("optimizer", sgd)
    assert "batch size 32" in q3_tuning.edge("batch_size", base | {"batch_size": 32})
    assert not q3_tuning.edge("init", base)


def test_first_epochs():
    reached, never = results_of(98, 99), results_of(98, 90)
    assert q3_tuning.first_epochs(reached, 97) == "97 % in epoch 2.0"
    assert q3_tuning.first_epochs(never, 97) == "97 % by 1 of 2 seeds"
