"""Cutout (DeVries & Taylor 2017): a square around a random pixel, clipped at the edges, is filled."""

import torch

from dist_trainer.data.augment.scale import scaled


class Cutout:
    """`length`: side of the square in pixels of an image of 224; smaller and larger images scale it."""

    def __init__(self, fill: torch.Tensor, *, length: int = 112, probability: float = 1.0) -> None:
        """The default is PaddleClas's: half of the side."""
        if length < 1:
            raise ValueError(f"length {length} is not positive")
        self._fill, self._length, self._probability = fill, length, probability

    def __call__(self, image: torch.Tensor, epoch: float) -> torch.Tensor:
        draw, y, x = torch.rand(3).tolist()
        if draw >= self._probability:
            return image
        height, width = image.shape[1:]
        length = scaled(self._length, image)
        top, left = int(y * height) - length // 2, int(x * width) - length // 2
        image = image.clone()
        image[:, max(top, 0) : top + length, max(left, 0) : left + length] = self._fill
        return image
