"""The part of gpu-check that asks whether the device computes what the CPU computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomalib_lite.runs import devices
from anomalib_lite.runs import run as one_run
from anomalib_lite.runs.artifacts import read_result
from anomalib_lite.runs.load import load_run
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import assert_same_run, interrupted_after

SIDE = 64
TOLERANCE = 1e-3  # of the range of the CPU's map: float32 sums in another order, through a few layers
CLOSED = ("norm_occ_closed_form", "patchcore", "padim", "rad", "subspace_ad")  # methods without training steps
VIT = ("dinomaly", "inp_former")
#: methods with method.compile, and what makes their random numbers independent of a recording
COMPILED = {"uniad": ["method.dropout=0"], "rlr": [], "ssae": [], "recontrast": [], "ltad": ["method.dropout=0"]}


class Checks:
    """Each method on tiny images: on the CPU, on the device, twice, interrupted, and in bf16."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder / "correct", device
        self.root = self.folder / "images"
        make_mvtec(self.root, "bottle", train=8, good=2, defects={"broken": 2})

    def train(
        self, method: str, name: str, *options: str, device: str | None = None, steps: int = 4, start: Any = None
    ) -> Path:
        """A run of a few steps; its folder. `start` runs the program with these arguments, by default here."""
        run = self.folder / f"{method}_{name}"
        known = [] if method in CLOSED else ["trainer.max_epochs=null", f"trainer.max_steps={steps}"]
        small = [runs.TINY] if self.device == "cpu" else []  # there the script itself is tried
        backbone = ["backbone=resnet18", "backbone.weights=none", *small]
        if method in VIT:
            backbone = ["backbone=dinov2_small", "backbone.name=test_vit", "backbone.layers=[1,2,3,4]", backbone[1]]
        chosen = [option for option in runs.method(method) if option != "method.groups=1" or method not in VIT]
        outcome = (start or runs.train)(
            *chosen, *runs.folder_data(self.root), *[x for x in backbone if method not in ("recontrast", "rd4ad")],
            *known, f"hardware={device or self.device}",
            f"data.image_size={SIDE}", "data.batch_size=4", "trainer.log_every=1", "trainer.checkpoint_minutes=0",
            "hardware.precision=32", "cache.enabled=false", f"hydra.run.dir={run}", *options,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err.strip().rpartition("\n")[2]
        return run

    def row(self, method: str) -> dict[str, str]:
        cells = {f"maps, CPU against {self.device}": self.maps(method)}
        exact = "hardware.deterministic=true"
        first = self.train(method, "first", exact)
        cells["two runs"] = verdict(lambda: assert_same_run(self.train(method, "second", exact), first))
        cells["resumed"] = "" if method in CLOSED else verdict(lambda: self.resumed(method, first, exact))
        compiled = method in COMPILED and self.device == "gpu"  # on a CPU it would call a compiler for minutes
        cells["CUDA graphs"] = verdict(lambda: self.compiled(method, exact)) if compiled else ""
        result = read_result(self.train(method, "bf16", "hardware.precision=bf16"))
        cells["bf16, image AUROC"] = f"{result['metrics']['image_auroc']:.3f}"
        return cells

    def maps(self, method: str) -> str:
        """The largest difference between the maps of one set of weights, relative to the range of the CPU's maps."""
        run = self.train(method, "cpu", device="cpu")
        images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
        scores, maps = zip(
            *(load_run(run, device=device).predict(list(images)) for device in ("cpu", self.device)), strict=True
        )
        span = max(float(np.ptp(x)) for x in maps[0]) or 1.0
        apart = max(float(np.abs(a - b).max()) for a, b in zip(*maps, strict=True)) / span
        apart = max(apart, float((np.abs(scores[0] - scores[1]) / np.abs(scores[0]).clip(1e-12)).max()))
        return f"{apart:.1e}" if apart <= TOLERANCE else "FAILED"

    def resumed(self, method: str, expected: Path, *options: str) -> None:
        with interrupted_after(2):
            self.train(method, "cut", *options)
        assert_same_run(self.train(method, "cut", *options, "resume=true"), expected)

    def compiled(self, method: str, *options: str) -> None:
        """Graphs replay the same kernels on the same random numbers, but for those of dropout."""
        plain = self.train(method, "no_graph", *COMPILED[method], *options)
        assert_close(self.train(method, "graph", "method.compile=true", *COMPILED[method], *options), plain)

    def ranks(self, method: str) -> dict[str, str]:
        """One rank that synchronises with itself by NCCL (gloo on a CPU), and all cards of the machine."""
        plain = self.train(method, "plain")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one_run, "lightning_options", with_ddp)
            one = self.train(method, "ddp")
        torch.distributed.destroy_process_group()
        cells = {"DDP of one rank": verdict(lambda: assert_close(one, plain))}
        count = torch.cuda.device_count() if self.device == "gpu" else 0
        cells["all cards"] = "one card" if self.device == "gpu" else "no card"
        if count > 1:
            several = ("hardware=ddp", "hardware.devices=4" if count >= 4 else "hardware.devices=2")
            trained = self.train(method, "several", *several, start=in_own_process)
            cells["all cards"] = verdict(lambda: assert_close(trained, plain))
        return cells


def in_own_process(*arguments: str) -> runs.Outcome:
    """The training program. Lightning starts the other ranks with the command of the process that it runs in."""
    return runs.python("-m", "anomalib_lite.train", *runs.defaults(*arguments), *arguments, cwd=runs.ROOT)


def with_ddp(hardware: dict[str, Any], multirun: bool) -> dict[str, Any]:
    options = devices.lightning_options(hardware, multirun)
    backend = "gloo" if options["accelerator"] == "cpu" else "nccl"
    return options | {"strategy": devices.DDP(process_group_backend=backend)}


def assert_close(found: Path, expected: Path) -> None:
    """The same weights up to the order of sums."""
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (found, expected))
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=1e-2, atol=1e-4)


def verdict(check: Any) -> str:
    try:
        check()
    except AssertionError:
        return "FAILED"
    return "equal"
