"""Random draws as pure functions of a key: the same on every rank, worker, platform and release.

NumPy does not promise that `Generator` streams stay the same between versions, so everything here is
splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 3):
integer arithmetic modulo 2**64 and a stable sort.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB

# First key part of each use, so that two uses with equal numbers never share a stream.
BLOCKS, WINDOW, FULL, AUGMENT, FLIP, FORWARD, INIT, SPLIT = range(8)
CROP, STAGE, CLASS_TURN, IN_CLASS, STREAM, DRAW, MIX = range(8, 15)

UInt64 = npt.NDArray[np.uint64]


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """A 64-bit key of integers: unequal tuples give unrelated keys."""
    state = _GOLDEN
    for part in parts:
        state = _mix(((state ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return state


def hashes(values: npt.NDArray[Any], *parts: int) -> UInt64:
    """uint64 hashes of int `values`, any shape, under the key `parts`: `_mix(value * golden + key)`."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key(*parts))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    result: UInt64 = x ^ (x >> np.uint64(31))
    return result


def permutation(size: int, *parts: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size) (int64) under the key `parts`."""
    return np.argsort(hashes(np.arange(size), *parts), kind="stable").astype(np.int64)


def uniform(values: npt.NDArray[Any], *parts: int) -> npt.NDArray[np.float64]:
    """One float64 in [0, 1) per value, under the key `parts`."""
    draws: npt.NDArray[np.float64] = (hashes(values, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws


def permute(
    values: npt.NDArray[np.int64], size: npt.NDArray[np.int64] | int, keys: UInt64 | np.uint64
) -> npt.NDArray[np.int64]:
    """Images of `values` (int64) under a permutation of range(size), computed for these values alone.

    `size` and `keys` (uint64) broadcast against `values`. Twelve half-rounds of a Feistel network over the smallest a x
    b that covers `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4), each adding a
    hash of one half to the other; values that fall outside go through it again.
    """
    shape = np.broadcast_shapes(np.shape(values), np.shape(size), np.shape(keys))
    x, n, k = (np.broadcast_to(np.asarray(each).astype(np.uint64), shape).ravel() for each in (values, size, keys))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // np.maximum(a, np.uint64(1))
    result = np.empty(len(x), np.int64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x // b, x % b
        with np.errstate(over="ignore"):
            for number in range(6):
                left = (left + hashes(right + k, number, 0)) % a
                right = (right + hashes(left + k, number, 1)) % b
        x = left * b + right
        inside = x < n
        result[todo[inside]] = x[inside]
        todo = todo[~inside]
        x, a, b, n, k = (each[~inside] for each in (x, a, b, n, k))
    return result.reshape(shape)
