"""Encoded bytes to uint8 pixels."""

import io
import warnings

import numpy as np
import torch
import torchvision.transforms.v2.functional
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

PNG = b"\x89PNG\r\n\x1a\n"
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_PIL_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, channels: int) -> torch.Tensor:
    """uint8 [channels, height, width]; EXIF orientation is not applied. Raises ValueError for what no decoder reads.

    torchvision's decoder first; Pillow for what it refuses (CMYK JPEG, ...), and for PNG: torchvision's decoder (0.29)
    ends the process by a segmentation fault when a PNG's pixel data are damaged.
    """
    if data.startswith(PNG):
        return _by_pillow(data, channels)
    try:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: torch.Tensor = decode_image(buffer, _MODES[channels])
        if pixels.dim() == 3 and len(pixels) == channels:  # not an animation, nor WebP in colour where grey was asked
            return pixels
    except (RuntimeError, ValueError):
        pass
    return _by_pillow(data, channels)


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


def decode_region(data: bytes, channels: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    left, top, width, height = box
    return decode(data, channels)[:, top : top + height, left : left + width]


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torchvision.transforms.v2.functional.resize(image, list(size), antialias=True)
