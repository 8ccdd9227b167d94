"""The order in which training windows are read: random, repeatable, computed for any position without a table."""

import hashlib
import math
from functools import lru_cache

import numpy as np


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed pseudo-random permutation of 0..size-1, evaluated at `index` (uint64) in memory of the index alone.

    A Feistel network on the mixed-radix digits (left, right) of the index, left < a, right < b, a * b >= size, with
    modular addition (Bellare, Ristenpart, Rogaway, Stegers 2009, "Format-preserving encryption"), walked along its
    cycle until it lands below `size`; a * b exceeds size by less than a.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)

    def once(value: np.ndarray) -> np.ndarray:
        left, right = value // b, value % b
        for first, second in zip(keys[0::2], keys[1::2]):
            left = (left + _mix(right, first)) % a
            right = (right + _mix(left, second)) % b
        return left * b + right

    result = once(index)
    while (outside := result >= size).any():
        result[outside] = once(result[outside])
    return result


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """32 well-mixed bits of each uint64 (multiply and shift, as splitmix64 ends; products wrap)."""
    value = (value ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return value >> np.uint64(32)


@lru_cache(maxsize=64)
def epoch_keys(fingerprint: str, data_seed: int, epoch: int) -> np.ndarray:
    """Seven uint64: six keys for `permute` and one for the shift of the grid."""
    digest = hashlib.sha512(f"{fingerprint}:{data_seed}:{epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8")[:7].astype(np.uint64)
