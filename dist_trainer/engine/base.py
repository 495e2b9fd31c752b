"""Forward, backward, reduction, update: one interface for DeepSpeed at ZeRO 0 to 3 and for torch's DDP.

The gradient of a step is the exact mean over the valid samples of the global batch whatever the world: a micro-batch's
loss is its weighted sum times W / (valid samples of the step), and both engines average gradients over the W ranks. A
gradient that is not finite is never applied. With engine.sums: exact it is the exact sum over micro-batches instead,
rounded once: the same bits on every world.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.data.batch import Batch
from dist_trainer.distributed.world import World
from dist_trainer.draws import FORWARD, key
from dist_trainer.engine.exact import ExactReducer
from dist_trainer.engine.inference import Inference, Preprocess
from dist_trainer.errors import UserError
from dist_trainer.log.meter import Stopwatch
from dist_trainer.plan import Plan
from dist_trainer.tensors import HostCopy, State
from dist_trainer.tricks.auxiliary import outputs_of
from dist_trainer.tricks.compiling import compile_training, uncompiled
from dist_trainer.tricks.gradient_checkpointing import checkpoint_blocks
from dist_trainer.tricks.losses import Loss, weighted_sum
from dist_trainer.tricks.mixing import Mixing

# Printed on every rank and step, about names that other versions still need.
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
    """Clip the norm of the whole gradient to this value; null does not clip."""
    not_finite: Literal["skip", "stop", "roll_back"] = "skip"
    """A gradient with NaN or infinity is never applied. Then: skip the step; stop the run; or go back to the weights of
    the last checkpoint and continue after the samples since."""
    compile: bool = False
    """torch.compile of the training forward and backward, at ZeRO 0 to 2: faster steps, the same up to rounding, after
    some minutes of compilation. Evaluation runs uncompiled."""
    sums: Literal["fast", "exact"] = "fast"
    """exact: the same bits on any number of ranks, also across restarts on another number, given the same kind of
    processor and the same versions. Every sum over micro-batches, batches and ranks is then exact, rounded once, and
    kernels are those of run.deterministic. Not at engine.zero: 3, and not with compile, sync_bn, fused optimizers or
    data.source: stream."""
    threads: int = 1
    """With sums: exact, the threads of a rank on the CPU, since another number gives other bits."""
    gradient_checkpointing: bool = False
    """Recompute activations inside blocks in the backward pass: less memory, about a third more time, the same numbers.
    """

    @property
    def is_exact(self) -> bool:
        """Whether sums are the same bits on every world."""
        return self.sums == "exact"

    @property
    def cpu_threads(self) -> int | None:
        """None: as the environment says."""
        return self.threads if self.is_exact else None

    def check(self) -> None:
        """Raises UserError for settings that exclude each other."""
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise UserError(f"engine.clip_grad_norm: {self.clip_grad_norm} is not positive; null does not clip")
        if self.backend == "torch" and self.zero:
            raise UserError(f"engine.zero: {self.zero} needs engine.backend: deepspeed; torch's DDP is stage 0")
        if self.threads < 1:
            raise UserError(f"engine.threads: {self.threads} is not positive")
        if self.threads > 1 and self.sums == "fast":
            raise UserError(f"engine.threads: {self.threads} is for engine.sums: exact; set OMP_NUM_THREADS")
        for other, is_on in (("zero: 3", self.zero == 3), ("compile: true", self.compile)):
            if self.is_exact and is_on:
                raise UserError(f"engine.sums: exact cannot be promised with engine.{other}; change one of them")
        if self.compile and self.zero == 3:
            raise UserError(
                "engine.compile: gains nothing at engine.zero: 3, which gathers weights layer by layer and so cuts the "
                "graph into pieces; take ZeRO 0 to 2, or set it to false"
            )


class Engine(Inference):
    """What both backends share. `grad_norm` is that of the last step, before clipping, on the host."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        mixing: Mixing,
        config: EngineConfig,
        plan: Plan,
        world: World,
        preprocess: Preprocess,
        seed: int,
    ) -> None:
        super().__init__(model.to(world.device), config.precision, preprocess, world, config.is_exact)
        if config.gradient_checkpointing:
            checkpoint_blocks(model)
        if config.compile:
            compile_training(model, world.device)
        self.plan, self.config = plan, config
        self.grad_norm: torch.Tensor = torch.zeros(())
        self._loss, self._mixing, self._seed = loss, mixing, seed
        # Images are mixed before they are rounded; one type for a whole run, since another one compiles anew.
        self._input_type = torch.float32 if mixing.is_on else self._compute
        on_gpu = self._device.type == "cuda"
        self._generator: torch.Generator = (
            torch.cuda.default_generators[self._device.index] if on_gpu else torch.default_generator
        )
        self.forward_time = Stopwatch(self._device)
        self._micro_step = 0
        self._has_updated = False
        self._norm: tuple[torch.Tensor, HostCopy] | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._reducer: ExactReducer | None = None

    # What a backend provides

    optimizer: torch.optim.Optimizer

    def _forward(self, images: torch.Tensor) -> Any:
        """What the network gives in training: logits [m, K], or outputs that tricks/auxiliary.py knows."""
        raise NotImplementedError

    def _backward(self, loss: torch.Tensor) -> None:
        raise NotImplementedError

    def _reduce(self) -> None:
        """What `reduce` does, where there is something to do."""

    def _update(self) -> bool:
        """Apply the reduced gradients unless they are not finite; set `grad_norm`; clear the gradients."""
        raise NotImplementedError

    def optimizer_state(self) -> State:
        """Optimizer state by parameter name (collective; full on rank 0)."""
        raise NotImplementedError

    def load_optimizer_state(self, state: State) -> None:
        """Restore what `optimizer_state` gave on any stage and world. Call it before the first step.

        Raises UserError when other parameters are trained now.
        """
        raise NotImplementedError

    def _check_state(self) -> None:
        """After the first update: raises UserError for an optimizer whose state does not fit into a checkpoint."""
        raise NotImplementedError

    # What the loop calls

    def set_lr(self, rate: float) -> None:
        """Set the rate of every group, times its `lr_scale` where layers differ."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """One micro-batch: its gradient is added to the step's. Returns the weighted sum of losses (detached scalar).

        The last of `plan.forwards` calls reduces the gradients over the ranks. A ghost takes part in that; exact sums
        need none.
        """
        address: Any = batch.address
        if self.is_exact and batch.ghost:
            self._micro_step += 1
            return torch.zeros((), device=self._device)
        # Dropout and the like draw the same numbers for a slot on whichever rank it runs.
        self._generator.manual_seed(key(FORWARD, self._seed, address.step, address.slot))
        mix = self._mixing.draw(address.step, address.slot, batch.images.shape)
        images = mix.images(self._prepare(batch.images, self._input_type))
        with self.forward_time:
            outputs = outputs_of(self._forward(images)) or []
        labels = batch.labels.to(self._device, non_blocking=True)
        weight = batch.weight.to(self._device, non_blocking=True)
        (_, logits), *others = outputs
        total = weighted_sum(self._loss, logits.float(), labels, weight, mix)
        for share, auxiliary in others:
            total = total + share * weighted_sum(self._loss, auxiliary.float(), labels, weight, mix)
        # DDP and DeepSpeed average over the ranks; exact sums do not, since a factor of 3 would cost bits.
        over = 1 if self.is_exact else self.world.size
        self._backward(total * (over / self.plan.num_valid(address.step)))
        self._micro_step += 1
        return total.detach()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        with uncompiled() if self.config.compile else contextlib.nullcontext():
            return super().logits(images)

    def take_beyond(self) -> torch.Tensor | int:
        """How many gradient values of this rank's step were beyond what exact sums promise."""
        return self._reducer.take_beyond() if self._reducer is not None else 0

    @property
    def _is_last(self) -> bool:
        return self._micro_step == self.plan.forwards - 1

    def reduce(self) -> None:
        """End the reduction of the step's gradient and send its norm to the host. Nothing here waits for the device.

        What is launched between this and `step` runs while the host waits in `step`.
        """
        assert self._micro_step == self.plan.forwards, "a step is plan.forwards micro-batches"
        self._micro_step = 0
        self._reduce()

    def step(self) -> bool:
        """Update the weights. False, on every rank alike, when the gradient was not finite: nothing changed then."""
        if self._micro_step:
            self.reduce()
        applied = self._update()
        if applied and not self._has_updated:
            self._check_state()
            self._has_updated = True
        return applied

    def _send_norm(self) -> None:
        """For full gradients, equal on all ranks."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._norm = norm, HostCopy(norm)

    def _is_finite(self) -> bool:
        """Whether the gradient is, which is clipped then. The one wait of a step, without a collective."""
        assert self._norm is not None, "reduce() comes first"
        (norm, on_host), self._norm = self._norm, None
        self.grad_norm = on_host.read()
        if not math.isfinite(self.grad_norm.item()):
            return False
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_grad_norm, norm)
        return True

    # The weights

    @property
    def is_sharded(self) -> bool:
        """Whether each rank keeps a piece of every parameter, not all parameters."""
        return False

    def local_weights(self) -> State:
        """The live float32 weights that this rank keeps, by name: full parameters, or its 1-d piece of each."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def to_local(self, full: State) -> State:
        """Of full parameters, what this rank keeps."""
        return {name: full[name] for name, _ in self.module.named_parameters()}

    def to_full(self, parts: State) -> State:
        """Undo `to_local`: the ranks' pieces to full parameters (collective; on rank 0 alone where sharded)."""
        return parts

    def model_state(self) -> State:
        """float32 weights and buffers by name (collective; full on rank 0)."""
        state = {name: value.detach() for name, value in self.module.state_dict().items()}
        return {**state, **self.to_full(self.local_weights())}

    @contextlib.contextmanager
    def swapped_in(self, weights: State) -> Iterator[None]:
        """In this block the module holds `weights`; afterwards its own again, bit for bit (collective).

        `weights` are laid out as `local_weights`: rank 0's, which are broadcast first; where sharded, each rank's own.
        """
        own = list(self.local_weights().values())
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
        """Release the backend's resources, before the process group ends."""
