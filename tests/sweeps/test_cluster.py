"""Sweeps whose jobs run elsewhere: submitit and Ray on this machine, and submitit with a stand-in for SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import fake_slurm as slurm
from tests.helpers import run_programs as runs
from tests.helpers.interrupt import until
from tests.helpers.user_folder import SMALL, YAML, Started, assert_refused, in_process, result_of, state_of

SEEN = """
import os
import time
from sweep_methods import Mean


class Seen(Mean):
    def on_train_start(self):
        print(f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
        time.sleep(3)  # the other job must not begin after this one's end
"""
ONE = ("data.category=bottle", "hardware.threads=1")
LOCAL, SLURM, RAY = (f"hydra/launcher={name}" for name in ("submitit_local", "submitit_slurm", "ray"))


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory) -> list[Any]:
    """Single runs: on one device, and on two."""
    folder = tmp_path_factory.mktemp("alone")
    for devices in "12":
        arguments = (*SMALL, *ONE, "method=crash", f"hardware.devices={devices}", f"hydra.run.dir={folder / devices}")
        runs.succeeded(runs.python("-m", "anomalib_lite.train", *arguments, cwd=home))
    return [state_of(folder / devices) for devices in "12"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [LOCAL, RAY])
def test_jobs_elsewhere(launcher, home, alone, tmp_path):
    """One device and two, jobs that fail and jobs that don't; the second launch runs only the failed ones."""
    pytest.importorskip("ray" if launcher == RAY else "submitit")
    study = (*ONE, launcher, "method=crash", "method.how=no,exception", "hardware.devices=1,2")
    arguments = (*study, f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=2")
    first = Started(home, *arguments).end()
    assert first.code == 1
    assert len(re.findall(r"error: job [23] \(.*RuntimeError: as asked; see .*/[23]/output.log", first.err)) == 2
    assert "error: 2 of 4 jobs failed" in first.err
    assert "Traceback" not in first.err
    assert [state_of(tmp_path / number) for number in "01"] == alone
    jobs = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [job["folder"] for job in jobs] == ["0", "1", "2", "3"]
    times = [(tmp_path / number / "result.json").stat().st_mtime_ns for number in "01"]
    done = Started(home, *(a.replace("no,exception", "no") for a in arguments)).end()  # a part of it
    assert done.code == 0, done.err
    assert done.out.count("2 done before") == 2  # at the start and at the end
    assert times == [(tmp_path / number / "result.json").stat().st_mtime_ns for number in "01"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("launcher", [LOCAL, RAY])
def test_interrupted(launcher, home, tmp_path):
    """Ctrl-C ends the jobs; a launcher that is killed leaves submitit's, which the next launch waits for."""
    pytest.importorskip("ray" if launcher == RAY else "submitit")
    arguments = (*ONE, launcher, "method=mean", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=2")
    slow = (*arguments, "method.pause=0.2", "trainer.checkpoint_minutes=0", "trainer.log_every=1")
    for number in (signal.SIGINT, signal.SIGKILL):
        started = Started(home, *slow)
        until(lambda: all(len(list((tmp_path / job).glob("checkpoints/last.ckpt"))) for job in "01"))
        started.process.send_signal(number)
        if number == signal.SIGINT:
            outcome = started.end()
            assert outcome.code == 130
            assert "0 of 2 jobs are done; to continue" in outcome.err
        else:
            started.process.wait()
    done = Started(home, *slow).end()
    assert done.code == 0, done.err
    until(lambda: not started.alive())
    for seed in "01":
        single = (*ONE, "method=mean", f"seed={seed}", "method.pause=0.2", "trainer.checkpoint_minutes=0")
        assert in_process(*single, "trainer.log_every=1", f"hydra.run.dir={tmp_path / 'alone'}/{seed}").code == 0
        assert state_of(tmp_path / seed) == state_of(tmp_path / "alone" / seed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_slurm(home, alone, tmp_path, monkeypatch):
    """Through sbatch and srun, with SLURM's tasks as ranks: one task, and two."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", slurm.install(tmp_path / "slurm"))
    sweep = tmp_path / "sweep"
    study = (*ONE, SLURM, "hardware=slurm", "hardware.accelerator=cpu", "method=crash", "method.how=no,exception")
    arguments = (*study, "hardware.devices=1,2", f"hydra.sweep.dir={sweep}", "hydra.launcher.partition=part")
    small = [argument for argument in SMALL if argument != "hardware=cpu"]
    monkeypatch.setattr("tests.helpers.user_folder.SMALL", small)
    first = Started(home, *arguments).end()
    assert first.code == 1, first.err
    assert len(re.findall(r"error: job [23] \(.*RuntimeError: as asked; see .*/[23]/output.log", first.err)) == 2
    assert [state_of(sweep / number)[0] for number in "01"] == [state[0] for state in alone]
    assert [result_of(sweep / number)["metrics"] for number in "01"] == [state[1]["metrics"] for state in alone]
    asked = [file.read_text() for file in sorted((sweep / ".submitit").glob("*/*.sh"))]
    assert len(asked) == 4
    assert all("--partition=part" in text and "--mem=32GB" in text and "--time=720" in text for text in asked)
    assert sorted(re.findall(r"--ntasks-per-node=(\d)", "\n".join(asked))) == ["1", "1", "2", "2"]
    assert "gpus" not in "".join(asked)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_slurm_queues_a_job_again(home, tmp_path, monkeypatch):
    """Before the time limit SLURM signals the tasks: the job saves, is queued again, and continues."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", slurm.install(tmp_path / "slurm"))
    monkeypatch.setattr("tests.helpers.user_folder.SMALL", [a for a in SMALL if a != "hardware=cpu"])
    sweep, budget = tmp_path / "sweep", ("method=mean", "method.pause=0.5", "trainer.log_every=1", "seed=0")
    hardware = (SLURM, "hardware=slurm", "hardware.accelerator=cpu", "trainer.checkpoint_minutes=0")
    started = Started(home, *ONE, *hardware, *budget, f"hydra.sweep.dir={sweep}")
    until(lambda: (sweep / "0" / "checkpoints" / "last.ckpt").exists(), 120)
    subprocess.run([tmp_path / "slurm" / "scancel", "--signal=USR2", "1000"], check=True)
    runs.succeeded(started.end())
    output = (sweep / "0" / "output.log").read_text()
    assert "interrupted by SIGTERM" in output  # not by its own USR2, which reached the task alone
    assert re.search(r"resuming after batch [1-9]", output)
    single = (*ONE, *budget, "hardware=cpu", f"hydra.run.dir={tmp_path / 'alone'}")
    assert in_process(*single).code == 0
    assert state_of(sweep / "0")[::2] == state_of(tmp_path / "alone")[::2]


@pytest.mark.slow
def test_ray_hands_each_job_its_own_gpu(home, tmp_path):
    """Two GPUs are pretended; with hardware=auto each of two jobs at a time reserves one."""
    pytest.importorskip("ray")
    (home / "seen_methods.py").write_text(SEEN)
    (home / "my_conf" / "method" / "seen.yaml").write_text(YAML.format("Seen", "pause: 0.0").replace("sweep_", "seen_"))
    small = (*(a for a in SMALL if a != "hardware=cpu"), "hardware=auto")
    arguments = (*ONE, RAY, "method=seen", "seed=0,1", "+hydra.launcher.init.num_gpus=2", f"hydra.sweep.dir={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.user_folder.SMALL", small)
        outcome = Started(home, *arguments, "hydra.launcher.jobs=2").end()
    assert outcome.code == 0, outcome.err
    found = {re.search(r"CUDA_VISIBLE_DEVICES=(\S*)", (tmp_path / n / "output.log").read_text())[1] for n in "01"}  # type: ignore[index]
    assert found == {"0", "1"}


# --- what is refused before anything starts ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOCAL, "+hydra.launcher.partition=a"), "hydra.launcher.partition: no such option of submitit_local"),
        ((LOCAL, "hydra.launcher.timeout_min=x"), "hydra.launcher.timeout_min=x: give a whole number from 1"),
        ((SLURM, "hardware.devices=2"), "hardware.devices=2 .*submitit_slurm: add hardware=slurm"),
        ((SLURM, "hydra.launcher.nodes=2"), "hydra.launcher.nodes: no such option; "),
        (("hydra/launcher=basic", "hardware=slurm"), "hardware.devices=auto in a sweep with hydra/launcher=basic"),
        (("hydra/launcher=basic", "hardware=ddp", "hardware.nodes=2"), "in a sweep with hydra/launcher=basic"),
    ],
)
def test_refused(arguments, message, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    pytest.importorskip("ray")
    if any(argument.startswith("hardware=") for argument in arguments):
        monkeypatch.setattr("tests.helpers.user_folder.SMALL", [a for a in SMALL if a != "hardware=cpu"])
    assert_refused(message, "method=mean", "seed=0", *arguments, f"hydra.sweep.dir={tmp_path}")
    assert not (tmp_path / "0" / "checkpoints").exists()


def test_slurm_without_slurm(tmp_path):
    pytest.importorskip("submitit")
    message = "hydra/launcher=submitit_slurm: no sbatch and srun here; start the sweep on a node"
    assert_refused(message, SLURM, "method=mean", "seed=0", f"hydra.sweep.dir={tmp_path}")


@pytest.mark.parametrize(("launcher", "package"), [(LOCAL, "submitit"), (SLURM, "submitit"), (RAY, "ray")])
def test_missing_extra(launcher, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{launcher}: the package {package} is missing; pip install 'anomalib-lite\[sweep\]'"
    assert_refused(message, launcher, "method=mean", "seed=0", f"hydra.sweep.dir={tmp_path}")


@pytest.mark.parametrize(
    ("hardware", "environment", "message"),
    [
        ("hardware=slurm", {}, "hardware=slurm: SLURM has not started this process; start it with srun"),
        (
            "hardware=slurm hardware.devices=3",
            {"SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
            "hardware.devices=3: SLURM has started 4 tasks on 1 nodes",
        ),
        (
            "hardware=slurm",
            {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
            "hardware.nodes=1: SLURM has started 2; give hardware.nodes=2",
        ),
        (
            "hardware=cpu",
            {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"},
            "hardware: srun has started 2 of these processes, which would all do the same; add hardware=slurm",
        ),
        (
            "hardware=slurm",
            {"SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_PROCID": "0"},
            "hardware=slurm: SLURM has reserved 4 tasks, but this process is none of them; start it with srun",
        ),
        ("hardware=ddp hardware.nodes=2", {}, "hardware.nodes=2: nothing says where the other machines are"),
    ],
)
def test_ranks_that_would_run_wrong(hardware, environment, message, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = runs.train(*hardware.split(), "data=synthetic", f"hydra.run.dir={tmp_path / 'run'}")
    runs.assert_refused(outcome, f"^error: {message}")
    assert not (tmp_path / "run" / "checkpoints").exists()
