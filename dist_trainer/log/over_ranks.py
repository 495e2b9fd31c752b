"""What one line tells of all ranks: the largest memory, and the rank that the others wait for."""

import resource
from statistics import median

import torch

from dist_trainer.distributed.collectives import gather_json
from dist_trainer.distributed.world import World


def over_ranks(world: World, own_s: float, train_s: float) -> dict[str, float | int | None]:
    """Metrics (collective). `own_s`: seconds that this rank needed by itself, without waiting for others, of
    `train_s`; the ranks wait in each step for the one with the most."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in kB
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.max_memory_allocated(world.device) if on_gpu else 0
    seconds, hosts, devices = zip(*gather_json(world, [own_s, host, device]), strict=True)
    found: dict[str, float | int | None] = {"perf/memory_host": max(hosts)}
    if on_gpu:
        found["perf/memory_device"] = max(devices)
    if world.size > 1:
        found["perf/slowest_rank"] = seconds.index(max(seconds))
        found["perf/slowest_by"] = (max(seconds) - median(seconds)) / max(train_s, 1e-9)
    return found
