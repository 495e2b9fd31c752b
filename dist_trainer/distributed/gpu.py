"""Which GPU is this rank's: from what its launcher says and what this process can see."""

import os
from collections.abc import Mapping

import torch

from dist_trainer.distributed.processes import launched_by_torchrun
from dist_trainer.errors import LocalError, plural

NOTHING = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU on purpose; the last is Slurm's."""


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This rank's number on its host, as torchrun or Slurm has it."""
    return int(environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")))


def own_gpu(visible: int, environ: Mapping[str, str] = os.environ) -> int:
    """The index of this rank's GPU among those that are `visible` to it, at least one. Raises LocalError."""
    number = local_rank(environ)
    if number < visible:
        return number
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"this host has {visible}" if mask is None else f"CUDA_VISIBLE_DEVICES={mask} shows {visible}"
    if launched_by_torchrun(environ):
        raise LocalError(f"local rank {number} has no GPU: {seen}. Paste: torchrun --nproc-per-node {visible}")
    if visible == 1:
        return 0  # a launcher of single tasks, such as srun --gpus-per-task=1, shows each its own
    raise LocalError(
        f"local rank {number} has no GPU: {seen}. Start {plural(visible, 'task')} per node, or show each task its own "
        "GPU (srun --gpus-per-task=1)"
    )


def check_hidden(environ: Mapping[str, str] = os.environ) -> None:
    """Where torch finds no GPU: raises LocalError if there should be one, instead of training on the CPU unasked."""
    mask = environ.get("CUDA_VISIBLE_DEVICES", "")
    if mask not in NOTHING:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise LocalError(
            f"CUDA_VISIBLE_DEVICES={mask}, and torch {torch.__version__}, {built}, finds no GPU: see what nvidia-smi "
            "says; CUDA_VISIBLE_DEVICES='' trains on the CPU"
        )
