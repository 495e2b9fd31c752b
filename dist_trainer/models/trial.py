"""A check before the first step that a network accepts the images of this run."""

from typing import Any

import torch
from torch import nn

from dist_trainer.errors import UserError, first_line


@torch.no_grad()
def try_images(model: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int) -> None:
    """One black image [1, C, H, W] through the model in evaluation mode, which changes nothing in it.

    Raises UserError, naming what to change, when that fails or does not give [1, num_classes].
    """
    if getattr(model, "aux_logits", False):  # torchvision's googlenet and inception_v3
        raise UserError(
            f"model.name: {name} has more than one output in training; give model.args: {{aux_logits: false}}"
        )
    modes = [(module, module.training) for module in model.modules()]
    channels, height, width = shape
    images = f"model.name: {name} does not take images of {channels} x {height} x {width}"
    model.eval()
    try:
        output: Any = model(torch.zeros(1, *shape))
    except Exception as error:
        hint = ""
        if channels == 1:
            hint = "; set data.channels: 3" + (" or model.args: {in_chans: 1}" if _is_timm(model) else "")
        raise UserError(f"{images}: {first_line(error)}{hint}") from None
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(output, torch.Tensor) or output.shape != (1, num_classes):
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(f"model.name: {name} maps one image to {found}, where [1, {num_classes}] logits belong")


def _is_timm(model: nn.Module) -> bool:
    return type(model).__module__.startswith("timm.")
