"""Runs of the programs inside the test's own process, where torch is already imported: a run takes a second or less."""

import contextlib
import csv
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import seed_everything

ROOT = Path(__file__).resolve().parents[2]
#: a ResNet with a thirtieth of resnet18's weights: a run takes two thirds of the time
TINY = "backbone.name=test_resnet.r160_in1k"
#: a run on one CPU core or two in less than a second; later arguments override these
SMALL = (
    "hardware=cpu", "backbone=resnet18", TINY, "backbone.weights=none", "data.image_size=32", "data.batch_size=4",
    "trainer.max_epochs=1", "logger=csv", "hardware.measure_cost=false",
)  # fmt: skip
#: what methods need on images of 32 to 48 pixels with resnet18's three levels; their own settings are for large grids
NEEDS = {
    "ssae": ("method.width=4",),
    "recontrast": ("backbone.name=mobilenetv3_small_050",),  # a resnet18's decoder is 60 times as large
    "rd4ad": ("backbone.name=mobilenetv3_small_050", "data.drop_last=true"),
    "rlr": ("method.windows=[3,1,1]", "method.dims=[16,16,16]", "method.layers=1", "scoring.image_smooth=same"),
    "ltad": ("method.neighbours=1", "method.dim=16", "method.hidden=16", "scoring.image_smooth=same"),
    "dinomaly": ("method.groups=1", "method.blocks=4", "method.warm_up=2", "scoring.map_size=null"),
    "inp_former": ("method.groups=1", "method.blocks=4", "method.warm_up=2", "scoring.map_size=null"),
    "uniad": ("method.neighbours=1", "method.dim=16", "method.hidden=16", "scoring.image_smooth=same"),
}
#: what every run leaves in its folder, beside its figures
FILES = {
    ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "train.log", "checkpoints/last.ckpt",
    "checkpoints/config.json", "result.json", "scores.csv", "maps.npz", "metrics.csv",
}  # fmt: skip


@dataclass
class Outcome:
    """What a program left behind: its exit code and what it printed."""

    code: int
    out: str
    err: str


def method(name: str) -> list[str]:
    """The arguments that choose a method, for images of the tests' size."""
    return [f"method={name}", *NEEDS.get(name, ())]


def train(*arguments: str | Path, small: bool = True) -> Outcome:
    """`python -m anomalib_lite.train ARGUMENTS`, after those of SMALL that choose nothing else given here."""
    from anomalib_lite.train import main

    return run(main, *(defaults(*map(str, arguments)) if small else ()), *arguments)


def evaluate(*arguments: str | Path) -> Outcome:
    """`python -m anomalib_lite.evaluate ARGUMENTS`."""
    from anomalib_lite.evaluate import main

    return run(main, *arguments)


def predict(*arguments: str | Path) -> Outcome:
    """`python -m anomalib_lite.predict ARGUMENTS`."""
    from anomalib_lite.predict import main

    return run(main, *arguments)


def result_of(*arguments: str | Path, run_dir: Path) -> dict[str, Any]:
    """Train into `run_dir`, which must succeed, and give result.json."""
    outcome = train(*arguments, f"hydra.run.dir={run_dir}")
    assert outcome.code == 0, outcome.err
    return json.loads((run_dir / "result.json").read_text())


def succeeded(outcome: Outcome) -> Outcome:
    """The program has ended with exit code 0."""
    assert outcome.code == 0, outcome.err
    return outcome


def assert_refused(outcome: Outcome, pattern: str) -> None:
    """The program has printed one line, which matches, and ended with exit code 2."""
    assert outcome.code == 2, outcome
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome
    assert re.search(pattern, outcome.err), outcome.err
    assert "Traceback" not in outcome.out


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def scores_of(folder: Path, below: str = "") -> dict[str, float]:
    """The scores in scores.csv by their images' paths; of each path the part behind `below`."""
    rows = rows_of(folder / "scores.csv")
    return {row["path"].rpartition(below)[2] if below else row["path"]: float(row["score"]) for row in rows}


def files_of(run: Path) -> set[str]:
    """The files of a run's folder, by their paths in it."""
    return {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}


def build(cfg: dict[str, Any]) -> tuple[Any, Any]:
    """The data and the untrained method of a resolved configuration."""
    from anomalib_lite.runs import build

    seed_everything(cfg["seed"], workers=True, verbose=False)
    data = build.make_data(cfg)
    backbone = build.make_backbone(cfg)
    return data, build.make_method(cfg, backbone, data, data.categories, build.budget(cfg, data))


def folder_data(root: Path, category: str = "bottle") -> list[str]:
    """The arguments that read a category in the MVTec layout below `root`."""
    return ["data=folder", f"data.root={root}", f"data.category={category}"]


def defaults(*arguments: str) -> list[str]:
    """SMALL without the keys that are given: a sweep's `method=a,b` can't be given twice. A `backbone` has its name."""
    given = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    given |= {"backbone.name"} if "backbone" in given else set()
    return [small for small in SMALL if small.partition("=")[0] not in given]


def run(main: Any, *arguments: str | Path) -> Outcome:
    """A program's `main` with these arguments, in this process, which afterwards is as it was."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["program", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            code = 0 if end.code is None else end.code
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put back what a run changes in its process: environment, paths, random numbers, torch's and Hydra's settings."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton

    from anomalib_lite.runs import own_modules

    own_modules.digest.cache_clear()
    GlobalHydra.instance().clear()
    root = logging.getLogger()
    before = os.environ.copy(), Path.cwd(), list(sys.argv), list(sys.path)
    logs = list(root.handlers), root.level
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  those that a run seeds
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before[0])
        os.chdir(before[1])
        sys.argv, sys.path[:] = before[2], before[3]
        for handler in root.handlers:
            if handler not in logs[0]:
                handler.close()
        root.handlers[:], root.level = logs
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])  # noqa: NPY002
        torch.set_rng_state(numbers[2])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        GlobalHydra.instance().clear()
        Singleton._instances.pop(HydraConfig, None)


HOLD = """import pathlib, sys
from anomalib_lite.runs.claim import claimed
with claimed(pathlib.Path(sys.argv[1]), "x", sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(folder: Path, name: str = ".running") -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed the folder, which is made if it does not exist."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def python(*arguments: str | Path, cwd: Path | None = None, timeout: float = 120, **environment: str) -> Outcome:
    """`python ARGUMENTS` as a process of its own, with the checkout's package wherever it runs."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
