"""The positive pairs of the contrastive loss by Triton kernels; `clsp_fast.contrastive.positives` uses torch.

The number of launches does not depend on the size of the batch. The forward pass has 3. If a clip has
several captions or if there are weights, 3 to 4 more check and group the captions. Smoothing adds 2. The
backward pass has 2. A process group adds its exchanges. The kernels also convert and normalise embeddings,
and round their gradients to 16 bits.

Shape suffixes: M audio rows, N text rows of this rank, D joint dimension.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, cast

from torch import Tensor

from clsp_fast.contrastive.gather import Shards
from clsp_fast.contrastive.positives import Pairs, as_scalar
from clsp_fast.contrastive.problem import Problem, require_owners, require_weights

# Triton is optional.
_grouping, _positives, _loss = (
    importlib.import_module(f"clsp_fast.kernels.{name}") for name in ("grouping", "positives", "loss")
)


class GroupedProducts(NamedTuple):
    """The products of positive pairs, and which of them belong to the same clip.

    Attributes:
        dot_N: float64, product of each text and its audio.
        groups: order and offsets of the captions of each clip; None if there is one caption for each clip.
        sums_3D: sums of embeddings, which label smoothing needs; otherwise None.
    """

    dot_N: Tensor
    groups: tuple[Tensor, Tensor] | None
    sums_3D: Tensor | None


def supports(problem: Problem) -> bool:
    """Whether the kernels can compute with rows of this length."""
    return problem.audio_MD.shape[1] <= int(_positives.LARGEST_DEPTH)


def make_pairs(problem: Problem) -> tuple[Pairs, GroupedProducts]:
    """The embeddings in `Problem.dtype`, and the products of their positive pairs.

    Compute the rest of the loss from the embeddings in `Pairs`. The backward pass then adds the gradients of
    the positive pairs in place to the gradients of the rest.
    """
    audio_MD, text_ND, owner_N, dtype = problem.audio_MD, problem.text_ND, problem.owner_N, problem.dtype
    sent_dtype = dtype if problem.normalize else audio_MD.dtype
    shards = Shards.agree(problem.group, len(audio_MD), len(text_ND), audio_MD.device, sent_dtype)
    groups = None
    if not problem.one_caption_each or problem.weights is not None:
        *groups, valid_2 = _grouping.group_by_owner(owner_N, len(audio_MD), problem.weights)
        require_owners(valid_2[0], len(audio_MD))
        if problem.weights is not None:
            require_weights(valid_2[1])
    products = _positives.pair_products(
        audio_MD,
        text_ND,
        owner_N,
        groups=groups,
        weights_N=problem.weights,
        dtype=dtype,
        normalize=problem.normalize,
        smooth=problem.smoothing > 0,
    )
    # All results require a gradient if any input does. Embeddings that need none are cut off.
    wide_audio_MD = products.audio_MD if audio_MD.requires_grad else products.audio_MD.detach()
    wide_text_ND = products.text_ND if text_ND.requires_grad else products.text_ND.detach()
    scale = as_scalar(problem.scale, wide_audio_MD)
    bias = as_scalar(problem.bias, wide_audio_MD) if problem.kind == "sigmoid" else None
    pairs = Pairs(problem, wide_audio_MD, wide_text_ND, scale, bias, shards)
    return pairs, GroupedProducts(products.dot_N, groups, products.sums_3D)


def softmax_loss(pairs: Pairs, products: GroupedProducts, row_M: Tensor, column_N: Tensor) -> Tensor:
    """As `clsp_fast.contrastive.positives.softmax_loss`, from products instead of logits."""
    bias = pairs.problem.bias
    loss = _loss.softmax_loss(
        row_M,
        column_N,
        products.dot_N,
        pairs.scale,
        bias=as_scalar(bias, pairs.scale) if isinstance(bias, Tensor) else None,
        weights_N=pairs.problem.weights,
        groups=products.groups,
        **_options(pairs, products),
    )
    return pairs.shards.sum(loss)


def sigmoid_loss(pairs: Pairs, products: GroupedProducts, sums_M: Tensor) -> Tensor:
    """As `clsp_fast.contrastive.positives.sigmoid_loss`, from products instead of logits."""
    bias = cast(Tensor, pairs.bias)
    loss = _loss.sigmoid_loss(sums_M, products.dot_N, pairs.scale, bias, **_options(pairs, products))
    return pairs.shards.sum(loss)


def _options(pairs: Pairs, products: GroupedProducts) -> dict[str, Any]:
    shards, sums_3D = pairs.shards, products.sums_3D
    sharded = shards.group is not None
    return {
        "totals": (shards.total_clips, shards.total_texts),
        "smoothing": pairs.problem.smoothing,
        "sums_3D": sums_3D,
        "all_sums_3D": shards.sum(sums_3D) if sharded and sums_3D is not None else None,
        "sum_over_ranks": shards.sum if sharded else None,
    }
