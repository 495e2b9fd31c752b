"""Augmentation: from a decoded image to one in a batch."""

from dist_trainer.data.augment.crop import CenterCrop, CropConfig, crop_boxes
from dist_trainer.data.augment.pipeline import Augment, AugmentConfig

__all__ = ["Augment", "AugmentConfig", "CenterCrop", "CropConfig", "crop_boxes"]
