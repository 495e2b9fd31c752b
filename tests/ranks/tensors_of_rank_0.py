"""Rank 0's tensors on every rank: `main(world, [])` raises AssertionError where one has another value."""

import pytest
import torch

from dist_trainer.distributed import collectives
from dist_trainer.distributed.collectives import broadcast_tensors, read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError


def of_rank(rank: int) -> dict[str, torch.Tensor]:
    """Of every kind that a checkpoint may hold, among them sizes that leave the next one unaligned."""
    values = torch.arange(7) + 10 * rank
    kinds = (torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)
    found = {str(kind): values.to(kind) for kind in kinds}
    return found | {
        "scalar": torch.tensor(1.5 + rank),
        "none": torch.zeros(0, 3) + rank,
        "channels last": torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(rank)).to(
            memory_format=torch.channels_last
        ),
    }


def main(world: World, argv: list[str]) -> None:
    expected = of_rank(0)
    for size in (2**26, 16, 1):
        collectives.MESSAGE_BYTES = size
        mine = of_rank(world.rank)
        broadcast_tensors(world, mine.values())
        read = read_on_main(world, lambda: of_rank(0))
        for found in (mine, read):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert all(found[name].dtype == expected[name].dtype for name in expected)

    def fails() -> dict[str, torch.Tensor]:
        raise UserError("it is damaged")

    with pytest.raises(UserError, match="it is damaged"):
        read_on_main(world, fails)
    collectives.MESSAGE_BYTES = 2**26
