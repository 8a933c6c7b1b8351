"""Q3, tuning AdvancedComboCNN: what learning rate, optimizer, dropout, batch size and
initialisation do to it, and which configuration is the best.

Expect  the learning rate matters most, and each optimizer has its own best one; dropout,
        0.5 in the published configuration, costs this small network accuracy.
Why     Short trainings try one factor at a time around the published configuration: the
        scientific one. For optimizer and batch size the learning rate is a nuisance
        factor, tuned for each value: at one common rate the comparison would say more
        of the rate than of them. All else is fixed. The few best are trained again,
        longer, with several seeds, and as the choice will be: with augmentation and a
        rate that rises and falls (one-cycle). Validation alone chooses.
Run     python q3_tuning.py              less than a quarter of an hour on two CPU cores
        python q3_tuning.py --resume     goes on where a stopped sweep was
        python q3_tuning.py --seeds 5 --epochs 20     as recorded, in half an hour
        torchrun --nnodes=2 --nproc-per-node=8 ... q3_tuning.py     see README
"""

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import zlib
from collections import Counter, deque
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributed import PrefixStore, TCPStore, is_torchelastic_launched
from torch.distributed.rendezvous import rendezvous
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import common

PUBLISHED = {
    "optimizer": "Adam",
    "lr": 1e-3,
    "batch_size": 64,
    "dropout": 0.5,
    "init": "He",
}
RATES = {  # each optimizer has a range of its own
    "Adam": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "SGD": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1e0],
    "RMSprop": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
}
FACTORS = {  # the values to try and, for each, how many times the base's learning rate
    "dropout": ([0.0, 0.25, 0.5, 0.75], [1]),
    "batch_size": ([32, 64, 128, 256], [3, 10, 30]),
    "init": (["default", "Xavier", "He", "small normal"], [1]),
}
WORDS = {  # the factors, in the field's words
    "lr": "learning rate",
    "optimizer": "optimizer",
    "dropout": "dropout",
    "batch_size": "batch size",
    "init": "initialisation",
}
OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}
INITS = {  # of the convolutions
    "default": nn.Conv2d.reset_parameters,
    "Xavier": lambda layer: nn.init.xavier_normal_(layer.weight),
    "He": lambda layer: nn.init.kaiming_normal_(layer.weight, a=0.01),
    "small normal": lambda layer: nn.init.normal_(layer.weight, std=0.01),
}
STUDY = {"images": 6_000, "epochs": 3}  # 33 configurations, with the first two seeds
FINALISTS = {"images": 12_000, "epochs": 4}  # with all seeds
BEST = 2  # configurations of the study that become finalists
SGD = {"optimizer": "SGD", "lr": 0.01}  # "reaches about 99 %, but needs more epochs"
LONGEST = 6  # epochs of the comparison of that with Adam
GOALS = 98, 98.5, 99  # validation accuracies whose first epoch is compared
RECIPE = {"epochs": 3, "batch_size": 64, "lr": 1e-3, "seeds": 3}
AUGMENT = partial(common.random_affine, degrees=(10,), shift=2, scale=0.1)


def train(config, digits, options):
    """A trial: (model, history) of a configuration, which says all there is to it."""
    torch.manual_seed(config["seed"])
    model = common.advanced_combo_cnn(dropout=config["dropout"])
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            INITS[config["init"]](layer)
    model.to(options.device, memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[config["optimizer"]](model.parameters(), lr=config["lr"])
    scheduler = augment = None
    if config["improved"]:
        batches = math.ceil(len(digits.train.labels) / config["batch_size"])
        steps = batches * config["epochs"]
        # Its cycle of the momentum would give RMSprop one that the study did not.
        scheduler = OneCycleLR(optimizer, config["lr"], steps, cycle_momentum=False)
        augment = AUGMENT
    history = common.fit(
        model,
        digits.train,
        digits.val,
        optimizer,
        epochs=config["epochs"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        scheduler=scheduler,
        augment=augment,
        precision=options.precision,
    )
    return model, history


# -------------------------------------------------------------------------------------
# Trials: run here, in worker processes or by torchrun's ranks; each recorded in a file
# -------------------------------------------------------------------------------------
def run_trial(config, digits, options):
    """The result of a trial: its history, the seconds it took with all its evaluations
    and, if the test split is to be read, its scores."""
    started = time.perf_counter()
    digits = digits._replace(train=common.first(digits.train, config["images"]))
    try:
        model, history = train(config, digits, options)
    except RuntimeError as error:  # out of memory, say
        return {"error": str(error).partition("\n")[0]}
    result = {"history": asdict(history) | {"step_losses": []}}
    if config["test"]:
        result["scores"] = common.conclude(model, history, history.seed, digits).scores
    return result | {"seconds": time.perf_counter() - started}


def setting_of(digits, options):
    """What results depend on beside the configuration: other data, other results."""
    checksum = 0
    for tensor in itertools.chain(*digits[:3]):
        checksum = zlib.crc32(tensor.cpu().contiguous().numpy(), checksum)
    device, threads = options.device.type, torch.get_num_threads()
    return {
        "data": checksum,
        "device": device,
        "threads": threads,
        "precision": options.precision,
    }


def work(address, name, options):
    """A worker: train what the store holds for `name`, one after the other, until there
    is a None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    torch.set_num_threads(1)
    digits, store = common.load_digits(options), join(address)
    if json.loads(store.get("setting")) != setting_of(digits, options):
        sys.exit(f"{name} has other data, another device or precision than the first")
    if parent := multiprocessing.parent_process():  # a rank has none
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    with open(os.devnull, "w") as nowhere:  # for bars and logs of the trainings
        sys.stdout = sys.stderr = nowhere
        for number in itertools.count():
            key = f"{name}, task {number}"
            while not store.check([key]):
                time.sleep(0.02)
            if (config := json.loads(store.get(key))) is None:
                return
            result = json.dumps(run_trial(config, digits, options))
            store.set(f"{name}, result {number}", result)


def end_with(parent):
    """End this process when its parent does, even if that was killed."""
    parent.join()
    os._exit(1)


def join(address):
    """The store at (host, port, prefix)."""
    host, port, prefix = address
    return PrefixStore(prefix, TCPStore(host, port))


def torchrun_address():
    """That of the store for torchrun's ranks, with the number of their start."""
    names = "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"
    host, port, restarts = (os.environ[name] for name in names)
    return host, int(port), f"q3_tuning {restarts}"


class Crew:
    """The workers: processes of this machine and, under torchrun, the other ranks.

    Each has keys of its own in torch.distributed's store, from which it draws what to
    train and where it leaves the results: so it is known what a worker that died was at.
    """

    def __init__(self, digits, options, setting):
        self.digits, self.options, self.processes = digits, options, {}
        self.tasks, self.names = {}, itertools.count()  # tasks given, by worker
        if is_torchelastic_launched():
            self.server = next(rendezvous("env://"))[0]  # torchrun's own, as a rule
            self.address = torchrun_address()
            ranks = range(1, int(os.environ["WORLD_SIZE"]))
            self.tasks = {f"rank {rank}": 0 for rank in ranks}
        elif options.workers:
            self.server = TCPStore(
                "localhost", 0, is_master=True, wait_for_workers=False
            )
            self.address = "localhost", self.server.port, "q3_tuning"
        if options.workers:
            self.store = join(self.address)
            self.store.set("setting", json.dumps(setting))

    def start(self):
        """Start a process as a worker."""
        name = f"worker {next(self.names)}"
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(self.address, name, self.options), daemon=True
        )
        process.start()
        self.processes[name], self.tasks[name] = process, 0

    def give(self, name, config):
        self.store.set(f"{name}, task {self.tasks[name]}", json.dumps(config))
        self.tasks[name] += 1

    def run(self, configs):
        """Yield (index, result) of each trial as it ends; of one that failed twice, the
        result is {"error": what happened}."""
        if not self.options.workers:
            for i, config in enumerate(configs):
                yield i, run_trial(config, self.digits, self.options)
            return
        waiting, busy, tries = deque(range(len(configs))), {}, Counter()
        while waiting or busy:
            wanted = min(self.options.workers, len(waiting) + len(busy))
            while len(self.processes) < wanted:
                self.start()
            for name in self.tasks.keys() - busy.keys():
                if waiting:
                    busy[name] = waiting.popleft()
                    tries[busy[name]] += 1
                    self.give(name, configs[busy[name]])
            time.sleep(0.02)
            for name, i in list(busy.items()):
                key = f"{name}, result {self.tasks[name] - 1}"
                process = self.processes.get(name)
                if self.store.check([key]):
                    result = json.loads(self.store.get(key))
                elif process and process.exitcode is not None:
                    result = {"error": f"a worker died, exit code {process.exitcode}"}
                    del self.processes[name], self.tasks[name]
                else:
                    continue
                del busy[name]
                if "error" in result and tries[i] == 1:
                    waiting.append(i)
                else:
                    yield i, result

    def stop(self):
        for name in self.tasks:
            with contextlib.suppress(RuntimeError):  # torchrun's store may be gone
                self.give(name, None)
        for process in self.processes.values():
            process.join(2)
            process.terminate()


class Sweep:
    """Trials, and the files that they are recorded in: <stem>_trials/<digest>.json."""

    def __init__(self, digits, options):
        self.folder = Path(f"{options.stem}_trials")
        if options.resume and not self.folder.exists():
            sys.exit(f"cannot resume: there is no {self.folder}; run without --resume")
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            sys.exit(f"cannot write {self.folder}: {error.strerror}")
        if not options.resume:
            for path in self.folder.glob("*.json"):
                if recorded(path):  # an older sweep's; what is not ours is not touched
                    path.unlink()
        self.most, self.started = len(digits.train.labels), time.perf_counter()
        self.setting, self.trained = setting_of(digits, options), 0.0
        self.crew = Crew(digits, options, self.setting)
        self.bar = tqdm(total=0, unit="image", unit_scale=True, disable=None)

    def images(self, config):
        """How many images a trial passes over, which is what the bar counts."""
        return min(config["images"], self.most) * config["epochs"]

    def expect(self, trials, config):
        """Announce so many trials more (or, if negative, less) to the bar."""
        self.bar.total += trials * self.images(config)
        self.bar.refresh()

    def run(self, configs, seeds):
        """{name: the results of its seeds} of configurations by name; without those
        that failed, of which a line is printed."""
        trials = [
            (name, config | {"seed": seed})
            for name, config in configs.items()
            for seed in seeds
        ]
        tasks = [{"config": config, "setting": self.setting} for _, config in trials]
        paths = [self.folder / f"{digest(task)}.json" for task in tasks]
        results = [recorded(path) for path in paths]
        for path, result, (_, config) in zip(paths, results, trials, strict=True):
            if path.exists() and not result:
                sys.exit(f"{path} is no trial of this sweep; give another --out-dir")
            if result:
                self.expect(-1, config)
        missing = [i for i, result in enumerate(results) if not result]
        for k, result in self.crew.run([trials[i][1] for i in missing]):
            i = missing[k]
            name, config = trials[i]
            if "error" in result:
                outcome = f"FAILED: {result['error']}"
            else:
                results[i] = result
                trial = json.dumps(tasks[i] | {"result": result})
                common.write_file(paths[i], trial.encode())
                self.trained += result["seconds"]
                outcome = f"validation accuracy {val_accuracy(result):.2f} %"
                outcome += ", DIVERGED" * result["history"]["diverged"]
            self.bar.update(self.images(config))
            tqdm.write(f"{name}, seed {config['seed']}: {outcome}")
        found = {}
        for (name, _), result in zip(trials, results, strict=True):
            if result:
                found.setdefault(name, []).append(result)
        return found

    def print_times(self):
        seconds, workers = time.perf_counter() - self.started, len(self.crew.tasks) or 1
        overhead = 100 * (1 - self.trained / (workers * seconds))
        print(
            f"\n{self.trained:.0f} s of trials by {workers} workers in {seconds:.0f} s: "
            f"{overhead:.1f} % of their time went elsewhere"
        )

    def stop(self):
        self.bar.close()
        self.crew.stop()


def digest(task):
    """The name of a trial's file, by its configuration and setting."""
    text = json.dumps({key: task[key] for key in ("config", "setting")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded(path):
    """The result in a file, if it is a trial's and bears the digest of its task."""
    try:
        trial = json.loads(path.read_text())
        return trial["result"] if digest(trial) == path.stem else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -------------------------------------------------------------------------------------
# The study: what is tried, what is chosen
# -------------------------------------------------------------------------------------
def name_of(config):
    """What a configuration changes about the published one."""
    optimizer, lr = config["optimizer"], config["lr"]
    changed = {key for key in PUBLISHED if config[key] != PUBLISHED[key]}
    parts = [f"{optimizer} {lr:g}"] if changed & {"optimizer", "lr"} else []
    words = {"batch_size": "batch {}", "dropout": "dropout {:g}", "init": "{} init"}
    parts += [text.format(config[key]) for key, text in words.items() if key in changed]
    return ", ".join(parts) or "published"


def arms(factor, base):
    """{value of the factor: the configurations that try it}: one, or one for each
    learning rate where that is a nuisance factor."""
    if factor == "lr":
        return {lr: [base | {"lr": lr}] for lr in RATES[base["optimizer"]]}
    if factor == "optimizer":
        return {
            name: [base | {"optimizer": name, "lr": lr} for lr in rates]
            for name, rates in RATES.items()
        }
    values, times = FACTORS[factor]
    return {
        value: [base | {factor: value, "lr": base["lr"] * k} for k in times]
        for value in values
    }


def val_accuracy(result):
    """Validation accuracy of the epoch whose weights were kept."""
    history = result["history"]
    return history["rows"][history["best_epoch"] - 1]["val_accuracy"]


def mean_val(results):
    return statistics.fmean(map(val_accuracy, results))


def ranked(found):
    """The same, the best mean validation accuracy first."""
    order = sorted(found, key=lambda name: mean_val(found[name]), reverse=True)
    return {name: found[name] for name in order}


def by_name(configs):
    return {name_of(config): config for config in configs}


def best_of(configs, found):
    """Of configurations the one that validates best, on average over its seeds."""
    tried = [config for config in configs if name_of(config) in found]
    return max(tried, key=lambda config: mean_val(found[name_of(config)]))


def best_arms(base, found):
    """{factor: {value: its best configuration}}, without values whose trials failed."""
    return {
        factor: {
            value: best_of(configs, found)
            for value, configs in arms(factor, base).items()
            if any(name_of(config) in found for config in configs)
        }
        for factor in WORDS
    }


def combinations(base, found):
    """For each optimizer, at its best learning rate, the best values of all other
    factors, which were each found with all else as in `base`."""
    arms = best_arms(base, found)
    best = {factor: best_of(arms[factor].values(), found)[factor] for factor in FACTORS}
    found_for = arms["optimizer"]
    if base["optimizer"] in found_for:  # whose rates were tried with each batch size
        found_for[base["optimizer"]] = arms["batch_size"][best["batch_size"]]
    return [
        best | {"optimizer": name, "lr": config["lr"]}
        for name, config in found_for.items()
    ]


def noise(first, second):
    """Two standard errors of the difference between the means of two lists of results;
    infinite for single seeds."""
    if min(len(first), len(second)) < 2:
        return math.inf
    parts = (
        statistics.variance(map(val_accuracy, r)) / len(r) for r in (first, second)
    )
    return 2 * math.sqrt(sum(parts))


def verdict(again, base):
    """Whether the best finalist is better than the published one, in a sentence."""
    (chosen, results), published = next(iter(again.items())), again.get(name_of(base))
    if not published or chosen == name_of(base):
        return f"of the finalists {chosen} is the best"
    gain, limit = mean_val(results) - mean_val(published), noise(results, published)
    if gain > limit:
        return f"{chosen} is {gain:.2f} points better than {name_of(base)}"
    return f"no finalist is better than {name_of(base)} by more than the seeds' noise"


def edge(factor, config):
    """A warning if a configuration's value lies on the edge of what was tried."""
    ranges = {factor: FACTORS[factor][0]} if factor in FACTORS else {}
    if factor in ("lr", "optimizer"):
        ranges = {"lr": RATES[config["optimizer"]]}
    for key, values in ranges.items():
        if key != "init" and config[key] in (values[0], values[-1]):
            return f"   {WORDS[key]} {config[key]:g} is on the edge of its range"
    return ""


def print_factors(base, found):
    """Print what the values of each factor read, which is best, and what ties with it."""
    deviations = [
        statistics.stdev(map(val_accuracy, results))
        for results in found.values()
        if len(results) > 1
    ]
    # Two seeds say little of one configuration's noise; those of all, a good deal. This
    # is two standard errors of the difference between two means of two seeds.
    tie = 2 * statistics.median(deviations) if deviations else math.inf
    for factor, best in best_arms(base, found).items():
        means = {value: mean_val(found[name_of(c)]) for value, c in best.items()}
        top = max(means, key=means.get)
        tuned = len(arms(factor, base)[top]) > 1
        role = "learning rate nuisance, the rest fixed" if tuned else "the rest fixed"
        print(f"\n{WORDS[factor]}: scientific, {role}")
        for value, mean in means.items():
            line = (
                f"  {value}" + f" at {best[value]['lr']:g}" * tuned + f": {mean:.2f} %"
            )
            if value == top:
                line += "   best" + edge(factor, best[value])
            elif means[top] - mean < tie:
                line += "   tie"
            print(line)
    print(f"\ntie: less than the seeds' noise, {tie:.2f} points, below the best")


# -------------------------------------------------------------------------------------
# Pictures
# -------------------------------------------------------------------------------------
def plot_factors(base, found, digits, options):
    """A panel for each factor: what its values validate at, each at its best learning
    rate where that is a nuisance; points for seeds, crosses for those that diverged."""
    figure, spreads = Figure(figsize=(15, 5), layout="constrained"), {}
    row = figure.subplots(1, len(WORDS), sharey=True)
    for axes, (factor, best) in zip(row, best_arms(base, found).items(), strict=True):
        means = []
        for x, config in enumerate(best.values()):
            results = found[name_of(config)]
            for result in results:
                bad = result["history"]["diverged"]
                look = {"marker": "X" if bad else "o", "color": common.COLORS[bad]}
                y = common.error_of(val_accuracy(result))
                axes.plot(x, y, fillstyle="none", **look)
            means.append(mean_val(results))
        axes.plot([common.error_of(mean) for mean in means], color="0.7", zorder=0)
        tuned = any(len(configs) > 1 for configs in arms(factor, base).values())
        ticks = [f"{v}" + f"\nat {c['lr']:g}" * tuned for v, c in best.items()]
        axes.set_xticks(range(len(best)), ticks, rotation=45 if factor == "lr" else 0)
        axes.set_xlabel(WORDS[factor] + " (at its best rate)" * tuned)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        spreads[factor] = max(means) - min(means)
    common.accuracy_axis(row[0])
    row[0].set_ylabel("validation accuracy (%)")
    ranked = sorted(spreads, key=spreads.get, reverse=True)
    most, least = (
        f"{WORDS[f]} ({spreads[f]:.1f} points)" for f in (ranked[0], ranked[-1])
    )
    title = f"Over its range, {most} matters most, {least} least"
    common.save_figure(figure, "factors", title, digits, options)


def plot_rates(base, found, digits, options):
    """Validation accuracy by learning rate, a line for each optimizer."""
    lines, best = {}, []
    for name, configs in arms("optimizer", base).items():
        lines[name] = [
            {"lr": config["lr"], "accuracy": val_accuracy(result)}
            for config in configs
            for result in found.get(name_of(config), ())
        ]
    for name, config in best_arms(base, found)["optimizer"].items():
        best.append(f"{name} {config['lr']:g}")
    lines = {name: rows for name, rows in lines.items() if rows}
    title = f"Each optimizer has a rate of its own: {', '.join(best)}"
    common.plot_sweep(lines, "lr", "learning rate", title, digits, options, "rates")


def plot_finalists(ranked, title, digits, options):
    """Finalists by validation accuracy, the best on top: seeds, mean and deviation."""
    figure = Figure(figsize=(9, 1.5 + 0.6 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    for y, (name, results) in enumerate(ranked.items()):
        accuracies = [val_accuracy(result) for result in results]
        mean, std = common.mean_std(accuracies)
        x, seeds = common.error_of(mean), list(map(common.error_of, accuracies))
        axes.errorbar(x, y, xerr=std, capsize=4, marker="o", color=common.COLORS[0])
        axes.plot(seeds, [y] * len(seeds), "|", color=common.COLORS[1])
        place = {"textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{mean:.2f}", (x, y), (0, 8), **place)
    common.accuracy_axis(axes, "x")
    axes.set_yticks(range(len(ranked)), list(ranked))
    axes.set_ylim(len(ranked) - 0.5, -0.6)
    axes.set_xlabel("validation accuracy (%): mean, standard deviation, and the seeds")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    common.save_figure(figure, "finalists", title, digits, options)


# -------------------------------------------------------------------------------------
# The whole study
# -------------------------------------------------------------------------------------
def first_epochs(results, goal):
    """When validation first read `goal` percent, in words: the seeds' mean epoch."""
    firsts = []
    for result in results:
        rows = result["history"]["rows"]
        firsts += [r["epoch"] for r in rows if r["val_accuracy"] >= goal][:1]
    if len(firsts) < len(results):
        return f"{goal} % by {len(firsts)} of {len(results)} seeds"
    return f"{goal} % in epoch {statistics.fmean(firsts):.1f}"


def runs_of(results):
    """The results of a configuration as `common.Run`s, for its report and curves."""
    model = common.advanced_combo_cnn()
    histories = [common.History(**result["history"]) for result in results]
    scores = [result["scores"] for result in results]
    return [
        common.Run(model, h, s, None) for h, s in zip(histories, scores, strict=True)
    ]


def study(sweep, digits, options):
    """Try, choose, train the choice, and report."""
    base = PUBLISHED | {"lr": options.lr, "batch_size": options.batch_size}
    tried = by_name(
        config
        for factor in WORDS
        for configs in arms(factor, base).values()
        for config in configs
    )
    seeds, short = options.seeds, STUDY | {"improved": False, "test": False}
    longer = FINALISTS | {"improved": True, "test": True}  # as the choice will be
    final = longer | {"images": len(digits.train.labels), "epochs": options.epochs}
    compared = final | {"improved": False, "epochs": min(options.epochs, LONGEST)}
    sweep.expect(len(tried) * len(seeds[:2]), short)
    most = 2 + len(RATES) + BEST  # finalists
    sweep.expect(most * len(seeds), longer)
    sweep.expect(len(seeds), final)
    sweep.expect(2 * len(seeds), compared)

    found = sweep.run({name: c | short for name, c in tried.items()}, seeds[:2])
    if not all(best_arms(base, found).values()):
        sys.exit("all trials of a factor failed: see above")
    rows = [
        tried[name]
        | {"seed": result["history"]["seed"], "val_accuracy": val_accuracy(result)}
        | {"diverged": result["history"]["diverged"]}
        for name, results in found.items()
        for result in results
    ]
    common.write_csv(f"{options.stem}_study.csv", rows)
    print_factors(base, found)
    plot_factors(base, found, digits, options)
    plot_rates(base, found, digits, options)

    best = [tried[name] for name in ranked(found)][:BEST]
    finalists = by_name([base, base | SGD, *combinations(base, found), *best])
    sweep.expect((len(finalists) - most) * len(seeds), longer)
    again = sweep.run({name: c | longer for name, c in finalists.items()}, seeds)
    if not again:
        sys.exit("all finalists failed: see above")
    again = ranked(again)
    chosen, results = next(iter(again.items()))
    print("\nfinalists by validation accuracy")
    for name, others in again.items():
        mean, std = common.mean_std([val_accuracy(result) for result in others])
        spread = "" if std is None else f" ± {std:.2f}"
        tie = mean_val(results) - mean < noise(results, others) and name != chosen
        print(f"  {name}: {mean:.2f}{spread} %" + "   tie with the best" * tie)
    answer = verdict(again, base)
    plot_finalists(again, answer, digits, options)

    last = {f"{chosen}, final": finalists[chosen] | final}
    for config in (base, base | SGD):
        last[f"{name_of(config)}, constant rate"] = config | compared
    last = sweep.run(last, seeds)
    runs = {name: runs_of(results) for name, results in (again | last).items()}
    curves = common.histories_of({name: runs[name] for name in again})
    title = f"{FINALISTS['images']:,} images: {answer}"
    common.plot_curves(curves, title, digits, options)
    if last:
        short = {f"{chosen}, final": "the choice"}
        ends = [
            f"{short.get(k, k)} {mean_val(results):.2f} %"
            for k, results in last.items()
        ]
        curves = common.histories_of({name: runs[name] for name in last})
        title = f"All images, validation: {'; '.join(ends)}"
        common.plot_curves(curves, title, digits, options, "final")
    print()
    common.report(runs, digits, options, broken=runs)

    print("\npublished: Adam, 0.001, batch 64, dropout 0.5, He are the best")
    print(f"  {answer}")
    print("published: SGD reaches about 99 %, but needs more epochs than Adam")
    for name, results in list(last.items())[-2:]:
        firsts = ", ".join(first_epochs(results, goal) for goal in GOALS)
        print(f"  {name}: {firsts}; ends at {mean_val(results):.2f} % (validation)")
    print("published: more than 98 % for the best model")
    for name in last:
        scores = [run.scores for run in runs[name]]
        print(f"  {name}: {common.describe(scores)} (test)")


def main(argv=None):
    def more(parser):
        text = "processes that train, 0 for this one alone (one for each core)"
        parser.add_argument("--workers", type=common.whole(0), metavar="N", help=text)

    options = common.parse_options(__file__, __doc__, argv, recipe=RECIPE, more=more)
    if is_torchelastic_launched():
        options.workers = 1  # beside the other ranks, which are workers themselves
        options.resume |= os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    elif options.workers is None:
        # Side by side is faster on a CPU (tests/benchmark.py), and not tried elsewhere.
        options.workers = torch.get_num_threads() if options.device.type == "cpu" else 0
    if options.workers:
        torch.set_num_threads(1)
    rank = os.environ["RANK"] if is_torchelastic_launched() else "0"
    if rank != "0":
        work(torchrun_address(), f"rank {rank}", options)
        return
    digits = common.load_digits(options)
    options.data = "mnist" if digits.source == "MNIST" else "synthetic"  # for workers
    sweep = Sweep(digits, options)
    try:
        study(sweep, digits, options)
        sweep.print_times()
    except KeyboardInterrupt:
        print("interrupted; --resume goes on after the trials that are finished")
        sys.exit(130)
    finally:
        sweep.stop()


if __name__ == "__main__":
    main()
