"""What two or more scripts share, in the order in which a run needs it; at the end the synthetic digits.

Images are uint8 (N, 1, 28, 28) until `normalize` makes them float. Losses are mean cross-entropies in nats,
accuracies are percentages. A foreseeable mistake of the user ends the program with one line (SystemExit).
"""

import argparse
import atexit
import copy
import csv
import ctypes
import functools
import gzip
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
CORES = torch.get_num_threads()  # that torch may use; OMP_NUM_THREADS lowers it
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # whether this process is one of torchrun's ranks
RANK = int(os.environ["RANK"]) if TORCHRUN else 0


# ---- Setup: process, device, files -----------------------------------------------------------------------------------
def setup(threads):
    """Settings of a process that trains, before its first computation: threads take them over when they start."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # multiplying denormal numbers is many times slower
    torch.backends.cudnn.deterministic = True  # a resumed run ends bit-identical
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, and below M_MMAP_THRESHOLD: glibc keeps blocks of up to 32 MiB
        libc.mallopt(-3, 1 << 25)  # instead of returning them at each step, and fp32 training is a fifth faster


def available_devices() -> list[str]:
    """The device types of this machine, the fastest first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [accelerator.type, "cpu"] if accelerator else ["cpu"]


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 natively; emulated, it is slower than fp32."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def write_file(path, content: bytes):
    """Write `path` atomically: after a kill there is the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    for other in temporary.parent.glob(f".{Path(path).name}.*") if sys.platform == "linux" else ():
        if not Path("/proc", other.suffix[1:]).exists():  # its process was killed
            other.unlink(missing_ok=True)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        sys.exit(f"cannot write {path}: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)


# ---- Command line ----------------------------------------------------------------------------------------------------
def make_parser(script: Path, doc: str, names: list[str], seeds: int, options: dict) -> argparse.ArgumentParser:
    """The parser of every script; --only selects one of `names`, `seeds` are trained by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{script.name}: {message}\n")
    add = parser.add_argument
    add("--epochs", type=int, help="at most, of every run (each run's own)")
    add("--batch-size", type=int, help="of every run (each run's own)")
    add("--lr", type=float, help="learning rate of every run (each run's own)")
    add("--seed", type=int, help="train this seed only")
    add("--seeds", type=int, help=f"train seeds 0, 1, .. SEEDS-1 ({seeds})")
    add("--only", choices=names, metavar="NAME", help=f"train one of: {'; '.join(names)}".replace("%", "%%"))
    add("--workers", type=int, help="runs trained side by side (one for each core; 1 on a GPU)")
    add("--threads", type=int, help="of each run (the cores divided by the workers)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto")
    add("--data-dir", type=Path, default=os.environ.get("MNIST_DIR") or ROOT / "data", help="($MNIST_DIR, or data/)")
    add("--out-dir", type=Path, default=script.parent, help="(beside the script)")
    add("--limit", type=int, help="train on the first LIMIT images")
    add("--resume", action="store_true", help="continue what a stopped start has left")
    for flag, settings in options.items():
        add(flag, **settings)
    return parser


def parse_args(script, doc, runs, argv=None, *, seeds=1, count=None, options=None, **defaults) -> argparse.Namespace:
    """Parse the command line of a script with these runs, {name: configuration} (or `count` of them), `options` of its
    own, {flag: settings}, and `defaults` of common ones. Returns the options with runs (those to train, overrides
    applied), seeds (a list), device (torch.device), precision ("fp32" or "bf16"), workers, threads, script (its path in
    the project), stem (the path that its outputs begin with) and unchanged: whether runs and data are the script's own.
    A bad value: exit code 2."""
    script = Path(script).resolve()
    networks = [config["network"] for config in runs.values() if "network" in config]
    parser = make_parser(script, doc, list(dict.fromkeys([*networks, *runs])), seeds, options or {})
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for option in ("epochs", "batch_size", "lr", "seed", "seeds", "workers", "threads", "limit"):
        value = getattr(args, option)
        least = {"seed": 0, "lr": 1e-9}.get(option, 1)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{option.replace('_', '-')} {value}: not a number from {least} on")
    if args.seed is not None and args.seeds is not None:
        parser.error("--seed and --seeds exclude each other")
    overrides = {key: value for key in ("epochs", "batch_size", "lr") if (value := getattr(args, key)) is not None}
    args.runs = {
        name: {key: overrides.get(key, value) for key, value in config.items()}
        for name, config in runs.items()
        if args.only in (None, name, config.get("network"))
    }
    args.unchanged = not (overrides or args.only or args.limit)
    args.seeds = list(range(args.seeds or seeds)) if args.seed is None else [args.seed]
    devices = available_devices()
    args.device = devices[0] if args.device == "auto" else args.device
    if args.device not in devices:
        parser.error(f"--device {args.device}: not here; there is {', '.join(devices)}")
    args.device = torch.device(args.device)
    native = "bf16" if has_native_bf16(args.device) else "fp32"
    args.precision = native if args.precision == "auto" else args.precision
    most = CORES if args.device.type == "cpu" and not TORCHRUN else 1  # each of torchrun's ranks is a worker
    args.workers = min(args.workers or most, count or len(args.runs) * len(args.seeds))
    args.threads = args.threads or max(1, CORES // args.workers)
    args.script = script.relative_to(ROOT).as_posix()
    args.stem = args.out_dir.resolve() / script.stem
    try:  # now, not after the training
        args.out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()
    except OSError as error:
        parser.error(f"--out-dir {args.out_dir}: cannot write: {error.strerror}; give another folder")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first rank prints
    setup(CORES)  # now: the first computation starts the threads
    return args


# ---- Data ------------------------------------------------------------------------------------------------------------
MEAN, STD = 0.1307, 0.3081  # of the training pixels, scaled to 0-1
VAL_SHARE = 12  # one training image in 12 is for validation: 5,000 of 60,000
SPLIT_SEED = 2024  # the same validation images in every run of every script
DOWNLOAD_SECONDS = 120  # for all four files, 11 MB
DOWNLOAD = "from torchvision.datasets import MNIST\nMNIST({folder!r}, download=True)"
MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class Split(NamedTuple):
    images: Tensor  # uint8 (N, 1, 28, 28)
    labels: Tensor  # int64 (N,)


class Dataset(NamedTuple):
    train: Split
    val: Split
    test: Split | None  # None for what trains
    name: str  # "MNIST" or "synthetic digits"


def first(split: Split, count: int | None) -> Split:
    """The first `count` images with their labels (None: all)."""
    return Split(split.images[:count], split.labels[:count])


def normalize(images: Tensor) -> Tensor:
    """Pixels 0-255, uint8 or float -> float32 with mean 0 and standard deviation 1."""
    return images.float().mul(1 / (255 * STD)).sub_(MEAN / STD)


def load_data(args) -> Dataset:
    """The data set that the command line asks for: MNIST from --data-dir, in torchvision's layout, downloaded if it is
    missing; if that fails with --data auto the synthetic digits, with a warning. Corrupt files are always an error."""
    if args.data != "synthetic":
        try:
            return split_data(*read_mnist(args.data_dir), "MNIST", args.limit, args.device)
        except ValueError as error:
            sys.exit(f"{error}; delete the file to download it again")
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
    val, train = order.tensor_split([len(labels) // VAL_SHARE])
    train = train[:limit]
    splits = (images[train], labels[train]), (images[val], labels[val]), (test_images, test_labels)
    return Dataset(*(Split(x.to(device), y.to(device)) for x, y in splits), name)


def read_mnist(data_dir) -> list[Tensor]:
    """Training images uint8 (N, 1, 28, 28) and labels int64 (N,), then those of the test split. Raises ValueError for a
    corrupt file, OSError if one is missing and cannot be downloaded."""
    raw = Path(data_dir) / "MNIST" / "raw"
    if missing := [name for name in MNIST_FILES if not any((raw / f"{name}{end}").exists() for end in ("", ".gz"))]:
        download_mnist(raw, missing)
    parts = [read_idx(raw / name, (1, 28, 28) if "images" in name else ()) for name in MNIST_FILES]
    for images, labels, name in zip(parts[::2], parts[1::2], MNIST_FILES[::2], strict=True):
        if len(images) != len(labels) or len(images) < VAL_SHARE:
            raise ValueError(f"{raw / name} and its labels differ: {len(images)} images, {len(labels)} labels")
    return [images if images.dim() > 1 else images.long() for images in parts]


def read_idx(path: Path, shape: tuple) -> Tensor:
    """The items in an IDX file, or in its gzipped version, uint8 (N, *shape). Raises ValueError for a file of another
    kind or size, which torchvision does not always, and for labels other than 0-9."""
    if path.exists():
        content = path.read_bytes()
    else:
        path = path.with_name(f"{path.name}.gz")
        try:
            content = gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise ValueError(f"{path} is truncated or not a gzip file") from None
    size = 16 if shape else 8
    magic, count, *dimensions = [int.from_bytes(content[i : i + 4], "big") for i in range(0, size, 4)]
    if magic != (2051 if shape else 2049) or tuple(dimensions) != shape[1:]:
        raise ValueError(f"{path} is not an MNIST file of its kind")
    if count == 0 or len(content) != size + count * math.prod(shape):
        raise ValueError(f"{path} is empty, truncated or too long")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=size).view(count, *shape)
    if not shape and values.max() > 9:
        raise ValueError(f"{path} has labels other than 0-9")
    return values


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
            raise OSError(done.stderr.strip().rpartition("\n")[2].rpartition("got:")[2].strip()[:200])
        for name in names:
            os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)


def batches(split: Split, size: int, order: torch.Generator, augment=None, shuffle=True):
    """Yield (images float32 (B, 1, 28, 28), labels (B,)), every image once, shuffled by the generator `order` (on the
    CPU); the last batch may be smaller. `augment` gets the images as floats 0-255, before they are normalized."""
    count = len(split.labels)
    permutation = torch.randperm(count, generator=order) if shuffle else torch.arange(count)
    for rows in permutation.to(split.labels.device).split(size):  # resident data: a batch is one indexing operation
        images = split.images[rows]
        yield normalize(augment(images.float()) if augment else images), split.labels[rows]


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
    updates: list[list] = field(default_factory=list)  # each epoch's: a parameter's length before, after, and distance
    batch_labels: list[int] = field(default_factory=list)  # of an epoch's last batch
    symmetric: list[str] = field(default_factory=list)  # `symmetric_layers` before the training
    trace: dict[str, list] = field(default_factory=dict)  # what the script recorded

    val_accuracy = property(lambda history: history.rows[history.best_epoch - 1]["val_accuracy"])  # of the kept weights


def fit(
    model: nn.Module,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,  # of the batch order and the augmentation; neither dropout nor evaluation shifts it
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,  # stepped after every batch
    augment=None,  # (images float 0-255 (B, 1, 28, 28), torch.Generator) -> images
    shuffle: bool = True,
    patience: int | None = None,  # epochs without a better one after which training stops
    keep_last: bool = False,  # keep the weights of the last epoch, instead of the best
    precision: str = "fp32",  # "bf16": forward pass under autocast; weights, loss and evaluation stay fp32
    trace: dict[str, list] | None = None,  # lists that the script fills; checkpoints keep them
    checkpoint: Path | None = None,  # a file, written before the first and after every epoch
    identity: dict | None = None,  # what the checkpoint must agree with to be resumed
    resume: bool = False,  # from the checkpoint, if there is one, to a bit-identical end
    progress=lambda images, line: print(line) if line else None,  # images since the last call, log line
) -> History:
    """Train `model` in place on data.train and leave in it the weights of its best epoch on data.val: the highest
    accuracy and, among equals, the lowest loss. A loss that is not finite ends the training, as `diverged`."""
    from q4_break.fault_gallery import check_health, symmetric_layers  # late: it imports this module

    order, noise = (torch.Generator(device).manual_seed(seed) for device in ("cpu", data.train.labels.device))
    parts = {"model": model, "optimizer": optimizer, "order": order, "noise": noise, "scheduler": scheduler}
    identity = {**(identity or {}), "layers": repr(model)}
    history = History(trace={} if trace is None else trace, symmetric=symmetric_layers(model))
    best = copy.deepcopy(model.state_dict())
    if resume and checkpoint.exists():
        best = restore_training(checkpoint, identity, parts, history)
    elif checkpoint:
        save_training(checkpoint, identity, parts, history, best)
    while not history.diverged and len(history.rows) < min(epochs, history.best_epoch + (patience or epochs)):
        started = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        drawn = batches(data.train, batch_size, order, augment and (lambda images: augment(images, noise)), shuffle)
        before = [p.detach().clone() for p in model.parameters()]
        steps = math.ceil(len(data.train.labels) / batch_size)
        losses, train, labels = train_epoch(model, drawn, steps, optimizer, scheduler, precision, progress)
        val = evaluate(model, data.val)
        epoch = len(history.rows) + 1
        seconds = time.perf_counter() - started
        row = {"epoch": epoch, **train, "val_loss": val[0], "val_accuracy": val[1], "lr": lr, "seconds": seconds}
        history.rows.append(row)
        history.step_losses += losses
        history.batch_labels = labels
        pairs = zip(before, model.parameters(), strict=True)
        history.updates.append([torch.stack([a.norm(), b.norm(), (b - a).norm()]).tolist() for a, b in pairs])
        history.diverged = not math.isfinite(row["train_loss"])
        best_row = max(history.rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
        if row is best_row or keep_last:
            history.best_epoch = epoch
            best = copy.deepcopy(model.state_dict())
        if checkpoint:
            save_training(checkpoint, identity, parts, history, best)
        progress(0, log_line(history, epochs))
    history.health = check_health(model, history, data, optimizer)  # of the last weights
    model.load_state_dict(best)
    return history


def train_epoch(model, batches, steps, optimizer, scheduler, precision, progress):
    """Train on `batches`, `steps` of them, or until the mean loss is not finite. Returns the loss of each step, the
    epoch's loss and accuracy for the log, and the labels of its last batch."""
    losses = []
    total = correct = seen = shown = 0
    model.train()
    for step, (images, labels) in enumerate(batches, 1):
        with torch.autocast(images.device.type, torch.bfloat16, precision == "bf16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)  # in fp32: bf16 has three digits
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
            progress(seen - shown, "")
            shown = seen
            if not math.isfinite(total.item()):
                break
    row = {"train_loss": total.item() / seen, "train_accuracy": 100 * correct.item() / seen}
    return torch.stack(losses).tolist(), row, labels.tolist()


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def log_line(history: History, epochs: int) -> str:
    """The last epoch as a line of the log."""
    row = history.rows[-1]
    end = "  DIVERGED" if history.diverged else "  kept" if history.best_epoch == row["epoch"] else ""
    texts = [f"{p} loss {row[f'{p}_loss']:.4f} accuracy {row[f'{p}_accuracy']:.2f} %" for p in ("train", "val")]
    return f"epoch {row['epoch']:>2}/{epochs}  {'  '.join(texts)}  lr {row['lr']:.2g}  {row['seconds']:.1f} s{end}"


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def save_training(path: Path, identity: dict, parts: dict, history: History, best: dict):
    """Write all that a training needs to continue."""
    state = {k: v.get_state() if isinstance(v, torch.Generator) else v and v.state_dict() for k, v in parts.items()}
    rng = generator_of(parts["model"]).get_rng_state()
    write_file(path, pack(identity, **state, rng=rng, history=asdict(history), best=best))


def restore_training(path: Path, identity: dict, parts: dict, history: History) -> dict:
    """Put everything back to what `save_training` wrote; returns the best weights."""
    state = load_checkpoint(path, identity)
    for name, part in parts.items():
        if part:
            (part.set_state if isinstance(part, torch.Generator) else part.load_state_dict)(state[name])
    generator_of(parts["model"]).set_rng_state(state["rng"])
    history.trace.update(state["history"].pop("trace"))  # in the dictionary that the script fills
    vars(history).update(state["history"])
    return state["best"]


def generator_of(model: nn.Module):
    """The module with the state of the random numbers that dropout draws."""
    device = next(model.parameters()).device
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def pack(identity: dict, **state) -> bytes:
    """The content of a checkpoint: `state` with the identity of its run."""
    torch.save({"identity": identity, **state}, buffer := io.BytesIO())
    return buffer.getvalue()


def load_checkpoint(path: Path, identity: dict, content: bytes | None = None) -> dict:
    """The state in a checkpoint, or in its `content`, of the run with this identity."""
    try:
        source = io.BytesIO(path.read_bytes() if content is None else content)
        state = torch.load(source, map_location="cpu", weights_only=True)
        saved = state["identity"]
    except Exception:  # torch and pickle raise many kinds
        sys.exit(f"cannot resume: {path} is truncated or not a checkpoint of this project")
    for key, now in identity.items():
        if saved.get(key) != now:
            difference = " ".join(f"{key} was {saved.get(key)}, is {now}".split())
            sys.exit(f"cannot resume: {path} is of another configuration: {difference}")
    return state


# ---- Engine: all runs of a script, side by side, each scored on the test split once ----------------------------------
class Run(NamedTuple):
    """One training. Of the configuration the engine itself reads "epochs" and "images", the first N to train on."""

    name: str
    config: dict  # flat, says everything
    seed: int
    identity: dict  # all that the result depends on
    folder: str  # of the checkpoints

    __str__ = lambda run: f"{run.name}, seed {run.seed}"
    path = property(lambda run: Path(run.folder) / f"{re.sub('[^0-9A-Za-z_.,+]+', '-', run.name)}_seed{run.seed}.pt")


@dataclass
class Result:
    """A finished run. `scores` is its entry in the results file; `test_logits` (10000, 10)."""

    config: dict
    seed: int
    parameters: int
    history: History
    scores: dict
    test_logits: Tensor | None = None


def run_all(train, args, data: Dataset, configs=None, seeds=None, test=True) -> dict[str, list[Result]]:
    """Train all runs of `configs` (default: args.runs) with all `seeds` (args.seeds): {name: results of its seeds}.

    `train(config, data, seed, **settings) -> (model, History)` passes `settings` to `fit`; its data have no test split:
    that is evaluated here only, once for each run, with the kept weights (test=False: not at all). Processes train side
    by side: args.workers of this machine or, under torchrun, all ranks, of which only the first returns. If a run
    raises, or ends its process twice, the others go on, and then the exit code is 1.
    """
    environment = {"data": 0, "device": args.device.type, "threads": args.threads, "precision": args.precision}
    for tensor in itertools.chain(*data[:3]):
        environment["data"] = zlib.crc32(tensor.cpu().contiguous().numpy(), environment["data"])
    folder = Path(f"{args.stem}_runs")
    configs = args.runs if configs is None else configs
    work = train, data, environment, str(folder)
    if RANK:
        serve(f"rank {RANK}", "unknown", None, *work)  # until the first rank ends
    runs = []
    for seed, name in itertools.product(seeds or args.seeds, configs):
        config = json.loads(json.dumps(configs[name]))  # as another machine gets it: tuples become lists
        identity = {"run": name, "seed": seed, **config, **environment, "test": test}
        runs.append(Run(name, config, seed, identity, str(folder)))
    if args.resume and not any(folder.glob("*.pt")):
        sys.exit(f"cannot resume: there is nothing in {folder}; run without --resume")
    resume = args.resume or (TORCHRUN and torchrun_store()[1] > 1)
    results = {}
    for run in runs:
        if not resume:
            run.path.unlink(missing_ok=True)  # what an older start has left
        elif run.path.exists() and (result := load_result(run)).scores:
            results[str(run)] = result
    left = [run for run in runs if str(run) not in results]
    how = f"{args.workers} at a time, {args.threads} thread(s) each, {args.device.type}, {args.precision}"
    print(f"{data.name}: {len(left)} of {len(runs)} runs to train, {how}", flush=True)
    try:
        failures = train_runs(work, args, left, resume, results)
    except KeyboardInterrupt:
        saved = [(run, load_result(run)) for run in runs if run.path.exists()]
        if begun := [(run.name, result) for run, result in saved if result.history.rows]:
            results = {name: [result for other, result in begun if other == name] for name, _ in begun}
            write_log(f"{args.stem}.csv", results)
            save_figure(f"{args.stem}_curves.png", plot_curves(results), "Interrupted: the epochs so far", data.name)
        print(f"interrupted; --resume continues what is in {folder}", flush=True)
        sys.exit(130)
    if failures:
        sys.exit(f"{len(failures)} of {len(runs)} runs failed, no results are reported: {'; '.join(sorted(failures))}")
    return {name: [results[str(run)] for run in runs if run.name == name] for name in configs}


def train_runs(work, args, runs: list[Run], resume: bool, results: dict) -> list[str]:
    """Train `runs`, with one progress bar; adds to `results`, by run, and returns lines of what failed."""
    train, data, *_ = work
    failures = []
    sizes = {str(run): run.config["epochs"] * len(data.train.labels[: run.config.get("images")]) for run in runs}
    with tqdm(total=sum(sizes.values()), unit=" images", unit_scale=True, disable=None, leave=False) as bar:

        def show(images, line=""):
            bar.update(images)
            if line:
                bar.write(line)
                sys.stdout.flush()  # for who reads a pipe

        if args.workers == 1 and not TORCHRUN:
            outcomes = ((run, train_run(train, data, run, resume, show)) for run in runs)
        else:
            outcomes = train_apart(work, args, runs, resume, show)
        for run, outcome in outcomes:
            if isinstance(outcome, str):
                failures.append(f"{run}: {outcome}")
                show(0, f"FAILED: {failures[-1]}")
                continue
            results[str(run)] = result = load_result(run, outcome)
            bar.total -= sizes[str(run)] * (1 - len(result.history.rows) / run.config["epochs"])  # it stopped early
            bar.set_postfix_str(f"{len(results)} runs done")
            accuracies = [f"{key} {value:.2f} %" for key, value in result.scores.items() if "accuracy" in key]
            show(0, f"{run}: {', '.join(accuracies)}")
    return failures


def train_run(train, data: Dataset, run: Run, resume: bool, show) -> bytes | str:
    """Train and score a run. Returns its packed result, which its checkpoint holds too, or what failed, in a line."""
    setup(run.identity["threads"])
    data = data._replace(train=first(data.train, run.config.get("images")))
    settings = {
        "precision": run.identity["precision"],
        "checkpoint": run.path,
        "identity": run.identity,
        "resume": resume,
        "progress": lambda images, line: show(images, line and f"{run}: {line}"),
    }
    try:
        run.path.parent.mkdir(exist_ok=True)
        model, history = train(run.config, data._replace(test=None), run.seed, **settings)
        tested, logits = {}, None
        if run.identity["test"]:
            loss, accuracy, logits = evaluate(model, data.test)
            tested = {"test_loss": loss, "test_accuracy": accuracy, "train_accuracy": evaluate(model, data.train)[1]}
            logits = logits.cpu()
    except Exception as error:  # of the script or of torch; the other runs go on
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"{message} ({Path(place.filename).name}, line {place.lineno})"
    scores = {
        "seed": run.seed,
        **tested,
        "val_accuracy": history.val_accuracy,
        "epochs": len(history.rows),
        "best_epoch": history.best_epoch,
        "seconds": sum(row["seconds"] for row in history.rows),
        "health": history.health,
    }
    size = count_parameters(model)
    result = {"parameters": size, "history": asdict(history), "scores": scores, "test_logits": logits}
    write_file(run.path, pack(run.identity, result=result, best=model.state_dict()))
    return pack(run.identity, result=result)


def load_result(run: Run, content: bytes | None = None) -> Result:
    """The result in a run's checkpoint, or packed in `content`; without scores if the run is not finished."""
    state = load_checkpoint(run.path, run.identity, content)
    result = state.get("result") or {"parameters": 0, "history": state["history"], "scores": {}}
    return Result(run.config, run.seed, **{**result, "history": History(**result["history"])})


# Workers, processes of this machine and ranks of torchrun alike, look in a store of torch.distributed for the list of
# runs, claim one and leave its result there. A worker whose process has ended starts again with the run it claimed.
# Keys and results hold the identity of a run, so that no result can be taken for another.
@functools.cache
def torchrun_store():
    """(the store of torchrun's agent, which outlives the ranks; how many times this rank has started)."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    if RANK == 0:
        store.delete_key("end")
        atexit.register(store.set, "end", "now")
    return store, store.add(f"starts of rank {RANK}", 1)


def key_of(what: str, run: Run) -> str:
    world = os.environ.get("WORLD_SIZE", "")  # if torchrun goes on with fewer ranks, old claims are void
    return f"{what} of {world} {json.dumps(run.identity, sort_keys=True)}"


def train_apart(work, args, runs: list[Run], resume: bool, show):
    """Yield (run, outcome of `train_run`) as workers finish them."""
    from torch.distributed import TCPStore

    store = torchrun_store()[0] if TORCHRUN else TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for tensor in itertools.chain(*work[1][:3]):
        tensor.share_memory_()  # the processes map it instead of copying it
    context = torch.multiprocessing.get_context("spawn")
    processes = {}
    left = list(runs)
    slots = ["rank 0"] if TORCHRUN else [f"worker {i}" for i in range(min(args.workers, len(runs)))]
    images = store.add("images", 0)
    lines = store.add("lines", 0)
    store.set("list", json.dumps([(*run[:4], resume) for run in runs]))
    try:
        while left:
            for slot in slots:
                code = processes[slot].exitcode if slot in processes else 0
                if code is None:
                    continue
                if slot in processes and not store.delete_key(f"{slot} is ready"):
                    sys.exit(f"worker processes end at their start, exit code {code}; --workers 1 needs none")
                processes[slot] = context.Process(target=serve, args=(slot, code, store.port, *work), daemon=True)
                processes[slot].start()
            before = images
            images = store.add("images", 0)
            show(images - before)
            while store.check([f"line {lines + 1}"]):
                lines += 1
                show(0, store.get(f"line {lines}").decode())
            for run in [run for run in left if store.check([key_of("result", run)])]:
                left.remove(run)
                outcome = store.get(key_of("result", run))
                yield run, outcome if outcome.startswith(b"PK") else outcome.decode()  # a zip file, or a line
            time.sleep(0.05)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def serve(slot: str, code, port: int | None, train, data: Dataset, environment: dict, folder: str):
    """A worker: trains runs of the list until its process is ended. `code`: the exit code of the process before it in
    this slot; `port`: of this machine's store, None under torchrun."""
    from torch.distributed import TCPStore

    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, without which it ends, too
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    store = TCPStore("localhost", port, wait_for_workers=False) if port else torchrun_store()[0]

    def show(images, line):
        store.add("images", images)
        if line:
            store.set(f"line {store.add('lines', 1)}", line)

    store.set(f"{slot} is ready", "")
    while not store.check(["end"]):
        run, resume, again = claim_run(slot, store, environment, folder)
        if run is None:
            time.sleep(0.1)
            continue
        if again and store.add(key_of("ends", run), 1) == 2:
            outcome = f"its process ended twice, exit code {code}"
        else:
            try:
                outcome = train_run(train, data, run, resume or again, show)
            except SystemExit as error:  # a full disk, say
                outcome = str(error.code)
        store.set(key_of("result", run), outcome)
    sys.exit(0)


def claim_run(slot: str, store, environment: dict, folder: str):
    """A run of the list that nobody has claimed, or that this slot has claimed before its process ended (else None);
    whether to resume it; whether it was claimed before."""
    for *fields, resume in json.loads(store.get("list")) if store.check(["list"]) else ():
        run = Run(*fields, folder)
        if different := [key for key, value in environment.items() if run.identity[key] != value]:
            sys.exit(f"{slot} has other {' and '.join(different)} than the first process")
        again = store.check([key_of("claim", run)])
        claimed = store.compare_set(key_of("claim", run), "", slot).decode() == slot
        if claimed and not store.check([key_of("result", run)]):
            return run, resume, again
    return None, False, False


# ---- Plots: each function returns a Figure, which `save_figure` titles and writes ------------------------------------
# Okabe and Ito's colours, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"


def new_figure(width: float, height: float):
    """An empty matplotlib Figure, sizes in inches."""
    import matplotlib.figure  # late: --help need not wait for it

    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3})
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(path: Path | str, figure, title: str, dataset: str):
    """Write a figure as PNG with its title, which names the data set if it is not MNIST."""
    title = title if dataset == "MNIST" else f"[{dataset}] {title}"
    title = title.replace(" ± ", "\xa0±\xa0").replace(" %", "\xa0%")  # so that no line breaks in an accuracy
    figure.suptitle(textwrap.fill(title, int(8.5 * figure.get_figwidth())), fontweight="bold")
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=110)
    write_file(path, buffer.getvalue())


def accuracy_axis(axes, name="y"):
    """Scale an axis of accuracies (%) by the logarithm of the error: 10 and 99.5 are both legible."""
    scale = lambda accuracy: -np.log(np.maximum(100.02 - accuracy, 0.01))
    getattr(axes, f"set_{name}scale")("function", functions=(scale, lambda y: 100.02 - np.exp(-y)))
    low, high = getattr(axes, f"get_{name}lim")()
    ticks = np.arange(99, 100, 0.1) if low > 98 else [0, 50, 80, 90, 95, 97, 98, 99, 99.5, 99.8, 100]
    axis = getattr(axes, f"{name}axis")
    axis.set_ticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axis.set_major_formatter("{x:g}")


def label_ends(axes, ends: list[tuple]):
    """Write (x, y, text, colour) of the ends of lines right of all lines, none over another: they move inwards."""
    axes.grid(True)
    right = max((end[0] for end in ends), default=0)
    placed = [(axes.transData.transform(end[:2])[1], end) for end in ends]  # heights in pixels
    up = 1 if sum(height - axes.bbox.intervaly.mean() for height, _ in placed) < 0 else -1
    free = -math.inf
    for height, (_, y, text, color) in sorted(placed, reverse=up < 0):
        text = textwrap.fill(text.replace(" ", "\xa0").replace(",\xa0", ", "), 30)  # break after commas
        half = 9 * (1 + text.count("\n"))
        free = max(up * height, free + half) + half
        offset = 10, up * (free - half) - height
        axes.annotate(text, (right, y), offset, textcoords="offset pixels", va="center", color=color)


def plot_curves(results: dict[str, list[Result]]):
    """Loss and accuracy by epoch: the mean over the seeds that are still training, in the band from the least to the
    greatest. A single run has a colour each for training and validation; several have one each."""
    figure = new_figure(12, 5)
    single = len(results) == 1
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.set_yscale("linear" if quantity == "accuracy" else "log")
        ends = []
        for (i, (name, seeds)), part in itertools.product(enumerate(results.items()), ("train", "val")):
            color = COLORS[(i + (single and part == "val")) % len(COLORS)]
            style = "-" if single or part == "val" else "--"
            lines = [[row[f"{part}_{quantity}"] for row in seed.history.rows] for seed in seeds]
            columns = [[y for y in column if y is not None] for column in itertools.zip_longest(*lines)]
            epochs = range(1, len(columns) + 1)
            means = [statistics.fmean(column) for column in columns]
            axes.plot(epochs, means, style, color=color, lw=2)
            axes.fill_between(epochs, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.15, lw=0)
            if part == "val":
                best = [seed.history.best_epoch for seed in seeds]
                kept = [line[epoch - 1] for line, epoch in zip(lines, best, strict=True)]
                axes.plot(best, kept, MARKERS[i % len(MARKERS)], fillstyle="none", color=color)
            if (single or part == "val") and math.isfinite(means[-1]):
                label = {"train": "training", "val": "validation"}[part] if single else name
                ends.append((len(means), means[-1], label, color))
        if quantity == "accuracy":
            accuracy_axis(axes)
        axes.set(xlabel="epoch", ylabel="accuracy (%)" if quantity == "accuracy" else "loss (cross-entropy, nats)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        label_ends(axes, ends)
    note = "open markers: the epoch whose weights were kept"
    figure.supxlabel(note if single else f"{note}; dashed: training", fontsize=9)
    return figure


# ---- Reports ---------------------------------------------------------------------------------------------------------
def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if values[1:] else None


def test_accuracies(seeds: list[Result]) -> list[float]:
    """Test accuracy of each seed, in percent."""
    return [seed.scores["test_accuracy"] for seed in seeds]


def format_accuracy(values: list[float]) -> str:
    """Accuracies of seeds as "99.27 ± 0.05 %", mean and standard deviation, or "99.27 %" of one seed."""
    mean, std = mean_std(values)
    return f"{mean:.2f} %" if std is None else f"{mean:.2f} ± {std:.2f} %"


def summarize(results: dict[str, list[Result]]) -> str:
    """The test accuracy of all runs, for a title."""
    texts = [f"{name} {format_accuracy(test_accuracies(seeds))}" for name, seeds in results.items()]
    seeds = len(next(iter(results.values())))
    return f"Test accuracy: {'; '.join(texts)} ({seeds}\xa0seed{'s' if seeds > 1 else ''})"


def write_csv(path: Path | str, rows: list[dict]):
    """A table with the keys of the first row as its header; floats have six digits."""
    writer = csv.DictWriter(file := io.StringIO(), rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_file(path, file.getvalue().encode())


def write_log(path: Path | str, results: dict[str, list[Result]]):
    """The training log: a row for each run and epoch."""
    seeds = [(name, seed) for name, seeds in results.items() for seed in seeds]
    write_csv(path, [{"run": name, "seed": seed.seed, **row} for name, seed in seeds for row in seed.history.rows])


def to_json(value):
    """`value` with floats rounded to four digits. JSON has no NaN or infinity; write null."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def alarm_names(health: list[str]) -> list[str]:
    """Alarms without their layers."""
    return [alarm.partition(" (")[0] for alarm in health]


def report(results: dict[str, list[Result]], args, data: Dataset, expected_to_diverge=()):
    """Write <stem>.csv and <stem>.json and print the table of results. A run that diverged, unless it is expected to,
    ends the program with exit code 1 after all is written."""
    write_log(f"{args.stem}.csv", results)
    runs, diverged = {}, []
    width = max(map(len, results))
    print(f"\n{data.name}, {len(args.seeds)} seed(s)\n{'run':<{width}}  parameters   test accuracy     health")
    for name, seeds in results.items():
        accuracies = test_accuracies(seeds)
        mean, std = mean_std(accuracies)
        size, config = seeds[0].parameters, seeds[0].config
        scores = [seed.scores for seed in seeds]
        runs[name] = {"parameters": size, "config": config, "seeds": scores, "mean": mean, "std": std}
        if name not in expected_to_diverge and any(seed.history.diverged for seed in seeds):
            diverged.append(name)
        counts = Counter(alarm for seed in seeds for alarm in alarm_names(seed.history.health[:1]))  # the diagnosis
        alarms = ", ".join(f"{alarm} ({count}x)" for alarm, count in counts.items()) or "no alarm"
        print(f"{name:<{width}}{size:>12,}   {format_accuracy(accuracies):<18}{alarms}")
    print(f"log, results and plots: {args.stem}*")
    sizes = {name: len(getattr(data, name).labels) for name in ("train", "val", "test")}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    environment = {**versions, "device": args.device.type, "threads": args.threads, "precision": args.precision}
    contents = {"script": args.script, "data": {"source": data.name, **sizes}, "environment": environment, "runs": runs}
    write_file(f"{args.stem}.json", (json.dumps(to_json(contents), indent=1, ensure_ascii=False) + "\n").encode())
    if diverged:
        sys.exit(f"training diverged: {', '.join(diverged)}; a lower --lr may help")


def health_claims(intended: dict[str, str], results: dict[str, list[Result]]) -> list[tuple[str, bool]]:
    """For `check_claims`: `intended` names the alarm that every run of a name sets off; all others set off none."""
    claims = []
    for name, seed in [(name, seed) for name, seeds in results.items() for seed in seeds]:
        wanted = intended.get(name)
        found = alarm_names(seed.history.health)
        claims.append((f"{name}, seed {seed.seed}: {wanted or 'no alarm'}", wanted in found if wanted else not found))
    return claims


def check_claims(claims: list[tuple[str, bool]]):
    """Print what a script claims and whether it is so; exit code 1 if something is not."""
    for claim, holds in claims:
        print(f"{'yes' if holds else 'NO':<4}{claim}")
    if not all(holds for _, holds in claims):
        sys.exit("failure not reproduced: see the lines with NO")
    print("failure reproduced")


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
