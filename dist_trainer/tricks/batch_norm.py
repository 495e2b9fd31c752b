"""Batch-norm running statistics that do not depend on the number of ranks.

Merging per-rank moving averages gives other numbers on other worlds: a moving average over M micro-batches one after
another is not the mean of W moving averages. So layers run with momentum 1, which leaves each micro-batch's own
statistics in their buffers; these are summed over all M micro-batches of a step and all ranks, and the step moves
`running <- (1 - momentum) * running + momentum * mean`. Evaluation and checkpoints `publish` the result.
"""

import torch
from torch import nn

from dist_trainer.distributed.exact_sums import joined, words
from dist_trainer.errors import UserError

BatchNorm = nn.modules.batchnorm._BatchNorm  # BatchNorm1d to 3d, SyncBatchNorm, timm's variants


def keep_statistics(layer: BatchNorm) -> None:
    """Have a layer normalise with the running statistics it has, from now on and in training too."""
    layer.eval()
    vars(layer).update(train=lambda mode=True: layer, keeps_statistics=True)  # model.train() skips it


def moving_layers(model: nn.Module) -> dict[str, BatchNorm]:
    """By name, the batch-norm layers whose running statistics change in training: those that are not frozen."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNorm)
        and layer.running_mean is not None
        and not getattr(layer, "keeps_statistics", False)
    }


class RunningStatistics:
    """The running mean and variance of the `moving_layers` of `model`, in one flat float32 tensor [2C].

    Takes over the layers' buffers (they become views of one tensor, so that adding a micro-batch is one operation)
    and their momentum. Build it when the model stands on its device. Raises UserError for a layer with
    momentum None (a cumulative average), which has no meaning here.
    """

    def __init__(self, model: nn.Module, is_exact: bool = False) -> None:
        """`is_exact`: sums over micro-batches are the same bits on every world, and twice as long."""
        self._is_exact = is_exact
        named = moving_layers(model)
        self._layers = list(named.values())
        self._names = [f"{name}.{kind}" for name in named for kind in ("running_mean", "running_var")]
        for name, layer in named.items():
            if layer.momentum is None:
                raise UserError(f"model: batch-norm layer {name!r} has momentum None; give it a number, usually 0.1")
        buffers = [b for layer in self._layers for b in (layer.running_mean, layer.running_var) if b is not None]
        device = buffers[0].device if buffers else torch.device("cpu")
        self._batch = torch.cat([b.float() for b in buffers]) if buffers else torch.zeros(0)
        """The layers' buffers: the statistics of the last micro-batch, or those that were loaded."""
        self.running = self._batch.clone()
        self.sums = torch.zeros(len(self._batch) * (2 if is_exact else 1), dtype=torch.float64, device=device)
        self._sizes = sizes = [len(b) for b in buffers]
        momenta = [layer.momentum for layer in self._layers for _ in range(2)]
        self._momentum = torch.repeat_interleave(
            torch.tensor(momenta, dtype=torch.float32), torch.tensor(sizes, dtype=torch.int64)
        ).to(device)
        views = iter(torch.split(self._batch, sizes)) if sizes else iter(())
        for layer in self._layers:
            layer.running_mean, layer.running_var = next(views), next(views)
            layer.momentum = 1.0
        counters = [layer.num_batches_tracked for layer in self._layers if layer.num_batches_tracked is not None]
        self._counters = counters
        self._num_updates = int(counters[0]) if counters else 0

    def __len__(self) -> int:
        return len(self._batch)

    def add(self) -> None:
        """Count the micro-batch that the layers saw last."""
        self.sums += words(self._batch).flatten() if self._is_exact else self._batch

    def take(self) -> torch.Tensor:
        """The sums of this rank since the last call (float64 [2C] or [4C]), to be summed over the ranks."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def update(self, sums: torch.Tensor, num_slots: int) -> None:
        """Move the running statistics by one step, given the sums over all `num_slots` micro-batches."""
        if self._is_exact:
            sums = joined(sums.view(2, -1))
        self.running.lerp_((sums / num_slots).float(), self._momentum)
        self._num_updates += 1

    def publish(self) -> None:
        """Put the running statistics into the layers' buffers; `num_batches_tracked` becomes the number of updates.

        Training is not affected: a training forward overwrites the buffers with its own batch's statistics.
        """
        self.load(self.running)
        for counter in self._counters:
            counter.fill_(self._num_updates)

    def load(self, statistics: torch.Tensor) -> None:
        """Load statistics (float32 [2C]) into the layers, until `publish` or the next training forward."""
        self._batch.copy_(statistics)

    def unflatten(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 [2C] as buffers by name: {"bn1.running_mean": [C1], "bn1.running_var": [C1], ...}."""
        return dict(zip(self._names, torch.split(statistics, self._sizes), strict=True)) if self._sizes else {}

    def flatten(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """Undo `unflatten`: float32 [2C] on the model's device; names that are missing keep what the layers hold."""
        now = self.unflatten(self._batch)
        parts = [state.get(name, value).to(self._batch) for name, value in now.items()]
        return torch.cat(parts) if parts else self._batch.clone()
