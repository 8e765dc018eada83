"""Finds this process's rank in a run, and checks that the ranks can find each other. Imports no slow library."""

import os
from typing import Any

from anomalib_lite.errors import UserError

#: what torchrun, Lightning and users set for a rank; PLACES say which rank of which machine a process is
PLACES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
INTERACTIVE_STEP = "4294967290"  # SLURM_STEP_ID of the shell that salloc opens on a node
VARIABLES = (*PLACES, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def settle(hardware: dict[str, Any]) -> bool:
    """Whether this process is the run's rank 0, or will start the other ranks.

    A shell, a container or a notebook may hold variables of another launcher: those that do not belong to this run are
    removed from the environment. A run on one device is rank 0, whatever they say.

    Raises:
        UserError: a launcher has started another number of ranks than the run has devices.
    """
    if under_slurm(hardware):
        _forget(*PLACES, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
        return os.environ["SLURM_PROCID"] == "0"
    nodes, devices = hardware["nodes"], _devices(hardware)
    if started_by_torchrun():
        if os.environ["WORLD_SIZE"] != str(nodes * devices):
            raise UserError(
                f"hardware.devices={hardware['devices']}: torchrun has started WORLD_SIZE={os.environ['WORLD_SIZE']} "
                f"ranks, but this run has {nodes * devices}; give hardware=ddp and one device per rank, or unset "
                "TORCHELASTIC_RUN_ID"
            )
        return os.environ["RANK"] == "0"
    _forget("TORCHELASTIC_RUN_ID")
    if nodes == 1:
        if devices == 1 or "LOCAL_RANK" not in os.environ:
            _forget(*VARIABLES)
            return True
        _forget("RANK", "NODE_RANK", "GROUP_RANK")
        local, world = os.environ["LOCAL_RANK"], os.environ.get("WORLD_SIZE", str(devices))
        if "MASTER_PORT" not in os.environ or local not in map(str, range(devices)) or world != str(devices):
            raise UserError(
                f"hardware.devices={devices}: the environment has LOCAL_RANK={local} of another launch (WORLD_SIZE and "
                "MASTER_PORT do not fit); unset LOCAL_RANK"
            )
    elif "NODE_RANK" in os.environ:
        _forget("RANK")
    return all(os.environ.get(name, "0") == "0" for name in PLACES)


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"))


def under_slurm(hardware: dict[str, Any]) -> bool:
    """Whether SLURM's tasks are the ranks of this run, and this process is one of them."""
    return hardware.get("ranks") == "slurm" and started_by_srun()


def started_by_srun() -> bool:
    """Whether SLURM has started this process as a task, or this process is alone.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but its other tasks do not exist until srun starts them. The
    shell of salloc or `srun --pty` has the variables of a step.
    """
    if not {"SLURM_NTASKS", "SLURM_PROCID"} <= os.environ.keys():
        return False
    return _number("SLURM_NTASKS") == 1 or ("SLURM_STEP_ID" in os.environ and not _is_shell())


def _is_shell() -> bool:
    """Whether a shell was started within SLURM: its variables speak of tasks that do not exist."""
    return (
        os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        or "SLURM_PTY_PORT" in os.environ
        or os.environ.get("SLURM_STEP_ID") == INTERACTIVE_STEP
    )


def slurm_port() -> int:
    """A port that all ranks of a job's step know, from 10000 to 29999; two steps of a job do not share one."""
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10000 + (31 * int(job or 0) + int(step or 0)) % 20000


def _devices(hardware: dict[str, Any]) -> int:
    """The number of devices on each machine."""
    if hardware["devices"] != "auto":
        return hardware["devices"]
    if hardware["accelerator"] == "cpu":
        return 1
    import torch  # the configuration is accepted: a run imports it anyway

    return max(1, torch.cuda.device_count())


def _forget(*names: str) -> None:
    for name in names:
        os.environ.pop(name, None)


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
    if hardware.get("ranks") == "slurm":
        if "SLURM_NTASKS" not in os.environ or "SLURM_PROCID" not in os.environ:
            raise UserError(
                "hardware=slurm: SLURM has not started this process; start it with srun, sweep with "
                "-m hydra/launcher=submitit_slurm, or choose another hardware"
            )
        if not started_by_srun():
            raise UserError(
                f"hardware=slurm: SLURM has reserved {started} tasks, but this process is none of them; start it with "
                "srun, as srun python -m anomalib_lite.train ... in the batch script"
            )
        slurm_tasks(hardware)
    elif started > 1 and "SLURM_STEP_ID" in os.environ and not _is_shell() and not started_by_torchrun():
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
