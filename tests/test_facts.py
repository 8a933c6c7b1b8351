"""The measurements of facts about MNIST, on small data."""

import gzip
import json

import facts
import numpy as np
import pytest
import torch
from conftest import ROOT

import common


def test_writers_are_read_from_label_files(tmp_path):
    folder = tmp_path / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    rows = np.arange(24, dtype=">i4").reshape(3, 8)
    head = np.array([3074, 3, 8], dtype=">i4")
    (folder / "qmnist-test-labels-idx2-int.gz").write_bytes(gzip.compress(head.tobytes() + rows.tobytes()))
    assert facts.read_writers(tmp_path, "test").tolist() == [2, 10, 18]


def test_no_writer_is_in_two_splits():
    writers = torch.arange(1200) // 7
    images = torch.arange(1200).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    labels = torch.arange(1200) % 10
    data = facts.split_by_writers(images, labels, images[:10], labels[:10], "MNIST", writers)
    rows = [part.images[:, 0, 0, 0] for part in (data.train, data.val)]
    assert not set(writers[rows[0]].tolist()) & set(writers[rows[1]].tolist())
    assert sorted(torch.cat(rows).tolist()) == list(range(1200))
    assert 100 <= len(rows[1]) < 107  # a twelfth, filled up to a whole writer


def test_training_preprocessing_is_among_the_kinds(tiny):
    kinds = dict(facts.kinds_of_preprocessing(tiny.test.images))
    torch.testing.assert_close(kinds["as in training"], common.normalize(tiny.test.images))
    assert len(kinds) == 9
    for kind, images in kinds.items():
        assert images.shape == tiny.test.images.shape and (kind == "as in training") == torch.allclose(
            images, kinds["as in training"], atol=1e-3
        )


def test_typo_in_the_normalisation_is_the_smallest_change(tiny):
    kinds = dict(facts.kinds_of_preprocessing(tiny.test.images))
    right = kinds.pop("as in training")
    distances = {kind: (images - right).square().mean().item() for kind, images in kinds.items()}
    assert distances.pop("0.1407 and 0.4081, a published typo") < min(distances.values())
    assert distances["inverted"] == pytest.approx(max(distances[kind] for kind in facts.CHANGES))


def test_recorded_errors_add_up_and_a_part_in_order_is_no_sample():
    """Thousands drawn at random would hold 6.4 errors, give or take 2.5."""
    found = json.loads((ROOT / "tests" / "benchmark.json").read_text())["test split"]
    thousands = found["errors by thousand, mean"]
    recorded = json.loads((ROOT / "q1_baseline.json").read_text())["runs"]["baseline"]["mean"]
    assert sum(thousands) == pytest.approx(100 * (100 - recorded), abs=0.5)
    assert found["errors by half, mean"] == pytest.approx([sum(thousands[:5]), sum(thousands[5:])], abs=0.3)
    repeated = [number * count for number, count in enumerate(found["images wrong in 1, 2, .. seeds"], 1)]
    assert sum(repeated) == pytest.approx(5 * sum(thousands), abs=1)
    assert max(thousands) > 10 and min(thousands) < 1
