"""q3_tuning.py with few factors and short trials, for the tests: run like the script.

What stands outside the guard also happens in its worker processes, which import this
file again. Each trial leaves a line in the file ATTEMPTS; a trial with the
initialisation DEADLY kills its process, one with ENDLESS does not end.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import q3_tuning

q3_tuning.RATES = {"Adam": [1e-3, 1e-2], "SGD": [1e-2], "RMSprop": [1e-3]}
q3_tuning.FACTORS = {
    "dropout": ([0.0, 0.5], [1]),
    "batch_size": ([32, 64], [1]),
    "init": (["Xavier", "He"], [1]),
}
q3_tuning.STUDY = {"images": 64, "epochs": 2}
q3_tuning.FINALISTS = {"images": 100, "epochs": 2}
real = q3_tuning.train


def train(config, digits, options):
    if attempts := os.environ.get("ATTEMPTS"):
        with open(attempts, "a") as file:
            print({k: v for k, v in config.items() if k != "test"}, file=file)
    if config["init"] == os.environ.get("DEADLY"):
        os._exit(3)
    if config["init"] == os.environ.get("ENDLESS"):
        time.sleep(1000)
    return real(config, digits, options)


q3_tuning.train = train

if __name__ == "__main__":
    q3_tuning.main()
