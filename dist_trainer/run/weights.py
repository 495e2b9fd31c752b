"""The weights that a run can score and save: the model's and their moving average, with their batch-norm statistics."""

import contextlib
from collections.abc import Iterator

import torch

from dist_trainer.data.stream import FixedSampleStream
from dist_trainer.distributed.collectives import differing_ranks, gather_json
from dist_trainer.engine.base import Engine
from dist_trainer.errors import UserError
from dist_trainer.log.names import ACCURACY, SCORES
from dist_trainer.tensors import State, bit_sums, sha256
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema
from dist_trainer.tricks.precise_bn import re_estimate


class Weights:
    """Swaps sets of weights into the engine's module, and the training weights back, bit for bit."""

    def __init__(
        self, engine: Engine, batch_norm: RunningStatistics, ema: Ema | None, bn_samples: FixedSampleStream | None
    ) -> None:
        self._engine, self._batch_norm, self._ema, self._bn_samples = engine, batch_norm, ema, bn_samples
        self.re_estimated: dict[str, State] = {}
        """Batch-norm statistics by name, of the weights that were last `swapped_in` under it."""

    @property
    def all_names(self) -> list[str]:
        """All weights that are scored while training, by name (log/tracker.py)."""
        names = ["model", *(["ema"] if self._ema is not None else [])]
        return [name + kind for name in names for kind in ("", "_bn") if not kind or self.can_re_estimate]

    def logged(self) -> dict[str, tuple[str, str]]:
        """Metrics of the validation of this run: name -> (weights, top1 or top5 or loss)."""
        return {f"{SCORES[name][0]}/{key}": (name, key) for name in self.all_names for key in ACCURACY}

    @property
    def names(self) -> list[str]:
        """model, and ema once it has begun; the same on every rank."""
        return ["model", *(["ema"] if self._ema is not None and self._ema.has_begun else [])]

    @contextlib.contextmanager
    def swapped_in(self, name: str, state: State | None = None) -> Iterator[None]:
        """In this block the module holds the weights of this name, or the full ones of `state` (collective)."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._batch_norm.publish)
            self._batch_norm.publish()
            if self._ema is not None:
                self._ema.settle()  # before the weights change
            if state is not None:
                stack.enter_context(self._engine.swapped_in(self._engine.to_local(state)))
                self._batch_norm.load(self._batch_norm.flatten(state))
            elif name == "ema":
                assert self._ema is not None
                stack.enter_context(self._engine.swapped_in(self._ema.weights))
                self._batch_norm.load(self._ema.statistics)
            yield

    @property
    def can_re_estimate(self) -> bool:
        return self._bn_samples is not None and len(self._batch_norm) > 0

    def re_estimate(self, name: str, step: int) -> None:
        """Replace the statistics of the weights in the module by re-estimated ones, until the block ends (collective).

        The samples have the crop size and the ramps of `step`, which the weights were trained on.

        Raises UserError, on every rank, for storage that cannot be reached.
        """
        assert self._bn_samples is not None
        bn_samples = self._bn_samples
        outages: list[str] = []

        def batches() -> Iterator[tuple[torch.Tensor, bool]]:
            for batch in bn_samples.at(step):
                outages.extend([batch.outage] if batch.outage else [])
                yield batch.images, not batch.ghost

        engine = self._engine
        found = re_estimate(engine.module, batches(), engine.logits, is_exact=engine.is_exact)
        for line in (line for rank in gather_json(self._engine.world, outages) for line in rank):
            raise UserError(line)
        self._batch_norm.load(self._batch_norm.flatten(found))
        self.re_estimated[name] = found

    def check_ranks(self) -> None:
        """Raises UserError, on every rank, if a rank's weights or statistics are not those of the others (collective).

        They are computed on each rank from the same sums; only a broken device or a bug makes them differ. Sharded
        weights are on no two ranks.
        """
        named = {"batch-norm's statistics": self._batch_norm.running}
        if not self._engine.is_sharded:
            named |= self._engine.local_weights()
        if found := differing_ranks(bit_sums(named.values())):
            ranks, first = found
            raise UserError(
                f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: other weights than the other "
                f"ranks have, first in {list(named)[first]}; a device is broken, or this is a bug. Nothing was saved "
                "since: start again, from the last checkpoint, without the device"
            )

    def state(self) -> State:
        """Weights and buffers that the module holds now (collective; full on rank 0)."""
        return self._engine.model_state()

    def ema_state(self) -> State:
        """Weights and buffers of the average (collective; full on rank 0)."""
        assert self._ema is not None
        return {
            **self._engine.model_state(),
            **self._engine.to_full(self._ema.weights),
            **self._batch_norm.unflatten(self._ema.statistics),
        }

    def digests(self) -> dict[str, str]:
        """sha256 of the model and its average, as a checkpoint holds them (collective; on rank 0)."""
        self._batch_norm.publish()
        states = {"model": self.state(), **({"ema": self.ema_state()} if self._ema is not None else {})}
        return {name: sha256(state) for name, state in states.items()} if self._engine.world.is_main else {}

    def load_ema(self, state: State, num_updates: int) -> None:
        """Undo `ema_state`, on any stage and world."""
        assert self._ema is not None
        self._ema.load(self._engine.to_local(state), self._batch_norm.flatten(state), num_updates)
