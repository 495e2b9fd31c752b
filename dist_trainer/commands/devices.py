"""Ranks on the devices of this machine, started by `train` itself where no launcher has started any."""

import os

import torch

from dist_trainer.commands import agent
from dist_trainer.commands.plan import stop_seconds
from dist_trainer.config.tree import TrainConfig
from dist_trainer.errors import UserError, plural
from dist_trainer.plan import check_world, largest_world


def ranks_to_start(config: TrainConfig, asked: int | None) -> int:
    """As many as `--devices` asks for; otherwise one per GPU, as far as the batch feeds them. 1: this process trains.

    Raises UserError for a number that cannot be.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "RANK" in os.environ:  # torchrun's, Slurm's, or set by hand
        if asked is not None:
            raise UserError(f"--devices: {asked}: a launcher has started the ranks, and RANK is set; leave one out")
        return 1
    if asked is None:
        return largest_world(config.batch, gpus) if gpus else 1
    if asked < 1:
        raise UserError(f"--devices: {asked} is no number of devices; write 1 or more")
    if gpus and asked > gpus:
        raise UserError(f"--devices: {asked}: this machine has {plural(gpus, 'GPU')}")
    check_world(config.batch, asked)
    return asked


def start_ranks(count: int, config: TrainConfig, argv: list[str]) -> int:
    """`train` with these arguments on `count` ranks of this machine, as launch/local.sh does it; its exit status."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(stop_seconds(config)))
    restarts = os.environ.get("MAX_RESTARTS", "0")
    launch = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", restarts, "-m", "dist_trainer"]
    return agent.command([*launch, "train", *_without_devices(argv)])


def _without_devices(argv: list[str]) -> list[str]:
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--devices":
            next(words, None)
        elif not word.startswith("--devices="):
            kept.append(word)
    return kept
