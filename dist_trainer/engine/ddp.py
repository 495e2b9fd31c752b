"""The engine on torch alone: DistributedDataParallel reduces, or exact sums do."""

from typing import Any

import torch
from torch import nn

from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine
from dist_trainer.engine.exact import ExactReducer
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


def ddp(model: nn.Module, world: World) -> nn.parallel.DistributedDataParallel:
    """`model` whose gradients are averaged over the ranks while backward still runs."""
    network = nn.parallel.DistributedDataParallel(
        _Rehearsed(model),
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False,  # tricks/batch_norm.py owns the running statistics
        gradient_as_bucket_view=True,
        bucket_cap_mb=25,  # explicit, so it holds for the first bucket too: a small network is reduced at once
    )
    # DDP reorders its buckets after its first backward. Without a rehearsal, the first step after a resume would be
    # summed in another order than in an uninterrupted run (seen from three ranks on).
    network(None).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return network


class TorchEngine(Engine):
    """Weights and optimizer state in full on every rank."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.optimizer = optimizer
        self._prepare_update()
        self._built = settings(optimizer)
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        if self.is_exact:  # weights stay contiguous, as at ZeRO 1 and 2, which shall give the same bits
            self._reducer = ExactReducer(self._parameters, self.plan, self.world)
        else:
            model.to(memory_format=self._format)
            self._ddp = ddp(model, self.world)

    def _prepare_update(self) -> None:
        """Hook for backends that need the model before its layout changes and DDP wraps it."""

    def _apply_update(self) -> None:
        self.optimizer.step()

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._is_last
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: torch.Tensor = (self._ddp or self.module)(images)
        return output

    def _backward(self, loss: torch.Tensor) -> None:
        if self._reducer is not None:
            self._reducer.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def _reduce(self) -> None:
        if self._reducer is not None:
            self._reducer.finish()
        self._send_norm()

    def _update(self) -> bool:
        applied = self._is_finite()
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
