"""Ids of clips as digests of eight bytes, so that the ids of a large manifest fit into memory."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
from numpy.typing import NDArray


def digest(text: str) -> int:
    """An integer in [0, 2^63) that depends on the text alone.

    The probability that two of n different texts share it is about n^2 / 2^64.
    """
    value = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(value, "big") >> 1


class Digests:
    """The digests of many ids, repeated ones included. It holds eight bytes for each."""

    def __init__(self) -> None:
        self._values: array[int] = array("q")

    def add(self, identifier: str) -> None:
        """Adds an id."""
        self._values.append(digest(identifier))

    def sorted_values(self) -> NDArray[np.int64]:
        """The digests in rising order."""
        return np.sort(np.frombuffer(self._values, np.int64)) if self._values else np.empty(0, np.int64)

    def repeated_values(self) -> set[int]:
        """The digests that were added more than once."""
        values_N = self.sorted_values()
        return set(values_N[1:][values_N[1:] == values_N[:-1]].tolist())

    def repeated(self) -> int:
        """How many ids were added that an earlier one equals."""
        values_N = self.sorted_values()
        return int((values_N[1:] == values_N[:-1]).sum())
