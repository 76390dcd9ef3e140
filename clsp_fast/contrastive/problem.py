"""The arguments of `contrastive_loss`, checked once.

Shape suffixes: M audio rows, N text rows, D joint dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clsp_fast.arguments import (
    owner_of_texts,
    require_floating,
    require_number,
    require_same_kind,
    require_scalar,
)

Kind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, eq=False)
class Problem:
    """The checked arguments of `contrastive_loss`, as `check_problem` returns them.

    Attributes:
        audio_MD: embeddings of this rank's clips, as the caller passed them.
        text_ND: embeddings of this rank's texts, in the same dtype.
        scale: the multiplier of the logits.
        bias: the number added to all logits of the sigmoid kind; the softmax kind ignores it.
        owner_N: int64, the audio row that each text describes.
        weights: caption weights (N,); None if all captions of a clip have the same weight.
        smoothing: share of each target that is spread evenly over all candidates.
        kind: "softmax" or "sigmoid".
        normalize: whether rows are scaled to unit norm first.
        group: the ranks over which the batch is spread; None if it is not spread.
        one_caption_each: whether text j is the only text of audio j, for every j. This saves work; results
            are the same.
    """

    audio_MD: Tensor
    text_ND: Tensor
    scale: Tensor | float
    bias: Tensor | float
    owner_N: Tensor
    weights: Tensor | None
    smoothing: float
    kind: Kind
    normalize: bool
    group: dist.ProcessGroup | None
    one_caption_each: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation and of the loss: float32, or float64 for float64 embeddings."""
        return torch.promote_types(self.audio_MD.dtype, torch.float32)

    @property
    def ignored_bias(self) -> Tensor | float:
        """A summand 0 for the softmax kind, where the bias cancels: even the gradient of a bias that is not
        finite is 0."""
        return self.bias.reshape(1)[:0].sum() if isinstance(self.bias, Tensor) else 0.0


def check_problem(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    *,
    text_owner: Tensor | None,
    weights: Tensor | None,
    logit_bias: Tensor | float | None,
    label_smoothing: float,
    kind: Kind,
    normalize: bool,
    group: dist.ProcessGroup | None,
) -> Problem:
    """The arguments of `contrastive_loss` as a `Problem`. `check_values` checks the elements of tensors.

    Raises:
        ValueError: a shape, range or name is wrong; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
    """
    check_embeddings(audio_MD, text_ND)
    check_scalars(logit_scale, logit_bias)
    require_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f'kind must be "softmax" or "sigmoid", got {kind!r}')
    m, n = len(audio_MD), len(text_ND)
    if weights is not None:
        _check_weights(weights, n, kind, audio_MD.device)
    return Problem(
        audio_MD=audio_MD,
        text_ND=text_ND,
        scale=logit_scale,
        bias=0.0 if logit_bias is None else logit_bias,
        owner_N=owner_of_texts(text_owner, m, n, audio_MD.device).to(audio_MD.device),
        weights=weights,
        smoothing=label_smoothing,
        kind=kind,
        normalize=normalize,
        group=group,
        one_caption_each=text_owner is None and n == m,
    )


def check_embeddings(audio_MD: Tensor, text_ND: Tensor) -> None:
    """Raises TypeError or ValueError unless dtypes, devices and shapes are those of two sets of rows."""
    require_same_kind("audio_MD", audio_MD, "text_ND", text_ND)
    for name, value in (("audio_MD", audio_MD), ("text_ND", text_ND)):
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"{name} must be a non-empty matrix, got shape {tuple(value.shape)}")
    if audio_MD.shape[1] != text_ND.shape[1]:
        raise ValueError(
            f"text_ND must have {audio_MD.shape[1]} columns like audio_MD, got {text_ND.shape[1]}"
        )


def check_scalars(logit_scale: Tensor | float, logit_bias: Tensor | float | None) -> None:
    """Raises TypeError or ValueError unless the multiplier and the bias, if there is one, are scalars."""
    require_scalar("logit_scale", logit_scale)
    if logit_bias is not None:
        require_scalar("logit_bias", logit_bias)


def _check_weights(weights: Tensor, n: int, kind: Kind, device: torch.device) -> None:
    if kind == "sigmoid":
        raise ValueError('weights must be None with kind="sigmoid": every pair counts once')
    require_floating("weights", weights)
    if weights.shape != (n,) or weights.device != device:
        raise ValueError(
            f"weights must be of shape ({n},) on {device}, got {tuple(weights.shape)} on {weights.device}"
        )


def check_values(problem: Problem) -> None:
    """Checks owners and weights. On CUDA the host does not wait for the result; a later call raises.

    Raises:
        ValueError: an owner is not a clip, or a weight is negative or not finite.
    """
    owner_N, weights, clips = problem.owner_N, problem.weights, len(problem.audio_MD)
    if not problem.one_caption_each:
        require_owners(((owner_N >= 0) & (owner_N < clips)).all(), clips)
    if weights is not None:
        require_weights(((weights >= 0) & weights.isfinite()).all())


def require_owners(valid: Tensor, clips: int) -> None:
    """Raises ValueError unless `valid`, a boolean scalar, says that all owners are clips."""
    _require_on_device(valid, f"text_owner must lie in 0..{clips - 1}")


def require_weights(valid: Tensor) -> None:
    """Raises ValueError unless `valid`, a boolean scalar, says that all weights are right."""
    _require_on_device(valid, "weights must be finite and not negative")


def _require_on_device(condition: Tensor, message: str) -> None:
    """Raises ValueError if the condition is false. On CUDA the host does not wait; a later call raises."""
    if condition.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)
