"""Shared by the tests: small data sets of synthetic digits, and scripts run as a user runs them."""

import csv
import gzip
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on a busy machine several threads are many times slower

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

FILES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("q*.py"), *ROOT.glob("q*/*.py")])
SCRIPTS = [name for name in FILES if name != "q4_break/health.py"]
MNIST_DIR = Path(os.environ.get("MNIST_DIR") or ROOT / "data").resolve()
needs_mnist = pytest.mark.skipif(
    not all((MNIST_DIR / "MNIST" / "raw" / name).exists() for name in common.MNIST_FILES),
    reason="real MNIST is not here: set MNIST_DIR",
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


def load(folder, data="mnist", limit=None):
    """`load_data` as the command line would call it."""
    return common.load_data(SimpleNamespace(data_dir=Path(folder), data=data, limit=limit, device="cpu"))


def be_silent(images, line=""):
    """Instead of `common.print_progress`."""


@pytest.fixture(scope="session")
def tiny():
    """880 training, 80 validation and 200 test digits."""
    return common.split_data(*common.draw_digits(960, 0), *common.draw_digits(200, 1), "synthetic digits")


def write_mnist(folder: Path, train: int = 960, test: int = 200) -> Path:
    """A data folder in torchvision's layout, with synthetic digits; returns the folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    files = list(common.MNIST_FILES)
    for names, count, seed in ((files[:2], train, 0), (files[2:], test, 1)):
        images, labels = common.draw_digits(count, seed)
        header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        (raw / names[0]).write_bytes(header + images.numpy().tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (2049, count))
        (raw / names[1]).write_bytes(header + labels.to(torch.uint8).numpy().tobytes())
    return folder


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def make_run(**outcome):
    """A run that ended so, made by hand."""
    return common.Run("", {}, 0, {}, 1, None, **outcome)


def call_script(script, arguments, data_dir, out_dir):
    """Run a script's main in this process, with one worker unless `arguments` say otherwise."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    module.main(["--workers", "1", "--data-dir", str(data_dir), "--out-dir", str(out_dir), *arguments.split()])
    return module


def default_interrupt():
    """In a child: SIGINT as from a terminal, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_script(script, arguments, cwd, **options):
    """Start a script of the project in a process of its own, from the folder `cwd`."""
    if os.name == "posix":
        options.setdefault("preexec_fn", default_interrupt)
    command = [sys.executable, ROOT / script, *arguments.split()]
    return subprocess.Popen(command, cwd=cwd, stdout=-1, stderr=-1, text=True, **options)


def run_script(script, arguments, cwd, **options):
    """Run a script to its end: (exit code, stdout, stderr)."""
    process = start_script(script, arguments, cwd, **options)
    out, err = process.communicate(timeout=170)
    return process.returncode, out, err


def results_in(folder, stem):
    """The runs of the results file and the log of a script, but for the times."""
    runs = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))["runs"]
    for run in runs.values():
        for seed in run["seeds"]:
            del seed["seconds"]
    with (folder / f"{stem}.csv").open() as file:
        return runs, [{**row, "seconds": ""} for row in csv.DictReader(file)]


def weights_in(folder):
    """The kept weights of all finished runs, by checkpoint."""
    return {path.name: torch.load(path, weights_only=True)["best"] for path in folder.glob("*_runs/*.pt")}


def assert_identical(first, second, stem):
    """Two output folders hold the same results, logs and weights, bit by bit."""
    assert results_in(first, stem) == results_in(second, stem)
    weights = weights_in(first), weights_in(second)
    assert weights[0].keys() == weights[1].keys()
    for name, state in weights[0].items():
        for key, value in state.items():
            assert torch.equal(value, weights[1][name][key]), (name, key)


# ---- Servers on this machine -----------------------------------------------------------------------------------------
class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """serve(handler) starts a server on this machine and returns its address."""
    servers = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.socket.close()


@pytest.fixture
def mirror(serve, tmp_path):
    """A program for `common.DOWNLOAD` that downloads a small MNIST from a server of this machine."""
    raw, site = write_mnist(tmp_path / "origin") / "MNIST" / "raw", tmp_path / "site"
    site.mkdir()
    resources = []
    for name in common.MNIST_FILES:
        content = gzip.compress((raw / name).read_bytes())
        (site / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    return downloads_from([serve(partial(Quiet, directory=site))], resources)


def downloads_from(addresses, resources=None):
    """`common.DOWNLOAD` with other servers and, if given, other files: torchvision's MNIST.resources."""
    first, rest = common.DOWNLOAD.strip().split("\n", 1)
    lines = [first, f"MNIST.mirrors = {addresses!r}"]
    if resources:
        lines.append(f"MNIST.resources = {resources!r}")
    return "\n".join([*lines, rest])
