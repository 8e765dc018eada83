"""A user's folder with methods of three kinds, and sweeps over them that can be watched and killed."""

import contextlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import torch

from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import until
from tests.helpers.run_programs import Outcome

METHODS = '''
import os
import time
import torch
from anomalib_lite.errors import UserError
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
        if self.how == "missing" and not os.path.exists("marker"):
            raise UserError("marker: no such file")
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
SMALL = (
    "--config-dir=my_conf", "hardware=cpu", "hardware.measure_cost=false", "logger=csv", "data=folder",
    "data.root=data", "data.image_size=32",
)  # fmt: skip
FREE = {"timing", "environment", "overrides", "cache"}


def make_home(folder: Path) -> Path:
    """A user's folder: methods, their configurations, data."""
    (folder / "my_conf" / "method").mkdir(parents=True)
    (folder / "sweep_methods.py").write_text(METHODS)
    for name, options in (("Mean", "pause: 0.0"), ("Empty", ""), ("Crash", 'how: "no"')):
        (folder / "my_conf" / "method" / f"{name.lower()}.yaml").write_text(YAML.format(name, options))
    make_mvtec(folder / "data")
    make_mvtec(folder / "data", "cup")
    return folder


def in_process(*arguments: str | Path) -> Outcome:
    """For what is refused before any job begins, and for single runs."""
    return runs.train(*SMALL, *arguments, small=False)


class Started:
    """A sweep from the command line, which can be watched and killed."""

    def __init__(self, home: Path, *arguments: str, in_own_group: bool = False):
        self.mark = f"SWEEP_TEST={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "anomalib_lite.train", "-m", *SMALL, *arguments],
            cwd=home,
            env=os.environ | dict([self.mark.split("=")]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0 if in_own_group else None,
        )

    def alive(self) -> dict[int, str]:
        """Its processes with their roles: launcher, server, job, or another one."""
        parents, found = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    if self.mark.encode() in (folder / "environ").read_bytes():
                        state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
                        command = (folder / "cmdline").read_text()
                        if state != "Z":
                            parents[int(folder.name)] = int(parent), "multiprocessing.forkserver" in command
        for number, (parent_id, of_server) in parents.items():
            server = of_server and parent_id == self.process.pid
            role = "server" if server else "job" if of_server else "other"
            found[number] = "launcher" if number == self.process.pid else role
        return found

    def find(self, role: str) -> int | None:
        """The newest of its processes with that role."""
        return max((number for number, found in self.alive().items() if found == role), default=None)

    def end(self) -> Outcome:
        out, err = self.process.communicate(timeout=300)
        until(lambda: not self.alive(), 20)
        return Outcome(self.process.returncode, out, err)


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def state_of(run: Path) -> tuple[Any, ...]:
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    result = {key: value for key, value in result_of(run).items() if key not in FREE}
    files = [(run / name).read_bytes() for name in ("scores.csv", "metrics.csv")]
    return {name: tensor.tolist() for name, tensor in weights.items()}, result, files


def assert_refused(message: str, *arguments: str) -> None:
    runs.assert_refused(in_process("-m", *arguments), message)
