"""Gradients through the engine's reducer, in buckets of a few parameters: `main(world, [FOLDER])`.

Rank 0 writes FOLDER/M-W.safetensors, for steps of M micro-batches on W ranks: the gradients after two steps each.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dist_trainer.distributed.world import World
from dist_trainer.engine import exact
from dist_trainer.plan import BatchConfig, Duration, make_plan

NUM_SLOTS = (4, 12)


class Branches(nn.Module):
    """A parameter that nothing reaches, and a layer that one micro-batch alone reaches. The second step's gradients are
    so small that the grid of exact sums is felt.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.rare = nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(3))

    def loss(self, step: int, slot: int) -> torch.Tensor:
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + slot))
        for layer in self.layers:
            x = layer(x).tanh()
        if slot == 2:
            x = self.rare(x)
        return x.square().mean() * (1e-10 if step else 1.0)


def main(world: World, argv: list[str]) -> None:
    former, exact.BUCKET = exact.BUCKET, 80
    try:
        for num_slots in NUM_SLOTS:
            batch = BatchConfig(global_batch=num_slots, micro_batch=1)
            plan = make_plan(batch, Duration.parse("2step", "duration"), world=world.size, num_samples=num_slots)
            model = Branches()
            reducer = exact.ExactReducer(model.parameters(), plan, world)
            found = {}
            for step in range(2):
                for slot in plan.slots_of(world.rank):
                    reducer.backward(model.loss(step, slot) / num_slots)
                reducer.finish()
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    found[f"{step} {name}"] = parameter.grad.clone()
                    parameter.grad = None
            if world.is_main:
                save_file(found, Path(argv[0]) / f"{num_slots}-{world.size}.safetensors")
    finally:
        exact.BUCKET = former
