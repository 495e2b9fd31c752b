"""Encoded images by sample number: one positioned read each, checked against the index's crc32.

There are three ways, chosen once. Local files are read directly. Remote samples are fetched in blocks of neighbours and
cached on the node (storage/cache.py). Orders without locality fetch single samples if the set is larger than the cache:
a block per sample would be 64 times the bytes.
"""

import contextlib
import os
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_trainer.data.blocks import Blocks
from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.errors import LocalError
from dist_trainer.storage.cache import BlockCache, CacheConfig
from dist_trainer.storage.retry import RetryConfig, ShortRead, concurrently
from dist_trainer.storage.storage import Storage, is_remote

Ids = npt.NDArray[np.int64]

_MAX_OPEN = 256  # below the usual limit of 1,024 open files, with room for everything else
_BLOCKS_AT_ONCE = 8  # requests of one batch; a block is a few MB, so memory stays bounded too
_SAMPLES_AT_ONCE = 32
_PREFETCHERS = 4
_KNOWN_BLOCKS = 4096


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be used: its bytes are not those indexed, it does not decode, or it has no label; or a place
    that only fills its batch."""

    kind: Literal["crc", "decode", "label", "padding"]
    reason: str


class _Block(NamedTuple):
    """Samples [first, stop): bytes [start, start + length) of their tar; an image folder's files end to end."""

    shard: int
    first: int
    stop: int
    start: int
    length: int
    name: str


class Reader:
    """Samples of `index`. Picklable; files and connections open in the process that reads, in one thread.

    `options` go to fsspec. `whole_blocks=False` fetches what is not cached sample by sample.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        options: Mapping[str, Any] | None = None,
        retry: RetryConfig,
        cache: CacheConfig,
        block: int = 64,
        whole_blocks: bool = True,
    ) -> None:
        self._index, self._cache_config, self._block_size, self._whole = index, cache, block, whole_blocks
        self._storage, self._patience = Storage(options, retry), retry.timeout
        shards = range(len(index.shards))
        self.is_cached = cache.dir is not None or any(is_remote(index.shard_path(shard)) for shard in shards)

    def __getstate__(self) -> dict[str, Any]:
        opened = {name for name, value in vars(Reader).items() if isinstance(value, cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    @property
    def retries(self) -> int:
        """Requests that were repeated so far."""
        return self._storage.retries

    @property
    def bytes_fetched(self) -> int:
        """Bytes read from the samples' storage so far. Uncached local files do not count."""
        return self._storage.bytes_read

    @cached_property
    def _cache(self) -> BlockCache:
        return BlockCache(self._cache_config.folder, self._cache_config.size_bytes)

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self._index.counts, self._block_size)

    @cached_property
    def _block(self) -> Callable[[int], _Block]:
        return lru_cache(_KNOWN_BLOCKS)(self._locate)

    @cached_property
    def _files(self) -> "_Descriptors":
        return _Descriptors(self._index)

    @cached_property
    def _prefetcher(self) -> "_Prefetcher":
        self._block, self._blocks, self._cache  # noqa: B018  # made here, before there are threads to race for them
        return _Prefetcher(self._fetch_ahead)

    @cached_property
    def _problems(self) -> dict[int, str]:
        return {problem.sample: problem.reason for problem in self._index.problems if problem.sample is not None}

    def read(self, ids: Ids) -> list[bytes | Bad]:
        """The encoded image of each id, in their order; Bad for a sample that differs from the index.

        Raises Outage for unreachable storage, and LocalError, naming the sample, for a missing or unreadable file.
        """
        rows = self._index.samples[ids]
        labelled = rows["label"] != BAD
        if not labelled.all():
            found = iter(self.read(ids[labelled]) if labelled.any() else ())
            return [
                next(found) if good else Bad("label", self._problems.get(sample, "known to be bad"))
                for sample, good in zip(ids.tolist(), labelled.tolist(), strict=True)
            ]
        shards = self._index.shard_of(ids).tolist()
        columns = [rows[name].tolist() for name in ("length", "offset", "crc32")]
        if self.is_cached:
            return self._read_cached(ids, shards, *columns)
        return self._read_local(ids.tolist(), shards, *columns)

    def blocks_of(self, ids: Ids) -> list[int]:
        """The blocks that hold `ids`, each once, in order of first use."""
        return list(dict.fromkeys(self._blocks.of(ids).tolist()))

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Fetch `blocks` into the cache in the background, in this order.

        Never raises: a block that fails is fetched again, and reported, when it is needed.
        """
        if self.is_cached and self._whole:
            self._prefetcher.add(blocks)

    def _read_local(
        self, samples: list[int], shards: list[int], lengths: list[int], offsets: list[int], crcs: list[int]
    ) -> list[bytes | Bad]:
        """Read local files: one pread each."""
        folder = self._index.names is not None
        data: list[bytes | Bad] = []
        for sample, shard, length, offset, crc32 in zip(samples, shards, lengths, offsets, crcs, strict=True):
            try:
                each = self._source(sample) if folder else os.pread(self._files[shard], length, offset)
            except OSError:
                self._files.close(shard)  # a stale handle stays stale
                each = self._source(sample)
            data.append(each if zlib.crc32(each) == crc32 else self._again(sample))
        return data

    def _read_cached(
        self, ids: Ids, shards: list[int], lengths: list[int], offsets: list[int], crcs: list[int]
    ) -> list[bytes | Bad]:
        """Read from cached blocks; missing blocks are fetched in parallel."""
        samples = ids.tolist()
        data = [b""] * len(samples)
        missing: dict[int, list[int]] = {}
        for position, number in enumerate(self._blocks.of(ids).tolist()):
            found = None
            if number not in missing:
                block = self._block(number)
                at = self._offset_in(block, samples[position], offsets[position])
                found = self._cache.read(block.name, block.length, at, lengths[position])
            if found is None:
                missing.setdefault(number, []).append(position)
            else:
                data[position] = found

        def fetch(number: int) -> None:
            block = self._block(number)
            whole = self._fetch(block) if self._whole and self._cache.takes(block.length) else None
            for position in missing[number]:
                at = self._offset_in(block, samples[position], offsets[position])
                data[position] = (
                    self._source(samples[position]) if whole is None else whole[at : at + lengths[position]]
                )

        concurrently(fetch, list(missing), _BLOCKS_AT_ONCE if self._whole else _SAMPLES_AT_ONCE)
        return [
            each if zlib.crc32(each) == crc32 else self._again(sample)
            for sample, each, crc32 in zip(samples, data, crcs, strict=True)
        ]

    def _again(self, sample: int) -> bytes | Bad:
        """Read once more, without the cache and open files, if the bytes differ from the index."""
        data = self._source(sample)
        if zlib.crc32(data) != self._index.samples["crc32"][sample]:
            return Bad("crc", "the bytes are not those that were indexed")
        if self.is_cached:  # then the cached block was wrong
            self._cache.drop(self._block(int(self._blocks.of(np.array([sample]))[0])).name)
        return data

    def _source(self, sample: int) -> bytes:
        """The bytes of one sample from its storage; fewer if a local file ends before."""
        row = self._index.samples[sample]
        shard = int(self._index.shard_of(np.array([sample]))[0])
        start = 0 if self._index.names is not None else int(row["offset"])
        try:
            return self._storage.read(self._index.file_of(sample, shard), start, int(row["length"]))
        except ShortRead:
            return b""
        except OSError as error:
            raise LocalError(f"{self._index.describe(sample)}: {error.strerror or error}") from None

    def _locate(self, number: int) -> _Block:
        first, stop = self._blocks.span(number)
        shard = self._blocks.shard(number)
        rows = self._index.samples[first:stop]
        if self._index.names is not None:
            start, length = 0, int(rows["length"].sum(dtype=np.int64))
        else:
            rows = rows[rows["length"] > 0]  # known bad samples have no bytes
            start = int(rows["offset"].min(initial=2**63))
            length = int((rows["offset"] + rows["length"]).max(initial=start)) - start
        return _Block(shard, first, stop, start, length, f"{self._index.fingerprint[:16]}-{shard}-{number}")

    def _offset_in(self, block: _Block, sample: int, offset: int) -> int:
        """The offset of a sample in its block."""
        if self._index.names is None:
            return offset - block.start
        return int(self._index.samples["length"][block.first : sample].sum(dtype=np.int64))

    def _fetch(self, block: _Block) -> bytes | None:
        """A whole block, from the cache or fetched into it; None if a local tar ends before."""
        location = self._index.shard_path(block.shard)

        def source() -> bytes:
            if self._index.names is None:
                return self._storage.read(location, block.start, block.length)
            lengths = self._index.samples["length"][block.first : block.stop].tolist()
            files = concurrently(self._source, range(block.first, block.stop), _SAMPLES_AT_ONCE)
            return b"".join(file.ljust(length) for file, length in zip(files, lengths, strict=True))

        try:
            return self._cache.fetch(block.name, block.length, source, self._patience)
        except ShortRead:
            return None
        except OSError as error:
            raise LocalError(f"{location}: {error.strerror or error}") from None

    def _fetch_ahead(self, number: int) -> None:
        block = self._block(number)
        if self._cache.takes(block.length) and not self._cache.has(block.name, block.length):
            self._fetch(block)


class _Descriptors:
    """Open tars by shard number, at most _MAX_OPEN; the one unused for longest is closed first."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getitem__(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[shard] = os.open(self._index.shard_path(shard), os.O_RDONLY)
        else:
            self._open.move_to_end(shard)
        return descriptor

    def close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))


class _Prefetcher:
    """A queue of block numbers, processed by a few daemon threads."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._queue: deque[int] = deque()
        self._pending: set[int] = set()
        self._changed = threading.Condition()
        for _ in range(_PREFETCHERS):
            threading.Thread(target=self._run, daemon=True, name="prefetch").start()

    def add(self, blocks: Iterable[int]) -> None:
        with self._changed:
            for block in blocks:
                if block not in self._pending:
                    self._pending.add(block)
                    self._queue.append(block)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                block = self._queue.popleft()
            with contextlib.suppress(Exception):  # reported when the block is needed
                self._fetch(block)
            with self._changed:
                self._pending.discard(block)
