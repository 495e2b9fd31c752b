"""Policies in timm's notation, such as rand-m9-mstd0.5-inc1, augmix-m3, original-mstd0.5 and 3a: timm's own code."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from dist_trainer.errors import UserError, nearest

_KEY = "augment.policy.name"
_Range = tuple[float, float]
_COMMON: dict[str, _Range] = {"mstd": (0, float("inf"))}
_SECTIONS: dict[str, dict[str, _Range]] = {
    "rand": {"m": (0, 10), "n": (1, 15), "p": (0, 1), "mmax": (1, 30), "inc": (0, 1), **_COMMON},
    "augmix": {"m": (0, 10), "w": (1, 10), "d": (-1, 10), "a": (0.01, 100), "b": (0, 1), **_COMMON},
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), _COMMON),
}
"""What may follow each kind, behind hyphens, and its range: m is a magnitude of 10, n operations, p a probability."""
_TABLES = ("weights", "3a", "3aw")
"""Sets of operations that rand-t... names."""


def is_timms(name: str) -> bool:
    kind, hyphen, _ = name.partition("-")
    return (kind in _SECTIONS and bool(hyphen)) or kind in ("original", "originalr", "v0", "v0r", "3a")


def timm_policy(text: str, fill: Sequence[int]) -> Callable[[Any], Any]:
    """From PIL image to PIL image, by Python's and NumPy's generators; areas that are left empty take `fill`.

    3a is DeiT III's 3-Augment (Touvron et al. 2022): grey, solarize or blur. Raises UserError for what timm would pass
    over, or fail at with an assertion.
    """
    kind, *sections = text.split("-")
    _check(text, kind, sections)
    from timm.data import auto_augment  # where it is used: that costs a loader process three seconds

    given = {"img_mean": tuple(fill) if len(fill) > 1 else fill[0]}
    if kind == "rand":
        return auto_augment.rand_augment_transform(text, given)  # type: ignore[no-any-return]
    if kind == "augmix":  # as timm's own training has it
        return auto_augment.augment_and_mix_transform(text, {**given, "translate_pct": 0.3})  # type: ignore[no-any-return]
    return auto_augment.auto_augment_transform(text, given)  # type: ignore[no-any-return]


def _check(text: str, kind: str, sections: list[str]) -> None:
    known = _SECTIONS[kind]
    ranges = dict(known)
    numbers: dict[str, float] = {}
    for section in sections:
        if kind == "rand" and section.startswith("t"):
            if section[1:] not in _TABLES:
                there = ", ".join(f"t{table}" for table in _TABLES)
                raise UserError(f"{_KEY}: {text!r}: {section!r} names no set of operations; there are {there}")
            continue
        match = re.fullmatch(r"([a-z]+)(-?\d+(?:\.\d+)?)", section)
        if match is None or match[1] not in known:
            name = match[1] if match else section
            there = f"{nearest(name, known)}; {kind} takes {', '.join(f'{each}NUMBER' for each in known)}"
            raise UserError(f"{_KEY}: {text!r}: {section!r} is not understood{there}")
        numbers[match[1]] = float(match[2])
    if "mmax" in numbers:
        ranges["m"] = (0, numbers["mmax"])
    for name, number in numbers.items():
        least, most = ranges[name]
        if not least <= number <= most:
            more = "; timm would clip it; -mmax allows more" if name == "m" and kind == "rand" else ""
            raise UserError(f"{_KEY}: {text!r}: {name} is {number:g}, not in {least:g} to {most:g}{more}")
