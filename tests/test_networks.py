"""Networks against the published tables of layers; augmentation against torchvision."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

import common
from common import advanced_combo_cnn, affine, baseline_cnn, print_layers, random_affine
from q2_variants import variant1_kernel_sizes as variant1
from q2_variants import variant2_batchnorm_gap as variant2
from q2_variants import variant4_under_25k as variant4
from q2_variants import variant5_under_10k as variant5
from q2_variants import variant6_fastest as variant6
from q2_variants import variant7_smallest as variant7
from q2_variants import variant8_most_accurate as variant8

NETWORKS = {  # parameters of the layers that have any, and their published sum
    baseline_cnn: ([320, 18_496, 401_536, 1_290], 421_642),
    variant1.kernel_sizes_cnn: ([832, 2_112, 401_536, 1_290], None),
    variant2.batchnorm_gap_cnn: ([144, 32, 4_608, 64, 18_432, 128, 36_864, 128, 650], None),
    advanced_combo_cnn: ([832, 64, 18_496, 128, 8_320, 256, 1_290], 29_386),
    variant4.narrow_head_cnn: ([80, 1_168, 3_480, 19_250, 510], 24_488),
    variant4.squeeze_cnn: ([80, 1_168, 136, 1_168, 272, 4_640, 1_056, 15_690], 24_210),
    variant5.mnist_net_1: ([72, 1_152, 2_304, 128, 576, 576, 1_152, 160, 2_500], 8_620),
    variant5.mnist_net_2: ([72, 16, 1152, 32, 128, 1152, 32, 2304, 32, 2304, 32, 160], 7_416),
    variant5.mnist_net_3: ([72, 16, 1152, 32, 128, 16, 864, 24, 1_728, 32, 2_304, 32, 160], 6_560),
    variant6.published_cnn: ([624, 6_944, 205_056, 2_570], 215_194),
    variant8.strided_cnn: (
        [288, 64, 9_216, 64, 25_600, 64, 18_432, 128, 36_864, 128, 102_400, 128, 131_200, 256, 1_290],
        None,
    ),
}


@pytest.fixture(scope="module")
def images():
    return common.draw_digits(40, seed=3)[0].float()


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_are_the_published_ones(network):
    layers, total = NETWORKS[network]
    found = [common.count_parameters(layer) for layer in network()]
    assert [count for count in found if count] == layers
    assert common.count_parameters(network()) == sum(layers)
    assert total in (None, sum(layers))


@pytest.mark.parametrize("name", variant7.RUNS)
def test_smallest_networks_have_the_parameters_of_their_names(name):
    config = variant7.RUNS[name]
    model = variant7.SharedCNN(config["channels"], config["narrow"])
    assert f"{common.count_parameters(model):,} parameters" == name
    assert not list(model.buffers())  # no running averages
    model(torch.randn(4, 1, 28, 28)).logsumexp(1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_shared_layer_is_applied_six_times_to_one_image_at_a_time():
    torch.manual_seed(0)
    model = variant7.SharedCNN(8, 4)
    calls = []
    model.depthwise.register_forward_hook(lambda layer, inputs, output: calls.append(tuple(output.shape)))
    images = torch.randn(3, 1, 28, 28)
    together = model(images)
    assert calls == [(3, 8, 14, 14)] * 3 + [(3, 8, 7, 7)] * 3
    torch.testing.assert_close(together, torch.cat([model(image[None]) for image in images]))


def test_nine_views_are_torchvisions_and_their_logits_are_averaged(images):
    torch.manual_seed(0)
    model = variant7.SharedCNN(8, 4)
    model.nine_views = True
    ink = variant7.straighten(images / 255 / common.STD)
    views = []
    for degrees, right, down, scale in variant7.VIEWS:
        options = {"translate": [right, down], "scale": scale, "shear": [0.0, 0.0]}
        views.append(torchvision.affine(ink, degrees, interpolation=InterpolationMode.BILINEAR, **options))
    expected = torch.stack([model.classify(view) for view in views]).mean(0)
    torch.testing.assert_close(model(common.normalize(images)), expected, atol=1e-4, rtol=1e-4)


def test_straightened_digits_are_upright_however_they_were_slanted(images):
    upright = variant7.straighten(images)
    x = torch.arange(28) - 13.5
    for ink in upright:
        mass = ink / ink.sum()
        offset_x, offset_y = x - (mass * x).sum(), x[:, None] - (mass * x[:, None]).sum()
        correlation = (mass * offset_x * offset_y).sum() / (mass * offset_y.square()).sum()
        assert abs(correlation) < 0.02
    options = {"translate": [0, 0], "scale": 1.0, "shear": [12.0, 0.0]}
    slanted = torchvision.affine(images, 0.0, interpolation=InterpolationMode.BILINEAR, **options)
    again = variant7.straighten(slanted)
    assert (again - upright).abs().mean() < 0.4 * (slanted - images).abs().mean()
    assert variant7.straighten(torch.zeros(2, 1, 28, 28)).isfinite().all()


def test_fixed_convolution_over_blocks_is_convolution_and_maximum_of_two_places():
    torch.manual_seed(0)
    filters, images = torch.randn(6, 1, 5, 5), torch.randn(3, 1, 28, 28)
    model = variant6.FixedFiltersCNN(filters, 8).eval()
    found = []
    model.conv.register_forward_pre_hook(lambda layer, inputs: found.extend(inputs))
    model(images).sum().backward()
    everywhere = nn.functional.conv2d(images[..., 2:26, 2:26], filters)
    expected = torch.maximum(everywhere[..., ::2, ::2], everywhere[..., 1::2, 1::2]).relu()
    torch.testing.assert_close(found[0], expected)
    assert not found[0].requires_grad and all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_patch_filters_resemble_patches():
    torch.manual_seed(0)
    filters = 4 * variant6.patch_filters(common.draw_digits(200, seed=3)[0], 16).flatten(1)
    torch.testing.assert_close(filters.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(filters.mean(1), torch.zeros(16), atol=1e-6, rtol=0)
    others = common.normalize(common.draw_digits(50, seed=4)[0])
    patches = nn.functional.unfold(others, 5).transpose(1, 2).flatten(0, 1)
    patches = patches[patches.std(1) > 0.5]
    patches = nn.functional.normalize(patches - patches.mean(1, keepdim=True))
    likeness = lambda filters: (patches @ filters.T).amax(1).mean().item()
    random = torch.randn(16, 25)
    random = nn.functional.normalize(random - random.mean(1, keepdim=True))
    assert likeness(filters) > 0.75 > 0.6 > likeness(random)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fast_dropout_has_the_distribution_of_dropout(layout):
    torch.manual_seed(0)
    dropout, x = variant5.FastDropout(0.05), torch.randn(16, 8, 23, 25).contiguous(memory_format=layout)
    x.requires_grad_()
    y = dropout(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / x.numel()) ** 0.5)
    assert kept.float().mean((0, 2, 3)).std() < 0.01 and not torch.equal(kept, dropout(x) != 0)
    torch.testing.assert_close(y[kept], x[kept] / 0.95)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.95)
    assert dropout.eval()(x) is x and variant5.FastDropout(0)(x) is x


def test_full_matrix_adam_needs_no_axes():
    """A quadratic function whose valley lies across the axes: Adam zigzags in it, and so does ours at first."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20))[0]
    hessian = basis @ torch.diag(torch.logspace(0, 4, 20)) @ basis.T

    def minimum(optimizer, steps=600):
        x = nn.Parameter(basis.sum(1))
        optimizer = optimizer([x])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = x @ hessian @ x / 2
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    ours = minimum(partial(variant7.FullMatrixAdam, lr=0.03, period=20, decay=0.5))
    assert ours < 0.1 * minimum(partial(torch.optim.Adam, lr=0.03))
    assert minimum(partial(variant7.FullMatrixAdam, lr=0.03, period=1_000, decay=0.5)) > 10 * ours


def table_of_layers(model, capsys):
    print_layers(model)
    return [line.split() for line in capsys.readouterr().out.splitlines() if line]


def test_table_of_layers_agrees_with_a_count_by_hand(capsys):
    rows = table_of_layers(baseline_cnn(), capsys)
    convolutions = 28 * 28 * 32 * 9, 14 * 14 * 64 * 32 * 9
    linear = 3136 * 128, 128 * 10
    assert rows[1] == ["Conv2d", "32", "x", "28", "x", "28", "320", f"{convolutions[0]:,}"]
    assert rows[2] == ["MaxPool2d", "32", "x", "14", "x", "14", "0", "0"]
    assert rows[8] == ["Linear", "128", "401,536", f"{linear[0]:,}"]
    assert rows[-1] == ["total", "421,642", f"{sum(convolutions) + sum(linear):,}"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, images):
        x = self.first(images)
        for _ in range(6):
            x = self.shared(x)
        return x


def test_shared_layer_has_its_parameters_once_and_its_products_at_each_application(capsys):
    rows = table_of_layers(Shared(), capsys)
    products = 28 * 28 * 16 * 16 * 9
    assert rows[2] == ["Conv2d,", "6", "times", "16", "x", "28", "x", "28", "2,320", f"{6 * products:,}"]
    assert rows[-1] == ["total", f"{160 + 2320:,}", f"{28 * 28 * 16 * 9 + 6 * products:,}"]


@pytest.mark.parametrize("training", [True, False])
def test_table_of_layers_changes_nothing(training, capsys):
    model = advanced_combo_cnn().train(training)  # with BatchNorm and dropout
    model[-1].eval()
    before = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    print_layers(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [layer.training for layer in model.modules()] == [layer.training for layer in before.modules()]
    for after, kept in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(after, kept)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_pooling_before_relu_is_the_published_function():
    torch.manual_seed(0)
    ours = baseline_cnn().eval()
    conv1, pool, relu, conv2, _, _, *head = ours
    published = nn.Sequential(conv1, relu, pool, conv2, relu, pool, *head)
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(ours(images), published(images))


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_every_parameter(network):
    torch.manual_seed(0)
    model = network().train()
    logits = model(torch.randn(16, 1, 28, 28))
    assert logits.shape == (16, 10)
    nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # Exactly 0 is out of reach. (A bias before BatchNorm gets rounding errors only.)
        assert parameter.grad.abs().sum() > 0, name


def test_affine_agrees_with_torchvision_image_by_image(images):
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(40, generator=generator) * 60 - 30
    shift = torch.rand(40, 2, generator=generator) * 8 - 4
    scale = 0.7 + 0.6 * torch.rand(40, generator=generator)
    ours = affine(images, angle, shift, scale)
    for i, image in enumerate(images):
        options = {"translate": shift[i].tolist(), "scale": scale[i].item(), "shear": [0.0, 0.0]}
        theirs = torchvision.affine(image, angle[i].item(), interpolation=InterpolationMode.BILINEAR, **options)
        torch.testing.assert_close(ours[i], theirs, atol=0.01, rtol=0)  # of 255


def test_crop_agrees_with_torchvision(images, monkeypatch):
    monkeypatch.setattr(common, "random_affine", lambda images, *_, **__: images)
    many = images.repeat(50, 1, 1, 1)
    ours = variant4.rotate_or_crop(many, torch.Generator().manual_seed(0))
    cropped = torchvision.resize(torchvision.center_crop(many, [22, 22]), [28, 28])
    changed = (ours != many).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.1, abs=0.03)
    torch.testing.assert_close(ours[changed], cropped[changed], atol=0.01, rtol=0)


def test_random_affine_stays_within_its_limits(images, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "affine", lambda images, *arguments: seen.append(arguments) or images)
    generator = torch.Generator().manual_seed(0)
    random_affine(images.repeat(50, 1, 1, 1), generator, degrees=(7, 15), shift=2, scale=0.1)
    angle, shift, scale = seen[0]
    assert 18 < angle.abs().max() <= 22 and abs(angle.mean()) < 1
    # Two uniform rotations in a row: their variances add.
    assert angle.var().item() == pytest.approx((7**2 + 15**2) / 3, rel=0.1)
    assert 1.9 < shift.abs().max() <= 2 and scale.min() >= 0.9 and scale.max() <= 1.1


def test_no_augmentation_is_the_identity(images):
    unchanged = random_affine(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(unchanged, images, atol=0.01, rtol=0)


def test_augmented_training_is_deterministic(tiny):
    def losses(augment):
        torch.manual_seed(0)
        model = variant4.narrow_head_cnn()
        optimizer = torch.optim.Adam(model.parameters())
        return common.fit(model, tiny, optimizer, {"epochs": 1, "batch_size": 128}, augment=augment).step_losses

    rotate = partial(random_affine, degrees=(15,))
    assert losses(rotate) == losses(rotate) != losses(None)
