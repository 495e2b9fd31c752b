"""Optimizers by name, with weight decay kept off normalisation parameters and biases."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.named import Named, check_args, resolve

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Named):
    """The update rule."""

    name: str = "sgd"
    """sgd (momentum 0.9 unless args say otherwise), or package.module:Name of an element-wise torch.optim.Optimizer."""
    args: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own arguments, without lr and weight_decay."""
    weight_decay: float = 0.0
    """Coupled L2 for sgd: added to the gradient."""
    no_decay: list[Literal["norm", "bias"]] = field(default_factory=lambda: ["norm", "bias"])
    """Parameters without weight decay: of normalisation layers, biases of all layers."""


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": partial(torch.optim.SGD, momentum=0.9)}


def decay_groups(
    model: nn.Module, weight_decay: float, no_decay: list[Literal["norm", "bias"]]
) -> list[dict[str, Any]]:
    """One or two parameter groups. Parameters are told apart by the type of their module, never by name.

    A name test such as "bn" misses torchvision's `downsample.1`.
    """
    decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            is_bias = name == "bias" or name.endswith("_bias")  # in_proj_bias of attention
            free = ("norm" in no_decay and isinstance(module, NORM_LAYERS)) or ("bias" in no_decay and is_bias)
            (without if free else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer with its learning rate at 0; the loop writes the rate before every update."""
    if config.weight_decay < 0:
        raise UserError(f"optimizer.weight_decay: {config.weight_decay} is negative")
    target = resolve("optimizer.name", config.name, OPTIMIZERS, "optimizer")
    groups = decay_groups(model, config.weight_decay, config.no_decay)
    for owned, owner in (("lr", "lr.base or lr.peak"), ("weight_decay", "optimizer.weight_decay")):
        if owned in config.args:
            raise UserError(f"optimizer.args.{owned}: is set by {owner}; remove it")
    check_args("optimizer", config.name, target, config.args, groups, lr=0.0)
    try:
        optimizer: torch.optim.Optimizer = target(groups, lr=0.0, **config.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {config.name}: {error}") from None
    return optimizer
