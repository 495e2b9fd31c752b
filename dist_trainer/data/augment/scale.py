"""Lengths of erasing tricks are published for images of 224 pixels. Other sizes scale them."""

import torch


def scaled(length: int, image: torch.Tensor) -> int:
    """Scale `length`, given for an image of 224 pixels, to one of uint8 [C, H, W], by its shorter side."""
    return int(length * min(image.shape[1:]) / 224 + 0.5)
