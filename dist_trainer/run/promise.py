"""What a run promises about the bits of its weights, and what that excludes."""

import torch

from dist_trainer.config.tree import TrainConfig
from dist_trainer.errors import UserError, plural

SAME_BITS = "the same bits on any number of ranks (one kind of processor, the same versions)"


def promise(config: TrainConfig, num_beyond: int = 0) -> str:
    """A line for `plan` and the summary. `num_beyond`: gradient values that exact sums did not promise so far."""
    if num_beyond:
        return f"up to rounding: {plural(num_beyond, 'gradient value')} beyond the bound of engine.sums: exact"
    if config.engine.is_exact:
        return SAME_BITS
    if config.model.sync_bn or config.data.source == "stream":
        key = "model.sync_bn" if config.model.sync_bn else "data.source: stream"
        return f"other weights on another number of ranks: {key}"
    return "up to rounding on another number of ranks: engine.sums is fast"


def check_promise(config: TrainConfig, optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError, naming the key, for what exact sums cannot be promised with (engine/base.py has more)."""
    fused = any(group.get("fused") for group in optimizer.param_groups) or "Fused" in type(optimizer).__name__
    excluded = {
        "model.sync_bn: true": config.model.sync_bn,  # another model on each world
        "data.source: stream": config.data.source == "stream",  # other samples on each world
        "a fused optimizer": fused,  # rounds by an element's place in memory
    }
    for what, is_on in excluded.items():
        if config.engine.is_exact and is_on:
            raise UserError(f"engine.sums: exact cannot be promised with {what}; change one of them")
