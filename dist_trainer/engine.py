"""Forward, backward, reduction, update: DeepSpeed at ZeRO 0 to 3, and its twin on torch's DDP, behind the same verbs.

With zero_state.py the only file that imports deepspeed. The gradient of a step is the exact mean over the valid
samples of the global batch whatever the world: a micro-batch's loss is its weighted sum times W / (valid samples
of the step), and both engines average gradients over the W ranks. A gradient that is not finite
is never applied.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.comm import World
from dist_trainer.data.batch import Batch
from dist_trainer.errors import UserError
from dist_trainer.inference import Inference, Preprocess
from dist_trainer.keyed import FORWARD, key
from dist_trainer.plan import Plan
from dist_trainer.tricks.losses import Loss

State = dict[str, torch.Tensor]

# Said on every rank and step, of names that other versions still need.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"`broadcast_buffers` is deprecated.*", category=FutureWarning)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How gradients are computed, reduced and applied."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or torch: plain DistributedDataParallel, the same numbers."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage. 0 suits convolutional networks; 1, 2, 3 shard optimizer state, gradients, weights."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 computes under autocast; weights, their gradients' sums and batch-norm stay float32 in both."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null does not clip."""


def deepspeed_config(config: EngineConfig, plan: Plan) -> dict[str, Any]:
    """Every key that DeepSpeed is given; users hand in no raw JSON.

    `gradient_clipping` is always written, since its default is 1.0. Accumulation is the plan's, told to DeepSpeed
    micro-batch by micro-batch, so its own count is 1. The empty list of lower-precision modules keeps gradients
    from being reduced in bf16. The throughput timer would wait for the device twice a step. ZeroStage0 clips, checks
    and computes under autocast by itself, without another collective.
    """
    clip = config.clip_grad_norm or 0.0
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if config.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": config.zero, "reduce_bucket_size": 50_000_000},
    }
    if config.precision == "bf16":
        values["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return values


class Engine(Inference):
    """What both backends share. `grad_norm` is that of the last step, before clipping."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: EngineConfig,
        plan: Plan,
        world: World,
        preprocess: Preprocess,
        seed: int,
    ) -> None:
        super().__init__(model.to(world.device), config.precision, preprocess, world)
        self.plan, self.config = plan, config
        self.grad_norm: torch.Tensor = torch.zeros(())
        self._loss, self._seed = loss, seed
        self._generator: torch.Generator = (
            torch.cuda.default_generators[world.local_rank] if self._device.type == "cuda" else torch.default_generator
        )
        self._micro_step = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    # What a backend provides

    optimizer: torch.optim.Optimizer

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _backward(self, loss: torch.Tensor) -> None:
        raise NotImplementedError

    def _update(self) -> bool:
        """Apply the reduced gradients unless they are not finite; set `grad_norm`; clear the gradients."""
        raise NotImplementedError

    def optimizer_state(self) -> State:
        """Optimizer state by parameter name (collective; whole on rank 0)."""
        raise NotImplementedError

    def load_optimizer_state(self, state: State) -> None:
        """Undo `optimizer_state`, before the first step, whatever stage and world it came from."""
        raise NotImplementedError

    # What the loop calls

    def set_lr(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """One micro-batch: its gradient is added to the step's. Returns the weighted sum of losses (detached scalar).

        The last of `plan.forwards` calls reduces the gradients over the ranks.
        """
        address: Any = batch.address
        # Dropout and the like draw the same numbers for a slot on whichever rank it runs.
        self._generator.manual_seed(key(FORWARD, self._seed, address.step, address.slot))
        logits = self._forward(self._prepare(batch.images)).float()
        labels = batch.labels.to(self._device, non_blocking=True)
        weight = batch.weight.to(self._device, non_blocking=True)
        total = torch.dot(self._loss(logits, labels), weight)
        self._backward(total * (self.world.size / self.plan.num_valid(address.step)))
        self._micro_step += 1
        return total.detach()

    @property
    def _is_last(self) -> bool:
        return self._micro_step == self.plan.forwards - 1

    def step(self) -> bool:
        """Update the weights. False, on every rank alike, when the gradient was not finite: nothing changed then."""
        assert self._micro_step == self.plan.forwards, "a step is plan.forwards micro-batches"
        self._micro_step = 0
        return self._update()

    def _clip_and_update(self) -> bool:
        """For whole gradients, equal on all ranks: the one host read of a step, without a collective."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.grad_norm = nn.utils.get_total_norm(gradients)
        if not math.isfinite(self.grad_norm.item()):
            return False
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_grad_norm, self.grad_norm)
        return True

    # The weights as such

    @property
    def is_sharded(self) -> bool:
        """Whether each rank keeps a piece of every parameter, not all parameters."""
        return False

    def own_weights(self) -> State:
        """The live float32 weights that this rank keeps, by name: whole parameters, or its 1-d piece of each."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def own_part(self, whole: State) -> State:
        """Of whole parameters what this rank keeps."""
        return {name: whole[name] for name, _ in self.module.named_parameters()}

    def whole(self, parts: State) -> State:
        """Undo `own_part`: the ranks' pieces to whole parameters (collective; on rank 0 alone where sharded)."""
        return parts

    def model_state(self) -> State:
        """float32 weights and buffers by name (collective; whole on rank 0)."""
        state = {name: value.detach() for name, value in self.module.state_dict().items()}
        return {**state, **self.whole(self.own_weights())}

    @contextlib.contextmanager
    def holding(self, weights: State) -> Iterator[None]:
        """In this block the module holds other weights, afterwards its own, bit for bit (collective).

        `weights`, as `own_weights`, are those of rank 0, which are broadcast at once; where sharded, each rank's own.
        """
        own = list(self.own_weights().values())
        before = [value.clone() for value in own]
        flat = torch.empty(sum(value.numel() for value in own), device=self._device)
        if weights:
            torch.cat([value.to(self._device).flatten() for value in weights.values()], out=flat)
        if not self.is_sharded:
            dist.broadcast(flat, 0)
        parts = torch.split(flat, [value.numel() for value in own])
        others = [part.view(value.shape) for part, value in zip(parts, own, strict=True)]
        try:
            self._rewrite(own, others)
            yield
        finally:
            self._rewrite(own, before)

    def _rewrite(self, own: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        torch._foreach_copy_(own, values)

    def close(self) -> None:
        """Give back what the backend holds, before the process group ends."""


class TorchEngine(Engine):
    """torch's DistributedDataParallel, which reduces gradients while backward still runs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.optimizer = optimizer
        self._prepare_update()
        model.to(memory_format=self._format)
        self._ddp = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            broadcast_buffers=False,  # tricks/batch_norm.py owns the running statistics
            gradient_as_bucket_view=True,
            bucket_cap_mb=25,  # said aloud, also the first bucket's: a small network is reduced at once, not in two
        )

    def _prepare_update(self) -> None:
        """What has to see the model before its layout changes and DDP wraps it."""

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
        return {
            f"{key}/{name}": value.detach()
            for name, parameter in self.module.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def load_optimizer_state(self, state: State) -> None:
        parameters = dict(self.module.named_parameters())
        for full_name, value in state.items():
            key, name = full_name.split("/", 1)
            parameter = parameters[name]
            self.optimizer.state[parameter][key] = (
                torch.empty_like(parameter).copy_(value) if value.dim() else value.clone()
            )


def _initialize_deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig, plan: Plan, device: torch.device
) -> Any:
    """DeepSpeed's engine around `model`, which stands on its device."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    from dist_trainer.zero_state import no_inference_kernels

    if device.type == "cpu":
        no_inference_kernels()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, plan))
    return engine


class ZeroStage0(TorchEngine):
    """DeepSpeed with nothing to shard: its engine makes the update, and the rest is DDP's.

    DeepSpeed's own reduction begins when backward has ended; DDP's overlaps with it.
    """

    def _prepare_update(self) -> None:
        # Before the layout changes: initialize does not take channels_last weights.
        self._engine = _initialize_deepspeed(self.module, self.optimizer, self.config, self.plan, self._device)

    def _apply_update(self) -> None:
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()


class ZeroEngine(Engine):
    """DeepSpeed at ZeRO 1, 2 and 3. Weights live in flat buffers and stay contiguous; only images are channels_last."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._engine = _initialize_deepspeed(model, optimizer, self.config, self.plan, self._device)
        self.optimizer = self._engine.optimizer
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

    def own_weights(self) -> State:
        if not self.is_sharded:
            return super().own_weights()
        from dist_trainer.zero_state import piece

        return {name: piece(parameter) for name, parameter in self.module.named_parameters()}

    def own_part(self, whole: State) -> State:
        if not self.is_sharded:
            return super().own_part(whole)
        from dist_trainer.zero_state import cut

        parameters = dict(self.module.named_parameters())
        return {name: cut(whole[name], each, self.world.rank) for name, each in parameters.items()}

    def whole(self, parts: State) -> State:
        if not self.is_sharded:
            return super().whole(parts)
        from dist_trainer.zero_state import joined

        flat = torch.cat([part.to(self._device) for part in parts.values()])
        everyone = [torch.empty_like(flat) for _ in range(self.world.size)] if self.world.is_main else None
        dist.gather(flat, everyone)
        return joined(dict(self.module.named_parameters()), everyone) if everyone else {}

    def _rewrite(self, own: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        if not self.is_sharded:
            super()._rewrite(own, values)
            return
        from dist_trainer.zero_state import pieces_rewritten

        with pieces_rewritten(self._engine):
            super()._rewrite(own, values)

    def optimizer_state(self) -> State:
        from dist_trainer.zero_state import get_optimizer_state

        return get_optimizer_state(self._engine, self.config.zero)

    def load_optimizer_state(self, state: State) -> None:
        from dist_trainer.zero_state import set_optimizer_state

        set_optimizer_state(self._engine, self.config.zero, state, self.world.rank)

    def close(self) -> None:
        self._engine.destroy()


def build_engine(
    config: EngineConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    plan: Plan,
    world: World,
    preprocess: Preprocess,
    seed: int,
) -> Engine:
    """The engine that `config` names."""
    if config.clip_grad_norm is not None and not config.clip_grad_norm > 0:
        raise UserError(f"engine.clip_grad_norm: {config.clip_grad_norm} is not positive; null does not clip")
    if config.backend == "torch" and config.zero:
        raise UserError(f"engine.zero: {config.zero} needs engine.backend: deepspeed; torch's DDP is stage 0")
    backend = TorchEngine if config.backend == "torch" else ZeroEngine if config.zero else ZeroStage0
    return backend(model, optimizer, loss, config, plan, world, preprocess, seed)
