"""Two processes in one folder, a checkpoint of another run, and folders that are named after the time."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from anomalib_lite.errors import UserError
from anomalib_lite.runs.claim import claimed
from anomalib_lite.runs.folder import CLAIM
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.programs.test_resume import process


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mvtec(tmp_path_factory.mktemp("data"), train=5, good=2, defects={"broken": 2}).parent


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """Runs with the seeds 1 and 2."""
    found = [tmp_path_factory.mktemp("finished") / "run" for _ in "12"]
    for seed, run in enumerate(found, 1):
        runs.result_of(*runs.folder_data(root), f"seed={seed}", run_dir=run)
    return found


def test_a_folder_that_is_held(finished, root, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_lite.runs.claim.PATIENCE", 0.2)
    run = tmp_path / "run"
    train = (*runs.folder_data(root), f"hydra.run.dir={run}")
    attempts: list[Any] = [
        ("hydra.run.dir", lambda: runs.train(*train)),
        ("hydra.run.dir", lambda: runs.train(*train, "resume=true")),
        ("output", lambda: runs.evaluate(f"run={finished[0]}", f"output={run}")),
        ("output", lambda: runs.predict(f"run={finished[0]}", f"input={root}", f"output={run}")),
    ]
    with runs.holding(run) as holder:
        for option, attempt in attempts:
            outcome = attempt()
            assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
            assert f"process {holder.pid} on {socket.gethostname()} works in this folder since" in outcome.err
            assert f"choose another {option}=DIR" in outcome.err
    assert [each.name for each in run.iterdir()] == [CLAIM]  # of a killed process: it holds nobody up
    runs.succeeded(runs.train(*train))
    assert not (run / CLAIM).exists()


def test_of_several_starts_one_trains(root, tmp_path):
    """Result, configuration and weights are of the same run; the others get one line."""
    run = tmp_path / "run"
    common = [*runs.SMALL, *runs.folder_data(root), f"hydra.run.dir={run}"]
    started = [process([*common, f"seed={seed}"]) for seed in (1, 2, 3)]
    for each in started:
        each.join()
    assert sorted(each.exitcode for each in started) == [0, 1, 1]
    seed = [each.exitcode for each in started].index(0) + 1
    assert json.loads((run / "result.json").read_text())["seed"] == seed
    assert json.loads((run / "checkpoints" / "config.json").read_text())["config"]["seed"] == seed
    runs.result_of(*runs.folder_data(root), f"seed={seed}", run_dir=tmp_path / "alone")
    assert (run / "scores.csv").read_bytes() == (tmp_path / "alone" / "scores.csv").read_bytes()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr("anomalib_lite.runs.claim.PATIENCE", 0.2)
    with (
        claimed(tmp_path, "output"),
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        claimed(tmp_path, "x"),
    ):
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / CLAIM).write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid}))
    with claimed(tmp_path, "output"):
        pass
    (tmp_path / CLAIM).write_text(json.dumps({"host": "elsewhere", "pid": ended.pid}))
    with pytest.raises(UserError, match=f"on elsewhere works .*remove {tmp_path / CLAIM} if"), claimed(tmp_path, "x"):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 1}'])
def test_a_damaged_claim_of_a_dead_process(content, tmp_path):
    (tmp_path / CLAIM).write_text(content)
    with claimed(tmp_path, "output"):
        assert json.loads((tmp_path / CLAIM).read_text())["pid"] == os.getpid()
    assert not (tmp_path / CLAIM).exists()


def test_a_checkpoint_of_another_run(finished, root, tmp_path):
    """It is used nowhere, and refused by the first key that differs."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.copy(finished[1] / "checkpoints" / "last.ckpt", run / "checkpoints")
    (run / "result.json").rename(tmp_path / "result.json")
    line = r"error: {}: trained with data.seed=2, but its run has data.seed=1; the files of two runs are mixed, .*\n"
    resumed = runs.train("resume=true", f"hydra.run.dir={run}", small=False)
    evaluated = runs.evaluate(f"run={run}", f"output={tmp_path / 'out'}")
    (tmp_path / "result.json").rename(run / "result.json")
    predicted = runs.predict(f"run={run}", f"input={root}", f"output={tmp_path / 'new'}")
    for outcome in (resumed, evaluated, predicted):
        assert outcome.code == 2
        assert outcome.err == line.format(run / "checkpoints" / "last.ckpt").replace(".*\\n", "train again in another folder\n")  # fmt: skip  # noqa: E501


def test_a_new_run_uses_no_checkpoint_that_lies_there(finished, root, tmp_path):
    """As a process of another seed would leave it between the check and the start."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(finished[1] / "checkpoints" / "last.ckpt", run / "checkpoints")
    runs.result_of(*runs.folder_data(root), "seed=1", run_dir=run)
    assert (run / "scores.csv").read_bytes() == (finished[0] / "scores.csv").read_bytes()


def test_results_of_an_evaluation_are_not_overwritten(finished, root, tmp_path):
    assert runs.evaluate(f"run={finished[0]}", f"output={tmp_path / 'out'}").code == 0
    outcome = runs.train(*runs.folder_data(root), f"hydra.run.dir={tmp_path / 'out'}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    interrupted = shutil.copytree(finished[0], tmp_path / "run")
    (interrupted / "result.json").unlink()
    outcome = runs.evaluate(f"run={finished[1]}", f"output={interrupted}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_folders_named_after_the_time_do_not_meet(root, tmp_path, monkeypatch):
    """Two starts within what `now` tells apart, alone and as sweeps; a folder that the user names stays as named."""
    monkeypatch.chdir(tmp_path)
    for run in ("y", "y-2"):
        runs.succeeded(runs.train(*runs.folder_data(root), "hydra.run.dir=${now:y}"))
        assert Path(run, "result.json").is_file()
    for sweep in ("s", "s-2"):
        arguments = ("-m", "seed=0", "hydra/launcher=basic", "hydra.sweep.dir=${now:s}", *runs.folder_data(root))
        runs.succeeded(runs.train(*arguments))
        assert Path(sweep, "0", "result.json").is_file()
    outcome = runs.train(*runs.folder_data(root), "data.batch_size=0", "hydra.run.dir=${now:y}")
    assert outcome.code == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["s", "s-2", "y", "y-2"]
