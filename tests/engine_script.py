"""A script like the others, for the tests of the engine: small trainings, some of which get into trouble.

What stands outside the guard also happens in worker processes, which import this file again.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import common

RUNS = {name: {"epochs": 3, "batch_size": 64, "lr": 1e-3, "width": width} for width, name in enumerate("abcd", 4)}


def train(config, data, seed, **settings):
    """The environment variable TROUBLE names a run and what happens to it at the end of an epoch: "b die" (SIGKILL),
    "b die once", "b raise", "b interrupt" (Ctrl-C), "b wait" (for ever); ATTEMPTS is a file with a line per training.
    """
    run = settings["fingerprint"]["run"]
    if attempts := os.environ.get("ATTEMPTS"):
        with open(attempts, "a") as file:
            print(run, seed, file=file)
    who, _, trouble = os.environ.get("TROUBLE", "").partition(" ")
    progress = settings.pop("progress")

    def troubled(images, line=""):
        progress(images, line)
        if line and run == who:
            if trouble == "raise":
                raise RuntimeError("no memory left\nat all")
            if trouble == "wait":
                time.sleep(1000)
            if trouble == "interrupt":
                raise KeyboardInterrupt
            if trouble == "die" or (trouble == "die once" and Path(attempts).read_text().count(f"{run} {seed}\n") == 1):
                os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(seed)
    width = config["width"]
    model = nn.Sequential(nn.Conv2d(1, width, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144 * width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    assert data.test is None  # what trains must not see it
    return model, common.fit(model, data, optimizer, config, seed=seed, progress=troubled, **settings)


def main(argv=None):
    if os.environ.get("EARLY") == os.environ.get("RANK", "none") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(2)  # the others wait for this rank by now
        os._exit(1)
    args = common.parse_args(__file__, __doc__, RUNS, argv)
    data = common.load_data(args)
    results = common.run_all(train, args, data)
    common.report(results, args, data, {"curves": ("Accuracy", common.plot_curves, results)})


if __name__ == "__main__":
    main()
