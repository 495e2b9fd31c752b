"""SyncBatchNorm: the micro-batches that all ranks run at the same time are normalised by their common statistics."""

from collections.abc import Sequence

import torch
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.plan import Plan


def check_sync_bn(plan: Plan, frozen: Sequence[str] = ()) -> None:
    """Raises UserError for a world with ghost forwards, which would enter the statistics, and for `frozen` layers."""
    if plan.num_slots % plan.world:
        worlds = [w for w in range(1, plan.num_slots + 1) if plan.num_slots % w == 0]
        raise UserError(
            f"model.sync_bn: {plan.world} ranks do not divide the {plan.num_slots} micro-batches of a step, so surplus "
            f"forwards would enter the statistics; start {', '.join(map(str, worlds))} ranks"
        )
    if frozen:
        raise UserError("model.sync_bn: frozen batch-norm layers see no other ranks; set it to false with model.freeze")


def check_same_world(then: int, now: int) -> None:
    """Raises UserError when a run is resumed where its batch-norm would see another number of samples."""
    if then != now:
        raise UserError(
            f"model.sync_bn: the run was trained on {then} ranks, whose micro-batches batch-norm sees together; "
            f"{now} ranks would continue with another model. Start {then}, or another --run.name"
        )


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every batch-norm layer as SyncBatchNorm, over the same parameters and buffers.

    By timm's function, since torch's drops the activation inside timm's own layers. Each layer's buffers then hold,
    equal on all ranks, the mean and the unbiased variance over the W micro-batches of one forward, which is what
    tricks/batch_norm.py sums: a step's statistics are the mean over its M / W such groups.
    """
    if device.type != "cuda":
        raise UserError("model.sync_bn: torch's SyncBatchNorm needs CUDA; set it to false here")
    from timm.layers import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(model)
    for layer in converted.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.register_forward_pre_hook(_leave_out_the_mask)
            layer.register_forward_hook(_as_before, always_call=True)
    return converted


# torch's SyncBatchNorm leaves out the statistics of ranks whose input is empty, by a mask whose number of entries the
# host must know: a wait for the device per layer. Here no input is empty. While a CUDA graph is captured, which allows
# no wait, torch does without the mask.

_asked = torch.cuda.is_current_stream_capturing


def _leave_out_the_mask(layer: nn.Module, inputs: object) -> None:
    if not torch.compiler.is_compiling():
        torch.cuda.is_current_stream_capturing = lambda: True


def _as_before(layer: nn.Module, inputs: object, output: object) -> None:
    if not torch.compiler.is_compiling():
        torch.cuda.is_current_stream_capturing = _asked
