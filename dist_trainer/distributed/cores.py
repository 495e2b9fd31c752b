"""The cores of this process: what its affinity and its container's quota leave of the machine's. No torch here."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cores(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may use: 1 or more.

    Slurm binds a job to some (its affinity); Docker's --cpus and Kubernetes' limits are a quota of time per period,
    which no mask shows: cpu.max of cgroup v2, cpu.cfs_quota_us of v1, of the group and of those above it.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([mask, *map(math.ceil, _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """In cores, where there are limits."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        group = root / path.lstrip("/")
        # In a container the group's own path may lie outside what is mounted there; its root is then the group.
        for folder in [group, *(each for each in group.parents if each.is_relative_to(root)), root]:
            quota = _of_version_1(folder) if controllers else _of_version_2(folder)
            found += [] if quota is None else [quota]
    return found


def _of_version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _of_version_1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
