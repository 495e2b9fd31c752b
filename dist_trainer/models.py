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
    """The network."""

    name: str = "torchvision/resnet50"
    """timm/NAME, torchvision/NAME, small_resnet, or package.module:Name."""
    args: dict[str, Any] = field(default_factory=dict)
    """Passed to the model; num_classes comes from the training set unless it stands here."""
    pretrained: bool | str | None = None
    """Weights to begin with: a safetensors or torch file, a URL of one, a run or checkpoint folder; true or a tag, such
    as a1_in1k or IMAGENET1K_V2: those that timm or torchvision publish. A classifier of another shape is left out."""
    channels_last: bool = True
    """Memory layout of images and, at ZeRO 0, of weights."""


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch-norm and ReLU, around a shortcut (He et al. 2016, figure 4e)."""

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
