"""Tensors by name: what engines, averages and checkpoints hand to each other."""

import hashlib
from collections.abc import Iterable, Mapping

import torch

from dist_trainer.errors import some

State = dict[str, torch.Tensor]
"""Weights, buffers or optimizer state by name, such as {"conv1.weight": float32 [64, 3, 7, 7]}."""


class HostCopy:
    """A copy of a small tensor on its way to the host, through pinned memory where there is a device.

    Made on the current stream. Only `read` waits, for that stream's work up to here, not for what was launched since.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)
        on_host = value.device.type == "cpu"
        self._done = None if on_host else torch.accelerator.current_stream(value.device).record_event()

    def read(self) -> torch.Tensor:
        """The values, on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._value


def not_finite(state: State) -> str | None:
    """The name of the first tensor with a NaN or an infinity, or None."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


def sha256(state: State) -> str:
    """A digest over names, types, shapes and bytes: equal for equal weights, wherever they are and however laid out."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {kind(value)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def bit_sums(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """int64 [n]: a sum of each tensor's bits, which a single wrong bit changes. One pass, on the tensors' device."""
    flat = (_in_memory_order(value.detach()) for value in values)
    as_integers = (each.view(torch.uint8).view(torch.int64 if each.nbytes % 8 == 0 else torch.uint8) for each in flat)
    return torch.stack([each.sum(dtype=torch.int64) for each in as_integers])


def _in_memory_order(value: torch.Tensor) -> torch.Tensor:
    """All elements as 1-d, in any order: channels_last weights are not copied."""
    if value.untyped_storage().nbytes() == value.nbytes:
        return value.as_strided((value.numel(),), (1,))
    return value.contiguous().reshape(-1)


def kind(value: torch.Tensor) -> str:
    """Type and shape, such as `float32 (64, 3, 7, 7)`."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def misfits(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """How `found` differs from `expected` (name -> shape, or type and shape), for a message; "" if they are equal.

    For example `missing: fc.bias; different: fc.weight (10, 64) for (1000, 64)`.
    """
    both = sorted(expected.keys() & found.keys())
    differences = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "different": [f"{name} {found[name]} for {expected[name]}" for name in both if found[name] != expected[name]],
    }
    return "; ".join(f"{what}: {some(names)}" for what, names in differences.items() if names)
