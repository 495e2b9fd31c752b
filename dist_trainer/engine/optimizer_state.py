"""An optimizer's state as tensors by name, so that a checkpoint holds all of it, whatever types the optimizer uses.

`momentum_buffer/conv.weight` belongs to a parameter; `step:number/conv.weight` is kept as a Python number;
`step@group/conv.weight` is kept in the parameter group that begins with conv.weight (timm's LAMB).
"""

import collections
import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.tensors import State

_NUMBER, _GROUP = ":number", "@group"


def encode(values: Mapping[str, Any], whose: str) -> State:
    """Tensors as they are, numbers as 0-d int64 or float64. Raises UserError for anything else."""
    state: State = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            state[key] = value.detach()
        elif isinstance(value, int | float):
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            state[key + _NUMBER] = torch.tensor(value, dtype=dtype)
        elif value is not None:
            raise UserError(
                f"optimizer.name: {whose} keeps {key!r} as a {type(value).__name__}, which does not fit into a "
                "checkpoint; choose another optimizer"
            )
    return state


def decode(key: str, value: torch.Tensor) -> tuple[str, Any]:
    """Undo `encode` for one of its values."""
    return (key.removesuffix(_NUMBER), value.item()) if key.endswith(_NUMBER) else (key, value)


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A copy of each parameter group without its parameters and the rate."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def changed(optimizer: torch.optim.Optimizer, built: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups' settings that changed since they were `built`, and so are state."""
    return [
        {key: value for key, value in now.items() if key not in before or before[key] != value}
        for now, before in zip(settings(optimizer), built, strict=True)
    ]


def get_state(optimizer: torch.optim.Optimizer, model: nn.Module, built: list[dict[str, Any]]) -> State:
    """The full state of an optimizer over the parameters of `model`. Raises UserError for state that is no tensor or
    number."""
    whose = type(optimizer).__name__
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: State = {}
    for parameter, name in names.items():
        values = encode(optimizer.state.get(parameter, {}), whose)
        state |= {f"{key}/{name}": value for key, value in values.items()}
    for group, values in zip(optimizer.param_groups, changed(optimizer, built), strict=True):
        first = names[group["params"][0]]
        state |= {f"{key}{_GROUP}/{first}": value for key, value in encode(values, whose).items()}
    return state


def set_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: State) -> None:
    """Restore what `get_state` gave, in the parameters' memory layout, on the devices that torch chooses."""
    check_names(model, state)
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, value in state.items():
        key, _, name = full_name.partition("/")
        by_parameter.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    whole = optimizer.state_dict()
    numbers = {p: n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for saved, group in zip(whole["param_groups"], optimizer.param_groups, strict=True):
        for parameter in group["params"]:
            own = whole["state"].setdefault(numbers[parameter], {})
            for key, value in by_parameter.get(names[parameter], {}).items():
                like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
                short, restored = decode(key.removesuffix(_GROUP), like.copy_(value))
                (saved if key.endswith(_GROUP) else own)[short] = restored
    optimizer.load_state_dict(whole)
    if stateful := [parameter for parameter in names if optimizer.state.get(parameter)]:
        smallest = min(stateful, key=lambda parameter: parameter.numel())
        check_complete(optimizer, smallest, optimizer.state[smallest])


def check_complete(optimizer: torch.optim.Optimizer, weight: torch.Tensor, state: Mapping[str, Any]) -> None:
    """Raises UserError if `state`, restored for `weight`, lacks what the optimizer keeps now: adam's `amsgrad` was
    switched on, say. Only an update tells, so a copy gets one, from a gradient of zero.
    """
    try:
        _after_update(optimizer, weight, state)
    except KeyError as missing:
        raise UserError(
            f"optimizer.args: {type(optimizer).__name__} needs {missing} of the steps before, which the "
            "checkpoint does not have; set them as they were, or begin a new run with run.start_from"
        ) from None


def _after_update(optimizer: torch.optim.Optimizer, weight: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a copy of the optimizer keeps for a copy of `weight` after one more update, from a gradient of zero."""
    twin = nn.Parameter(weight.detach().clone())
    twin.grad = torch.zeros_like(twin)
    probe = copy.copy(optimizer)
    probe.__dict__.update({name: value for name, value in vars(optimizer).items() if name not in vars(probe)})
    probe.state = collections.defaultdict(dict, {twin: {key: copy.deepcopy(value) for key, value in state.items()}})
    probe.param_groups = [{**copy.deepcopy({**optimizer.param_groups[0], "params": None}), "params": [twin]}]
    # torch's own are unwrapped, since their wrappers import torch's compiler: half the start of `plan`.
    step = type(optimizer).step
    with torch.no_grad():
        (inspect.unwrap(step) if type(optimizer).__module__.startswith("torch.optim.") else step)(probe)
    kept: dict[str, Any] = probe.state[twin]
    return kept


def bytes_per_weight(optimizer: torch.optim.Optimizer) -> float:
    """What the optimizer will keep for a weight, measured on its smallest parameter with more than one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weight = min(parameters, key=lambda p: (p.numel() < 2, p.numel()))
    values = encode(_after_update(optimizer, weight, {}), type(optimizer).__name__).values()
    return float(sum(value.nbytes for value in values if value.shape == weight.shape) / weight.numel())


def check_names(model: nn.Module, state: State) -> None:
    """Raises UserError if `state` belongs to other parameters than those that are trained now."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = {full_name.partition("/")[2] for full_name in state}
    if state and saved != trained:
        raise UserError(
            f"model.freeze: the checkpoint's optimizer trained other parameters ({min(saved ^ trained)} is in one "
            "alone); start another run from its weights"
        )


def check_element_wise(
    optimizer: torch.optim.Optimizer, parts: list[torch.Tensor], built: list[dict[str, Any]], zero: int
) -> None:
    """Raises UserError if an optimizer over flat `parts` keeps state that is not one value per weight: it would be
    wrong.

    It detects state in the groups, state of another shape, and single numbers that differ between parts.
    """
    whose = type(optimizer).__name__
    states = [(part, encode(optimizer.state.get(part, {}), whose)) for part in parts]
    first = states[0][1]
    if any(changed(optimizer, built)) or any(
        value.shape != part.shape if value.dim() else key not in first or bool(value != first[key])
        for part, state in states
        for key, value in state.items()
    ):
        raise UserError(
            f"engine.zero: {zero} cuts weights into flat pieces, and {whose} keeps state that is not one value per "
            "weight; set engine.zero: 0"
        )
