"""The scripts of Q4, as a user runs them, on data too small for their claims; and the check of claims itself."""

import argparse
import csv
import json

import pytest
from conftest import run_script

import common

SCRIPTS = {  # runs; plots
    "fail_high_lr": (
        ["control", "Adam 0.1", "Adam 0.1, BatchNorm", "SGD 1000", "SGD 1000, clipped"],
        {"curves", "steps", "sweep"},
    ),
    "fail_no_dropout": (
        [
            *("no dropout", "dropout 0.5", "no dropout, augmented"),
            *("all images, no dropout", "all images, dropout 0.5"),
        ],
        {"curves", "all", "gap"},
    ),
    "fail_bad_init": (
        [*("control", "He", "zero", "constant", "constant, no dropout"), "constant + noise, no dropout"],
        {"curves", "filters", "sweep"},
    ),
}


@pytest.mark.parametrize("stem", SCRIPTS)
def test_script_leaves_its_evidence(stem, mnist_folder, tmp_path):
    labels, plots = SCRIPTS[stem]
    arguments = f"--data-dir {mnist_folder} --out-dir out --epochs 1 --limit 200"
    code, out, err = run_script(f"q4_break/{stem}.py", arguments, cwd=tmp_path)
    assert code == 0, err
    assert "not checked: the claims are about the recipe" in out
    found = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert list(found["runs"]) == labels
    for run in found["runs"].values():
        assert set(run["seeds"][0]["health"]) <= set(common.ALARMS)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {f"{stem}_{what}.png" for what in plots} | {f"{stem}.{t}" for t in ("csv", "json")}
    expected |= {f"{stem}_sweep.csv"} if "sweep" in plots else set()
    assert left == expected
    if "sweep" in plots:
        rows = list(csv.DictReader((tmp_path / "out" / f"{stem}_sweep.csv").open()))
        assert {row["seed"] for row in rows} == {"0"}
        assert all(0 <= float(row["accuracy"]) <= 100 for row in rows)


def check(tiny, health, intended, claims=(), source="MNIST", changed=False):
    scores = {"seed": 0, "health": health}
    runs = {"run": [common.Run(None, None, scores, None)]}
    options = argparse.Namespace(limit=None, recipe_changed=changed)
    digits = tiny._replace(source=source)
    common.check_claims(list(claims), intended, runs, digits, options)


def test_claims_that_come_out_are_a_reproduced_failure(tiny, capsys):
    check(tiny, ["diverged"], {"run": "diverged"}, [("it is broken", True)])
    check(tiny, [], {})
    out = capsys.readouterr().out
    assert "yes it is broken" in out
    assert out.count("failure reproduced") == 2


@pytest.mark.parametrize(
    ("health", "intended", "claims"),
    [
        ([], {"run": "diverged"}, []),  # a missed alarm
        (["overfitting"], {}, []),  # a false one
        (["dead ReLUs"], {"run": "diverged"}, []),
        ([], {}, [("it is broken", False)]),
    ],
)
def test_a_claim_that_fails_ends_with_exit_code_1(tiny, capsys, health, intended, claims):
    with pytest.raises(SystemExit, match="^failure not reproduced"):
        check(tiny, health, intended, claims)
    assert "NO  " in capsys.readouterr().out
    for changed in ({"source": "synthetic stand-in"}, {"changed": True}):
        check(tiny, health, intended, claims, **changed)
        assert "not checked" in capsys.readouterr().out
