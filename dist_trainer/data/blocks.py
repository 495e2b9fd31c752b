"""Blocks of neighbouring samples: the unit of fetching, caching and shuffling."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Blocks:
    """Shards of `counts` samples in blocks of `block` that never cross a shard, numbered through all shards."""

    def __init__(self, counts: Sequence[int] | Ids, block: int = 64) -> None:
        sizes = np.asarray(counts, np.int64)
        self.block = block
        self._first_sample = np.concatenate([[0], np.cumsum(sizes)])
        self._first_block = np.concatenate([[0], np.cumsum(-(-sizes // block))])

    def __len__(self) -> int:
        return int(self._first_block[-1])

    def of(self, ids: Ids) -> Ids:
        """The block of each sample (int64)."""
        shard = np.searchsorted(self._first_sample, ids, side="right") - 1
        blocks: Ids = self._first_block[shard] + (ids - self._first_sample[shard]) // self.block
        return blocks

    def shard(self, block: int) -> int:
        """The shard that `block` lies in."""
        return int(np.searchsorted(self._first_block, block, side="right")) - 1

    def span(self, block: int) -> tuple[int, int]:
        """Samples [first, stop) of `block`."""
        shard = self.shard(block)
        first = int(self._first_sample[shard]) + (block - int(self._first_block[shard])) * self.block
        return first, min(first + self.block, int(self._first_sample[shard + 1]))
