"""The health checks: each against a hand-made network, history or data set, then all against small trainings that are
healthy or faulty on purpose."""

import copy
import math

import facts
import pytest
import torch
from conftest import be_silent, call_script, results_in
from torch import nn

import common
from common import baseline_cnn
from q4_break import fault_gallery as gallery
from q4_break import health
from q4_break.fault_gallery import mlp
from q4_break.health import check_data, distinct_units, layer_outputs


def test_distinct_units_counts_rows_that_differ():
    rows = torch.tensor([[1.0, 2], [1, 2], [1.0001, 2], [1.1, 2], [0, 0], [-1, -2]])
    assert distinct_units(rows) == 4
    assert distinct_units(torch.zeros(5, 3, 2, 2)) == 1
    assert distinct_units(torch.randn(64, 32, 3, 3)) == 64


def test_dead_share_counts_units_that_are_zero_for_all_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0, -1, -2])
    outputs, logits = layer_outputs(model, torch.zeros(3, 1, 28, 28))
    assert [name for name, _, _ in outputs] == list("0123")
    assert health.dead_share(outputs[2][2]) == 0.75
    assert logits is outputs[3][2] and logits.shape == (3, 10)


# ---- A healthy training, which each test changes in one thing --------------------------------------------------------
def healthy_network():
    torch.manual_seed(0)
    return baseline_cnn(dropout=0.1)


def healthy_history(steps=None, **last):
    """Of two epochs; `last` changes the last row of the log."""
    rows = [
        {"epoch": i, "train_loss": 0.2, "val_loss": 0.2, "train_accuracy": 94.4, "val_accuracy": 94.1} for i in (1, 2)
    ]
    rows[-1] |= last
    return common.History(rows, steps or [2.3 / (i + 1) for i in range(100)], 2)


def healthy_recorder(model, update=(1.0, 1.0, 0.5)):
    """Of two epochs, in which every parameter moves so: its length before, after, and the distance."""
    recorder = health.Recorder(model)
    recorder.updates = [[list(update)] * len(list(model.parameters()))] * 2
    recorder.batch_labels = list(range(10)) * 6
    return recorder


def check_health(model, data, optimizer=None, history=None, recorder=None):
    """The alarms of the healthy training, but for what is given."""
    history, recorder = history or healthy_history(), recorder or healthy_recorder(model)
    optimizer = optimizer or torch.optim.Adam(model.parameters())
    return health.check_health(model, history, recorder, optimizer, data.train, data.val, common.normalize)


@pytest.fixture(scope="module")
def trained():
    """A data set of synthetic digits, and a network that learned it: (data, network, history)."""
    data = common.split_data(*common.draw_digits(1650, 0), *common.draw_digits(100, 1), "synthetic digits")
    model = healthy_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = common.fit(model, data, optimizer, {"epochs": 2, "batch_size": 32}, progress=be_silent)
    return data, model, history


def check(trained, change=None, **others):
    """The alarms of the healthy training after `change` to its network, or with another history or recorder."""
    model = copy.deepcopy(trained[1])
    if change:
        change(model)
    return check_health(model, trained[0], **others)


def test_trained_network_sets_off_no_alarm(trained):
    assert trained[2].health == [] and check(trained) == []


@pytest.mark.parametrize(
    ("changes", "alarms"),
    [
        ({"train_accuracy": 11.0, "val_accuracy": 11.0}, ["not learning"]),
        ({"steps": [2.3, 0.5] * 10 + [1.5] * 20 + [0.1] * 60}, []),
        ({"steps": [2.3] * 10 + [0.1] * 40 + [1.5] * 50}, ["oscillating"]),
        ({"steps": [15.0] * 5 + [0.5] * 95}, ["initial loss too high"]),
        ({"train_loss": 0.001, "val_loss": 0.1, "train_accuracy": 100, "val_accuracy": 98}, ["overfitting"]),
        ({"train_loss": 0.001, "train_accuracy": 99.9, "val_accuracy": 99.2}, []),
        ({"train_accuracy": 94.0, "val_accuracy": 80.0}, ["overfitting"]),
    ],
)
def test_alarms_of_a_history(changes, alarms, trained):
    assert check(trained, history=healthy_history(**changes)) == alarms


def test_parameters_that_never_moved_are_named(trained):
    recorder = healthy_recorder(trained[1])
    recorder.updates = [[[1.0, 1.0, 0.5], [1.0, 1.0, 0.0], *epoch[2:]] for epoch in recorder.updates]
    assert check(trained, recorder=recorder) == ["parameters not updated (0.bias)"]
    (alarm,) = check(trained, recorder=healthy_recorder(trained[1], (1.0, 1.0, 0.0)))
    assert alarm.startswith("parameters not updated (0.weight, 0.bias, 3.weight")


def test_lengths_of_updates_show_decay_small_starts_and_small_steps(trained):
    assert check(trained, recorder=healthy_recorder(trained[1], (1.0, 1.0, 0.001))) == ["learning rate too low"]
    recorder = healthy_recorder(trained[1])
    recorder.updates[-1] = [[1.0, 0.01, 1.0], *recorder.updates[-1][1:]]
    assert check(trained, recorder=recorder) == ["weights decayed"]
    recorder = healthy_recorder(trained[1])
    recorder.updates = [[[0.001, 1.0, 1.0], *epoch[1:]] for epoch in recorder.updates]
    assert check(trained, recorder=recorder) == ["initial weights too small"]


@pytest.mark.parametrize(
    ("lengths", "last_loss", "alarms"),  # of a layer of 32 units, whose usual length is 3.3
    [
        ((3.3, 1e6, 1e6), 2.3, ["learning rate too high"]),
        ((3.3, math.inf, math.inf), 2.3, ["learning rate too high"]),
        ((3.3, 1e3, 1e3), 0.1, []),  # BatchNorm makes the length of the weights before it irrelevant
        ((3.3, 10.0, 10.0), 2.3, []),  # has not learned for another reason
        ((0.0033, 3.3, 3.3), 2.3, ["initial weights too small"]),
        ((0.0033, 1e3, 1e3), 2.3, ["learning rate too high", "initial weights too small"]),
        ((100.0, 300.0, 300.0), 2.3, []),  # long from the start
    ],
)
def test_weights_that_blow_up_are_told_from_weights_that_started_small(lengths, last_loss, alarms, trained):
    recorder = healthy_recorder(trained[1])
    recorder.updates = [[list(lengths), *epoch[1:]] for epoch in recorder.updates]
    history = healthy_history(steps=[2.3] * 50 + [last_loss] * 50)
    assert check(trained, history=history, recorder=recorder) == alarms


@pytest.mark.parametrize(
    "lr", [10.0, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(100.0, marks=pytest.mark.slow)]
)
def test_first_alarm_of_sgd_with_a_learning_rate_too_high(lr, trained):
    model = healthy_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    history = common.fit(model, trained[0], optimizer, {"epochs": 2, "batch_size": 32}, progress=be_silent)
    assert history.health[0] in ("learning rate too high", "diverged")


def test_recorder_measures_updates_and_continues_from_its_state():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    recorder = health.Recorder(layer)
    recorder.start_epoch()
    layer.weight.data = torch.tensor([[0.0, 4.0]])
    recorder.end_epoch(torch.tensor([7, 8]))
    assert recorder.updates == [[[5.0, 4.0, 3.0]]] and recorder.batch_labels == [7, 8]
    other = health.Recorder(nn.Linear(2, 1, bias=False))
    other.load_state_dict(recorder.state_dict())
    assert other.state_dict() == recorder.state_dict()


def test_divergence_is_the_only_alarm_of_weights_that_are_not_numbers(trained):
    history = healthy_history(steps=[2.3, math.nan])
    history.diverged = True
    change = lambda model: [nn.init.constant_(p, math.nan) for p in model.parameters()]
    assert check(trained, change, history=history) == ["diverged"]


def scaled(layer, factor):
    return lambda model: model[layer].weight.data.mul_(factor)


def repeat_first_unit(model):
    weight = model[3].weight.data
    weight.copy_(weight[:1].expand_as(weight))


NETWORK = {  # a change of the trained network, and the first alarm
    "softmax before the loss": lambda model: model.append(nn.Softmax(1)),
    "ReLU before the loss": lambda model: model.append(nn.ReLU()),
    "number of outputs": lambda model: model.append(nn.Linear(10, 20)),
    "exploding gradients": scaled(10, 1e4),
    "dead ReLUs (8)": lambda model: model[7].bias.data.fill_(-1000),
    "symmetric units (3.weight)": repeat_first_unit,
    "dropout too strong": lambda model: setattr(model[9], "p", 0.99),
    "batch statistics": lambda model: setattr(model, "eval", lambda: model),
}


@pytest.mark.parametrize("alarm", NETWORK)
def test_first_alarm_of_a_changed_network(alarm, trained):
    model = copy.deepcopy(trained[1]).train()
    optimizer = torch.optim.Adam(model.parameters())
    NETWORK[alarm](model)
    assert check_health(model, trained[0], optimizer)[0] == alarm


def test_parameters_that_are_no_weights_may_be_equal(trained):
    def add_parameter(model):
        model[1].register_parameter("offset", nn.Parameter(torch.zeros(6, 20)))

    assert check(trained, add_parameter) == []


def test_saturated_activations_are_named(trained):
    torch.manual_seed(0)
    model = mlp(nn.Tanh)
    gallery.scale_weights(model, 30.0, slice(0, -1))
    alarms = check_health(model, trained[0])
    assert alarms[0] == "saturated activations (2, 4)"


def test_wrong_running_averages_are_found(trained):
    torch.manual_seed(0)
    model = mlp(batchnorm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    config = {"epochs": 2, "batch_size": 32}
    assert common.fit(model, trained[0], optimizer, config, progress=be_silent).health == []
    right = copy.deepcopy(model)
    model[2].running_var *= 4
    assert check_health(model, trained[0]) == ["batch statistics"]
    right[2].running_mean[::2] -= 5 * right[2].running_var[::2].sqrt()  # leaves the outputs' deviations as they are
    assert check_health(right, trained[0])[:1] == ["batch statistics"]


def test_averaged_weights_outlive_a_resume(tiny, tmp_path):
    config = gallery.make_config("MLP, BatchNorm", averaged=True)

    def stop(images, line=""):
        if line:
            raise KeyboardInterrupt

    straight, history = gallery.train(config, tiny, 0, progress=be_silent)
    with pytest.raises(KeyboardInterrupt):
        gallery.train(config, tiny, 0, checkpoint=tmp_path / "run.pt", progress=stop)
    resumed, again = gallery.train(config, tiny, 0, checkpoint=tmp_path / "run.pt", progress=be_silent)
    assert again.rows[-1]["val_loss"] == history.rows[-1]["val_loss"]
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for mean, other in zip(history.trace["means"], again.trace["means"], strict=True):
        assert torch.equal(mean, other) and mean.any()
    _, forgotten = gallery.train({**config, "fault": gallery.FORGOTTEN}, tiny, 0, progress=be_silent)
    losses = [[row["val_loss"] for row in found.rows] for found in (history, forgotten)]
    assert losses[0][:-1] == losses[1][:-1] and losses[0][-1] != losses[1][-1]  # only the statistics differ, at the end


def test_gradients_that_are_not_reset_are_found(trained):
    model = copy.deepcopy(trained[1])
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 1, 28, 28)).sum().backward()
    assert check_health(model, trained[0], optimizer) == []  # it does reset them
    model(torch.zeros(2, 1, 28, 28)).sum().backward()
    optimizer.zero_grad = lambda: None
    assert check_health(model, trained[0], optimizer) == ["gradients not reset"]


def test_frozen_parameters_do_not_crash(trained):
    """As in fine-tuning; they are named only if nothing says that they moved."""
    assert check(trained, lambda model: model[0].requires_grad_(False)) == []
    assert check(trained, lambda model: model.requires_grad_(False)) == []


def test_data_are_judged_by_their_nearest_neighbours(trained):
    split, val, *_ = trained[0]

    def alarms(split, val, batch_labels=range(10)):
        return [name for name, found in check_data(split, val, batch_labels, 10).items() if found]

    assert alarms(split, val) == []
    mixed = split.labels[torch.randperm(len(split.labels))]
    assert "wrong labels" in alarms(split._replace(labels=mixed), val)
    for change in facts.CHANGES:
        differs = val._replace(images=facts.CHANGES[change](val.images))
        # A pixel's shift costs the baseline a point, the others 56 and more (tests/RESULTS.md).
        assert alarms(split, differs) == ([] if "pixel" in change else ["validation data differ"])
    assert "identical images" in alarms(split._replace(images=torch.zeros_like(split.images)), val)
    assert alarms(split.head(1), val) == []  # too few to judge
    assert alarms(split, val, [3] * 60) == ["not shuffled"]


def test_checks_change_neither_weights_nor_random_state(trained):
    model = copy.deepcopy(trained[1]).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_health(model, trained[0])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and model.training


# ---- The gallery -----------------------------------------------------------------------------------------------------
def test_every_alarm_has_an_advice_and_every_fault_an_alarm():
    named = set().union(*(alarms for _, alarms in gallery.FAULTS.values()))
    assert named <= set(health.ALARMS)
    changes = gallery.DATA.keys() | gallery.NETWORK.keys() | gallery.OPTIMIZER.keys()
    # Averaged weights have a test of their own; few images are a matter of the configuration.
    assert gallery.FAULTS.keys() == changes | {gallery.FORGOTTEN, gallery.FEW}
    assert all(health.ALARMS.values())
    for networks, _ in gallery.FAULTS.values():
        assert set(networks) & set(gallery.CALIBRATION) and set(networks) & set(gallery.HELD_OUT)


@pytest.mark.slow
def test_small_gallery_names_faults_of_an_mlp(mnist_folder, tmp_path, monkeypatch, capsys):
    """On 800 synthetic digits; the whole gallery is for real MNIST."""
    faults = [fault for fault, (networks, _) in gallery.FAULTS.items() if "MLP" in networks]
    runs = {name: config for name, config in gallery.RUNS.items() if config["network"] == "MLP"}
    runs = dict(list(runs.items())[::2])  # half of them, the healthy one included
    monkeypatch.setattr(gallery, "RUNS", {name: {**config, "batch_size": 8} for name, config in runs.items()})
    call_script("q4_break/fault_gallery.py", "--precision fp32", mnist_folder, tmp_path)
    found, _ = results_in(tmp_path, "fault_gallery")
    assert len(found) == 1 + len(faults) // 2
    right = 0
    for run in found.values():
        (seed,) = run["seeds"]
        first = health.alarm_names(seed["health"][:1])
        right += (
            first == [] if run["config"]["fault"] is None else set(first) <= gallery.FAULTS[run["config"]["fault"]][1]
        )
    assert right >= 0.85 * len(found)
    assert (tmp_path / "fault_gallery_matrix.png").stat().st_size > 20_000
    assert "with the right one first" in capsys.readouterr().out
