"""Auxiliary classifiers, which train beside the main one and are gone in evaluation."""

from typing import Any

import torch
from torch import nn

WEIGHTS = {
    "InceptionOutputs": {"aux_logits": 0.4},  # Szegedy et al. 2016; torchvision's inception_v3
    "GoogLeNetOutputs": {"aux_logits1": 0.3, "aux_logits2": 0.3},  # Szegedy et al. 2015; torchvision's googlenet
}
"""The weight of each output's loss beside the main one's, by the type that a network gives in training."""


def outputs_of(output: Any) -> list[tuple[float, torch.Tensor]] | None:
    """(weight of its loss, float logits [m, K]) of each output of a network; None for what is no known output."""
    if isinstance(output, torch.Tensor):
        return [(1.0, output)]
    weights = WEIGHTS.get(type(output).__name__)
    if weights is None:
        return None
    others = [(weight, getattr(output, name)) for name, weight in weights.items()]
    return [(1.0, output.logits), *((weight, logits) for weight, logits in others if logits is not None)]


def tie(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Let `parameters`, which the network does not use, have a gradient of zeros in training.

    DDP waits for one from all; ZeRO 1 to 3 take a missing one for zeros.
    """

    def add_nothing(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        nothing = 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum()
        if isinstance(output, torch.Tensor):
            return output + nothing
        return type(output)(output[0] + nothing, *output[1:])

    if parameters:
        model.register_forward_hook(add_nothing)
