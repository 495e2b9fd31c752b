"""A residual network for images of some 30 pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch-norm and ReLU, around a shortcut (He et al. 2016, figure 4e).

    No batch-norm stands at the end of a branch, so there is no last gamma that could begin at zero.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(pre)), inplace=True))
        return y + (x if self.shortcut is None else self.shortcut(pre))  # type: ignore[no-any-return]


class SmallResNet(nn.Module):
    """A pre-activation residual network for small images: a stem of stride 2, then stages that halve the resolution.

    `widths` and `depths` give channels and blocks per stage. Maps [m, in_channels, H, W] to [m, num_classes].
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (64, 96),
        depths: Sequence[int] = (2, 1),
        stem_width: int = 32,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, stem_width, 3, stride=2, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = stem_width
        for width, depth in zip(widths, depths, strict=True):
            for block in range(depth):
                blocks.append(PreActBlock(channels, width, stride=1 if block else 2))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))), inplace=True)
        output: torch.Tensor = self.fc(x.mean((2, 3)))
        return output
