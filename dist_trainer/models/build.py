"""Models by name: `timm/NAME`, `torchvision/NAME`, a short name, our own, or `package.module:Name`."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_trainer.by_name import Named, check_args, resolve
from dist_trainer.draws import INIT, key
from dist_trainer.errors import UserError, first_line, nearest
from dist_trainer.models.mobilenet_v1 import MobileNetV1
from dist_trainer.models.names import NAMES
from dist_trainer.models.small_resnet import SmallResNet


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Named):
    """The network."""

    name: str = "torchvision/resnet50"
    """timm/NAME, torchvision/NAME, a short name that `dist-trainer ls models` shows, or package.module:Name."""
    args: dict[str, Any] = field(default_factory=dict)
    """Passed to the model; num_classes comes from the training set unless it is given here."""
    dropout: float | None = None
    """Probability of dropout, under the name that the model's library gives it; null: the model's own default."""
    drop_path: float | None = None
    """Stochastic depth: the probability that the deepest residual branch is dropped; it grows with depth. Likewise."""
    pretrained: bool | str | None = None
    """Initial weights: a safetensors or torch file, a URL of one, a run or checkpoint folder; or true or a tag, such as
    a1_in1k or IMAGENET1K_V2, for those that timm or torchvision publish. A classifier of another shape is left out."""
    sync_bn: bool = False
    """Batch-norm over the micro-batches that all ranks run at the same time. The model then depends on the number of
    ranks."""
    freeze: list[str] = field(default_factory=list)
    """Submodules or parameters that are not trained, by name: [conv1, bn1, layer1] of a ResNet. Their batch-norm layers
    keep their running statistics and normalise with them."""
    channels_last: bool = True
    """Memory layout of images and, at ZeRO 0, of weights."""


Builder = Callable[..., nn.Module]

OWN: dict[str, Builder] = {"small_resnet": SmallResNet, "mobilenet_v1": MobileNetV1}

# What model.dropout and model.drop_path are called where a model comes from.
_RATES = {
    "torchvision": {"dropout": "dropout", "drop_path": "stochastic_depth_prob"},
    "timm": {"dropout": "drop_rate", "drop_path": "drop_path_rate"},
    "": {"dropout": "dropout", "drop_path": "drop_path"},
}


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """The model with weights drawn from `seed`, equal on every rank. Raises UserError for what cannot be built."""
    name, preset = NAMES.get(config.name, (config.name, {}))
    library, builder = _builder(name)
    rates = {_RATES[library][rate]: rate for rate in ("dropout", "drop_path") if getattr(config, rate) is not None}
    args = {"num_classes": num_classes, **preset, **config.args}
    for arg in ("pretrained", "weights", "checkpoint_path"):
        if library and arg in args:
            raise UserError(f"model.args.{arg}: initial weights belong to model.pretrained; remove it")
    for arg, rate in rates.items():
        if not 0.0 <= getattr(config, rate) < 1.0:
            raise UserError(f"model.{rate}: {getattr(config, rate)} is not in [0, 1)")
        if arg in args:
            raise UserError(f"model.args.{arg}: is set by model.{rate}; remove it")
        args[arg] = getattr(config, rate)
    torch.manual_seed(key(INIT, seed))
    try:
        if not library:
            check_args("model", config.name, builder, args)
        model = builder(**args)
    except Exception as error:
        for arg, rate in rates.items():
            if f"argument '{arg}'" in str(error) or f"takes no {arg}" in str(error):
                raise UserError(f"model.{rate}: {config.name} takes no {arg}; remove it, or choose another") from None
        if isinstance(error, UserError) or not (library or isinstance(error, TypeError | ValueError)):
            raise  # reported already; or a fault in the user's own code, whose traceback tells more
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"model.args: {config.name}: {kind}{first_line(error)}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name: {config.name} gives a {type(model).__name__}, where a torch.nn.Module belongs")
    return model


def _builder(name: str) -> tuple[str, Builder]:
    """(timm, torchvision or "" for ours and the user's, what builds it). Raises UserError for an unknown name."""
    library, slash, rest = name.partition("/")
    if ":" in name or name in OWN:
        return "", resolve("model.name", name, OWN, "model")
    if library == "torchvision":
        from torchvision import models

        known = models.list_models(module=models)
        if rest in known:
            return library, partial(_torchvision, models.get_model_builder(rest))
        raise UserError(f"model.name: torchvision has no {rest!r}{nearest(rest, known)}")
    if library == "timm":
        import timm

        if timm.is_model(rest.partition(".")[0]):
            return library, partial(timm.create_model, rest, pretrained=False)
        raise UserError(f"model.name: timm has no {rest!r}{nearest(rest, timm.list_models())}")
    if slash:
        raise UserError(f"model.name: {name!r}: {library!r} is not a source of models; use timm/ or torchvision/")
    raise UserError(
        f"model.name: no model {name!r}{_nearest(name)}; `dist-trainer ls models` shows the short names, "
        "any other is written timm/NAME, torchvision/NAME or package.module:Name"
    )


def _nearest(name: str) -> str:
    import timm
    from torchvision import models

    known = [*OWN, *NAMES, *(f"torchvision/{each}" for each in models.list_models(module=models))]
    found = next((each for each in known if each.endswith(f"/{name}")), f"timm/{name}" if timm.is_model(name) else "")
    return f"; did you mean {found!r}?" if found else nearest(name, known)


def _torchvision(builder: Builder, **args: Any) -> nn.Module:
    """Raises TypeError for names that nothing in the model's file accepts: some classes ignore unknown arguments."""
    parts = [each for each in vars(sys.modules[builder.__module__]).values() if callable(each)]
    taken = {
        name for part in parts if part.__module__ == builder.__module__ for name in inspect.signature(part).parameters
    }
    for name in args:
        if name not in taken:
            raise TypeError(f"{builder.__name__} got an unexpected keyword argument {name!r}{nearest(name, taken)}")
    return builder(weights=None, **args)


def model_table() -> list[tuple[str, str, int]]:
    """(short name, what builds it, parameters at 1,000 classes) of each network that has a short name."""
    rows = []
    for name in (*OWN, *NAMES):
        source, preset = NAMES.get(name, (name, {}))
        with torch.device("meta"):  # shapes alone
            model = build_model(ModelConfig(name=name), 1000, 0)
        text = source + (f" {preset}" if preset else "")
        rows.append((name, text, sum(parameter.numel() for parameter in model.parameters())))
    return rows
