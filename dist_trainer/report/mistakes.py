"""What the best weights get wrong: per class, by pairs of classes."""

from dataclasses import dataclass

import numpy as np

from dist_trainer.tensors import State


@dataclass(frozen=True)
class Mistakes:
    """Counts over the validation set. A bad sample counts as wrong, and for no pair of classes."""

    names: list[str]
    confusion: np.ndarray
    """int64 [K, K]: rows are labels, columns predictions."""
    totals: np.ndarray
    """int64 [K]: samples of each class."""

    @property
    def accuracy(self) -> np.ndarray:
        """float64 [K]; NaN for a class without a sample."""
        with np.errstate(invalid="ignore"):
            return self.confusion.diagonal() / np.where(self.totals > 0, self.totals, np.nan)

    def worst_classes(self, count: int) -> list[tuple[str, float, int]]:
        """(class, accuracy, samples), the lowest accuracy first."""
        accuracy = self.accuracy
        order = [int(each) for each in np.argsort(accuracy, kind="stable") if self.totals[each]]
        return [(self.names[each], float(accuracy[each]), int(self.totals[each])) for each in order[:count]]

    def confused_pairs(self, count: int) -> list[tuple[str, str, int, float]]:
        """(class, what was said instead, how often, share of the class), the most frequent first."""
        off = self.confusion.copy()
        np.fill_diagonal(off, 0)
        order = np.argsort(-off, axis=None, kind="stable")[:count]
        pairs = [tuple(int(each) for each in np.unravel_index(place, off.shape)) for place in order]
        return [
            (self.names[a], self.names[b], int(off[a, b]), float(off[a, b] / self.totals[a]))
            for a, b in pairs
            if off[a, b]
        ]


def mistakes(said: State, names: list[str]) -> Mistakes:
    """From predictions as run/pictures.py has them."""
    label, predicted = said["label"].numpy(), said["predicted"].numpy()
    count = len(names)
    known = label >= 0
    read = known & (predicted >= 0)
    cells = np.bincount(label[read].astype(np.int64) * count + predicted[read], minlength=count * count)
    return Mistakes(list(names), cells.reshape(count, count), np.bincount(label[known], minlength=count))
