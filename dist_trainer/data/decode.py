"""Encoded bytes to uint8 pixels."""

import io
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch.nn import functional

from dist_trainer.data import jpeg_region
from dist_trainer.data.pillow import Image

_JPEG = b"\xff\xd8"
_RIFF = b"RIFF"  # of WebP
Box = tuple[int, int, int, int]
"""left, top, width, height in pixels"""
_PIL_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, channels: int) -> torch.Tensor:
    """uint8 [channels, height, width]; EXIF orientation is not applied. Raises ValueError for what no decoder reads.

    torchvision's decoder for JPEG and WebP; Pillow for what it refuses (CMYK JPEG, ...), and for other formats:
    torchvision's (0.29) ends the process by a segmentation fault on a PNG whose pixel data are damaged.
    """
    if not data.startswith((_JPEG, _RIFF)):
        return _by_pillow(data, channels)
    try:
        pixels = _torchvision()(torch.frombuffer(bytearray(data), dtype=torch.uint8), channels)
        if pixels.dim() == 3 and len(pixels) == channels:  # no animation, no colour WebP where grey was asked for
            return pixels
    except (RuntimeError, ValueError):
        pass
    return _by_pillow(data, channels)


@cache
def _torchvision() -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(encoded, channels) -> pixels. Imported on first use: that takes a loader process two seconds."""
    from torchvision.io import ImageReadMode

    modes = {1: ImageReadMode.GRAY.value, 3: ImageReadMode.RGB.value}
    # Not by the Python function, which warns at every call and takes as long as a small image.
    operator = torch.ops.image.decode_image
    return lambda encoded, channels: operator(encoded, modes[channels], False)


def _by_pillow(data: bytes, channels: int) -> torch.Tensor:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as opened:
            warnings.simplefilter("ignore")
            image: Image.Image = opened
            if image.mode.startswith("I"):  # grey of 16 bits, which `convert` would clamp: 257 levels to one
                image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
            array = np.array(image if image.mode == _PIL_MODES[channels] else image.convert(_PIL_MODES[channels]))
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise ValueError(f"not a readable image ({error})") from None
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def decode_region(data: bytes, channels: int, box: Box) -> torch.Tensor:
    """uint8 [channels, height, width] of the box alone (left, top, width, height): the bits of `decode`, sliced.

    A JPEG is decoded there alone where jpeg_region.py can. Raises ValueError for what no decoder reads.
    """
    if data.startswith(_JPEG) and (image := jpeg_region.decode_region(data, channels, box)) is not None:
        return image
    left, top, width, height = box
    return decode(data, channels)[:, top : top + height, left : left + width]


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str = "bilinear") -> torch.Tensor:
    """uint8 [C, H, W] to [C, *size], antialiased: the bits of torchvision's `resize(antialias=True)`.

    `interpolation` is bicubic, or bilinear.
    """
    mode = "bicubic" if interpolation == "bicubic" else "bilinear"
    resized = functional.interpolate(image[None], size, mode=mode, antialias=True, align_corners=False)
    return resized[0]


def decoder_line() -> str:
    """A line for the user: which decoder reads crops of JPEGs, and why."""
    if jpeg_region.is_available:
        return f"JPEG: region decode, {jpeg_region.version}"
    return f"JPEG: torchvision, whole images; no region decode: {jpeg_region.version}"
