"""Bytes of samples by number: one positioned read each, held against the index's checksum."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from dist_trainer.data.index import ShardIndex
from dist_trainer.errors import UserError

_MAX_OPEN = 256  # below the usual limit of 1,024 open files, with room for everything else


class TarReader:
    """Reads samples of `index` from local tars. Open it in the process that uses it."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._open: OrderedDict[int, int] = OrderedDict()

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[shard] = os.open(self._index.shard_path(shard), os.O_RDONLY)
        else:
            self._open.move_to_end(shard)
        return descriptor

    def read(self, ids: np.ndarray) -> Iterable[bytes]:
        """The encoded image of each id. Raises UserError, naming shard and byte, for bytes that were not indexed."""
        rows = self._index.samples[ids]
        columns = (rows[name].tolist() for name in ("length", "offset", "crc32"))
        for sample, shard, length, offset, crc32 in zip(
            ids.tolist(), self._index.shard_of(ids).tolist(), *columns, strict=True
        ):
            try:
                data = os.pread(self._descriptor(shard), length, offset)
            except OSError as error:
                raise UserError(f"{self._index.describe(sample)}: {error.strerror or error}") from None
            if zlib.crc32(data) != crc32:
                raise UserError(
                    f"{self._index.describe(sample)}: the bytes are not those that were indexed; "
                    "restore the tar, or delete its index to index anew"
                )
            yield data
