"""A check before the first step that a network accepts the images of this run, in evaluation and in training."""

import contextlib
import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_trainer.errors import UserError, first_line
from dist_trainer.tricks.auxiliary import WEIGHTS, outputs_of

Shape = tuple[int, int, int]
"""Channels, height, width."""
LARGE = 10_000_000
"""Parameters from which on a training step of two images costs more than the import of torch's meta kernels."""


@torch.no_grad()
def try_images(model: nn.Module, name: str, shape: Shape, num_classes: int) -> None:
    """One black image [1, C, H, W] through the model in evaluation mode, which changes nothing in it.

    Raises UserError, naming what to change, when that fails or does not give [1, num_classes].
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        output: Any = model(torch.zeros(1, *shape))
    except Exception as error:
        raise UserError(f"{_images(name, shape)}: {first_line(error)}{_hint(model, shape[0])}") from None
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(output, torch.Tensor) or output.shape != (1, num_classes):
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(f"model.name: {name} maps one image to {found}, where [1, {num_classes}] logits belong")


def try_training(model: nn.Module, name: str, shape: Shape, num_classes: int, micro_batch: int) -> list[str]:
    """Two grey images, or one in micro-batches of one, forwards and backwards through a copy of the model.

    Returns the names of the parameters that get no gradient. Raises UserError when it fails, when batch-norm has one
    value per channel, and for more than one output, unless they are known auxiliary ones.
    """
    # With shapes alone for a large network, which costs next to nothing once what computes them is imported. One that
    # needs values is computed, as are all errors.
    if sum(each.numel() for each in model.parameters()) >= LARGE:
        with contextlib.suppress(Exception):
            return _trial(model, name, shape, num_classes, micro_batch, "meta")
    return _trial(model, name, shape, num_classes, micro_batch, "cpu")


def _trial(model: nn.Module, name: str, shape: Shape, num_classes: int, micro_batch: int, device: str) -> list[str]:
    layers: list[str] = []
    try:
        copy = deepcopy(model)
    except Exception:  # a network of the user's that cannot be copied: its first step is the trial
        return []
    copy.to(device)
    for layer, module in copy.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda *_, layer=layer: layers.append(layer))
    try:
        with torch.random.fork_rng(devices=[]):
            output: Any = copy(torch.full((min(micro_batch, 2), *shape), 0.5, device=device))
        parts = outputs_of(output)
        if parts is not None:
            torch.stack([weight * logits.float().square().sum() for weight, logits in parts]).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(
                f"batch.micro_batch: {micro_batch}: the batch-norm layer {layers[-1]} of {name} has one value per "
                f"channel at {shape[1]} x {shape[2]} pixels; take 2 or more, or larger images"
            ) from None
        raise UserError(f"{_images(name, shape)} in training: {first_line(error)}{_hint(model, shape[0])}") from None
    if parts is None:
        raise UserError(
            f"model.name: {name} gives a {type(output).__name__} in training, where [m, {num_classes}] logits belong; "
            f"of more than one output only torchvision's are known ({', '.join(WEIGHTS)})"
        )
    return [key for key, each in copy.named_parameters() if each.requires_grad and each.grad is None]


def _images(name: str, shape: Shape) -> str:
    return f"model.name: {name} does not take images of {' x '.join(map(str, shape))}"


def _hint(model: nn.Module, channels: int) -> str:
    """How the number of channels can be set, where the model has an argument for it."""
    argument = "in_chans" if type(model).__module__.startswith("timm.") else "in_channels"
    takes = argument == "in_chans" or argument in inspect.signature(type(model).__init__).parameters
    if channels == 3 and argument == "in_chans":
        return ""
    other = f"data.channels: {4 - channels}"  # 1 and 3 are what there is
    if channels == 3 and not takes:
        return ""
    return f"; set {other}" + (f" or model.args: {{{argument}: {channels}}}" if takes else "")
