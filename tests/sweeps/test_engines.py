"""How jobs get their devices and their end, without a cluster."""

import errno
import fcntl
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from anomalib_lite.cli.keys import lookup
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME
from anomalib_lite.sweeps.cluster import LocalSweep, RaySweep, SlurmSweep
from anomalib_lite.sweeps.command import Command
from anomalib_lite.sweeps.engines import RayJobs
from anomalib_lite.sweeps.job import Job
from anomalib_lite.sweeps.sweep import Sweep

LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 1g.5gb     Device  0: (UUID: MIG-aaa)
  MIG 2g.10gb    Device  1: (UUID: MIG-bbb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4a2f)
"""
HARDWARE = {"accelerator": "auto", "devices": 1, "nodes": 1, "threads": None}


def made(kind: Any, gpus: list[str], folder: Path = Path(), **options: Any) -> Any:
    """A sweep without Hydra."""
    sweep = object.__new__(kind)
    sweep.options = {"jobs": None, "gpus_per_job": None, "threads": None, "jobs_per_gpu": 1} | options
    sweep.gpus, sweep.jobs_per_gpu, sweep.folder = gpus, sweep.options["jobs_per_gpu"], folder
    sweep.config = OmegaConf.create({"hydra": {"overrides": {"hydra": []}}})
    return sweep


# --- GPUs ---


@pytest.mark.parametrize(("listed", "names"), [(LISTED, ["MIG-aaa", "MIG-bbb", "1"]), ("", []), ("No devices\n", [])])
def test_gpus_and_their_parts(listed, names, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert made(Sweep, []).visible_gpus() == names


class Engine:
    """Jobs of which `running` go on at a time; the order of their ends is given."""

    def __init__(self, ends: list[int]):
        self.ends, self.running, self.started = ends, dict[int, list[str]](), dict[int, float]()
        self.seen, self.most = dict[int, list[str]](), dict[str, int]()

    def start(self, job: Job, command: Command) -> None:
        gpus = command.environment["CUDA_VISIBLE_DEVICES"].split(",")
        self.running[job.number] = self.seen[job.number] = gpus
        for gpu in gpus:
            self.most[gpu] = max(self.most.get(gpu, 0), sum(gpu in each for each in self.running.values()))

    def wait(self, seconds: float) -> dict[int, int]:
        number = next(n for n in self.ends if n in self.running)
        del self.running[number]
        return {number: 1}


@pytest.mark.parametrize(
    ("per_gpu", "per_job", "jobs", "most", "first"),
    [
        (1, 1, None, 1, [["4"], ["5"]]),
        (2, 1, None, 2, [["4"], ["5"], ["4"], ["5"]]),
        (3, 1, 2, 1, [["4"], ["5"]]),  # fewer jobs than slots: the GPU with the fewest jobs is next
        (2, 2, None, 2, [["4", "5"], ["4", "5"]]),
    ],
)
def test_jobs_share_gpus_evenly(per_gpu, per_job, jobs, most, first, tmp_path):
    sweep = made(Sweep, ["4", "5"], tmp_path, jobs_per_gpu=per_gpu, gpus_per_job=per_job, jobs=jobs)
    assert sweep.devices(HARDWARE)[0] == per_job
    sweep.engine = Engine([1, 0, *range(2, 9)])
    given = [
        Job(n, [f"seed={n}"], tmp_path / str(n), None, {"hardware": HARDWARE, "objective": None}, per_job, False)
        for n in range(9)
    ]
    sweep.run(given)
    assert [job.state for job in given] == ["failed"] * 9
    assert list(sweep.engine.most.values()) == [most, most]
    assert [sweep.engine.seen[n] for n in range(len(first))] == first


@pytest.mark.parametrize(
    ("visible", "options", "message"),
    [
        ("4,5", {"jobs": 3}, "3 jobs at a time with 1 GPUs each, but 2 are visible"),
        ("4,5", {"gpus_per_job": 3}, "1 jobs at a time with 3 GPUs each, but 2"),
        ("4,5", {"jobs": 5, "jobs_per_gpu": 2}, "5 jobs at a time"),
        ("4,5", {"gpus_per_job": 0}, "gpus_per_job=0: all jobs would use GPU 0"),
        ("", {"gpus_per_job": 1}, "gpus_per_job=1: no GPU is visible"),
    ],
)
def test_more_jobs_than_gpus(visible, options, message, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sweep = made(Sweep, [], **options)
    sweep.gpus = sweep.visible_gpus()
    with pytest.raises(UserError, match=message):
        sweep.devices(HARDWARE)


@pytest.mark.parametrize("option", ["jobs", "jobs_per_gpu", "threads"])
def test_numbers_of_a_launcher(option):
    with pytest.raises(UserError, match=f"hydra.launcher.{option}=0: give a whole number from 1, or null"):
        Sweep({option: 0}, None, None)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Sweep, {"nodes": 2}, "hardware.nodes=2: hydra/launcher=processes runs a job on one machine alone; choose"),
        (LocalSweep, {"nodes": 2}, "hardware.nodes=2: hydra/launcher=submitit_local runs a job on one machine"),
        (RaySweep, {"nodes": 2}, "hardware.nodes=2: hydra/launcher=ray runs a job on one machine"),
        (Sweep, {"ranks": "slurm"}, "hardware=slurm with hydra/launcher=processes: SLURM starts these ranks; choose"),
        (
            LocalSweep,
            {"ranks": "slurm"},
            "hardware=slurm with hydra/launcher=submitit_local: .* hydra/launcher=submitit_slurm",
        ),
        (RaySweep, {"devices": "auto"}, "hardware.devices=auto with hydra/launcher=ray: give a number"),
    ],
)
def test_hardware_that_a_launcher_does_not_have(kind, changes, message):
    with pytest.raises(UserError, match=message):
        made(kind, []).devices(HARDWARE | changes)


@pytest.mark.parametrize(
    ("accelerator", "devices", "given", "in_cluster", "gpus"),
    [("auto", 1, None, 2, 1), ("auto", 2, None, 2, 2), ("auto", 1, None, 0, 0), ("gpu", 1, None, 0, 1),
     ("cpu", 1, None, 2, 0), ("auto", 1, 0, 2, 0)],
)  # fmt: skip
def test_what_ray_reserves(accelerator, devices, given, in_cluster, gpus):
    sweep = made(RaySweep, [], gpus_per_job=given, cpus_per_job=1, remote={})
    sweep.package = SimpleNamespace(cluster_resources=lambda: {"GPU": in_cluster} if in_cluster else {"CPU": 8.0})
    job: Any = SimpleNamespace(plain={"hardware": {"accelerator": accelerator, "devices": devices, "nodes": 1}})
    assert sweep.resources(job)["num_gpus"] == gpus


@pytest.mark.parametrize(
    ("launcher", "option"),
    [("ray", "remote"), ("ray", "init.runtime_env"), ("submitit_slurm", "additional_parameters")],
)
def test_nested_options_are_plain(launcher, option):
    """Ray refuses OmegaConf's dicts."""
    overrides = [f"hydra/launcher={launcher}", f"++hydra.launcher.{option}={{resources: {{big: 1}}}}"]
    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    found = lookup(instantiate(cfg.hydra.launcher).options, option)
    assert (type(found["resources"]), found["resources"]) == (dict, {"big": 1})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("none found"), r"init.address=auto: no Ray cluster answers \(none found\); start one with"),
        (ValueError("num_cpus must not be provided"), "init: num_cpus must not be provided"),
    ],
)
def test_ray_does_not_start(error, message):
    """A ConnectionError is an OSError: it would be reported as an error of the results' folder."""

    def fail(**_: Any) -> None:
        raise error

    sweep = made(RaySweep, [], init={"address": "auto"})
    sweep.package = SimpleNamespace(is_initialized=lambda: False, init=fail)
    with pytest.raises(UserError, match=f"^hydra.launcher.{message}"):
        RayJobs(sweep)


# --- SLURM ---


@pytest.mark.parametrize(("cpus", "expected"), [(6, ["--cpus-per-task=6"]), (None, [])])
def test_what_srun_is_given(cpus, expected):
    arguments = made(SlurmSweep, [], cpus_per_task=cpus).srun_arguments()
    assert arguments == ["--kill-on-bad-exit=1", "--wait=0", *expected]


SAVING = """#!/bin/sh
trap 'sleep 0.3; echo saved > {file}; exit 143' TERM
touch {file}.started
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("name", ["checkpoint", "__submitit_checkpoint__"])
def test_a_job_saves_before_it_is_queued_again(name, tmp_path, monkeypatch):
    """As submitit calls it: in the handler of SIGUSR2, while the process is waited for."""
    pytest.importorskip("submitit")
    program, file = tmp_path / "program", tmp_path / "state"
    program.write_text(SAVING.format(file=file))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    command = replace(Command([], tmp_path / "job", {}), grace=20.0)
    found = []

    def requeue(*_: Any) -> None:
        delayed = getattr(command, name)()
        found.append((file.read_text(), pickle.loads(pickle.dumps(delayed)).function))
        raise SystemExit(255)

    def send() -> None:
        while not (tmp_path / "state.started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        threading.Thread(target=send).start()
        start = time.monotonic()
        with pytest.raises(SystemExit):
            command()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert time.monotonic() - start < 15  # not the whole grace
    assert found == [("saved\n", command)]
    assert found[0][1].process is None


def test_a_job_starts_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Command([], tmp_path / "job", {}).sole_output() as output:
        output.write(b"started")
    first, second = (tmp_path / "job" / "output.log").read_text().splitlines()
    assert f"{tmp_path}/job: this file system has no locks (No locks available); the job starts at once" in first
    assert second == "started"
