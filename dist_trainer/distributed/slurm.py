"""A step of Slurm with one task per rank and no torchrun: its rank, in the variables that torchrun would set."""

import contextlib
import os
import re
import socket
from collections.abc import MutableMapping

from dist_trainer.distributed.network import own_address, use_interface
from dist_trainer.errors import UserError


def describe_rank(environ: MutableMapping[str, str] = os.environ, *, at_terminal: bool | None = None) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task among several.

    What is set stays. Nothing is done where another launcher has given a rank, nor in a batch script, in the shell of
    an allocation, or in that of a step (`at_terminal`), whose SLURM_* variables describe no rank. Raises UserError for
    a heterogeneous job without MASTER_ADDR.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    has_rank = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= environ.keys()
    if tasks == 1 or "TORCHELASTIC_RUN_ID" in environ or has_rank:
        return
    if os.isatty(0) if at_terminal is None else at_terminal:
        return
    if "SLURM_HET_SIZE" in environ and "MASTER_ADDR" not in environ:
        raise UserError("a heterogeneous Slurm job: set MASTER_ADDR to the host of rank 0, and RANK, WORLD_SIZE too")
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", 0))
    on_nodes = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], str(tasks)
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["LOCAL_WORLD_SIZE"] = str(on_nodes[int(environ["SLURM_NODEID"])])
    environ.setdefault("MASTER_ADDR", _address_of_first(environ))
    environ.setdefault("MASTER_PORT", str(10000 + (job + 97 * step) % 20000))  # below the ephemeral ports
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores_per_task(environ))))
    with contextlib.suppress(OSError):  # the rendezvous will say that there is no way to it
        use_interface(own_address(environ["MASTER_ADDR"]), environ)


def is_task(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether `describe_rank` has given this process its rank."""
    return (
        "TORCHELASTIC_RUN_ID" not in environ
        and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        and environ.get("RANK") == environ.get("SLURM_PROCID")
        and environ.get("WORLD_SIZE") == environ.get("SLURM_STEP_NUM_TASKS")
    )


def cores_per_task(environ: MutableMapping[str, str] = os.environ) -> int:
    """A task's share of the cores that the job has on this node, whether Slurm binds it to them or not."""
    return int(environ["SLURM_CPUS_ON_NODE"]) // int(environ["LOCAL_WORLD_SIZE"])


def tasks_per_node(text: str) -> list[int]:
    """2,1(x2) -> [2, 1, 1]"""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first name in a list such as gpu[007-009,12],cpu3 or r[1-2]n[1-4]."""
    outside_brackets = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", outside_brackets)


def _address_of_first(environ: MutableMapping[str, str]) -> str:
    """Of the step's first node; where its name does not resolve, of the node on which srun was called."""
    host = first_host(environ["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host
