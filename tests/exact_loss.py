"""The contrastive loss and its gradients from their definition in 60 decimal digits, for small batches.

Float64 is too coarse for a loss of 1e-12: with logits of 30 it keeps three digits.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Exact(NamedTuple):
    """Results in float64, each rounded once at the end.

    Attributes:
        loss, audio_MD, text_ND, logit_scale, logit_bias: the loss and its gradients.
        terms: for each of the four gradients, the size of the terms whose sum it is. Where terms cancel, the
            error of a gradient is judged relative to their size.
    """

    loss: Tensor
    audio_MD: Tensor
    text_ND: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    terms: list[float]


def exact_loss(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    *,
    text_owner: Tensor | None = None,
    weights: Tensor | None = None,
    logit_bias: float = 0.0,
    label_smoothing: float = 0.0,
    kind: str = "softmax",
) -> Exact:
    """The arguments are those of `contrastive_loss`."""
    with localcontext() as context:
        context.prec = 60
        x, y = _decimals(audio_MD), _decimals(text_ND)
        scale, bias, smoothing = (Decimal(v) for v in (logit_scale, logit_bias, label_smoothing))
        m, n = len(x), len(y)
        owner = np.arange(n) if text_owner is None else text_owner.numpy()
        cosine = x @ y.T
        s = scale * cosine + bias
        positive = (owner == np.arange(m)[:, None]) * Decimal(1)
        if kind == "sigmoid":
            target = positive * (1 - smoothing) + smoothing / 2
            exp = _exp(s)
            loss = (_log(1 + exp) - target * s).sum() / (m * n)
            d_s = (exp / (1 + exp) - target) / (m * n)
            spread = smoothing * (positive + Decimal("0.5")) / (m * n)
        else:
            weight = positive if weights is None else positive * _decimals(weights)
            captioned = weight.sum(1) > 0
            total = np.where(captioned, weight.sum(1), Decimal(1))
            rows = weight / total[:, None] * (1 - smoothing) + smoothing / n
            columns = positive * (1 - smoothing) + smoothing / m
            rows *= (captioned / Decimal(max(1, int(captioned.sum()))))[:, None]
            columns = columns / n
            exp = _exp(s)
            row, column = exp.sum(1, keepdims=True), exp.sum(0, keepdims=True)
            loss = ((_log(row) - s) * rows).sum() + ((_log(column) - s) * columns).sum()
            d_s = exp / row * rows.sum(1, keepdims=True) - rows
            d_s = (d_s + exp / column * columns.sum(0, keepdims=True) - columns) / 2
            loss /= 2
            # Smoothing adds two terms: one that lowers the target, one for all candidates.
            spread = smoothing * (rows + columns)
        gradients = [scale * d_s @ y, scale * d_s.T @ x, (d_s * cosine).sum(), d_s.sum()]
        size = abs(d_s) + spread
        sizes = [scale * size @ abs(y), scale * size.T @ abs(x), size * abs(cosine), size]
        terms = [float(_tensor(size).norm()) for size in sizes[:2]]
        terms += [float(size.sum()) for size in sizes[2:]]
        return Exact(_tensor(loss), *(_tensor(g) for g in gradients), terms)


def _decimals(x: Tensor) -> np.ndarray[Any, Any]:
    return np.vectorize(Decimal, otypes=[object])(x.detach().double().numpy())


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.asarray(x, dtype=object).astype(np.float64))


_exp = np.vectorize(lambda x: x.exp(), otypes=[object])
_log = np.vectorize(lambda x: x.ln(), otypes=[object])
