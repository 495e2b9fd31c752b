"""PreciseBN: batch-norm's statistics re-estimated from training samples with frozen weights, over all ranks.

A running average lags behind its weights, and EMA or averaged weights have no statistics: pool those of a few thousand
samples (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3). A mean of batch variances would lose what
differs between batches and ranks, so n, mean and M2 = sum of (x - mean)^2 are pooled, in float64.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.tensors import State
from dist_trainer.tricks.batch_norm import BatchNorm, moving_layers

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreciseBnConfig:
    """Batch-norm statistics re-estimated before an evaluation."""

    num_samples: int = 0
    """Training samples that batch-norm's statistics are re-estimated from before each evaluation. 0: off; 8192 is
    usual. Whole micro-batches, at least one, at most the training set."""
    transform: Literal["train", "eval"] = "train"
    """Augment these samples as in training, or prepare them as in evaluation."""

    def num_slots(self, micro_batch: int, set_size: int) -> int:
        """Micro-batches over all ranks together. Raises UserError for a negative number of samples."""
        if self.num_samples < 0:
            raise UserError(f"precise_bn.num_samples: {self.num_samples}; give 0 to turn it off, or 8192")
        return self.num_samples and max(1, min(self.num_samples, set_size) // micro_batch)


def merge(parts: torch.Tensor) -> torch.Tensor:
    """Pool K disjoint samples: float64 [K, 3, C] with rows n, mean, M2 per channel, to [3, C].

    Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for K parts at once:
    n = sum n_k, mean = sum n_k mean_k / n, M2 = sum M2_k + sum n_k (mean_k - mean)^2. Parts with n = 0 weigh nothing.
    """
    n, mean, m2 = parts.unbind(1)
    total = n.sum(0)
    pooled = (n / total.clamp(min=1) * mean).sum(0)
    return torch.stack([total, pooled, (m2 + n * (mean - pooled).square()).sum(0)])


@torch.no_grad()
def re_estimate(
    model: nn.Module, batches: Iterable[tuple[T, bool]], forward: Callable[[T], object], *, is_exact: bool = False
) -> State:
    """Statistics of the `moving_layers` of `model` over all ranks' batches, to `copy_` into its buffers.

    `batches` are this rank's: (batch, whether it counts), equally many on every rank, since a forward may hold
    collectives (ZeRO 3, SyncBatchNorm); surplus ones run without counting. `forward(batch)` runs the model, whose
    batch-norm layers alone are in training mode meanwhile, whatever mode it was in. On any way out, modes, momenta,
    buffers and counters are as they were.

    `is_exact`: batches are pooled one by one, those that the ranks run at the same time in the order of ranks, which
    gives the same bits on every world; that is a collective per batch, of 24 bytes per channel and rank.

    Returns float32 {"layer.running_mean", "layer.running_var"} (unbiased over all n), the same bits on every rank,
    without the layers that no counted batch reached on any rank: they keep theirs. As good as torch's batch
    statistics: against float64 over the same activations 1e-6 in contiguous float32, 1e-4 channels_last (and
    [N, C]), 5e-4 bf16. Far from zero, batch means in float32 cost the variance another 2e-7 |mean| / (std sqrt(n))
    of itself: 2e-6 at 1,000 standard deviations and 8,192 values.
    Raises UserError that names a layer with one value per channel, which has no variance.
    """
    layers = {name: layer for name, layer in moving_layers(model).items() if layer.track_running_stats}
    if not layers:
        return {}
    with _training_alone(model, list(layers.values())), _Pool(layers, is_exact) as pool:
        for batch, counts in batches:
            pool.counts = counts
            forward(batch)
            pool.flush()
    return pool.over_ranks()


@contextlib.contextmanager
def _training_alone(model: nn.Module, layers: list[BatchNorm]) -> Iterator[None]:
    """`layers` in training mode with momentum 1, so that their buffers hold the last batch's statistics; then back."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    buffers = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        for module, _ in modes:
            module.training = False  # not by eval() and train(): a layer of timm's has dropout as its child
        for layer in layers:
            layer.training, layer.momentum = True, 1.0
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
        for buffer, value in buffers:
            buffer.copy_(value)  # never rebound: it may be a view of one flat tensor


class _Pool(contextlib.ExitStack):
    """Hooks on layers, and what was seen: n, mean, M2 [3, C] over the channels of all layers, one after another.

    The statistics are those that the layers compute anyway; a forward adds a few operations on flat tensors.
    """

    def __init__(self, layers: dict[str, BatchNorm], is_exact: bool) -> None:
        super().__init__()
        self._is_exact = is_exact and dist.is_initialized()
        self.counts = True
        self._pending = dict.fromkeys(layers, 0)
        """n of each layer's call whose statistics stand in its buffers and were not added yet."""
        self._means: list[Any] = [layer.running_mean for layer in layers.values()]
        self._variances: list[Any] = [layer.running_var for layer in layers.values()]
        self._sizes = [len(mean) for mean in self._means]
        self._total = torch.zeros(3, sum(self._sizes), dtype=torch.float64, device=self._means[0].device)
        self._n: tuple[list[int], torch.Tensor] = [], self._total
        for name, layer in layers.items():
            self.enter_context(layer.register_forward_pre_hook(partial(self._before, name)))
            if isinstance(layer, nn.SyncBatchNorm):
                self.enter_context(layer.register_forward_hook(_own_statistics))
        self._clear()

    def _before(self, name: str, layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if self._pending[name]:
            self.flush()  # a layer that runs twice in one forward is about to overwrite what it saw first
        shape = inputs[0].shape
        self._pending[name] = n = inputs[0].numel() // shape[1]
        if n < 2:
            raise UserError(
                f"precise_bn: batch-norm layer {name!r} sees {n} value per channel (input {list(shape)}), "
                "which has no variance; give batch.micro_batch 2 or more"
            )

    def flush(self) -> None:
        """Add what stands in the buffers of pending layers, if this batch counts."""
        pending = list(self._pending.values())
        if (self.counts or self._is_exact) and any(pending):
            if pending != self._n[0]:  # seldom, as it waits for the device: when shapes change
                n = torch.tensor(pending, dtype=torch.float64).repeat_interleave(torch.tensor(self._sizes))
                self._n = pending, n.to(self._total.device)
            n = self._n[1]
            m2 = torch.cat(self._variances).double() * (n - 1).clamp(min=0)  # torch divided by n - 1
            seen = torch.stack([n, torch.cat(self._means).double(), m2])
            for part in self._of_all_ranks(seen if self.counts else torch.zeros_like(seen)):
                self._total = merge(torch.stack([self._total, part]))
        self._pending = dict.fromkeys(self._pending, 0)
        self._clear()

    def _of_all_ranks(self, seen: torch.Tensor) -> list[torch.Tensor]:
        """What is pooled now: what this rank has seen, or, for exact sums, what each has seen, in their order."""
        if not self._is_exact:
            return [seen]
        ranks = seen.new_empty(dist.get_world_size(), *seen.shape)
        dist.all_gather(list(ranks.unbind()), seen)
        return list(ranks)

    def _clear(self) -> None:
        """Finite buffers: momentum 1 computes 0 x what they hold, so a NaN would come back from every later batch."""
        torch._foreach_zero_([*self._means, *self._variances])

    def over_ranks(self) -> State:
        """The result over all ranks, in one collective (24 bytes per channel and rank: 0.6 MB for ResNet-50).

        Gathered and merged by every rank in the same order. One sum could not do it: E[x^2] - mean^2 loses six of
        sixteen digits at a mean of 1,000 standard deviations, and M2 needs the mean of all ranks first.
        """
        total = self._total
        if dist.is_initialized() and not self._is_exact:
            ranks = total.new_empty(dist.get_world_size(), *total.shape)
            dist.all_gather(list(ranks.unbind()), total)
            total = merge(ranks)
        state = {}
        for name, (n, mean, m2) in zip(self._pending, torch.split(total, self._sizes, dim=1), strict=True):
            if n[0] > 0:
                state[f"{name}.running_mean".lstrip(".")] = mean.float()
                state[f"{name}.running_var".lstrip(".")] = (m2 / (n - 1)).float()
        return state


def _own_statistics(layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """What this rank's input has, in place of SyncBatchNorm's statistics over all ranks' inputs, surplus ones too."""
    variance, mean = torch.var_mean(inputs[0].float(), [d for d in range(inputs[0].dim()) if d != 1])
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
