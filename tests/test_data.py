"""Data: files are checked before use and downloaded completely or not at all; the split is fixed; the synthetic digits
are deterministic and framed like MNIST."""

import gzip
import shutil
import subprocess
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from conftest import MNIST_DIR, Quiet, downloads_from, load, needs_mnist, write_mnist

import common


def as_bytes(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_split_is_fixed_disjoint_and_complete(mnist_folder):
    first, second = load(mnist_folder), load(mnist_folder)
    assert [len(part.labels) for part in first[:3]] == [880, 80, 200]
    for one, other in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one.images, other.images)
    both = torch.cat([first.train.images, first.val.images])
    assert as_bytes(both) == as_bytes(common.read_mnist(mnist_folder)[0])


def test_limit_shortens_the_training_split_only(mnist_folder):
    full, limited = load(mnist_folder), load(mnist_folder, limit=100)
    assert torch.equal(limited.train.images, full.train.images[:100])
    assert torch.equal(limited.val.images, full.val.images)
    assert torch.equal(limited.test.labels, full.test.labels)


def test_normalize_agrees_with_torchvision(tiny):
    from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor

    steps = ToPILImage(), ToTensor(), Normalize((0.1307,), (0.3081,))
    for image in tiny.train.images[:5]:
        expected = Compose(steps)(image)
        torch.testing.assert_close(common.normalize(image), expected, atol=1e-5, rtol=0)


def test_normalize_does_not_change_its_argument():
    images = torch.full((1, 1, 28, 28), 255.0)
    common.normalize(images)
    assert images.eq(255).all()


def test_batches_hold_every_image_once_with_its_label(tiny):
    shuffle_rng = torch.Generator().manual_seed(3)
    seen = list(common.batches(tiny.train, 100, shuffle_rng))
    assert [len(labels) for _, labels in seen] == [100] * 8 + [80]
    images, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for digit in range(10):
        mine = common.normalize(tiny.train.images[tiny.train.labels == digit])
        assert as_bytes(images[labels == digit]) == as_bytes(mine)
    assert not torch.equal(labels, tiny.train.labels)


@needs_mnist
def test_real_mnist_has_the_published_sizes_and_statistics():
    digits = load(MNIST_DIR)
    assert [len(part.labels) for part in digits[:3]] == [55_000, 5_000, 10_000]
    pixels = torch.cat([digits.train.images, digits.val.images]).double() / 255
    statistics = round(pixels.mean().item(), 4), round(pixels.std().item(), 4)
    assert statistics == (common.MEAN, common.STD)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"0")


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def make_html(path):
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>" * 20)


def make_empty(path):
    path.write_bytes(b"")


def drop_one(path):
    """One item fewer, with a header that agrees: only the other file of the pair shows it."""
    content = path.read_bytes()
    count = int.from_bytes(content[4:8], "big") - 1
    size = 784 if "images" in path.name else 1
    path.write_bytes(content[:4] + count.to_bytes(4, "big") + content[8:-size])


def make_label_ten(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")


def compress_and_truncate(path):
    """Only the gzipped file is left, and that is truncated."""
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


def compress_html(path):
    make_html(path)
    path.rename(path.with_name(f"{path.name}.gz"))


DAMAGES = truncate, extend, compress, make_html, make_empty, drop_one, compress_and_truncate, compress_html
CASES = [(damage, name) for name in common.MNIST_FILES for damage in DAMAGES]
CASES += [(make_label_ten, name) for name in common.MNIST_FILES if "labels" in name]


@pytest.mark.parametrize(("damage", "name"), CASES)
@pytest.mark.parametrize("data", ["mnist", "auto"])
def test_corrupt_file_is_one_line_that_names_it(damage, name, data, mnist_folder, tmp_path):
    shutil.copytree(mnist_folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "MNIST" / "raw" / name)
    with pytest.raises(SystemExit) as end:
        load(tmp_path, data)
    line = end.value.code
    assert "\n" not in line and str(tmp_path) in line and name.split("-")[0] in line


def test_gzipped_files_are_read_as_they_are(mnist_folder, tmp_path):
    for path in shutil.copytree(mnist_folder, tmp_path, dirs_exist_ok=True).rglob("*-ubyte"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for part, other in zip(load(tmp_path)[:3], load(mnist_folder)[:3], strict=True):
        assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)


class Drip(BaseHTTPRequestHandler):
    """A byte now and then: every read succeeds, and the file never ends."""

    log_message = Quiet.log_message

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            for _ in range(1000):
                self.wfile.write(b"0")
                time.sleep(0.05)
        except OSError:
            pass


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_processes_that_start_together_on_an_empty_folder_all_get_the_data(mirror, tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import common
from conftest import load
common.DOWNLOAD = {mirror!r}
digits = load({str(tmp_path / "data")!r})
print("sum", len(digits.train.labels), int(digits.train.images.sum()))
"""
    command, pipes = [sys.executable, "-c", program], {"stdout": -1, "stderr": -1}
    workers = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    sums = {out.splitlines()[-1] for out, _ in outputs}
    assert len(sums) == 1 and sums.pop().startswith("sum 880 ")
    assert files_below(tmp_path / "data") == sorted(common.MNIST_FILES)


@pytest.mark.slow
def test_only_missing_files_are_downloaded(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DOWNLOAD", mirror)
    raw = write_mnist(tmp_path / "data") / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").unlink()
    there = raw / "train-labels-idx1-ubyte"
    before = there.stat().st_mtime_ns
    assert len(load(tmp_path / "data").train.labels) == 880
    assert there.stat().st_mtime_ns == before


NO_SERVER = "http://127.0.0.1:9/"  # a port at which no server listens


@pytest.mark.parametrize("trouble", ["no server", "not the files", pytest.param("too slow", marks=pytest.mark.slow)])
def test_a_failed_download_leaves_nothing_and_says_why(trouble, serve, tmp_path, monkeypatch):
    handlers = {"not the files": partial(Quiet, directory=tmp_path), "too slow": Drip}
    address = serve(handlers[trouble]) if trouble in handlers else NO_SERVER
    monkeypatch.setattr(common, "DOWNLOAD", downloads_from([address]))
    monkeypatch.setattr(common, "DOWNLOAD_SECONDS", 8 if trouble == "not the files" else 4)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        load(tmp_path / "data")
    assert time.monotonic() - started < 20
    assert "\n" not in end.value.code and "--data-dir" in end.value.code
    assert not files_below(tmp_path / "data")


def test_auto_falls_back_to_the_synthetic_digits_with_a_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "DOWNLOAD", downloads_from([NO_SERVER]))
    draw = common.draw_digits
    fewer = lambda count, seed: draw(count // 100, seed)
    monkeypatch.setattr(common, "draw_digits", fewer)
    assert load(tmp_path, "auto").name == "synthetic digits"
    said = capsys.readouterr().err
    assert "WARNING" in said and "synthetic digits" in said and "--data-dir" in said


def test_synthetic_digits_are_deterministic():
    images, labels = common.draw_digits(2000, seed=5)
    again = common.draw_digits(2000, seed=5)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, common.draw_digits(2000, seed=6)[0])
    assert images.shape == (2000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount(minlength=10).min() > 150


def test_synthetic_digits_are_framed_like_mnist():
    """In a box of about 20 pixels, with the centre of mass in the middle."""
    ink = common.draw_digits(1000, seed=5)[0].squeeze(1).double()
    place = torch.arange(28.0, dtype=torch.float64)
    for profile in (ink.sum(1), ink.sum(2)):  # columns, rows
        centre = (profile * place).sum(1) / profile.sum(1)
        assert abs(centre.mean() - 14.0) < 0.1 and (centre - 14.0).abs().max() < 1.6
    inked = ink > 100
    extent = torch.stack([inked.any(1).sum(1), inked.any(2).sum(1)]).amax(0)
    assert extent.min() >= 16 and extent.max() <= 22
