"""The part of gpu-check that measures: steps beside the limit by counting, inference, feature tables, PatchCore."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from anomalib_lite.methods.coreset import greedy_coreset
from anomalib_lite.methods.nearest import Bank
from anomalib_lite.metrics.functional import pixel_metrics
from anomalib_lite.runs import build
from anomalib_lite.runs.artifacts import read_result
from tests.helpers import run_programs as runs

WARM_UP, TIMED, PROFILED = 20, 80, 10  # steps


class Count(TorchDispatchMode):
    """FLOPs, and bytes read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        if not func.is_view:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


class Clock(L.Callback):
    """The time of training steps after a warm-up, the share of it in which kernels ran, and a counted step."""

    def __init__(self, small: bool):
        self.first = 2 if small else WARM_UP
        self.last = self.first + (2 if small else TIMED)
        self.steps, self.seconds, self.images, self.busy, self.kernels = 0, 0.0, 0, 0.0, 0.0
        self.started: Any = None
        self.profile: Any = None
        self.count = Count()

    @property
    def needed(self) -> int:
        return self.last + PROFILED + 1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.steps == self.last + PROFILED:
            self.count.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        if self.steps == self.first:
            self.started = now(module.device)
        elif self.steps == self.last:
            self.seconds = (now(module.device) - self.started) / (self.last - self.first)
            self.images = len(batch["index"])
            if module.device.type == "cuda":
                self.profile = profile(activities=[ProfilerActivity.CUDA]).__enter__()
            self.started = now(module.device)
        elif self.steps == self.last + PROFILED:
            taken = now(module.device) - self.started
            if self.profile:
                self.profile.__exit__(None, None, None)
                events = self.profile.key_averages()
                self.busy = sum(event.self_device_time_total for event in events) / 1e6 / taken  # from microseconds
                self.kernels = sum(event.count for event in events if event.self_device_time_total) / PROFILED
        elif self.steps == self.needed:
            self.count.__exit__(None, None, None)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(run: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """The median duration after a warm-up."""
    run()
    taken = []
    for _ in range(times):
        start = now(device)
        run()
        taken.append(now(device) - start)
    return float(np.median(taken))


#: a synthetic set that is drawn at once
FEW_IMAGES = (
    "+data.reader.size=64", "+data.reader.train=8", "+data.reader.good=2", "+data.reader.defective=1",
)  # fmt: skip


class Timings:
    """Rows of speed, each from one run with the published settings on drawn images of wood."""

    FEATURES = ("norm_occ", "uniad", "recontrast")
    PARTS = ("coreset of 5 % of 50,000 × 1,024", "search of 1,024 patches in 20,000 × 1,024", "metrics of 83 Mpx")

    def __init__(self, folder: Path, device: str, small: bool):
        self.folder, self.name, self.small = folder / "speed", device, small
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        self.flops_per_s, self.bytes_per_s = 1.0, 1.0

    def limits(self) -> str:
        """What the card gives to one large matrix product in bf16 and to one large copy."""
        side, size = (512, 2**20) if self.small else (8192, 2**30)
        a = torch.randn(side, side, device=self.device).bfloat16()
        b = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.flops_per_s = 2 * side**3 / median_seconds(lambda: a @ a, self.device)
        self.bytes_per_s = 2 * size / median_seconds(b.clone, self.device)
        return (
            f"One matrix product of {side}² in bf16 runs at {self.flops_per_s / 1e12:.3g} TFLOP/s, a copy at "
            f"{self.bytes_per_s / 1e12:.3g} TB/s: the limits below are those of a step's FLOPs and bytes at these "
            "rates. Bytes are those of every operation alone, so a fused step may be faster than this limit."
        )

    def run(self, method: str, name: str, *options: str) -> tuple[dict[str, Any], Clock]:
        """result.json and the clock of a run."""
        clock, made = Clock(self.small), build.make_trainer

        def make(hardware: Any, folder: Path, callbacks: list[Any], loggers: Any, steps: int) -> Any:
            return made(hardware, folder, [*callbacks, clock], loggers, steps)

        run = self.folder / f"{method}_{name}"
        sizes = (
            [*runs.SMALL[1:5], *runs.method(method)] if self.small else [f"method={method}", "backbone.weights=none"]
        )
        images = FEW_IMAGES if self.small else ()
        if method == "norm_occ":
            sizes.append("method.residual=null")  # by its own rule it ends after a few batches of random features
        if self.small and method in ("dinomaly", "inp_former"):
            sizes += ["backbone=dinov2_small", "backbone.name=test_vit", "backbone.layers=[1,2,3,4]", "method.groups=2"]
        elif method == "ssae":
            sizes = [*(["method=ssae", "method.width=4", "data.image_size=32"] if self.small else sizes[:1])]
        if method in ("recontrast", "rd4ad") and self.small:
            sizes.remove("backbone=resnet18")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "make_trainer", make)
            outcome = runs.train(
                *sizes, "data=synthetic", "data.category=wood", *images, f"hardware={self.name}", "logger=csv",
                "trainer.max_epochs=null", f"trainer.max_steps={clock.needed}", "trainer.log_every=1000",
                f"cache.folder={self.folder / 'cache'}", f"hydra.run.dir={run}", *options, small=False,
            )  # fmt: skip
        assert outcome.code == 0, outcome.err.strip().rpartition("\n")[2]
        return read_result(run), clock

    def row(self, method: str) -> dict[str, str]:
        if self.name == "gpu":
            torch.cuda.reset_peak_memory_stats()
        result, clock = self.run(method, "plain")
        timing, count = result["timing"], clock.count
        limit = max(count.flops / self.flops_per_s, count.bytes / self.bytes_per_s)
        trained = clock.seconds > 0
        return {
            "step, ms": f"{1000 * clock.seconds:.2f}" if trained else "no steps",
            "limit by counting, ms": f"{1000 * limit:.2f}" if trained else "",
            "GPU busy": f"{100 * clock.busy:.0f} %" if clock.busy else "",
            "kernels a step": f"{clock.kernels:.0f}" if clock.kernels else "",
            "GFLOP a step": f"{count.flops / 1e9:.1f}" if trained else "",
            "training, images/s": f"{clock.images / clock.seconds:.0f}" if trained else "",
            "test, images/s": f"{timing['images_per_s'] or 0:.0f}",
            "latency, ms": f"{timing['latency_ms'] or 0:.1f}",
            "peak, GiB": f"{timing['peak_memory_mb'].get('gpu', timing['peak_memory_mb']['host']) / 1024:.2f}",
        }

    def features(self, method: str) -> dict[str, str]:
        """Milliseconds a step by the place of the features."""
        places = {
            "table on the device": ("hardware.feature_gpu_gb=auto",),
            "rows of the cache": ("hardware.feature_gpu_gb=0",),
            "computed in each step": ("cache.enabled=false", "hardware.feature_memory_gb=0"),
        }
        found = {}
        for number, (place, options) in enumerate(places.items()):
            clock = self.run(method, f"features{number}", "hardware.measure_cost=false", *options)[1]
            found[place] = f"{1000 * clock.seconds:.2f}"
        return found

    def compiled(self, method: str) -> dict[str, str]:
        """A step with CUDA graphs, and how long the run took that made them."""
        started = time.perf_counter()
        clock = self.run(method, "compiled", "method.compile=true", "hardware.measure_cost=false")[1]
        return {
            "step, ms": f"{1000 * clock.seconds:.2f}",
            "GPU busy": f"{100 * clock.busy:.0f} %" if clock.busy else "",
            "the whole run, s": f"{time.perf_counter() - started:.0f}",
        }

    def part(self, name: str) -> dict[str, str]:
        scale = 100 if self.small else 1
        generator = torch.Generator().manual_seed(0)

        def points(count: int) -> Tensor:  # clusters, as patches have them
            centres = torch.randn(50, 1024, generator=generator)
            which = torch.randint(50, (count,), generator=generator)
            return (centres[which] + torch.randn(count, 1024, generator=generator) / 3).to(self.device)

        if name == self.PARTS[0]:
            x = points(50_000 // scale)
            start = now(self.device)
            greedy_coreset(x, len(x) // 20)
            return {"seconds": f"{now(self.device) - start:.2f}"}
        if name == self.PARTS[1]:
            x, owners = points(1_024), torch.zeros(20_000 // scale, dtype=torch.long, device=self.device)
            bank = Bank(points(len(owners)), owners)
            return {"seconds": f"{median_seconds(lambda: bank.nearest(x[None]), self.device):.4f}"}
        rng = np.random.default_rng(0)
        maps = rng.standard_normal((1280 // scale, 256, 256), dtype=np.float32)
        masks = np.zeros(maps.shape, bool)
        masks[::2, 100:140, 90:150] = True
        start = time.perf_counter()
        pixel_metrics(maps, masks)
        return {"seconds": f"{time.perf_counter() - start:.2f}"}
