"""Turns the `hardware` group of the configuration into arguments of Lightning's Trainer."""

import contextlib
import os
import platform
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from anomalib_lite.data import cores
from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import has_bf16
from anomalib_lite.methods.batch_norm import synchronise
from anomalib_lite.runs import ranks

#: OMP_NUM_THREADS as it was given, and as a run of this process has set it
_own: tuple[str | None, str] | None = None


class DDP(DDPStrategy):
    """Lightning's strategy with batch norm synchronised over all devices.

    A method without trainable weights is not wrapped, because it has no gradients to exchange. A method says whether a
    step may leave some weights unused (`unused_parameters`); one with several phases does. Buffers are not sent from
    rank 0 before every step: synchronised batch norms keep theirs equal, and the others are constants.
    """

    def configure_ddp(self) -> None:
        if any(p.requires_grad for p in self.model.parameters()):  # type: ignore[union-attr]
            self.model = synchronise(self.model, self.root_device)  # type: ignore[arg-type]
            method: Any = self.lightning_module
            unused = method.unused_parameters or method.phases > 1
            options = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "find_unused_parameters": unused}
            self._ddp_kwargs.update(options)
            super().configure_ddp()


def lightning_options(hardware: dict[str, Any], multirun: bool) -> dict[str, Any]:
    """Return a Trainer's options (accelerator, devices, num_nodes, strategy, precision, ...) and set the CPU threads.

    Raises:
        UserError: there is no GPU, it can't be used, there are fewer GPUs than requested, or jobs with several devices
            share a process.
    """
    gpus = torch.cuda.device_count()
    accelerator = hardware["accelerator"]
    if accelerator == "gpu" and not gpus:
        raise UserError("hardware.accelerator=gpu: no GPU is visible here; choose hardware=cpu or hardware=auto")
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    devices = hardware["devices"]
    slurm = ranks.under_slurm(hardware)  # False without SLURM, as in evaluate: this process is then the only one
    if slurm:
        devices = ranks.slurm_tasks(hardware)
    elif devices == "auto":
        devices = gpus if accelerator == "gpu" else 1
    if accelerator == "gpu" and devices > gpus:
        raise UserError(f"hardware.devices={devices}: only {gpus} GPUs are visible here; give a smaller number")
    if accelerator == "gpu":
        check_gpu(hardware["precision"], "hardware.precision", "hardware=cpu")
    several = devices * hardware["nodes"] > 1
    if several and multirun:
        raise UserError(ranks.several_in_one_process(devices, "basic"))
    set_threads(hardware["threads"], most_threads(accelerator, devices, slurm))
    allow_tf32(False)
    precision = "bf16-mixed" if hardware["precision"] == "bf16" else "32-true"
    # not Lightning's half an hour: rank 0 may need longer to pick a large coreset, while the others wait
    group: dict[str, Any] = {
        "process_group_backend": "gloo" if accelerator == "cpu" else None,
        "timeout": timedelta(days=1),
    }
    strategy: Any = DDP(**group) if several else "auto"
    environment: dict[str, Any] = {}
    if slurm:
        environment["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # submitit queues a job again
        os.environ.setdefault("MASTER_PORT", str(ranks.slurm_port()))
    elif not several or ("SLURM_NTASKS" in os.environ and not ranks.started_by_torchrun()):
        environment["plugins"] = [LightningEnvironment()]  # otherwise Lightning treats tasks of a cluster as ranks
    if not several:
        # it was set at the import, from the environment
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    return {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": hardware["nodes"],
        "strategy": strategy,
        "precision": precision,
        **determinism(hardware.get("deterministic", "auto"), accelerator),
        **environment,
    }


def check_gpu(precision: str | int, option: str, cpu: str) -> None:
    """Raise UserError unless PyTorch can use the GPU, in bf16 if `precision` is.

    Args:
        option, cpu: the program's option for the precision, and the one that chooses the CPU.
    """
    try:
        torch.cuda.init()  # the driver counts GPUs that it is too old for
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the GPU can't be used ({reason}); update its driver, or choose {cpu}") from error
    if precision == "bf16" and not has_bf16(torch.device("cuda")):
        raise UserError(f"{option}=bf16: this GPU does not compute in bf16; choose auto or 32")


def determinism(wanted: bool | str, accelerator: str) -> dict[str, Any]:
    """The Trainer's options for hardware.deterministic.

    "auto" is deterministic on a CPU, where it costs nothing, and warns of operations that can't be. On a GPU it is not:
    cuDNN then chooses the fastest convolutions by trying them. With True an operation that can't be raises an error.
    """
    if wanted == "auto":
        wanted = "warn" if accelerator == "cpu" else False
    return {"deterministic": wanted, "benchmark": accelerator != "cpu" and not wanted}


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products to 10 bits (TF32), in matrix products and convolutions.

    It does so only while a method trains, unless hardware.precision=32: see `callbacks.Training`. Features, closed
    forms and scores are computed in full float32, whatever the environment asks for (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def most_threads(accelerator: str, devices: int, slurm: bool) -> int:
    """How many CPU threads a process takes at most: beside a GPU a rank's share of the cores, up to 16.

    CPU ranks do not share the cores: with another number of threads a network's output may differ in its last bit.
    """
    if accelerator == "cpu":
        return cores.cores()
    share = int(os.environ.get("SLURM_CPUS_PER_TASK") or 0) if slurm else 0
    return max(1, min(16, share or cores.cores() // devices))


def set_threads(wanted: int | None, most: int) -> None:
    """Set the CPU threads of this process, and OMP_NUM_THREADS for what it starts: `wanted`, else `cores.threads`."""
    global _own
    given = os.environ.get("OMP_NUM_THREADS")
    if _own and given == _own[1]:  # the value that an earlier run of this process has set
        os.environ.pop("OMP_NUM_THREADS")
        given = _own[0]
        os.environ |= {"OMP_NUM_THREADS": given} if given else {}
    number = wanted or min(most, cores.threads())
    torch.set_num_threads(number)
    cv2.setNumThreads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)  # otherwise Lightning sets a different number
    _own = given, str(number)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def peak_memory_mb() -> dict[str, float]:
    """Peak memory of this process in MiB, and of its GPU if it has one."""
    peak = {"host": peak_resident() / 2**20}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def peak_resident() -> int:
    """Peak of this process's resident memory in bytes. Linux gives ru_maxrss the peak of the process that started this
    one if that is larger, so /proc is read where it exists."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
