"""A random order of any number of things that takes no memory and needs no pass over them.

A Feistel network on the numbers below a power of four is a permutation whatever its round function
is; numbers that fall outside the range are sent through it again until they fall inside (cycle
walking: Black and Rogaway, 2002). So position i of an epoch is known without the positions before
it, which is what makes a shuffled run resume at once.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
# multipliers of splitmix64 (Steele, Lea and Flood, 2014)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = 0x9E3779B97F4A7C15


def permuted(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Where the permutation `key` of range(count) sends each of `positions` (int64, same shape).

    >>> sorted(permuted(np.arange(5), 5, key=1).tolist())
    [0, 1, 2, 3, 4]
    >>> permuted(np.arange(5), 5, key=1).tolist() == permuted(np.arange(5), 5, key=2).tolist()
    False
    """
    half = max(1, (max(1, count - 1).bit_length() + 1) // 2)
    found = _feistel(positions.astype(np.uint64), half, key)
    while (outside := found >= count).any():
        found[outside] = _feistel(found[outside], half, key)
    return found.astype(np.int64)


def mixed(*numbers: int) -> int:
    """One 63-bit key of several numbers; any change of any of them gives an unrelated key.

    >>> mixed(1, 2) == mixed(2, 1)
    False
    """
    value = 0
    for number in numbers:
        value = int(_hash(np.array([value ^ (number + 1)], np.uint64), _STEP)[0])
    return value >> 1


def _feistel(values: np.ndarray, half: int, key: int) -> np.ndarray:
    """Swap and mix the two halves of `half` bits each, ROUNDS times."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (_hash(right, _round_key(key, turn)) & mask)
    return (left << np.uint64(half)) | right


def _round_key(key: int, turn: int) -> int:
    """The key of one round."""
    return (key + (turn + 1) * _STEP) & 0xFFFFFFFFFFFFFFFF


def _hash(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 of `values` plus a key; sums and products wrap at 64 bits."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(key)
        values = (values ^ (values >> np.uint64(30))) * _MIX[0]
        values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
