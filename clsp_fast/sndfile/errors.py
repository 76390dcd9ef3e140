"""The error of a file that libsndfile cannot decode, or would decode incorrectly."""

from __future__ import annotations


class DecodeError(Exception):
    """Nothing can be decoded; the message says why.

    Attributes:
        reason: "format", "truncated" or "empty".
    """

    def __init__(self, message: str, reason: str = "format") -> None:
        self.reason = reason
        super().__init__(message)
