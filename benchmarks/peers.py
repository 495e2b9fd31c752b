"""The usual ways to load JPEGs for training, each as a function that makes an endless iterator of batches.

Decode, RandomResizedCrop(224), flip, a batch: what each peer's documentation shows, with nothing added. One thread.
Peers are imported where they are used: loader workers of the benchmark import this file too.
"""

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE = 224

Peer = Callable[[Path, int], Iterator[Any]]
"""(folder of photographs.py, batch size) -> batches"""


def _usual() -> Callable[[Any], torch.Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder / "packed/train").glob("*.tar"))]


def webdataset(folder: Path, batch: int) -> Iterator[Any]:
    """The recipe of webdataset's documentation."""
    import webdataset as wds

    return iter(
        wds.WebDataset(tars(folder), shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg", "cls")
        .map_tuple(_usual(), lambda label: label)
        .batched(batch)
        .repeat()
    )


def timm(folder: Path, batch: int) -> Iterator[Any]:
    """timm's reader, transforms and fast_collate: uint8, which its prefetcher normalises on the device.

    Bilinear and without colour jitter, so that it does what the others do; timm's defaults do more.
    """
    from timm.data import create_dataset, create_transform
    from timm.data.loader import fast_collate

    shards = tars(folder)
    dataset = create_dataset(
        "wds/",
        root=str(folder / "packed/train"),
        split=f"{{{Path(shards[0]).stem}..{Path(shards[-1]).stem}}}.tar|1300",
        is_training=True,
        batch_size=batch,
        input_key="jpg;jpeg",
    )
    dataset.transform = create_transform(
        SIZE, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear"
    )
    loader = DataLoader(dataset, batch_size=batch, num_workers=0, collate_fn=fast_collate, drop_last=True)
    return chain.from_iterable(repeat(loader))


def torchvision(folder: Path, batch: int) -> Iterator[Any]:
    from torchvision.datasets import ImageFolder

    loader = DataLoader(ImageFolder(str(folder / "train"), _usual()), batch, shuffle=True, drop_last=True)
    return chain.from_iterable(repeat(loader))


def _dali(folder: Path, batch: int, *, normalise: bool) -> Iterator[Any]:
    from nvidia.dali import fn, pipeline_def, types

    # Not ahead in the background: that time would be counted against whoever runs then.
    @pipeline_def(
        batch_size=batch,
        num_threads=1,
        device_id=None,
        seed=1,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    def pipeline() -> Any:
        image, label = fn.readers.webdataset(
            paths=tars(folder), ext=["jpeg", "cls"], random_shuffle=True, initial_fill=1000
        )
        image = fn.decoders.image_random_crop(image, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        image = fn.resize(image, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        image = fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT if normalise else types.UINT8,
            mean=[255 * each for each in MEAN] if normalise else [0.0],
            std=[255 * each for each in STD] if normalise else [1.0],
            mirror=fn.random.coin_flip(),
            output_layout="CHW",
        )
        return image, label

    running = pipeline()
    running.build()
    while True:
        images, _ = running.run()
        yield torch.from_numpy(images.as_array())


def dali_float(folder: Path, batch: int) -> Iterator[Any]:
    return _dali(folder, batch, normalise=True)


def dali_uint8(folder: Path, batch: int) -> Iterator[Any]:
    return _dali(folder, batch, normalise=False)


PEERS: dict[str, Peer] = {
    "webdataset, float32": webdataset,
    "timm wds, uint8": timm,
    "torchvision ImageFolder, float32": torchvision,
    "DALI CPU, float32": dali_float,
    "DALI CPU, uint8": dali_uint8,
}
