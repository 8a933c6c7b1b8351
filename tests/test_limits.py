"""Limits of the machine: CPU quota, affinity, OpenMP's own limits and binding, and memory. The tests set them on their
own child processes only."""

import os
import re
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
from conftest import MNIST_DIR, ROOT, needs_mnist, run_script

import common

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity and OpenMP's functions are read on Linux")
needs_two_cores = pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
VERSION_1 = "3:memory:/elsewhere\n2:cpu,cpuacct:/a/b\n0::/"


def run_program(folder, text, preexec_fn=None, **environment):
    """The words that a program prints which begins with `import common`."""
    program = folder / "program.py"
    program.write_text(
        f"import ctypes, os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nimport common\n{text}"
    )
    options = {"cwd": folder, "env": {**os.environ, **environment}, "preexec_fn": preexec_fn, "timeout": 60}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


# ---- Cores -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),  # of the cgroup above
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, 2),
        ("0::/a/b", {"cpu.max": "250000 100000"}, 2),  # in a container; rounded down
        ("0::/a/b", {"a/b/cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"a/c/cpu.max": "100000 100000"}, 8),  # of another cgroup
        ("0::/a/b", {}, 8),
        (VERSION_1, {"cpu/a/b/cpu.cfs_quota_us": "150000", "cpu/a/b/cpu.cfs_period_us": "50000"}, 3),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (VERSION_1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cpu_quota_of_a_cgroup_is_respected(own, files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "allowed_cores", lambda: set(range(8)))
    for name, text in {**files, "own": own}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert common.usable_cores(tmp_path, tmp_path / "own") == cores


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert common.usable_cores(tmp_path, tmp_path / "missing") == len(common.allowed_cores())


def last_core():
    return {max(os.sched_getaffinity(0))}


@needs_linux
@pytest.mark.slow
def test_cores_are_those_of_the_affinity_whatever_openmp_says(tmp_path):
    """A child with one core, OMP_NUM_THREADS=3 and bound threads."""
    only_one = partial(os.sched_setaffinity, 0, last_core())
    environment = {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "true"}
    assert run_program(tmp_path, "print(common.CORES)", only_one, **environment) == ["1"]


# ---- Threads ---------------------------------------------------------------------------------------------------------
BACKWARD = """
common.setup(2)
layers = torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.Conv2d(32, 64, 3, padding=1)
torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)(torch.randn(64, 1, 28, 28)).sum().backward()
print(torch.get_num_threads(), ctypes.CDLL(None).omp_get_dynamic())
"""


@needs_linux
@pytest.mark.parametrize(
    ("name", "value", "granted"),
    [
        ("OMP_THREAD_LIMIT", "1", "1"),
        pytest.param("OMP_MAX_ACTIVE_LEVELS", "0", "1", marks=pytest.mark.slow),
        pytest.param("OMP_DYNAMIC", "true", "2", marks=pytest.mark.slow),  # switched off: it depends on the load
        pytest.param("OMP_THREAD_LIMIT", "2", "2", marks=pytest.mark.slow),
    ],
)
def test_backward_pass_ends_whatever_openmp_grants(name, value, granted, tmp_path):
    assert run_program(tmp_path, BACKWARD, **{name: value}) == [granted, "0"]


@needs_linux
@needs_two_cores
@pytest.mark.slow
def test_script_reports_the_threads_that_openmp_grants(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --epochs 1 --limit 200 --only baseline --threads 2"
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    code, out, err = run_script("q1_baseline.py", arguments, cwd=tmp_path, env=environment)
    assert code == 0 and "1 at a time, 1 thread(s) each" in out, err
    assert '"threads": 1,' in (tmp_path / "out" / "q1_baseline.json").read_text()


def test_threads_cannot_be_measured_everywhere(monkeypatch):
    monkeypatch.setattr(common, "NATIVE", None)  # as on macOS and Windows
    assert common.granted_threads(5) == 5


def test_threads_beyond_the_cores_are_bounded_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "setup", lambda threads: None)
    monkeypatch.setattr(common, "usable_cores", lambda: 4)

    def parse(threads):
        arguments = ["--out-dir", str(tmp_path), "--threads", threads]
        return common.parse_args(ROOT / "q1_baseline.py", "", {"a": {}}, arguments).threads, capsys.readouterr().out

    assert parse("4") == (4, "")
    threads, out = parse("100000")
    assert threads == 4 and re.fullmatch(r"--threads 100000: only 4 core\(s\) .*\n", out)


@pytest.mark.slow
def test_script_with_far_too_many_threads_trains(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --epochs 1 --limit 200 --only baseline --threads 100000"
    code, out, err = run_script("q1_baseline.py", arguments, cwd=tmp_path)
    assert code == 0 and out.count("--threads 100000: only") == 1, err


# ---- Binding ---------------------------------------------------------------------------------------------------------
WORKERS = """
def train(*_, **settings):
    with open("cores", "a") as file:
        print(*sorted(os.sched_getaffinity(0)), file=file)
    raise ValueError

if __name__ == "__main__":
    data = common.split_data(*common.draw_digits(60, 0), *common.draw_digits(20, 1), "synthetic digits")
    fingerprint = {"test": False, "precision": "fp32"}
    runs = [common.Run(name, {}, 0, fingerprint, 1, common.Path("runs", name)) for name in "abcd"[:COUNT]]
    for run in common.train_in_processes(train, data, runs, 2, print):
        pass
    print(*sorted(os.sched_getaffinity(0)))
"""


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("only", ["all", "last"])
@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores"])
def test_worker_processes_are_not_bound_to_one_core(variable, only, count, tmp_path):
    """They may use all cores that the user left to the first process (as `taskset` does)."""
    cores = os.sched_getaffinity(0) if only == "all" else last_core()
    name, value = variable.split("=")
    limit = partial(os.sched_setaffinity, 0, cores)
    expected = [str(core) for core in sorted(cores)]
    assert run_program(tmp_path, WORKERS.replace("COUNT", str(count)), limit, **{name: value}) == expected
    if count:
        assert (tmp_path / "cores").read_text().splitlines() == [" ".join(expected)] * count


# ---- Memory ----------------------------------------------------------------------------------------------------------
class KilledPool:
    """Stands for ProcessPoolExecutor when a worker has been killed."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *_):
        future = Future()
        future.set_exception(BrokenProcessPool())
        return future


@pytest.fixture
def killed_line(tiny, monkeypatch):
    """The line that ends the program when a worker was killed."""
    monkeypatch.setattr(common, "ProcessPoolExecutor", KilledPool)
    monkeypatch.setenv("OMP_PROC_BIND", "false")  # restored at the end
    with pytest.raises(SystemExit) as end:
        list(common.train_in_processes(None, tiny, ["a run"], 2, None))
    return end.value.code


def test_killed_worker_s_line_says_how_much_memory_one_worker_needs(killed_line):
    assert re.search(r"probably out of memory; --workers 1 needs about [\d.]+ GB .*; --resume continues$", killed_line)


@needs_linux
@needs_mnist
@pytest.mark.slow
def test_one_worker_needs_the_memory_that_the_line_says(killed_line, tmp_path):
    said = float(re.search(r"([\d.]+) GB", killed_line)[1])
    arguments = f"--data-dir {MNIST_DIR} --out-dir . --epochs 1 --limit 6000 --workers 1".split()
    process = subprocess.Popen([sys.executable, ROOT / "q1_baseline.py", *arguments], cwd=tmp_path, stdout=-3)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0 and 0.75 * said < usage.ru_maxrss * 1024 / 1e9 < 1.15 * said
