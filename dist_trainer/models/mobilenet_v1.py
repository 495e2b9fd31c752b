"""MobileNetV1 at any width."""

import torch
from torch import nn

# Channels out and stride of each depthwise-separable block: Howard et al. 2017, table 1.
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class ConvBnRelu(nn.Sequential):
    """A convolution without bias, batch-norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class MobileNetV1(nn.Module):
    """Howard et al. 2017, "MobileNets": depthwise 3x3 and pointwise 1x1 convolutions in turn, no shortcuts.

    `width_mult` multiplies the channels of every layer. As PaddleClas's MobileNetV1_x0_25: ReLU, no dropout,
    weights ~ N(0, 2 / fan_in). Maps [m, in_channels, H, W] to [m, num_classes].
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0) -> None:
        super().__init__()
        if int(32 * width_mult) < 1:
            raise ValueError(f"width_mult {width_mult} leaves no channel; the smallest is 1/32")
        channels = int(32 * width_mult)
        self.stem = ConvBnRelu(in_channels, channels, 3, stride=2)
        blocks: list[nn.Module] = []
        for full, stride in BLOCKS:
            width = int(full * width_mult)
            depthwise = ConvBnRelu(channels, channels, 3, stride, groups=channels)
            blocks.append(nn.Sequential(depthwise, ConvBnRelu(channels, width, 1)))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        output: torch.Tensor = self.fc(x.mean((2, 3)))
        return output
