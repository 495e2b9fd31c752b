"""Overfitting, underfitting or neither, from training and validation accuracy on images prepared alike.

The accuracy that is seen while training is lower for augmentation alone (by 2 to 7 points in PaddleClas's tables), so
the training samples are scored with the evaluation's transform.
"""

import math
from typing import Literal

Verdict = Literal["overfitting", "underfitting", "healthy"]

OVERFITTING = 2 / 3
UNDERFITTING = 0.1
"""Bounds of the gap between training and validation accuracy, as a share of the validation error. ResNet-50 after 90
epochs has about 0.5, a network that has memorised its training set 1, one that generalises perfectly 0."""


def diagnose(train_top1: float, val_top1: float, num_train: int, num_val: int) -> Verdict | None:
    """The verdict from accuracies (fractions) on `num_train` and `num_val` samples; None if these are too few.

    "Much higher on the training set" (PaddleClas's training tricks, 2.2.8) is taken relative to the validation error,
    as a point means more at 95% than at 50%.
    """
    error, gap = 1.0 - val_top1, train_top1 - val_top1
    pooled = (train_top1 * num_train + val_top1 * num_val) / (num_train + num_val)
    deviation = math.sqrt(pooled * (1.0 - pooled) * (1 / num_train + 1 / num_val))
    if error <= 8 * deviation:  # two deviations would be a quarter of the scale
        return None
    if gap > OVERFITTING * error:
        return "overfitting"
    return "underfitting" if gap < UNDERFITTING * error else "healthy"
