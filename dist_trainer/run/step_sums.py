"""One asynchronous sum over the ranks per step: loss, counts, stop votes, batch-norm sums."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_trainer.data.bad_samples import BadSample, BadSampleLog
from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import PackedSum, gather_json
from dist_trainer.distributed.exact_sums import words
from dist_trainer.distributed.processes import STOP_SIGNALS, StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.log.meter import Meter
from dist_trainer.plan import Plan
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema

CANNOT_SAVE = "checkpoints that failed"
"""Asks all ranks to stop, as a signal does."""
VOTES = (*STOP_SIGNALS, CANNOT_SAVE)


class Stopped(Exception):
    """An evaluation was cut short, since some rank was asked to stop."""


class StepSums:
    """`exchange` collects the sum of the step before and starts that of this one; `decide` says whether the step's
    update was made; `finish` waits for the last sum.

    Waiting earlier or later changes no value, so logs, evaluations and saves may call `finish` between steps.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        batch_norm: RunningStatistics,
        ema: Ema | None,
        meter: Meter,
        bad_samples: BadSampleLog,
        listing: Path,
        stop_request: StopRequest,
        world: World,
        is_exact: bool = False,
        num_beyond: int = 0,
    ) -> None:
        self.stop: str | None = None
        """The signal (or CANNOT_SAVE) that asked some rank to stop: the same on every rank at the same step."""
        self._stopped_at: float | None = None
        self._asked_for: str | None = None
        self.num_beyond = num_beyond
        """Values of gradients that exact sums did not promise, of all ranks, so far."""
        self._is_exact = is_exact
        self._plan, self._batch_norm, self._ema = plan, batch_norm, ema
        self._meter, self._stop_request = meter, stop_request
        self._bad_samples, self._listing = bad_samples, listing
        self._world, self._device = world, world.device
        self._head = 5 + len(VOTES)
        self._sum = PackedSum(self._head, world.device)
        self._applied = True
        self._votes: tuple[Any, torch.Tensor] | None = None
        self._reset()

    def check_stop(self) -> None:
        """Between two batches of an evaluation (collective): raises Stopped, on every rank after the same batch.

        The votes are those of the batch before, so nobody waits.
        """
        if self._votes is not None:
            work, votes = self._votes
            work.wait()
            self._count(votes.tolist())
        if self.stop:
            raise Stopped
        votes = torch.tensor(self._own_votes())
        self._votes = dist.all_reduce(votes, group=self._world.host_group, async_op=True), votes

    def ask_for(self, stop: str) -> None:
        """Stop all ranks after this step, for one of VOTES."""
        self._asked_for = stop

    @property
    def stopped_at(self) -> float | None:
        """When (time.monotonic) this rank first knew that it is to stop: by its own signal, or by the others' votes."""
        heard = self._stop_request.heard
        return heard[1] if heard else self._stopped_at

    def _own_votes(self) -> list[float]:
        return [float(name in (self._stop_request.signal, self._asked_for)) for name in VOTES]

    def _count(self, votes: Sequence[float]) -> None:
        for name, count in zip(VOTES, votes, strict=True):
            if count:
                self.stop = name
        if self.stop and self.stopped_at is None:
            self._stopped_at = time.monotonic()

    def _reset(self) -> None:
        self._loss = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._num_samples = 0.0
        self._bad: list[BadSample] = []
        self._outages: list[str] = []

    def add(self, loss_sum: torch.Tensor, batch: Batch) -> None:
        """Count one micro-batch: its weighted loss sum (scalar) and, unless it is a ghost, its batch statistics."""
        self._loss += words(loss_sum) if self._is_exact else torch.stack([loss_sum, torch.zeros_like(loss_sum)])
        self._num_samples += batch.num_valid
        self._bad += batch.bad
        self._outages += [batch.outage] if batch.outage else []
        if not batch.ghost:
            self._batch_norm.add()

    def exchange(self, beyond: torch.Tensor | int = 0) -> None:
        """Start the sum of a step, before its update.

        `beyond`: how many values of this rank's gradients exact sums do not promise (engine/exact.py).
        """
        self.finish()
        pinned = self._device.type == "cuda"  # a copy from pageable memory would wait for the device
        num_problems = float(len(self._bad) + len(self._outages))
        values = [0.0, 0.0, 0.0, self._num_samples, num_problems, *self._own_votes()]
        head = torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(self._device, non_blocking=True)
        head[:2] = self._loss
        head[2] = beyond
        self._sum.launch(torch.cat([head, self._batch_norm.take()]))
        self._problems = [asdict(bad) for bad in self._bad], self._outages
        self._reset()

    def decide(self, applied: bool) -> None:
        """Whether the update of the step whose sum was started last was made. If not, its statistics do not count."""
        self._applied = applied
        if not applied:
            # NaN in a buffer would survive: even momentum 1 computes 0 * NaN.
            self._batch_norm.publish()
            self.finish()  # an outage must be known before the step is counted

    def finish(self) -> None:
        """Collect the last step's sum, if that has not been done."""
        if not self._sum.is_pending:
            return
        (loss_sum, loss_rest, beyond, num_samples, num_problems, *votes), vector = self._sum.collect()
        self.num_beyond += int(beyond)
        if num_problems:
            self._share_problems()
        if self._applied:
            self._meter.add(loss_sum + loss_rest, num_samples)
            self._batch_norm.update(vector[self._head :], self._plan.num_slots)
            if self._ema is not None:
                self._ema.update_statistics(self._batch_norm.running)
        self._count(votes)

    def _share_problems(self) -> None:
        """Tell all ranks of bad samples and outages that some rank met (collective; rare)."""
        for bad, outages in gather_json(self._world, self._problems):
            new = self._bad_samples.add(BadSample(**each) for each in bad)
            if self._world.is_main:
                self._bad_samples.write(self._listing, new)
            if outages:
                self._bad_samples.outage = self._bad_samples.outage or outages[0]
