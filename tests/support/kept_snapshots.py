"""Snapshots of a made-up run, what should be kept of them, and what is on the disk."""

import hashlib
import json
import math
from pathlib import Path

import torch

from dist_trainer.run_folder.snapshots import INDEX, Snapshots
from dist_trainer.tensors import State


def bit_equal(one: State, other: State) -> bool:
    """Also the sign of zero, which == does not tell."""
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and torch.equal(one[key].reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8))
        for key in one
    )


def weights(step: int) -> State:
    return {"w": torch.full((3,), float(step)), "n": torch.tensor(step)}


def offer(kept: Snapshots, step: int, value: float) -> None:
    """As the run does: weights are gathered only when they would be taken."""
    if kept.would_take(value):
        kept.offer(step, value, weights(step))


def ranking(values: dict[int, float], top_k: int, larger: bool) -> list[int]:
    """The steps of the best, by sorting all: best first, of equal ones the older."""
    finite = [step for step in values if math.isfinite(values[step])]
    return sorted(finite, key=lambda step: (-values[step] if larger else values[step], step))[:top_k]


def steps(kept: Snapshots) -> list[int]:
    return [each.step for each in kept.best]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def names(of: list[int] | set[int]) -> set[str]:
    return {f"step_{step:08d}.safetensors" for step in of}


def assert_whole(folder: Path) -> None:
    """By json and hashlib alone: the index parses, and every file that it names has its size and digest."""
    if not (folder / INDEX).exists():
        return
    for each in json.loads((folder / INDEX).read_text())["snapshots"]:
        data = (folder / f"step_{each['step']:08d}.safetensors").read_bytes()
        assert len(data) == each["size"]
        assert hashlib.sha256(data).hexdigest() == each["sha256"]
