"""Q4, bad initialisation: with zero weights accuracy stays at 11 %, with a constant below 30 %.

Expect  with a constant, all 32 filters of the first layer identical before and after training. With dropout accuracy
        still reaches 92 %.
Why     Units that start with equal weights get equal gradients and stay equal (symmetry): each layer is as good as a
        single unit. With zero weights not even that one learns, since each gradient is multiplied by a zero. Dropout
        has a different mask for each hidden unit and so breaks their symmetry; but all channels of a convolution feed
        the same hidden units with the same weights, and nothing breaks theirs.
Fix     Random weights (He), 98 %; or noise added to the constant.
Run     python q4_break/fail_bad_init.py     a minute on two CPU cores
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common
from q4_break.health import check_claims, distinct_units, health_claims, layer_weights

CONSTANT = 0.01  # about the standard deviation of PyTorch's own first weights of the large layer


def make_config(init, constant=None, noise=0.0, dropout=0.5):
    """init: "default" (PyTorch's own), "He" or "constant", with normal noise of this standard deviation."""
    # At the baseline's learning rate, 1e-3, all ReLUs of a layer are dead for some seeds of the constant.
    config = {"epochs": 2, "batch_size": 64, "lr": 5e-4, "images": 40_000}
    return {**config, "init": init, "constant": constant, "noise": noise, "dropout": dropout}


RUNS = {
    "control": make_config("default"),
    "He": make_config("He"),
    "zero": make_config("constant", 0.0),
    "constant": make_config("constant", CONSTANT),
    "constant, no dropout": make_config("constant", CONSTANT, dropout=0.0),
    "constant + noise, no dropout": make_config("constant", CONSTANT, noise=1e-2, dropout=0.0),
}
EXPECTED_ALARMS = dict.fromkeys(("zero", "constant", "constant, no dropout"), "symmetric units")


def initialize(model, config):
    for layer in model if config["init"] != "default" else ():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)
            if config["init"] == "He":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, config["constant"], config["noise"])


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = common.baseline_cnn(dropout=config["dropout"])
    initialize(model, config)
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    before = symmetry(model, data.train)
    history = common.fit(model, data, optimizer, config, seed=seed, **settings)
    history.trace = {"before": before, "after": symmetry(model, data.train)}
    return model, history


def symmetry(model, split):
    """The filters of the first layer, and how many units of each layer and how many rows of the first layer's gradient
    are distinct."""
    weights = list(layer_weights(model).values())
    state = torch.get_rng_state()  # dropout's, which the training is to find as it was
    loss = F.cross_entropy(model(common.normalize(split.images[:64])), split.labels[:64])
    gradient = torch.autograd.grad(loss, weights[0])[0]
    torch.set_rng_state(state)
    return {
        "filters": weights[0].detach().cpu().clone(),
        "distinct units": [distinct_units(weight) for weight in weights],
        "distinct gradients": distinct_units(gradient),
    }


def print_symmetry(results):
    """Distinct units of each layer of the first seed, and distinct rows of the first layer's first gradient."""
    for name, group in results.items():
        before, after = (group[0].history.trace[when] for when in ("before", "after"))
        print(f"{name}: distinct units by layer {before['distinct units']}, after training {after['distinct units']}")
        print(f"  distinct rows in the first layer's first gradient: {before['distinct gradients']} of 32")


def plot_filters(results):
    """The 32 filters of the first layer, before and after training, of the first seed."""
    figure = common.new_figure(9, 2.2 * len(results))
    for row, (name, group) in zip(figure.subplots(len(results), 2, squeeze=False), results.items(), strict=True):
        for axes, when in zip(row, ("before", "after"), strict=True):
            weight = group[0].history.trace[when]["filters"]
            tiles = F.pad(weight, (1, 0, 1, 0), value=math.nan)
            tiles = tiles.view(4, 8, 4, 4).transpose(1, 2).reshape(16, 32)
            limit = weight.abs().max().item() or 1
            axes.imshow(tiles.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
            axes.set_title(f"{name}, {when}: {distinct_units(weight)} distinct of 32", fontsize=10)
            axes.axis("off")
    figure.supxlabel("violet: positive, orange: negative, white: zero; each panel has its own scale", fontsize=9)
    return figure


def check_findings(results):
    accuracy = {name: common.test_accuracies(group) for name, group in results.items()}
    chance = math.log(10)
    zero = results["zero"]
    predicted = [len(result.test_logits.argmax(1).unique()) for result in zero]
    loss = max(result.history.rows[-1]["train_loss"] for result in zero)
    start = max(result.history.step_losses[0] for result in results["control"])
    single, dropout = max(accuracy["constant, no dropout"]), min(accuracy["constant"])
    claims = [
        (f"zero predicts one digit everywhere, {max(accuracy['zero']):.2f} %", max(predicted) == 1),
        (f"its loss stays at {loss:.4f}, ln 10 = {chance:.4f}", abs(loss - chance) < 0.01),
        (f"where the control's starts: {start:.4f}", abs(start - chance) < 0.1),
        (f"the constant, no dropout, reaches {single:.2f} %, below 30", single < 30),
        (f"with dropout it reaches {dropout:.2f} %, over 80", dropout > 80),
    ]
    for name in ("control", "He", "constant + noise, no dropout"):
        claims.append((f"{name} reaches {min(accuracy[name]):.2f} %, over 95", min(accuracy[name]) > 95))
    check_claims(claims + health_claims(EXPECTED_ALARMS, results))


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)

    title = common.summarize(results)
    if len(results) == len(RUNS):
        names = "constant, no dropout", "constant + noise, no dropout"
        equal, noise = (common.format_accuracy(common.test_accuracies(results[name])) for name in names)
        title = f"Units that start equal stay equal: {equal} without dropout; noise fixes it: {noise}"
    plots = {"curves": (title, common.plot_curves, results)}
    shown = {name: results[name] for name in ("He", "constant", "constant, no dropout") if name in results}
    if shown:
        title = "Filters of the first layer: with a constant they stay identical, with dropout or without"
        plots["filters"] = title, plot_filters, shown
    common.report(results, args, data, plots)
    print_symmetry(results)
    if args.is_default and data.name == "MNIST":
        check_findings(results)


if __name__ == "__main__":
    main()
