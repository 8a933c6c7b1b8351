"""Training against oracles: hand-computed losses, an uninterrupted run, a run with one thing changed."""

import math
import re

import pytest
import torch
from torch import nn

import common
from common import Interrupted, baseline_cnn, evaluate, fit


def test_baseline_has_the_published_layers():
    table = [row for row in common.layer_table(baseline_cnn()) if row[2]]
    assert table == [
        ("Conv2d", (32, 28, 28), 320),
        ("Conv2d", (64, 14, 14), 18_496),
        ("Linear", (128,), 401_536),
        ("Linear", (10,), 1_290),
    ]
    assert common.count_parameters(baseline_cnn()) == 421_642
    shapes = [
        shape
        for name, shape, _ in common.layer_table(baseline_cnn())
        if name in ("MaxPool2d", "Flatten")
    ]
    assert shapes == [(32, 14, 14), (64, 7, 7), (3136,)]


def test_pooling_before_relu_is_the_published_function():
    torch.manual_seed(0)
    ours = baseline_cnn().eval()
    layers = list(ours)
    published = nn.Sequential(
        layers[0],
        nn.ReLU(),
        nn.MaxPool2d(2),
        layers[3],
        nn.ReLU(),
        nn.MaxPool2d(2),
        *layers[6:],
    ).eval()
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(ours(images), published(images))


def test_score_agrees_with_a_hand_computation_on_a_ragged_last_batch(tiny, monkeypatch):
    monkeypatch.setattr(common, "EVAL_BATCH", 60)  # 80 validation images: 60 and 20
    torch.manual_seed(0)
    model = baseline_cnn()
    loss, accuracy = evaluate(model, tiny.val)
    by_hand, hits = 0.0, 0
    model.eval()
    for image, label in zip(*tiny.val, strict=True):
        logits = model(common.normalize(image)[None])[0].tolist()
        by_hand += math.log(sum(math.exp(z) for z in logits)) - logits[label]
        hits += logits.index(max(logits)) == label
    assert loss == pytest.approx(by_hand / 80, rel=1e-5) and accuracy == pytest.approx(
        100 * hits / 80
    )


def test_epoch_loss_weighs_a_ragged_last_batch_by_its_size(tiny):
    """With a learning rate of 0 the mean over the epoch is the mean over the images, which evaluate also computes."""
    torch.manual_seed(0)
    model = baseline_cnn(dropout=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fit(
        model, tiny.train, tiny.val, optimizer, epochs=1, batch_size=300
    )  # 300, 300, 280
    loss, accuracy = evaluate(model, tiny.train)
    assert history.rows[0]["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert history.rows[0]["train_accuracy"] == pytest.approx(accuracy)
    assert len(history.step_losses) == 3


def test_evaluation_leaves_no_trace(tiny):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.LazyLinear(10),
    ).train()
    model(torch.randn(4, 1, 28, 28))
    before, random = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.get_rng_state(),
    )
    evaluate(model, tiny.val)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and all(
        module.training for module in model.modules()
    )


def train(
    tiny,
    seed=0,
    *,
    dropout=0.5,
    lr=1e-3,
    scheduled=False,
    evaluations=0,
    monitor=None,
    epochs=3,
    **options,
):
    """A small training; returns (history without its clock, weights)."""
    torch.manual_seed(seed)
    model = baseline_cnn(dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if scheduled:
        options["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.003, total_steps=epochs * 7
        )
    history = fit(
        model,
        tiny.train,
        tiny.val,
        optimizer,
        epochs=epochs,
        batch_size=128,
        seed=seed,
        **options,
    )
    for row in history.rows:
        del row["seconds"]
    return history, model.state_dict()


def same(first, second):
    """Whether two trainings agree to the bit, history and weights."""
    return first[0] == second[0] and all(
        torch.equal(first[1][k], second[1][k]) for k in first[1]
    )


def test_same_seed_same_training_other_seed_another(tiny):
    first = train(tiny)
    assert same(first, train(tiny)) and not same(first, train(tiny, seed=1))


def test_evaluation_between_epochs_does_not_shift_the_training(tiny):
    """One validation image or eighty: the training loss of every step stays."""
    first = train(tiny)[0]
    fewer = train(tiny._replace(val=common.Split(*(t[:1] for t in tiny.val))))[0]
    assert first.step_losses == fewer.step_losses


def test_runs_that_differ_in_one_knob_share_weights_and_batches(tiny, monkeypatch):
    seen = []
    draw = common.batches
    monkeypatch.setattr(
        common,
        "batches",
        lambda *a: (
            seen.append(labels) or (images, labels) for images, labels in draw(*a)
        ),
    )
    train(tiny, dropout=0.0, epochs=2)
    first, seen = torch.cat(seen), []
    train(tiny, dropout=0.5, lr=0.01, epochs=2)
    assert torch.equal(first, torch.cat(seen)) and not torch.equal(
        first[:880], first[880:]
    )


def test_the_best_validation_epoch_is_kept_and_patience_ends_the_run(tiny):
    history, weights = train(tiny, lr=0.01, epochs=30, patience=2)
    accuracies = [row["val_accuracy"] for row in history.rows]
    assert len(accuracies) == history.best_epoch + 2 < 30
    assert accuracies[history.best_epoch - 1] == max(accuracies)
    model = baseline_cnn()
    model.load_state_dict(weights)
    assert evaluate(model, tiny.val).accuracy == max(accuracies)


def test_divergence_is_recorded_and_ends_the_run(tiny):
    torch.manual_seed(0)
    model = baseline_cnn()
    history = fit(
        model,
        tiny.train,
        tiny.val,
        torch.optim.SGD(model.parameters(), lr=1e20),
        epochs=5,
        batch_size=64,
    )
    assert (
        history.diverged
        and len(history.rows) == 1
        and not math.isfinite(history.rows[0]["train_loss"])
    )


def test_bf16_trains_like_fp32(tiny):
    fp32, bf16 = (
        train(tiny, precision=precision, epochs=4)[0] for precision in ("fp32", "bf16")
    )
    assert fp32.step_losses != bf16.step_losses  # otherwise nothing was tested
    assert bf16.rows[-1]["train_loss"] == pytest.approx(
        fp32.rows[-1]["train_loss"], rel=0.1
    )


class Stop(Exception):
    pass


def stopped(tiny, path, monkeypatch, after, **options):
    """Train until `after` batches were seen in all, then die as if killed."""
    left, draw = [after], common.batches

    def dying(*arguments):
        for batch in draw(*arguments):
            if not left[0]:
                raise Stop
            left[0] -= 1
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common, "batches", dying)
        train(tiny, checkpoint=path, **options)


@pytest.mark.parametrize(
    "after", [0, 3, 7, 12, 20]
)  # an epoch has 7 batches: before, inside and between epochs
@pytest.mark.parametrize("scheduled", [False, True])
def test_resume_ends_in_the_same_bits_as_a_run_never_stopped(
    tiny, tmp_path, monkeypatch, after, scheduled
):
    options = {"scheduled": scheduled, "patience": 2}
    stopped(tiny, tmp_path / "c.pt", monkeypatch, after, **options)
    assert same(
        train(tiny, **options),
        train(tiny, checkpoint=tmp_path / "c.pt", resume=True, **options),
    )


def test_resuming_a_finished_run_trains_no_further(tiny, tmp_path):
    options = {"lr": 0.01, "epochs": 30, "patience": 2, "checkpoint": tmp_path / "c.pt"}
    assert same(train(tiny, **options), train(tiny, resume=True, **options))


@pytest.mark.parametrize(
    "piece", ["model", "optimizer", "scheduler", "order", "rng", "best", "history"]
)
def test_every_piece_of_the_checkpoint_is_needed(tiny, tmp_path, monkeypatch, piece):
    """Put the piece's initial state in the place of its state after two epochs: the result must differ."""
    options = {"scheduled": piece != "history", "lr": 0.003}
    stopped(tiny, tmp_path / "initial.pt", monkeypatch, 0, **options)
    stopped(tiny, tmp_path / "c.pt", monkeypatch, 14, **options)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    state[piece] = torch.load(tmp_path / "initial.pt", weights_only=True)[piece]
    if piece == "best":  # it decides only where no later epoch is better
        state["history"]["rows"][-1]["val_accuracy"], state["history"]["best_epoch"] = (
            100.1,
            2,
        )
    torch.save(state, tmp_path / "c.pt")
    assert not same(
        train(tiny, **options),
        train(tiny, checkpoint=tmp_path / "c.pt", resume=True, **options),
    )


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def textual(path):
    path.write_text("not a checkpoint")


@pytest.mark.parametrize(
    "harm", [foreign, truncated, textual, lambda path: path.unlink()]
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(tiny, tmp_path, harm):
    train(tiny, epochs=1, checkpoint=tmp_path / "c.pt")
    harm(tmp_path / "c.pt")
    with pytest.raises(SystemExit, match=r"^cannot resume: .*c\.pt.*$"):
        train(tiny, epochs=1, checkpoint=tmp_path / "c.pt", resume=True)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lr": 0.01}, "lr"),
        ({"epochs": 2}, "epochs"),
        ({"seed": 1}, "seed"),
        ({"patience": 7}, "patience"),
        ({"dropout": 0.1}, "network"),
    ],
)
def test_a_checkpoint_of_another_configuration_says_what_differs(
    tiny, tmp_path, change, name
):
    train(tiny, epochs=1, checkpoint=tmp_path / "c.pt")
    with pytest.raises(
        SystemExit, match=f"^cannot resume: .*another configuration: {name} was "
    ):
        train(
            tiny,
            **{"epochs": 1, "checkpoint": tmp_path / "c.pt", "resume": True, **change},
        )


def test_ctrl_c_hands_over_the_finished_epochs(tiny, monkeypatch):
    draw, epochs = common.batches, []

    def interrupted(*arguments):
        epochs.append(0)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(common, "batches", interrupted)
    with pytest.raises(Interrupted) as stop:
        train(tiny, epochs=5)
    assert [row["epoch"] for row in stop.value.history.rows] == [1, 2]


def test_a_log_has_one_plain_line_per_epoch(tiny, capsys):
    train(tiny, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines, 1):
        assert re.match(
            rf"epoch +{i}/2 +train loss [\d.]+ accuracy +[\d.]+ % +val loss .* lr 0.001 .* left",
            line,
        )
