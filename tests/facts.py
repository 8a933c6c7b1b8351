"""Facts about MNIST, measured on the five baselines of Q1 (trained if q1_baseline_runs/ does not hold them): where the
errors of the test split lie, what another preprocessing costs, and what a validation split by writers says.

Run by tests/benchmark.py. QMNIST's label files say who wrote which image (Yadav and Bottou 2019, arXiv:1905.10498).
"""

import gzip
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

import common
import q1_baseline

SEEDS = 5


def train_baselines(data_dir, data=None, folder=ROOT):
    """(data, results, networks in evaluation mode) of the baseline with SEEDS seeds; finished runs are not repeated."""
    options = ["--only", "baseline", "--seeds", SEEDS, "--data-dir", data_dir, "--out-dir", folder, "--resume"]
    args = common.parse_args(q1_baseline.__file__, "", q1_baseline.RUNS, list(map(str, options)))
    data = data or common.load_data(args)
    results = common.run_all(q1_baseline.train, args, data)["baseline"]
    models = []
    for result in results:
        model = common.baseline_cnn().eval()
        model.load_state_dict(common.load_checkpoint(result.path, {})["best"])
        models.append(model.to(memory_format=torch.channels_last))
    return data, results, models


def summary(values):
    mean, std = common.mean_std(values)
    return {"mean": round(mean, 2), "std": round(std, 2)}


def errors_of(results, labels):
    """(networks, N) bool: which images each network misclassifies."""
    return torch.stack([result.test_logits.argmax(1) != labels for result in results])


def measure_test_split(data_dir):
    """Errors of the baselines by thousand test images, by half, and by the number of seeds that make them."""
    data, results, _ = train_baselines(data_dir)
    wrong = errors_of(results, data.test.labels)
    thousands = wrong.double().mean(0).view(10, 1000).sum(1)
    times = wrong.sum(0)
    always = (times == SEEDS).nonzero().flatten().tolist()
    probabilities = torch.stack([result.test_logits.softmax(1) for result in results])
    answers = probabilities.argmax(2)
    return {
        "errors by thousand, mean": [round(count, 1) for count in thousands.tolist()],
        "errors by half, mean": [round(half.sum().item(), 1) for half in thousands.chunk(2)],
        "images wrong in 1, 2, .. seeds": torch.bincount(times, minlength=SEEDS + 1)[1:].tolist(),
        "of those wrong in all, with one answer": sum(len(answers[:, i].unique()) == 1 for i in always),
        "of those wrong in all, with a disputed label": len(q1_baseline.DISPUTED & set(always)),
        "accuracy": summary(common.test_accuracies(results)),
        "accuracy of the mean probability": round(
            100 * (probabilities.mean(0).argmax(1) == data.test.labels).double().mean().item(), 2
        ),
    }


PREPROCESSINGS = {  # of uint8 images: what is added before, and the mean and standard deviation on the scale 0-1
    "as in training": (common.MEAN, common.STD),
    "0.1407 and 0.4081, a published typo": (0.1407, 0.4081),
    "0-1, not standardised": (0.0, 1.0),
    "0.5 and 0.5": (0.5, 0.5),
    "0.485 and 0.229, ImageNet's": (0.485, 0.229),
    "0-255, not scaled": (0.0, 1 / 255),
}
CHANGES = {  # of the images
    "inverted": torch.bitwise_not,
    "transposed, as in EMNIST": partial(torch.transpose, dim0=2, dim1=3),
    "shifted up by a pixel": partial(torch.roll, shifts=-1, dims=2),
}


def kinds_of_preprocessing(images):
    """Yield (what is done, float images) for uint8 images."""
    for kind, (mean, std) in PREPROCESSINGS.items():
        yield kind, (images / 255 - mean) / std
    for kind, change in CHANGES.items():
        yield kind, common.normalize(change(images))


@torch.inference_mode()
def measure_preprocessing(data_dir):
    """Test accuracy of the baselines if test images are prepared otherwise than training images."""
    data, _, models = train_baselines(data_dir)
    found = {}
    for kind, images in kinds_of_preprocessing(data.test.images):
        accuracies = []
        for model in models:
            predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
            accuracies.append(100 * (predicted == data.test.labels).double().mean().item())
        found[kind] = summary(accuracies)
    return found


def read_writers(folder, part):
    """The writer of each image, int64 (N,), from QMNIST's label file of "train" or "test", in torchvision's layout."""
    path = Path(folder) / "QMNIST" / "raw" / f"qmnist-{part}-labels-idx2-int.gz"
    content = gzip.decompress(path.read_bytes())
    return torch.from_numpy(np.frombuffer(content, ">i4", offset=12).reshape(-1, 8)[:, 2].astype(np.int64))


def split_by_writers(images, labels, test_images, test_labels, name, writers):
    """As `common.split_data`, but all images of a writer are in one split: at least 5,000 for validation."""
    order = torch.randperm(int(writers.max()) + 1, generator=torch.Generator().manual_seed(common.SPLIT_SEED))
    images_so_far = torch.bincount(writers, minlength=len(order))[order].cumsum(0)
    chosen = order[: int((images_so_far < len(labels) // common.VAL_SHARE).sum()) + 1]
    rows = torch.isin(writers, chosen)
    splits = (images[~rows], labels[~rows]), (images[rows], labels[rows]), (test_images, test_labels)
    return common.Dataset(*(common.Split(*split) for split in splits), name)


def measure_writers(data_dir):
    """What validation accuracy says of test accuracy if the validation images are drawn at random, and if they are of
    writers who wrote no training image; and the errors of the test writers."""
    mnist = common.read_mnist(Path(data_dir))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        by_writers = split_by_writers(*mnist, read_writers(data_dir, "train"))
        runs = {
            "random images": train_baselines(data_dir),
            "whole writers": train_baselines(data_dir, by_writers, folder),
        }
    for kind, (data, results, _) in runs.items():
        validation = [result.history.val_accuracy for result in results]
        test = common.test_accuracies(results)
        halves = errors_of(results, data.test.labels).double().mean(0).chunk(2)
        found[kind] = {
            "images": len(data.val.labels),
            "validation": summary(validation),
            "test": summary(test),
            "validation - test": summary([a - b for a, b in zip(validation, test, strict=True)]),
            "test, first half": round(100 - 100 * halves[0].mean().item(), 2),
            "test, second half": round(100 - 100 * halves[1].mean().item(), 2),
        }
    data, results, _ = runs["random images"]
    writers = read_writers(data_dir, "test")[: len(data.test.labels)]
    errors = errors_of(results, data.test.labels).sum(0)
    sums = {writer: errors[writers == writer].sum().item() for writer in writers.unique().tolist()}
    worst = max(sums, key=sums.get)
    found["test writers"] = {
        "writers": len(sums),
        "without an error of any seed": sum(count == 0 for count in sums.values()),
        "errors of the worst": sums[worst],
        "images of the worst": (writers == worst).sum().item(),
        "median errors": statistics.median(sums.values()),
    }
    return found
