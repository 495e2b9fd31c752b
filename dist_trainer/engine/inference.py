"""A model on its device, its preprocessing, and its forward in evaluation."""

from dataclasses import dataclass

import torch
from torch import nn

from dist_trainer.data.config import DataConfig
from dist_trainer.distributed.world import World
from dist_trainer.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From uint8 pixels to the network's input: (pixels / 255 - mean) / std per channel, and the memory layout."""

    mean: list[float]
    std: list[float]
    channels_last: bool

    @classmethod
    def of(cls, data: DataConfig, model: ModelConfig) -> "Preprocess":
        """From a config."""
        return cls(mean=data.mean, std=data.std, channels_last=model.channels_last)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Inference:
    """A model on its device, and its forward in evaluation. Every engine can do this."""

    def __init__(
        self, model: nn.Module, precision: str, preprocess: Preprocess, world: World, is_exact: bool = False
    ) -> None:
        self.module, self.world = model, world
        self.is_exact = is_exact
        """Whether sums are the same bits on every world."""
        self._device = world.device
        self._format = preprocess.memory_format
        self._autocast = precision == "bf16"
        self._compute = torch.bfloat16 if self._autocast else torch.float32
        mean = torch.tensor(preprocess.mean, device=self._device).reshape(1, -1, 1, 1)
        std = torch.tensor(preprocess.std, device=self._device).reshape(1, -1, 1, 1)
        self._scale, self._shift = 1.0 / (255.0 * std), -mean / std

    def _prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [m, C, H, W] to normalised values on the device, computed in float32 and rounded to `dtype` once.

        One pass on a GPU. bfloat16 is what autocast would make of float32 images at the first convolution: the same
        bits there; a network that computes with its input before does that in bfloat16.
        """
        images = images.to(self._device, non_blocking=True)
        out = torch.empty(images.shape, dtype=dtype, device=self._device, memory_format=self._format)
        return torch.addcmul(self._shift, images, self._scale, out=out)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [m, K] of uint8 images [m, C, H, W], in the module's current mode. Every rank must call it."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: torch.Tensor = self.module(self._prepare(images, self._compute))
        return output.float()
