"""The scripts as a user runs them: a process of their own, started from another folder, judged by what they leave."""

import csv
import json
import re
import resource
import signal

import pytest
import torch
from conftest import MNIST_DIR, ROOT, needs_mnist, run_script, start_script

import common
import q1_baseline

OUTPUTS = [
    "baseline_seed0.pt",
    "confusion.png",
    "curves.png",
    "mistakes.png",
    "samples.png",
]


def results(folder, stem="q1_baseline"):
    return json.loads((folder / f"{stem}.json").read_text())


def without_clock(results):
    for run in results["runs"].values():
        for seed in run["seeds"]:
            del seed["seconds"]
    return results


def check_outputs(folder, files, stem="q1_baseline"):
    """The files are all there, and nothing else is; the pictures are pictures."""
    expected = {f"{stem}_{name}" for name in files} | {f"{stem}.csv", f"{stem}.json"}
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_q1_leaves_its_reports(mnist_folder, tmp_path):
    arguments = (
        "--data-dir",
        mnist_folder,
        "--out-dir",
        tmp_path / "out",
        "--epochs",
        2,
        "--seeds",
        2,
    )
    code, out, err = run_script("q1_baseline.py", *arguments, cwd=tmp_path)
    assert code == 0, err
    check_outputs(tmp_path / "out", [*OUTPUTS, "baseline_seed1.pt"])
    assert "421,642" in out and "most confused pairs" in out and "epoch   2/2" in out
    found = results(tmp_path / "out")
    assert found["script"] == "q1_baseline.py"
    assert found["data"] == {"source": "MNIST", "train": 880, "val": 80, "test": 200}
    assert set(found["environment"]) == {
        "python",
        "torch",
        "device",
        "threads",
        "precision",
    }
    run = found["runs"]["baseline"]
    assert run["parameters"] == 421_642 and [seed["seed"] for seed in run["seeds"]] == [
        0,
        1,
    ]
    accuracies = torch.tensor(
        [seed["test_accuracy"] for seed in run["seeds"]], dtype=torch.float64
    )
    assert run["mean"] == pytest.approx(accuracies.mean().item()) and run[
        "std"
    ] == pytest.approx(accuracies.std().item(), abs=1e-4)
    rows = list(csv.DictReader((tmp_path / "out" / "q1_baseline.csv").open()))
    assert [(row["run"], row["seed"], row["epoch"]) for row in rows] == [
        ("baseline", s, e) for s in "01" for e in "12"
    ]
    for seed in run[
        "seeds"
    ]:  # the kept weights are those of the best validation epoch in the log
        logged = [
            float(row["val_accuracy"])
            for row in rows
            if row["seed"] == str(seed["seed"])
        ]
        assert (
            seed["val_accuracy"]
            == pytest.approx(max(logged))
            == pytest.approx(logged[seed["best_epoch"] - 1])
        )


def test_the_reported_numbers_are_those_of_the_checkpoint(mnist_folder, tmp_path):
    q1_baseline.main(
        [
            "--data-dir",
            str(mnist_folder),
            "--out-dir",
            str(tmp_path),
            "--epochs",
            "1",
            "--device",
            "cpu",
        ]
    )
    model = common.baseline_cnn()
    model.load_state_dict(
        torch.load(tmp_path / "q1_baseline_baseline_seed0.pt", weights_only=True)[
            "best"
        ]
    )
    test = common.load_digits(mnist_folder, "mnist").test
    seed = results(tmp_path)["runs"]["baseline"]["seeds"][0]
    assert seed["test_accuracy"] == common.evaluate(model, test).accuracy
    predicted = common.predict(model, test.images).argmax(1)
    assert (
        sum(pair["count"] for pair in seed["most_confused"])
        <= (predicted != test.labels).sum()
    )
    for pair in seed["most_confused"]:
        assert (
            pair["count"]
            == ((test.labels == pair["true"]) & (predicted == pair["predicted"])).sum()
        )


def test_q1_on_the_stand_in_says_so_everywhere(tmp_path, monkeypatch):
    arguments = (
        "--data",
        "synthetic",
        "--limit",
        500,
        "--epochs",
        1,
        "--out-dir",
        tmp_path / "out",
    )
    code, out, err = run_script("q1_baseline.py", *arguments, cwd=tmp_path)
    assert code == 0, err
    check_outputs(tmp_path / "out", OUTPUTS)
    assert results(tmp_path / "out")["data"]["source"] == "synthetic stand-in"
    assert "on synthetic stand-in" in out and "MNIST" not in out


def test_every_plot_of_the_stand_in_is_marked(monkeypatch, tmp_path):
    titles = []
    monkeypatch.setattr(
        common.Figure, "suptitle", lambda figure, title, **_: titles.append(title)
    )
    for source in ("MNIST", "synthetic stand-in"):
        common.save_figure(tmp_path / "a.png", common.Figure(), "finding", source)
    assert titles == ["finding", "[synthetic stand-in] finding"]


@needs_mnist
def test_q1_learns_real_mnist(tmp_path):
    arguments = (
        "--data-dir",
        MNIST_DIR.resolve(),
        "--limit",
        6000,
        "--epochs",
        3,
        "--out-dir",
        tmp_path / "out",
    )
    code, _, err = run_script("q1_baseline.py", *arguments, cwd=tmp_path)
    assert code == 0, err
    found = results(tmp_path / "out")
    assert found["data"] == {
        "source": "MNIST",
        "train": 6000,
        "val": 5000,
        "test": 10_000,
    }
    assert found["runs"]["baseline"]["mean"] > 95


BAD = [
    ("--epochs", "0"),
    ("--epochs", "-1"),
    ("--epochs", "1.5"),
    ("--batch-size", "0"),
    ("--batch-size", "many"),
]
BAD += [
    ("--lr", "0"),
    ("--lr", "-0.1"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--seeds", "0"),
    ("--seed", "-1"),
]
BAD += [
    ("--limit", "0"),
    ("--device", "tpu"),
    ("--precision", "fp8"),
    ("--data", "cifar"),
    ("--epoch-count", "3"),
]


@pytest.mark.parametrize(("option", "value"), BAD)
def test_a_bad_option_is_one_line_that_names_it(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main([f"{option}={value}", "--out-dir", str(tmp_path)])
    line = capsys.readouterr().err
    assert (
        end.value.code == 2
        and line.count("\n") == 1
        and option in line
        and value in line
    )


def test_seed_and_seeds_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--seed", "1", "--seeds", "5"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(common, "available_devices", lambda: ["cpu"])
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--device", "cuda"])
    line = capsys.readouterr().err
    assert (
        end.value.code == 2
        and "cuda is not available here, only cpu" in line
        and line.count("\n") == 1
    )


def test_an_output_folder_that_cannot_be_written_is_found_before_the_training(
    tmp_path, mnist_folder
):
    (tmp_path / "file").write_text("not a folder")
    arguments = "--out-dir", tmp_path / "file" / "out", "--data-dir", mnist_folder
    code, out, err = run_script("q1_baseline.py", *arguments, cwd=tmp_path)
    assert (
        code == 2 and "--out-dir" in err and err.count("\n") == 1 and "epoch" not in out
    )


def test_broken_data_ends_with_one_line_and_exit_code_1(tmp_path, mnist_folder):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in common.MNIST_FILES:
        (raw / name).write_text("<html>")
    code, _, err = run_script(
        "q1_baseline.py", "--data-dir", tmp_path, "--out-dir", tmp_path, cwd=tmp_path
    )
    assert code == 1 and err.count("\n") == 1 and common.MNIST_FILES[0] in err


def test_a_full_disk_is_one_line(mnist_folder, tmp_path):
    """Files of at most 1 MB stand for the disk that is full: the checkpoint has more."""

    def shrink_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    arguments = "--data-dir", mnist_folder, "--out-dir", tmp_path / "out", "--epochs", 1
    code, _, err = run_script(
        "q1_baseline.py", *arguments, cwd=tmp_path, preexec_fn=shrink_disk
    )
    assert code == 1 and re.fullmatch(r"cannot write .*seed0\.pt: .*\n", err)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "q1_baseline_samples.png"
    ]


def test_divergence_ends_with_a_report_and_exit_code_1(mnist_folder, tmp_path):
    arguments = (
        "--data-dir",
        mnist_folder,
        "--out-dir",
        tmp_path / "out",
        "--epochs",
        2,
        "--lr",
        "1e30",
    )
    code, _, err = run_script("q1_baseline.py", *arguments, cwd=tmp_path)
    assert code == 1 and err.count("\n") == 1 and "diverged" in err
    check_outputs(tmp_path / "out", OUTPUTS)
    assert results(tmp_path / "out")["runs"]["baseline"]["seeds"][0]["health"] == [
        "diverged"
    ]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_result_of_one_never_stopped(
    stop, mnist_folder, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common_arguments = (
        "--data-dir",
        mnist_folder,
        "--epochs",
        6,
        "--seeds",
        2,
        "--batch-size",
        16,
        "--out-dir",
    )
    assert run_script("q1_baseline.py", *common_arguments, whole, cwd=tmp_path)[0] == 0
    process = start_script("q1_baseline.py", *common_arguments, broken, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(stop)
            break
    _, err = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err
        assert (broken / "q1_baseline.csv").exists() and (
            broken / "q1_baseline_curves.png"
        ).exists()
    assert not (broken / "q1_baseline.json").exists()  # an unfinished run is no result
    assert (
        run_script(
            "q1_baseline.py", *common_arguments, broken, "--resume", cwd=tmp_path
        )[0]
        == 0
    )
    assert without_clock(results(whole)) == without_clock(results(broken))
    states = [
        torch.load(folder / "q1_baseline_baseline_seed1.pt", weights_only=True)
        for folder in (whole, broken)
    ]
    assert all(
        torch.equal(states[0]["best"][k], states[1]["best"][k])
        for k in states[0]["best"]
    )
    assert states[0]["history"]["step_losses"] == states[1]["history"]["step_losses"]


def test_resume_without_a_checkpoint_is_one_line(mnist_folder, tmp_path):
    arguments = "--data-dir", mnist_folder, "--out-dir", tmp_path / "out", "--resume"
    code, _, err = run_script("q1_baseline.py", *arguments, cwd=tmp_path)
    assert code == 1 and err.count("\n") == 1 and "cannot resume" in err


def test_a_fresh_run_forgets_the_checkpoints_of_an_older_one(mnist_folder, tmp_path):
    arguments = [
        "--data-dir",
        str(mnist_folder),
        "--out-dir",
        str(tmp_path),
        "--epochs",
        "1",
    ]
    q1_baseline.main([*arguments, "--seeds", "2"])
    old = tmp_path / "q1_baseline_baseline_seed1.pt"
    stamp = old.stat().st_mtime_ns
    q1_baseline.main([*arguments, "--seeds", "2"])
    assert old.stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    "script",
    sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/[qv]*[0-9]*_*.py")),
)
def test_help_names_every_option(script, tmp_path):
    code, out, _ = run_script(script, "--help", cwd=tmp_path)
    assert code == 0 and all(
        name in out
        for name in ("--epochs", "--seeds", "--device", "--out-dir", "Expect")
    )
