"""The operators that compute the terms of the losses return the sums and slopes that they promise."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_agrees

from clsp_fast.kernels.grouping import group_by_owner
from clsp_fast.kernels.loss_terms import sigmoid_terms, softmax_terms

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
REGISTERED = ("test_schema", "test_faketensor")


def test_softmax_terms(kernel_device: torch.device) -> None:
    """Clip 0 has captions of weight 2, 0 and 1; clip 1 has none; clip 2 has a caption of weight 0."""
    owner_N = torch.tensor([0, 0, 2, 0], device=kernel_device)
    weights_N = torch.tensor([2.0, 0.0, 0.0, 1.0], device=kernel_device)
    groups = group_by_owner(owner_N, 3, weights_N)[:2]
    row_M, column_N = (torch.randn(n, device=kernel_device) for n in (3, 4))
    dot_N = torch.randn(4, device=kernel_device, dtype=torch.float64)
    scale = torch.tensor(3.0, device=kernel_device)
    arguments = (row_M, column_N, dot_N, scale, weights_N, *groups, True, 0.2)
    torch.library.opcheck(softmax_terms, arguments, test_utils=REGISTERED)
    row_slope_M, pair_slope_N, text_slope_N, weight_slope_N, partial = softmax_terms(*arguments)

    row, column, logit = (x.double().requires_grad_() for x in (row_M, column_N, 3 * dot_N))
    weight = weights_N.double().requires_grad_()
    target = (weight[[0, 3]] * logit[[0, 3]]).sum() / weight[[0, 1, 3]].sum()
    all_logits = torch.cat([row[:1], logit[[0, 1, 3]]])
    # Weight 0 of caption 1 multiplies its logit, so the slope of that weight is not 0.
    target = (weight[[0, 1, 3]] * logit[[0, 1, 3]]).sum() / weight[[0, 1, 3]].sum()
    rows = all_logits.logsumexp(0) - target + 0.2 * target
    truth = torch.autograd.grad(rows, (row, logit, weight))
    for value, exact in zip((row_slope_M, pair_slope_N, weight_slope_N), truth, strict=True):
        assert_agrees(value, exact, count=100)
    texts = (torch.logaddexp(column, logit) - logit).sum()
    (text_slope,) = torch.autograd.grad(texts, logit)
    assert_agrees(text_slope_N, text_slope, count=100)
    sums = partial.sum(1)
    assert_agrees(sums[0], (rows + texts + 0.2 * logit.sum()).detach(), count=100)
    assert sums[1] == 1
    assert_agrees(sums[2], ((truth[1] + text_slope + 0.2) * dot_N).sum(), count=100)


def test_sigmoid_terms(kernel_device: torch.device) -> None:
    row_M = torch.rand(5, device=kernel_device)
    dot_N = torch.randn(3, device=kernel_device, dtype=torch.float64)
    scale, bias = (torch.tensor(x, device=kernel_device) for x in (3.0, -1.0))
    arguments = (row_M, dot_N, scale, bias, 0.2)
    torch.library.opcheck(sigmoid_terms, arguments, test_utils=REGISTERED)
    text_slope_N, partial = sigmoid_terms(*arguments)
    logit = 3 * dot_N - 1
    assert_agrees(text_slope_N, -torch.sigmoid(-logit), count=100)
    loss = row_M.double().sum() + torch.nn.functional.softplus(-logit).sum() + 0.2 * logit.sum()
    slope_N = 0.2 - torch.sigmoid(-logit)
    expected = torch.stack([loss, slope_N.sum(), (slope_N * dot_N).sum()])
    assert_agrees(partial.sum(1), expected, count=100)
