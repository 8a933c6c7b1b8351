"""Augmentation against torchvision; the networks of Q2 against the published tables."""

import csv
import json
from functools import partial

import pytest
import torch
from conftest import run_script
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as oracle

import common
from q2_variants import variant1_kernel_sizes as variant1
from q2_variants import variant2_batchnorm_gap as variant2
from q2_variants import variant4_under_25k as variant4
from q2_variants import variant5_under_10k as variant5


@pytest.fixture(scope="module")
def images():
    return common.draw_digits(40, seed=3)[0].float()


def test_affine_agrees_with_torchvision_image_by_image(images):
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(40, generator=generator) * 60 - 30
    shift = torch.rand(40, 2, generator=generator) * 8 - 4
    scale = 0.7 + 0.6 * torch.rand(40, generator=generator)
    ours = common.affine(images, angle, shift, scale)
    for i, image in enumerate(images):
        where = {"translate": shift[i].tolist(), "scale": scale[i].item()}
        theirs = oracle.affine(
            image, angle[i].item(), **where, shear=[0.0, 0.0], interpolation=InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(ours[i], theirs, atol=0.01, rtol=0)  # of 255


def test_crop_agrees_with_torchvision(images):
    generator = torch.Generator().manual_seed(0)
    ours = common.random_affine(images, generator, crop=1.0)
    theirs = oracle.resize(oracle.center_crop(images, [22, 22]), [28, 28])
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)


def test_random_affine_keeps_to_its_limits(images):
    """The parameters are read off what `affine` is asked for."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "affine", lambda images, *how: seen.append(how) or images)
        generator = torch.Generator().manual_seed(0)
        many = images.repeat(50, 1, 1, 1)
        options = {"degrees": (7, 15), "shift": 2, "scale": 0.1, "crop": 0.1}
        cut = common.random_affine(many, generator, **options)
    angle, shift, scale = seen[0]
    assert 18 < angle.abs().max() <= 22 and abs(angle.mean()) < 1
    # Two uniform turns in a row: their variances add.
    assert angle.var().item() == pytest.approx((7**2 + 15**2) / 3, rel=0.1)
    assert 1.9 < shift.abs().max() <= 2 and 0.9 <= scale.min() and scale.max() <= 1.1
    changed = (cut != many).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.1, abs=0.03)


def test_no_augmentation_is_the_identity(images):
    unchanged = common.random_affine(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(unchanged, images, atol=0.01, rtol=0)


def test_augmented_training_is_deterministic_and_differs_from_plain(tiny):
    def losses(augment):
        torch.manual_seed(0)
        model = variant4.narrow_head_cnn()
        optimizer = torch.optim.Adam(model.parameters())
        options = {"epochs": 1, "batch_size": 128, "augment": augment}
        return common.fit(model, tiny.train, tiny.val, optimizer, **options).step_losses

    turn = partial(common.random_affine, degrees=(15,))
    assert losses(turn) == losses(turn) != losses(None)


NETWORKS = {
    variant1.kernel_sizes_cnn: [832, 2_112, 401_536, 1_290],
    variant2.batchnorm_gap_cnn: [144, 32, 4_608, 64, 18_432, 128, 36_864, 128, 650],
    common.advanced_combo_cnn: [832, 64, 18_496, 128, 8_320, 256, 1_290],
    variant4.narrow_head_cnn: [80, 1_168, 3_480, 19_250, 510],
    variant4.squeeze_cnn: [80, 1_168, 136, 1_168, 272, 4_640, 1_056, 15_690],
    variant5.mnist_net_1: [72, 1_152, 2_304, 128, 576, 576, 1_152, 160, 2_500],
    variant5.mnist_net_2: [72, 16, 1152, 32, 128, 1152, 32, 2304, 32, 2304, 32, 160],
    variant5.mnist_net_3: [72, 16, 1152, 32, 128, 16] + [864, 24, 1_728, 32, 2_304, 32, 160],
}


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_are_the_published_ones(network):
    rows = [parameters for _, _, parameters in common.layer_table(network()) if parameters]
    assert rows == NETWORKS[network]


def test_totals_are_the_published_ones():
    assert common.count_parameters(common.advanced_combo_cnn()) == 29_386
    assert common.count_parameters(variant4.narrow_head_cnn()) == 24_488
    assert common.count_parameters(variant4.squeeze_cnn()) == 24_210
    tiny = variant5.mnist_net_1(), variant5.mnist_net_2(), variant5.mnist_net_3()
    assert [common.count_parameters(net) for net in tiny] == [8_620, 7_416, 6_560]


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_every_parameter(network):
    torch.manual_seed(0)
    model = network().train()
    logits = model(torch.randn(16, 1, 28, 28))
    assert logits.shape == (16, 10)
    torch.nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # Exactly 0 is out of reach. (A bias before BatchNorm gets rounding errors only.)
        assert parameter.grad.abs().sum() > 0, name


SCRIPTS = {
    "variant1_kernel_sizes": ["5x5 and 1x1 kernels"],
    "variant2_batchnorm_gap": ["BatchNorm and GAP"],
    "variant3_advanced_combo": ["published recipe", "improved recipe"],
    "variant4_under_25k": [
        f"{name}{improved}" for improved in ("", " improved") for name in ("narrow-head", "squeeze")
    ],
    "variant5_under_10k": [f"MnistNet_{i}{improved}" for improved in ("", " improved") for i in (1, 2, 3)],
}


@pytest.mark.parametrize("stem", SCRIPTS)
def test_script_leaves_its_reports(stem, mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --epochs 2"
    code, out, err = run_script(f"q2_variants/{stem}.py", arguments, cwd=tmp_path)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert found["script"] == f"q2_variants/{stem}.py"
    assert list(found["runs"]) == SCRIPTS[stem]
    rows = list(csv.DictReader((tmp_path / "out" / f"{stem}.csv").open()))
    expected = [(label, epoch) for label in SCRIPTS[stem] for epoch in "12"]
    assert [(row["run"], row["epoch"]) for row in rows] == expected
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert f"{stem}_curves.png" in pictures
    assert len([name for name in pictures if "confusion" in name]) == len(SCRIPTS[stem])
    assert out.count("99.4 % validation accuracy: never") == len(SCRIPTS[stem])


def test_first_epoch_names_the_first_epoch_that_reached_the_goal():
    rows = [{"epoch": e, "val_accuracy": a} for e, a in ((1, 98.0), (2, 99.0), (3, 98.5))]
    history = common.History({}, 0, rows)
    assert common.first_epoch(history, 99) == "first in epoch 2"
    assert common.first_epoch(history, 99.4) == "never"


def test_only_trains_one_network_resumes_it_and_names_all_if_there_is_no_such_one(mnist_folder, tmp_path, capsys):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --epochs 1".split()
    variant4.main([*arguments, "--only", "squeeze"])
    results = (tmp_path / "variant4_under_25k.json").read_text()
    assert list(json.loads(results)["runs"]) == ["squeeze", "squeeze improved"]
    (tmp_path / "variant4_under_25k.json").unlink()
    variant4.main([*arguments, "--only", "squeeze", "--resume"])  # what is finished
    assert (tmp_path / "variant4_under_25k.json").read_text() == results
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        variant4.main(["--only", "LeNet"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "LeNet" in line and all(name in line for name in variant4.NETWORKS)
