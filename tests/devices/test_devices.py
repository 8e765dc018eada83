"""Several CPU ranks: as launched from the command line, and as processes that something else has started."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomalib_lite.runs import artifacts as results
from anomalib_lite.runs.devices import peak_resident
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import logged, until
from tests.helpers.ranks import PROCESSES, on_ranks, start_ranks

BASE = (
    "backbone=resnet18", runs.TINY, "backbone.weights=none", "data.image_size=48", "data.batch_size=4", "logger=csv",
    "hardware.measure_cost=false",
)  # fmt: skip
RANKS = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.precision=32")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An odd number of test images, a category with as many as two ranks, and one with a single image."""
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=8, good=4, defects={"broken": 3})
    make_mvtec(root, "few", train=5, good=1, defects={"broken": 1})
    return root


def arguments(root: Path, run: Path, method: str, devices: int, category: str) -> list[str]:
    options = [f"method={method}", *runs.folder_data(root, category), f"hydra.run.dir={run}"]
    return [*BASE, *RANKS, f"hardware.devices={devices}", *options]


def launch(program: str, *options: str, printed: Path, **environment: str) -> runs.Outcome:
    """`python -m anomalib_lite.PROGRAM OPTIONS` in a process that has the imports already; the ranks that it starts are
    new processes. Everything that they print is in the file `printed`."""
    process: Any = PROCESSES.Process(target=as_command, args=(program, options, printed, environment))
    process.start()
    process.join(120)
    return runs.Outcome(process.exitcode, printed.read_text(), "")


def as_command(program: str, options: tuple[str, ...], printed: Path, environment: dict[str, str]) -> None:
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    os.chdir(runs.ROOT)
    sys.argv = ["", *options]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(f"anomalib_lite.{program}")
    importlib.import_module(f"anomalib_lite.{program}").main()


@pytest.fixture(scope="module")
def launched(root, tmp_path_factory):
    """A run on two ranks from the command line: Lightning starts the second one, whatever another launcher has left."""
    run = tmp_path_factory.mktemp("launched") / "a run"  # a space in its name
    options = arguments(root, run, "norm_occ", 2, "[bottle,few]")
    options[-1] = f'hydra.run.dir="{run}"'
    budget = ("trainer.max_epochs=2", "trainer.max_steps=null")
    cache = f"cache.folder={run.parent / 'cache'}"
    left: dict[str, Any] = {"RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.255.255.1", "NODE_RANK": "3"}
    outcome = launch("train", *options, *budget, cache, printed=run.parent / "printed", **left)
    assert outcome.code == 0, outcome.out
    return run


def assert_same_outcome(first: Path, second: Path) -> None:
    """All that was measured, to the last bit."""
    a, b = results.read_result(first), results.read_result(second)
    for key in ("metrics", "per_category", "thresholds", "validation", "data", "protocol"):
        assert a[key] == b[key], key
    assert (first / "scores.csv").read_bytes() == (second / "scores.csv").read_bytes()
    maps = [np.load(run / "maps.npz") for run in (first, second)]
    assert maps[0].files == maps[1].files
    assert all(np.array_equal(maps[0][name], maps[1][name]) for name in maps[0].files)


def weights_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_files_are_written_once(launched):
    assert runs.files_of(launched) == runs.FILES | {"figures/bottle.png", "figures/few.png"}
    result = results.read_result(launched)
    assert result["timing"]["steps"] == 8  # 13 images in global batches of 4, two epochs
    assert result["cache"]["used"]
    assert result["cache"]["computed"] == 22
    assert len(list((launched.parent / "cache").glob("*/*.safetensors"))) == 2  # each rank computed its share
    rows = (launched / "scores.csv").read_text().splitlines()[1:]
    assert len(rows) == len({row.split(",")[0] for row in rows}) == 9
    assert result["data"]["test_counts"] == {
        "bottle": {"good": 4, "defective": 3}, "few": {"good": 1, "defective": 1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def on_one(launched, tmp_path_factory):
    """The same weights, evaluated on one device."""
    output = tmp_path_factory.mktemp("one") / "output"
    outcome = runs.evaluate(f"run={launched}", f"output={output}", "hardware.devices=1")
    assert outcome.code == 0, outcome.err
    return output


def test_two_ranks_measure_what_one_does(launched, on_one):
    assert_same_outcome(launched, on_one)


@pytest.mark.slow
def test_evaluate_launches_ranks(launched, on_one, tmp_path):
    options = (f"run={launched}", f"output={tmp_path / 'two'}", *RANKS)
    outcome = launch("evaluate", *options, "hardware.devices=2", printed=tmp_path / "printed")
    assert outcome.code == 0, outcome.out
    assert_same_outcome(tmp_path / "two", on_one)
    assert runs.files_of(tmp_path / "two") == runs.files_of(on_one)
    assert outcome.out.count("category ") == 1


def test_three_ranks_measure_what_one_does(launched, tmp_path):
    """Five batches of two images or one: the ranks have different numbers of them."""
    options = [f"run={launched}", "data.eval_batch_size=2"]
    on_ranks("evaluate", [*options, f"output={tmp_path / 'three'}", "hardware.devices=3"], 3)
    outcome = runs.evaluate(*options, f"output={tmp_path / 'one'}", "hardware.devices=1")
    assert outcome.code == 0, outcome.err
    assert_same_outcome(tmp_path / "three", tmp_path / "one")


@pytest.mark.parametrize("method", ["norm_occ", "norm_occ_closed_form", "patchcore"])
def test_fewer_test_images_than_ranks(root, tmp_path, method):
    run = tmp_path / "run"
    options = [*arguments(root, run, method, 3, "few"), "trainer.max_steps=2", "data.batch_size=3"]
    on_ranks("train", options, 3)
    assert runs.files_of(run) == runs.FILES | {"figures/few.png"}
    outcome = runs.evaluate(f"run={run}", f"output={tmp_path / 'one'}", "hardware.devices=1")
    assert outcome.code == 0, outcome.err
    assert_same_outcome(run, tmp_path / "one")


@pytest.mark.parametrize("method", [["norm_occ"], ["norm_occ", "method.squared=false"], ["norm_occ_closed_form"]])
def test_training_on_two_ranks_is_training_on_one(root, tmp_path, method):
    """Global batches are the same, so weights and the sum of losses within an epoch are, up to the rounding of sums."""
    for devices in (1, 2):
        options = [*arguments(root, tmp_path / str(devices), method[0], devices, "bottle"), *method[1:]]
        options.append("trainer.max_steps=7")
        if devices == 1:
            assert runs.train(*options, small=False).code == 0
        else:
            on_ranks("train", options, 2)
    one, two = weights_of(tmp_path / "1"), weights_of(tmp_path / "2")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)
    found = [np.loadtxt(tmp_path / n / "scores.csv", delimiter=",", skiprows=1, usecols=4) for n in "12"]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-2)


def test_two_ranks_pick_the_bank_of_one(root, tmp_path):
    """The coreset's first pick and the drawn patches are random."""
    more = ["hardware.threads=1", "method.max_patches=200", "method.project=32"]
    options = {n: [*arguments(root, tmp_path / str(n), "patchcore", n, "bottle"), *more] for n in (1, 2)}
    assert runs.train(*options[1], small=False).code == 0
    on_ranks("train", options[2], 2)
    one, two = (weights_of(tmp_path / n) for n in "12")
    assert len(one["bank"]) == 20
    assert torch.equal(one["bank"], two["bank"])
    assert torch.equal(one["owners"], two["owners"])


def test_ranks_that_are_killed_and_started_again(root, tmp_path):
    budget = ("trainer.max_steps=40", "trainer.log_every=1", "method.residual=null")
    plain, killed = ([*arguments(root, tmp_path / name, "norm_occ", 2, "bottle"), *budget] for name in "pk")
    on_ranks("train", plain, 2)
    started = start_ranks("train", [*killed, "trainer.checkpoint_minutes=0"], 2)
    until(lambda: logged(tmp_path / "k", 3))
    for process in started:
        process.kill()
        process.join()
    assert not (tmp_path / "k" / "result.json").exists()
    on_ranks("train", [*killed, "resume=true"], 2)
    assert runs.files_of(tmp_path / "k") == runs.files_of(tmp_path / "p")
    assert_same_outcome(tmp_path / "k", tmp_path / "p")
    assert (tmp_path / "k" / "metrics.csv").read_bytes() == (tmp_path / "p" / "metrics.csv").read_bytes()


def test_a_signal_to_one_rank(root, tmp_path):
    """Both ranks end after the same batch, with its checkpoint, though none is due; the run then continues from it."""
    budget = ("trainer.max_steps=400", "trainer.log_every=1", "method.residual=null")
    plain, stopped = ([*arguments(root, tmp_path / name, "norm_occ", 2, "bottle"), *budget] for name in "ps")
    on_ranks("train", plain, 2)
    started = start_ranks("train", stopped, 2)
    until(lambda: logged(tmp_path / "s", 50))  # the log is written every 50 rows, and with checkpoints
    started[0].terminate()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [1, 1]  # the helper's, where the program's is not 0
    stored = torch.load(tmp_path / "s" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 50 <= stored["callbacks"]["Training"]["steps"] < 400
    on_ranks("train", [*stopped, "resume=true"], 2)
    assert_same_outcome(tmp_path / "s", tmp_path / "p")


def test_validation_on_two_ranks(root, tmp_path):
    options = [*arguments(root, tmp_path / "run", "norm_occ", 2, "bottle"), "trainer.max_steps=2"]
    on_ranks("train", [*options, "data.val_fraction=0.3"], 2)
    outcome = runs.evaluate(f"run={tmp_path / 'run'}", f"output={tmp_path / 'one'}", "hardware.devices=1")
    assert outcome.code == 0, outcome.err
    assert results.read_result(tmp_path / "run")["validation"]["image_auroc"] is not None
    assert_same_outcome(tmp_path / "run", tmp_path / "one")


def test_peak_memory_is_that_of_this_process():
    """Linux gives a small process the ru_maxrss of the large one that has started it, such as this one."""
    program = f"""
import contextlib, resource, sys
from pathlib import Path
{inspect.getsource(peak_resident)}
print(peak_resident())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < 100 * 2**20
