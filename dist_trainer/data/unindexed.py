"""Training tars without an index, read sequentially by webdataset: convenient, with few guarantees."""

import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dist_trainer.data.augment import Augment, crop_boxes
from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decode, resize
from dist_trainer.data.listing import IMAGE_SUFFIXES, SUFFIXES_TEXT, passed_over
from dist_trainer.draws import STREAM, hashes, key, permutation
from dist_trainer.errors import UserError
from dist_trainer.storage.storage import Storage

SAID = (
    "data.source: stream: these are not guaranteed: each sample once an epoch, the same order on another world or "
    "after a restart, equal shares of the shards, and that damaged tars or images are noticed"
)
_SHUFFLE = 1000  # samples in webdataset's buffer, per reader


@dataclass(frozen=True)
class StreamSpec:
    """The parameters of such a run's order. Part of a checkpoint."""

    seed: int
    kind: str = "stream"


class TarStream(IterableDataset[Batch]):
    """Batches for addresses, from whatever samples come next. Each reader has its own shards if there are enough."""

    def __init__(
        self, config: DataConfig, num_classes: int, augment: Augment, batch: int, seed: int, rank: int, world: int
    ) -> None:
        """Raises UserError for a location that names nothing."""
        from webdataset.shardlists import expand_urls  # only if there is a stream

        self._config, self._num_classes, self._augment = config, num_classes, augment
        self._batch, self._seed = batch, seed
        self._rank, self._world = rank, world
        local = Path(config.train).expanduser()
        self._urls = [str(tar) for tar in sorted(local.glob("*.tar"))] if local.is_dir() else expand_urls(config.train)
        self._addresses: Iterable[SlotAddress] = ()
        if not self._urls:
            raise UserError(f"data.train: {config.train!r} names no tars; give a folder of them or a brace pattern")

    def serve(self, addresses: Iterable[SlotAddress]) -> "TarStream":
        """Set the addresses of the next iteration."""
        self._addresses = addresses
        return self

    def _shards(self, reader: int, readers: int, start: int) -> Iterator[dict[str, Any]]:
        """An endless sequence of opened tars. The order differs between passes and depends on the step of a resume."""
        storage = Storage(self._config.storage_options, self._config.retry)
        number = 0
        while True:
            order = permutation(len(self._urls), STREAM, self._seed, start, number).tolist()
            mine = order[reader::readers] if len(order) >= readers else order
            for shard in mine:
                yield {"url": self._urls[shard], "stream": storage.open(self._urls[shard])}
            number += 1

    def _samples(self, reader: int, readers: int, start: int) -> Iterator[tuple[torch.Tensor, int]]:
        """(uint8 [C, H, W], class) of every sample that decodes."""
        import webdataset
        from webdataset.tariterators import group_by_keys, tar_file_expander

        shuffled = webdataset.shuffle(
            _SHUFFLE, initial=_SHUFFLE // 4, rng=random.Random(key(STREAM, self._seed, start, reader))
        )
        tars = tar_file_expander(
            self._shards(reader, readers, start),
            webdataset.reraise_exception,
            select_files=lambda name: not passed_over(name),
        )
        failed = 0
        for sample in shuffled(group_by_keys(tars)):
            data = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
            if data is None or "cls" not in sample:
                raise UserError(
                    f"data.train: sample {sample.get('__key__')!r} of {sample.get('__url__')} has no image "
                    f"({SUFFIXES_TEXT}) or no .cls"
                )
            try:
                label = int(sample["cls"])
            except ValueError:
                label = -1
            if not 0 <= label < self._num_classes:
                raise UserError(
                    f"data.train: sample {sample['__key__']!r} of {sample['__url__']}: cls is {sample['cls'][:40]!r}; "
                    f"it must be a class number below {self._num_classes}"
                )
            try:
                image = decode(data, self._config.channels)
            except ValueError:
                failed += 1
                if failed == _SHUFFLE:
                    raise UserError(
                        f"data.train: {failed:,} images in a row cannot be decoded, the last is {sample['__key__']!r} "
                        f"of {sample['__url__']}"
                    ) from None
                continue
            failed = 0
            yield image, label

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, me = (worker.num_workers, worker.id) if worker else (1, 0)
        addresses = list(self._addresses)
        if not addresses:
            return
        samples = self._samples(self._rank * workers + me, self._world * workers, addresses[0].step)
        for address in addresses[me::workers]:
            try:
                yield self._next(samples, address)
            except (UserError, OSError, tarfile.TarError) as error:
                line = str(error) if isinstance(error, UserError) else f"data.train: {self._config.train}: {error}"
                empty = torch.zeros(0)
                yield Batch(empty, empty, empty, empty, address, problem=line)

    def _next(self, samples: Iterator[tuple[torch.Tensor, int]], address: SlotAddress) -> Batch:
        images, labels = zip(*(next(samples) for _ in range(self._batch)), strict=True)
        keys = hashes(np.arange(self._batch), STREAM, self._seed, address.step, address.slot)
        crop = self._augment.crop
        size = self._augment.size(address.step)
        if crop is not None and size is not None:
            sizes = np.array([image.shape[1:] for image in images])
            boxes = crop_boxes(crop, sizes[:, 1], sizes[:, 0], keys).tolist()
            images = tuple(
                resize(image[:, top : top + height, left : left + width], (size, size), self._augment.interpolation)
                for image, (left, top, width, height) in zip(images, boxes, strict=True)
            )
        rows = [
            self._augment.transform(image, seed, address.step)
            for image, seed in zip(images, keys.tolist(), strict=True)
        ]
        if len({row.shape for row in rows}) > 1:
            raise UserError("data.train: images of several sizes in one batch; set augment.crop")
        batch = torch.stack(rows)
        mirrored = torch.from_numpy(self._augment.flips(keys))
        batch[mirrored] = batch[mirrored].flip(-1)
        return Batch(
            images=batch,
            labels=torch.tensor(labels),
            weight=torch.full((self._batch,), 0.0 if address.ghost else 1.0),
            ids=torch.full((self._batch,), -1),
            address=address,
            num_valid=0 if address.ghost else self._batch,
        )
