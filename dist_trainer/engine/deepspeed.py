"""The one door to DeepSpeed: its engine, and every private attribute of it that is used here.

pyproject.toml pins the 0.19 series. tests/laws/test_worlds.py fails when one of these attributes changes its meaning.
Most of this is full optimizer state by parameter name, in and out of a ZeRO engine.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.logging import set_log_level_from_string
from torch import nn

from dist_trainer.engine.optimizer_state import check_complete, check_names, decode, encode
from dist_trainer.tensors import State


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device) -> Any:
    """DeepSpeed's engine around `model`, which stands on its device, in the process group that exists."""
    if device.type == "cpu":
        no_inference_kernels()
    set_log_level_from_string("info" if os.environ.get("DIST_TRAINER_VERBOSE") else "error")  # log.verbose
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def no_inference_kernels() -> None:
    """Keep DeepSpeed from building its shared-memory C++ extension (44 s, needs a compiler), which only inference uses.

    No environment variable turns it off; this table decides. Only for the CPU: on CUDA it controls other kernels.
    """
    deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}


def close(engine: Any, stage: int) -> None:
    """End an engine, and drop its weights and all that belongs to them."""
    engine.destroy()
    if stage == 3:  # it remembers modules in two places that outlive every engine
        from deepspeed.runtime.zero import parameter_offload

        parameter_offload.FWD_MODULE_STACK.clear()
        cached = parameter_offload.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        for each in (cached, *(cell.cell_contents for cell in cached.__closure__ or ())):
            if hasattr(each, "cache_clear"):
                each.cache_clear()


def _relink(optimizer: Any, stage: int) -> None:
    """Link all parameters to their optimizer state. Stages 1 and 2 link only the first group's, after a step."""
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The user's optimizer, whose parameters are the flat partitions."""
    base: torch.optim.Optimizer = engine.optimizer.optimizer
    return base


def partitions(engine: Any, stage: int) -> list[torch.Tensor]:
    """This rank's flat float32 partitions, one or more per parameter group: the base optimizer's parameters."""
    optimizer = engine.optimizer
    parts: list[torch.Tensor] = (
        optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat
    )
    return parts


def piece(parameter: nn.Parameter) -> torch.Tensor:
    """Stage 3: this rank's float32 piece of a parameter, 1-d, padded to the same length on all ranks."""
    part: torch.Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
    return part


def cut(whole: torch.Tensor, parameter: nn.Parameter, rank: int) -> torch.Tensor:
    """Stage 3: the piece of a full value (of a parameter or its optimizer state) that belongs to `rank`."""
    size = piece(parameter).numel()
    flat = whole.flatten()[rank * size : (rank + 1) * size].to(parameter.device)
    return nn.functional.pad(flat, (0, size - flat.numel()))  # the last is padded


def joined(parameters: dict[str, nn.Parameter], everyone: list[torch.Tensor]) -> State:
    """Stage 3: full values of all parameters from the ranks' pieces, which are concatenated."""
    sizes = [piece(parameter).numel() for parameter in parameters.values()]
    state: State = {}
    for (name, parameter), parts in zip(
        parameters.items(), zip(*(torch.split(flat, sizes) for flat in everyone), strict=True), strict=True
    ):
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        state[name] = torch.cat(parts)[: shape.numel()].view(shape)
    return state


@contextlib.contextmanager
def pieces_rewritten(engine: Any) -> Iterator[None]:
    """Stage 3: pieces may be written in this block (collective). Small parameters, kept in full beside them, follow."""
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()


def _trained(engine: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def remove_reduction(engine: Any) -> None:
    """Stages 1 and 2: leave gradients alone during backward."""
    for hook in engine.optimizer._grad_acc_hooks:
        hook.remove()
    engine.optimizer._grad_acc_hooks.clear()


def step_with_gradients(engine: Any) -> None:
    """Stages 1 and 2: update this rank's partitions with the full `.grad` of the parameters, and gather the weights."""
    optimizer = engine.optimizer
    for number, (flat, partition) in enumerate(
        zip(optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True)
    ):
        first = dist.get_rank() * len(partition)
        piece = torch.zeros_like(partition)
        for parameter in optimizer.bit16_groups[number]:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size() - first
            begin, end = max(start, 0), min(start + parameter.numel(), len(piece))
            if begin < end:
                piece[begin:end] = parameter.grad.flatten()[begin - start : end - start]
        optimizer.averaged_gradients[number] = [piece]
    optimizer.step()


def get_optimizer_state(engine: Any, stage: int) -> State:
    """{"momentum_buffer/conv.weight": tensor, ...} on rank 0, on the host (collective). Empty before the first step.

    One parameter at a time: the whole of it would not fit on a device for which it was sharded.
    """
    base, parts = base_optimizer(engine), partitions(engine, stage)
    values = encode(base.state.get(parts[0], {}), type(base).__name__)
    _relink(engine.optimizer, stage)
    state: State = {}
    for name, parameter in _trained(engine).items():
        for key, value in values.items():
            whole = value  # a step counter, equal for all
            if value.dim():
                whole = safe_get_full_optimizer_state(parameter, key)
                whole = whole.detach().reshape(getattr(parameter, "ds_shape", parameter.shape))
            if dist.get_rank() == 0:
                state[f"{key}/{name}"] = whole.cpu()
    return state


def set_optimizer_state(engine: Any, stage: int, state: State, rank: int) -> None:
    """Restore what `get_optimizer_state` gave, on any stage and world, before the first step."""
    check_names(engine.module, state)
    base = base_optimizer(engine)
    kinds: State = {}
    for full_name, value in state.items():
        kinds.setdefault(full_name.partition("/")[0], value)
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)  # torch's own rule
    for part in partitions(engine, stage):
        for kind, value in kinds.items():
            # A copy for each partition, since each counts its own.
            key, counter = decode(kind, value.to(part.device if on_device else "cpu", copy=True))
            base.state[part][key] = torch.zeros_like(part) if value.dim() else counter
    _relink(engine.optimizer, stage)
    for name, parameter in _trained(engine).items():
        for key in (key for key, value in kinds.items() if value.dim()):
            value = state[f"{key}/{name}"].to(parameter.device)
            if stage < 3:
                safe_set_full_optimizer_state(parameter, value, key)
            else:  # the library's own setter forgets that the last partition is padded
                safe_set_local_optimizer_state(parameter, cut(value, parameter, rank), key)
    if kinds:
        part = partitions(engine, stage)[0]
        one = {
            key: value[:1] if torch.is_tensor(value) and value.dim() else value
            for key, value in base.state[part].items()
        }
        check_complete(base, part[:1], one)
