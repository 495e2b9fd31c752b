"""Lengths of erasing tricks are those published for images of 224 pixels; others scale them."""

import torch


def scaled(length: int, image: torch.Tensor) -> int:
    """`length` pixels of an image of 224, in one of uint8 [C, H, W], by its shorter side."""
    return int(length * min(image.shape[1:]) / 224 + 0.5)
