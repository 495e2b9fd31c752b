"""Weight averaging: one model from several of a run, uniform or greedy. snapshots.py keeps the k best.

Batch-norm statistics do not average as weights do: estimate them again (PreciseBN) before the result is judged.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from dist_trainer.errors import UserError, nearest

State = dict[str, torch.Tensor]
Member = tuple[str, State]  # the name of a file, and what is in it
Kinds = dict[str, tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """The mean of the best weights of the run, made at its end and reported beside the last ones."""

    top_k: int = 0
    """How many of the best snapshots are kept and averaged; 0: none."""
    metric: str = "auto"
    """Best by which logged metric of the validation; auto: val_ema/top1 with EMA, else val/top1. Of a loss, least."""
    greedy: bool = False
    """Leave out each snapshot with which the average validates worse (one more validation for each)."""


def chosen_metric(config: AveragingConfig, logged: Collection[str]) -> str:
    """The metric that ranks snapshots. `logged`: the names of the validation's metrics (val/top1, val_ema/loss, ...).

    Raises UserError for one that is not logged, and for a `top_k` below 0.
    """
    if config.top_k < 0:
        raise UserError(f"averaging.top_k: {config.top_k} is negative; write 0 for no averaging")
    if config.metric == "auto":
        return "val_ema/top1" if "val_ema/top1" in logged else "val/top1"
    if config.metric not in logged:
        raise UserError(
            f"averaging.metric: {config.metric!r} is not logged{nearest(config.metric, logged)}; "
            f"there are {', '.join(sorted(logged))}"
        )
    return config.metric


def larger_is_better(metric: str) -> bool:
    """False for a loss (val/loss, val_ema/loss), True for accuracies."""
    return not metric.endswith("loss")


def not_finite(state: State) -> str | None:
    """The first tensor of `state` that has a NaN or an infinity, or None."""
    return next((key for key, value in state.items() if not value.isfinite().all()), None)


class _Sum:
    """The sum of `num` states: floats in float64, everything else as in the first."""

    def __init__(self) -> None:
        self.num = 0
        self._first = ""
        self._kinds: Kinds = {}
        self._floats: State = {}
        self._others: State = {}

    def add(self, name: str, state: State) -> None:
        """Raises UserError naming the file and the tensor that does not fit or is not finite; adds nothing then."""
        kinds = {key: (value.dtype, value.shape) for key, value in state.items()}
        if self.num and kinds != self._kinds:
            raise UserError(f"{name}: cannot be averaged with {self._first} ({_differences(kinds, self._kinds)})")
        if key := not_finite(state):
            raise UserError(f"{name}: {key} has values that are not finite; average without this file")
        for key, value in state.items():
            if key in self._floats:
                self._floats[key].add_(value)
            elif not self.num and value.is_floating_point():  # starts from the first, not from 0: 0.0 + -0.0 is 0.0
                self._floats[key] = value.detach().to(torch.float64, copy=True)
            elif not self.num:
                self._others[key] = value.clone()  # a view would hold its whole file
        if not self.num:
            self._first, self._kinds = name, kinds
        self.num += 1

    def copy(self) -> Self:
        """Another one, to add to without changing this one."""
        other = type(self)()
        other.num, other._first, other._kinds, other._others = self.num, self._first, self._kinds, self._others
        other._floats = {key: value.clone() for key, value in self._floats.items()}
        return other

    def mean(self) -> State:
        """New tensors of the types and in the order of the first state. Raises UserError when nothing was added."""
        if not self.num:
            raise UserError("there is nothing to average: no snapshots and no files")
        return {
            key: (self._floats[key] / self.num).to(dtype) if key in self._floats else self._others[key].clone()
            for key, (dtype, _) in self._kinds.items()
        }


def _differences(kinds: Kinds, first: Kinds) -> str:
    """For example `missing: fc.bias; other: fc.weight float32 (10, 64) for float32 (1000, 64)`."""

    def text(kind: tuple[torch.dtype, torch.Size]) -> str:
        return f"{str(kind[0]).removeprefix('torch.')} {tuple(kind[1])}"

    both = sorted(first.keys() & kinds.keys())
    found = {
        "missing": sorted(first.keys() - kinds.keys()),
        "unexpected": sorted(kinds.keys() - first.keys()),
        "other": [f"{key} {text(kinds[key])} for {text(first[key])}" for key in both if kinds[key] != first[key]],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for what, names in found.items() if names
    )


def mean(members: Iterable[Member]) -> State:
    """The mean of `members`, best first: floats in float64 and back in their type, everything else as in the best.

    At any time one float64 sum and one member are held, so let `members` load them one by one. Up to 2**29 copies of
    one state in float32, bfloat16 or float16 give that very state, bit for bit: a value has at most 24 significant
    bits, so every multiple of it up to that is exact in the 53 of float64, and so is the quotient, which is the value.
    Raises UserError, naming file and tensor, for names, types or shapes that differ and for values that are not finite.
    """
    total = _Sum()
    for name, state in members:
        total.add(name, state)
        del state  # before the next one is loaded
    return total.mean()


def greedy_soup(candidates: Iterable[Member], score: Callable[[State], float]) -> tuple[State, list[str]]:
    """The mean of those `candidates`, best first, that do not lower `score` (larger is better), and their names.

    Each is kept if the mean of the kept ones and it scores at least as high as without it (Wortsman et al. 2022, Model
    soups, recipe 1); the first always is. `score` is called once per candidate. Raises as `mean` does.
    Two float64 sums and one member are held.
    """
    soup, best = _Sum(), 0.0
    kept: list[str] = []
    for name, state in candidates:
        trial = soup.copy()
        trial.add(name, state)
        del state
        result = score(trial.mean())
        if not kept or result >= best:
            soup, best = trial, result
            kept.append(name)
    return soup.mean(), kept
