"""The search: what is drawn, and that it is drawn again after a stop; its jobs run in test_processes.py."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from anomalib_lite.errors import UserError
from anomalib_lite.sweeps.search import Trials, distribution, search
from anomalib_lite.sweeps.sweep import Sweep
from tests.helpers.user_folder import assert_refused, in_process

pytest.importorskip("optuna.storages.journal")
SEARCH = (
    "method=mean", "data.category=bottle", "data.val_fraction=0.3", "objective=validation.pixel_ap",
    "hydra/sweeper=random",
)  # fmt: skip
TPE = {"n_jobs": 2, "n_startup_trials": 3}
MIXED = ("a=tag(log, interval(0.01, 10))", "b=int(interval(1, 9))", "c=x,y")


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    """Optuna waits until the disk has each line of its journal: 20 s in tests that draw 400 trials."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def make_space(*overrides: str) -> dict[str, Any]:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {o.get_key_element(): distribution(o) for o in sorted(parsed, key=lambda o: o.get_key_element())}


def trials(
    folder: Path, *overrides: str, sampler: str = "random", n_trials: int = 400, seed: Any = 0, **more
) -> Trials:
    """The journal of a sweep in the folder, as a process that starts now sees it."""
    folder.mkdir(exist_ok=True)
    opened = Trials(folder, sampler, {"n_trials": n_trials, "seed": seed, **more}, make_space(*overrides))
    (folder / "sweep.json").touch()
    return opened


def draw(folder: Path, *overrides: str, **options) -> list[tuple[str, ...]]:
    return trials(folder, *overrides, **options).next_batch(0)


def score(trial: tuple[str, ...]) -> float:
    """An objective with its maximum at a=0.5, b=6, c=y."""
    values = dict(override.split("=") for override in trial)
    return -((math.log10(float(values["a"])) + 0.3) ** 2) - (int(values["b"]) / 6 - 1) ** 2 + (values["c"] == "y")


def run(folder: Path, stop_after: float = math.inf, **options) -> list[tuple[str, ...]]:
    """A search by TPE; after `stop_after` steps (a batch drawn, a value stored) its process is gone."""
    study, launched, step = trials(folder, *MIXED, sampler="tpe", **TPE, **options), list[tuple[str, ...]](), 0
    while new := study.next_batch(len(launched)):
        launched += new
        for known in range(1, len(launched) + 1):
            if step >= stop_after:
                return launched
            study.tell([score(trial) for trial in launched[:known]])
            step += 1
    return launched


@pytest.mark.parametrize(
    ("override", "share"),
    [
        ("a=interval(-1, 3)", lambda x: (x + 1) / 4),
        ("a=tag(log, interval(1e-5, 1e-1))", lambda x: math.log10(x / 1e-5) / 4),
    ],
)
def test_intervals_are_drawn_evenly(override, share, tmp_path):
    """The share of the interval below a value is itself uniform: Kolmogorov-Smirnov, 0.1 % level."""
    shares = sorted(share(float(text.partition("=")[2])) for (text,) in draw(tmp_path, override))
    assert 0 <= shares[0] <= shares[-1] <= 1
    gap = max(abs((rank + 0.5) / len(shares) - value) for rank, value in enumerate(shares))
    assert gap < 1.95 / math.sqrt(len(shares))


def test_options_are_drawn_evenly_and_apart(tmp_path):
    """Whole numbers, ranges and choices: chi-square with at most 4 degrees of freedom, 0.1 % level."""
    overrides = ("a=int(interval(0, 4))", "b=range(2, 6)", "c=choice(x, y, z)", "d=[2],[2,3]", "e=interval(0, 1)")
    names = dict(zip("abcd", ("01234", "2345", "xyz", ("[2]", "[2,3]")), strict=True))
    drawn = [dict(text.split("=") for text in trial) for trial in draw(tmp_path, *overrides)]
    for key, expected in names.items():
        counts = Counter(trial[key] for trial in drawn)
        assert set(counts) == set(expected)
        mean = len(drawn) / len(counts)
        assert sum((count - mean) ** 2 / mean for count in counts.values()) < 18.5
    agree = sum((trial["d"] == "[2]") == (float(trial["e"]) < 0.5) for trial in drawn)
    assert abs(agree - len(drawn) / 2) < 3.3 * math.sqrt(len(drawn) / 4)


def test_random_trials_depend_on_seed_and_options_alone(tmp_path):
    """More trials begin with those of fewer, in whatever order the options stand, also after a stop."""
    few = draw(tmp_path / "few", *MIXED, n_trials=5, seed=7)
    many = draw(tmp_path / "many", *reversed(MIXED), n_trials=9, seed=7)
    assert many[:5] == few
    assert draw(tmp_path / "few", *MIXED, n_trials=9, seed=7) == many
    assert draw(tmp_path / "other", *MIXED, n_trials=5, seed=8) != few
    own = trials(tmp_path / "own", *MIXED, seed=None)  # a seed of its own is stored
    assert trials(tmp_path / "own", *MIXED, seed=None).options["seed"] == own.options["seed"]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_combination_is_run_once(sampler, tmp_path):
    study = trials(tmp_path, "a=1,2,3", "b=range(3)", "c=x,y", sampler=sampler, n_trials=100, **TPE)
    launched: list[tuple[str, ...]] = []
    while new := study.next_batch(len(launched)):
        launched += new
        study.tell([float("a=2" in trial) for trial in launched])
    assert len(set(launched)) == len(launched) == 18


def test_a_killed_tpe_search_draws_the_same_trials(tmp_path):
    """Killed after a batch was drawn, or between the values of a batch, or while a trial was drawn."""
    undisturbed = run(tmp_path / "undisturbed", n_trials=12)
    assert len(set(undisturbed)) == 12
    for place, stop in enumerate((0, 1, 5, 20, 21)):
        folder = tmp_path / str(place)
        started = run(folder, stop_after=stop, n_trials=12)
        assert started == undisturbed[: len(started)]
        journal = folder / "search.journal"
        if place % 2:  # the last trial in the journal lacks a parameter, and its line was cut off
            lines = journal.read_bytes().splitlines(keepends=True)
            asked = max(number for number, line in enumerate(lines) if b'"op_code":4' in line)
            journal.write_bytes(b"".join(lines[: asked + 2]) + lines[asked + 2][:-5])
        assert run(folder, n_trials=12) == undisturbed
    random = draw(tmp_path / "random", *MIXED, n_trials=12)
    assert max(map(score, undisturbed[6:])) > max(map(score, random)) - 1  # and it learns
    assert sum(map(score, undisturbed[6:])) > sum(map(score, random[6:]))


def test_a_failed_trial_ends_no_search(tmp_path, monkeypatch):
    """The other trials run, the best one is named, and the exit code is 1. The next command retries the failed one."""

    def run(sweep: Sweep, jobs: list[Any]) -> None:
        """The value of a trial is its seed."""
        for job in jobs:
            job.folder.mkdir(exist_ok=True)
            result = {"method": "mean", "validation": {"pixel_ap": job.plain["seed"]}}
            job.state, job.result = ("failed", None) if job.number == failing else ("done", result)

    monkeypatch.setattr(Sweep, "run", run)
    study = (*SEARCH[:-1], "hydra/sweeper=tpe", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_startup_trials=0")
    for failing in (0, None):
        outcome = in_process("-m", *study, "seed=range(1,4)", f"hydra.sweep.dir={tmp_path}")
        assert outcome.code == (failing is not None), outcome.err
        assert ("error: 1 of 3 jobs failed; the same command retries" in outcome.err) == (failing is not None)
        values = [trial.value for trial in trials(tmp_path, "seed=range(1,4)", sampler="tpe", **TPE).drawn().values()]
        assert [value is None for value in values] == [failing == 0, False, False]
        best = max(value for value in values if value is not None)
        assert f"best validation.pixel_ap {best:.4f}: seed={best:.0f}" in outcome.out


def test_bad_spaces():
    for override in ("a=interval(3, 1)", "a=tag(log, interval(0, 1))", "a=tag(log, choice(1, 2))"):
        with pytest.raises(UserError, match=r"a=.*interval\(low, high\)"):
            make_space(override)


def test_folder_of_another_search(tmp_path):
    draw(tmp_path, *MIXED, n_trials=2)
    for options, message in (
        ({"seed": 1}, "hydra.sweeper.seed: the search in .* was started with 0; give the same"),
        ({"sampler": "tpe", **TPE}, "hydra/sweeper: the search in .* was started with random; give"),
    ):
        with pytest.raises(UserError, match=message):
            trials(tmp_path, *MIXED, **options)
    with pytest.raises(UserError, match=r"a: the search in .* was started with other values; give the same"):
        trials(tmp_path, "a=1,2", *MIXED[1:])
    (tmp_path / "search.journal").write_text("{}\n{\n{}\n")
    with pytest.raises(UserError, match=r"search.journal: damaged .*; choose another hydra.sweep.dir"):
        trials(tmp_path, *MIXED)
    (tmp_path / "search.journal").unlink()
    with pytest.raises(UserError, match=r"holds a sweep without search.journal, which is no search or one of an older"):
        trials(tmp_path, *MIXED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("seed=1",), "hydra/sweeper=random: nothing to search; give options several values"),
        (("seed=1,2", "hydra.sweeper.seed=x"), "hydra.sweeper.seed=x: give a whole number from 0, or null"),
        (("seed=1,2", "hydra.sweeper.trials=3"), "hydra.sweeper.trials: no such option"),
        (("seed=1,2", "+hydra.sweeper.trials=3"), "hydra.sweeper.trials: no such option of random; see --cfg hydra"),
        (("seed=1,2", "data.val_fraction=0"), "hydra/sweeper: .*data.val_fraction=0; give .*data.val_fraction=0.2"),
        (("seed=1,2", "objective=metrics.image_auroc"), "objective=metrics.image_auroc: .*test set chooses nothing"),
        (("seed=range(0,0)",), r"seed=range\(0,0\): no value, so the search has no trial"),
        (("data.batch_size=interval(2, 4)",), "data.batch_size=.*: give a whole number"),
    ],
)
def test_refused(arguments, message, tmp_path):
    given = [a for a in SEARCH if a.partition("=")[0] not in {b.partition("=")[0] for b in arguments}]
    assert_refused(message, *given, *arguments, f"hydra.sweep.dir={tmp_path}")
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize(("sampler", "option"), [("random", "n_trials"), ("tpe", "n_jobs")])
def test_numbers_of_a_search(sampler, option):
    with pytest.raises(UserError, match=f"hydra.sweeper.{option}=0: give a whole number from 1$"):
        search(sampler, {option: 0}, [], None, None, None)


def test_optuna_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna.storages.journal", None)
    message = r"hydra/sweeper=random: .*; pip install 'anomalib-lite\[optuna\]'"
    assert_refused(message, *SEARCH, "seed=1,2", f"hydra.sweep.dir={tmp_path}")
