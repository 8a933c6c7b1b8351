"""Training against oracles: hand-computed losses, an uninterrupted run, a run that differs in one setting."""

import math
import re
from functools import partial

import pytest
import torch
from conftest import be_silent
from torch import nn

import common
import q1_baseline
from common import baseline_cnn, random_affine
from q2_variants import variant8_most_accurate as variant8

STEPS = 7  # of 128 images, in an epoch of the 880 tiny ones


def test_evaluation_agrees_with_a_hand_computation(tiny, monkeypatch):
    monkeypatch.setattr(common, "EVAL_BATCH", 60)  # of 80 images: the last has 20
    torch.manual_seed(0)
    model = baseline_cnn().eval()
    loss, hits = 0.0, 0
    for image, label in zip(*tiny.val, strict=True):
        logits = model(common.normalize(image)[None])[0].tolist()
        loss += math.log(sum(math.exp(z) for z in logits)) - logits[label]
        hits += logits.index(max(logits)) == label
    found = common.evaluate(model, tiny.val)
    assert found[:2] == (pytest.approx(loss / 80, rel=1e-5), pytest.approx(100 * hits / 80))
    assert found[2].shape == (80, 10) and found[2].argmax(1).eq(tiny.val.labels).sum() == hits


def test_loss_of_an_epoch_weights_a_smaller_last_batch_by_its_size(tiny):
    """At a learning rate of 0 the epoch's mean is that over all images, which `evaluate` computes in another way."""
    torch.manual_seed(0)
    model = baseline_cnn(dropout=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history = common.fit(model, tiny, optimizer, {"epochs": 1, "batch_size": 300})  # 300, 300 and 280
    loss, accuracy, _ = common.evaluate(model, tiny.train)
    assert history.rows[0]["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert history.rows[0]["train_accuracy"] == pytest.approx(accuracy)
    assert len(history.step_losses) == 3


def test_smoothed_loss_is_the_mixture_of_the_labels_and_of_all_classes(tiny):
    torch.manual_seed(0)
    model = baseline_cnn(dropout=0)
    config = {"epochs": 1, "batch_size": len(tiny.train.labels), "label_smoothing": 0.1}
    logits = model(common.normalize(tiny.train.images)).detach().double()
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -(0.9 * logs[range(len(logs)), tiny.train.labels] + 0.1 * logs.mean(1)).mean()
    history = common.fit(model, tiny, torch.optim.SGD(model.parameters(), lr=0.0), config)
    assert history.rows[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)


def small_cnn(dropout=0.2):
    """Fast to train, with a buffer and a use of random numbers: BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(864, 10),
    )


def test_evaluation_changes_nothing(tiny):
    torch.manual_seed(0)
    model = small_cnn().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    common.evaluate(model, tiny.val)
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value), key
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())


def train(tiny, seed=0, dropout=0.2, lr=1e-3, scheduled=False, epochs=3, patience=None, **options):
    """A small training: (history without its clock, weights)."""
    torch.manual_seed(seed)
    model = small_cnn(dropout).to(tiny.train.labels.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if scheduled:
        cycle, total = torch.optim.lr_scheduler.OneCycleLR, epochs * STEPS
        options["scheduler"] = cycle(optimizer, 3 * lr, total_steps=total)
    config = {"epochs": epochs, "batch_size": 128, "patience": patience}
    history = common.fit(model, tiny, optimizer, config, seed=seed, **options)
    for row in history.rows:
        del row["seconds"]
    return history, model.state_dict()


def same(first, second):
    """Whether the histories and the weights of two trainings are bit-identical."""
    weights = zip(first[1].values(), second[1].values(), strict=True)
    return first[0] == second[0] and all(torch.equal(a, b) for a, b in weights)


def test_training_depends_on_the_seed_only(tiny):
    first = train(tiny)
    assert same(first, train(tiny)) and not same(first, train(tiny, seed=1))


def test_evaluation_does_not_shift_the_training(tiny):
    """One validation image or eighty: every step has the same loss."""
    one = tiny._replace(val=common.Split(*(tensor[:1] for tensor in tiny.val)))
    assert train(tiny)[0].step_losses == train(one)[0].step_losses


def test_runs_that_differ_in_one_setting_share_their_batches(tiny, monkeypatch):
    draw = common.batches
    seen = []

    def spy(*arguments):
        for images, labels in draw(*arguments):
            seen.append(labels)
            yield images, labels

    monkeypatch.setattr(common, "batches", spy)
    first, second = train(tiny, dropout=0.0)[0], train(tiny, dropout=0.5, lr=0.01)[0]
    orders = torch.cat(seen).view(2, 3, 880)  # runs, epochs, images
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0, 0], orders[0, 1])
    assert first.step_losses != second.step_losses


def test_best_epoch_is_kept_and_patience_ends_the_run(tiny):
    history, weights = train(tiny, lr=0.01, epochs=60, patience=2)
    accuracies = [row["val_accuracy"] for row in history.rows]
    assert len(accuracies) == history.best_epoch + 2 < 60
    assert accuracies[history.best_epoch - 1] == max(accuracies)
    model = small_cnn()
    model.load_state_dict(weights)
    row = history.rows[history.best_epoch - 1]
    assert common.evaluate(model, tiny.val)[:2] == (row["val_loss"], row["val_accuracy"])


def test_last_epoch_can_be_kept_instead(tiny):
    history, _ = train(tiny, lr=0.01, epochs=60, patience=2)
    stopped = len(history.rows)
    assert history.best_epoch < stopped
    history, weights = train(tiny, lr=0.01, epochs=stopped, keep_last=True)
    assert history.best_epoch == stopped and history.val_accuracy == history.rows[-1]["val_accuracy"]
    model = small_cnn()
    model.load_state_dict(weights)
    assert common.evaluate(model, tiny.val)[1] == history.val_accuracy


def test_divergence_is_recorded_and_ends_the_run(tiny):
    model = baseline_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e20)
    history = common.fit(model, tiny, optimizer, {"epochs": 5, "batch_size": 64})
    assert history.diverged and len(history.rows) == 1
    assert not math.isfinite(history.rows[0]["train_loss"])


def test_bf16_trains_like_fp32(tiny):
    fp32, bf16 = (train(tiny, precision=p)[0] for p in ("fp32", "bf16"))
    assert fp32.step_losses != bf16.step_losses  # else nothing was tested
    losses = [history.rows[-1]["train_loss"] for history in (fp32, bf16)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


class Stop(Exception):
    pass


def stop(tiny, path, after, **options):
    """Train until `after` batches were seen in all, then raise."""
    draw = common.batches
    seen = []

    def counted(*arguments):
        for batch in draw(*arguments):
            if len(seen) == after:
                raise Stop
            seen.append(batch)
            yield batch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common, "batches", counted)
        train(tiny, checkpoint=path, **options)


ROTATE = partial(random_affine, degrees=(15,))
OPTIONS = [{}, {"patience": 2, "lr": 0.03}, {"scheduled": True, "augment": ROTATE}]


@pytest.mark.parametrize("after", [0, 3, STEPS, STEPS + 5, 2 * STEPS])
@pytest.mark.parametrize("options", OPTIONS)
def test_resumed_training_is_bit_identical_to_one_never_stopped(tiny, tmp_path, after, options):
    path = tmp_path / "c.pt"
    stop(tiny, path, after, **options)
    resumed = train(tiny, checkpoint=path, **options)
    assert same(train(tiny, **options), resumed)


@pytest.mark.parametrize("device", common.available_devices())
def test_every_device_here_trains_augments_and_resumes(tiny, tmp_path, device):
    parts = [common.Split(*(t.to(device) for t in part)) for part in tiny[:3]]
    data, options = common.Dataset(*parts, tiny.name), {"augment": ROTATE}
    stop(data, tmp_path / "c.pt", STEPS + 1, **options)
    resumed = train(data, checkpoint=tmp_path / "c.pt", **options)
    assert same(train(data, **options), resumed)


def test_resuming_a_finished_run_trains_no_further(tiny, tmp_path):
    options = {"patience": 2, "epochs": 60, "lr": 0.01, "checkpoint": tmp_path / "c.pt"}
    first = train(tiny, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "train_epoch", None)
        assert same(first, train(tiny, **options))


def test_checkpoint_of_another_memory_format_keeps_each_weights_momentum(tiny, tmp_path):
    """A fused optimizer reads its state in the order of the memory, whatever the strides are."""

    def conv_net(memory_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten())
        model = model.append(nn.Linear(576, 10)).to(memory_format=memory_format)
        return model, torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

    def weights(epochs, memory_format, path):
        model, optimizer = conv_net(memory_format)
        config = {"epochs": epochs, "batch_size": 64}
        common.fit(model, tiny, optimizer, config, keep_last=True, checkpoint=path)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    weights(2, contiguous, tmp_path / "c.pt")
    resumed = weights(4, channels_last, tmp_path / "c.pt")
    start = weights(2, contiguous, tmp_path / "other.pt")
    never_stopped = weights(4, contiguous, tmp_path / "third.pt")
    assert (resumed - never_stopped).norm() < 0.01 * (never_stopped - start).norm()


PIECES = ["model", "optimizer", "scheduler", "shuffle_rng", "augment_rng", "rng", "best", "history"]


@pytest.mark.parametrize("piece", PIECES)
def test_no_piece_of_the_checkpoint_can_be_left_out(tiny, tmp_path, piece):
    """With its first state in the place of its last, the result is another one."""
    options = {"augment": ROTATE, "scheduled": piece != "history"}
    paths = tmp_path / "first.pt", tmp_path / "last.pt"
    stop(tiny, paths[0], 0, **options)
    stop(tiny, paths[1], 2 * STEPS, **options)
    first, last = (torch.load(path, weights_only=True) for path in paths)
    last["history"]["rows"][-1]["val_accuracy"] = 100.1  # so that `best` is what stays
    last["history"]["best_epoch"] = 2
    torch.save(last, paths[1])
    resumed = train(tiny, checkpoint=paths[1], **options)
    last[piece] = first[piece]
    torch.save(last, paths[1])
    changed = train(tiny, checkpoint=paths[1], **options)
    assert not same(resumed, changed)


def other(path):
    torch.save({"weights": torch.zeros(3)}, path)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path):
    path.write_text("not a checkpoint")


@pytest.mark.parametrize("harm", [other, truncated, text])
def test_unusable_checkpoint_is_one_line(tiny, tmp_path, harm):
    options = {"epochs": 1, "checkpoint": tmp_path / "c.pt"}
    train(tiny, **options)
    harm(tmp_path / "c.pt")
    with pytest.raises(SystemExit, match=r"^[^ ]*c\.pt is truncated or not a checkpoint of this project; delete it$"):
        train(tiny, **options)


def test_checkpoint_of_another_network_says_what_differs(tiny, tmp_path):
    options = {"epochs": 1, "checkpoint": tmp_path / "c.pt"}
    train(tiny, **options)
    with pytest.raises(SystemExit, match=r"\(layers was Sequential.*p=0.2.*, is .*p=0.1.*\); run without --resume$"):
        train(tiny, dropout=0.1, **options)


def test_trace_of_a_script_is_resumed_too(tiny, tmp_path):
    def traced(stopped):
        trace = {"batches": []}
        augment = lambda images, _: trace["batches"].append(len(images)) or images
        options = {"augment": augment, "trace": trace, "checkpoint": tmp_path / f"{stopped}.pt"}
        if stopped:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
                patch.setattr(common, "evaluate", stop_at(2, common.evaluate))
                train(tiny, **options)
            trace["batches"].clear()
        return train(tiny, **options)[0].trace

    assert traced(True) == traced(False) == {"batches": ([128] * 6 + [112]) * 3}


def stop_at(call, function):
    calls = []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise Stop
        return function(*arguments)

    return stopping


def test_fit_prints_a_line_for_each_epoch(tiny, capsys):
    train(tiny, epochs=2)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2 and not printed.err
    numbers = r"loss [\d.]+ accuracy [\d.]+ %  "
    for epoch, line in enumerate(lines, 1):
        assert re.match(rf"epoch  {epoch}/2  train {numbers}val {numbers}lr 0.001  [\d.]+ s", line), line


def test_files_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write_file(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "replace", fail)
    with pytest.raises(SystemExit, match=f"^cannot write {re.escape(str(path))}: No space left on device$"):
        common.write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^cannot write [^\n]+: [^\n]+$"):
        common.write_file(tmp_path / "file" / "name", b"")


@pytest.mark.parametrize("script", [q1_baseline, pytest.param(variant8, marks=pytest.mark.slow)])
def test_a_training_of_five_steps_has_a_schedule(script, tiny):
    """OneCycleLR(pct_start=0.2, total_steps=5) divides by 0: torch 2.14.1, github.com/pytorch/pytorch/pull/180187."""
    config = {**next(iter(script.RUNS.values())), "epochs": 1, "batch_size": 176}
    assert tiny.steps(176) == 5
    _, history = script.train(config, tiny, seed=0, progress=be_silent)
    assert len(history.step_losses) == 5
