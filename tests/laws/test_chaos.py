"""Fifty kills at random moments (tests/support/chaos.py; `make chaos N=...` makes more)."""

from pathlib import Path

import pytest
from chaos import Chaos


@pytest.mark.slow
def test_fifty_kills_cost_no_bit(tmp_path: Path) -> None:
    """Weights, EMA, momentum, statistics, best weights, the average, every line of the record.

    Mutations: write best weights after the checkpoint that names them; a manifest before its files; snapshots that a
    kept checkpoint needs are removed; metrics of a mirror end before its checkpoint.
    """
    lines: list[str] = []
    try:
        Chaos(tmp_path, 50, seed=0, say=lines.append).go()
    finally:
        print("\n".join(lines))
