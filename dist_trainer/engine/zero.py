"""The engines on DeepSpeed, at ZeRO 0 and at ZeRO 1 to 3. deepspeed.py imports the library, when an engine is built."""

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.ddp import TorchEngine
from dist_trainer.engine.exact import ExactReducer
from dist_trainer.engine.optimizer_state import check_element_wise, settings
from dist_trainer.plan import Plan
from dist_trainer.tensors import State

REDUCE_BUCKET = 25 * 2**18
"""Elements that DeepSpeed reduces together: 25 MiB of float32, as in DDP. Its buffers are as large."""


def deepspeed_config(config: EngineConfig, plan: Plan) -> dict[str, Any]:
    """Every key of DeepSpeed's config. Users pass no raw JSON.

    `gradient_clipping` is always written, since its default is 1.0. The plan owns accumulation and tells DeepSpeed
    micro-batch by micro-batch, so DeepSpeed's own count is 1. The empty list of lower-precision modules keeps gradients
    from being reduced in bf16. The throughput timer would wait for the device twice a step. ZeroStage0 clips, checks
    and computes under autocast by itself, without another collective; so does ExactZero.

    `overlap_comm` stays off at stages 1 and 2, as it is by default: it read buckets before all streams had filled them
    (DeepSpeed #5545, which is open; NaN in #8061, mended in 2026), and only several GPUs could show that it is right.
    """
    own_clip = config.zero and not config.is_exact
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (config.clip_grad_norm or 0.0) if own_clip else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": config.zero, "reduce_bucket_size": REDUCE_BUCKET},
    }
    if config.precision == "bf16":
        values["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return values


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig, plan: Plan, device: torch.device
) -> Any:
    """DeepSpeed's engine around `model`, which stands on its device."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    # DeepSpeed asks for it even without a launcher, and takes it for the number of this rank's GPU, which it is not
    # where a launcher shows each task its own.
    os.environ["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", "0") if device.index is None else str(device.index)
    from dist_trainer.engine.deepspeed import initialize

    return initialize(model, optimizer, deepspeed_config(config, plan), device)


class ZeroStage0(TorchEngine):
    """DeepSpeed with nothing to shard: its engine makes the update, DDP does the rest.

    DeepSpeed's own reduction begins when backward has ended; DDP's overlaps with it.
    """

    def _prepare_update(self) -> None:
        # Before the layout changes: initialize does not take channels_last weights.
        self._engine = _initialize(self.module, self.optimizer, self.config, self.plan, self._device)

    def _apply_update(self) -> None:
        self._engine.step()

    def close(self) -> None:
        from dist_trainer.engine.deepspeed import close

        close(self._engine, 0)


class ZeroEngine(Engine):
    """DeepSpeed at ZeRO 1, 2 and 3. Weights live in flat buffers and stay contiguous; only images are channels_last."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._engine = _initialize(model, optimizer, self.config, self.plan, self._device)
        self.optimizer = self._engine.optimizer
        self._built = settings(self.optimizer)
        for buffer in self.module.buffers():  # DeepSpeed broadcasts parameters only
            dist.broadcast(buffer, 0)
        self._coalesce: contextlib.ExitStack | None = None

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.plan.forwards > 1 and self._micro_step == 0:  # one reduction per step, at the exit of this block
            self._coalesce = contextlib.ExitStack()
            self._coalesce.enter_context(self._engine.coalesce_grad_reduction())
        output: torch.Tensor = self._engine(images)
        return output

    def _backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._coalesce is not None and self._is_last:
            self._coalesce.close()
            self._coalesce = None

    def _update(self) -> bool:
        self._engine.step()
        self.grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return bool(self._engine.was_step_applied())

    @property
    def is_sharded(self) -> bool:
        return self.config.zero == 3

    def local_weights(self) -> State:
        if not self.is_sharded:
            return super().local_weights()
        from dist_trainer.engine.deepspeed import piece

        return {name: piece(parameter) for name, parameter in self.module.named_parameters()}

    def to_local(self, full: State) -> State:
        if not self.is_sharded:
            return super().to_local(full)
        from dist_trainer.engine.deepspeed import cut

        parameters = dict(self.module.named_parameters())
        return {name: cut(full[name], each, self.world.rank) for name, each in parameters.items()}

    def to_full(self, parts: State) -> State:
        if not self.is_sharded:
            return super().to_full(parts)
        from dist_trainer.engine.deepspeed import joined

        flat = torch.cat([part.to(self._device) for part in parts.values()])
        everyone = [torch.empty_like(flat) for _ in range(self.world.size)] if self.world.is_main else None
        dist.gather(flat, everyone)
        return joined(dict(self.module.named_parameters()), everyone) if everyone else {}

    def _rewrite(self, own: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        if not self.is_sharded:
            super()._rewrite(own, values)
            return
        from dist_trainer.engine.deepspeed import pieces_rewritten

        with pieces_rewritten(self._engine):
            super()._rewrite(own, values)

    def optimizer_state(self) -> State:
        from dist_trainer.engine.deepspeed import get_optimizer_state

        return get_optimizer_state(self._engine, self.config.zero)

    def load_optimizer_state(self, state: State) -> None:
        from dist_trainer.engine.deepspeed import set_optimizer_state

        set_optimizer_state(self._engine, self.config.zero, state, self.world.rank)

    def _check_state(self) -> None:
        from dist_trainer.engine.deepspeed import base_optimizer, partitions

        check_element_wise(
            base_optimizer(self._engine), partitions(self._engine, self.config.zero), self._built, self.config.zero
        )

    def close(self) -> None:
        from dist_trainer.engine.deepspeed import close

        close(self._engine, self.config.zero)


class ExactZero(ZeroEngine):
    """ZeRO 1 and 2, which shard optimizer state; gradients are exact sums, in full on every rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from dist_trainer.engine.deepspeed import remove_reduction

        super().__init__(*args, **kwargs)
        remove_reduction(self._engine)
        self._reducer: ExactReducer = ExactReducer(self._parameters, self.plan, self.world)

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: torch.Tensor = self.module(images)
        return output

    def _backward(self, loss: torch.Tensor) -> None:
        self._reducer.backward(loss)

    def _reduce(self) -> None:
        self._reducer.finish()
        self._send_norm()

    def _update(self) -> bool:
        from dist_trainer.engine.deepspeed import step_with_gradients

        applied = self._is_finite()
        if applied:
            step_with_gradients(self._engine)
        for parameter in self._parameters:
            parameter.grad = None
        return applied
