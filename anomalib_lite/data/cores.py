"""How many CPU threads this process may use: on a shared machine fewer than the machine has cores."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """The smallest of the machine's cores, the affinity (taskset, SLURM) and the container's quota, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(affinity, os.cpu_count() or 1, quota()))


def threads() -> int:
    """`cores`, or OMP_NUM_THREADS where that is smaller. A run sets OMP_NUM_THREADS to hardware.threads."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of nested levels, as in 4,2
    return min(cores(), int(first)) if first.isdecimal() and int(first) else cores()


def quota() -> float:
    """The CPUs that the control groups of this process leave it, by `docker --cpus` or Kubernetes; inf without a limit.

    Version 2 has `cpu.max` ("QUOTA PERIOD" or "max PERIOD") in the process's group and in all above it; version 1 has
    `cpu.cfs_quota_us` (-1: no limit) and `cpu.cfs_period_us` in those of the controller `cpu`.
    """
    found = [math.inf]
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [CGROUPS / name for name in (controllers, "cpu")] if controllers else [CGROUPS, CGROUPS / "unified"]
        group = Path(path.lstrip("/"))
        for folder in (root / part for root in roots for part in (group, *group.parents)):
            limit, _, period = _read(folder / "cpu.max").partition(" ")
            if controllers:
                limit, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if limit.strip().isdigit() and period.strip().isdigit() and int(period):
                found.append(int(limit) / int(period))
    return min(share for share in found if share > 0)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
