"""Addresses to batches: read, decode, crop, transform; a pure function of the address, in whichever process it runs."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from dist_trainer.data.augment import Augment, CenterCrop, crop_boxes
from dist_trainer.data.bad_samples import BadSample
from dist_trainer.data.batch import Batch, EvalAddress, SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import Box, resize
from dist_trainer.data.decoder import Decoder, Encoded
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.order import ClassOrder, EpochOrder, OrderSpec
from dist_trainer.data.read import Bad, Reader
from dist_trainer.data.stages import Sample, Stages
from dist_trainer.draws import DRAW, STAGE, UInt64, hashes, key, permute
from dist_trainer.errors import Outage, UserError
from dist_trainer.plan import Plan

_PADDING = Bad("padding", "it only fills the batch")


class _Samples(Dataset[Batch]):
    """Batches by address. A bad sample keeps its place at weight 0, with the pixels and label of one that is not."""

    def __init__(self, index: ShardIndex, config: DataConfig, split: str, *, whole_blocks: bool = True) -> None:
        self._index, self._channels, self._split = index, config.channels, split
        self._decode = Decoder(config)
        self._stages = Stages(config.stages)
        self._reader = Reader(
            index, options=config.storage_options, retry=config.retry, cache=config.cache, whole_blocks=whole_blocks
        )
        self._shape: tuple[int, ...] | None = None
        """The shape of every image, once it is known."""
        self._outage: str | None = None
        """The message of an outage. Further batches of the same step do not wait for the storage again."""

    @property
    def is_cached(self) -> bool:
        """Whether samples come through the node's cache."""
        return self._reader.is_cached

    def _samples_at(self, address: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sample ids int64 [m], whether each counts bool [m], keys uint64 [m])"""
        raise NotImplementedError

    def _images(self, address: Any, ids: np.ndarray, data: list[Encoded], keys: UInt64) -> list[torch.Tensor | Bad]:
        """uint8 [C, H, W] each."""
        raise NotImplementedError

    def _flips(self, keys: UInt64) -> list[bool]:
        """Which images are mirrored."""
        return [False] * len(keys)

    def __getitem__(self, address: Any) -> Batch:
        ids, counts, keys = self._samples_at(address)
        labels = self._index.samples["label"][ids].astype(np.int64)
        weight = counts.astype(np.float32) * (not address.ghost)
        batch = Batch(
            images=torch.zeros(0, dtype=torch.uint8),
            labels=torch.from_numpy(labels),
            weight=torch.from_numpy(weight),
            ids=torch.from_numpy(ids),
            address=address,
        )
        if self._outage is None:
            try:
                data = self._read(ids, counts)
                if self._stages:
                    data = self._staged(ids, data, keys, labels)
                rows = self._images(address, ids, data, keys)
                self._substitute(batch, rows)
                batch.num_valid = int(batch.weight.sum())
                batch.images = self._stack(ids, rows, self._flips(keys))
                self._prefetch(address)
            except Outage as error:
                self._outage = str(error)
            except UserError as error:
                batch.problem = str(error)
        if self._outage is not None:
            self._without_data(batch)
        return batch

    def _read(self, ids: np.ndarray, counts: np.ndarray) -> list[Encoded]:
        """The samples' bytes. What is larger than data.max_pixels is not read."""
        rows = self._index.samples[ids]
        large = [self._decode.too_large(*size) for size in rows[["width", "height"]].tolist()]
        wanted = [p for p, needed in enumerate(self._wanted(counts).tolist()) if needed and large[p] is None]
        data: list[Encoded] = [each or _PADDING for each in large]
        for position, each in zip(wanted, self._reader.read(ids[wanted]), strict=True):
            data[position] = each
        return data

    def _wanted(self, counts: np.ndarray) -> np.ndarray:
        """Whether each place of a batch needs its image, bool [m]: in training all, since batch-norm sees them."""
        return np.ones(len(counts), bool)

    def _without_data(self, batch: Batch) -> None:
        """Fill a batch without data during an outage; no step is taken with it."""
        if self._shape is None:  # nothing was read yet: there is no run to save
            batch.problem = self._outage
            return
        batch.outage = self._outage
        batch.labels.fill_(0)
        batch.weight.fill_(torch.nan)
        batch.images = torch.zeros((len(batch.ids), *self._shape), dtype=torch.uint8)

    def _prefetch(self, address: Any) -> None:
        """Fetch in the background what will be needed."""

    def _staged(self, ids: np.ndarray, data: list[Encoded], keys: UInt64, labels: np.ndarray) -> list[Encoded]:
        """`data` after the user's stages, which see no bad samples; `labels` (int64 [m]) take the stages' classes."""
        good = [position for position, each in enumerate(data) if not isinstance(each, Bad)]
        samples: list[Sample] = [
            {"__key__": int(ids[p]), "__split__": self._split, "image": data[p], "cls": int(labels[p])} for p in good
        ]
        data = list(data)
        for position, sample in zip(good, self._stages(samples, keys[good]), strict=True):
            image, labels[position] = self._returned(sample)
            is_new = isinstance(image, bytes) and image is not data[position]
            data[position] = self._decode(image) if is_new else image  # the index knows only the original's size
        return data

    def _returned(self, sample: Sample) -> tuple[bytes | torch.Tensor, int]:
        """Image and class after the stages. Raises UserError for impossible values."""
        image, label = sample.get("image"), sample.get("cls")
        if isinstance(image, np.ndarray):
            image = torch.as_tensor(image)
        if not isinstance(label, int | np.integer) or not 0 <= label < self._index.num_classes:
            raise UserError(f"data.stages: cls is {label!r}; it must be a class number below {self._index.num_classes}")
        if isinstance(image, bytes):
            return image, int(label)
        if not isinstance(image, torch.Tensor):
            raise UserError(f"data.stages: image is {type(image).__name__}, neither bytes nor uint8 pixels [C, H, W]")
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != self._channels:
            raise UserError(
                f"data.stages: image is {str(image.dtype).removeprefix('torch.')} {list(image.shape)}; pixels must be "
                f"uint8 [{self._channels}, H, W]"
            )
        return image, int(label)

    def _substitute(self, batch: Batch, rows: list[torch.Tensor | Bad]) -> None:
        """Bad samples get weight 0 and the pixels and label of the nearest good sample before them, cyclically."""
        good = [position for position, row in enumerate(rows) if not isinstance(row, Bad)]
        if len(good) == len(rows):
            return
        labels, weight = batch.labels.numpy(), batch.weight.numpy()  # views
        for position, row in enumerate(rows):
            if isinstance(row, Bad):
                sample = int(batch.ids[position])
                if weight[position]:  # otherwise it only fills the batch, and is reported elsewhere
                    batch.bad.append(BadSample.of(self._index, sample, row))
                weight[position] = 0.0
        for position, row in enumerate(rows):
            if isinstance(row, Bad):
                if not good:
                    labels[position] = 0
                    continue
                other = max((p for p in good if p < position), default=good[-1])
                rows[position], labels[position] = rows[other], labels[other]

    def _stack(self, ids: np.ndarray, rows: list[torch.Tensor | Bad], flips: list[bool]) -> torch.Tensor:
        images: torch.Tensor | None = None
        for position, row in enumerate(rows):
            if isinstance(row, Bad):  # then all are
                if self._shape is None:
                    raise UserError(f"{self._index.describe(int(ids[0]))}: {row.reason}, like the whole first batch")
                return torch.zeros((len(ids), *self._shape), dtype=torch.uint8)
            if images is None:
                images = _allocate((len(ids), *row.shape))
            if row.shape != images.shape[1:]:
                raise UserError(
                    f"{self._index.describe(int(ids[position]))}: {tuple(row.shape)} pixels beside "
                    f"{tuple(images.shape[1:])} in one batch; set augment.crop and eval.crop, which give every image "
                    "one size"
                )
            images[position] = row.flip(-1) if flips[position] else row
        assert images is not None
        self._shape = tuple(images.shape[1:])
        return images


def _allocate(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8; in a loader process in shared memory, which the batch needs anyway."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]


def _fits_cache(index: ShardIndex, config: DataConfig) -> bool:
    """Whether the cache can hold all samples, so that whole blocks are worth fetching for random reads."""
    return int(index.sizes.sum()) <= config.cache.size_bytes


class _Augmented(_Samples):
    """Training samples, cropped, mirrored and transformed by their keys."""

    def __init__(self, index: ShardIndex, augment: Augment, config: DataConfig, *, in_blocks: bool) -> None:
        """`in_blocks`: whether neighbours are read soon, so that whole blocks are worth fetching."""
        super().__init__(index, config, "train", whole_blocks=in_blocks or _fits_cache(index, config))
        self._augment = augment
        self._shape = self._shape_at(augment.last_step)

    def _shape_at(self, step: int) -> tuple[int, ...] | None:
        """The shape of a step's images, if it is known beforehand."""
        size = self._augment.size(step) if self._augment.sizes else None
        return None if size is None else (self._channels, size, size)

    def _step(self, address: Any) -> int:
        """The step whose epoch sets the strength of augmentation."""
        raise NotImplementedError

    def _images(self, address: Any, ids: np.ndarray, data: list[Encoded], keys: UInt64) -> list[torch.Tensor | Bad]:
        crop, step = self._augment.crop, self._step(address)
        size = self._augment.size(step)
        boxes: list[Any] = [None] * len(ids)
        if crop is not None and size is not None:
            self._shape = self._shape_at(step)
            widths, heights = self._decode.sizes(data, self._index.samples[ids])
            boxes = crop_boxes(crop, widths, heights, keys).tolist()
        return [
            self._image(sample, each, box, size, key, step)
            for sample, each, box, key in zip(ids.tolist(), data, boxes, keys.tolist(), strict=True)
        ]

    def _image(
        self, sample: int, data: Encoded, box: Box | None, size: int | None, key: int, step: int
    ) -> torch.Tensor | Bad:
        image = self._decode(data, box)
        if isinstance(image, Bad):
            return image
        if size is not None:
            image = resize(image, (size, size), self._augment.interpolation)
        try:
            image = self._augment.transform(image, key, step)
        except Exception as error:  # a user's transform may raise anything
            raise UserError(
                f"augment.transforms: {self._index.describe(sample)}: {type(error).__name__}: {error}"
            ) from None
        if image.dtype != torch.uint8:
            raise UserError(f"augment.transforms: gave {image.dtype} pixels; they must stay torch.uint8")
        return image

    def _flips(self, keys: UInt64) -> list[bool]:
        flips: list[bool] = self._augment.flips(keys).tolist()
        return flips


class TrainSamples(_Augmented):
    """Training slots of `plan` in the order of `spec`, augmented."""

    def __init__(self, index: ShardIndex, plan: Plan, spec: OrderSpec, augment: Augment, config: DataConfig) -> None:
        super().__init__(index, augment, config, in_blocks=spec.kind in ("window", "none"))
        self._plan, self._spec = plan, spec
        self._orders: dict[int, EpochOrder] = {}
        self._classes: ClassOrder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}, "_classes": None}

    def _ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        if self._spec.kind == "balanced":
            self._classes = self._classes or ClassOrder(self._index.samples["label"], self._spec.seed)
            return self._classes.ids(epoch, start, stop)
        if epoch not in self._orders:  # two at most: the current one and the one that is prefetched
            self._orders = {each: order for each, order in self._orders.items() if each == epoch - 1}
            self._orders[epoch] = EpochOrder(self._index.counts, self._spec, epoch)
        return self._orders[epoch].ids(start, stop)

    def _samples_at(self, address: SlotAddress) -> tuple[np.ndarray, np.ndarray, UInt64]:
        spans = self._plan.spans(address.step, address.slot)
        ids = np.concatenate([self._ids(span.epoch, span.start, span.stop) for span in spans])
        lengths = [span.stop - span.start for span in spans]
        counts = np.repeat([span.counts for span in spans], lengths)
        epochs = np.repeat(np.array([span.epoch for span in spans]), lengths)
        return ids, counts, self._augment.keys(epochs, ids, self._plan.copy_of(address.slot))

    def _step(self, address: SlotAddress) -> int:
        return address.step

    def _prefetch(self, address: SlotAddress) -> None:
        """Fetch the blocks of the same slot one window later: a slot stays on its lanes."""
        if self._reader.is_cached and self._spec.kind == "window" and not address.ghost:
            step = address.step + self._spec.window // self._spec.chunk
            if step < self._plan.total_steps:
                spans = self._plan.spans(step, address.slot)
                ids = np.concatenate([self._ids(span.epoch, span.start, span.stop) for span in spans])
                self._reader.prefetch(self._reader.blocks_of(ids))


class EvalSamples(_Samples):
    """Every sample once, or those of `chosen` (ids of a training set, int64 [n]), in the same batches on any world."""

    def __init__(
        self, index: ShardIndex, config: DataConfig, transform: CenterCrop, chosen: np.ndarray | None = None
    ) -> None:
        if chosen is None:
            super().__init__(index, config, "val")
        else:
            super().__init__(index, config, "train", whole_blocks=_fits_cache(index, config))
        self._chosen = np.arange(len(index)) if chosen is None else chosen
        self._center_crop = transform
        if transform.crop is not None:
            self._shape = (config.channels, transform.crop, transform.crop)

    def _wanted(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def _samples_at(self, address: EvalAddress) -> tuple[np.ndarray, np.ndarray, UInt64]:
        positions = np.arange(address.number * address.size, (address.number + 1) * address.size)
        ids = self._chosen[positions % len(self._chosen)]
        return ids, positions < len(self._chosen), hashes(ids, STAGE)

    def _images(self, address: Any, ids: np.ndarray, data: list[Encoded], keys: UInt64) -> list[torch.Tensor | Bad]:
        images = [self._decode(each) for each in data]
        return [image if isinstance(image, Bad) else self._center_crop(image) for image in images]


def choose_samples(index: ShardIndex, num_samples: int, seed: int) -> np.ndarray:
    """Sample ids (int64 [num_samples]) drawn without repetition: a pure function of index size and seed."""
    return permute(np.arange(num_samples) % len(index), len(index), np.uint64(key(DRAW, seed)))


class FixedTrainSamples(_Augmented):
    """Training samples `chosen` (ids, int64 [n]) in batches, drawn as at one step; size and ramps are the address's."""

    def __init__(self, index: ShardIndex, augment: Augment, config: DataConfig, chosen: np.ndarray, step: int) -> None:
        super().__init__(index, augment, config, in_blocks=False)
        self._chosen, self._at = chosen, step

    def _samples_at(self, address: EvalAddress) -> tuple[np.ndarray, np.ndarray, UInt64]:
        ids = self._chosen[address.number * address.size : (address.number + 1) * address.size]
        epochs = np.full(len(ids), self._augment.epoch(self._at))
        return ids, np.ones(len(ids), bool), self._augment.keys(epochs, ids, 0)

    def _step(self, address: EvalAddress) -> int:
        return self._at if address.step is None else address.step
