"""Shared by the tests: small data sets drawn by the stand-in, and scripts run as a user runs them."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

MNIST_DIR = Path(os.environ.get("MNIST_DIR") or ROOT / "data")
needs_mnist = pytest.mark.skipif(
    not all((MNIST_DIR / "MNIST" / "raw" / name).exists() for name in common.MNIST_FILES),
    reason="real MNIST is not here: set MNIST_DIR",
)


def load(folder, data="mnist", limit=None):
    """`load_digits` as the command line would call it."""
    options = {"data_dir": Path(folder), "data": data, "limit": limit, "device": "cpu"}
    return common.load_digits(argparse.Namespace(**options))


@pytest.fixture(scope="session")
def tiny():
    """880 training, 80 validation and 200 test digits of the stand-in."""
    return common.split_digits(
        *common.draw_digits(960, 0), *common.draw_digits(200, 1), "synthetic stand-in", None, "cpu"
    )


def write_mnist(folder: Path, train: int = 960, test: int = 200) -> Path:
    """A data folder in torchvision's layout, with digits of the stand-in; returns the folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for names, count, seed in ((common.MNIST_FILES[:2], train, 0), (common.MNIST_FILES[2:], test, 1)):
        images, labels = common.draw_digits(count, seed)
        header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        (raw / names[0]).write_bytes(header + images.numpy().tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (2049, count))
        (raw / names[1]).write_bytes(header + labels.to(torch.uint8).numpy().tobytes())
    return folder


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def start_script(script, arguments, cwd, **options):
    """Start a script of the project in a process of its own, from the folder `cwd`."""
    command = [sys.executable, ROOT / script, *arguments.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **pipes, **options)


def run_script(script, arguments, cwd, **options):
    """Run a script to its end: (exit code, stdout, stderr)."""
    process = start_script(script, arguments, cwd, **options)
    out, err = process.communicate(timeout=170)
    return process.returncode, out, err
