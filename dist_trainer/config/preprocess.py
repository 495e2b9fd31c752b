"""`data.preprocess`: fills open preprocessing keys with the values that the model's weights were trained with."""

from dataclasses import replace

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import CropConfig
from dist_trainer.errors import UserError
from dist_trainer.models.published import chosen, described

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's training images


def resolve_preprocess(config: TrainConfig) -> TrainConfig:
    """`config` with data.mean, .std, eval.resize, .crop, .interpolation and augment.crop filled where they are open.

    Given values stay. Raises UserError if the model's library publishes none, or asks for something unsupported.
    """
    data, evaluation, crop = config.data, config.eval, config.augment.crop
    weights = None
    if data.preprocess == "model":
        weights = described(config.model)
    elif data.preprocess == "auto":
        weights = chosen(config.model)
    mean, std, interpolation = (
        (weights.mean, weights.std, weights.interpolation) if weights else (_MEAN, _STD, "bilinear")
    )
    if weights is not None:
        if weights.oddity and (evaluation.resize is None or evaluation.crop is None):
            raise UserError(
                f"data.preprocess: {weights} was made for {weights.oddity}, which is not offered; give eval.resize and "
                "eval.crop, or data.preprocess: imagenet"
            )
        evaluation = replace(
            evaluation, resize=evaluation.resize or weights.resize, crop=evaluation.crop or weights.crop
        )
        crop = crop or CropConfig(size=weights.crop)
    if evaluation.interpolation == "auto":
        evaluation = replace(evaluation, interpolation=interpolation)
    if crop is not None and crop.interpolation == "auto":
        crop = replace(crop, interpolation=interpolation)
    return replace(
        config,
        data=replace(data, mean=data.mean or mean, std=data.std or std),
        eval=evaluation,
        augment=replace(config.augment, crop=crop),
    )
