"""The scripts as a user runs them, judged by what they print and by the files they leave."""

import importlib
import json
import os
import re

import pytest
import torch
from conftest import (
    MNIST_DIR,
    ROOT,
    SCRIPTS,
    assert_identical,
    call_script,
    load,
    make_run,
    needs_mnist,
    results_in,
    run_script,
    start_script,
    weights_in,
)

import common
import q1_baseline
from q2_variants import variant4_under_25k as variant4
from q2_variants import variant8_most_accurate as variant8
from q4_break import health

PLOTS = {
    "q1_baseline": {"samples", "curves", "confusion", "mistakes"},
    "variant1_kernel_sizes": {"curves"},
    "variant2_batchnorm_gap": {"curves"},
    "variant3_advanced_combo": {"curves"},
    "variant4_under_25k": {"curves", "curves_improved", "augmentation"},
    "variant5_under_10k": {"curves", "curves_improved", "sizes"},
    "variant6_fastest": {"times"},
    "variant7_smallest": {"curves", "frontier"},
    "variant8_most_accurate": {"curves", "errors"},
    "fail_high_lr": {"curves", "steps"},
    "fail_no_dropout": {"curves", "all", "gap"},
    "fail_bad_init": {"curves", "filters"},
}
STUDIES = {"q3_tuning.py", "q4_break/fault_gallery.py"}  # each tested by a file of its own


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in STUDIES])
def test_script_leaves_its_log_its_results_and_its_plots(script, mnist_folder, tmp_path, capsys):
    stem = script.rpartition("/")[2].removesuffix(".py")
    module = call_script(script, "--epochs 2 --seeds 1 --limit 200 --precision fp32", mnist_folder, tmp_path)
    out = capsys.readouterr().out
    runs, log = results_in(tmp_path, stem)
    found = json.loads((tmp_path / f"{stem}.json").read_text())
    assert found["script"] == script
    assert found["data"] == {"source": "MNIST-like data", "train": 200, "val": 80, "test": 200}
    assert found["environment"].keys() == {"python", "torch", "device", "threads", "precision"}
    assert list(runs) == list(module.RUNS)
    assert [row["run"] for row in log if row["epoch"] == "1"] == list(module.RUNS)
    for name, run in runs.items():
        assert run["config"] == {**json.loads(json.dumps(module.RUNS[name])), "epochs": 2}
        assert set(health.alarm_names(run["seeds"][0]["health"])) <= set(health.ALARMS)
        assert re.search(rf"^{re.escape(name)} +{run['parameters']:,} +{run['mean']:.2f} %  +", out, re.MULTILINE)
    files = {f"{stem}_{what}.png" for what in PLOTS[stem]} | {f"{stem}.csv", f"{stem}.json", f"{stem}_runs"}
    if stem == "variant8_most_accurate":
        files.add(f"{stem}_errors.csv")
    assert {path.name for path in tmp_path.iterdir()} == files
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["q1_baseline.py", "q2_variants/variant1_kernel_sizes.py", "q4_break/fail_high_lr.py"]
)
def test_script_runs_from_another_folder(script, mnist_folder, tmp_path):
    """One of each folder, in a process of its own."""
    arguments = f"--data-dir {mnist_folder} --out-dir out --epochs 1 --limit 100 --workers 1"
    code, out, err = run_script(script, arguments, cwd=tmp_path)
    assert code == 0 and not err, err
    assert (tmp_path / "out" / script.rpartition("/")[2].replace(".py", ".json")).exists()


@pytest.fixture(scope="module")
def finished(mnist_folder, tmp_path_factory):
    """The folder of a complete run of Q1 with two seeds."""
    folder = tmp_path_factory.mktemp("finished")
    call_script("q1_baseline.py", "--epochs 4 --seeds 2 --limit 400 --precision fp32 --threads 1", mnist_folder, folder)
    return folder


def test_results_of_q1_agree_with_its_log_and_its_weights(finished, mnist_folder):
    runs, log = results_in(finished, "q1_baseline")
    test = load(mnist_folder).test
    for name, run in runs.items():
        accuracies = torch.tensor([seed["test_accuracy"] for seed in run["seeds"]]).double()
        assert run["mean"] == pytest.approx(accuracies.mean().item(), abs=1e-3)
        assert run["std"] == pytest.approx(accuracies.std().item(), abs=1e-3)
        for seed in run["seeds"]:
            rows = [row for row in log if (row["run"], row["seed"]) == (name, str(seed["seed"]))]
            accuracies = [float(row["val_accuracy"]) for row in rows]
            assert len(accuracies) == seed["epochs"] == 4
            assert seed["val_accuracy"] == max(accuracies) == accuracies[seed["best_epoch"] - 1]
            model = common.baseline_cnn()
            model.load_state_dict(weights_in(finished)[f"{name.replace(' ', '-')}_seed{seed['seed']}.pt"])
            assert seed["test_accuracy"] == common.evaluate(model, test)[1]


def test_confusions_are_counted_by_true_and_predicted_digit(capsys):
    labels = torch.tensor([3, 3, 3, 4, 9])
    logits = torch.nn.functional.one_hot(torch.tensor([5, 5, 3, 9, 9]), 10).float()
    counts = q1_baseline.count_confusions(logits, labels)
    assert counts[3, 5] == 2 and counts[3, 3] == 1 and counts[9, 9] == 1 and counts.sum() == 5
    assert q1_baseline.most_confused(counts) == [(3, 5, 2), (4, 9, 1)]


def test_mistakes_of_several_networks_are_counted_by_hand(capsys):
    labels = torch.tensor([3, 5, 7, 9])
    probabilities = torch.full((3, 4, 10), 0.01)
    answers = [[3, 6, 1, 9], [3, 6, 1, 4], [3, 6, 2, 9]]  # of three networks
    for network, row in enumerate(answers):
        for image, answer in enumerate(row):
            probabilities[network, image, answer] = 0.91
    probabilities[:, 1, 6] = 0.5  # still the largest
    mistakes = q1_baseline.list_mistakes(probabilities, labels)
    assert [mistake[:3] for mistake in mistakes] == [(2, 3, 1), (1, 3, 6), (3, 1, 4)]
    assert [mistake[3] for mistake in mistakes] == pytest.approx([(0.91 + 0.91 + 0.01) / 3, 0.5, (0.91 + 0.02) / 3])
    q1_baseline.print_agreement(probabilities, labels)
    printed = capsys.readouterr().out
    assert "1 in 1, 0 in 2, 2 in 3\n" in printed and "reaches 50.00 %" in printed


def test_errors_are_counted_by_tenths_of_the_test_images():
    wrong = torch.zeros(100, dtype=torch.bool)
    wrong[[0, 1, 45, 99]] = True
    figure = q1_baseline.plot_confusion(torch.eye(10, dtype=torch.int64), wrong, ("first half", "second half"))
    bars = figure.axes[1].patches
    assert [bar.get_height() for bar in bars] == [2, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert "first half\n3 errors" in texts and "second half\n1 errors" in texts


def test_errors_of_networks_and_of_their_ensemble():
    logits = torch.zeros(3, 4, 10)
    labels = torch.tensor([1, 2, 3, 4])
    for network, predicted in enumerate([[1, 7, 3, 4], [1, 7, 3, 5], [1, 7, 3, 5]]):
        logits[network, range(4), predicted] = 1.0
    logits[0, 3, 4] = 100.0  # one network that is sure outweighs two that are not
    results = [make_run(test_logits=row) for row in logits]
    assert variant8.list_errors(results, labels) == [
        {"image": 1, "label": 2, "ensemble": 7, "networks_wrong": 3},
        {"image": 3, "label": 4, "ensemble": 4, "networks_wrong": 2},
    ]


@pytest.mark.slow
def test_two_copies_started_at_once_leave_what_one_leaves(finished, mnist_folder, tmp_path):
    arguments = "--epochs 4 --seeds 2 --limit 400 --precision fp32 --threads 1 --workers 1"
    arguments = f"{arguments} --data-dir {mnist_folder} --out-dir {tmp_path}"
    for process in [start_script("q1_baseline.py", arguments, cwd=tmp_path) for _ in range(2)]:
        _, err = process.communicate(timeout=170)
        assert process.returncode == 0, err
    assert_identical(finished, tmp_path, "q1_baseline")
    assert not list(tmp_path.rglob(".*"))


def test_synthetic_digits_are_named_in_results_and_output(mnist_folder, tmp_path, monkeypatch, capsys):
    draw = common.draw_digits
    titles = []
    monkeypatch.setattr(common, "draw_digits", lambda count, seed: draw(count // 50, seed))
    arguments = f"--data synthetic --limit 100 --epochs 1 --out-dir {tmp_path} --workers 1".split()
    figure = importlib.import_module("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "suptitle", lambda figure, title, **_: titles.append(title))
    q1_baseline.main(arguments)
    assert json.loads((tmp_path / "q1_baseline.json").read_text())["data"]["source"] == "synthetic digits"
    out = capsys.readouterr().out
    assert "synthetic digits" in out and "MNIST" not in out
    assert len(titles) == 4 and all(title.startswith("[synthetic digits] ") for title in titles)


@needs_mnist
@pytest.mark.slow
def test_q1_learns_real_mnist(tmp_path):
    call_script("q1_baseline.py", "--limit 4000 --epochs 2 --only baseline", MNIST_DIR, tmp_path)
    found = json.loads((tmp_path / "q1_baseline.json").read_text())
    assert found["data"] == {"source": "MNIST", "train": 4_000, "val": 5_000, "test": 10_000}
    assert found["runs"]["baseline"]["mean"] > 92


def test_only_trains_one_network(mnist_folder, tmp_path):
    call_script("q2_variants/variant4_under_25k.py", "--epochs 1 --limit 50 --only squeeze", mnist_folder, tmp_path)
    runs, _ = results_in(tmp_path, "variant4_under_25k")
    assert list(runs) == ["squeeze", "squeeze improved"]


BAD = "--epochs=0 --epochs=-1 --epochs=1.5 --batch-size=0 --batch-size=many --lr=0 --lr=-0.1 --lr=nan --lr=inf "
BAD += "--seeds=0 --seed=-1 --limit=0 --workers=0 --threads=0 --device=tpu --precision=fp8 --data=cifar --layers=3"


@pytest.mark.parametrize("argument", [*BAD.split(), "--only=LeNet"])
def test_bad_option_is_one_line_that_names_it(argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        variant4.main([argument, "--out-dir", str(tmp_path)])
    line, (option, value) = capsys.readouterr().err, argument.split("=")
    assert end.value.code == 2 and line.count("\n") == 1
    assert option in line and value in line
    assert option != "--only" or all(name in line for name in variant4.RUNS)


def test_seed_and_seeds_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--seed", "1", "--seeds", "5"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_missing_device_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(common, "available_devices", lambda: ["cpu"])
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--device", "cuda"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and "--device cuda" in line and line.count("\n") == 1


def test_each_of_torchruns_ranks_has_a_gpu_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "available_devices", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(common, "has_native_bf16", lambda device: True)
    used = []

    def device(*options):
        return common.parse_args(q1_baseline.__file__, "", {}, ["--out-dir", str(tmp_path), *options]).device

    assert device() == torch.device("cuda")
    monkeypatch.setattr(common, "TORCHRUN", True)
    monkeypatch.setattr(common, "LOCAL_RANK", 3)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device() == torch.device("cuda", 3) and device("--device", "cpu") == torch.device("cpu")
    assert used == [torch.device("cuda", 3)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(SystemExit) as end:
        device()
    assert end.value.code == 2 and "no GPU; there are 3" in capsys.readouterr().err


def test_output_folder_is_tried_before_the_training(tmp_path, mnist_folder, capsys):
    (tmp_path / "file").write_text("not a folder")
    folder = str(tmp_path / "file" / "out")
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--out-dir", folder, "--data-dir", str(mnist_folder)])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1 and not printed.out
    assert "--out-dir" in printed.err and folder in printed.err


def test_single_image_is_enough(mnist_folder, tmp_path):
    call_script("q1_baseline.py", "--limit 1 --epochs 1", mnist_folder, tmp_path)
    assert (tmp_path / "q1_baseline.json").exists()


def test_gallery_without_mistakes_is_empty(tiny, tmp_path):
    certain = torch.nn.functional.one_hot(tiny.test.labels, 10).float().unsqueeze(0)
    mistakes = q1_baseline.list_mistakes(certain, tiny.test.labels)
    assert mistakes == []
    common.save_plot(tmp_path / "mistakes.png", "no mistakes", "MNIST", q1_baseline.plot_mistakes, [], tiny.test)
    assert (tmp_path / "mistakes.png").stat().st_size > 1000


def test_divergence_is_reported_and_ends_with_exit_code_1(mnist_folder, tmp_path):
    with pytest.raises(SystemExit, match=r"^training diverged: baseline, constant learning rate; .*$"):
        call_script("q1_baseline.py", "--lr 1e30", mnist_folder, tmp_path)
    for run in results_in(tmp_path, "q1_baseline")[0].values():
        assert run["seeds"][0]["health"] == ["diverged"]


def check_claims(alarms, expected, claims=()):
    result = make_run(history=common.History(health=alarms))
    health.check_claims([*claims, *health.health_claims(expected, {"run": [result]})])


def test_true_claims_are_a_reproduced_failure(capsys):
    check_claims(["diverged"], {"run": "diverged"}, [("it fails", True)])
    check_claims([], {})
    out = capsys.readouterr().out
    assert "yes it fails" in out and out.count("failure reproduced") == 2


@pytest.mark.parametrize(
    ("alarms", "expected", "claims"),
    [
        ([], {"run": "diverged"}, []),  # a missed alarm
        (["overfitting"], {}, []),  # a false alarm
        (["dead ReLUs"], {"run": "diverged"}, []),
        ([], {}, [("it fails", False)]),
    ],
)
def test_false_claim_ends_with_exit_code_1(alarms, expected, claims, capsys):
    with pytest.raises(SystemExit, match="^failure not reproduced"):
        check_claims(alarms, expected, claims)
    assert "NO  " in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_states_the_finding_and_the_options(script, capsys):
    with pytest.raises(SystemExit) as end:
        module_of(script).main(["--help"])
    out = capsys.readouterr().out
    for word in ("Expect", "Why", "Run", "--epochs", "--seeds", "--device", "--out-dir"):
        assert word in out
    assert end.value.code == 0 and "None" not in out


@pytest.mark.slow
def test_denormal_numbers_are_flushed_in_all_threads(tmp_path):
    """A thread takes the setting over when it starts, at the first large computation."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nimport common\n"
        f"common.parse_args({str(ROOT / 'q1_baseline.py')!r}, '', {{'a': {{}}}}, ['--out-dir', '.'])\n"
        "print((torch.full((1 << 22,), 1e-39) * 0.5).count_nonzero().item(), torch.get_num_threads())"
    )
    code, out, err = run_script(program, "", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert code == 0 and out == "0 2\n", err


def test_help_loads_neither_matplotlib_nor_torchvision(tmp_path):
    """They take seconds on a slow machine."""
    program = tmp_path / "program.py"
    names = [script.removesuffix(".py").replace("/", ".") for script in SCRIPTS]
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {', '.join(names)}\n"
        "print([name for name in ('matplotlib', 'torchvision') if name in sys.modules])"
    )
    code, out, err = run_script(program, "", cwd=tmp_path)
    assert code == 0 and out == "[]\n", err
