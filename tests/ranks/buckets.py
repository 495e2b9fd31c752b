"""Gradients that DeepSpeed reduces in one bucket, and in many small ones: `main(world, [])`."""

import torch.distributed as dist
from optimizers import STEPS, Case, build_net

from dist_trainer.distributed.world import World
from dist_trainer.engine import zero
from dist_trainer.tricks.optimizers import OptimizerConfig


def main(world: World, argv: list[str]) -> None:
    one = zero.REDUCE_BUCKET
    for stage in (1, 2):
        found = []
        for bucket in (one, 200):  # of about 1,300 elements, the largest layer having 945
            zero.REDUCE_BUCKET = bucket
            case = Case(world, OptimizerConfig(args={"nesterov": True}), 0.1, [])
            engine = case.engine(f"zero{stage}", build_net([]))
            reduced: list[object] = []
            undo = []
            for name in ("reduce", "all_reduce"):
                own = getattr(dist, name)

                def counted(*args, own=own, reduced=reduced, **kwargs):  # type: ignore[no-untyped-def]
                    reduced.append(own)
                    return own(*args, **kwargs)

                setattr(dist, name, counted)
                undo.append((name, own))
            found.append((case.steps(engine, range(STEPS)), len(reduced)))
            for name, own in undo:
                setattr(dist, name, own)
            engine.close()
        (whole, few), (parts, many) = found
        if world.is_main:
            assert all((whole[name] == parts[name]).all() for name in whole), f"stage {stage}"
            assert many > few, f"stage {stage}: {few} and {many} collectives: the small buckets were not used"
    zero.REDUCE_BUCKET = one
