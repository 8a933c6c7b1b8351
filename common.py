"""What two or more scripts share, in the order in which a run needs it: setup, data,
synthetic stand-in, models, training, plots, reports and command line.

Images are uint8 (N, 1, 28, 28) until `normalize` makes them float; losses are mean
cross-entropies in nats, accuracies are percentages. A foreseeable mistake of the user
ends the program with one line (SystemExit) wherever it is found.
"""

import argparse
import copy
import csv
import ctypes
import io
import itertools
import json
import math
import os
import pickle
import platform
import socket
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

# -------------------------------------------------------------------------------------
# Setup: processor, device, files
# -------------------------------------------------------------------------------------
torch.set_flush_denormal(True)  # denormal numbers are many times slower to multiply
torch.backends.cudnn.deterministic = True  # a resumed run ends in the same bits
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # glibc hands large blocks back to the system and page-faults them in again at the
    # next step; keeping those of up to 1 GiB makes fp32 training a fifth faster.
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(parameter, 1 << 30)


def available_devices() -> list[str]:
    """The types of device that this machine has, the fastest first."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return ["cuda"] * cuda + ["mps"] * mps + ["cpu"]


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself; emulated, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def write_file(path: Path | str, content: bytes) -> None:
    """Write `path` so that anyone, also after a kill, finds the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        sys.exit(f"cannot write {path}: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------
# Data
# -------------------------------------------------------------------------------------
MEAN, STD = 0.1307, 0.3081  # of the training pixels, scaled to 0-1
VAL_SHARE = 12  # one training image in 12 is for validation: 5,000 of 60,000
SPLIT_SEED = 2024  # the same validation images in every run of every script
DOWNLOAD_SECONDS = 120  # for all four files, 11 MB
KINDS = "images-idx3-ubyte", "labels-idx1-ubyte"
MNIST_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in KINDS]


class Split(NamedTuple):
    """`images` uint8 (N, 1, 28, 28) and `labels` int64 (N,), on one device."""

    images: Tensor
    labels: Tensor


def first(split: Split, count: int) -> Split:
    """The first `count` images with their labels."""
    return Split(*(tensor[:count] for tensor in split))


class Digits(NamedTuple):
    """A data set in three parts; `source` is "MNIST" or "synthetic stand-in"."""

    train: Split
    val: Split
    test: Split
    source: str


def normalize(images: Tensor) -> Tensor:
    """Pixels 0-255, uint8 or float -> float32 with MNIST's mean at 0 and deviation 1."""
    return images.float().mul(1 / (255 * STD)).sub_(MEAN / STD)


def load_digits(options) -> Digits:
    """The digits that the command line asks for, on its device (see `parse_options`).

    `options.data`: "mnist" takes MNIST from `data_dir`, in torchvision's layout, and
    downloads it if it is missing; "synthetic" draws the stand-in; "auto" falls back to
    the stand-in, with a warning, where MNIST cannot be had. Broken files always end the
    program: they should be looked at, not papered over. `limit` keeps the first
    training images only.
    """
    folder, wanted = options.data_dir, (options.limit, options.device)
    if options.data != "synthetic":
        try:
            return split_digits(*read_mnist(folder), "MNIST", *wanted)
        except ValueError as error:
            sys.exit(f"{error}; delete the file to download it again")
        except OSError as error:
            reason = f"MNIST is not in {folder} and cannot be downloaded ({error})"
            remedy = "put its files into MNIST/raw there, or give --data-dir"
            if options.data == "mnist":
                sys.exit(f"{reason}; {remedy}")
            print(f"WARNING: {reason}; {remedy}.", file=sys.stderr)
            print("WARNING: this run uses the synthetic stand-in.", file=sys.stderr)
    drawn = *draw_digits(60_000, seed=0), *draw_digits(10_000, seed=1)
    return split_digits(*drawn, "synthetic stand-in", *wanted)


def split_digits(images, labels, test_images, test_labels, source, limit, device):
    """Split the training images by a fixed generator, 11/12 train, 1/12 validation."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    val, train = order.tensor_split([len(labels) // VAL_SHARE])
    train = train[:limit]
    parts = (images[train], labels[train]), (images[val], labels[val])
    parts = *parts, (test_images, test_labels)
    return Digits(*(Split(x.to(device), y.to(device)) for x, y in parts), source)


def read_mnist(data_dir) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 28, 28) and labels (N,), then those of the test split.

    Raises ValueError for a broken file, OSError if one is missing and stays so.
    """
    from torchvision.datasets import MNIST  # late: a second that --help need not wait

    raw = Path(data_dir) / "MNIST" / "raw"
    if missing := [name for name in MNIST_FILES if not (raw / name).exists()]:
        download_mnist(raw, missing)
    check_mnist(raw)
    parts = [MNIST(str(data_dir), train=train) for train in (True, False)]
    return tuple(t for part in parts for t in (part.data.unsqueeze(1), part.targets))


def check_mnist(raw: Path) -> None:
    """ValueError, one line, if one of the four files in `raw` is not what it should be:
    torchvision loads a label file that is too short without a word."""
    counts = []
    for name in MNIST_FILES:
        content = (raw / name).read_bytes()
        shape = (28, 28) if "images" in name else ()
        header = [int.from_bytes(content[i : i + 4], "big") for i in (0, 4, 8, 12)]
        header = header[: 2 + len(shape)]
        if header[0] != 2049 + len(shape) or header[2:] != list(shape):
            raise ValueError(f"{raw / name} is not an MNIST file of its kind")
        if len(content) != 4 * len(header) + header[1] * math.prod(shape):
            raise ValueError(f"{raw / name} is truncated or too long")
        if not shape and max(content[8:], default=0) > 9:
            raise ValueError(f"{raw / name} has labels other than 0-9")
        counts.append(header[1])
    for i in (0, 2):
        if counts[i] != counts[i + 1] or counts[i] < VAL_SHARE:
            found = f"{counts[i]} images, {counts[i + 1]} labels"
            raise ValueError(f"{raw / MNIST_FILES[i]} and its labels differ: {found}")


def download_mnist(raw: Path, names: list[str]) -> None:
    """Download MNIST into a temporary folder and move the files in `names` to `raw`,
    each in one step, once all are whole: scripts that start together cannot disturb
    each other. Raises OSError if that fails or takes longer than DOWNLOAD_SECONDS."""
    from torchvision.datasets import MNIST

    outcome = []

    def download(folder):
        try:
            outcome.append(MNIST(folder, download=True))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported below
            outcome.append(error)

    raw.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(
        dir=raw, prefix=".download-", ignore_cleanup_errors=True
    )
    with temporary as folder:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10)  # a dead connection; the join bounds a slow one
        worker = threading.Thread(target=download, args=(folder,), daemon=True)
        worker.start()
        worker.join(DOWNLOAD_SECONDS)
        socket.setdefaulttimeout(timeout)
        if not outcome:
            raise OSError(f"it takes more than {DOWNLOAD_SECONDS} s")
        if isinstance(outcome[0], Exception):
            raise OSError(str(outcome[0]).rpartition("got:")[2].strip()[:200])
        for name in names:
            os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)


def batches(split: Split, size: int, order: torch.Generator, augment=None):
    """Yield (images float32 (B, 1, 28, 28), labels (B,)), every image once, in an order
    drawn from `order` (on the CPU); the last batch may be smaller. `augment` changes
    the images, as floats 0-255, before they are normalized.

    On resident tensors a batch is one indexing, which needs no worker processes.
    """
    permutation = torch.randperm(len(split.labels), generator=order)
    for rows in permutation.to(split.labels.device).split(size):
        images = split.images[rows]
        if augment:
            images = augment(images.float())
        yield normalize(images), split.labels[rows]


# -------------------------------------------------------------------------------------
# Augmentation: on whole batches, where they lie
# -------------------------------------------------------------------------------------
def affine(images: Tensor, angle: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Turn, scale and move each of `images`, float (B, 1, 28, 28), about its centre.

    angle (B,) in degrees, clockwise; shift (B, 2) in pixels, right and down; scale (B,).
    The same as torchvision's `affine`, bilinear, with 0 beyond the border.
    """
    turn = torch.deg2rad(angle)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    # Where a step to the right or down in the result goes in the image, and its origin;
    # coordinates run from -1 to 1. affine_grid computes the same, several times slower.
    right, down = torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)
    origin = -(right * shift[:, :1] + down * shift[:, 1:]) / 14
    right, down, origin = (t[:, None, None] for t in (right, down, origin))
    place = (torch.arange(28, device=images.device) + 0.5) / 14 - 1
    grid = right * place[:, None] + (down * place[:, None, None] + origin)
    return F.grid_sample(images, grid, align_corners=False)


def random_affine(
    images: Tensor,
    generator: torch.Generator,
    degrees=(),
    shift=0.0,
    scale=0.0,
    crop=0.0,
) -> Tensor:
    """Images, float (B, 1, 28, 28), with 0 as background, each changed in its own way:
    turned by up to +-`degrees` (several turns add up), moved by up to +-`shift` pixels
    and scaled by 1 +- `scale`, all uniform; with probability `crop`, first cut to the
    central 22 x 22 pixels and resized."""

    def uniform(*shape):
        shape = len(images), *shape
        return torch.rand(shape, generator=generator, device=images.device) * 2 - 1

    if crop:
        chosen = (uniform() < 2 * crop - 1).nonzero().flatten()
        centre = images[chosen, :, 3:25, 3:25]
        resized = F.interpolate(centre, size=28, mode="bilinear")
        images = images.index_copy(0, chosen, resized)
    angle = images.new_zeros(len(images))
    for limit in degrees:
        angle += limit * uniform()
    return affine(images, angle, shift * uniform(2), 1 + scale * uniform())


# -------------------------------------------------------------------------------------
# Synthetic stand-in: digits drawn with a pen, for machines without MNIST
# -------------------------------------------------------------------------------------
# Ways to lay a digit by hand, as points of a pen's path: two letters are a point, its
# column and row from a to u in a 21 x 21 grid; "-" lifts the pen. A point named twice
# in a row is a corner. Points named again are the same point, and move with it.
SKELETONS = {
    0: ("kaedbkerkuqrtkqdka nbgbchdpjuprsjpdjbhe jaefdmhtntrmpeja oajceieqjupqrindie"),
    1: "kakkku lakhknju gflalalklu fflalalklu-euluru",
    2: (
        "cfgbmaqeojipcucuktst cfhaobqgmngscsdpiqntts dejapdojhqbtbthsnuts "
        "bdjaqdnkdudusu eghbnbpglmercuguhrmstu fdkaoemmhsdsdoionsup "
        "eekapfnmirdtbqfnkqnutt gdlaoekmdsdsirouss ddjbocnhincscshqmruu"
    ),
    3: (
        "ddjapdoiikikpmrqluds dbqbqbijijplqqkucs ceiapdniiknlrpmufubr "
        "dckapeljgkiimkrplucs ccibobobkfgjgjmjpomtfucr dcoboblgijijnmnqlu "
        "edlapdkihjmlopkueu"
    ),
    4: (
        "eaclclklsk-obnkmu nacncnkntn-nanknu dachflmkpg-qaoknu dbdiikohqaqaokmu "
        "kaggclclklsl-mglnku gbeieikjqh-qapkou iadhcmhnsl-ndnmmu"
    ),
    5: (
        "rafbfbejejlhrmoshubr gbfimiqnmtdt-gbmbsa rbjcgimlnqiubs qbhbhbfifilionktds "
        "sbicicdkdkjiploriudsfp ragdgdekkipjoplu rcfcfcfjfjpkoqdu"
    ),
    6: (
        "oahfdmfsluqqolilep kafiepiuosonjmfq rajgengtnuqpmlgneq gaeiepjuprnmimep "
        "majhhoitmtnplnip pbicdjerlusqrlmkhojs"
    ),
    7: (
        "ccrbrblkiu cfdbdbrbrbmkju ccrbrblkiu-glqk behbpbrdnkju bffcldraranklu "
        "ejedjbpcqipoou dgebebkcqbnkku-gllkrk"
    ),
    8: (
        "qdjaeejjpoluerhlogqd kafekjpeka-kjeokuqokj rckafekkopjueqjkqe "
        "fcegkkppkufqjkpfkafc rbmhhngskunqkkefhanbof pciadfiknhpcmjlpjuhqkk "
        "obhaeeiimmnrkuiqlkqgte"
    ),
    9: (
        "qekbeefklkqeqepmou qekaefikoiqeqmmtft pdiadfgknipdpdnmku pcjafehjnipcollu "
        "pdiacfclhnnjpdpdqmqu qbibdffjljqfonlu fadghjnhpbpboknu rcjaeeiipiooiu"
    ),
}


# Catmull-Rom spline: powers of t (rows), 0 to 3, by the four points about a segment.
SPLINE = torch.tensor([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2


def skeleton_path(text: str) -> tuple[Tensor, Tensor]:
    """The points (K, 2) of a skeleton and the matrix (P, K) that takes them to P places
    along its path, at most 0.8 grid units apart."""
    grid = "abcdefghijklmnopqrstu"
    strokes = [list(zip(s[::2], s[1::2], strict=True)) for s in text.split("-")]
    names = list(dict.fromkeys(point for stroke in strokes for point in stroke))
    points = torch.tensor([[grid.index(x), grid.index(y)] for x, y in names]).float()
    rows = []
    for stroke in strokes:
        ends = [names.index(point) for point in (stroke[0], *stroke, stroke[-1])]
        for four in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
            length = (points[four[1]] - points[four[2]]).norm().clamp(min=0.8).item()
            t = torch.arange(0, 1, 0.8 / length).unsqueeze(1) ** torch.arange(4)
            rows.append(t @ SPLINE @ torch.eye(len(points))[list(four)])
    return points, torch.cat(rows)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw uint8 images (count, 1, 28, 28) and labels (count,); same seed, same bits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pick = torch.rand(count, generator=generator)
    images = torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    for digit, texts in SKELETONS.items():
        texts, rows = texts.split(), (labels == digit).nonzero().flatten()
        for i, text in enumerate(texts):
            chosen = rows[(pick[rows] * len(texts)).long() == i]
            for part in chosen.split(1000):  # which keeps the memory small
                path = skeleton_path(text)
                images[part, 0] = draw_skeleton(*path, len(part), generator)
    return images, labels


def draw_skeleton(points: Tensor, path: Tensor, count: int, generator) -> Tensor:
    """Draw one skeleton as `count` hands would: uint8 (count, 28, 28), framed like
    MNIST's digits, in a box of 20 pixels with the centre of mass in the middle."""

    def normal(*shape, std=1.0, mean=0.0):
        draws = torch.randn(count, *shape, generator=generator)
        return mean + std * draws.clamp(-2, 2)  # the wildest would be illegible

    # Hands differ in care, which jitters every point; in habit, which bends the digit
    # as a whole; and in width, slant and turn.
    jitter = normal(len(points), 2, std=0.1) * normal(1, 1, std=0.3).exp()
    pen = path @ ((points - 10) / 10 + jitter)
    x, y = pen.unbind(2)
    powers = [x * x, x * y, y * y, x**3, x * x * y, x * y * y, y**3]
    x, y = (pen + torch.stack(powers, 2) @ normal(7, 2, std=0.12)).unbind(2)
    x = x * normal(1, std=0.3).exp() - y * normal(1, std=0.3, mean=0.15)
    turn = normal(1, std=0.15)
    x, y = turn.cos() * x - turn.sin() * y, turn.sin() * x + turn.cos() * y

    pen, radius = torch.stack([x, y], 2), normal(1, std=0.35, mean=0.15).exp()
    extent = (pen.amax(1) - pen.amin(1)).amax(1, keepdim=True)
    pen = pen * ((20 - 2 * radius) / extent).unsqueeze(2)
    length = (pen.roll(-1, 1) - pen).norm(dim=2)
    length = length.minimum(3 * length.median(1, keepdim=True).values)  # no pen lifts
    centre = (pen * length.unsqueeze(2)).sum(1) / length.sum(1, keepdim=True)
    pen = pen - centre.unsqueeze(1) + 13.5 + normal(1, 2, std=0.3)

    # Ink by the distance to the path. The sum of exp(-d^2 / 2 s^2) along the path is
    # ruled by its nearest point, so its logarithm gives the distance; and since the
    # Gaussian separates into columns and rows, that sum is a product of matrices.
    s, pixel = 0.7, torch.arange(28.0)
    columns, rows = (
        torch.exp(-(((pixel - pen[:, :, i, None]) / s) ** 2) / 2) for i in (0, 1)
    )
    share = (length / (s * math.sqrt(2 * math.pi))).unsqueeze(2)
    density = rows.transpose(1, 2) @ (columns * share)
    distance = (-2 * s * s * density.clamp(min=1e-30).log()).clamp(min=0).sqrt()
    ink = (radius.unsqueeze(2) - distance + 0.5).clamp(0, 1)
    return (255 * ink).to(torch.uint8)


# -------------------------------------------------------------------------------------
# Models: plain chains of layers
# -------------------------------------------------------------------------------------
def baseline_cnn(dropout: float = 0.5) -> nn.Sequential:
    """The baseline: (B, 1, 28, 28) -> logits (B, 10), with 421,642 parameters.

    Max-pool stands before ReLU: the two commute, and ReLU has a quarter of the work.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.MaxPool2d(2),  # -> (B, 32, 14, 14)
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.MaxPool2d(2),  # -> (B, 64, 7, 7)
        nn.ReLU(),
        nn.Flatten(),  # -> (B, 3136)
        nn.Linear(3136, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, 10),
    )


def advanced_combo_cnn(dropout: float = 0.5) -> nn.Sequential:
    """AdvancedComboCNN: kernels of 5, 3 and 1, BatchNorm, LeakyReLU and global average
    pooling in one network; (B, 1, 28, 28) -> logits (B, 10), with 29,386 parameters.

    Convolutions are initialised after He et al. 2015 (arXiv:1502.01852). Max-pool
    stands before LeakyReLU, with which it commutes.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.BatchNorm2d(32),
        nn.MaxPool2d(2),  # -> (B, 32, 12, 12)
        nn.LeakyReLU(),
        nn.Conv2d(32, 64, 3),
        nn.BatchNorm2d(64),
        nn.MaxPool2d(2),  # -> (B, 64, 5, 5)
        nn.LeakyReLU(),
        nn.Conv2d(64, 128, 1),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # -> (B, 128)
        nn.Dropout(dropout),
        nn.Linear(128, 10),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=0.01, nonlinearity="leaky_relu")
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_table(model: nn.Module) -> list[tuple[str, tuple[int, ...], int]]:
    """(layer, output shape without the batch, parameters) in the order of the forward
    pass, for a model on the CPU."""
    rows, hooks = [], []

    def note(module, _, output):
        shape = tuple(output.shape[1:])
        rows.append((type(module).__name__, shape, count_parameters(module)))

    for module in model.modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(note))
    predict(model, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return rows


def print_layers(model: nn.Module) -> None:
    """Print the layer table with its total."""
    print(f"{'layer':<18} {'output shape':<14} {'parameters':>10}")
    for name, shape, parameters in layer_table(model):
        print(f"{name:<18} {' x '.join(map(str, shape)):<14} {parameters:>10,}")
    print(f"{'total':<33} {count_parameters(model):>10,}\n")


# -------------------------------------------------------------------------------------
# Training and evaluation
# -------------------------------------------------------------------------------------
EVAL_BATCH = 250  # whose activations stay near the caches; 1,000 ran half as fast
CHECKS = 20  # times an epoch that the loss is read back: for the bar, and to stop


class Score(NamedTuple):
    """Mean cross-entropy in nats and accuracy in percent."""

    loss: float
    accuracy: float


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, 1, 28, 28) -> logits (N, 10), in evaluation mode and fp32."""
    training = model.training
    model.eval()
    logits = [model(normalize(part)) for part in images.split(EVAL_BATCH)]
    model.train(training)
    return torch.cat(logits)


def score(logits: Tensor, labels: Tensor) -> Score:
    """Logits (N, 10), labels (N,) -> Score: sums over all images, divided once by N."""
    loss = F.cross_entropy(logits, labels, reduction="sum").item() / len(labels)
    return Score(loss, 100 * (logits.argmax(1) == labels).sum().item() / len(labels))


def evaluate(model: nn.Module, split: Split) -> Score:
    """Score of `model` on `split`; touches neither the model nor any random state."""
    return score(predict(model, split.images), split.labels)


@dataclass
class History:
    """What `fit` saw: a row for each finished epoch, the loss of each step, the end,
    and what `check_health` found wrong with it."""

    config: dict
    seed: int = 0
    rows: list[dict] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    diverged: bool = False
    health: list[str] = field(default_factory=list)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `fit`; `history` holds the epochs that were finished."""

    def __init__(self, history: History):
        self.history = history


def fit(
    model: nn.Module,
    train: Split,
    val: Split,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    patience: int | None = None,
    precision: str = "fp32",
    checkpoint: Path | None = None,
    resume: bool = False,
) -> History:
    """Train `model` in place and leave in it the weights of its best validation epoch:
    the highest accuracy and, among equals, the lowest loss.

    seed        of the batch order, which no dropout and no evaluation can shift
    scheduler   stepped after every batch
    augment     (images float (B, 1, 28, 28) of 0-255, generator) -> images
    patience    epochs without a better one after which training stops; None: never
    precision   "bf16" puts the model's pass under autocast; weights, loss and
                evaluation stay fp32
    checkpoint  file written before the first and after every epoch; with `resume`,
                training continues from it to the bits of a run that never stopped

    A loss that is not finite ends the training, as `diverged`. Ctrl-C: Interrupted.
    """
    device, count = train.labels.device, len(train.labels)
    steps = math.ceil(count / batch_size)
    order = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    change = augment and (lambda images: augment(images, noise))
    # Dropout draws from the device's own generator, which the caller has seeded.
    rng = torch.random if device.type == "cpu" else torch.get_device_module(device)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts = {name: part for name, part in parts.items() if part is not None}

    config = {"images": count, "batch_size": batch_size, "epochs": epochs}
    config |= {"patience": patience}
    config |= {"precision": precision, "augment": getattr(augment, "keywords", None)}
    config |= {"optimizer": type(optimizer).__name__}
    for key in ("lr", "momentum", "nesterov", "weight_decay"):
        if optimizer.defaults.get(key):
            config[key] = optimizer.defaults[key]
    if scheduler:
        public = {k: v for k, v in scheduler.state_dict().items() if v and k[0] != "_"}
        config["scheduler"] = {"name": type(scheduler).__name__} | public
    history, best = History(config, seed), copy.deepcopy(model.state_dict())
    identity = config | {"seed": seed, "network": repr(model)}
    identity |= {"data": zlib.crc32(train.images.cpu().contiguous().numpy())}

    def save():
        if checkpoint:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"order": order.get_state(), "noise": noise.get_state()}
            state |= {"rng": rng.get_rng_state()}
            state |= {"identity": identity, "best": best, "history": asdict(history)}
            torch.save(state, buffer := io.BytesIO())
            write_file(checkpoint, buffer.getvalue())

    if resume:
        state = load_checkpoint(checkpoint, identity)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        order.set_state(state["order"])
        noise.set_state(state["noise"])
        rng.set_rng_state(state["rng"])
        best = state["best"]
        history = History(**state["history"] | {"config": config, "seed": seed})
    else:
        save()

    first, started = len(history.rows) + 1, time.perf_counter()
    bar = tqdm(total=(epochs + 1 - first) * steps, disable=None, leave=False)
    try:
        for epoch in range(first, epochs + 1):
            waited = epoch - 1 - history.best_epoch
            if history.diverged or (patience and waited >= patience):
                break
            clock, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            losses = torch.zeros(steps, device=device)
            total = correct = seen = 0
            model.train()
            epoch_batches = batches(train, batch_size, order, change)
            for step, (images, labels) in enumerate(epoch_batches):
                with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
                    logits = model(images)
                # In fp32: a loss computed in bf16 would have three digits.
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if scheduler:
                    scheduler.step()
                losses[step] = loss.detach()
                total += loss.detach() * len(labels)
                correct += (logits.argmax(1) == labels).sum()
                seen += len(labels)
                if step % math.ceil(steps / CHECKS) == 0 or seen == count:
                    mean = total.item() / seen
                    if not math.isfinite(mean):
                        history.diverged = True
                        break
                    accuracy = f"{100 * correct.item() / seen:.2f}"
                    bar.set_postfix(
                        loss=f"{mean:.4f}", accuracy=accuracy, lr=f"{lr:.2g}"
                    )
                    bar.update((epoch - first) * steps + step + 1 - bar.n)
            now = evaluate(model, val)
            row = {"epoch": epoch, "train_loss": total.item() / seen}
            row |= {"train_accuracy": 100 * correct.item() / seen}
            row |= {"val_loss": now.loss, "val_accuracy": now.accuracy, "lr": lr}
            history.rows.append(row | {"seconds": time.perf_counter() - clock})
            history.step_losses += losses[: step + 1].tolist()
            merit = [(r["val_accuracy"], -r["val_loss"]) for r in history.rows]
            if epoch == 1 or merit[-1] > merit[history.best_epoch - 1]:
                history.best_epoch, best = epoch, copy.deepcopy(model.state_dict())
            save()
            pace = (time.perf_counter() - started) / (epoch + 1 - first)
            tqdm.write(epoch_line(history, epochs, left=pace * (epochs - epoch)))
    except KeyboardInterrupt:
        raise Interrupted(history) from None
    finally:
        bar.close()
    history.health = check_health(model, history, train)  # of the last weights
    model.load_state_dict(best)
    return history


def epoch_line(history: History, epochs: int, left: float) -> str:
    """The last epoch as a line of the log; `left`: seconds to the last epoch's end."""
    row = history.rows[-1]
    line = f"epoch {row['epoch']:>3}/{epochs}"
    for part in ("train", "val"):
        loss, accuracy = row[f"{part}_loss"], row[f"{part}_accuracy"]
        line += f"   {part} loss {loss:.4f} accuracy {accuracy:6.2f} %"
    line += f"   lr {row['lr']:.2g}   {row['seconds']:.1f} s, {left:.0f} s left"
    end = "   best" * (history.best_epoch == row["epoch"])
    return line + (end if not history.diverged else "   DIVERGED")


def run_settings(options, label: str, seed: int) -> dict:
    """What `fit` takes from the command line for a run: seed, precision and, of scripts
    that can resume, checkpoint <stem>_<label>_seed<seed>.pt and whether to continue."""
    settings = {"seed": seed, "precision": options.precision}
    if not options.resumable:
        return settings
    path = checkpoint_path(options, label, seed)
    resume = options.resume and path.exists()  # later runs had not begun
    return settings | {"checkpoint": path, "resume": resume}


def checkpoint_path(options, label: str, seed: int) -> Path:
    name = f"{options.stem.name}_{slug(label)}_seed{seed}.pt"
    return options.stem.with_name(name)


def load_checkpoint(path: Path, identity: dict) -> dict:
    """The state that `fit` saved in `path` for the run that `identity` describes."""
    broken = (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
    )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["identity"]
    except FileNotFoundError:
        sys.exit(f"cannot resume: there is no {path}; run without --resume")
    except broken:
        sys.exit(f"cannot resume: {path} is truncated or not a checkpoint of ours")
    for key, now in identity.items():
        if saved.get(key) != now:
            change = " ".join(f"{key} was {saved.get(key)}, is {now}".split())
            sys.exit(f"cannot resume: {path} is of another configuration: {change}")
    return state


class Run(NamedTuple):
    """A training that ended: the model with its best weights; its scores, which are an
    entry of the results file; and its logits (N, 10) for the test images."""

    model: nn.Module
    history: History
    scores: dict
    test_logits: Tensor


def train_all(train, labels, digits: Digits, options) -> dict[str, list[Run]]:
    """`train(digits, options, label, seed) -> (model, History)` for each label and seed.

    Only here is the test split read, once for each run, after its weights are chosen.
    Ctrl-C writes log and curves of the epochs so far and ends the program with 130.
    With `options.resume`, runs that were finished are not trained again.
    """
    paths = [
        checkpoint_path(options, label, s) for label in labels for s in options.seeds
    ]
    if options.resume and not any(path.exists() for path in paths):
        sys.exit(f"cannot resume: there is no {paths[0]}; run without --resume")
    if not options.resume:
        for path in paths:  # what an older run left is no part of this one
            path.unlink(missing_ok=True)
    runs, histories = {label: [] for label in labels}, {}
    try:
        for label in labels:
            for seed in options.seeds:
                print(f"{label}, seed {seed}, {digits.source}:", flush=True)
                model, history = train(digits, options, label, seed)
                histories.setdefault(label, []).append(history)
                run = conclude(model, history, seed, digits)
                runs[label].append(run)
                for goal in (99, 99.4):
                    print(f"{goal} % validation accuracy: {first_epoch(history, goal)}")
                print(f"test accuracy {run.scores['test_accuracy']:.2f} %\n")
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted) and stop.history.rows:
            histories.setdefault(label, []).append(stop.history)
        if histories:
            write_log(histories, options)
            plot_curves(histories, "Interrupted: the epochs so far", digits, options)
        print(f"interrupted; what there is lies in {options.stem.parent}", flush=True)
        sys.exit(130)
    return runs


def conclude(model: nn.Module, history: History, seed: int, digits: Digits) -> Run:
    """Score the final weights on all three splits."""
    logits, labels = predict(model, digits.test.images), digits.test.labels
    test = score(logits, labels)
    scores = {
        "seed": seed,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "val_accuracy": evaluate(model, digits.val).accuracy,
        "train_accuracy": evaluate(model, digits.train).accuracy,
        "epochs": len(history.rows),
        "best_epoch": history.best_epoch,
        "seconds": sum(row["seconds"] for row in history.rows),
        "health": history.health,
        "most_confused": most_confused(count_confusions(logits, labels)),
    }
    return Run(model, history, scores, logits)


def test_accuracies(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """The test accuracies of all runs, by label."""
    return {
        label: [run.scores["test_accuracy"] for run in seeds]
        for label, seeds in runs.items()
    }


SWEEP_IMAGES = 5_000  # an epoch over these tells what trains from what does not


def sweep(build, settings: list[dict], digits: Digits, options) -> list[dict]:
    """Train `build(options, seed, **setting) -> (model, optimizer)` for an epoch on the
    first SWEEP_IMAGES, for each setting and seed. Returns, and writes to
    <stem>_sweep.csv, a row for each: its setting, seed and validation accuracy."""
    part, rows = first(digits.train, SWEEP_IMAGES), []
    how = {"epochs": 1, "batch_size": options.batch_size}
    how |= {"precision": options.precision}
    try:
        for setting, seed in itertools.product(settings, options.seeds):
            row = setting | {"seed": seed}
            print("sweep:", ", ".join(f"{key} {value}" for key, value in row.items()))
            model, optimizer = build(options, seed, **setting)
            history = fit(model, part, digits.val, optimizer, seed=seed, **how)
            rows.append(row | {"accuracy": history.rows[-1]["val_accuracy"]})
    except KeyboardInterrupt:
        print("interrupted in the sweep; the runs before it are recorded", flush=True)
        sys.exit(130)
    write_csv(f"{options.stem}_sweep.csv", rows)
    return rows


def values_that_learn(rows: list[dict], knob: str) -> list:
    """The values of `knob` with which all seeds of a sweep read more than 50 %."""
    bad = {row[knob] for row in rows if row["accuracy"] <= 50}
    return [row[knob] for row in rows if row[knob] not in bad]


def first_epoch(history: History, goal: float) -> str:
    """When the validation accuracy first reached `goal` percent, in words."""
    epochs = [r["epoch"] for r in history.rows if r["val_accuracy"] >= goal]
    return f"first in epoch {epochs[0]}" if epochs else "never"


def best_run(seeds: list[Run]) -> Run:
    """Of several seeds the one that validates best, for what shows a single network."""
    return max(seeds, key=lambda run: run.scores["val_accuracy"])


def histories_of(runs: dict[str, list[Run]]) -> dict[str, list[History]]:
    """The histories of all runs, for the log and the curves."""
    return {label: [run.history for run in seeds] for label, seeds in runs.items()}


# -------------------------------------------------------------------------------------
# Health checks: what is wrong with a training that ended
# -------------------------------------------------------------------------------------
ALARMS = (
    "diverged",
    "not learning",
    "oscillating",
    "exploding gradients",
    "vanishing gradients",
    "dead ReLUs",
    "symmetric units",
    "overfitting",
)
PROBE = 500  # training images on which gradients and ReLUs are looked at
WINDOWS = 20  # parts of a training, over which the loss of the steps is averaged


def check_health(model: nn.Module, history: History, train: Split) -> list[str]:
    """The names of the `ALARMS` that a training which just ended sets off.

    The loss alone names no cause: ln 10 = 2.30, the loss of guessing, is where healthy
    networks begin and where dead and symmetric ones end.
    """
    if history.diverged:
        return ["diverged"]
    probe, rows = first(train, PROBE), history.rows
    guessing = 100 * train.labels.bincount().max().item() / len(train.labels)
    gradients = gradient_sizes(model, probe)
    fewest = min(distinct_units(w) / len(w) for w in weights_of(model))
    steps = torch.tensor(history.step_losses).tensor_split(WINDOWS)
    means = torch.stack([part.mean() for part in steps if len(part)])
    rise = (means - means.cummin(0).values).max().item()
    last = rows[-1]
    gap = last["train_accuracy"] - last["val_accuracy"]
    # Beside each: the farthest that the recorded runs went, healthy ones and broken.
    alarms = {
        "not learning": last["train_accuracy"] < 2 * guessing,  # 8 times; 1 time
        "oscillating": rise > 0.5,  # 0.01; 2.1, of a trial
        "exploding gradients": not max(gradients) < 1,  # 0.03; 1e5, of a trial
        "vanishing gradients": min(gradients) <= 1e-4 * max(gradients),  # 0.02; 0
        "dead ReLUs": max(dead_relus(model, probe.images), default=0) > 0.9,  # 0.66; 1
        "symmetric units": fewest < 0.5,  # 1; 0.01
        # 25 times the loss with a gap of 0.7 points; 36 times with one of 3.6
        "overfitting": last["val_loss"] > 10 * last["train_loss"] and gap > 1,
    }
    return [name for name, alarm in alarms.items() if alarm]


def weights_of(model: nn.Module) -> list[Tensor]:
    """The weights of the layers, from the first to the last, with a row for each unit;
    no biases, nothing of BatchNorm's."""
    return [p for p in model.parameters() if p.dim() > 1]


def gradient_sizes(model: nn.Module, split: Split) -> list[float]:
    """Root mean square of the gradient of the loss on `split` by each layer's weights,
    in evaluation mode: neither dropout nor BatchNorm's averages are touched."""
    training = model.training
    model.eval()
    loss = F.cross_entropy(model(normalize(split.images)), split.labels)
    gradients = torch.autograd.grad(loss, weights_of(model))
    model.train(training)
    return [gradient.square().mean().sqrt().item() for gradient in gradients]


@torch.inference_mode()
def dead_relus(model: nn.Module, images: Tensor) -> list[float]:
    """For each ReLU layer, the share of its units (channels) that stay 0 everywhere in
    all of `images`, uint8 (N, 1, 28, 28), N not too many to go through at once."""
    shares, training = [], model.training

    def note(_, __, output):
        peaks = output.transpose(0, 1).flatten(1).amax(1)
        shares.append((peaks <= 0).float().mean().item())

    layers = [layer for layer in model.modules() if isinstance(layer, nn.ReLU)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    model.eval()(normalize(images))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return shares


def distinct_units(weight: Tensor) -> int:
    """How many rows of a layer's weights differ from every row before them by more than
    a thousandth of the longer one's length."""
    rows = weight.detach().flatten(1).double()
    lengths = rows.norm(dim=1)
    same = torch.cdist(rows, rows) <= 1e-3 * torch.maximum(lengths, lengths[:, None])
    return int((~same.tril(-1).any(1)).sum())


# -------------------------------------------------------------------------------------
# Plots: each function writes one PNG, <stem>_<what>.png
# -------------------------------------------------------------------------------------
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"


def save_figure(figure: Figure, what: str, title: str, digits: Digits, options) -> None:
    """Title the figure, saying so if its data are not MNIST, and write it."""
    mark = "" if digits.source == "MNIST" else f"[{digits.source}] "
    figure.suptitle(mark + title, fontweight="bold")
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=110)
    write_file(f"{options.stem}_{what}.png", buffer.getvalue())


def error_of(accuracy: float) -> float:
    """What stands for an accuracy on an `accuracy_axis`."""
    return max(100 - accuracy, 0.01)


def logarithmic_axis(axes, written, which: str = "y") -> None:
    """A logarithmic axis with few ticks, the text of each by `written(value)`, for what
    is already drawn."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    digits = range(1, 10) if high < 8 * low else (1, 2, 5)
    ticks = [digit * 10**power for power in range(-5, 4) for digit in digits]
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{written(value):g}"))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())


def accuracy_axis(axes, which: str = "y") -> None:
    """Space accuracies by the logarithm of the error: 10 % and 99.5 % both can be read."""
    logarithmic_axis(axes, lambda error: 100 - error, which)
    getattr(axes, f"invert_{which}axis")()


def plot_curves(
    histories: dict, title: str, digits: Digits, options, what: str = "curves"
) -> None:
    """Loss and accuracy by epoch, as the mean over the seeds that still train and the
    band from the least to the greatest. A single label has a colour each for training
    and validation; several have one each, with training dashed.
    """
    single = len(histories) == 1
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        ends = []
        for i, (label, seeds) in enumerate(histories.items()):
            for part, name in (("train", "training"), ("val", "validation")):
                color = COLORS[part == "train" if single else i]
                style = "--" if part == "train" and not single else "-"
                lines = [[row[f"{part}_{quantity}"] for row in h.rows] for h in seeds]
                if quantity == "accuracy":
                    lines = [[error_of(y) for y in line] for line in lines]
                columns = [  # of the seeds that still train in an epoch
                    [y for y in column if y is not None]
                    for column in itertools.zip_longest(*lines)
                ]
                epochs = range(1, len(columns) + 1)
                mean = [statistics.fmean(column) for column in columns]
                axes.plot(epochs, mean, style, color=color, lw=2)
                band = [f(column) for column in columns for f in (min, max)]
                axes.fill_between(
                    epochs, band[::2], band[1::2], color=color, alpha=0.15, lw=0
                )
                if part == "val":
                    for line, history in zip(lines, seeds, strict=True):
                        best, look = history.best_epoch, {"fillstyle": "none"}
                        look |= {"marker": MARKERS[i], "color": color}
                        axes.plot(best, line[best - 1], **look)
                if single or part == "val":
                    ends.append((len(mean), mean[-1], name if single else label, color))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if quantity == "accuracy":
            accuracy_axis(axes)
            axes.set(xlabel="epoch", ylabel="accuracy (%)")
        else:
            logarithmic_axis(axes, lambda loss: loss)
            axes.set(xlabel="epoch", ylabel="loss (cross-entropy, nats)")
        label_ends(axes, ends)
    note = "open markers: the epoch whose weights were kept"
    figure.supxlabel(note + "; dashed: training" * (not single), fontsize=9)
    save_figure(figure, what, title, digits, options)


def plot_sweep(
    lines: dict, knob: str, name: str, title, digits, options, what: str = "sweep"
) -> None:
    """Validation accuracy against the `knob` of a sweep, on a logarithmic axis: for each
    label rows with the knob, seed and "accuracy"; a line of means, points for seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, ends = figure.subplots(), []
    for i, (label, rows) in enumerate(lines.items()):
        color, points = COLORS[i], {}
        for row in rows:
            points.setdefault(row[knob], []).append(error_of(row["accuracy"]))
        means = [statistics.fmean(values) for values in points.values()]
        axes.plot(list(points), means, color=color)
        for value, errors in points.items():
            look = {"color": color, "marker": MARKERS[i], "fillstyle": "none"}
            axes.plot([value] * len(errors), errors, ls="", **look)
        ends.append((list(points)[-1], means[-1], label, color))
    accuracy_axis(axes)
    axes.set(xscale="log", xlabel=name, ylabel="validation accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    label_ends(axes, ends)
    save_figure(figure, what, title, digits, options)


def label_ends(axes, ends: list[tuple]) -> None:
    """Write (x, y, text, colour) right of the ends of lines, each clear of the next."""
    heights = [axes.transData.transform(end[:2])[1] for end in ends]  # in pixels
    free = -math.inf
    for height, (x, y, text, color) in sorted(zip(heights, ends, strict=True)):
        text = text.replace(" ", "\xa0").replace(",\xa0", ", ")  # break after commas
        text = textwrap.fill(text, 30)
        half = 9 * (1 + text.count("\n"))
        middle = max(height, free + half)
        free = middle + half
        place = {"textcoords": "offset pixels", "va": "center", "color": color}
        place |= {"path_effects": [withStroke(linewidth=3, foreground="white")]}
        axes.annotate(text, (x, y), (10, middle - height), **place)


def count_confusions(logits: Tensor, labels: Tensor) -> Tensor:
    """(10, 10) int64: how often the row's digit was read as the column's."""
    pairs = 10 * labels + logits.argmax(1)
    return torch.bincount(pairs, minlength=100).view(10, 10).cpu()


def most_confused(counts: Tensor, most: int = 5) -> list[dict]:
    """The most frequent mistakes in a confusion matrix, the worst first."""
    wrong = counts.clone().fill_diagonal_(0).flatten()
    ranked = wrong.argsort(descending=True, stable=True)[:most].tolist()
    pairs = ((divmod(i, 10), wrong[i].item()) for i in ranked)
    return [{"true": t, "predicted": p, "count": n} for (t, p), n in pairs if n]


def plot_confusion(run: Run, digits: Digits, options, what: str = "confusion") -> None:
    """Confusion matrix; colour is for the mistakes, which the diagonal would drown."""
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.subplots()
    counts = count_confusions(run.test_logits, digits.test.labels)
    wrong = counts.clone().fill_diagonal_(0)
    axes.imshow(wrong.numpy(), cmap="Oranges", vmax=max(1, 1.5 * wrong.max().item()))
    for i, count in enumerate(counts.flatten().tolist()):
        true, predicted = divmod(i, 10)
        color = "0.55" if true == predicted else "black"
        axes.text(predicted, true, count or "", ha="center", va="center", color=color)
    axes.set(xlabel="predicted digit", ylabel="true digit")
    axes.set(xticks=range(10), yticks=range(10))
    title = f"{wrong.sum()} of {len(digits.test.labels):,} test digits are misread"
    if pairs := run.scores["most_confused"]:
        worst = "{true} as {predicted} ({count}x)".format(**pairs[0])
        title += f", most often {worst}"
    save_figure(figure, what, title, digits, options)


def plot_runs(runs: dict[str, list[Run]], title: str, digits: Digits, options) -> None:
    """The curves of all runs, and the confusion matrix of the best of each label."""
    plot_curves(histories_of(runs), title, digits, options)
    plot_confusions(runs, digits, options)


def plot_recipes(runs: dict[str, list[Run]], digits: Digits, options) -> None:
    """The same, with curves of their own for the labels that end in "improved"."""
    parts = {"curves": ("Published", {}), "curves_improved": ("Improved", {})}
    for label, seeds in runs.items():
        what = "curves_improved" if label.endswith("improved") else "curves"
        parts[what][1][label] = seeds
    for what, (recipes, part) in parts.items():
        means = [
            f"{label.removesuffix(' improved')} {statistics.fmean(values):.2f} %"
            for label, values in test_accuracies(part).items()
        ]
        title = f"{recipes} recipes, mean test accuracy: {', '.join(means)}"
        plot_curves(histories_of(part), title, digits, options, what)
    plot_confusions(runs, digits, options)


def plot_confusions(runs: dict[str, list[Run]], digits: Digits, options) -> None:
    """The confusion matrix of the best run of each label."""
    for label, seeds in runs.items():
        what = "confusion" if len(runs) == 1 else f"confusion_{slug(label)}"
        plot_confusion(best_run(seeds), digits, options, what)


def draw_images(axes, images: Tensor, columns: int, captions: list[str] = ()) -> None:
    """Images (N, 1, 28, 28) in rows of `columns`, dark on light as on paper; captions
    of two short lines stand above them."""
    top, rows = 14 if captions else 2, max(1, math.ceil(len(images) / columns))
    blank = rows * columns - len(images)
    tiles = F.pad(images.cpu(), (2, 2, top, 2, 0, 0, 0, blank))
    tiles = tiles.view(rows, columns, 30 + top, 32).transpose(1, 2).flatten(2)
    axes.imshow(tiles.flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=255)
    for i, caption in enumerate(captions):
        x, y = 32 * (i % columns) + 16, (30 + top) * (i // columns) + top
        axes.text(x, y, caption, ha="center", va="bottom", fontsize=9)
    axes.axis("off")


# -------------------------------------------------------------------------------------
# Reports and command line
# -------------------------------------------------------------------------------------
def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if values[1:] else None


def describe(scores: list[dict]) -> str:
    """Test accuracy of the seeds as "99.27 ± 0.05 % (5 seeds)" or "99.27 % (1 seed)"."""
    mean, std = mean_std([seed["test_accuracy"] for seed in scores])
    if std is None:
        return f"{mean:.2f} % (1 seed)"
    return f"{mean:.2f} ± {std:.2f} % ({len(scores)} seeds)"


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return label.replace(" ", "-")


def write_log(histories: dict[str, list[History]], options) -> None:
    """<stem>.csv: a row for each run and epoch."""
    rows = [
        {"run": label, "seed": history.seed} | row
        for label, seeds in histories.items()
        for history in seeds
        for row in history.rows
    ]
    write_csv(f"{options.stem}.csv", rows)


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """A table with the keys of the first row as its header; floats have six digits."""
    writer = csv.DictWriter(file := io.StringIO(), rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        floats = {k: f"{v:.6g}" for k, v in row.items() if isinstance(v, float)}
        writer.writerow(row | floats)
    write_file(path, file.getvalue().encode())


def report(runs: dict[str, list[Run]], digits: Digits, options, broken=()) -> None:
    """Write <stem>.csv and <stem>.json; print a line for each label, with the alarms
    that its runs set off, and one for the recorded baseline, to compare with.

    A run that diverged ends the program with exit code 1, after all is written, unless
    its label is among those `broken` on purpose.
    """
    write_log(histories_of(runs), options)
    parts = zip(Digits._fields, digits[:3], strict=False)
    results = {
        "script": options.script,
        "data": {"source": digits.source} | {name: len(p.labels) for name, p in parts},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": options.device.type,
            "threads": torch.get_num_threads(),
            "precision": options.precision,
        },
        "runs": {},
    }
    for label, seeds in runs.items():
        mean, std = mean_std([run.scores["test_accuracy"] for run in seeds])
        results["runs"][label] = {
            "parameters": count_parameters(seeds[0].model),
            "config": seeds[0].history.config,
            "seeds": [run.scores for run in seeds],
            "mean": mean,
            "std": std,
        }
    text = json.dumps(results)  # which has no word for what is not finite: it is null
    four, null = (lambda number: round(float(number), 4)), (lambda _: None)
    text = json.dumps(json.loads(text, parse_float=four, parse_constant=null), indent=1)
    write_file(f"{options.stem}.json", f"{text}\n".encode())

    shown, recorded = results["runs"], ROOT / "q1_baseline.json"
    if options.script != "q1_baseline.py" and recorded.exists():
        baseline = json.loads(recorded.read_text())
        if baseline["data"] == results["data"]:
            shown = {"(Q1 baseline)": baseline["runs"]["baseline"]} | shown
    width = max(map(len, shown))
    print(
        f"{digits.source}\n{'run':<{width}}  parameters   {'test accuracy':<27}health"
    )
    for label, run in shown.items():
        line = (
            f"{label:<{width}}{run['parameters']:>12,}   {describe(run['seeds']):<27}"
        )
        alarms = Counter(name for seed in run["seeds"] for name in seed["health"])
        alarms = [f"{name} ({count}x)" for name, count in alarms.items()]
        print(line + (", ".join(alarms) or "no alarm"))
    print(f"log, results and plots: {options.stem}*")
    for label, seeds in histories_of(runs).items():
        if label not in broken and any(history.diverged for history in seeds):
            sys.exit(f"training diverged: {label}; a lower --lr may help")


def check_claims(
    claims: list[tuple[str, bool]], intended: dict[str, str], runs, digits, options
) -> None:
    """Print what a script claims and whether it came out so; exit code 1 if not.

    `intended` names the alarm that every run of a label must set off; the runs of all
    other labels must set off none. All this is claimed of the recipe on the whole of
    MNIST; of other data or recipes it is not checked.
    """
    for label, seeds in runs.items():
        for run in seeds:
            wanted, found = intended.get(label), run.scores["health"]
            right = wanted in found if wanted else not found
            claim = f"{label}, seed {run.scores['seed']}: {wanted or 'no alarm'}"
            claims = [*claims, (claim, right)]
    changed = digits.source != "MNIST" or options.limit or options.recipe_changed
    for claim, right in claims:
        print(f"{'yes' if right else 'NO':<4}{claim}")
    if changed:
        print("not checked: the claims are about the recipe on the whole of MNIST")
    elif not all(right for _, right in claims):
        sys.exit("failure not reproduced: see the lines with NO")
    else:
        print("failure reproduced")


def whole(least: int):
    """A parser for argparse of whole numbers of at least `least`."""

    def parse(text):
        if text.isascii() and text.isdigit() and int(text) >= least:
            return int(text)
        message = f"{text!r} is not a whole number of at least {least}"
        raise argparse.ArgumentTypeError(message)

    return parse


def positive(text: str) -> float:
    """A parser for argparse of finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def parse_options(
    script, doc, argv=None, *, recipe=None, networks=(), resumable=True, more=None
):
    """The command line of the script in the file `script`. The defaults are those of
    its `recipe` (epochs, batch_size, lr, seeds), or None for what each of its runs has
    its own. `more` adds to the parser what only this script has.

    Returns a namespace: epochs, batch_size, lr, seeds (a list), device (torch.device),
    precision ("fp32" or "bf16"), data, data_dir, limit, resume, networks (a list),
    script (its path in the project), stem (what its outputs begin with), resumable, and
    recipe_changed: whether epochs, batch_size or lr are not the recipe's. A bad value
    is one line, exit code 2.
    """
    script = Path(script).resolve()
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=layout)
    parser.error = lambda message: parser.exit(2, f"{script.name}: {message}\n")
    add, recipe = parser.add_argument, recipe or {}
    shown = dict.fromkeys(("epochs", "batch_size", "lr"), "each run's own") | recipe
    add("--epochs", type=whole(1), help="at most ({epochs})".format(**shown))
    add("--batch-size", type=whole(1), help="({batch_size})".format(**shown))
    add("--lr", type=positive, help="learning rate ({lr})".format(**shown))
    parser.set_defaults(**recipe)
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=whole(0), metavar="K", help="run K only")
    count = recipe.get("seeds", 1)
    seeds.add_argument(
        "--seeds", type=whole(1), metavar="N", help=f"run 0, 1, .. N-1 ({count})"
    )
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto")
    data_dir = os.environ.get("MNIST_DIR") or ROOT / "data"
    add("--data-dir", type=Path, default=data_dir, help="(MNIST_DIR, or data/)")
    add("--out-dir", type=Path, default=script.parent, help="(beside the script)")
    add("--limit", type=whole(1), metavar="N", help="train on the first N images")
    if networks:
        add("--only", choices=networks, help="train one network")
    if more:
        more(parser)
    if resumable:
        add("--resume", action="store_true", help="continue where a stopped run was")
    else:
        parser.set_defaults(resume=False)
    options = parser.parse_args(argv)
    options.resumable = resumable
    given = {name: getattr(options, name) for name in shown}
    options.recipe_changed = given != dict.fromkeys(shown) | recipe

    devices = available_devices()
    if options.device == "auto":
        options.device = devices[0]
    if options.device not in devices:
        here = ", ".join(devices)
        parser.error(f"--device {options.device}: not here; there is {here}")
    options.device = torch.device(options.device)
    if options.precision == "auto":
        options.precision = "bf16" if has_native_bf16(options.device) else "fp32"
    every = range(options.seeds or count)
    options.seeds = list(every) if options.seed is None else [options.seed]
    options.networks = [options.only] if networks and options.only else list(networks)
    options.script = script.relative_to(ROOT).as_posix()
    options.stem = options.out_dir.resolve() / script.stem
    try:  # now, not after the training
        options.out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out_dir).close()
    except OSError as error:
        parser.error(f"--out-dir {options.out_dir}: cannot write: {error.strerror}")
    return options
