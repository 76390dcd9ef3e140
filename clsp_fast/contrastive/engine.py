"""The interface of the engines of the contrastive loss, and the choice of an engine.

An engine sums over the negative pairs of a batch: 2 M N D operations forward, 4 M N D to 6 M N D backward.
Targets and positive pairs are left to `clsp_fast.contrastive.positives`.

Shape suffixes: M audio rows, N text rows, D joint dimension.
"""

from __future__ import annotations

import importlib
import os
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from clsp_fast.contrastive import negatives

Implementation = Literal["auto", "cpu", "triton", "reference"]


class Engine(Protocol):
    """`clsp_fast.contrastive.negatives` on the CPU, `clsp_fast.kernels.contrastive` on CUDA.

    s_ij = logit_scale <audio_i, text_j> + logit_bias; pair (i, j) is negative if text_owner_N[j] != i. A text
    whose owner is outside 0..M-1 has negative pairs only. Results are differentiable once in all floating
    arguments.
    """

    def negative_lse(
        self,
        audio_MD: Tensor,
        text_ND: Tensor,
        logit_scale: Tensor,
        text_owner_N: Tensor,
        *,
        logit_bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over the negative pairs of every row (M,) and column (N,); -inf if there are none."""

    def negative_softplus(
        self,
        audio_MD: Tensor,
        text_ND: Tensor,
        logit_scale: Tensor,
        text_owner_N: Tensor,
        *,
        logit_bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
    ) -> Tensor:
        """Sum of log(1 + exp s_ij) over the negative pairs of every row (M,)."""


def choose_engine(implementation: Implementation, embeddings: Tensor) -> Engine | None:
    """The engine for embeddings of this device and dtype; None means the dense definition.

    Raises:
        ValueError: the implementation is unknown, or does not run on the device.
        ImportError: implementation="triton", and triton is not installed.
    """
    device = embeddings.device.type
    if implementation not in ("auto", "cpu", "triton", "reference"):
        raise ValueError(
            f'implementation must be "auto", "cpu", "triton" or "reference", got {implementation!r}'
        )
    if implementation == "cpu" and device != "cpu":
        raise ValueError(f'implementation="cpu" needs tensors on the CPU, got {device}')
    if implementation == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'implementation="triton" needs CUDA tensors, got {device}; or set TRITON_INTERPRET=1'
        )
    if implementation == "cpu" or (implementation == "auto" and device == "cpu"):
        return negatives
    if implementation == "reference" or (implementation == "auto" and device != "cuda"):
        return None
    try:
        launch = importlib.import_module("clsp_fast.kernels._launch")
    except ImportError as error:
        if implementation == "triton":
            fix = "implementation='triton' needs the extra: pip install 'clsp_fast[triton]'"
            raise ImportError(fix) from error
        return None
    supported = embeddings.dtype != torch.float64 and launch.supports(embeddings.device)
    if implementation == "auto" and not supported:
        return None
    return cast(Engine, importlib.import_module("clsp_fast.kernels.contrastive"))


def check_options(compute_dtype: torch.dtype | None, workspace_bytes: int | None) -> None:
    """Checks the engines' options, including those that the chosen engine ignores.

    Raises:
        ValueError: workspace_bytes is negative.
        TypeError: an option has the wrong type, or no engine computes in compute_dtype.
    """
    if workspace_bytes is not None and not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be a whole number, got {workspace_bytes!r}")
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be at least 0, got {workspace_bytes}")
    if compute_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"compute_dtype must be bfloat16, float16 or float32, got {compute_dtype}")
