"""The epoch's order: a pure function position -> sample id of (seed, epoch, index), with random access.

Blocks of 64 neighbouring samples are permuted and laid end to end; the result is cut into lanes of nearly equal
length; each lane is permuted within windows of 512 samples. Consecutive chunks of a batch come from consecutive
lanes, so a batch mixes many blocks while each reader touches few. Integer hashing only: an order never changes
between platforms or releases (a golden test pins it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dist_trainer.keyed import BLOCKS, FULL, WINDOW, permutation

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class OrderSpec:
    """What the order depends on besides the epoch and the shards' sizes. Part of a checkpoint."""

    seed: int
    lanes: int
    chunk: int
    kind: Literal["window", "full", "none"] = "window"
    block: int = 64
    window: int = 512


class EpochOrder:
    """One epoch over shards of `counts` samples. `ids(a, b)` costs the same anywhere in the epoch."""

    def __init__(self, counts: Sequence[int] | Ids, spec: OrderSpec, epoch: int) -> None:
        self._spec, self._epoch = spec, epoch
        self.size = int(np.sum(counts))
        self._whole: Ids | None = None
        if spec.kind == "none":
            self._whole = np.arange(self.size, dtype=np.int64)
        elif spec.kind == "full":
            self._whole = permutation(self.size, FULL, spec.seed, epoch)
        else:
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
        self._live: dict[int, tuple[int, int, Ids]] = {}

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
        """(place in the lane where the window begins, its permuted ids). One window per lane is kept."""
        live = self._live.get(lane)
        if live is None or live[0] != number:
            base, end = int(self._lane_start[lane]), int(self._lane_start[lane + 1])
            begin = max(0, number * self._spec.window - int(self._shift[lane]))
            stop = min((number + 1) * self._spec.window - int(self._shift[lane]), end - base)
            ids = self._blocks(base + begin, base + stop)
            live = (number, begin, ids[permutation(len(ids), WINDOW, self._spec.seed, self._epoch, lane, number)])
            self._live[lane] = live
        return live[1], live[2]

    def ids(self, start: int, stop: int) -> Ids:
        """Sample ids (int64) at positions [start, stop) of the epoch."""
        if self._whole is not None:
            return self._whole[start:stop]
        spec = self._spec
        position = np.arange(start, stop)
        unit = position // spec.chunk
        lane = unit % spec.lanes
        place = (unit // spec.lanes) * spec.chunk + position % spec.chunk
        number = (place + self._shift[lane]) // spec.window
        ids = np.empty(stop - start, np.int64)
        # Runs of equal (lane, window): about one per chunk.
        edges = np.flatnonzero((np.diff(lane) != 0) | (np.diff(number) != 0)) + 1
        for a, b in zip([0, *edges], [*edges, len(ids)], strict=True):
            if a < b:
                begin, window = self._window(int(lane[a]), int(number[a]))
                ids[a:b] = window[place[a] - begin : place[b - 1] - begin + 1]
        return ids
