"""Sweeps: every job in a process of its own, equal to a single run; whatever is killed, it goes on from there."""

import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from anomalib_lite import sweep
from tests import runs
from tests.runs import Outcome
from tests.trees import make_mvtec

METHODS = '''
import os
import time
import torch
from anomalib_lite.methods.base import AnomalyModule


class Mean(AnomalyModule):
    """The mean image, learnt; a drop of noise makes it depend on the seed."""

    def __init__(self, pause=0.0, **context):
        super().__init__(**context)
        self.pause = pause
        self.mean = torch.nn.Parameter(torch.zeros(3, *self.image_size))

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        images = batch["image"]
        return (images + 0.1 * torch.randn_like(images) - self.mean).square().mean()

    def anomaly_map(self, batch):
        return (batch["image"] - self.mean).abs().mean(1)


class Empty(AnomalyModule):
    def anomaly_map(self, batch):
        return batch["image"].mean(1)


class Crash(Mean):
    """Ends as `how` says."""

    def __init__(self, how="no", **context):
        super().__init__(**context)
        self.how = how

    def on_train_start(self):
        if self.how == "exception":
            raise RuntimeError("as asked")
        if self.how == "exit":
            raise SystemExit(5)
        if self.how == "segfault":
            os.kill(os.getpid(), 11)
'''
YAML = """# @package _global_
defaults:
  - override /backbone: none
method:
  _target_: sweep_methods.{}
  {}
  optimizer: {{_target_: torch.optim.SGD, _partial_: true, lr: 1.0}}
data:
  batch_size: 4
trainer:
  max_epochs: 3
"""
SMALL = ("--config-dir=my_conf", "hardware=cpu", "logger=csv", "data=folder", "data.root=data", "data.image_size=32")
FREE = {"timing", "environment", "overrides", "cache"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's folder: methods, their configurations, data."""
    folder = tmp_path_factory.mktemp("home with a space")
    (folder / "my_conf" / "method").mkdir(parents=True)
    (folder / "sweep_methods.py").write_text(METHODS)
    for name, options in (("Mean", "pause: 0.0"), ("Empty", ""), ("Crash", 'how: "no"')):
        (folder / "my_conf" / "method" / f"{name.lower()}.yaml").write_text(YAML.format(name, options))
    make_mvtec(folder / "data")
    make_mvtec(folder / "data", "cup")
    return folder


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def in_process(*arguments: str | Path) -> Outcome:
    """For what is refused before any job begins, and for single runs."""
    return runs.train(*SMALL, *arguments, small=False)


class Started:
    """A sweep from the command line, which can be watched and killed."""

    def __init__(self, home: Path, *arguments: str):
        self.mark = f"SWEEP_TEST={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "anomalib_lite.train", "-m", *SMALL, *arguments],
            cwd=home,
            env=os.environ | dict([self.mark.split("=")]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's `command &`
        )

    def alive(self) -> list[int]:
        """Its processes: the launcher first, then the server, then jobs."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if self.mark.encode() in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
                except OSError:
                    continue
        return sorted(found)

    def until(self, reached: Callable[[], bool], patience: float = 60) -> None:
        end = time.monotonic() + patience
        while not reached():
            assert time.monotonic() < end
            time.sleep(0.005)

    def end(self) -> Outcome:
        out, err = self.process.communicate(timeout=100)
        self.until(lambda: not self.alive(), 20)
        return Outcome(self.process.returncode, out, err)


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def state_of(run: Path) -> tuple[Any, ...]:
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    result = {key: value for key, value in result_of(run).items() if key not in FREE}
    files = [(run / name).read_bytes() for name in ("scores.csv", "metrics.csv")]
    return {name: tensor.tolist() for name, tensor in weights.items()}, result, files


# --- what comes out ---


def test_a_sweep_equals_single_runs(home, tmp_path):
    """With an outside method, in another order of overrides afterwards; and what the jobs know of themselves."""
    arguments = ("seed=0,1", "data.category=bottle,cup", "data.val_fraction=0.3", "method.pause=0.01")
    folder = (f'hydra.sweep.dir="{tmp_path / "a sweep"}"', "hydra.launcher.jobs=2", "+hydra.job.env_set.SWEPT=yes")
    outcome = Started(home, "method=mean", *arguments, *folder).end()
    assert outcome.code == 0, outcome.err
    assert "4 of 4 done, best validation.image_auroc" in outcome.out
    for number in range(4):
        job, single = tmp_path / "a sweep" / str(number), tmp_path / f"single{number}"
        own = [f"seed={number // 2}", f"data.category={('bottle', 'cup')[number % 2]}"]
        same = ("hardware.threads=1", "method=mean", "data.val_fraction=0.3", "method.pause=0.01")
        alone = in_process(*own, *same, f"hydra.run.dir={single}")
        assert alone.code == 0, alone.err
        assert state_of(job) == state_of(single)
        hydra: Any = OmegaConf.load(job / ".hydra" / "hydra.yaml")
        hydra = hydra.hydra
        assert (hydra.job.num, hydra.mode, hydra.runtime.choices.method) == (number, "RUN", "mean")
        assert (hydra.runtime.output_dir, hydra.sweep.dir) == (str(job), str(job.parent))
        assert hydra.job.env_set == {"SWEPT": "yes"}
        assert set(own) < set(hydra.overrides.task)
        assert "AUPRO" not in outcome.out
        assert "mean on folder" in (job / "output.log").read_text()
        assert (job / "train.log").is_file()
    before = [(tmp_path / "a sweep" / str(n) / "result.json").stat().st_mtime_ns for n in range(4)]
    swapped = Started(home, *folder, *reversed(arguments), "method=mean").end()
    assert swapped.code == 0, swapped.err
    assert swapped.out.count("done before") == 5
    assert before == [(tmp_path / "a sweep" / str(n) / "result.json").stat().st_mtime_ns for n in range(4)]


def test_failures_stay_in_their_jobs(home, tmp_path):
    root = tmp_path / "data"
    make_mvtec(root)
    folder = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    arguments = (
        f"data.root={root}",
        "method=crash",
        "method.how=exception,exit,segfault,no",
        "data.category=bottle,bad",
    )
    first = Started(home, *arguments, folder, "hydra.launcher.jobs=2").end()
    assert first.code == 1
    lines = first.err.splitlines()
    assert len(lines) == 8
    for number, why in ((0, "RuntimeError: as asked"), (2, "exit code 5|."), (4, "killed by SIGSEGV"), (7, ".*bad.*")):
        job = next(line for line in lines if line.startswith(f"error: job {number} ("))
        assert re.search(rf"\): ({why}).*; see {tmp_path}/sweep/{number}/output.log$", job)
    assert lines[-1].startswith("error: 7 of 8 jobs failed; the same command retries them")
    assert "Traceback" not in first.err
    assert len(re.findall(r" failed  ", first.out)) == 7
    done = (tmp_path / "sweep" / "6" / "result.json").stat().st_mtime_ns
    make_mvtec(root, "bad")  # mended
    second = Started(home, *arguments, folder).end()
    assert second.code == 1
    assert "error: 6 of 8 jobs failed" in second.err
    assert result_of(tmp_path / "sweep" / "7")["categories"] == ["bad"]
    assert done == (tmp_path / "sweep" / "6" / "result.json").stat().st_mtime_ns


@pytest.mark.slow
def test_overhead(home, tmp_path):
    """Of a job after the first, beside a loop in one process: at best of seven."""
    done = Started(
        home, "method=empty", "seed=range(8)", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.threads=1"
    ).end()
    assert done.code == 0, done.err
    ends = [(tmp_path / str(number) / "result.json").stat().st_mtime for number in range(8)]
    swept = min(after - before for before, after in itertools.pairwise(ends))
    alone = []
    for seed in range(8):
        start = time.perf_counter()
        in_process("method=empty", f"seed={seed}", "hardware.threads=1", f"hydra.run.dir={tmp_path / 'alone'}/{seed}")
        alone.append(time.perf_counter() - start)
    print(f"a job takes {swept:.2f} s in a sweep, {min(alone):.2f} s in a loop")
    assert swept - min(alone) < 1


@pytest.mark.slow
def test_two_devices_and_one(home, tmp_path):
    arguments = ("hardware.devices=1,2", "method=mean", "hardware.threads=1")
    done = Started(home, *arguments, f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=2").end()
    assert done.code == 0, done.err
    one, two = (result_of(tmp_path / number) for number in "01")
    assert one["timing"]["steps"] == two["timing"]["steps"] == 9
    assert one["data"] == two["data"]
    rows = [(tmp_path / number / "scores.csv").read_text().splitlines() for number in "01"]
    assert len(rows[0]) == len(rows[1]) == 13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "multirun.yaml", "sweep.json"]


# --- what is killed, and goes on ---

PAUSE = "method.pause=0.1"
STUDY = ("method=mean", "seed=0,1,2", "hydra.launcher.jobs=2", "trainer.checkpoint_minutes=0", "trainer.log_every=1")


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory) -> list[Any]:
    """What the study's jobs give as single runs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for seed in "012":
            arguments = (*STUDY[2:], PAUSE, "method=mean", f"seed={seed}", "hardware.threads=1")
            assert in_process(*arguments, f"hydra.run.dir={folder / seed}").code == 0
    return [state_of(folder / seed) for seed in "012"]


def logged(run: Path, step: int) -> bool:
    file = run / "metrics.csv"
    return file.is_file() and f"\n{step}," in file.read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_again_and_again(home, undisturbed, tmp_path):
    """A job, the server, the launcher while it imports and while it works; at last it is let be."""
    arguments = (*STUDY, PAUSE, f"hydra.sweep.dir={tmp_path}")
    begun = Started(home, *arguments)
    for victim, step in (("job", 2), ("server", 4), ("launcher", 0), ("launcher", 6)):
        while not (logged(tmp_path / "1", step) if step else len(begun.alive()) == 2):
            time.sleep(0.005)
        alive = begun.alive()
        os.kill({"launcher": alive[0], "server": alive[1], "job": alive[-1]}[victim], signal.SIGKILL)
        if victim == "launcher":  # at once: the new one waits until the jobs of the old one have ended
            killed, begun = begun, Started(home, *arguments)
            assert killed.end().code == -9
        else:
            outcome = begun.end()
            assert outcome.code == 1
            assert re.match(
                r"error: job 1 \(seed=1\): killed by SIGKILL; see .*\nerror: 1 of 3 jobs failed", outcome.err
            )
            assert [state_of(tmp_path / number) for number in "02"] == undisturbed[::2]  # the others were done
            begun = Started(home, *arguments)
    done = begun.end()
    assert done.code == 0, done.err
    assert [state_of(tmp_path / number) for number in "012"] == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_beside_another(home, undisturbed, tmp_path, number):
    """Two sweeps at once; one of them is ended, which the other doesn't notice."""
    both = [Started(home, *STUDY, PAUSE, f"hydra.sweep.dir={tmp_path / name}") for name in "ab"]
    both[0].until(lambda: logged(tmp_path / "a" / "1", 2))
    both[0].process.send_signal(number)
    start = time.monotonic()
    outcome = both[0].end()
    assert time.monotonic() - start < 8
    assert outcome.code == 130
    assert f"0 of 3 jobs are done; to go on: the same command, hydra.sweep.dir={tmp_path / 'a'}\n" in outcome.err
    assert "Traceback" not in outcome.err
    done = both[1].end()
    assert done.code == 0, done.err
    assert [state_of(tmp_path / "b" / job) for job in "012"] == undisturbed


# --- what is refused ---


def assert_refused(message: str, *arguments: str) -> None:
    outcome = in_process("-m", *arguments)
    assert outcome.code == 2
    assert re.match(rf"error: .*{message}", outcome.err), outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hydra.launcher.job=2", "hydra.launcher.job: no such option; did you mean hydra.launcher.jobs"),
        ("hydra.launcher.jobs=0", "hydra.launcher.jobs=0: give a whole number from 1"),
        ("hydra.launcher.jobs=many", "jobs.*many"),
        ("hydra.launcher.threads=0", "hydra.launcher.threads=0: give a whole number from 1"),
        ("hardware.nodes=2", "hardware.nodes=2: hydra/launcher=processes has this machine alone"),
        ("objective=metrics.image_auroc", "objective=metrics.image_auroc: .*the test set chooses nothing"),
        ("data.batch_size=0", "data.batch_size=0: give"),
        ("hydra.sweep.subdir=same", "hydra.sweep.subdir: two jobs share the folder same"),
    ],
)
def test_refused(argument, message, tmp_path):
    assert_refused(message, "method=mean", "seed=0,1", argument, f"hydra.sweep.dir={tmp_path}")
    assert not (tmp_path / "0").exists()


def test_more_gpus_than_there_are(tmp_path, monkeypatch):
    arguments = ("method=mean", "seed=0,1", "hardware=auto", f"hydra.sweep.dir={tmp_path}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert_refused("3 jobs at a time with 1 GPUs each, but 2 are visible", *arguments, "hydra.launcher.jobs=3")
    assert_refused("1 jobs at a time with 3 GPUs each, but 2", *arguments, "hydra.launcher.gpus_per_job=3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_refused("gpus_per_job=1: no GPU is visible", *arguments, "hydra.launcher.gpus_per_job=1")


def test_folder_of_another_sweep(tmp_path):
    done = (tmp_path / "sweep.json").write_text(
        json.dumps({"jobs": [{"number": 0, "folder": "0", "overrides": ["method=mean", "seed=7"]}]})
    )
    assert done
    assert_refused(
        "holds another sweep, with the job method=mean seed=7", "method=mean", "seed=0,1", f"hydra.sweep.dir={tmp_path}"
    )
    (tmp_path / "sweep.json").write_text("{")
    assert_refused("sweep.json: damaged", "method=mean", "seed=0,1", f"hydra.sweep.dir={tmp_path}")


def test_folder_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 0.1)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert_refused("another sweep works in it", "method=mean", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    os.close(held)
