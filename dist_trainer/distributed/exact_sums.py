"""Sums of floats whose bits depend on no order, no grouping and no number of ranks (engine.sums: exact).

The rule. Every term is rounded, alone, to a multiple of a fixed power of two, 2^e, and the multiples are summed in
float64.

Proof. A float64 holds every multiple of 2^e up to 2^(53 + e) exactly. If the absolute values of all terms together stay
below that, so does every partial sum, whatever is added to what first; each partial sum is a multiple of 2^e too, so
each addition is exact; and exact additions commute and associate. One rounding, of the whole sum to float32, follows.

Gradients: e = -48, so the bound is 2^5 for the sum over a step's micro-batches of an element's absolute values, which
are its share of the mean: an element of the mean gradient may be 32. Error: at most 2^-49 per term, and half a unit in
the last place of the float32 sum. An element of a micro-batch above 2^5 / (micro-batches), which might break the bound,
is counted; its sum is then as good as float64's, but no longer sure to be the same bits. NaN and infinity stay what
they are, as does what is above 2^80, which counts as infinite.

Small sums, of losses and batch statistics: each term as two words, multiples of 2^-12 and, for the rest, of 2^-52. The
bound is 2^41 for the sum of the first, and 2^13 terms for the second, whose terms are at most 2^-13. Error: at most
2^-53 per term.

Neal 2015, "Fast exact summation using small and large superaccumulators", has the general form of the idea.
"""

import torch

GRID = -48
BOUND = 2.0 ** (53 + GRID)
_UP, _DOWN = 2.0**-GRID, 2.0**GRID
_HIGH, _LOW = 2.0**12, 2.0**52
_PIECE = 1 << 16
"""Elements that a CPU rounds at a time, so that they stay in its cache: a third of the time on 11 M parameters."""


def _pieces(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    if tensors[0].device.type != "cpu" or tensors[0].numel() <= _PIECE:
        return [tensors]
    return list(zip(*(torch.split(each, _PIECE) for each in tensors), strict=True))


def add_on_grid(total: torch.Tensor, terms: torch.Tensor, limit: float, *, first: bool) -> torch.Tensor | int:
    """Add `terms` (float32 [n], consumed) to `total` (float64 [n], in units of the grid); `first`: replace it.

    Returns how many terms are above `limit`: an int on the CPU, a 0-d tensor elsewhere, which nobody need wait for.
    """
    beyond: torch.Tensor | int = 0
    for whole, part in _pieces(total, terms):
        part.mul_(_UP).round_()
        if part.device.type != "cpu":
            beyond = beyond + part.abs().gt(limit * _UP).sum()
        elif any(abs(each.item()) > limit * _UP for each in part.aminmax()):
            beyond = beyond + int(part.abs().gt(limit * _UP).sum())
        if first:
            whole.copy_(part)
        else:
            whole.add_(part.double())  # faster than a sum of two types
    return beyond


def sum_on_grid(terms: list[torch.Tensor], out: torch.Tensor, limit: float) -> torch.Tensor | int:
    """Round the sums of `terms` (float32 [n] each, consumed) to `out` (float32 [n]). Returns what `add_on_grid` does.

    On a CPU the sums in float64 never leave its cache.
    """
    beyond: torch.Tensor | int = 0
    for *parts, part in _pieces(*terms, out):
        total = torch.empty(len(part), dtype=torch.float64, device=part.device)
        for number, each in enumerate(parts):
            beyond = beyond + add_on_grid(total, each, limit, first=number == 0)
        from_grid(total, part)
    return beyond


def from_grid(total: torch.Tensor, out: torch.Tensor) -> None:
    """Round sums (float64 [n], in units of the grid) to `out` (float32 [n]), once."""
    for whole, part in _pieces(total, out):
        part.copy_(whole).mul_(_DOWN)


def words(values: torch.Tensor) -> torch.Tensor:
    """Floats [n] as float64 [2, n] that add up to them, to be summed exactly; `joined` undoes it."""
    values = values.double()
    high = (values * _HIGH).round_() / _HIGH
    return torch.stack([high, ((values - high) * _LOW).round_() / _LOW])


def joined(sums: torch.Tensor) -> torch.Tensor:
    """Float64 [n] of sums of `words` [2, n]."""
    return sums[0] + sums[1]
