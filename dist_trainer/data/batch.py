"""The batches that the loader gives to the loop, and the addresses that identify them."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_trainer.data.bad_samples import BadSample


@dataclass(frozen=True)
class EvalAddress:
    """Validation batch `number`: samples [number * size, (number + 1) * size); a ghost counts nothing."""

    number: int
    size: int
    ghost: bool = False
    step: int | None = None
    """The training step whose crop size and ramps hold, where samples are augmented."""


@dataclass(frozen=True)
class SlotAddress:
    """Slot `slot` of training step `step`; a ghost stands in for a slot that this rank does not own."""

    step: int
    slot: int
    ghost: bool = False


_SMALL = ("labels", "weight", "ids")


@dataclass
class Batch:
    """One micro-batch. `weight` is 0 at the positions of substitutes, and NaN everywhere if storage failed."""

    images: torch.Tensor
    """uint8 [m, C, H, W]"""
    labels: torch.Tensor
    """int64 [m]"""
    weight: torch.Tensor
    """float32 [m]"""
    ids: torch.Tensor
    """int64 [m], sample numbers in the index"""
    address: SlotAddress | EvalAddress
    num_valid: int = 0
    """Samples that count: the sum of `weight`, known without asking the device."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that belong here and cannot be used."""
    problem: str | None = None
    """The user's mistake that prevented this batch."""
    outage: str | None = None
    """Unreachable storage: this batch must not be trained on, and the step is to be repeated later."""

    @property
    def ghost(self) -> bool:
        return self.address.ghost

    def _map(self, change: Any) -> "Batch":
        return replace(
            self, images=change(self.images), labels=change(self.labels), weight=change(self.weight), ids=self.ids
        )

    def __getstate__(self) -> dict[str, Any]:
        """From a loader process: only the images use shared memory, which costs a file descriptor per tensor."""
        return {name: value.numpy() if name in _SMALL else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {name: torch.from_numpy(value) if name in _SMALL else value for name, value in state.items()}

    def pin_memory(self) -> "Batch":
        """DataLoader calls this on CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """On `device`, copied asynchronously from pinned memory; `ids` stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))
