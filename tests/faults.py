"""Kills scripts at random moments or fills their disk, resumes them, and compares with an undisturbed run.

    python tests/faults.py FAULT N SCRIPT OPTIONS ...

runs a script whose N-th write goes wrong: FAULT is "killed" (in the middle of it), "full" (from there on the disk is
full) or "none". Prints how many files were written.
"""

import errno
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, assert_identical, start_script

import common

SCRIPTS = {  # one of each kind, made short
    "q1_baseline.py": "--epochs 2 --limit 200 --seeds 2",
    "q2_variants/variant4_under_25k.py": "--epochs 2 --limit 200",
    "q3_tuning.py": "--epochs 1 --limit 60",
    "q4_break/fail_bad_init.py": "--epochs 2 --limit 200",
}
FAULTS = "killed in a write", "disk full", "first process killed", "worker killed"


def run_with_fault(fault, number, script, *options):
    """Run a script in this process; its `number`-th write suffers the fault."""
    written, write_bytes = 0, Path.write_bytes

    def write_and_count(path, content):
        nonlocal written
        written += 1
        if fault == "killed" and written == int(number):
            write_bytes(path, content[: len(content) // 2])
            signal.raise_signal(signal.SIGKILL)
        if fault == "full" and written >= int(number):
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    Path.write_bytes = write_and_count
    sys.argv = [script, *options]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    print("files written:", written)


def run(script, options, fault="none", number=0):
    """A script with one worker, in a process of its own: the finished process."""
    command = [sys.executable, __file__, fault, str(number), script, "--workers", "1", *options.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def children_of(pid):
    """(number, command line) of the processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [(child, Path(f"/proc/{child}/cmdline").read_text()) for child in children]


def workers_of(process):
    """The numbers of the worker processes of a script, which a server of its own has started."""
    servers = [pid for pid, command in children_of(process.pid) if "forkserver" in command]
    return [pid for server in servers for pid, _ in children_of(server)]


def assert_complete(folder):
    """No file is half-written."""
    for path in folder.rglob("[!.]*.*"):
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        if path.suffix == ".png":
            assert content.endswith(b"IEND\xaeB`\x82"), path
        if path.suffix == ".csv":
            assert content.endswith(b"\n"), path
        if path.suffix == ".pt":
            assert b"PK\x05\x06" in content[-100:], path  # the end of a zip file


def disturb(script, options, fault, writes, epochs, generator, folder):
    """Run a script, which undisturbed writes `writes` files and trains `epochs`, with a fault at a random moment."""
    number = generator.randint(1, writes)
    if fault == "killed in a write":
        assert run(script, options, "killed", number).returncode == -signal.SIGKILL
    elif fault == "disk full":
        done = run(script, options, "full", number)
        assert done.returncode == 1 and done.stderr.startswith("cannot write") and done.stderr.count("\n") == 1
    else:
        with start_script(script, f"{options} --workers 2", cwd=folder) as process:
            lines = (line for line in process.stdout if ": epoch " in line)
            for _ in range(generator.randint(1, epochs - 2)):
                next(lines)
            time.sleep(generator.uniform(0, 0.1))
            victim = process.pid if fault == "first process killed" else generator.choice(workers_of(process))
            os.kill(victim, signal.SIGKILL)
            err = process.communicate()[1]
        assert process.returncode == (1 if fault == "worker killed" else -signal.SIGKILL), err
        time.sleep(0.5)  # the workers notice that the first process has ended
    for path in folder.rglob(f".*{common.PARTIAL}"):
        os.utime(path, (0, 0))  # as if it were left long ago: younger ones could be another start's


def inflict(count, data_dir, folder, seed=0):
    """Inflict `count` faults: {fault: [tries, losses]}, and a line for each loss."""
    generator = random.Random(seed)
    undisturbed, found, lines = {}, {}, []
    for i in range(count):
        fault = FAULTS[i % len(FAULTS)]
        script = list(SCRIPTS)[i // len(FAULTS) % len(SCRIPTS)]
        reference = folder / Path(script).stem
        disturbed = folder / str(i)
        options = f"{SCRIPTS[script]} --threads 1 --precision fp32 --data-dir {data_dir} --out-dir"
        if script not in undisturbed:
            out = run(script, f"{options} {reference}").stdout
            undisturbed[script] = int(out.split()[-1]), out.count(": epoch ")
        disturbed.mkdir()
        found.setdefault(fault, [0, 0])[0] += 1
        try:
            disturb(script, f"{options} {disturbed}", fault, *undisturbed[script], generator, disturbed)
            assert_complete(disturbed)
            done = run(script, f"{options} {disturbed} --resume")
            assert done.returncode == 0, done.stderr
            assert_identical(reference, disturbed, reference.name)
            assert not list(disturbed.rglob(".*"))  # no temporary file is left
        except AssertionError as error:
            found[fault][1] += 1
            lines.append(f"{i}: {script}, {fault}: {error}")
    return found, lines


if __name__ == "__main__":
    run_with_fault(*sys.argv[1:])
