"""The epoch's order: a pure function position -> sample id of (seed, epoch, index), with random access.

Blocks of 64 neighbouring samples are permuted and laid end to end; the result is cut into lanes of nearly equal
length; each lane is permuted within windows of 512 samples. Consecutive chunks of a batch come from consecutive
lanes, so a batch mixes many blocks while each reader touches few. Integer hashing only: an order never changes
between platforms or releases (a golden test pins it).

`full` permutes all samples, `none` leaves them. `balanced` shows the classes equally often: rounds of one sample per
class, each class going through its own samples in permuted cycles that run on from epoch to epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dist_trainer.draws import BLOCKS, CLASS_TURN, FULL, IN_CLASS, WINDOW, hashes, key, permutation, permute
from dist_trainer.errors import UserError

Ids = npt.NDArray[np.int64]
Kind = Literal["window", "full", "balanced", "none"]


@dataclass(frozen=True, kw_only=True)
class OrderSpec:
    """The parameters of an order, besides the epoch and the shards' sizes. Part of a checkpoint."""

    seed: int
    lanes: int
    chunk: int
    kind: Kind = "window"
    block: int = 64
    window: int = 512


def _parts(labels: npt.NDArray[np.int32]) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """(number of the first sample, labels) in pieces of four million."""
    for first in range(0, len(labels), 1 << 22):
        yield first, labels[first : first + (1 << 22)]


class ClassOrder:
    """Rounds of one sample per class, `num_samples // num_classes` rounds an epoch. Raises UserError without labels."""

    def __init__(self, labels: npt.NDArray[np.int32], seed: int) -> None:
        """`labels` int32 [N]; samples with a negative one are left out."""
        self._seed = seed
        num_classes = int(labels.max(initial=-1)) + 1
        if not num_classes:
            raise UserError("data.order: balanced, but no sample has a label")
        counts = np.zeros(num_classes, np.int64)
        for _, part in _parts(labels):
            counts += np.bincount(part[part >= 0], minlength=num_classes)
        num_known = int(counts.sum())
        # Sorted by class part by part, which takes a sixth of the memory of sorting all at once.
        self._ids = np.empty(num_known, np.uint32 if len(labels) < 2**32 else np.int64)
        end = np.cumsum(counts) - counts
        for first, part in _parts(labels):
            known = np.flatnonzero(part >= 0)
            narrow = part[known].astype(np.uint16 if num_classes <= 2**16 else np.uint32)  # 16 bits: a radix sort
            order = np.argsort(narrow, kind="stable")
            in_part = np.bincount(narrow, minlength=num_classes)
            begin = end - (np.cumsum(in_part) - in_part)
            self._ids[np.repeat(begin, in_part) + np.arange(len(order))] = known[order] + first
            end += in_part
        self._counts = counts[counts > 0]
        self._begin = np.cumsum(self._counts) - self._counts
        self.size = max(1, num_known // len(self._counts)) * len(self._counts)

    def ids(self, epoch: int, start: int, stop: int) -> Ids:
        """Sample ids (int64) at positions [start, stop) of an epoch."""
        round_, turn = np.divmod(epoch * self.size + np.arange(start, stop), len(self._counts))
        which = permute(turn, len(self._counts), hashes(round_, CLASS_TURN, self._seed))
        cycle, nth = np.divmod(round_, self._counts[which])
        nth = permute(nth, self._counts[which], hashes(hashes(cycle, IN_CLASS, self._seed) ^ which.astype(np.uint64)))
        ids: Ids = self._ids[self._begin[which] + nth].astype(np.int64)
        return ids


class EpochOrder:
    """One epoch over shards of `counts` samples. `ids(a, b)` costs the same anywhere in the epoch."""

    def __init__(self, counts: Sequence[int] | Ids, spec: OrderSpec, epoch: int) -> None:
        self._spec, self._epoch = spec, epoch
        self.size = int(np.sum(counts))
        if spec.kind == "window":
            self._lay_out(np.asarray(counts, np.int64))

    def _lay_out(self, counts: Ids) -> None:
        spec = self._spec
        blocks_per_shard = -(-counts // spec.block)
        shard = np.repeat(np.arange(len(counts)), blocks_per_shard)
        nth = np.arange(len(shard)) - np.repeat(np.cumsum(blocks_per_shard) - blocks_per_shard, blocks_per_shard)
        start = (np.cumsum(counts) - counts)[shard] + nth * spec.block
        length = np.minimum(spec.block, counts[shard] - nth * spec.block)
        order = permutation(len(start), BLOCKS, spec.seed, self._epoch)
        self._block_start, self._block_length = start[order], length[order]
        self._block_end = np.cumsum(self._block_length)
        # Lane l holds the positions p with (p // chunk) % lanes == l: its length in closed form.
        full, rest = divmod(self.size, spec.lanes * spec.chunk)
        lane = np.arange(spec.lanes)
        lengths = full * spec.chunk + np.clip(rest - lane * spec.chunk, 0, spec.chunk)
        self._lane_start = np.concatenate([[0], np.cumsum(lengths)])
        # Windows of different lanes begin at different steps, so that lanes do not all refill at once.
        self._shift = lane * spec.window // spec.lanes
        self._live: dict[tuple[int, int], tuple[int, Ids]] = {}

    def _blocks(self, start: int, stop: int) -> Ids:
        """Positions [start, stop) of the permuted blocks laid end to end."""
        first = int(np.searchsorted(self._block_end, start, side="right"))
        last = int(np.searchsorted(self._block_end, stop, side="left")) + 1
        length = self._block_length[first:last]
        before = np.cumsum(length) - length
        ids: Ids = np.arange(length.sum()) + np.repeat(self._block_start[first:last] - before, length)
        skip = start - int(self._block_end[first] - self._block_length[first])
        return ids[skip : skip + stop - start]

    def _window(self, lane: int, number: int) -> tuple[int, Ids]:
        """(position in the lane where the window begins, its permuted ids). Two windows per lane are kept."""
        live = self._live.get((lane, number))
        if live is None:
            base, end = int(self._lane_start[lane]), int(self._lane_start[lane + 1])
            begin = max(0, number * self._spec.window - int(self._shift[lane]))
            stop = min((number + 1) * self._spec.window - int(self._shift[lane]), end - base)
            ids = self._blocks(base + begin, base + stop)
            live = (begin, ids[permutation(len(ids), WINDOW, self._spec.seed, self._epoch, lane, number)])
            # This one and the next, which is prefetched.
            for other in [each for each in self._live if each[0] == lane and not 0 <= number - each[1] <= 1]:
                del self._live[other]
            self._live[lane, number] = live
        return live

    def ids(self, start: int, stop: int) -> Ids:
        """Sample ids (int64) at positions [start, stop) of the epoch."""
        spec = self._spec
        position = np.arange(start, stop)
        if spec.kind == "none":
            return position
        if spec.kind == "full":
            return permute(position, self.size, np.uint64(key(FULL, spec.seed, self._epoch)))
        unit = position // spec.chunk
        lane = unit % spec.lanes
        in_lane = (unit // spec.lanes) * spec.chunk + position % spec.chunk
        number = (in_lane + self._shift[lane]) // spec.window
        ids = np.empty(stop - start, np.int64)
        # Runs of equal (lane, window): about one per chunk.
        edges = np.flatnonzero((np.diff(lane) != 0) | (np.diff(number) != 0)) + 1
        for a, b in zip([0, *edges], [*edges, len(ids)], strict=True):
            if a < b:
                begin, window = self._window(int(lane[a]), int(number[a]))
                ids[a:b] = window[in_lane[a] - begin : in_lane[b - 1] - begin + 1]
        return ids
