"""Random search: what is drawn, and that it goes on as any sweep does; Optuna's TPE beside it."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from anomalib_lite.errors import UserError
from anomalib_lite.sweeps.search import Draw, draw
from tests.helpers.user_folder import assert_refused, in_process, result_of

SEARCH = (
    "method=mean",
    "data.category=bottle",
    "data.val_fraction=0.3",
    "objective=validation.pixel_ap",
    "hydra/sweeper=random",
)
SPACE = ("method.optimizer.lr=tag(log, interval(0.01, 10))", "data.batch_size=int(interval(2, 4))", "seed=3,4")


def space(*overrides: str) -> dict[str, Draw]:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.get_key_element(): Draw(override) for override in parsed}


def drawn(override: str, number: int = 4000) -> list[str]:
    (one,) = space(override).values()
    return [one(random.Random(f"0 {n} a")) for n in range(number)]


@pytest.mark.parametrize(
    ("override", "share"),
    [
        ("a=interval(-1, 3)", lambda x: (x + 1) / 4),
        ("a=tag(log, interval(1e-5, 1e-1))", lambda x: math.log10(x / 1e-5) / 4),
    ],
)
def test_intervals_are_drawn_evenly(override, share):
    """The share of the interval below a value is itself uniform: Kolmogorov-Smirnov, 0.1 % level."""
    shares = sorted(share(float(text)) for text in drawn(override))
    assert shares[0] >= 0
    assert shares[-1] <= 1
    gap = max(abs((rank + 0.5) / len(shares) - value) for rank, value in enumerate(shares))
    assert gap < 1.95 / math.sqrt(len(shares))


def test_whole_numbers_and_choices_are_drawn_evenly():
    for override, there in (
        ("a=int(interval(0, 4))", "01234"),
        ("a=range(2, 6)", "2345"),
        ("a=choice(x, y, z)", "xyz"),
        ("a=[2],[2,3]", ("[2]", "[2,3]")),
    ):
        counts = Counter(drawn(override))
        assert set(counts) == set(there)
        expected = 4000 / len(counts)
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 18.5  # chi-square, 4, 0.1 %
    logged = Counter(drawn("a=tag(log, int(interval(1, 8)))"))
    for value in range(1, 9):  # a whole number's share of the logarithms around it
        share = math.log((value + 0.5) / (value - 0.5)) / math.log(8.5 / 0.5)
        assert abs(logged[str(value)] / 4000 - share) < 3.5 * math.sqrt(share * (1 - share) / 4000)


def test_trials_depend_on_seed_and_options_alone():
    few, many = draw(space(*SPACE), 5, seed=7), draw(space(*SPACE), 9, seed=7)
    assert many[:5] == few
    swapped = draw(space(*reversed(SPACE)), 5, seed=7)
    assert [sorted(trial.items()) for trial in swapped] == [sorted(trial.items()) for trial in few]
    assert draw(space(*SPACE), 5, seed=8) != few
    pairs = draw(space("a=interval(0, 1)", "b=interval(0, 1)"), 400, seed=0)  # options are drawn apart
    agree = sum((float(pair["a"]) < 0.5) == (float(pair["b"]) < 0.5) for pair in pairs)
    assert abs(agree - 200) < 3.3 * 10
    assert len({json.dumps(trial) for trial in many}) == 9


def test_fewer_combinations_than_trials():
    trials = draw(space("a=1,2,3", "b=range(10)", "c=x,y"), 100, seed=0)
    assert len({json.dumps(trial) for trial in trials}) == len(trials) == 60


def test_bad_spaces():
    for override in ("a=interval(3, 1)", "a=tag(log, interval(0, 1))", "a=tag(log, choice(1, 2))"):
        with pytest.raises(UserError, match=r"a=.*interval\(low, high\)"):
            space(override)


def overrides_of(sweep: Path) -> dict[str, list[str]]:
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    return {
        job["folder"]: sorted(o for o in job["overrides"] if o.startswith(("seed", "method.opt", "data.b")))
        for job in jobs
    }


def test_a_search_goes_on(tmp_path):
    """More trials of the same seed: the first ones stay. The best is what validation says."""
    folder = f"hydra.sweep.dir={tmp_path}"
    first = in_process("-m", *SEARCH, *SPACE, folder, "hydra.sweeper.n_trials=2", "hydra.launcher.jobs=2")
    assert first.code == 0, first.err
    begun = overrides_of(tmp_path)
    expected = draw(dict(sorted(space(*SPACE).items())), 3, seed=0)
    assert list(begun.values()) == [sorted(f"{k}={v}" for k, v in trial.items()) for trial in expected[:2]]
    times = [(tmp_path / number / "result.json").stat().st_mtime_ns for number in "01"]
    more = in_process("-m", folder, *reversed(SPACE), *SEARCH, "hydra.sweeper.n_trials=3")
    assert more.code == 0, more.err
    assert more.out.count("done before") == 3  # the summary and two rows
    assert times == [(tmp_path / number / "result.json").stat().st_mtime_ns for number in "01"]
    assert overrides_of(tmp_path) == begun | {"2": sorted(f"{k}={v}" for k, v in expected[2].items())}
    measured = [result_of(tmp_path / number)["validation"]["pixel_ap"] for number in "012"]
    assert len(set(measured)) > 1
    best: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_evaluated_result == max(measured)
    assert dict(best.best_evaluated_params) == expected[measured.index(max(measured))]
    assert f"best validation.pixel_ap {max(measured):.4f}: data.batch_size=" in more.out
    fewer = in_process("-m", *SEARCH, *SPACE, folder, "hydra.sweeper.n_trials=2")  # nothing left to do
    assert fewer.code == 0, fewer.err
    assert f"best validation.pixel_ap {max(measured[:2]):.4f}: " in fewer.out
    assert "validation" in more.out.split("in percent")[-1]  # a column of the table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("seed=1",), "hydra/sweeper=random: nothing to search; give options several values"),
        (("seed=1,2", "hydra.sweeper.n_trials=0"), "hydra.sweeper.n_trials=0: give a whole number from 1"),
        (("seed=1,2", "hydra.sweeper.trials=3"), "hydra.sweeper.trials: no such option"),
        (("seed=1,2", "data.val_fraction=0"), "hydra/sweeper: .*data.val_fraction=0; give .*data.val_fraction=0.2"),
        (
            ("seed=1,2", "objective=metrics.image_auroc"),
            "objective=metrics.image_auroc: .*the test set chooses nothing",
        ),
        (("data.batch_size=interval(2, 4)",), "data.batch_size=.*: give a whole number"),
    ],
)
def test_refused(arguments, message, tmp_path):
    given = [a for a in SEARCH if a.partition("=")[0] not in {b.partition("=")[0] for b in arguments}]
    assert_refused(message, *given, *arguments, f"hydra.sweep.dir={tmp_path}")
    assert not (tmp_path / "0").exists()


def test_a_seed_of_its_own(tmp_path):
    """Drawn once: a sweep begun without a seed goes on with the trials that it has; one begun with a seed needs it."""
    arguments = (*SEARCH, "seed=range(1000)", "hydra.sweeper.seed=null", f"hydra.sweep.dir={tmp_path}")
    nothing = ("data.batch_size=0",)  # refused, after the seed is drawn
    assert_refused("data.batch_size=0: give", *arguments, *nothing)
    seed = json.loads((tmp_path / "sweeper.json").read_text())["seed"]
    assert_refused("data.batch_size=0: give", *arguments, *nothing)
    assert json.loads((tmp_path / "sweeper.json").read_text())["seed"] == seed
    (tmp_path / "sweeper.json").write_text("{}")
    assert_refused("sweeper.json: damaged; give hydra.sweeper.seed=NUMBER", *arguments)
    (tmp_path / "sweeper.json").unlink()
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": []}))
    assert_refused("hydra.sweeper.seed=null: .* begun with a seed; give the same one", *arguments)


@pytest.mark.slow
def test_tpe(tmp_path):
    """Through hydra-optuna-sweeper: the right way up, and started again with the same trials."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = (*SEARCH[:-1], "hydra/sweeper=tpe", "hydra.sweeper.n_trials=3", "hydra.launcher.jobs=2", SPACE[0])
    folder = f"hydra.sweep.dir={tmp_path}"
    first = in_process("-m", *arguments, folder)
    assert first.code == 0, first.err
    again = in_process("-m", *arguments, folder)
    assert again.code == 0, again.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1", "2"]
    measured = [result_of(tmp_path / number)["validation"]["pixel_ap"] for number in "012"]
    best: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == max(measured)
    refused = in_process("-m", *SEARCH[:-1], "hydra/sweeper=optuna", SPACE[0], f"hydra.sweep.dir={tmp_path / 'other'}")
    assert "hydra.sweeper.direction: of every objective more is better; give maximize" in refused.err
