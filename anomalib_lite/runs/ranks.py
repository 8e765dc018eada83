"""Finds this process's rank in a run, and checks that the ranks can find each other. Imports no slow library."""

import os
from typing import Any

from anomalib_lite.errors import UserError


def is_first_on_node() -> bool:
    """Whether this process is the first rank of its machine, or will start the other ranks."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_first(hardware: dict[str, Any]) -> bool:
    """Whether this process is the run's rank 0, or will start the other ranks."""
    names = ("SLURM_PROCID",) if under_slurm(hardware) else ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def under_slurm(hardware: dict[str, Any]) -> bool:
    return hardware.get("ranks") == "slurm" and "SLURM_NTASKS" in os.environ


def _number(*names: str) -> int:
    """The value of the first environment variable in `names` that is set, or 1."""
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 1))


def slurm_tasks(hardware: dict[str, Any]) -> int:
    """The number of tasks that SLURM has started on each node.

    Raises:
        UserError: SLURM's number of nodes or tasks differs from the run's, which would wait forever for ranks.
    """
    tasks, nodes = _number("SLURM_NTASKS"), _number("SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    if hardware["nodes"] != nodes:
        raise UserError(f"hardware.nodes={hardware['nodes']}: SLURM has started {nodes}; give hardware.nodes={nodes}")
    wanted = tasks // nodes if hardware["devices"] == "auto" else hardware["devices"]
    if wanted * nodes != tasks:
        raise UserError(
            f"hardware.devices={hardware['devices']}: SLURM has started {tasks} tasks on {nodes} nodes, not one "
            f"per device; give sbatch --ntasks-per-node={wanted}, or change hardware.devices"
        )
    return wanted


def check(hardware: dict[str, Any], launcher: str | None) -> None:
    """Raise UserError if ranks would disturb each other or wait forever.

    Args:
        launcher: the launcher of a sweep whose jobs run in this process, or None.
    """
    devices, nodes = hardware["devices"], hardware["nodes"]
    several = nodes > 1 or devices not in ("auto", 1)
    if launcher and (several or hardware.get("ranks") == "slurm"):
        raise UserError(several_in_one_process(devices, launcher))
    started = _number("SLURM_NTASKS")
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if hardware.get("ranks") == "slurm":
        if "SLURM_NTASKS" not in os.environ or "SLURM_PROCID" not in os.environ:
            raise UserError(
                "hardware=slurm: SLURM has not started this process; start it with srun, sweep with "
                "-m hydra/launcher=submitit_slurm, or choose another hardware"
            )
        slurm_tasks(hardware)
    elif started > 1 and "SLURM_STEP_ID" in os.environ and not interactive and "RANK" not in os.environ:
        raise UserError(
            f"hardware: srun has started {started} of these processes, which would all do the same; add hardware=slurm"
        )
    elif nodes > 1 and not os.environ.keys() & {"MASTER_ADDR", "TORCHELASTIC_RUN_ID"}:
        raise UserError(
            f"hardware.nodes={nodes}: nothing says where the other machines are; use torchrun, or start the same "
            "command on every machine with MASTER_ADDR, MASTER_PORT and NODE_RANK set, or hardware=slurm"
        )


def several_in_one_process(devices: Any, launcher: str) -> str:
    """The error message for a sweep over several devices in one process."""
    return (
        f"hardware.devices={devices} in a sweep with hydra/launcher={launcher}: all jobs would share one set of ranks; "
        "use hydra/launcher=processes, the default, which starts every job in a process of its own"
    )
