"""Gradients of a step as exact sums over its micro-batches (distributed/exact_sums.py), in the place of DDP.

Where every rank has one micro-batch, gradients travel as they are, in float32; else each rank's own sum does, in
float64. Each rank adds up its piece of a bucket and sends the result to all, while backward computes the next bucket.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.distributed.exact_sums import BOUND, add_on_grid, from_grid
from dist_trainer.distributed.world import World
from dist_trainer.plan import Plan

BUCKET = 1 << 21
"""Elements that are exchanged together: 8 MiB of float32."""


@dataclass
class _Bucket:
    """Parameters, in the order in which backward reaches them, padded to a multiple of the world."""

    parameters: list[nn.Parameter]
    own: torch.Tensor
    """[W p]: this rank's gradient (float32), or its sum over several micro-batches (float64, on the grid)."""
    whole: torch.Tensor
    """float32 [W p]: the sum over all ranks; parameters' gradients are views of it."""
    touched: set[int]
    """Of which parameters `own` has this step's values."""
    pending: int = 0
    others: torch.Tensor | None = None
    work: Any = None


class ExactReducer:
    """Takes gradients from the backward of each micro-batch; `finish` puts their sum into `.grad` (collective).

    The model must stay as it is: parameters contiguous, its requires_grad unchanged. A parameter that no micro-batch of
    a rank reaches adds nothing there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], plan: Plan, world: World) -> None:
        self._world, self._limit = world, BOUND / plan.num_slots
        self._alone = plan.forwards == 1  # every rank has one micro-batch
        self._num_own = len(plan.slots_of(world.rank))
        self._side: Any = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buckets: list[_Bucket] = []
        self._place: dict[nn.Parameter, tuple[_Bucket, int, torch.Tensor, torch.Tensor]] = {}
        waiting: list[nn.Parameter] = []
        for parameter in reversed(list(parameters)):
            waiting.append(parameter)
            if sum(each.numel() for each in waiting) >= BUCKET:
                self._new_bucket(waiting)
                waiting = []
        if waiting:
            self._new_bucket(waiting)
        self._seen = self._launched = 0
        self.beyond: torch.Tensor | int = 0
        """How many values were above the bound's share since `take_beyond`: their sums may depend on the order."""

    def _new_bucket(self, parameters: list[nn.Parameter]) -> None:
        size, first = sum(each.numel() for each in parameters), 0
        size += -size % self._world.size
        kind, device = torch.float32 if self._alone else torch.float64, self._world.device
        bucket = _Bucket(
            parameters, torch.zeros(size, dtype=kind, device=device), torch.zeros(size, device=device), set()
        )
        for number, parameter in enumerate(parameters):
            part = slice(first, first + parameter.numel())
            self._place[parameter] = bucket, number, bucket.own[part], bucket.whole[part].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            first += parameter.numel()
        self._buckets.append(bucket)

    def _take(self, parameter: torch.Tensor) -> None:
        """Autograd has this parameter's gradient of the micro-batch, which is in the cache now."""
        bucket, number, own, _ = self._place[parameter]  # type: ignore[index]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._alone:
            own.copy_(gradient.flatten())
        else:
            first = number not in bucket.touched
            self.beyond += add_on_grid(own, gradient.flatten(), self._limit, first=first)
        bucket.touched.add(number)
        bucket.pending -= 1
        if self._seen == self._num_own - 1:
            self._launch_ready()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of the next micro-batch of this rank's step."""
        for bucket in self._buckets:
            bucket.pending = len(bucket.parameters)
        loss.backward()  # type: ignore[no-untyped-call]
        self._seen += 1

    def _launch_ready(self) -> None:
        """Buckets whose gradients are whole, in their order, which is the same on every rank."""
        while self._launched < len(self._buckets) and not self._buckets[self._launched].pending:
            self._launch(self._buckets[self._launched])

    def _launch(self, bucket: _Bucket) -> None:
        for number, parameter in enumerate(bucket.parameters):
            if number not in bucket.touched:
                self._place[parameter][2].zero_()
        bucket.touched.clear()
        if self._world.size > 1:
            bucket.others = torch.empty_like(bucket.own)
            bucket.work = dist.all_to_all_single(bucket.others, bucket.own, async_op=True)
        self._launched += 1
        if self._launched > 1:
            self._complete(self._buckets[self._launched - 2])  # it had the time of a bucket

    def _complete(self, bucket: _Bucket) -> None:
        """Add up this rank's piece of a bucket, and send it to all."""
        with torch.cuda.stream(self._side) if self._side else contextlib.nullcontext():
            if self._side:
                self._side.wait_stream(torch.cuda.current_stream(self._world.device))
            if bucket.work is not None:
                bucket.work.wait()
            size = self._world.size
            pieces = (bucket.own if bucket.others is None else bucket.others).view(size, -1)
            if self._alone:
                total = torch.empty(pieces.shape[1], dtype=torch.float64, device=pieces.device)
                for rank, piece in enumerate(pieces):
                    self.beyond += add_on_grid(total, piece, self._limit, first=rank == 0)
            else:
                total = pieces[0] if size == 1 else pieces.sum(0)
            if size == 1:
                from_grid(total, bucket.whole)
            else:
                piece = torch.empty(len(total), device=total.device)
                from_grid(total, piece)
                bucket.work = dist.all_gather_into_tensor(bucket.whole, piece, async_op=True)
                bucket.others = piece  # kept until it has arrived

    def finish(self) -> None:
        """Every rank's `.grad` becomes the step's gradient, the same bits (collective)."""
        while self._launched < len(self._buckets):
            self._launch(self._buckets[self._launched])
        self._complete(self._buckets[-1])
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
            bucket.work = bucket.others = None
            for parameter in bucket.parameters:
                parameter.grad = self._place[parameter][3]
        if self._side:
            torch.cuda.current_stream(self._world.device).wait_stream(self._side)
        self._seen = self._launched = 0

    def take_beyond(self) -> torch.Tensor | int:
        beyond, self.beyond = self.beyond, 0
        return beyond
