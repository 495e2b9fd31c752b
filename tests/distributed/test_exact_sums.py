"""Sums whose bits depend on no order and no grouping, and how far they are from the true sum."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_trainer.distributed.exact_sums import BOUND, GRID, add_on_grid, from_grid, joined, words


def drawn(seed: int, num_terms: int, least: int, largest: int) -> torch.Tensor:
    """float32 [terms, 8]: of either sign, with magnitudes from 10^least to 10^largest, zeros among them."""
    generator = np.random.default_rng(seed)
    values = 10.0 ** generator.uniform(least, largest, (num_terms, 8)) * generator.choice([-1, 1], (num_terms, 8))
    return torch.from_numpy(np.where(generator.random((num_terms, 8)) < 0.05, 0, values)).float()


def grid_sum(terms: torch.Tensor, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(float64 [8] on the grid, float32 [8], how many terms were beyond the bound): in any order, in any groups, of
    which each is one rank's.
    """
    order = torch.from_numpy(generator.permutation(len(terms)))
    cuts = sorted(generator.integers(0, len(terms) + 1, size=int(generator.integers(0, 8))).tolist())
    groups = [group for group in np.split(order.numpy(), cuts) if len(group)]
    whole, beyond = torch.zeros(8, dtype=torch.float64), 0
    for number in generator.permutation(len(groups)):
        total = torch.zeros(8, dtype=torch.float64)
        for place, term in enumerate(groups[number]):
            beyond += int(add_on_grid(total, terms[term].clone(), BOUND / len(terms), first=place == 0))
        whole += total
    out = torch.empty(8)
    from_grid(whole, out)
    return whole, out, beyond


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_terms=st.sampled_from([1, 2, 3, 8, 64, 500, 4096]),
    exponents=st.tuples(st.integers(-45, 5), st.integers(-45, 5)),
)
def test_gradients_sum_to_the_same_bits_or_the_sum_is_counted(
    seed: int, num_terms: int, exponents: tuple[int, int]
) -> None:
    """Magnitudes from 1e-45 to 1e5, up to 4,096 terms. Within 2^-49 per term and half a unit in the last place of the
    exact rational sum. Mutations: float64 without the grid; no count; a grid of 2^-44, which is four bits worse.
    """
    terms = drawn(seed, num_terms, *sorted(exponents))
    generator = np.random.default_rng(seed)
    (on_grid, first, beyond), (again_on_grid, second, again) = (grid_sum(terms, generator) for _ in range(2))
    assert beyond == again == int((terms.abs() > BOUND / num_terms).sum())
    if beyond:
        return
    assert torch.equal(on_grid, again_on_grid) and torch.equal(first, second)
    for channel in range(8):
        true = sum((Fraction(float(term)) for term in terms[:, channel]), Fraction(0))
        half_unit = Fraction(float(np.spacing(np.float32(abs(float(true)))))) / 2
        error = abs(Fraction(float(first[channel])) - true)
        assert error <= num_terms * Fraction(2) ** (GRID - 1) + half_unit * Fraction(1001, 1000)


def test_what_is_not_finite_stays_so() -> None:
    """So that the step is not applied. Mutation: an integer grid without a flag."""
    out, total = torch.empty(3), torch.zeros(3, dtype=torch.float64)
    for first, values in ((True, [1.0, torch.nan, -torch.inf]), (False, [2.0, 1.0, 1.0])):
        add_on_grid(total, torch.tensor(values), BOUND / 2, first=first)
    from_grid(total, out)
    assert out[0] == 3 and out[1].isnan() and out[2] == -torch.inf


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), exponents=st.tuples(st.integers(-30, 8), st.integers(-30, 8)))
def test_words_sum_to_the_same_bits(seed: int, exponents: tuple[int, int]) -> None:
    """1,000 values of batch statistics or losses, within 2^-53 each. Mutation: one word."""
    values = drawn(seed, 1000, *sorted(exponents)).double()
    generator = np.random.default_rng(seed)

    def summed() -> torch.Tensor:
        total = torch.zeros(2, 8, dtype=torch.float64)
        for group in np.array_split(generator.permutation(1000), 5):
            total += sum((words(values[n]) for n in group), torch.zeros(2, 8, dtype=torch.float64))
        return joined(total)

    first = summed()
    assert torch.equal(first, summed())
    for channel in range(8):
        true = sum((Fraction(float(value)) for value in values[:, channel]), Fraction(0))
        error = abs(Fraction(float(first[channel])) - true)
        assert error <= 1000 * Fraction(2) ** -53 + abs(true) * Fraction(2) ** -52


def test_float64_alone_depends_on_the_order() -> None:
    """The reason for the grid: without it, these very terms sum to other bits in another order."""
    terms = drawn(1, 4096, -12, -1).double()
    assert not torch.equal(terms.sum(0), terms.flip(0).cumsum(0)[-1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(terms.cumsum(0)[-1], terms.flip(0).cumsum(0)[-1], rtol=0, atol=0)
