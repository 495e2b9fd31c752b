"""The engine on torch's DistributedDataParallel."""

from typing import Any

import torch
from torch import nn

from dist_trainer.engine.base import Engine
from dist_trainer.engine.optimizer_state import get_state, set_state, settings
from dist_trainer.tensors import State


class _Rehearsed(nn.Module):
    """The model. Without images it returns a zero that depends on every parameter, in a fixed order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor | None) -> torch.Tensor:
        if images is None:
            return torch.stack([0.0 * each.sum() for each in self.model.parameters() if each.requires_grad]).sum()
        output: torch.Tensor = self.model(images)
        return output


class TorchEngine(Engine):
    """torch's DistributedDataParallel, which reduces gradients while backward still runs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.optimizer = optimizer
        self._prepare_update()
        self._built = settings(optimizer)
        model.to(memory_format=self._format)
        self._ddp = nn.parallel.DistributedDataParallel(
            _Rehearsed(model),
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            broadcast_buffers=False,  # tricks/batch_norm.py owns the running statistics
            gradient_as_bucket_view=True,
            bucket_cap_mb=25,  # explicit, so it holds for the first bucket too: a small network is reduced at once
        )
        # DDP reorders its buckets after its first backward. Without a rehearsal, the first step after a resume would be
        # summed in another order than in an uninterrupted run (seen from three ranks on).
        self._ddp(None).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _prepare_update(self) -> None:
        """Hook for backends that need the model before its layout changes and DDP wraps it."""

    def _apply_update(self) -> None:
        self.optimizer.step()

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        self._ddp.require_backward_grad_sync = self._is_last
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: torch.Tensor = self._ddp(images)
        return output

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> bool:
        applied = self._clip_and_update()
        if applied:
            self._apply_update()
        self.optimizer.zero_grad(set_to_none=True)
        return applied

    def optimizer_state(self) -> State:
        return get_state(self.optimizer, self.module, self._built)

    def load_optimizer_state(self, state: State) -> None:
        set_state(self.optimizer, self.module, state)

    def _check_state(self) -> None:
        self.optimizer_state()
