"""Data: the real files are checked before use, downloaded whole or not at all; the stand-in is deterministic."""

import gzip
import hashlib
import shutil
import subprocess
import sys
import threading
import time
from http.server import (
    BaseHTTPRequestHandler,
    SimpleHTTPRequestHandler,
    ThreadingHTTPServer,
)

import pytest
import torch
from conftest import MNIST_DIR, ROOT, needs_mnist, write_mnist

import common


def test_split_is_fixed_disjoint_and_complete(mnist_folder):
    first, second = (common.load_digits(mnist_folder, "mnist") for _ in range(2))
    assert [len(part.labels) for part in first[:3]] == [880, 80, 200]
    assert all(
        torch.equal(a.images, b.images)
        for a, b in zip(first[:3], second[:3], strict=True)
    )
    original = common.read_mnist(mnist_folder)[0]
    together = torch.cat([first.train.images, first.val.images])
    assert sorted(image.numpy().tobytes() for image in together) == sorted(
        image.numpy().tobytes() for image in original
    )


def test_limit_keeps_the_first_training_images_and_nothing_else_changes(mnist_folder):
    whole, limited = (
        common.load_digits(mnist_folder, "mnist"),
        common.load_digits(mnist_folder, "mnist", limit=100),
    )
    assert torch.equal(limited.train.images, whole.train.images[:100])
    assert torch.equal(limited.val.images, whole.val.images) and torch.equal(
        limited.test.labels, whole.test.labels
    )


def test_normalize_agrees_with_torchvision(tiny):
    from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor

    oracle = Compose([ToPILImage(), ToTensor(), Normalize((0.1307,), (0.3081,))])
    for image in tiny.train.images[:5]:
        torch.testing.assert_close(
            common.normalize(image), oracle(image), atol=1e-5, rtol=0
        )


def test_batches_hold_every_image_once_and_keep_their_labels(tiny):
    seen = list(common.batches(tiny.train, 100, torch.Generator().manual_seed(3)))
    assert [len(labels) for _, labels in seen] == [100] * 8 + [80]
    pairs = {
        (image.numpy().tobytes(), label.item())
        for images, labels in seen
        for image, label in zip(images, labels, strict=True)
    }
    assert pairs == {
        (common.normalize(i).numpy().tobytes(), y.item())
        for i, y in zip(*tiny.train, strict=True)
    }


@needs_mnist
def test_real_mnist_has_the_published_sizes_and_statistics():
    digits = common.load_digits(MNIST_DIR, "mnist")
    assert [len(part.labels) for part in digits[:3]] == [
        55_000,
        5_000,
        10_000,
    ] and digits.source == "MNIST"
    pixels = torch.cat([digits.train.images, digits.val.images]).double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (
        common.MEAN,
        common.STD,
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"0")


def make_html(path):
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>" * 20)


def make_empty(path):
    path.write_bytes(b"")


def drop_one(path):
    """One item fewer, with a header that agrees: only the other file of the pair gives it away."""
    content = path.read_bytes()
    count = int.from_bytes(content[4:8], "big")
    size = 784 if "images" in path.name else 1
    path.write_bytes(content[:4] + (count - 1).to_bytes(4, "big") + content[8:-size])


def spoil_label(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")


DAMAGE = [
    (damage, name)
    for name in common.MNIST_FILES
    for damage in (truncate, extend, make_html, make_empty, drop_one)
]
DAMAGE += [(spoil_label, common.MNIST_FILES[1]), (spoil_label, common.MNIST_FILES[3])]


@pytest.mark.parametrize(("damage", "name"), DAMAGE)
@pytest.mark.parametrize("source", ["mnist", "auto"])
def test_a_broken_file_is_one_line_that_names_it(
    damage, name, source, mnist_folder, tmp_path
):
    folder = tmp_path / "data"
    shutil.copytree(mnist_folder, folder)
    damage(folder / "MNIST" / "raw" / name)
    with pytest.raises(SystemExit) as end:
        common.load_digits(folder, source)
    assert (
        "\n" not in end.value.code
        and name.split("-")[0] in end.value.code
        and str(folder) in end.value.code
    )


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Drip(BaseHTTPRequestHandler):
    """Sends a byte now and then, for ever: every read succeeds, the file never ends."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"0")
                time.sleep(0.05)
        except OSError:
            pass


@pytest.fixture
def serve(tmp_path):
    """serve(handler) starts a server on this machine and returns its address."""
    servers = []

    def start(handler):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mirror(serve, tmp_path):
    """A mirror of a small MNIST: (address, list of (file, md5)) as torchvision's MNIST.mirrors and .resources want it."""
    raw, site = write_mnist(tmp_path / "origin") / "MNIST" / "raw", tmp_path / "site"
    site.mkdir()
    for name in common.MNIST_FILES:
        (site / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    resources = [
        (f"{name}.gz", hashlib.md5((site / f"{name}.gz").read_bytes()).hexdigest())
        for name in common.MNIST_FILES
    ]
    return serve(lambda *a: Quiet(*a, directory=site)), resources


def test_processes_that_start_together_on_an_empty_folder_all_get_the_data(
    mirror, tmp_path
):
    address, resources = mirror
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, torchvision.datasets as d; from pathlib import Path\n"
        f"d.MNIST.mirrors, d.MNIST.resources = [{address!r}], {resources!r}\n"
        f"digits = common.load_digits(Path({str(tmp_path / 'data')!r}), 'mnist')\n"
        "print(len(digits.train.labels), int(digits.train.images.sum()))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=-1, stderr=-1, text=True
        )
        for _ in range(3)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    assert len({out for out, _ in outputs}) == 1 and outputs[0][0].startswith("880 ")
    left = sorted(
        path.name for path in (tmp_path / "data").rglob("*") if path.is_file()
    )
    assert left == sorted(common.MNIST_FILES)


def test_only_the_missing_files_are_replaced(mirror, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [mirror[0]])
    monkeypatch.setattr(MNIST, "resources", mirror[1])
    raw = write_mnist(tmp_path / "data") / "MNIST" / "raw"
    (raw / common.MNIST_FILES[0]).unlink()
    kept = (raw / common.MNIST_FILES[1]).stat().st_mtime_ns
    assert len(common.load_digits(tmp_path / "data", "mnist").train.labels) == 880
    assert (raw / common.MNIST_FILES[1]).stat().st_mtime_ns == kept


@pytest.mark.parametrize("trouble", ["nobody there", "not the files", "too slow"])
def test_a_failed_download_leaves_nothing_and_says_why(
    trouble, serve, tmp_path, monkeypatch
):
    from torchvision.datasets import MNIST

    address = {
        "nobody there": lambda: "http://127.0.0.1:9/",
        "too slow": lambda: serve(Drip),
    }.get(trouble, lambda: serve(lambda *a: Quiet(*a, directory=tmp_path)))()
    monkeypatch.setattr(MNIST, "mirrors", [address])
    monkeypatch.setattr(common, "DOWNLOAD_SECONDS", 2)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        common.load_digits(tmp_path / "data", "mnist")
    assert time.monotonic() - started < 30
    assert "\n" not in end.value.code and "--data-dir" in end.value.code
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_auto_falls_back_to_the_stand_in_with_a_warning(monkeypatch, tmp_path, capsys):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    draw = common.draw_digits
    monkeypatch.setattr(
        common, "draw_digits", lambda count, seed: draw(count // 100, seed)
    )
    digits = common.load_digits(tmp_path, "auto")
    assert digits.source == "synthetic stand-in"
    assert (
        "WARNING" in (said := capsys.readouterr().err)
        and "stand-in" in said
        and "--data-dir" in said
    )


def test_stand_in_is_deterministic_and_framed_like_mnist():
    images, labels = common.draw_digits(2000, seed=5)
    again, labels_again = common.draw_digits(2000, seed=5)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, common.draw_digits(2000, seed=6)[0])
    assert (
        images.shape == (2000, 1, 28, 28)
        and images.dtype == torch.uint8
        and labels.dtype == torch.int64
    )
    assert labels.bincount(minlength=10).min() > 150
    ink = images.squeeze(1).double()
    place = torch.arange(28.0, dtype=torch.float64)
    for profile in (ink.sum(1), ink.sum(2)):  # columns, rows
        centre = (profile * place).sum(1) / profile.sum(1)
        assert (centre - 13.5).abs().max() < 2.5
    inked = ink > 100
    extent = torch.stack([inked.any(1).sum(1), inked.any(2).sum(1)]).amax(0)
    assert extent.min() >= 16 and extent.max() <= 22
