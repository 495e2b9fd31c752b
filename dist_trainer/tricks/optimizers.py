"""Optimizers by name, their parameter groups, and where those that look at whole layers may run."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from dist_trainer.by_name import Named, check_args, resolve
from dist_trainer.errors import UserError
from dist_trainer.tricks.layer_decay import layer_scales
from dist_trainer.tricks.no_decay import NoDecay, without_decay


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Named):
    """The update rule."""

    name: str = "sgd"
    """Element-wise: sgd, sgdw, rmsprop, rmsprop_tf, adam, adamw, adadelta. Layer-wise, for engine.zero: 0 alone: lars,
    lamb. Or package.module:Name of a torch.optim.Optimizer. Above engine.zero: 0 only element-wise rules are right, as
    weights are cut into flat pieces there: mark a class of your own that is not with `layer_wise = True`."""
    args: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own arguments, without lr and weight_decay. Defaults are the library's, but momentum is 0.9 for
    sgd, sgdw and lars, and lamb clips by engine.clip_grad_norm alone. On a GPU, sgd, adam and adamw update all weights
    in one pass (torch's fused: true) unless args say otherwise; never with engine.sums: exact, as it rounds by an
    element's place in memory."""
    weight_decay: float = 0.0
    """Coupled L2, added to the gradient, for sgd, rmsprop, rmsprop_tf, adam, adadelta, and for lars within its trust
    ratio. Decoupled for adamw and sgdw: a step also subtracts lr x weight_decay x weight; for lamb within its ratio."""
    no_decay: list[NoDecay] = field(default_factory=lambda: ["norm", "bias", "model"])
    """Parameters without weight decay: of normalisation layers, biases of all layers, and those that the model's own
    no_weight_decay() names (in timm's networks position embeddings and class tokens). vector: all of one dimension
    (LayerScale's gammas), as in timm. lars and lamb also give these
    no trust ratio, unless args say always_adapt: true."""
    layer_decay: float = 1.0
    """Fine-tuning: each layer's learning rate is this fraction of that of the layer above it, the head's is lr's own.
    1.0: off; 0.65 to 0.75 is usual for a pretrained ViT."""


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("torch.optim:SGD", {"momentum": 0.9}),
    "sgdw": ("timm.optim:SGDW", {"momentum": 0.9}),
    "rmsprop": ("torch.optim:RMSprop", {}),
    "rmsprop_tf": ("timm.optim:RMSpropTF", {}),
    "adam": ("torch.optim:Adam", {}),
    "adamw": ("torch.optim:AdamW", {}),
    "adadelta": ("torch.optim:Adadelta", {}),
    "lars": ("timm.optim:Lars", {"momentum": 0.9}),
    "lamb": ("timm.optim:Lamb", {"max_grad_norm": None}),
}
"""Where each is, and the arguments that it has here unless the config says otherwise."""

FUSED = {"sgd", "adam", "adamw"}
WAYS = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments of torch's optimizers that choose how they compute."""

# Class names, in lower case, of what is known to use norms, means or matrices of a whole layer, or (Adan) to count its
# steps per group, which ZeRO 3 steps one after another.
LAYER_WISE = {
    "lars", "larc", "lamb", "fusedlamb", "fusedmixedprecisionlamb", "lamb8bit", "lars8bit",
    "novograd", "nvnovograd", "fusednovograd", "adafactor", "adafactorbigvision", "adahessian", "adamp", "sgdp",
    "mars", "muon", "kron", "shampoo", "soap", "swats", "sm3", "came", "prodigy", "adan",
}  # fmt: skip


def param_groups(
    model: nn.Module, weight_decay: float, no_decay: Sequence[NoDecay], layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimizer: the stem first, what decays before what does not.

    Each has its weight_decay, and where layers differ an `lr_scale`, which the engine multiplies the rate by. A
    parameter that several modules share stands in one group, and decays unless one of its names is without.
    """
    free = without_decay(model, no_decay)
    free_ids = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in free}
    scales = layer_scales(model, layer_decay) if layer_decay != 1.0 else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(name, 1.0), id(parameter) in free_ids), []).append(parameter)
    return [
        {
            "params": groups[scale, is_free],
            "weight_decay": 0.0 if is_free else weight_decay,
            **({"lr_scale": scale} if scales else {}),
        }
        for scale, is_free in sorted(groups)
    ]


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, peak: float, zero: int, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer, at the peak rate, which some keep; the loop writes the rate before every update.

    `fused`: in one kernel, where torch has it and the config does not choose. Raises UserError for what cannot be
    built, and for what would be wrong at ZeRO stage `zero`.
    """
    if not 0 <= config.weight_decay < math.inf:
        raise UserError(f"optimizer.weight_decay: {config.weight_decay} is not a decay; give 0 or more")
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"optimizer.layer_decay: {config.layer_decay} is not in (0, 1]; 1.0 is off")
    path, defaults = OPTIMIZERS.get(config.name, (config.name, {}))
    target = resolve("optimizer.name", path, OPTIMIZERS, "optimizer")
    owners = {"lr": "lr.base or lr.peak", "weight_decay": "optimizer.weight_decay"}
    if config.name == "lamb":
        owners["max_grad_norm"] = "engine.clip_grad_norm"
    for owned in owners.keys() & config.args.keys():
        raise UserError(f"optimizer.args.{owned}: is set by {owners[owned]}; remove it")
    groups = param_groups(model, config.weight_decay, config.no_decay, config.layer_decay)
    args = {**defaults, **config.args}
    if fused and config.name in FUSED and not WAYS & args.keys():
        args["fused"] = True
    check_args("optimizer", config.name, target, args, groups, lr=peak)
    try:
        # Unwrapped, since torch's wrapper does nothing here but import torch's compiler: half the start of `plan`.
        bare = inspect.unwrap(torch.optim.Optimizer.add_param_group)
        with mock.patch.object(torch.optim.Optimizer, "add_param_group", bare):
            optimizer: torch.optim.Optimizer = target(groups, lr=peak, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {config.name}: {error}") from None
    if not config.weight_decay and optimizer.defaults.get("always_adapt") is False:
        raise UserError(
            f"optimizer: {config.name} adapts the rate of layers with weight decay alone, and optimizer.weight_decay "
            "is 0; set it, or args: {always_adapt: true}"
        )
    if zero and is_layer_wise(optimizer):
        raise UserError(
            f"engine.zero: {zero} cuts weights into flat pieces, on which {config.name} is silently wrong, as it "
            "looks at whole layers; set engine.zero: 0"
        )
    return optimizer


def is_layer_wise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known that an element's update needs more than that element: by class name, mark or argument."""
    mark = getattr(optimizer, "layer_wise", None)
    if mark is not None:
        return bool(mark)
    # `caution` (Liang et al. 2024, "Cautious Optimizers") divides by the mean of a mask over each tensor.
    return any(cls.__name__.lower() in LAYER_WISE for cls in type(optimizer).__mro__) or any(
        group.get("caution") for group in optimizer.param_groups
    )
