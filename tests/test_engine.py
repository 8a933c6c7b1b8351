"""The engine: the same results with any number of workers, also after kills; and one line for what goes wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import engine_script
import pytest
import torch
from conftest import ROOT, assert_identical, needs_proc, results_in, run_script, start_script, weights_in

import common

SCRIPT = "tests/engine_script.py"
STEM = "engine_script"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(mnist_folder, tmp_path_factory):
    """The folder of a script that ran in one process, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    engine_script.main(f"--data-dir {mnist_folder} --out-dir {folder} --seeds 2 --workers 1 --threads 1".split())
    return folder


def arguments_for(mnist_folder, more="--workers 2 --threads 1"):
    return f"--data-dir {mnist_folder} --out-dir out --seeds 2 {more}"


def test_results_are_grouped_by_run_in_order_of_runs_and_seeds(finished):
    runs, log = results_in(finished, STEM)
    assert list(runs) == list("abcd")
    assert [[seed["seed"] for seed in run["seeds"]] for run in runs.values()] == [[0, 1]] * 4
    assert [(row["run"], row["seed"], row["epoch"]) for row in log[:4]] == [
        *[("a", "0", epoch) for epoch in "123"],
        ("a", "1", "1"),
    ]
    assert runs["b"]["config"] == engine_script.RUNS["b"]


def test_reported_numbers_are_those_of_the_kept_weights(finished, mnist_folder):
    args = common.parse_args(engine_script.__file__, "", engine_script.RUNS, ["--data-dir", str(mnist_folder)])
    test = common.load_data(args).test
    for seed in results_in(finished, STEM)[0]["a"]["seeds"]:
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 5, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10)
        )
        model.load_state_dict(weights_in(finished)[f"a_seed{seed['seed']}.pt"])
        loss, accuracy, _ = common.evaluate(model, test)
        assert seed["test_accuracy"] == accuracy and seed["test_loss"] == round(loss, 4)


def test_two_workers_end_bit_identical_to_one(finished, mnist_folder, tmp_path):
    code, out, err = run_script(SCRIPT, arguments_for(mnist_folder), cwd=tmp_path)
    assert code == 0, err
    assert_identical(finished, tmp_path / "out", STEM)
    assert out.count("epoch  3/3") == 8 and not err  # one line for each epoch, and no bar on a pipe


def torchrun(arguments, cwd, *more, script=SCRIPT, **environment):
    """Start a script under torchrun, with its output in the file "log"."""
    command = [sys.executable, "-m", "torch.distributed.run", *more, ROOT / script, *arguments.split()]
    with open(cwd / "log", "a") as log:
        return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, env={**ONE_THREAD, **environment})


@pytest.mark.slow
def test_torchrun_ends_bit_identical_to_one_process(finished, mnist_folder, tmp_path):
    process = torchrun(arguments_for(mnist_folder, ""), tmp_path, "--standalone", "--nproc-per-node=2")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert_identical(finished, tmp_path / "out", STEM)


SCRIPTS = {  # a small form of each
    "q1_baseline.py": "--epochs 2 --limit 500 --seeds 2",
    "q2_variants/variant5_under_10k.py": "--epochs 1 --limit 400",
    "q4_break/fail_bad_init.py": "--epochs 1 --limit 400",
    "q3_tuning.py": "--epochs 1 --limit 100 --seed 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_ends_bit_identical_with_one_worker_two_and_torchrun(script, mnist_folder, tmp_path):
    stem = script.rpartition("/")[2].removesuffix(".py")
    arguments = f"{SCRIPTS[script]} --data-dir {mnist_folder} --threads 1"
    for workers in ("1", "2"):
        code, _, err = run_script(script, f"{arguments} --workers {workers} --out-dir {workers}", cwd=tmp_path)
        assert code == 0, err
    start = "--standalone", "--nproc-per-node=2"
    process = torchrun(f"{arguments} --out-dir torchrun", tmp_path, *start, script=script)
    assert process.wait(170) == 0, (tmp_path / "log").read_text()
    assert_identical(tmp_path / "1", tmp_path / "2", stem)
    assert_identical(tmp_path / "1", tmp_path / "torchrun", stem)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def two_nodes(rendezvous, rank, port):
    if rendezvous == "static":
        return f"--node-rank={rank}", "--master-addr=localhost", f"--master-port={port}"
    return "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf=is_host={1 - rank}"


def descendants_of(pid):
    """Process numbers of the children of a process, of theirs, and so on."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:  # the parent follows the state, which follows the name in brackets
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(path.parent.name))
        except OSError:
            pass
    return [*children, *(pid for child in children for pid in descendants_of(child))]


@pytest.mark.slow
@pytest.mark.parametrize("early", [0, 1])
def test_rank_that_dies_before_it_meets_the_others_is_started_again(early, finished, mnist_folder, tmp_path):
    start = "--standalone", "--nproc-per-node=2", "--max-restarts=2"
    process = torchrun(arguments_for(mnist_folder, ""), tmp_path, *start, EARLY=str(early))
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert_identical(finished, tmp_path / "out", STEM)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_whose_rank_is_killed_end_bit_identical(rendezvous, finished, mnist_folder, tmp_path):
    """torchrun starts the ranks again, and finished runs are recognised by their files."""
    port, attempts = free_port(), tmp_path / "attempts"
    nodes = []
    for rank in (0, 1):
        start = "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *two_nodes(rendezvous, rank, port)
        trouble = {"ATTEMPTS": str(attempts), "TROUBLE": "b die once" if rank else ""}
        nodes.append(torchrun(arguments_for(mnist_folder, "--resume"), tmp_path, *start, **trouble))
    for node in nodes:
        assert node.wait(120) == 0, (tmp_path / "log").read_text()
    assert_identical(finished, tmp_path / "out", STEM)
    lines = attempts.read_text().splitlines()
    assert len(set(lines)) == 8 and len(lines) <= 8 + 4  # runs in flight were begun again, finished ones were not


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} was not printed: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("stop", "workers"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_stopped_script_resumes_to_a_bit_identical_end(stop, workers, finished, mnist_folder, tmp_path):
    arguments = arguments_for(mnist_folder, f"--workers {workers} --threads 1")
    with start_script(SCRIPT, arguments, tmp_path) as process:
        wait_for_line(process, "b, seed 0: epoch  2/3")
        children = descendants_of(process.pid) if Path("/proc").exists() else []
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "--resume continues" in out and not err
        assert (tmp_path / "out" / f"{STEM}.csv").exists() and (tmp_path / "out" / f"{STEM}_curves.png").exists()
    assert not (tmp_path / "out" / f"{STEM}.json").exists()  # unfinished, no results
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))  # workers end with the first process
    for path in (tmp_path / "out").rglob(f".*{common.PARTIAL}"):
        os.utime(path, (0, 0))  # as if it were left long ago: younger ones could be another start's
    engine_script.main(
        f"--data-dir {mnist_folder} --out-dir {tmp_path}/out --seeds 2 --workers 1 --threads 1 --resume".split()
    )
    assert_identical(finished, tmp_path / "out", STEM)
    assert not list((tmp_path / "out").rglob(".*"))  # no temporary file is left


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@needs_proc
def test_killed_worker_is_one_line_that_helps(finished, mnist_folder, tmp_path):
    environment = {**os.environ, "TROUBLE": "b die"}
    code, out, err = run_script(SCRIPT, arguments_for(mnist_folder), cwd=tmp_path, env=environment)
    assert code == 1 and err.count("\n") == 1
    assert all(word in err for word in ("memory", "--workers 1", "--resume"))
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path}/out --seeds 2 --workers 1 --threads 1 --resume"
    engine_script.main(arguments.split())
    assert_identical(finished, tmp_path / "out", STEM)


NO_MEMORY = r"RuntimeError: no memory left at all \(engine_script.py, line \d+\)"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_failing_run_is_named_and_the_others_go_on(workers, mnist_folder, tmp_path):
    arguments = arguments_for(mnist_folder, f"--workers {workers} --threads 1")
    code, out, err = run_script(SCRIPT, arguments, cwd=tmp_path, env={**os.environ, "TROUBLE": "b raise"})
    assert code == 1 and err.count("\n") == 1
    for seed in (0, 1):
        assert re.search(rf"^FAILED: b, seed {seed}: {NO_MEMORY}$", out, re.MULTILINE), out
    assert re.match(f"2 of 8 runs failed.*b, seed 0: {NO_MEMORY}; b, seed 1: {NO_MEMORY}", err)
    assert "d, seed 1: epoch  3/3" in out and not (tmp_path / "out" / f"{STEM}.json").exists()


def test_finished_runs_are_not_trained_again(mnist_folder, tmp_path, monkeypatch, capsys):
    attempts = tmp_path / "attempts"
    monkeypatch.setenv("ATTEMPTS", str(attempts))
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --epochs 1 --only a".split()
    engine_script.main(arguments)
    engine_script.main([*arguments, "--seeds", "2", "--resume"])
    assert attempts.read_text().split("\n") == ["a 0", "a 1", ""]
    engine_script.main(arguments)  # without --resume: afresh
    assert attempts.read_text().split("\n") == ["a 0", "a 1", "a 0", ""]


def test_fresh_start_forgets_its_own_checkpoints_only(mnist_folder, tmp_path, monkeypatch):
    folder = tmp_path / f"{STEM}_runs"
    folder.mkdir()
    for name in ("a_seed0.pt", "a_seed0_unfinished.pt", "b_seed0.pt", "notes.txt", "other.pt"):
        (folder / name).write_text("mine")
    monkeypatch.setattr(common, "train_run", lambda *_: sys.exit("enough"))
    with pytest.raises(SystemExit, match="enough"):
        engine_script.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --only a".split())
    assert sorted(path.name for path in folder.iterdir()) == ["b_seed0.pt", "notes.txt", "other.pt"]


def test_fresh_start_leaves_a_finished_run_to_another_start(mnist_folder, tmp_path, monkeypatch):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --epochs 1 --only a"
    engine_script.main(arguments.split())
    path = tmp_path / f"{STEM}_runs" / "a_seed0.pt"
    content = path.read_bytes()
    monkeypatch.setattr(common, "train_run", lambda *_: sys.exit("enough"))
    with pytest.raises(SystemExit, match="enough"):
        engine_script.main(arguments.split())
    assert path.read_bytes() == content
    with pytest.raises(SystemExit, match="enough"):
        engine_script.main([*arguments.split(), "--lr", "0.01"])  # of another configuration
    assert not path.exists()


@pytest.mark.parametrize(("change", "words"), [("--lr 0.01", "lr was 0.001, is 0.01"), ("--limit 100", "data was")])
def test_checkpoints_of_other_runs_are_refused_in_one_line(change, words, mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --threads 1 --epochs 1 --only a"
    engine_script.main(arguments.split())
    with pytest.raises(SystemExit, match=rf"a_seed0.pt is of another configuration \({words}"):
        engine_script.main(f"{arguments} {change} --resume".split())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_malicious_checkpoint_is_not_executed(mnist_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / f"{STEM}_runs"
    folder.mkdir()
    torch.save({"fingerprint": Malicious()}, folder / "a_seed0.pt")
    with pytest.raises(SystemExit, match="not a checkpoint of this project; delete it$"):
        engine_script.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --only a --resume".split())
    assert not Path("executed").exists()


def test_interrupted_fresh_start_does_not_show_an_older_one(mnist_folder, tmp_path, monkeypatch):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1".split()
    engine_script.main(arguments)
    for path in (tmp_path / f"{STEM}_runs").iterdir():
        os.utime(path, (0, 0))
    monkeypatch.setenv("TROUBLE", "b interrupt")
    with pytest.raises(SystemExit) as end:
        engine_script.main(arguments)
    log = (tmp_path / f"{STEM}.csv").read_text().splitlines()[1:]
    assert end.value.code == 130 and [line[0] for line in log] == ["a", "a", "a", "b"]


def test_seeds_of_different_networks_have_no_mean(mnist_folder, tmp_path, monkeypatch):
    """As when a script was edited between a start and its --resume."""
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --epochs 1 --only a"
    engine_script.main(arguments.split())
    monkeypatch.setattr(engine_script.nn, "ReLU", torch.nn.Tanh)
    with pytest.raises(SystemExit, match="^seeds of a are of different networks; run without --resume$"):
        engine_script.main(f"{arguments} --seeds 2 --resume".split())


def test_interrupt_while_workers_start_ends_the_program(mnist_folder, tmp_path, monkeypatch):
    submit = common.ProcessPoolExecutor.submit
    submitted = []

    def interrupt_third(*arguments):
        submitted.append(arguments)
        if len(submitted) == 3:
            raise KeyboardInterrupt
        return submit(*arguments)

    monkeypatch.setattr(common.ProcessPoolExecutor, "submit", interrupt_third)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        engine_script.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 2 --epochs 500".split())
    assert end.value.code == 130 and time.monotonic() - started < 30


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(mnist_folder, tmp_path, capsys):
    engine_script.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --epochs 1 --only a --resume".split())
    assert re.search(r"^nothing to resume in .*_runs: starting afresh$", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / f"{STEM}.json").exists()


def test_resumed_run_keeps_its_threads_unless_others_are_asked_for(mnist_folder, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(common, "CORES", 2)
    monkeypatch.setattr(common, "setup", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --only a --workers 1"
    monkeypatch.setenv("TROUBLE", "a interrupt")
    with pytest.raises(SystemExit):
        engine_script.main(f"{arguments} --threads 1".split())
    monkeypatch.setenv("TROUBLE", "")
    engine_script.main(f"{arguments} --resume".split())  # would take two
    assert used[-1] == 1
    found = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert found["environment"]["threads"] == 1
    engine_script.main(f"{arguments} --seeds 2 --resume".split())  # the finished run counts
    assert used[-1] == 2
    found = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert found["environment"]["threads"] == [1, 2]


def test_full_disk_is_one_line(mnist_folder, tmp_path):
    """A limit of 20 kB to a file stands for the full disk: a checkpoint is larger."""
    resource = pytest.importorskip("resource")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = arguments_for(mnist_folder, "--workers 1")
    code, _, err = run_script(SCRIPT, arguments, cwd=tmp_path, preexec_fn=limit)
    assert code == 1 and re.fullmatch(r"cannot write .*a_seed0_unfinished\.pt: .*\n", err), err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_workers_and_threads_by_default(mnist_folder, tmp_path, monkeypatch, capsys):
    def start(text=""):
        arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --device cpu {text}"
        with pytest.raises(SystemExit, match="enough"):
            engine_script.main(arguments.split())
        return tuple(map(int, re.search(r"(\d+) at a time, (\d+) thread", capsys.readouterr().out).groups()))

    monkeypatch.setattr(common, "CORES", 8)
    monkeypatch.setattr(common, "usable_cores", lambda: 8)
    monkeypatch.setattr(common, "setup", lambda threads: None)
    monkeypatch.setattr(common, "train_runs", lambda *_: sys.exit("enough"))
    assert start() == (4, 2)  # four runs
    assert start("--only a") == (1, 8)
    assert start("--seeds 5") == (8, 1)
    assert start("--seeds 5 --workers 3") == (3, 2)
    assert start("--workers 3 --threads 5") == (3, 5)
    assert start("--workers 99") == (4, 2)
