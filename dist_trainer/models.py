"""Models by name: `timm/NAME`, `torchvision/NAME`, our own, or `package.module:Name`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_trainer.errors import UserError, nearest
from dist_trainer.keyed import INIT, key
from dist_trainer.named import Named, build


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Named):
    name: str = "torchvision/resnet50"
    """timm/NAME, torchvision/NAME, small_resnet, or package.module:Name."""
    args: dict[str, Any] = field(default_factory=dict)
    """Passed to the model; num_classes comes from the training set unless it stands here."""
    channels_last: bool = True
    """Memory layout of images and, at ZeRO 0, of weights."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, figure 2), projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """A residual network for small images: a 3x3 stem of stride 2, then stages that halve the resolution.

    `widths` and `depths` give channels and blocks per stage. The last scale of each block starts at zero
    (Goyal et al. 2017, section 5.1). Maps [m, in_channels, H, W] to [m, num_classes].
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64, 96),
        depths: Sequence[int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                blocks.append(BasicBlock(channels, width, stride=2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        output: torch.Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return output


BUILTIN: dict[str, Any] = {"small_resnet": SmallResNet}


def _torchvision(name: str, args: dict[str, Any]) -> nn.Module:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"model.name: torchvision has no {name!r}{nearest(name, known)}")
    model: nn.Module = torchvision.models.get_model(name, weights=None, **args)
    return model


def _timm(name: str, args: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"model.name: timm has no {name!r}{nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, pretrained=False, **args)
    return model


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """The model with weights drawn from `seed`, equal on every rank. Raises UserError for what cannot be built."""
    torch.manual_seed(key(INIT, seed))
    args = {"num_classes": num_classes, **config.args}
    library, _, name = config.name.partition("/")
    if not name or ":" in config.name:
        model: nn.Module = build("model", Named(name=config.name, args=args), BUILTIN, kind="model")
        return model
    libraries = {"torchvision": _torchvision, "timm": _timm}
    if library not in libraries:
        raise UserError(
            f"model.name: {config.name!r}: {library!r} is not a source of models; use timm/ or torchvision/"
        )
    try:
        return libraries[library](name, args)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.args: {config.name}: {error}") from None
