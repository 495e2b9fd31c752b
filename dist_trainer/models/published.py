"""Weights that timm and torchvision publish for their models, and the facts about them that need no network."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dist_trainer.errors import UserError, nearest
from dist_trainer.models import ModelConfig
from dist_trainer.models.names import NAMES
from dist_trainer.tensors import State


@dataclass(frozen=True, kw_only=True)
class Published:
    """Weights of a library, by tag, and how an image has to be prepared for them when it is evaluated."""

    library: str
    model: str
    tag: str
    url: str
    """Their URL, as far as the library tells."""
    num_classes: int
    mean: list[float]
    std: list[float]
    interpolation: Literal["bilinear", "bicubic"]
    resize: int
    """Pixels of the shorter side."""
    crop: int
    """Pixels of the square that is cut from the centre, and of training images."""
    oddity: str = ""
    """Preprocessing that is not supported here, if any."""
    top1: float | None = None
    """ImageNet-1k accuracy that the library's package states, a fraction."""

    def __str__(self) -> str:
        return f"{self.library}/{self.model}.{self.tag}"


def chosen(config: ModelConfig) -> Published | None:
    """The published weights that `model.pretrained` names by true or by a tag. None if it names a location or nothing.

    Raises UserError where there are none.
    """
    if not config.pretrained:
        return None
    if config.pretrained is True:
        return described(config)
    library, model, own = _parts(config)
    tags = _tags(library, model)
    if config.pretrained not in tags:
        return None
    if own and own != config.pretrained:
        raise UserError(f"model.pretrained: {config.pretrained!r} beside model.name: {config.name}; give one tag")
    return _describe(library, model, config.pretrained, tags[config.pretrained])


def described(config: ModelConfig) -> Published:
    """The published weights of this model: those of the tag in model.pretrained or model.name, or else the default.

    Raises UserError where the library publishes none, and for a model of no library.
    """
    library, model, tag = _parts(config)
    if not library:
        raise UserError(
            f"model.name: {config.name}: only timm/ and torchvision/ models have published weights; model.pretrained "
            "takes a file or a URL too, and data.preprocess: imagenet goes with your own data.mean and data.std"
        )
    tags = _tags(library, model)
    if isinstance(config.pretrained, str) and config.pretrained in tags:
        tag = config.pretrained
    if not tags:
        raise UserError(
            f"model.pretrained: {library} publishes no weights of {model!r}{nearest(model, _known(library))}"
        )
    tag = tag or next(iter(tags))
    if tag not in tags:
        raise UserError(f"model.name: {library}/{model} has no weights {tag!r}; there are: {', '.join(tags)}")
    return _describe(library, model, tag, tags[tag])


def tags_of(config: ModelConfig) -> list[str]:
    """The tags of a model's published weights, the library's default first."""
    library, model, _ = _parts(config)
    return list(_tags(library, model))


def fetch(weights: Published, args: dict[str, Any]) -> State:
    """The library's own weights, as its own loader prepares them for a model of `args` (timm adapts them to in_chans).

    From its cache or the network. Raises UserError if they cannot be fetched.
    """
    args = {name: value for name, value in args.items() if name != "num_classes"}
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it logs every attempt; the last error is reported below
    try:
        model = _library_model(weights, args)
    except Exception as error:  # of urllib, httpx, huggingface_hub, torch.hub, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")
        if isinstance(error, TypeError) or "loading state_dict" in reason or "size mismatch" in reason:
            raise UserError(f"model.pretrained: {weights} does not fit model.args: {reason}") from None
        raise UserError(
            f"model.pretrained: {weights} cannot be fetched from {weights.url}: {reason}. Without a "
            "network, bring that file here and give its path: --model.pretrained PATH"
        ) from None
    if getattr(model, "transform_input", False) and not args.get("transform_input"):
        raise UserError(f"model.args: {weights} needs transform_input: true; its input is normalised in another way")
    return model.state_dict()


def _library_model(weights: Published, args: dict[str, Any]) -> nn.Module:
    if weights.library == "torchvision":
        import torchvision.models

        model: nn.Module = torchvision.models.get_model(weights.model, weights=weights.tag, progress=False, **args)
        return model
    import timm

    model = timm.create_model(f"{weights.model}.{weights.tag}", pretrained=True, **args)
    return model


def _parts(config: ModelConfig) -> tuple[str, str, str]:
    """(library or "", model, tag or "") of model.name: timm's may hold a tag."""
    library, _, name = NAMES.get(config.name, (config.name, {}))[0].partition("/")
    if library not in ("timm", "torchvision") or ":" in name:
        return "", config.name, ""
    model, _, tag = name.partition(".")
    return library, model, tag


def _known(library: str) -> list[str]:
    if library == "timm":
        import timm

        return list(timm.list_models())
    import torchvision.models

    return list(torchvision.models.list_models(module=torchvision.models))


def _tags(library: str, model: str) -> dict[str, Any]:
    """The library's entries for a model's weights by tag, the default first; empty for an unknown model."""
    if not library or model not in _known(library):
        return {}
    if library == "torchvision":
        import torchvision.models

        weights: Any = torchvision.models.get_model_weights(model)
        return {each.name: each for each in (weights.DEFAULT, *weights)}
    import timm

    default = timm.get_pretrained_cfg(model)
    every = {name.partition(".")[2]: each for name, each in timm.models.get_arch_pretrained_cfgs(model).items()}
    first = {default.tag: default} if default is not None else {}
    return {tag: each for tag, each in (first | every).items() if tag and each.has_weights}


def _describe(library: str, model: str, tag: str, known: Any) -> Published:
    if library == "torchvision":
        preset, facts = known.transforms(), known.meta
        score = facts["_metrics"].get("ImageNet-1K", {}).get("acc@1")
        return Published(
            library=library,
            model=model,
            tag=tag,
            url=known.url,
            num_classes=len(facts["categories"] or range(1000)),
            mean=list(preset.mean),
            std=list(preset.std),
            interpolation=preset.interpolation.value,
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            top1=score / 100 if score is not None else None,
        )
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=known.to_dict())
    height, width = data["input_size"][1:]
    oddities = [
        f"images of {height} x {width}" if height != width else "",
        f"crop_mode {data['crop_mode']}" if data["crop_mode"] != "center" else "",
    ]
    return Published(
        library=library,
        model=model,
        tag=tag,
        url=f"https://huggingface.co/{known.hf_hub_id}" if known.hf_hub_id else str(known.url or known.file),
        num_classes=known.num_classes,
        mean=list(data["mean"]),
        std=list(data["std"]),
        interpolation=data["interpolation"],
        resize=math.floor(width / data["crop_pct"]),  # as timm.data.create_transform has it
        crop=width,
        oddity=" and ".join(each for each in oddities if each),
    )
