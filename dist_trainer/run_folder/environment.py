"""env.json: what ran, on which machine. Environment variables are left out: they hold secrets."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from typing import Any

import torch

from dist_trainer import __version__


def describe_environment(world_size: int) -> dict[str, Any]:
    """What env.json holds: command line, versions, host, devices, Slurm job, git revision."""
    packages = {"dist_trainer": __version__}
    for name in ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": packages,
        "host": socket.gethostname(),
        "world": world_size,
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "job": os.environ.get("SLURM_JOB_ID"),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The revision of the working folder, with `+` when files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
