"""What the loader hands to the loop, and the addresses that it is asked by."""

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


@dataclass(frozen=True)
class SlotAddress:
    """Slot `slot` of training step `step`; a ghost stands in for a slot that this rank does not own."""

    step: int
    slot: int
    ghost: bool = False


_SMALL = ("labels", "weight", "ids")


@dataclass
class Batch:
    """One micro-batch. `weight` is 0 where a place holds a substitute, NaN throughout where storage gave nothing."""

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
    """Samples that should stand here and cannot be used."""
    problem: str | None = None
    """A mistake of the user's because of which there is no batch."""
    outage: str | None = None
    """Storage that stayed away: this batch must not be trained on, and the step be tried again later."""

    @property
    def ghost(self) -> bool:
        return self.address.ghost

    def _map(self, change: Any) -> "Batch":
        return replace(
            self, images=change(self.images), labels=change(self.labels), weight=change(self.weight), ids=self.ids
        )

    def __getstate__(self) -> dict[str, Any]:
        """From a loader process: only the images travel by shared memory, which costs a file descriptor per tensor."""
        return {name: value.numpy() if name in _SMALL else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {name: torch.from_numpy(value) if name in _SMALL else value for name, value in state.items()}

    def pin_memory(self) -> "Batch":
        """DataLoader calls this on CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """On `device`, copied asynchronously from pinned memory; `ids` stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))
