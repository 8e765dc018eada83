"""How SLURM is asked about jobs, and what happens to jobs that it refuses."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from anomalib_lite.errors import UserError
from anomalib_lite.sweeps.command import Command
from anomalib_lite.sweeps.engines import LocalJobs, SlurmJobs
from anomalib_lite.sweeps.job import Job
from tests.helpers import fake_slurm as slurm

REFUSING = "#!/bin/sh\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\nexit 1\n"
ACCEPTING = "#!/bin/sh\necho Submitted batch job $$\n"


def test_slurm_is_asked_seldom(monkeypatch):
    engine: Any = object.__new__(SlurmJobs)
    asked, slept = list[int](), list[float]()
    handle = SimpleNamespace(watcher=SimpleNamespace(update=lambda: asked.append(1)), done=lambda: False)
    engine.running, engine.refused = dict.fromkeys(range(3), (handle, None)), []
    monkeypatch.setattr(time, "sleep", slept.append)
    for _ in range(3):
        engine.wait(1e-9 + (0 if slept else 0.01))
    assert len(asked) == 1
    assert set(slept) <= {5.0}
    assert slept


def test_slurm_refuses_jobs(tmp_path, monkeypatch, caplog, capsys):
    """They are submitted again while another job is in the queue; if there is none, the reason is an error."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", slurm.install(tmp_path / "slurm"))
    monkeypatch.setattr(LocalJobs, "wait", lambda *_: {})
    sbatch, jobs = tmp_path / "slurm" / "sbatch", list[Job]()
    options = {"max_num_timeout": 3, "signal_delay_s": 120}
    resources = {"package": submitit, "resources": lambda _: {"timeout_min": 1}}
    engine = SlurmJobs(SimpleNamespace(folder=tmp_path, options=options, gpus=[], **resources))
    engine.asked = math.inf  # sacct is not asked
    for number in range(3):
        jobs.append(Job(number, [], tmp_path / str(number), None, {}, 0, False))
        jobs[-1].start()
    sbatch.write_text(REFUSING)
    with pytest.raises(UserError, match=r"^hydra/launcher=submitit_slurm: sbatch: error: QOSMaxSubmitJobPerUserLimit$"):
        engine.start(jobs[0], Command([], jobs[0].folder, {}))
    for job in jobs:
        sbatch.write_text(REFUSING if job.number else ACCEPTING)
        engine.start(job, Command([], job.folder, {}))
    for script, tried, running in (
        (REFUSING, -math.inf, [0]),
        (ACCEPTING, math.inf, [0]),  # not at once
        (ACCEPTING, -math.inf, [0, 1, 2]),
    ):
        sbatch.write_text(script)
        engine.tried = tried
        assert engine.wait(0) == {}
        assert list(engine.running) == running
    assert engine.refused == []
    assert caplog.text.count("sbatch: error: QOSMaxSubmitJobPerUserLimit") == 1
    assert "sbatch" not in capsys.readouterr().err
    assert list((tmp_path / ".submitit").glob("*.pkl")) == []
