"""Encoded bytes to uint8 pixels."""

import io
import warnings

import numpy as np
import torch
import torchvision.transforms.v2.functional
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_PIL_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, channels: int) -> torch.Tensor:
    """uint8 [channels, height, width]; EXIF orientation is not applied. Raises ValueError for what no decoder reads.

    torchvision's decoder first; Pillow for what it refuses (CMYK JPEG, a PNG that is called jpg, ...).
    """
    try:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: torch.Tensor = decode_image(buffer, _MODES[channels])
        if pixels.dtype == torch.uint16:  # a PNG of 16 bits: 257 levels to one
            pixels = (pixels.to(torch.int32) // 257).to(torch.uint8)
        if pixels.dim() == 3 and len(pixels) == channels:  # not an animation, nor WebP in colour where grey was asked
            return pixels
    except (RuntimeError, ValueError):
        pass
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            array = np.array(image.convert(_PIL_MODES[channels]))
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise ValueError(f"not a readable image ({error})") from None
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def decode_region(data: bytes, channels: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    left, top, width, height = box
    return decode(data, channels)[:, top : top + height, left : left + width]


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torchvision.transforms.v2.functional.resize(image, list(size), antialias=True)
