"""Gradients of a step as exact sums over its micro-batches (distributed/exact_sums.py), in the place of DDP.

Where every rank has one micro-batch, gradients travel as they are, in float32; else each rank's own sum does, in
float64. Each rank adds up its piece of a bucket and sends the result to all, while backward computes the next bucket.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_trainer.distributed.exact_sums import BOUND, add_on_grid, from_grid, sum_on_grid
from dist_trainer.distributed.world import World
from dist_trainer.plan import Plan

BUCKET = 25 * 2**18
"""Elements that are exchanged together: 25 MiB of float32, as in DDP. With a quarter of that, a step of ResNet-18 took
7% longer on 2 ranks that shared 2 cores with gloo's threads."""


@dataclass
class _Bucket:
    """Parameters, in the order in which backward reaches them, padded to a multiple of the world."""

    number: int
    parameters: list[nn.Parameter]
    own: torch.Tensor
    """[W, p]: this rank's gradient (float32), or its sum over several micro-batches (float64, on the grid)."""
    whole: torch.Tensor
    """float32 [W, p]: the sum over all ranks; parameters' gradients are views of it."""
    touched: set[int] = field(default_factory=set)
    """Of which parameters `own` has this step's values."""
    pending: int = 0
    others: torch.Tensor | None = None
    """[W, p]: this rank's piece of every rank's `own`, while it arrives."""
    works: list[Any] = field(default_factory=list)

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []


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
        world, first = self._world, 0
        shape = world.size, -(-sum(each.numel() for each in parameters) // world.size)
        own = torch.zeros(shape, dtype=torch.float32 if self._alone else torch.float64, device=world.device)
        bucket = _Bucket(len(self._buckets), parameters, own, torch.zeros(shape, device=world.device))
        for number, parameter in enumerate(parameters):
            part = slice(first, first + parameter.numel())
            gradient = bucket.whole.view(-1)[part].view(parameter.shape)
            self._place[parameter] = bucket, number, own.view(-1)[part], gradient
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            first += parameter.numel()
        self._buckets.append(bucket)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of the next micro-batch of this rank's step."""
        for bucket in self._buckets:
            bucket.pending = len(bucket.parameters)
        loss.backward()  # type: ignore[no-untyped-call]
        self._seen += 1

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
            # In their order, which is the same on every rank.
            while self._launched < len(self._buckets) and not self._buckets[self._launched].pending:
                self._launch()

    def _launch(self) -> None:
        """Send the next bucket, and complete the one before, which had the time of this one's backward to arrive."""
        bucket = self._buckets[self._launched]
        for number, parameter in enumerate(bucket.parameters):
            if number not in bucket.touched:
                self._place[parameter][2].zero_()
        bucket.touched.clear()
        if self._world.size > 1:
            bucket.others = torch.empty_like(bucket.own)
            bucket.works = self._exchange(bucket.own, bucket.others, 2 * bucket.number)
        if bucket.number:
            self._complete(self._buckets[bucket.number - 1])
        self._launched += 1

    def _complete(self, bucket: _Bucket) -> None:
        """Add up this rank's piece of a bucket, and send it to all."""
        size, rank = self._world.size, self._world.rank
        with torch.cuda.stream(self._side) if self._side else contextlib.nullcontext():
            if self._side:
                self._side.wait_stream(torch.cuda.current_stream(self._world.device))
            bucket.wait()
            own, result = bucket.own[rank], bucket.whole[rank]
            others = [] if bucket.others is None else [piece for r, piece in enumerate(bucket.others) if r != rank]
            if self._alone:
                self.beyond += sum_on_grid([own, *others], result, self._limit)
            else:
                for piece in others:
                    own.add_(piece)
                from_grid(own, result)
            if self._side and bucket.others is not None:
                bucket.others.record_stream(self._side)  # it is freed before that stream has read it
            bucket.others = None
            if size > 1:
                bucket.works = self._gather(bucket.whole, 2 * bucket.number + 1)

    def finish(self) -> None:
        """Every rank's `.grad` becomes the step's gradient, the same bits (collective)."""
        while self._launched < len(self._buckets):
            self._launch()
        self._complete(self._buckets[-1])
        for bucket in self._buckets:
            bucket.wait()
            for parameter in bucket.parameters:
                parameter.grad = self._place[parameter][3]
        if self._side:
            torch.cuda.current_stream(self._world.device).wait_stream(self._side)
        self._seen = self._launched = 0

    def take_beyond(self) -> torch.Tensor | int:
        beyond, self.beyond = self.beyond, 0
        if self._side and isinstance(beyond, torch.Tensor):
            beyond.record_stream(torch.cuda.current_stream(self._world.device))
        return beyond

    # gloo's own all-to-all copies what stays on a rank, and its all-gather takes 3 times as long as pairs of messages.

    def _exchange(self, own: torch.Tensor, others: torch.Tensor, tag: int) -> list[Any]:
        """Row r of every rank's `own` to rank r, which gets it in the sender's row of `others`."""
        if self._side:
            return [dist.all_to_all_single(others, own, async_op=True)]
        return self._messages(lambda r: own[r], lambda r: others[r], tag)

    def _gather(self, whole: torch.Tensor, tag: int) -> list[Any]:
        """Each rank's own row of `whole` to all."""
        mine = whole[self._world.rank]
        if self._side:
            return [dist.all_gather_into_tensor(whole, mine, async_op=True)]
        return self._messages(lambda r: mine, lambda r: whole[r], tag)

    def _messages(self, sent: Any, received: Any, tag: int) -> list[Any]:
        ranks = [rank for rank in range(self._world.size) if rank != self._world.rank]
        return [dist.irecv(received(rank), rank, tag=tag) for rank in ranks] + [
            dist.isend(sent(rank), rank, tag=tag) for rank in ranks
        ]
