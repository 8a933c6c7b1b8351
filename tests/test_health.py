"""The health checks: each against a hand-made network or history, then all against small trainings that are
healthy or broken on purpose."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import common
from q1_baseline import baseline_cnn
from q2_variants.variant3_advanced_combo import advanced_combo_cnn

BASELINE = partial(baseline_cnn, dropout=0.0)


def test_distinct_units_counts_rows_that_differ():
    rows = torch.tensor([[1.0, 2], [1, 2], [1.0001, 2], [1.1, 2], [0, 0], [-1, -2]])
    assert common.distinct_units(rows) == 4
    assert common.distinct_units(torch.zeros(5, 3, 2, 2)) == 1
    assert common.distinct_units(torch.randn(64, 32, 3, 3)) == 64


def test_dead_relus_are_those_that_no_image_excites():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0, -1, -2])
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    assert common.dead_relus(model, images) == [0.75]
    assert common.dead_relus(nn.Sequential(nn.LeakyReLU()), images) == []


def test_gradient_sizes_agree_with_a_hand_computation(tiny):
    """Of a linear network: the gradient is (softmax - one-hot) times the pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))
    split = common.Split(tiny.train.images[:20], tiny.train.labels[:20])
    pixels = common.normalize(split.images).flatten(1)
    weight, bias = model[2].weight.detach(), model[2].bias.detach()
    errors = (pixels @ weight.T + bias).softmax(1)
    errors[range(20), split.labels] -= 1
    expected = (errors.T @ pixels / 20).square().mean().sqrt().item()
    state = torch.random.get_rng_state()
    assert common.gradient_sizes(model, split) == [pytest.approx(expected, rel=1e-4)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert model[2].weight.grad is None


def history(steps=None, **last):
    """Of three epochs of a healthy training, but for what is given of the last."""
    row = {"train_loss": 0.02, "val_loss": 0.03}
    row |= {"train_accuracy": 99.4, "val_accuracy": 99.1}
    rows = [{"epoch": i} | row for i in (1, 2)] + [{"epoch": 3} | row | last]
    return common.History(rows, steps or [2.3 / (i + 1) for i in range(100)])


@pytest.mark.parametrize(
    ("found", "alarms"),
    [
        (history(), []),
        (history(train_accuracy=11.0, val_accuracy=11.0), ["not learning"]),
        (history([2.3, 0.5] * 10 + [1.5] * 20 + [0.1] * 60), []),
        (history([2.3] * 10 + [0.1] * 40 + [1.5] * 50), ["oscillating"]),
        (history(train_loss=0.001, train_accuracy=100, val_accuracy=98), ["overfitting"]),
        (history(train_loss=0.001, train_accuracy=99.9), []),
    ],
)
def test_alarms_of_a_history(found, alarms, tiny):
    torch.manual_seed(0)
    assert common.check_health(BASELINE(), found, tiny.train) == alarms


def broken_network(alarm):
    torch.manual_seed(0)
    model = BASELINE()
    first, last = common.layer_weights(model)[0], common.layer_weights(model)[-1]
    with torch.no_grad():
        if alarm == "exploding gradients":
            last.mul_(1e4)
        elif alarm == "vanishing gradients":
            last.mul_(1e-9)
        elif alarm == "dead ReLUs":
            model[7].bias.fill_(-100)
        elif alarm == "symmetric units":
            first.copy_(first[:1].expand_as(first))
    return model


@pytest.mark.parametrize("alarm", common.ALARMS[3:7])
def test_alarms_of_a_network(alarm, tiny):
    assert alarm in common.check_health(broken_network(alarm), history(), tiny.train)


def test_divergence_is_the_only_alarm_of_weights_that_are_no_numbers(tiny):
    found = common.History(diverged=True)
    assert common.check_health(BASELINE(), found, tiny.train) == ["diverged"]


def test_frozen_parameters_are_no_fault(tiny):
    """As in fine-tuning."""
    model = BASELINE()
    model[0].requires_grad_(False)
    assert common.check_health(model, history(), tiny.train) == []
    model.requires_grad_(False)
    assert common.check_health(model, history(), tiny.train) == []


def constant(model, value):
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(layer.weight, value)
            nn.init.zeros_(layer.bias)
    return model


def batchnorm(model):
    return nn.Sequential(*model[:1], nn.BatchNorm2d(32), *model[1:])


ADAM, SGD = torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)
SMALL = {  # network, optimizer, learning rate, images, epochs, intended alarm
    "healthy": (baseline_cnn, ADAM, 1e-3, 1500, 3, None),
    "healthy, BatchNorm": (lambda: batchnorm(BASELINE()), ADAM, 1e-3, 1500, 2, None),
    "healthy, SGD": (baseline_cnn, SGD, 0.02, 1500, 4, None),
    "AdvancedComboCNN": (advanced_combo_cnn, ADAM, 3e-3, 1500, 3, None),
    "Adam 0.1": (baseline_cnn, ADAM, 0.1, 1500, 2, "not learning"),
    "SGD 1e6": (BASELINE, SGD, 1e6, 1500, 1, "diverged"),
    "BatchNorm, SGD 3": (lambda: batchnorm(BASELINE()), SGD, 3, 1500, 2, "oscillating"),
    "zero": (lambda: constant(BASELINE(), 0), ADAM, 1e-3, 1500, 1, "symmetric units"),
    "constant": (*(lambda: constant(baseline_cnn(), 0.01), ADAM, 1e-3, 1500, 6), "symmetric units"),
    "memorised": (BASELINE, ADAM, 1e-3, 200, 20, "overfitting"),
}


@pytest.fixture(scope="module")
def small():
    """Each training of SMALL: (network before it, history)."""
    data = common.split_data(*common.draw_digits(1650, 0), *common.draw_digits(100, 1), "synthetic digits")
    found = {}
    for label, (network, optimizer, lr, images, epochs, _) in SMALL.items():
        torch.manual_seed(0)
        model = network()
        part = data._replace(train=common.first(data.train, images))
        before = common.evaluate(model, part.train)[0]
        optimizer = optimizer(model.parameters(), lr=lr)
        found[label] = (before, common.fit(model, part, optimizer, epochs=epochs, batch_size=64))
    return found


def test_matrix_of_small_trainings_against_alarms(small):
    """No false alarm, no missed alarm; `pytest -s` shows the matrix."""
    print(f"\n{'training':<22}" + "".join(f"{alarm:<21}" for alarm in common.ALARMS))
    for label, (_, found) in small.items():
        marks = ("x" if alarm in found.health else "." for alarm in common.ALARMS)
        print(f"{label:<22}" + "".join(f"{mark:<21}" for mark in marks))
    for label, (_, found) in small.items():
        *_, intended = SMALL[label]
        assert intended in found.health if intended else not found.health, label


def test_the_loss_alone_is_not_enough(small):
    """ln 10 is the loss of a healthy network before training and of a dead one after it; and a loss far below is no
    sign of health."""
    assert small["healthy"][0] == pytest.approx(math.log(10), abs=0.02)
    zero, symmetric = (small[label][1] for label in ("zero", "constant"))
    assert zero.rows[-1]["train_loss"] == pytest.approx(math.log(10), abs=0.02)
    assert symmetric.rows[-1]["train_loss"] < 1.5
    assert "symmetric units" in symmetric.health
