"""Q2, variant 7: 692 parameters reach 99.18 % test accuracy, 1,840 reach 99.43 %, 2,910 reach 99.51 %.

Expect  the above. Published were 99.03 % with 697 parameters, the best of some 700 runs on the test images, a mean of
        98.76 % with 997, one run of 99.10 % with 1,936, and one of 99.52 % with 3,762, whose epoch was chosen on test.
Why     One separable convolution is applied six times: each application costs a gain and biases of its own. The first
        layer makes only some of the channels, and the classifier reads only some. Digits are straightened first: a
        network need not learn slants. The trained network classifies nine views of each image, so that its validation
        accuracy rises once more at the end. With so few parameters an optimizer can know how all gradients
        vary together: 25 epochs reached the training loss for which Adam needed 60.
Tried   with 692 parameters, one seed; accuracy on 20,000 training images as they are, which it cannot memorise:
          one image, the mean of nine shifted ones              98.26 %, 98.74 %; straightened 98.62 %, 99.00 %
          straightened, nine shifts, or five and rotations and scales     99.00 %, 99.03 %
          15 channels of which 11 narrow (686 parameters)       98.84 % with nine shifts
          15 epochs, or 24                                      98.98 %, 99.20 %
        With 2,910 parameters 12 epochs reach 99.44 % in validation and 99.50 ± 0.05 % in test, 16 reach 99.55 and 99.51
        ± 0.03 %, five seeds each; 99.52 % is missed.
        With 950 parameters, judged by validation, and without gain: residual connections, LeakyReLU, GELU, convolutions
        that are not separable, dilation, unpadded ones, coordinates as inputs, a gain for each channel, grouped 1x1
        convolutions, a fixed first layer, distillation from the baseline (0.2 points worse after 8 epochs), stronger
        or elastic augmentation (0.1 to 0.2 points worse after 20).
Run     python q2_variants/variant7_smallest.py     nine minutes on two CPU cores
        python q2_variants/variant7_smallest.py --only "692 parameters"
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py lives one level up

import common

# narrow: the channels, of `channels`, that the first convolution makes and that the classifier reads.
# period, decay: of the optimizer below. The longest training comes first, so that two workers end together.
RUNS = {
    "2,910 parameters": {"channels": 43, "narrow": 20, "period": 200, "decay": 0.3, "epochs": 16},
    "692 parameters": {"channels": 16, "narrow": 9, "period": 50, "decay": 0.6, "epochs": 30},
    "1,840 parameters": {"channels": 32, "narrow": 16, "period": 100, "decay": 0.5, "epochs": 10},
}
RUNS = {name: {**config, "batch_size": 128, "lr": 0.03} for name, config in RUNS.items()}
# Parameters, test accuracy and how it was obtained: JoshWarn/Parameter-Efficient-MNIST, hexhowells/NeuralGolfing,
# ruslangrimov/mnist-minimal-model, and the networks of variants 4 and 5.
ON_TEST = "published, chosen on the test images"
PUBLISHED = [
    (575, 98.0, ON_TEST),
    (697, 99.03, ON_TEST),
    (997, 98.76, "published, mean of 223 runs"),
    (1_936, 99.10, "published, one run, last epoch"),
    (3_762, 99.52, ON_TEST),
    (6_560, 99.45, ON_TEST),
    (7_416, 99.39, ON_TEST),
    (24_488, 99.26, ON_TEST),
]

# The trained network classifies each image nine times: degrees, pixels right and down, scale.
VIEWS = [
    *[(0, 0, 0, 1), (0, 1, 0, 1), (0, -1, 0, 1), (0, 0, 1, 1), (0, 0, -1, 1)],
    *[(6, 0, 0, 1), (-6, 0, 0, 1), (0, 0, 0, 1.08), (0, 0, 0, 0.92)],
]


def straighten(ink):
    """Shear images (B, 1, 28, 28), 0 where there is no ink, so that digits stand upright: x and y of the ink no longer
    correlate. After LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition (deslanting)."""
    mass = ink / ink.sum((2, 3), keepdim=True).clamp(min=1e-6)
    x = torch.arange(28, device=ink.device) - 13.5
    y = x[:, None]
    center_x, center_y = ((mass * axis).sum((2, 3), keepdim=True) for axis in (x, y))
    covariance = (mass * (x - center_x) * (y - center_y)).sum((1, 2, 3))
    slant = covariance / (mass * (y - center_y).square()).sum((1, 2, 3)).clamp(min=1e-6)
    one, zero = torch.ones_like(slant), torch.zeros_like(slant)
    theta = torch.stack([one, slant, -slant * center_y.flatten() / 14, zero, one, zero], 1).view(-1, 2, 3)
    return F.grid_sample(ink, F.affine_grid(theta, ink.shape, align_corners=False), align_corners=False)


class SharedCNN(nn.Module):
    """One separable convolution (3x3 in each channel, then 1x1) applied six times, each time with biases and a gain of
    its own: (B, 1, 28, 28) -> logits (B, 10).

    Applying one separable layer several times is from ruslangrimov/mnist-minimal-model, group normalisation and SiLU
    after each from the recurrent filter of arXiv:2609.21032.
    """

    def __init__(self, channels, narrow):
        super().__init__()
        self.stem = nn.Conv2d(1, narrow, 3, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.ones(6, 1))
        self.bias = nn.Parameter(torch.zeros(6, channels))
        self.classifier = nn.Linear(narrow, 10)
        self.nine_views = False  # whether evaluation classifies nine views of each image

    def forward(self, images):
        ink = straighten(images + common.MEAN / common.STD)
        if not self.nine_views:
            return self.classify(ink)
        views = torch.tensor(VIEWS, device=ink.device)[:, None].expand(-1, len(ink), -1)
        return torch.stack([self.classify(common.affine(ink, v[:, 0], v[:, 1:3], v[:, 3])) for v in views]).mean(0)

    def classify(self, images):
        narrow, channels = self.stem.out_channels, self.pointwise.out_channels
        x = F.silu(F.max_pool2d(self.stem(images), 2))  # -> (B, narrow, 14, 14)
        x = F.pad(x, [0, 0, 0, 0, 0, channels - narrow])  # -> (B, channels, 14, 14), the others 0
        x = x.contiguous(memory_format=torch.channels_last)
        for step, (gain, bias) in enumerate(zip(self.gain, self.bias, strict=True)):
            if step == 3:
                x = F.max_pool2d(x, 2)  # -> (B, channels, 7, 7)
            x = self.pointwise(self.depthwise(x))
            x = F.silu(F.group_norm(x, 1, gain.expand(channels), bias))
        return self.classifier(x[:, -narrow:].mean((2, 3)))


class FullMatrixAdam(torch.optim.Optimizer):
    """Adam along the eigenvectors of the second moments of the gradient, of all parameters together; every `period`
    steps these are estimated again. Memory grows with the square of the number of parameters, time with its cube.

    After SOAP (Vyas et al. 2024, arXiv:2409.11321), which does so for each layer, with Kronecker factors. The first
    estimates contain Adam's second moments: without them the loss of one training in 15 rose in its second epoch.
    """

    def __init__(self, params, lr, period, decay, betas=(0.9, 0.999)):
        super().__init__(params, {"lr": lr, "period": period, "decay": decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        (beta1, beta2), period, decay = group["betas"], group["period"], group["decay"]
        gradient = torch.cat([p.grad.flatten() for p in group["params"]])
        state = self.state[group["params"][0]] or self.start(gradient)
        state["recent"][state["count"] % period] = gradient
        state["count"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        if state["count"] == period:
            state["moments"] = state["squares"].diag()  # so few gradients say nothing of most directions
        if state["count"] % period == 0:
            state["moments"].mul_(decay).addmm_(state["recent"].T, state["recent"], alpha=(1 - decay) / period)
            state["squares"], state["basis"] = torch.linalg.eigh(state["moments"])
            state["squares"].clamp_(min=0)
        projected, mean = torch.stack([gradient, state["mean"]]) @ state["basis"]
        state["squares"].lerp_(projected.square(), max(1 - beta2, 1 / state["count"]))
        mean /= 1 - beta1 ** state["count"]
        update = state["basis"] @ (mean / (state["squares"].sqrt() + 1e-8))
        for p, part in zip(group["params"], update.split([p.numel() for p in group["params"]]), strict=True):
            p.sub_(group["lr"] * part.view_as(p))

    def start(self, gradient):
        """The state before the first step: until the first estimate, Adam."""
        group = self.param_groups[0]
        size = len(gradient)
        self.state[group["params"][0]] = {
            "count": 0,
            "mean": torch.zeros_like(gradient),
            "squares": torch.zeros_like(gradient),
            "basis": torch.eye(size, device=gradient.device),
            "recent": gradient.new_zeros(group["period"], size),
        }
        return self.state[group["params"][0]]


def train(config, data, seed, **settings):
    torch.manual_seed(seed)
    model = SharedCNN(config["channels"], config["narrow"])
    model.to(data.train.labels.device, memory_format=torch.channels_last)
    optimizer = FullMatrixAdam(model.parameters(), config["lr"], config["period"], config["decay"])
    steps = config["epochs"] * data.steps(config["batch_size"])
    history = common.fit(
        model,
        data,
        optimizer,
        config,
        seed=seed,
        scheduler=OneCycleLR(optimizer, config["lr"], total_steps=steps, pct_start=0.15, cycle_momentum=False),
        augment=partial(common.random_affine, **common.ROTATE_AND_SHIFT),
        keep_last=True,  # the late epochs differ by less than the noise of 5,000 images
        **settings,
    )
    model.nine_views = True
    common.validate_again(model, data, history)
    return model, history


def recorded_results(largest):
    """Parameters, mean and standard deviation of the test accuracy of each network of Q1 and Q2 with up to `largest`
    parameters, with its best recipe; from the results files beside the scripts."""
    found = {}
    for path in [common.ROOT / "q1_baseline.json", *common.ROOT.glob("q2_variants/*.json")]:
        contents = json.loads(path.read_text(encoding="utf-8"))
        for run in contents["runs"].values():
            size, mean = run["parameters"], run["mean"]
            own = contents["script"].endswith(Path(__file__).name)
            if not own and contents["data"]["source"] == "MNIST" and size <= largest:
                found[size] = max(found.get(size, (0, 0)), (mean, run["std"] or 0))
    return [(size, *accuracy) for size, accuracy in sorted(found.items())]


def plot_frontier(results):
    """Test accuracy by number of parameters: these networks, this project's others, and published ones."""
    figure = common.new_figure(9, 6)
    axes = figure.subplots()
    ours = [(group[0].parameters, *common.mean_std(common.test_accuracies(group))) for group in results.values()]
    kinds = {
        "this script, mean and standard deviation": ours,
        "this project's other networks": recorded_results(30_000),
    }
    kinds = {kind: points for kind, points in kinds.items() if points}
    handles = []
    for i, (kind, points) in enumerate(kinds.items()):
        sizes, means, stds = zip(*points, strict=True)
        style = {"fmt": common.MARKERS[i], "color": common.COLORS[i], "capsize": 4, "label": kind}
        handles.append(axes.errorbar(sizes, means, [std or 0 for std in stds], **style))
    for i, kind in enumerate(dict.fromkeys(how for *_, how in PUBLISHED), 2):
        points = [(size, accuracy) for size, accuracy, how in PUBLISHED if how == kind]
        style = {"fillstyle": "none", "color": common.COLORS[i], "label": kind}
        handles += axes.plot(*zip(*points, strict=True), common.MARKERS[i], **style)
    for size, mean, std in ours:
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(f"{size:,}: {mean:.2f} %", (size, mean + (std or 0)), color=common.COLORS[0], **place)
    limits = min(97.9, *(mean for _, mean, _ in ours)), 99.65
    axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy (%)", xlim=(450, 35_000), ylim=limits)
    axes.set_xticks([500, 1_000, 2_000, 5_000, 10_000, 20_000], minor=False)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    common.accuracy_axis(axes)
    axes.grid(True)
    axes.legend(handles=handles, frameon=False, loc="lower right")
    return figure


def main(argv=None):
    args = common.parse_args(__file__, __doc__, RUNS, argv, precision="fp32")
    data = common.load_data(args)
    for config in args.runs.values():
        common.print_layers(SharedCNN(config["channels"], config["narrow"]))
    results = common.run_all(train, args, data)

    name, group = min(results.items(), key=lambda item: item[1][0].parameters)
    accuracy = common.format_accuracy(common.test_accuracies(group))
    title = f"{name} reach {accuracy} test accuracy, with one convolution that is applied six times"
    plots = {
        "curves": (common.summarize(results), common.plot_curves, results),
        "frontier": (title, plot_frontier, results),
    }
    common.report(results, args, data, plots)


if __name__ == "__main__":
    main()
