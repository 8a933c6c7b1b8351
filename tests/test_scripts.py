"""The scripts as a user runs them: from another folder, judged by what they leave."""

import csv
import json
import re
import resource
import runpy
import shutil
import signal
import sys

import pytest
import torch
from conftest import MNIST_DIR, ROOT, load, needs_mnist, run_script, start_script

import common
import q1_baseline

PICTURES = {"confusion.png", "curves.png", "mistakes.png", "samples.png"}
LABELS = ["baseline", "constant-rate"]


def results(folder):
    return json.loads((folder / "q1_baseline.json").read_text())


def check_outputs(folder, seeds):
    """All files are there, and nothing else is; the pictures are pictures."""
    expected = {f"q1_baseline_{name}" for name in PICTURES}
    expected |= {"q1_baseline.csv", "q1_baseline.json"}
    for seed in range(seeds):
        expected |= {f"q1_baseline_{label}_seed{seed}.pt" for label in LABELS}
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.fixture(scope="module")
def finished(mnist_folder, tmp_path_factory):
    """A whole run with two seeds: (folder with the outputs, what it printed)."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = f"--data-dir {mnist_folder} --out-dir {folder}/out --epochs 4 --seeds 2"
    code, out, err = run_script("q1_baseline.py", arguments, cwd=folder)
    assert code == 0, err
    return folder / "out", out


def test_q1_leaves_its_reports(finished):
    folder, out = finished
    check_outputs(folder, seeds=2)
    assert "421,642" in out and "most confused pairs" in out and "epoch   4/4" in out
    found = results(folder)
    assert found["script"] == "q1_baseline.py"
    assert found["data"] == {"source": "MNIST", "train": 880, "val": 80, "test": 200}
    facts = {"python", "torch", "device", "threads", "precision"}
    assert set(found["environment"]) == facts
    rows = list(csv.DictReader((folder / "q1_baseline.csv").open()))
    for label, run in found["runs"].items():
        assert run["parameters"] == 421_642
        assert [seed["seed"] for seed in run["seeds"]] == [0, 1]
        test = torch.tensor([seed["test_accuracy"] for seed in run["seeds"]]).double()
        assert run["mean"] == pytest.approx(test.mean().item(), abs=1e-3)
        assert run["std"] == pytest.approx(test.std().item(), abs=1e-3)
        for seed in run["seeds"]:  # the log agrees, and the best epoch was kept
            mine = [r for r in rows if (r["run"], r["seed"]) == (label, str(seed["seed"]))]
            logged = [float(row["val_accuracy"]) for row in mine]
            assert len(logged) == seed["epochs"] == 4
            assert seed["val_accuracy"] == max(logged) == logged[seed["best_epoch"] - 1]


def test_the_reported_numbers_are_those_of_the_kept_weights(finished, mnist_folder):
    folder, _ = finished
    test = load(mnist_folder).test
    for seed in results(folder)["runs"]["baseline"]["seeds"]:
        path = folder / f"q1_baseline_baseline_seed{seed['seed']}.pt"
        model = common.baseline_cnn()
        model.load_state_dict(torch.load(path, weights_only=True)["best"])
        assert seed["test_accuracy"] == common.evaluate(model, test).accuracy
        predicted = common.predict(model, test.images).argmax(1)
        for pair in seed["most_confused"]:
            read = (test.labels == pair["true"]) & (predicted == pair["predicted"])
            assert pair["count"] == read.sum() and pair["true"] != pair["predicted"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_end(stop, finished, mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --epochs 4 --seeds 2"
    process = start_script("q1_baseline.py", arguments, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(stop)
            break
    _, err = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err
        assert (tmp_path / "q1_baseline.csv").exists()
        assert (tmp_path / "q1_baseline_curves.png").exists()
    assert not (tmp_path / "q1_baseline.json").exists()  # unfinished, no result
    # The same run again, in this process; it ends as the one that never stopped did.
    q1_baseline.main([*arguments.split(), "--resume"])
    whole, resumed = results(finished[0]), results(tmp_path)
    for found in (whole, resumed):
        for seed in (s for run in found["runs"].values() for s in run["seeds"]):
            del seed["seconds"]
    assert whole == resumed
    for path in finished[0].glob("*.pt"):
        first, second = (torch.load(folder / path.name, weights_only=True) for folder in (finished[0], tmp_path))
        for key in first["best"]:
            assert torch.equal(first["best"][key], second["best"][key])
        assert first["history"]["step_losses"] == second["history"]["step_losses"]


def test_resume_without_a_checkpoint_is_one_line(mnist_folder, tmp_path):
    arguments = ["--data-dir", str(mnist_folder), "--out-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^cannot resume: .*seed0\.pt.*$"):
        q1_baseline.main([*arguments, "--resume"])


def test_a_fresh_run_forgets_older_checkpoints(finished, mnist_folder, tmp_path):
    for path in finished[0].glob("*.pt"):
        shutil.copy(path, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q1_baseline, "train", lambda *_: sys.exit("enough"))
        with pytest.raises(SystemExit, match="enough"):
            q1_baseline.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --seeds 2".split())
    assert not list(tmp_path.glob("*.pt"))


def test_q1_on_the_stand_in_says_so_everywhere(tmp_path):
    arguments = "--data synthetic --limit 300 --epochs 1 --out-dir out"
    code, out, err = run_script("q1_baseline.py", arguments, cwd=tmp_path)
    assert code == 0, err
    check_outputs(tmp_path / "out", seeds=1)
    assert results(tmp_path / "out")["data"]["source"] == "synthetic stand-in"
    assert "synthetic stand-in" in out and "MNIST:" not in out


def test_every_plot_of_the_stand_in_is_marked(tiny, tmp_path, monkeypatch):
    titles = []
    note = lambda figure, title, **_: titles.append(title)
    monkeypatch.setattr(common.Figure, "suptitle", note)
    options = common.argparse.Namespace(stem=tmp_path / "a")
    for digits in (tiny, tiny._replace(source="MNIST")):
        common.save_figure(common.Figure(), "b", "finding", digits, options)
    assert titles == ["[synthetic stand-in] finding", "finding"]


@needs_mnist
def test_q1_learns_real_mnist(tmp_path):
    arguments = f"--data-dir {MNIST_DIR.resolve()} --limit 4000 --epochs 2"
    code, _, err = run_script("q1_baseline.py", f"{arguments} --out-dir .", cwd=tmp_path)
    assert code == 0, err
    found = results(tmp_path)
    sizes = {"train": 4000, "val": 5000, "test": 10_000}
    assert found["data"] == {"source": "MNIST", **sizes}
    assert found["runs"]["baseline"]["mean"] > 92


BAD = "--epochs=0 --epochs=-1 --epochs=1.5 --batch-size=0 --batch-size=many --lr=0"
BAD += " --lr=-0.1 --lr=nan --lr=inf --seeds=0 --seed=-1 --limit=0 --device=tpu"
BAD += " --precision=fp8 --data=cifar --layers=3"


@pytest.mark.parametrize("argument", BAD.split())
def test_a_bad_option_is_one_line_that_names_it(argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main([argument, "--out-dir", str(tmp_path)])
    line, (option, value) = capsys.readouterr().err, argument.split("=")
    assert end.value.code == 2 and line.count("\n") == 1
    assert option in line and value in line


def test_seed_and_seeds_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--seed", "1", "--seeds", "5"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(common, "available_devices", lambda: ["cpu"])
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--device", "cuda"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and "--device cuda" in line and line.count("\n") == 1


def test_an_output_folder_is_tried_before_the_training(tmp_path, mnist_folder, capsys):
    (tmp_path / "file").write_text("not a folder")
    folder = str(tmp_path / "file" / "out")
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--out-dir", folder, "--data-dir", str(mnist_folder)])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and not said.out
    assert "--out-dir" in said.err and folder in said.err


def test_broken_data_is_one_line_and_exit_code_1(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in common.MNIST_FILES:
        (raw / name).write_text("<html>")
    arguments = f"--data-dir {tmp_path} --out-dir {tmp_path}"
    code, _, err = run_script("q1_baseline.py", arguments, cwd=tmp_path)
    assert code == 1 and err.count("\n") == 1 and common.MNIST_FILES[0] in err


def test_a_full_disk_is_one_line(mnist_folder, tmp_path):
    """A limit of 1 MB to a file stands for the full disk: the checkpoint is larger."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    arguments = f"--data-dir {mnist_folder} --out-dir out"
    code, _, err = run_script("q1_baseline.py", arguments, cwd=tmp_path, preexec_fn=limit)
    assert code == 1 and re.fullmatch(r"cannot write .*seed0\.pt: .*\n", err)
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == ["q1_baseline_samples.png"]


def test_a_single_image_is_enough_and_no_mistake_is_no_trouble(tiny, mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --limit 1 --epochs 1"
    q1_baseline.main(arguments.split())
    check_outputs(tmp_path, seeds=1)
    options = common.argparse.Namespace(stem=tmp_path / "all_right")
    logits = 100 * torch.nn.functional.one_hot(tiny.test.labels, 10).float()
    q1_baseline.plot_mistakes(logits, tiny, options)
    assert (tmp_path / "all_right_mistakes.png").exists()


def test_divergence_is_reported_and_ends_with_exit_code_1(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --lr 1e30"
    with pytest.raises(SystemExit, match=r"^training diverged: .*$"):
        q1_baseline.main(arguments.split())
    check_outputs(tmp_path, seeds=1)
    for run in results(tmp_path)["runs"].values():
        assert run["seeds"][0]["health"] == ["diverged"]


SCRIPTS = [path.relative_to(ROOT) for path in ROOT.glob("q*/*.py")]
SCRIPTS += [path.relative_to(ROOT) for path in ROOT.glob("q*.py")]


@pytest.mark.parametrize("script", sorted(map(str, SCRIPTS)))
def test_help_names_the_claim_and_the_options(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(ROOT / script, run_name="__main__")
    said = capsys.readouterr().out
    for word in ("Expect", "Why", "Run", "--epochs", "--seeds", "--device", "--out-dir"):
        assert word in said
    assert end.value.code == 0 and "None" not in said
