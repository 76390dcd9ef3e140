"""Checks of the arguments of losses and retrieval: types, dtypes and shapes.

An error names the argument, what was expected and what was given.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that arguments called "floating" may have; torch cannot compute with others, such as float8."""


def require_floating(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """Raises TypeError unless the value is a tensor of a dtype in `FLOATING`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating (16, 32 or 64 bits), got {value.dtype}")


def require_same_kind(first: str, a: Any, second: str, b: Any) -> None:
    """Raises TypeError unless the values are floating tensors of the same dtype, on the same device."""
    require_floating(first, a)
    require_floating(second, b)
    if a.dtype != b.dtype or a.device != b.device:
        raise TypeError(
            f"{first} and {second} must share dtype and device, "
            f"got {a.dtype} on {a.device} and {b.dtype} on {b.device}"
        )


def require_number(name: str, value: Any, expected: str = "a number") -> None:
    """Raises TypeError unless the value is a real number of Python or numpy."""
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")


def as_integer(name: str, value: Any) -> int:
    """An integer of any type as an int; TypeError for other types and for bool."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def require_scalar(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless the value is a real number or a tensor of shape ()."""
    if not isinstance(value, Tensor):
        require_number(name, value, "a number or a scalar tensor")
    elif value.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}")
    elif value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")


def owner_of_texts(text_owner: Tensor | None, clips: int, texts: int, device: torch.device) -> Tensor:
    """The clip of each text: `text_owner`, which is checked except for its values, or arange(texts).

    Raises:
        TypeError: text_owner is not an int64 tensor.
        ValueError: text_owner has a wrong shape, or is missing although there are more texts than clips.
    """
    if text_owner is None:
        if texts > clips:
            raise ValueError(
                f"text_owner must be given when there are more texts ({texts}) than clips ({clips})"
            )
        return torch.arange(texts, device=device)
    if not isinstance(text_owner, Tensor):
        raise TypeError(f"text_owner must be a torch.Tensor, got {type(text_owner).__name__}")
    wrong = f"text_owner must be int64 of shape ({texts},), got {text_owner.dtype} {tuple(text_owner.shape)}"
    if text_owner.dtype != torch.int64:
        raise TypeError(wrong)
    if text_owner.shape != (texts,):
        raise ValueError(wrong)
    return text_owner
