"""Gradient checkpointing: activations inside a block are computed again in backward instead of kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". The same gradients, bit for bit: dropout draws
again what it drew. Batch-norm's statistics too: a layer with momentum 1 (tricks/batch_norm.py) writes in the second
forward what it wrote in the first, and a micro-batch is counted after both.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_trainer.errors import UserError


def checkpoint_blocks(model: nn.Module) -> None:
    """Make each block of `model` keep only its input, in place. Parameters, buffers and their names stay.

    A timm model by its own set_grad_checkpointing; elsewhere each member of the outermost nn.Sequential and
    nn.ModuleList. Raises UserError for a model without blocks.
    """
    own: Any = getattr(model, "set_grad_checkpointing", None)
    if own is not None:
        try:
            own(True)
        except AssertionError:  # timm's sign that it is not supported
            raise UserError(_refusal(model)) from None
        return
    found = list(_blocks(model))
    if not found:
        raise UserError(_refusal(model))
    for block in found:
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Any, *args: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False)


def _refusal(model: nn.Module) -> str:
    return (
        f"engine.gradient_checkpointing: {type(model).__name__} has no stages of blocks that could be recomputed; "
        "set it to false, or lower batch.micro_batch"
    )


def _blocks(parent: nn.Module, in_list: bool = False) -> Iterator[nn.Module]:
    """What has parts of its own among the members of the outermost lists, and of lists within these."""
    for child in parent.children():
        is_list = type(child) in (nn.Sequential, nn.ModuleList)
        if in_list and not is_list and next(child.children(), None) is not None:
            yield child
        else:
            yield from _blocks(child, in_list or is_list)
