"""GridMask (Chen et al. 2020): the squares of a regular grid are filled."""

import torch

from dist_trainer.data.augment.scale import scaled


class GridMask:
    """A grid of period d, drawn from [`d_min`, `d_max`) in pixels of an image of 224, with a random offset.

    mode 1 fills squares of d - l, where l = int(d `ratio` + 0.5), and keeps 1 - (1 - l / d)^2 of the pixels: 75%. mode
    0 fills all but these squares and keeps 25%.
    """

    def __init__(
        self,
        fill: torch.Tensor,
        *,
        d_min: int = 96,
        d_max: int = 224,
        ratio: float = 0.5,
        mode: int = 1,
        probability: float = 1.0,
        ramp: float = 0.0,
    ) -> None:
        """`ramp`: epochs over which the probability grows to its value. PaddleClas's numbers, but mode 1."""
        if not 1 < d_min < d_max:
            raise ValueError(f"d_min {d_min}, d_max {d_max}: they must be 1 < d_min < d_max")
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"ratio {ratio} is not in (0, 1)")
        if mode not in (0, 1):
            raise ValueError(f"mode {mode} is neither 0 nor 1")
        self._fill, self._range, self._ratio, self._mode = fill, (d_min, d_max), ratio, mode
        self._probability, self._ramp = probability, ramp

    def probability(self, epoch: float) -> float:
        """p min(1, epoch / ramp)"""
        return self._probability * (min(1.0, epoch / self._ramp) if self._ramp else 1.0)

    def __call__(self, image: torch.Tensor, epoch: float) -> torch.Tensor:
        draw, period, y, x = torch.rand(4).tolist()
        if draw >= self.probability(epoch):
            return image
        low, high = (scaled(each, image) for each in self._range)
        d = max(2, low + int(period * (high - low)))
        length = min(max(int(d * self._ratio + 0.5), 1), d - 1)
        rows = (torch.arange(image.shape[1]) + int(y * d)) % d < length
        columns = (torch.arange(image.shape[2]) + int(x * d)) % d < length
        kept = rows[:, None] | columns if self._mode else ~(rows[:, None] | columns)
        return torch.where(kept, image, self._fill)
