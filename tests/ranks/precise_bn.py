"""PreciseBN: `main(world, [FOLDER])`, called by pool.py.

Rank r of world w writes FOLDER/w-r.pt: per case (the statistics re-estimated, float64 inputs of each layer in the
forwards that counted, dtypes of what was gathered); the test pools the inputs by itself.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.distributed.world import World
from dist_trainer.tricks import precise_bn
from dist_trainer.tricks.precise_bn import re_estimate

SIZES = [4, 7, 5, 6, 3]  # images of each micro-batch


class GlobalNorm(nn.SyncBatchNorm):
    """What SyncBatchNorm does where it can run, which is not here: all ranks' values normalise and fill the buffers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, x)
        variance, mean = torch.var_mean(torch.cat(parts), (0, 2, 3))
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        return (x - mean.reshape(-1, 1, 1)) / (variance.reshape(-1, 1, 1) + self.eps).sqrt()


def micro_batches() -> list[torch.Tensor]:
    """float32 [m, 3, 6, 6], drifting: each micro-batch has a mean of its own, three standard deviations further."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(m, 3, 6, 6, generator=generator) + 3 * number for number, m in enumerate(SIZES)]


def plain() -> nn.Module:
    """BatchNorm2d and BatchNorm1d, with dropout between them."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(),
        nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4),
    )  # fmt: skip


def synchronised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), GlobalNorm(6), nn.ReLU(), nn.Conv2d(6, 5, 3), GlobalNorm(5))


CASES = {"plain": (plain, 5), "ranks without a batch": (plain, 2), "synchronised": (synchronised, 5)}


gathered: list[str] = []
_all_gather = dist.all_gather


def watched_all_gather(parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
    gathered.append(str(tensor.dtype))
    _all_gather(parts, tensor)


def run(build: Any, num_slots: int) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]], list[str]]:
    """Slots are dealt to ranks in turn; a rank without one in the last round runs slot 0 again, uncounted."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model, slots = build(), micro_batches()[:num_slots]
    mine = [(slot, True) for slot in slots[rank::size]]
    mine += [(slots[0], False)] * (-(-num_slots // size) - len(mine))
    seen = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].double()))
    gathered.clear()
    state = re_estimate(model, iter(mine), model)
    return state, {name: inputs[: len(slots[rank::size])] for name, inputs in seen.items()}, [*gathered]


def exactly_pooled() -> torch.Tensor:
    """float64 [3, C]: n, mean, M2 of all slots, with exact sums."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model, slots = plain(), micro_batches()
    mine = [(slot, True) for slot in slots[rank::size]]
    mine += [(slots[0], False)] * (-(-len(slots) // size) - len(mine))
    totals = []

    class Pool(precise_bn._Pool):
        def over_ranks(self) -> Any:
            totals.append(self._total.clone())
            return super().over_ranks()

    former, precise_bn._Pool = precise_bn._Pool, Pool  # type: ignore[misc]
    try:
        re_estimate(model, iter(mine), model, is_exact=True)
    finally:
        precise_bn._Pool = former  # type: ignore[misc]
    (total,) = totals
    return total


def main(world: World, argv: list[str]) -> None:
    results: dict[str, Any] = {"exact": exactly_pooled()}
    dist.all_gather = watched_all_gather
    try:
        results |= {case: run(*what) for case, what in CASES.items()}
    finally:
        dist.all_gather = _all_gather
    torch.save(results, Path(argv[0]) / f"{world.size}-{world.rank}.pt")
