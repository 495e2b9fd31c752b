"""The centre of a resized image from the part of the source that it shows: for strips of 8,000 x 2 pixels, say, whose
resized whole would take a gigabyte."""

import numpy as np
import torch

STRIP = 32
"""Longer by this factor than wide is a strip. Others are resized as a whole, as torchvision does it, to the bit."""


def is_strip(image: torch.Tensor) -> bool:
    height, width = image.shape[1:]
    return max(height, width) > STRIP * min(height, width)


def centre_of_resized(image: torch.Tensor, resize: int, crop: int, interpolation: str) -> torch.Tensor:
    """uint8 [C, H, W] -> uint8 [C, h, w], at most `crop` a side: the centre of the image once its shorter side is
    `resize` pixels long; within a level of 255 of torchvision's Resize and CenterCrop, whose weights are whole numbers.
    """
    height, width = image.shape[1:]
    shorter = min(height, width)
    rows, columns = (_weights(side, int(resize * side / shorter), crop, interpolation) for side in (height, width))
    part = image[:, rows[1], columns[1]].to(torch.float32)
    part = (part @ columns[0].T).round().clamp(0, 255)  # as there, across first and in whole levels
    return (rows[0] @ part).round().clamp(0, 255).to(torch.uint8)


def _weights(side: int, resized: int, crop: int, interpolation: str) -> tuple[torch.Tensor, slice]:
    """(float32 [centre of `resized`, part of `side`], that part): the rows of an antialiased resize, as Pillow defines
    it: the kernel widens with the scale, and what lies outside the image has no weight.
    """
    count = min(crop, resized)
    first, scale = round((resized - count) / 2), side / resized
    reach, widened = (2 if interpolation == "bicubic" else 1) * max(scale, 1.0), max(scale, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * scale
    start, stop = max(0, int(centres[0] - reach)), min(side, int(np.ceil(centres[-1] + reach)))
    away = np.abs((np.arange(start, stop) + 0.5)[None] - centres[:, None]) / widened
    if interpolation == "bicubic":  # Keys' kernel, a = -0.5
        near, far = (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
        weights = np.where(away < 1, near, np.where(away < 2, far, 0.0))
    else:
        weights = np.maximum(1 - away, 0.0)
    return torch.from_numpy(weights / weights.sum(1, keepdims=True)).to(torch.float32), slice(start, stop)
