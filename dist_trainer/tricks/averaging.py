"""Weight averaging: one model from several of a run, uniform or greedy. run_folder/snapshots.py keeps the k best.

Batch-norm statistics do not average as weights do: estimate them again (PreciseBN) before the result is judged.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from dist_trainer.errors import UserError, nearest
from dist_trainer.tensors import State, kind, misfits, not_finite

Member = tuple[str, State]  # the name of a file, and what is in it


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """The mean of the best weights of the run, made at its end and scored beside the last ones."""

    top_k: int = 0
    """How many of the best snapshots are kept and averaged; 0: none."""
    metric: str = "auto"
    """The logged validation metric that ranks snapshots; auto: val_ema/top1 with EMA, else val/top1. The least loss is
    best."""
    greedy: bool = False
    """Leave out each snapshot that lowers the average's accuracy (one more validation for each)."""


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


class _Sum:
    """The sum of `num` states: floats in float64, everything else as in the first."""

    def __init__(self) -> None:
        self.num = 0
        self._first = ""
        self._kinds: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._floats: State = {}
        self._others: State = {}

    def add(self, name: str, state: State) -> None:
        """Raises UserError naming the file and the tensor that does not fit or is not finite; then nothing is added."""
        kinds = {key: kind(value) for key, value in state.items()}
        if self.num and (found := misfits(kinds, self._kinds)):
            raise UserError(f"{name}: cannot be averaged with {self._first} ({found})")
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
            self._dtypes = {key: value.dtype for key, value in state.items()}
        self.num += 1

    def copy(self) -> Self:
        """Another one, to add to without changing this one."""
        other = type(self)()
        other.num, other._first, other._kinds, other._others = self.num, self._first, self._kinds, self._others
        other._dtypes = self._dtypes
        other._floats = {key: value.clone() for key, value in self._floats.items()}
        return other

    def mean(self) -> State:
        """New tensors of the types and in the order of the first state. Raises UserError when nothing was added."""
        if not self.num:
            raise UserError("there is nothing to average: no snapshots and no files")
        return {
            key: (self._floats[key] / self.num).to(dtype) if key in self._floats else self._others[key].clone()
            for key, dtype in self._dtypes.items()
        }


def average(members: Iterable[Member], score: Callable[[str, State], float] | None = None) -> tuple[State, list[str]]:
    """The mean of `members`, best first: floats in float64 and back in their type, everything else as in the best.

    With `score`, greedily: each member is kept if the mean of the kept ones and it scores at least as high as without
    it (Wortsman et al. 2022, Model soups, recipe 1); the first always is. `score` is called once per member, with its
    name and the mean with it; larger is better. Returns the mean and the names of the members in it.

    At any time one sum in float64 (two with `score`) and one member are in memory, so let `members` load them one by
    one. Up to 2**29 copies of one state in float32, bfloat16 or float16 give that very state, bit for bit: a value has
    at most 24 significant bits, so every multiple of it up to that is exact in the 53 of float64, and so is the
    quotient, which is the value. Raises UserError, naming file and tensor, for names, types or shapes that differ and
    for values that are not finite.
    """
    total, best = _Sum(), 0.0
    kept: list[str] = []
    for name, state in members:
        trial = total.copy() if score is not None else total
        trial.add(name, state)
        del state  # before the next one is loaded
        if score is not None:
            result = score(name, trial.mean())
            if kept and not result >= best:
                continue
            best = result
        total = trial
        kept.append(name)
    return total.mean(), kept
