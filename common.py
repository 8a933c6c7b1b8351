"""What two or more scripts share, in the order in which a run needs it; at the end the synthetic digits.

Images are uint8 (N, 1, 28, 28) until `normalize` makes them float. Losses are mean cross-entropies in nats,
accuracies are percentages. A foreseeable mistake of the user ends the program with one line (SystemExit).
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm import tqdm

from q4_break.health import Recorder, alarm_names, check_health

ROOT = Path(__file__).resolve().parent
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # whether this process is one of torchrun's ranks
RANK, LOCAL_RANK, WORLD, RESTARTS = (
    int(os.environ.get(name, default)) if TORCHRUN else default
    for name, default in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}.items()
)


# ---- Setup: process, device, files -----------------------------------------------------------------------------------
PARTIAL = ".mnist-cnn-partial"  # ends the names of half-written files
NATIVE = ctypes.CDLL(None) if sys.platform == "linux" else None  # glibc, and the OpenMP library that torch uses


def allowed_cores() -> set[int]:
    """The cores this process may use. If OpenMP binds threads (OMP_PROC_BIND), this thread sees a single core: then
    those of all of OpenMP's places."""
    bound = set()
    for place in range(NATIVE.omp_get_num_places() if hasattr(NATIVE, "omp_get_num_places") else 0):
        cores = (ctypes.c_int * NATIVE.omp_get_place_num_procs(place))()
        NATIVE.omp_get_place_proc_ids(place, cores)
        bound.update(cores)
    return bound or (os.sched_getaffinity(0) if NATIVE else set(range(os.cpu_count() or 1)))


def usable_cores(root="/sys/fs/cgroup", own="/proc/self/cgroup") -> int:
    """How many cores this process may use, also by the CPU quotas of its cgroup, version 1 or 2, and those above it."""
    limits = [len(allowed_cores())]
    for line in Path(own).read_text().splitlines() if Path(own).exists() else []:
        _, controllers, path = line.split(":", 2)
        version_1 = "cpu" in controllers.split(",")  # version 2 names no controllers
        names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if version_1 else ["cpu.max"]
        folder = Path(root, "cpu" if version_1 else "", path.lstrip("/"))
        for above in [folder, *folder.parents]:  # in a container only the last may be there
            text = " ".join((above / name).read_text().strip() for name in names if (above / name).exists())
            if quota := re.fullmatch(r"(\d+) (\d+)", text):  # without a limit it is "max" or -1
                limits.append(int(quota[1]) / int(quota[2]))
    return max(1, int(min(limits)))


CORES = min(torch.get_num_threads(), usable_cores())  # OMP_NUM_THREADS lowers it


def granted_threads(threads: int) -> int:
    """How many OpenMP grants of `threads` (OMP_THREAD_LIMIT): if torch asks for more, its backward pass never ends."""
    if threads == 1 or not hasattr(NATIVE, "GOMP_parallel"):  # it cannot be measured on macOS and Windows
        return threads
    NATIVE.omp_set_dynamic(0)  # OMP_DYNAMIC grants fewer while other programs are busy
    granted = []  # an item from each thread of a parallel region
    NATIVE.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(granted.append), None, threads, 0)
    return len(granted)


def setup(threads):
    """Settings of a process that trains, before its first computation: threads take them over when they start."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # NumPy measures its limits at their first use, and warns if denormals are flushed by then
    torch.set_flush_denormal(True)  # multiplying denormal numbers is many times slower
    torch.set_num_threads(granted_threads(threads))  # which starts them
    torch.backends.cudnn.deterministic = True  # a resumed run ends bit-identical
    if hasattr(NATIVE, "mallopt"):
        NATIVE.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, and below M_MMAP_THRESHOLD: glibc keeps blocks of up to 32 MiB
        NATIVE.mallopt(-3, 1 << 25)  # instead of returning them at each step, and fp32 training is a fifth faster


def available_devices() -> list[str]:
    """The device types of this machine, the fastest first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [accelerator.type, "cpu"] if accelerator else ["cpu"]


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 natively; emulated, it is slower than fp32."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class Output:
    """An output stream that may be missing, closed, or left by its reader: what cannot be written is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")  # not every encoding has ±

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def show_exception(kind, error, trace):
    """Ctrl-C outside of the training, while MNIST is downloaded for instance, is one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def agree_on_start(store) -> str:
    """A name that all ranks of this start share, and none of an earlier one: torchrun starts ranks again, but its store
    keeps what the dead ones wrote. Each rank has a token; the first rank shows them until all have seen its own."""
    token = os.urandom(8).hex()
    store.set(f"token {RANK}", token)
    if RANK == 0:
        while not all(store.check([f"{rank} has seen {token}"]) for rank in range(1, WORLD)):
            store.set("tokens", json.dumps([store.get(f"token {rank}").decode() for rank in range(WORLD)]))
            time.sleep(0.1)
        return token
    tokens = []
    while token not in tokens:  # else they are those of an earlier start
        tokens = json.loads(store.get("tokens"))
        time.sleep(0.1)
    store.set(f"{RANK} has seen {tokens[0]}", "")
    return tokens[0]


def gather(value) -> list:
    """The values of all of torchrun's ranks, when all have come here; [value] without torchrun."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    try:
        if not distributed.is_initialized():
            store, *_ = next(distributed.rendezvous("env://", RANK, WORLD))
            forever = timedelta(days=30)  # one rank may train long after another
            store.set_timeout(forever)
            store = distributed.PrefixStore(agree_on_start(store), store)
            distributed.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD, timeout=forever)
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        sys.exit(f"another of torchrun's ranks has ended ({in_a_line(error)}); --resume continues")
    return values


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def write_file(path, content: bytes):
    """Write `path` atomically: a kill leaves the old file or the new one. Under torchrun, ranks other than the first
    write only checkpoints."""
    path = Path(path)
    if RANK and path.suffix != ".pt":
        return
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}{PARTIAL}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        sys.exit(f"cannot write {path}: {error.strerror}")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    for other in path.parent.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another process removes it, too
            if path.stat().st_mtime - other.stat().st_mtime > 60:  # its process was killed
                other.unlink()


# ---- Command line ----------------------------------------------------------------------------------------------------
def number(kind, least, most=math.inf):
    """A type of argparse's options: an int or a finite float from `least` to `most`."""
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value != math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {'an integer' if kind is int else 'a number'} {limits}")

    return convert


def folder(text: str) -> Path:
    return Path(text).expanduser()


def make_parser(script: Path, doc: str, names: list[str], seeds: int, options: dict) -> argparse.ArgumentParser:
    """The parser of every script; --only selects one of `names`, `seeds` are trained by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{script.name}: {message}\n")
    positive = number(int, 1)
    one_seed = parser.add_mutually_exclusive_group()
    add = parser.add_argument
    add("--epochs", type=positive, help="at most, of every run (each run's own)")
    add("--batch-size", type=positive, help="of every run (each run's own)")
    add("--lr", type=number(float, 1e-9), help="learning rate of every run (each run's own)")
    one_seed.add_argument("--seed", type=number(int, 0, 2**64 - 1), help="train this seed only")
    one_seed.add_argument("--seeds", type=positive, help=f"train seeds 0, 1, .. SEEDS-1 ({seeds})")
    add("--only", choices=names, metavar="NAME", help=f"train one of: {'; '.join(names)}".replace("%", "%%"))
    add("--workers", type=positive, help="runs trained side by side (one for each core; 1 on a GPU)")
    add("--threads", type=positive, help="of each run (the cores divided by the workers)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto")
    add(
        "--data-dir",
        type=folder,
        default=os.environ.get("MNIST_DIR") or str(ROOT / "data"),
        help="($MNIST_DIR, or data/)",
    )
    add("--out-dir", type=folder, default=script.parent, help="(beside the script)")
    add("--limit", type=positive, help="train on the first LIMIT images")
    add("--resume", action="store_true", help="continue what a stopped start has left")
    for flag, settings in options.items():
        add(flag, **settings)
    return parser


def parse_args(script, doc, runs, argv=None, *, seeds=1, options=None, **defaults) -> argparse.Namespace:
    """Parse the command line of a script with these runs, {name: configuration}, `options` of its own, {flag:
    settings}, and `defaults` of common ones. Returns the options with runs (those to train, overrides applied), seeds
    (a list), device (torch.device), precision ("fp32" or "bf16"), workers (at most), script (its path in the project),
    stem (the path that its outputs begin with) and is_default: whether runs and data are the script's own. A bad value:
    exit code 2."""
    sys.stdout = Output(open(os.devnull, "w") if RANK else sys.stdout)  # of torchrun's ranks the first one prints
    sys.stderr = Output(sys.stderr)
    sys.excepthook = show_exception
    script = Path(script).resolve()
    networks = [config["network"] for config in runs.values() if "network" in config]
    parser = make_parser(script, doc, list(dict.fromkeys([*networks, *runs])), seeds, options or {})
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    overrides = {key: value for key, value in given.items() if value is not None}
    args.runs = {
        name: {key: overrides.get(key, value) for key, value in config.items()}
        for name, config in runs.items()
        if args.only in (None, name, config.get("network"))
    }
    args.is_default = not (overrides or args.only or args.limit)
    args.seeds = list(range(args.seeds or seeds)) if args.seed is None else [args.seed]
    devices = available_devices()
    args.device = devices[0] if args.device == "auto" else args.device
    if args.device not in devices:
        parser.error(f"--device {args.device} is not available here; available: {', '.join(devices)}")
    args.device = torch.device(args.device, LOCAL_RANK if TORCHRUN and args.device == "cuda" else None)
    if args.device.index is not None:
        if args.device.index >= torch.cuda.device_count():
            parser.error(f"--nproc-per-node: rank {RANK} has no GPU; there are {torch.cuda.device_count()}")
        torch.cuda.set_device(args.device)  # whose random numbers are saved and restored
    native = "bf16" if has_native_bf16(args.device) else "fp32"
    args.precision = native if args.precision == "auto" else args.precision
    args.workers = args.workers or (CORES if args.device.type == "cpu" and not TORCHRUN else 1)  # a rank is a worker
    args.script = script.relative_to(ROOT).as_posix()
    args.stem = args.out_dir.resolve() / script.stem
    try:  # now, not after the training
        args.out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()
    except OSError as error:
        parser.error(f"--out-dir {args.out_dir}: cannot write: {error.strerror}; give another folder")
    cores = usable_cores()
    if args.threads and args.threads > cores:  # with far more, torch hangs or ends the process without a word
        print(f"--threads {args.threads}: only {cores} core(s) may be used here, so each run gets {cores} thread(s)")
        args.threads = cores
    setup(CORES)  # now: the first computation starts the threads
    return args


# ---- Data ------------------------------------------------------------------------------------------------------------
MEAN, STD = 0.1307, 0.3081  # of the training pixels, scaled to 0-1
VAL_SHARE = 12  # one training image in 12 is for validation: 5,000 of 60,000
SPLIT_SEED = 2024  # the same validation images in every run of every script
DOWNLOAD_SECONDS = 120  # for all four files, 11 MB
DOWNLOAD = """
from torchvision.datasets import MNIST
reasons = []
for mirror in MNIST.mirrors:  # one after the other: torchvision itself gives up when the first one sends rubbish
    MNIST.mirrors = [mirror]
    try:
        MNIST({folder!r}, download=True)
        break
    except Exception as error:
        while error.__context__:  # the first of its causes: after a certificate error torchvision tries without TLS
            error = error.__context__
        reasons.append(f"{{mirror}}: {{error}}")
else:
    raise SystemExit("; ".join(reasons))
"""
MNIST_FILES = {  # and the checksums (MD5) of their contents; torchvision publishes those of the packed files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Split(NamedTuple):
    images: Tensor  # uint8 (N, 1, 28, 28)
    labels: Tensor  # int64 (N,)

    def head(self, count: int | None) -> "Split":
        """The first `count` images with their labels (None: all)."""
        return Split(self.images[:count], self.labels[:count])


class Dataset(NamedTuple):
    train: Split
    val: Split
    test: Split | None  # None for what trains
    name: str  # "MNIST", "MNIST-like data" or "synthetic digits"

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch; the last may be smaller."""
        return math.ceil(len(self.train.labels) / batch_size)


def normalize(images: Tensor) -> Tensor:
    """Pixels 0-255, uint8 or float -> float32 with mean 0 and standard deviation 1."""
    return images.float().mul(1 / (255 * STD)).sub_(MEAN / STD)


def load_data(args) -> Dataset:
    """The data set that the command line asks for: MNIST from --data-dir, in torchvision's layout, downloaded if it is
    missing; if that fails with --data auto the synthetic digits, with a warning. Files that are there but cannot be
    used are always an error."""
    if args.data != "synthetic":
        try:
            return split_data(*read_mnist(args.data_dir), args.limit, args.device)
        except ValueError as error:
            sys.exit(str(error))
        except OSError as error:
            advice = "put its four files into MNIST/raw there, or give --data-dir"
            reason = f"MNIST is not in {args.data_dir} and cannot be downloaded ({error}); {advice}"
            if args.data == "mnist":
                sys.exit(reason)
            print(f"WARNING: {reason}.\nWARNING: this run uses the synthetic digits.", file=sys.stderr)
    drawn = *draw_digits(60_000, seed=0), *draw_digits(10_000, seed=1)
    return split_data(*drawn, "synthetic digits", args.limit, args.device)


def split_data(images, labels, test_images, test_labels, name, limit=None, device="cpu") -> Dataset:
    """Split the training images with a fixed generator: 1/12 for validation, the rest for training."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    val_rows, train_rows = order.tensor_split([len(labels) // VAL_SHARE])
    train_rows = train_rows[:limit]
    splits = (images[train_rows], labels[train_rows]), (images[val_rows], labels[val_rows]), (test_images, test_labels)
    return Dataset(*(Split(x.to(device), y.to(device)) for x, y in splits), name)


def read_mnist(data_dir: Path) -> tuple:
    """Training images uint8 (N, 1, 28, 28) and labels int64 (N,), those of the test split, and the name of the data
    set. Raises ValueError if files are there but cannot be used, OSError if some are missing and cannot be downloaded.
    """
    raw = data_dir / "MNIST" / "raw"
    missing = [name for name in MNIST_FILES if not any(os.path.lexists(raw / f"{name}{end}") for end in ("", ".gz"))]
    if missing:
        refuse_near_miss(data_dir, missing)
        download_mnist(raw, missing)
    parts, strange = [], []
    for name, checksum in MNIST_FILES.items():
        content = read_file(raw / name)
        parts.append(decode_idx(content, raw / name))
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
            strange.append(name)
    for images, labels, name in zip(parts[::2], parts[1::2], list(MNIST_FILES)[::2], strict=True):
        if len(images) != len(labels):
            raise ValueError(f"{raw / name} and its labels differ: {len(images)} images, {len(labels)} labels")
        if len(images) < VAL_SHARE:
            raise ValueError(f"{raw / name} has {len(images)} images; {VAL_SHARE} are needed for a validation image")
    if strange:
        hint = "; the ones lie on their side: EMNIST's images are transposed" if is_transposed(*parts[:2]) else ""
        print(f"{raw}: not MNIST's: {', '.join(strange)}; the data are called MNIST-like data{hint}")
    return *parts, "MNIST-like data" if strange else "MNIST"


def refuse_near_miss(data_dir: Path, missing: list[str]):
    """Raises ValueError, with advice, if what is missing lies in another folder or under another name."""
    for folder in (data_dir, data_dir / "raw", data_dir / "MNIST", data_dir / "MNIST" / "raw"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"{folder} is a file or a broken link, not a folder")
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            raise ValueError(f"{folder} cannot be read: Permission denied")
        for name in missing:
            for other in (name, name.replace("-idx", ".idx")):
                if (folder / other).exists():
                    place = data_dir / "MNIST" / "raw" / name
                    raise ValueError(f"{folder / other} is there, but it is looked for as {place}: move it")


def read_file(path: Path) -> bytes:
    """The content of a file, or of its gzipped version."""
    if not os.path.lexists(path):
        path = path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path} is truncated or not a gzip file; delete it to download it again") from None
    except OSError as error:  # no permission, a folder, a dead link
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def decode_idx(content: bytes, path: Path) -> Tensor:
    """The images uint8 (N, 1, 28, 28) or labels int64 (N,) in an IDX file. Raises ValueError for a file of another kind
    or size, which torchvision does not always, and for labels other than 0-9."""
    shape = (1, 28, 28) if "images" in path.name else ()
    size = 16 if shape else 8
    magic, count, *dimensions = [int.from_bytes(content[i : i + 4], "big") for i in range(0, size, 4)]
    if magic != (2051 if shape else 2049) or tuple(dimensions) != shape[1:]:
        raise ValueError(f"{path} is not an MNIST file of its kind; delete it to download it again")
    if count == 0 or len(content) != size + count * math.prod(shape):
        raise ValueError(f"{path} is empty, truncated or too long; delete it to download it again")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=size).view(count, *shape)
    if not shape and values.max() > 9:
        raise ValueError(f"{path} has labels other than 0-9")
    return values if shape else values.long()


def is_transposed(images: Tensor, labels: Tensor) -> bool:
    """Whether the ones extend further in x than in y."""
    ones = images[labels == 1][:1000, 0].float().sum(0)
    width, height = ((ones.sum(axis) > ones.sum(axis).max() / 2).sum() for axis in (0, 1))
    return bool(width > height)


def download_mnist(raw: Path, names: list[str]):
    """Download MNIST into a temporary folder and move the files in `names` to `raw`, each atomically, so that scripts
    that start together cannot disturb each other. Raises OSError on failure or after DOWNLOAD_SECONDS."""
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw, prefix=".download-") as folder:
        command = [sys.executable, "-c", DOWNLOAD.format(folder=folder)]  # a process, which can be ended
        try:
            done = subprocess.run(command, timeout=DOWNLOAD_SECONDS, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            raise OSError(f"it takes more than {DOWNLOAD_SECONDS} s") from None
        if done.returncode:
            raise OSError(" ".join(done.stderr.split())[-400:])
        for name in names:
            os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)


def batches(split: Split, size: int, shuffle_rng: torch.Generator | None, augment=None, augment_rng=None):
    """Yield (images float32 (B, 1, 28, 28), labels (B,)), every image once, shuffled by a generator on the CPU (None:
    in order); the last batch may be smaller. `augment` gets images as floats 0-255, before they are normalized."""
    count = len(split.labels)
    permutation = torch.randperm(count, generator=shuffle_rng) if shuffle_rng else torch.arange(count)
    for rows in permutation.to(split.labels.device).split(size):  # resident data: a batch is one indexing operation
        images = split.images[rows]
        if augment:
            images = augment(images.float(), augment_rng)
        yield normalize(images), split.labels[rows]


# ---- Networks and augmentation of several scripts --------------------------------------------------------------------
def baseline_cnn(dropout: float = 0.5) -> nn.Sequential:
    """The baseline: (B, 1, 28, 28) -> logits (B, 10), with 421,642 parameters.

    Max-pool stands before ReLU: the two commute, and ReLU has a quarter of the work.
    """
    return nn.Sequential(
        # A line is a block of layers; the star puts them into the chain one by one.
        *[nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()],  # -> (B, 32, 14, 14)
        *[nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()],  # -> (B, 64, 7, 7)
        nn.Flatten(),  # -> (B, 3136)
        *[nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(dropout)],
        nn.Linear(128, 10),
    )


def advanced_combo_cnn(dropout: float = 0.5) -> nn.Sequential:
    """AdvancedComboCNN: kernels of 5, 3 and 1, BatchNorm, LeakyReLU and global average pooling; (B, 1, 28, 28) ->
    logits (B, 10), with 29,386 parameters. He initialisation (He et al. 2015, arXiv:1502.01852)."""
    model = nn.Sequential(
        *[nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.MaxPool2d(2), nn.LeakyReLU()],  # -> (B, 32, 12, 12)
        *[nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.MaxPool2d(2), nn.LeakyReLU()],  # -> (B, 64, 5, 5)
        *[nn.Conv2d(64, 128, 1), nn.BatchNorm2d(128), nn.LeakyReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)],  # -> (B, 128)
        nn.Linear(128, 10),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=0.01, nonlinearity="leaky_relu")
    return model


def print_layers(model: nn.Module):
    """Print a table of the layers of a network for images (1, 28, 28), in the order of the forward pass: output shape,
    without the batch; trainable parameters, once however often the layer is applied; and multiply-adds for an image,
    at each application. One multiply-add is two floating-point operations. Functions are no layers, so they have no
    row; the total counts all parameters. Changes nothing in the network: a copy computes, in training mode.

    Counters disagree: torchsummary 1.5.1 counts parameters at each application, torchinfo and thop once.
    """
    found = {}  # of each layer: output shape, applications, multiply-adds

    def count(layer, inputs, output):
        weight = getattr(layer, "weight", None)
        products = output[0].numel() * weight[0].numel() if weight is not None and weight.dim() > 1 else 0
        shape, times, before = found.get(layer, (output.shape[1:], 0, 0))
        found[layer] = shape, times + 1, before + products

    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws
        model(torch.zeros(2, 1, 28, 28))
    print(f"{'layer':<18} {'output shape':<14} {'parameters':>10} {'multiply-adds':>14}")
    for layer, (shape, times, products) in found.items():
        name = type(layer).__name__ + (f", {times} times" if times > 1 else "")
        shape = " x ".join(map(str, shape))
        print(f"{name:<18} {shape:<14} {count_parameters(layer):>10,} {products:>14,}")
    total = sum(products for *_, products in found.values())
    print(f"{'total':<33} {count_parameters(model):>10,} {total:>14,}\n")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


ROTATE_AND_SHIFT = {"degrees": [10], "shift": 2, "scale": 0.1}  # the augmentation of the improved recipes


def affine(images, angle, shift, scale):
    """Rotate, scale and shift each of `images`, float (B, 1, 28, 28), about its centre, as torchvision's `affine` does:
    bilinear, 0 beyond the border. angle (B,) in degrees, clockwise; shift (B, 2) in pixels, right and down; scale (B,).
    """
    cos, sin = torch.deg2rad(angle).cos() / scale, torch.deg2rad(angle).sin() / scale
    x, y = (shift / -14).unbind(1)  # the image extends from -1 to 1
    theta = torch.stack([cos, sin, cos * x + sin * y, -sin, cos, cos * y - sin * x], 1).view(-1, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)


def random_affine(images, generator, degrees=(), shift=0.0, scale=0.0):
    """Transform each of `images`, float (B, 1, 28, 28), differently: rotate by up to +-`degrees` (several rotations
    add up), shift by up to +-`shift` pixels and scale by 1 +- `scale`, all uniformly distributed."""

    def uniform(*shape):
        return torch.rand((len(images), *shape), generator=generator, device=images.device) * 2 - 1

    angle = images.new_zeros(len(images))
    for limit in degrees:
        angle += limit * uniform()
    return affine(images, angle, shift * uniform(2), 1 + scale * uniform())


# ---- Training and evaluation -----------------------------------------------------------------------------------------
EVAL_BATCH = 250  # activations that stay near the caches; 1,000 ran half as fast
CHECKS = 20  # times an epoch that the loss is read back: to show progress, and to stop


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float, Tensor]:
    """Mean cross-entropy, accuracy in percent, and logits (N, 10); in evaluation mode and fp32. Sums over all images
    are divided once by N. Changes neither the model nor any random state."""
    training = model.training
    model.eval()
    logits = None  # one tensor for all: small ones, left between large ones, would keep their memory from being reused
    for i in range(0, len(split.labels), EVAL_BATCH):
        part = model(normalize(split.images[i : i + EVAL_BATCH]))
        logits = part.new_empty(len(split.labels), part.shape[1]) if logits is None else logits
        logits[i : i + EVAL_BATCH] = part
    model.train(training)
    loss = F.cross_entropy(logits, split.labels, reduction="sum").item() / len(split.labels)
    return loss, 100 * (logits.argmax(1) == split.labels).sum().item() / len(split.labels), logits


@dataclass
class History:
    """What happened in a training."""

    rows: list[dict] = field(default_factory=list)  # of the log, for each finished epoch
    step_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0  # whose weights were kept
    diverged: bool = False
    health: list[str] = field(default_factory=list)  # the alarms of `check_health`
    trace: dict[str, list] = field(default_factory=dict)  # what the script recorded

    @property
    def val_accuracy(self) -> float:
        """Of the kept weights."""
        return self.rows[self.best_epoch - 1]["val_accuracy"]


def print_progress(images: int, line: str = ""):
    """Called while training: `images` were trained on since the last call; `line` is one of the log, or empty."""
    if line:
        print(line)


def fit(
    model: nn.Module,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    config: dict,  # epochs (at most), batch_size, and patience: epochs without a better one after which training stops
    *,
    seed: int = 0,  # of the batch order and the augmentation; neither dropout nor evaluation shifts it
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,  # stepped after every batch
    augment=None,  # (images float 0-255 (B, 1, 28, 28), torch.Generator) -> images
    shuffle: bool = True,
    keep_last: bool = False,  # keep the weights of the last epoch, instead of the best
    precision: str = "fp32",  # "bf16": forward pass under autocast; weights, loss and evaluation stay fp32
    trace: dict[str, list] | None = None,  # lists that the script fills; checkpoints keep them
    checkpoint: Path | None = None,  # a file, written before the first and after every epoch; if it is there, the
    fingerprint: dict | None = None,  # training goes on from it, to a bit-identical end, and this must agree with it
    progress=print_progress,
) -> History:
    """Train `model` in place on data.train and leave in it the weights of its best epoch on data.val: the highest
    accuracy and, among equals, the lowest loss. A loss that is not finite ends the training, as `diverged`. With
    config["label_smoothing"] the training loss, also in the log, is that of smoothed labels (Szegedy et al. 2016,
    arXiv:1512.00567).

    No check sees these: a network whose memory format changes after the first step of a fused optimizer on a CPU (each
    weight gets another's momentum; torch 2.14); a one-cycle schedule of fewer steps than the training; weights averaged
    after the training (AveragedModel) without BatchNorm's statistics computed anew (update_bn).
    """
    epochs, batch_size = config["epochs"], config["batch_size"]
    patience = config.get("patience") or epochs
    smoothing = config.get("label_smoothing", 0.0)
    steps = data.steps(batch_size)
    shuffle_rng = torch.Generator().manual_seed(seed)
    augment_rng = torch.Generator(data.train.labels.device).manual_seed(seed)
    rngs = {"shuffle_rng": shuffle_rng, "augment_rng": augment_rng}
    recorder = Recorder(model)
    parts = {"model": model, "optimizer": optimizer, "recorder": recorder}
    if scheduler:
        parts["scheduler"] = scheduler
    history = History(trace={} if trace is None else trace)
    best = copy.deepcopy(model.state_dict())
    fingerprint = {**(fingerprint or {}), "layers": repr(model)}
    if checkpoint and checkpoint.exists():
        best = restore_training(checkpoint, fingerprint, parts, rngs, history)
    elif checkpoint:
        save_training(checkpoint, fingerprint, parts, rngs, history, best)
    while not history.diverged and len(history.rows) < min(epochs, history.best_epoch + patience):
        started = time.perf_counter()
        epoch, lr = len(history.rows) + 1, optimizer.param_groups[0]["lr"]
        recorder.start_epoch()
        drawn = batches(data.train, batch_size, shuffle_rng if shuffle else None, augment, augment_rng)
        losses, row, labels = train_epoch(model, drawn, steps, optimizer, scheduler, smoothing, precision, progress)
        val_loss, val_accuracy, _ = evaluate(model, data.val)
        seconds = time.perf_counter() - started
        row = {"epoch": epoch, **row, "val_loss": val_loss, "val_accuracy": val_accuracy, "lr": lr, "seconds": seconds}
        recorder.end_epoch(labels)
        history.step_losses += losses
        if add_row(history, row, keep_last):
            best = copy.deepcopy(model.state_dict())
        if checkpoint:
            save_training(checkpoint, fingerprint, parts, rngs, history, best)
        progress(0, log_line(history, epochs))
    history.health = check_health(model, history, recorder, optimizer, data.train, data.val, normalize)
    model.load_state_dict(best)
    return history


def add_row(history: History, row: dict, keep_last: bool) -> bool:
    """Add an epoch to the log; returns whether its weights are to be kept."""
    history.rows.append(row)
    history.diverged = not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]))
    best = max(history.rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    if row is best or keep_last:
        history.best_epoch = row["epoch"]
    return history.best_epoch == row["epoch"]


def one_cycle(optimizer: torch.optim.Optimizer, config: dict, data: Dataset) -> torch.optim.lr_scheduler.OneCycleLR:
    """The schedule of the baseline and its variants, for `fit`: the learning rate rises to config["lr"] in a fifth of
    the steps and then falls to zero (Smith and Topin 2017, arXiv:1708.07120)."""
    steps = max(6, config["epochs"] * data.steps(config["batch_size"]))  # with five PyTorch divides by zero
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config["lr"], total_steps=steps, pct_start=0.2, cycle_momentum=False
    )


def train_epoch(model, batches, steps, optimizer, scheduler, smoothing, precision, progress):
    """Train on `batches`, `steps` of them, or until the mean loss is not finite. Returns the loss of each step, the
    epoch's loss and accuracy for the log, in training mode, while the weights change, and its last batch's labels."""
    losses = []
    total = correct = seen = shown = 0
    model.train()
    for step, (images, labels) in enumerate(batches, 1):
        with torch.autocast(images.device.type, torch.bfloat16, precision == "bf16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)  # in fp32: bf16 has three digits
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.detach())
        total += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if step == steps or (step - 1) % math.ceil(steps / CHECKS) == 0:
            progress(seen - shown)
            shown = seen
            if not math.isfinite(total.item()):
                break
    row = {"train_loss": total.item() / seen, "train_accuracy": 100 * correct.item() / seen}
    return torch.stack(losses).tolist(), row, labels


def validate_again(model: nn.Module, data: Dataset, history: History):
    """Evaluate a network that a script has changed after `fit`: the log's row of its epoch then is of this one."""
    loss, accuracy, _ = evaluate(model, data.val)
    history.rows[history.best_epoch - 1].update(val_loss=loss, val_accuracy=accuracy)


def log_line(history: History, epochs: int) -> str:
    """The last epoch as a line of the log."""
    row = history.rows[-1]
    end = "  DIVERGED" if history.diverged else "  kept" if history.best_epoch == row["epoch"] else ""
    texts = [f"{p} loss {row[f'{p}_loss']:.4f} accuracy {row[f'{p}_accuracy']:.2f} %" for p in ("train", "val")]
    return f"epoch {row['epoch']:>2}/{epochs}  {'  '.join(texts)}  lr {row['lr']:.2g}  {row['seconds']:.1f} s{end}"


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def save_training(path: Path, fingerprint: dict, parts: dict, rngs: dict, history: History, best: dict):
    """Write all that a training needs to continue: `parts` have a state_dict, `rngs` are generators."""
    states = {name: part.state_dict() for name, part in parts.items()}
    rng_states = {name: rng.get_state() for name, rng in rngs.items()}
    rng_states["rng"] = rng_module(parts["model"]).get_rng_state()
    save_checkpoint(path, fingerprint, **states, **rng_states, history=asdict(history), best=best)


def restore_training(path: Path, fingerprint: dict, parts: dict, rngs: dict, history: History) -> dict:
    """Put everything back to what `save_training` wrote; returns the best weights."""
    state = load_checkpoint(path, fingerprint)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for parameter, moments in parts["optimizer"].state.items():
        for name, moment in moments.items():  # fused optimizers need it to lie in memory as its parameter does
            if torch.is_tensor(moment) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
    for name, rng in rngs.items():
        rng.set_state(state[name])
    rng_module(parts["model"]).set_rng_state(state["rng"])
    history.trace.update(state["history"].pop("trace"))  # in the dictionary that the script fills
    vars(history).update(state["history"])
    return state["best"]


def rng_module(model: nn.Module):
    """The module with the state of the random numbers that dropout draws."""
    device = next(model.parameters()).device
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def save_checkpoint(path: Path, fingerprint: dict, **state):
    """Write `state` with the fingerprint of its run."""
    buffer = io.BytesIO()
    torch.save({"fingerprint": fingerprint, "threads": torch.get_num_threads(), **state}, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, fingerprint: dict) -> dict:
    """The state in a checkpoint of the run with this fingerprint."""
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        saved = state["fingerprint"]
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")
    except Exception:  # torch and pickle raise many kinds
        sys.exit(f"{path} is truncated or not a checkpoint of this project; delete it")
    for key, now in fingerprint.items():
        if saved.get(key) != now:
            difference = " ".join(f"{key} was {saved.get(key)}, is {now}".split())
            sys.exit(f"{path} is of another configuration ({difference}); run without --resume")
    return state


# ---- Runs: what is to be trained, and what is left of it -------------------------------------------------------------
class Run(NamedTuple):
    """One training. Of the configuration the engine itself uses "epochs" and "images", the first N to train on."""

    name: str
    config: dict  # flat, says everything
    seed: int
    fingerprint: dict  # says which run it is: files of another one are refused
    threads: int
    path: Path  # of the result, once the run is finished
    history: History | None = None  # so far, if it was begun
    layers: str = ""  # of the network that is trained
    parameters: int = 0  # these three are there once the run is finished
    scores: dict | None = None  # its entry in the results file
    test_logits: Tensor | None = None  # (10000, 10)

    def __str__(self):
        return f"{self.name}, seed {self.seed}"

    @property
    def checkpoint(self) -> Path:
        """Of the run while it is not finished."""
        return self.path.with_name(f"{self.path.stem}_unfinished.pt")


def list_runs(args, data: Dataset, configs: dict[str, dict], seeds: list[int], test: bool) -> list[Run]:
    """All runs, the seeds of a name one after another, so that torchrun's ranks get equal shares."""
    threads = granted_threads(args.threads or max(1, CORES // min(args.workers, len(configs) * len(seeds))))
    environment = {"data": 0, "device": args.device.type, "precision": args.precision}
    for tensor in itertools.chain(*data[:3]):
        environment["data"] = zlib.crc32(tensor.cpu().contiguous().numpy(), environment["data"])
    must_agree = {**environment, "threads": threads, "resume": args.resume}
    for other in gather(must_agree):
        if different := [key for key, value in must_agree.items() if other[key] != value]:
            sys.exit(f"torchrun's ranks have different {' and '.join(different)}")
    runs = []
    for name, seed in itertools.product(configs, seeds):
        fingerprint = {"run": name, "seed": seed, **configs[name], **environment, "test": test}
        path = Path(f"{args.stem}_runs") / f"{re.sub('[^0-9A-Za-z_.,+]+', '-', name)}_seed{seed}.pt"
        runs.append(Run(name, configs[name], seed, fingerprint, threads, path))
    return runs


def list_unfinished(runs: list[Run], args) -> list[Run]:
    """Those that are left to train; without --resume all, afresh. Even then a finished run of the same configuration
    keeps its file until it is finished again: another start in the same folder may still want to read it."""
    left = []
    for run in runs:
        if not (args.resume or RESTARTS):
            run.checkpoint.unlink(missing_ok=True)
            try:
                load_checkpoint(run.path, run.fingerprint)
            except SystemExit:  # of another configuration, or not there
                run.path.unlink(missing_ok=True)
            left.append(run)
        elif run.checkpoint.exists():
            stopped = load_result(run, run.checkpoint)  # with its threads it ends bit-identical
            threads = run.threads if args.threads else min(stopped.threads, usable_cores())
            left.append(stopped._replace(threads=threads))
        elif run.path.exists():
            load_checkpoint(run.path, run.fingerprint)  # refuses now, not after the training
        else:
            left.append(run)
    return left


def load_result(run: Run, path: Path) -> Run:
    """The run with what one of its two files holds."""
    state = load_checkpoint(path, run.fingerprint)
    outcome = {"threads": state["threads"], "layers": state["fingerprint"]["layers"], **state.get("result", {})}
    return run._replace(history=History(**state["history"]), **outcome)


def load_results(runs: list[Run]) -> dict[str, list[Run]]:
    """By name, in the order of `runs`. Seeds of different networks have no mean: they end the program."""
    results = {}
    for run in runs:
        results.setdefault(run.name, []).append(load_result(run, run.path))
    for name, group in results.items():
        if len({run.layers for run in group}) > 1:
            sys.exit(f"seeds of {name} are of different networks; run without --resume")
    return results


# ---- Engine: all runs side by side, each scored on the test split once -----------------------------------------------
def run_all(train, args, data: Dataset, configs=None, seeds=None, test=True) -> dict[str, list[Run]]:
    """Train all `configs` (default: args.runs) with all `seeds` (args.seeds): {name: results of its seeds}.

    `train(config, data, seed, **settings) -> (model, History)` passes `settings` to `fit`; its data have no test split:
    that is evaluated here only, once for each run, with the kept weights (test=False: not at all). args.workers
    processes train side by side; each of torchrun's ranks trains its share, and all return all results. If a run raises
    an exception, the others go on, and then the exit code is 1.
    """
    runs = list_runs(args, data, args.runs if configs is None else configs, seeds or args.seeds, test)
    share = runs[RANK::WORLD]
    folder = runs[0].path.parent
    try:  # now, not after the first epoch
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            started = os.fstat(file.fileno()).st_mtime  # by the clock of the folder's machine
    except OSError as error:
        sys.exit(f"cannot write in {folder}: {error.strerror}; give another --out-dir")
    if args.resume and not any(folder.glob("*.pt")):
        print(f"nothing to resume in {folder}: starting afresh")
    left = list_unfinished(share, args)
    workers = min(args.workers, max(1, len(left)))
    how = f"{workers} at a time, {runs[0].threads} thread(s) each, {args.device.type}, {args.precision}"
    print(f"{data.name}: {len(left)} of {len(share)} runs to train, {how}", flush=True)
    try:
        failures = list(itertools.chain(*gather(train_runs(train, data, left, workers))))
    except KeyboardInterrupt:
        report_interrupted(runs, args, data, 0 if args.resume or RESTARTS else started)
    if failures:
        message = f"{len(failures)} of {len(runs)} runs failed, no results are reported: {'; '.join(failures)}"
        sys.exit(1 if RANK else message)
    return load_results(runs)


def train_runs(train, data: Dataset, runs: list[Run], workers: int) -> list[str]:
    """Train `runs`, with one progress bar; returns a line for each that failed."""
    failures = []
    sizes = {run.path: len(data.train.labels[: run.config.get("images")]) for run in runs}  # of an epoch
    trained = {run.path: len(run.history.rows) if run.history else 0 for run in runs}
    total = sum(sizes[run.path] * (run.config["epochs"] - trained[run.path]) for run in runs)
    with tqdm(total=total, unit=" images", unit_scale=True, disable=None, leave=False) as bar:

        def show(images, line=""):
            bar.update(images)
            if line:
                bar.write(line)
                sys.stdout.flush()  # for who reads a pipe

        in_turn = ((run, train_run(train, data, run, show)) for run in runs)
        for run, failure in in_turn if workers == 1 else train_in_processes(train, data, runs, workers, show):
            if failure:
                failures.append(f"{run}: {failure}")
                show(0, f"FAILED: {run}: {failure}")
                continue
            result = load_result(run, run.path)
            bar.total -= sizes[run.path] * (run.config["epochs"] - len(result.history.rows))  # it stopped early
            accuracies = [f"{key} {value:.2f} %" for key, value in result.scores.items() if "accuracy" in key]
            show(0, f"{run}: {', '.join(accuracies)}")
    return failures


def train_run(train, data: Dataset, run: Run, show) -> str:
    """Train and score a run, from its checkpoint on if there is one, and write its result. Returns what failed."""
    setup(run.threads)
    data = data._replace(train=data.train.head(run.config.get("images")))

    def progress(images, line=""):
        show(images, f"{run}: {line}" if line else "")

    try:
        model, history = train(
            run.config,
            data._replace(test=None),
            run.seed,
            precision=run.fingerprint["precision"],
            checkpoint=run.checkpoint,
            fingerprint=run.fingerprint,
            progress=progress,
        )
        tested, logits = {}, None
        if run.fingerprint["test"]:
            loss, accuracy, logits = evaluate(model, data.test)
            tested = {"test_loss": loss, "test_accuracy": accuracy, "train_accuracy": evaluate(model, data.train)[1]}
            logits = logits.cpu()
    except Exception as error:  # of the script or of torch; the other runs go on
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{in_a_line(error)} ({Path(place.filename).name}, line {place.lineno})"
    course = {"epochs": len(history.rows), "best_epoch": history.best_epoch}
    seconds = sum(row["seconds"] for row in history.rows)
    scores = {"seed": run.seed, **tested, "val_accuracy": history.val_accuracy, **course, "seconds": seconds}
    result = {"parameters": count_parameters(model), "scores": {**scores, "health": history.health}}
    kept = {"history": asdict(history), "best": model.state_dict()}
    fingerprint = {**run.fingerprint, "layers": repr(model)}
    save_checkpoint(run.path, fingerprint, result={**result, "test_logits": logits}, **kept)
    run.checkpoint.unlink(missing_ok=True)
    return ""


def train_in_processes(train, data: Dataset, runs: list[Run], workers: int, show):
    """Yield (run, what failed) as `workers` processes finish the runs; `show` gets their progress."""
    # Forked from a server that has imported what a training needs (optimizers import the compiler), processes share its
    # memory. The server's address is a file in the temporary folder, whose name has to be short.
    forks = NATIVE and len(tempfile.gettempdir()) < 64
    context = torch.multiprocessing.get_context("forkserver" if forks else "spawn")
    messages = context.SimpleQueue()
    if forks:
        context.set_forkserver_preload(["common", "torch._dynamo"])
    if NATIVE:  # no binding: it would put the first thread of each process on the same core
        os.sched_setaffinity(0, allowed_cores())  # the processes inherit it
        os.environ["OMP_PROC_BIND"] = "false"
    with ProcessPoolExecutor(workers, context, start_worker, (train, data, messages)) as pool:
        try:
            left = {pool.submit(train_in_worker, run): run for run in runs}
        except KeyboardInterrupt:
            end_workers()
            raise
        except Exception as error:  # no shared memory (/dev/shm), no process or file left, or a debugger's `train`
            end_workers()
            print(f"worker processes cannot start ({in_a_line(error)}); --workers 1 needs none", file=sys.stderr)
            sys.exit(1)  # a profiler would drop a message here
        try:
            while left:
                done, _ = wait(left, timeout=0.1, return_when=FIRST_COMPLETED)
                while not messages.empty():
                    show(*messages.get())
                for future in done:
                    yield left.pop(future), future.result()
        except BrokenProcessPool:
            advice = "--workers 1 needs about 1 GB (variant 8: 3 GB); --resume continues"
            sys.exit(f"a worker process ended without a result, probably out of memory; {advice}")
        except BaseException:  # Ctrl-C, or a full disk
            end_workers()
            raise


def end_workers():
    for process in multiprocessing.active_children():
        process.kill()


WORK = []  # of a worker process: train, data, messages; sent once, not with each run


def start_worker(*work):
    """Of a process of the pool, which leaves Ctrl-C to the first process and ends with it."""

    def end_with_first_process():
        multiprocessing.parent_process().join()
        os._exit(1)

    WORK[:] = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_first_process, daemon=True).start()


def train_in_worker(run: Run) -> str:
    train, data, messages = WORK
    return train_run(train, data, run, lambda *progress: messages.put(progress))


# ---- Results: files first, then the table, then the plots ------------------------------------------------------------
def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if values[1:] else None


def test_accuracies(results: list[Run]) -> list[float]:
    """Test accuracy of each, in percent."""
    return [result.scores["test_accuracy"] for result in results]


def format_accuracy(values: list[float]) -> str:
    """Accuracies of seeds as "99.27 ± 0.05 %", mean and standard deviation, or "99.27 %" of one seed."""
    mean, std = mean_std(values)
    return f"{mean:.2f} %" if std is None else f"{mean:.2f} ± {std:.2f} %"


def summarize(results: dict[str, list[Run]]) -> str:
    """The best test accuracy and the worst, for a title."""
    ranked = sorted(results, key=lambda name: statistics.fmean(test_accuracies(results[name])), reverse=True)
    names = ranked if len(ranked) == 1 else [ranked[0], ranked[-1]]
    texts = [f"{format_accuracy(test_accuracies(results[name]))} with {name}" for name in names]
    count = len(results[ranked[0]])
    return f"Test accuracy is {', '.join(texts)} ({count}\xa0seed{'s' if count > 1 else ''})"


def report(results: dict[str, list[Run]], args, data: Dataset, plots: dict[str, tuple], expected_to_diverge=()):
    """Write <stem>.csv and <stem>.json, print the table of results, and write `plots`, {what: (title, function that
    returns a figure, *its arguments)}, as <stem>_<what>.png. A run that diverged, unless it is expected to, then ends
    the program with exit code 1."""
    write_log(f"{args.stem}.csv", results)
    write_results(f"{args.stem}.json", results, args, data)
    print_table(results, data.name)
    print(f"log, results and plots: {args.stem}*")
    for what, (title, plot, *arguments) in plots.items():
        save_plot(f"{args.stem}_{what}.png", title, data.name, plot, *arguments)
    diverged = [name for name, group in results.items() if any(result.history.diverged for result in group)]
    if unexpected := [name for name in diverged if name not in expected_to_diverge]:
        message = f"training diverged: {', '.join(unexpected)}; a lower --lr may help"
        sys.exit(1 if RANK else message)


def report_interrupted(runs: list[Run], args, data: Dataset, started: float):
    """Write log and curves of the epochs so far, of this start and what it resumed, and end the program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C
    begun = {}
    for run in runs if RANK == 0 else []:
        finished = run.path.exists() and run.path.stat().st_mtime >= started
        path = run.checkpoint if run.checkpoint.exists() else run.path
        if run.checkpoint.exists() or finished:
            result = load_result(run, path)
            if result.history.rows:
                begun.setdefault(run.name, []).append(result)
    if begun:
        write_log(f"{args.stem}.csv", begun)
        save_plot(f"{args.stem}_curves.png", "Interrupted: the epochs so far", data.name, plot_curves, begun)
    print(f"interrupted; --resume continues what is in {args.stem}_runs", flush=True)
    sys.exit(130)


def write_csv(path: Path | str, rows: list[dict]):
    """A table with the keys of the first row as its header; floats have six digits."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_file(path, file.getvalue().encode())


def write_log(path: Path | str, results: dict[str, list[Run]]):
    """The training log: a row for each run and epoch."""
    runs = [(name, result) for name, group in results.items() for result in group]
    write_csv(path, [{"run": name, "seed": run.seed, **row} for name, run in runs for row in run.history.rows])


def write_results(path: Path | str, results: dict[str, list[Run]], args, data: Dataset):
    """The results file; "threads" is a list if runs had different numbers."""
    runs = {}
    for name, group in results.items():
        mean, std = mean_std(test_accuracies(group))
        entry = {"parameters": group[0].parameters, "config": group[0].config}
        runs[name] = {**entry, "seeds": [result.scores for result in group], "mean": mean, "std": std}
    sizes = {name: len(getattr(data, name).labels) for name in ("train", "val", "test")}
    threads = sorted({result.threads for group in results.values() for result in group})
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    machine = {"device": args.device.type, "threads": threads[0] if len(threads) == 1 else threads}
    environment = {**versions, **machine, "precision": args.precision}
    contents = {"script": args.script, "data": {"source": data.name, **sizes}, "environment": environment, "runs": runs}
    write_file(path, (json.dumps(json_ready(contents), indent=1, ensure_ascii=False) + "\n").encode())


def json_ready(contents: dict) -> dict:
    """`contents` with floats rounded to four digits; JSON has no NaN or infinity, they become null."""
    text = json.dumps(contents)
    return json.loads(text, parse_float=lambda digits: round(float(digits), 4), parse_constant=lambda name: None)


def print_table(results: dict[str, list[Run]], dataset: str):
    """Test accuracy and diagnosis of each run."""
    width = max(map(len, results))
    seeds = max(map(len, results.values()))
    print(f"\n{dataset}, {seeds} seed(s)\n{'run':<{width}}  parameters   test accuracy     health")
    for name, group in results.items():
        counts = Counter(alarm for result in group for alarm in alarm_names(result.history.health[:1]))  # the diagnosis
        alarms = ", ".join(f"{alarm} ({count}x)" for alarm, count in counts.items()) or "no alarm"
        print(f"{name:<{width}}{group[0].parameters:>12,}   {format_accuracy(test_accuracies(group)):<18}{alarms}")


# ---- Plots: each function returns a Figure, which `save_plot` titles and writes --------------------------------------
# Okabe and Ito's colours, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3}


def save_plot(path: Path | str, title: str, dataset: str, plot, *arguments):
    """Write `plot(*arguments)`, a Figure, as PNG with its title, which names the data set if it is not MNIST. A plot
    that fails is one line on stderr: it is no result."""
    os.environ.pop("MPLBACKEND", None)  # of a notebook, perhaps, and not to be had here; a Figure needs none
    try:
        import matplotlib  # late: --help need not wait for it

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # a matplotlibrc may ask for what is not here, LaTeX for instance
            matplotlib.rcParams.update(STYLE)
            figure = plot(*arguments)
            title = title if dataset == "MNIST" else f"[{dataset}] {title}"
            title = title.replace(" ± ", "\xa0±\xa0").replace(" %", "\xa0%")  # so that no line breaks in an accuracy
            figure.suptitle(textwrap.fill(title, int(8.5 * figure.get_figwidth())), fontweight="bold")
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
    except Exception as error:
        print(f"cannot draw {path}: {in_a_line(error)}", file=sys.stderr)
        return
    write_file(path, buffer.getvalue())


def new_figure(width: float, height: float):
    """An empty matplotlib Figure, sizes in inches."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def accuracy_axis(axes, name="y"):
    """Scale an axis of accuracies (%) by the logarithm of the error: 10 and 99.5 are both legible."""
    set_scale, axis = (axes.set_yscale, axes.yaxis) if name == "y" else (axes.set_xscale, axes.xaxis)
    set_scale("function", functions=(lambda y: -np.log(np.maximum(100.02 - y, 0.01)), lambda z: 100.02 - np.exp(-z)))
    low, high = axis.get_view_interval()
    ticks = np.arange(99, 100, 0.1) if low > 98 else [0, 50, 80, 90, 95, 97, 98, 99, 99.5, 99.8, 100]
    axis.set_ticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axis.set_major_formatter("{x:g}")


def label_ends(axes, ends: list[tuple]):
    """Write the texts of `ends`, (x, y, text, colour), right of all lines; those that would overlap move inwards."""
    axes.grid(True)
    right = max((end[0] for end in ends), default=0)
    placed = [(axes.transData.transform(end[:2])[1], end) for end in ends]  # heights in pixels
    up = 1 if sum(height - axes.bbox.intervaly.mean() for height, _ in placed) < 0 else -1
    free = -math.inf
    for height, (_, y, text, color) in sorted(placed, reverse=up < 0):
        text = re.sub("(?<![,:]) ", "\xa0", text)  # breaks after commas and colons
        text = textwrap.fill(text, 30)
        half = 9 * (1 + text.count("\n"))
        free = max(up * height, free + half) + half
        offset = 10, up * (free - half) - height
        axes.annotate(text, (right, y), offset, textcoords="offset pixels", va="center", color=color)


def plot_curves(results: dict[str, list[Run]]):
    """Loss and accuracy by epoch: the mean of the seeds that are still training, in a band from the lowest to the
    highest. The test accuracy, once it is known, stands at the ends of the lines."""
    figure = new_figure(12, 5)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.set_yscale("linear" if quantity == "accuracy" else "log")
        ends = []
        for (i, (name, group)), part in itertools.product(enumerate(results.items()), ("train", "val")):
            color = COLORS[i % len(COLORS)]
            lines = [[row[f"{part}_{quantity}"] for row in run.history.rows] for run in group]
            columns = [[y for y in column if y is not None] for column in itertools.zip_longest(*lines)]
            epochs = range(1, len(columns) + 1)
            means = [statistics.fmean(column) for column in columns]
            axes.plot(epochs, means, "-" if part == "val" else "--", color=color, lw=2)
            axes.fill_between(epochs, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.15, lw=0)
            if part == "val":
                best = [run.history.best_epoch for run in group]
                kept = [line[epoch - 1] for line, epoch in zip(lines, best, strict=True)]
                axes.plot(best, kept, MARKERS[i % len(MARKERS)], fillstyle="none", color=color)
                text = name
                if quantity == "accuracy" and all(run.scores and "test_accuracy" in run.scores for run in group):
                    text = f"{name}: test {format_accuracy(test_accuracies(group))}"
                if math.isfinite(means[-1]):
                    ends.append((len(means), means[-1], text, color))
                else:
                    axes.text(0.5, 1, f"{name}: the loss is not a number", color=color, transform=axes.transAxes)
        if quantity == "accuracy":
            accuracy_axis(axes)
        axes.set(xlabel="epoch", ylabel="accuracy (%)" if quantity == "accuracy" else "loss (cross-entropy, nats)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        label_ends(axes, ends)
    how = "mean and range of the seeds; solid: validation; dashed: training (dropout, augmentation, smoothed labels); "
    figure.supxlabel(how + "open markers: the epoch whose weights were kept", fontsize=9)
    return figure


def plots_by_recipe(results: dict[str, list[Run]]) -> dict[str, tuple]:
    """For `report`: the curves of the published recipes, and of the improved ones."""
    improved = {name: group for name, group in results.items() if name.endswith("improved")}
    published = {name: group for name, group in results.items() if name not in improved}
    parts = {"curves": published, "curves_improved": improved}
    return {what: (summarize(part), plot_curves, part) for what, part in parts.items() if part}


def draw_images(axes, images, columns, captions=()):
    """Images (N, 1, 28, 28) in rows of `columns`, dark on light as on paper, below captions of two short lines."""
    top, rows = (14 if captions else 2), max(1, math.ceil(len(images) / columns))
    tiles = F.pad(images.cpu(), (2, 2, top, 2, 0, 0, 0, rows * columns - len(images)))
    tiles = tiles.view(rows, columns, 30 + top, 32).transpose(1, 2).flatten(2)
    axes.imshow(tiles.flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=255)
    for i, caption in enumerate(captions):
        x, y = 32 * (i % columns) + 16, (30 + top) * (i // columns) + top
        axes.text(x, y, caption, ha="center", va="bottom", fontsize=9)
    axes.axis("off")


# ---- Synthetic digits: drawn with a pen, for machines without MNIST --------------------------------------------------
# Ways to write a digit, as points of a pen's path: two letters are a point, its column and row from a to u in a 21 x 21
# grid; "-" lifts the pen. A point named twice in a row is a corner. Points named again are the same, and move together.
SKELETONS = {
    0: "kaedbkerkuqrtkqdka nbgbchdpjuprsjpdjbhe jaefdmhtntrmpeja oajceieqjupqrindie",
    1: "kakkku lakhknju gflalalklu fflalalklu-euluru",
    2: "cfgbmaqeojipcucuktst cfhaobqgmngscsdpiqntts dejapdojhqbtbthsnuts bdjaqdnkdudusu eghbnbpglmercuguhrmstu "
    "fdkaoemmhsdsdoionsup eekapfnmirdtbqfnkqnutt gdlaoekmdsdsirouss ddjbocnhincscshqmruu",
    3: "ddjapdoiikikpmrqluds dbqbqbijijplqqkucs ceiapdniiknlrpmufubr dckapeljgkiimkrplucs "
    "ccibobobkfgjgjmjpomtfucr dcoboblgijijnmnqlu edlapdkihjmlopkueu",
    4: "eaclclklsk-obnkmu nacncnkntn-nanknu dachflmkpg-qaoknu dbdiikohqaqaokmu kaggclclklsl-mglnku "
    "gbeieikjqh-qapkou iadhcmhnsl-ndnmmu",
    5: "rafbfbejejlhrmoshubr gbfimiqnmtdt-gbmbsa rbjcgimlnqiubs qbhbhbfifilionktds sbicicdkdkjiploriudsfp "
    "ragdgdekkipjoplu rcfcfcfjfjpkoqdu",
    6: "oahfdmfsluqqolilep kafiepiuosonjmfq rajgengtnuqpmlgneq gaeiepjuprnmimep majhhoitmtnplnip pbicdjerlusqrlmkhojs",
    7: "ccrbrblkiu cfdbdbrbrbmkju ccrbrblkiu-glqk behbpbrdnkju bffcldraranklu ejedjbpcqipoou dgebebkcqbnkku-gllkrk",
    8: "qdjaeejjpoluerhlogqd kafekjpeka-kjeokuqokj rckafekkopjueqjkqe fcegkkppkufqjkpfkafc "
    "rbmhhngskunqkkefhanbof pciadfiknhpcmjlpjuhqkk obhaeeiimmnrkuiqlkqgte",
    9: "qekbeefklkqeqepmou qekaefikoiqeqmmtft pdiadfgknipdpdnmku pcjafehjnipcollu pdiacfclhnnjpdpdqmqu "
    "qbibdffjljqfonlu fadghjnhpbpboknu rcjaeeiipiooiu",
}


def skeleton_path(text: str) -> tuple[Tensor, Tensor]:
    """The points (K, 2) of a skeleton and the matrix (P, K) that maps them to P places along its path."""
    grid = "abcdefghijklmnopqrstu"
    strokes = [list(zip(stroke[::2], stroke[1::2], strict=True)) for stroke in text.split("-")]
    names = list(dict.fromkeys(point for stroke in strokes for point in stroke))
    points = torch.tensor([[grid.index(x), grid.index(y)] for x, y in names]).float()
    rows = []
    for stroke in strokes:  # a cubic curve through its points, twelve places for each segment
        weights = torch.eye(len(points))[[names.index(point) for point in stroke]].T[None, :, None]
        size = (1, 12 * len(stroke) - 11)
        rows.append(F.interpolate(weights, size, mode="bicubic", align_corners=True)[0, :, 0].T)
    return points, torch.cat(rows)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw uint8 images (count, 1, 28, 28) and labels (count,), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pick = torch.rand(count, generator=generator)
    images = torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    for digit, texts in SKELETONS.items():
        skeletons = texts.split()
        rows = (labels == digit).nonzero().flatten()
        for i, text in enumerate(skeletons):
            chosen = rows[(pick[rows] * len(skeletons)).long() == i]
            for part in chosen.split(1000):  # which keeps the memory small
                images[part, 0] = draw_skeleton(*skeleton_path(text), len(part), generator)
    return images, labels


def draw_skeleton(points: Tensor, path: Tensor, count: int, generator) -> Tensor:
    """Draw one skeleton `count` times, each differently: uint8 (count, 28, 28), framed like MNIST's digits, in a box of
    20 pixels with the centre of mass in the middle."""

    def normal(*shape, std=1.0, mean=0.0):
        draws = torch.randn(count, *shape, generator=generator)
        return mean + std * draws.clamp(-2, 2)  # beyond, digits become illegible

    # Handwriting varies in each point (jitter), as a whole (a polynomial deformation), in width, slant and rotation.
    jitter = normal(len(points), 2, std=0.1) * normal(1, 1, std=0.3).exp()
    pen = path @ ((points - 10) / 10 + jitter)
    x, y = pen.unbind(2)
    powers = [x * x, x * y, y * y, x**3, x * x * y, x * y * y, y**3]
    x, y = (pen + torch.stack(powers, 2) @ normal(7, 2, std=0.12)).unbind(2)
    x = x * normal(1, std=0.3).exp() - y * normal(1, std=0.3, mean=0.15)
    angle = normal(1, std=0.15)
    x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y

    pen = torch.stack([x, y], 2)
    radius = normal(1, std=0.35, mean=0.15).exp()
    extent = (pen.amax(1) - pen.amin(1)).amax(1, keepdim=True)
    pen = pen * ((20 - 2 * radius) / extent).unsqueeze(2)
    length = (pen.roll(-1, 1) - pen).norm(dim=2)
    length = length.minimum(3 * length.median(1, keepdim=True).values)  # no pen lifts
    centre = (pen * length.unsqueeze(2)).sum(1) / length.sum(1, keepdim=True)
    pen = pen - centre.unsqueeze(1) + 14.0 + normal(1, 2, std=0.3)

    # Ink by the distance to the path. The sum of exp(-d^2 / 2 s^2) along the path is dominated by its nearest point, so
    # its logarithm gives the distance; the Gaussian separates into columns and rows: the sum is a matrix product.
    s = 0.7
    pixel = torch.arange(28.0)
    columns, rows = (torch.exp(-(((pixel - pen[:, :, i, None]) / s) ** 2) / 2) for i in (0, 1))
    share = (length / (s * math.sqrt(2 * math.pi))).unsqueeze(2)
    density = rows.transpose(1, 2) @ (columns * share)
    distance = (-2 * s * s * density.clamp(min=1e-30).log()).clamp(min=0).sqrt()
    ink = (radius.unsqueeze(2) - distance + 0.5).clamp(0, 1)
    return (255 * ink).to(torch.uint8)
