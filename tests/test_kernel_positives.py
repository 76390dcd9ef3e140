"""Products of positive pairs and the gradients of embeddings equal those of plain torch in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numerics import FEW, assert_agrees
from torch import Tensor

from clsp_fast.kernels import positives
from clsp_fast.kernels.grouping import group_by_owner
from clsp_fast.kernels.positives import Products, pair_products, pair_products_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Clips without captions, clips with several in any order, one caption of one clip, and many of one clip.
OWNERS = {
    "several": [4, 0, 0, 2, 4, 4, 6],
    "in order": [0, 0, 1, 3, 3, 6],
    "one": [3],
    "many": [2] * 20,
}
# Triton's interpreter computes with numpy, which warns about masked elements.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def compute(
    audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor | None, dtype: torch.dtype, **options: bool
) -> Products:
    """The products; without owners, text j is the only text of row j."""
    groups = None if owner_N is None else group_by_owner(owner_N, len(audio_MD))[:2]
    if owner_N is None:
        owner_N = torch.arange(len(text_ND), device=text_ND.device)
    return pair_products(audio_MD, text_ND, owner_N, groups=groups, dtype=dtype, **options)


def with_rest(audio_MD: Tensor, text_ND: Tensor, dot_N: Tensor) -> Tensor:
    """A scalar whose gradient reaches the embeddings through the products and directly."""
    audio = (audio_MD.double() * torch.linspace(-1, 1, audio_MD.shape[1], device=audio_MD.device)).sum()
    text = text_ND.double().square().mul(torch.linspace(0, 2, text_ND.shape[1], device=text_ND.device)).sum()
    return audio + text + dot_N.sin().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", [*OWNERS, "one each"])
def test_products_and_gradients_equal_those_of_torch(
    kernel_device: torch.device, dtype: torch.dtype, normalize: bool, name: str
) -> None:
    owner = OWNERS.get(name, list(range(7)))
    audio_MD, text_ND = (torch.randn(n, 20, device=kernel_device).to(dtype) for n in (7, len(owner)))
    owner_N = torch.tensor(owner, device=kernel_device)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (audio_MD, text_ND)]
    result = compute(*leaves, None if name == "one each" else owner_N, wide, normalize=normalize)
    assert result.audio_MD.dtype == result.text_ND.dtype == wide
    exact = [x.double().requires_grad_() for x in (audio_MD, text_ND)]
    dot_N = pair_products_reference(*exact, owner_N, normalize=normalize)
    assert_agrees(result.dot_N, dot_N, count=FEW, size=20)
    rows = [torch.nn.functional.normalize(x) if normalize else x for x in exact]
    for x, expected in zip((result.audio_MD, result.text_ND), rows, strict=True):
        assert_agrees(x, expected, count=1, dtype=wide)
    gradients = torch.autograd.grad(with_rest(result.audio_MD, result.text_ND, result.dot_N), leaves)
    truth = torch.autograd.grad(with_rest(*rows, dot_N), exact)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert gradient.dtype == dtype
        # The interpreter cuts digits off when it rounds to bfloat16.
        assert_agrees(gradient, expected, count=FEW if dtype == wide else 1.5, dtype=dtype)


def test_pairs_cancel_before_rounding_to_16_bits(kernel_device: torch.device) -> None:
    audio_MD = torch.randn(5, 16, device=kernel_device).bfloat16().requires_grad_()
    text_ND = torch.randn(5, 16, device=kernel_device).bfloat16()
    result = compute(audio_MD, text_ND, None, torch.float32)
    rest = (result.audio_MD * (text_ND.float() * 1.001)).sum()
    (gradient,) = torch.autograd.grad(rest - result.dot_N.sum(), audio_MD)
    expected = text_ND.float() * 1.001 - text_ND.float()
    assert_agrees(gradient, expected, count=1.5, dtype=torch.bfloat16)


def test_float32_gradients_are_added_in_place(kernel_device: torch.device) -> None:
    audio_MD, text_ND = (torch.randn(6, 12, device=kernel_device).requires_grad_() for _ in range(2))
    result = compute(audio_MD, text_ND, None, torch.float32)
    assert result.audio_MD.data_ptr() == audio_MD.data_ptr()
    places = []
    for x in (result.audio_MD, result.text_ND):
        x.register_hook(lambda g: places.append(g.data_ptr()))
    gradients = torch.autograd.grad(with_rest(*result[:3]), (audio_MD, text_ND))
    assert sorted(places) == sorted(g.data_ptr() for g in gradients)


@pytest.mark.parametrize("frozen", ["audio", "text"])
def test_a_frozen_side_gets_no_gradient(kernel_device: torch.device, frozen: str) -> None:
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    audio_MD, text_ND = (torch.randn(7, 12, device=kernel_device) for _ in range(2))
    learns = (text_ND if frozen == "audio" else audio_MD).requires_grad_()
    result = compute(audio_MD, text_ND, owner_N, torch.float32)
    (gradient,) = torch.autograd.grad(result.dot_N.sum(), learns)
    (expected,) = torch.autograd.grad(pair_products_reference(audio_MD, text_ND, owner_N).sum(), learns)
    assert_agrees(gradient, expected, count=FEW, dtype=torch.float32)


def test_rows_may_have_gaps_and_any_length(kernel_device: torch.device) -> None:
    for depth in (1, 33, 3000):
        audio_MD = torch.randn(3, 2 * depth, device=kernel_device)[:, :depth]
        text_ND = torch.randn(depth, 4, device=kernel_device).T
        owner_N = torch.tensor([2, 0, 0, 1], device=kernel_device)
        result = compute(audio_MD, text_ND, owner_N, torch.float32, normalize=True)
        expected = pair_products_reference(audio_MD, text_ND, owner_N, normalize=True)
        assert_agrees(result.dot_N, expected, count=FEW, size=2)


def test_owners_and_groups_may_have_gaps(kernel_device: torch.device) -> None:
    owner_N = torch.randint(7, (20, 2), device=kernel_device)[:, 1]
    groups = [x.repeat_interleave(2)[::2] for x in group_by_owner(owner_N, 7)[:2]]
    leaves = [torch.randn(n, 12, device=kernel_device).requires_grad_() for n in (7, 20)]
    result = pair_products(*leaves, owner_N, groups=(groups[0], groups[1]))
    expected = pair_products_reference(*leaves, owner_N)
    assert_agrees(result.dot_N, expected, count=FEW, size=12)
    gradients = torch.autograd.grad(result.dot_N.sin().sum(), leaves)
    truth = torch.autograd.grad(expected.sin().sum(), leaves)
    for gradient, exact in zip(gradients, truth, strict=True):
        assert_agrees(gradient, exact, count=FEW, dtype=torch.float32)


def test_rows_of_zeros_stay_finite(kernel_device: torch.device) -> None:
    audio_MD = torch.zeros(2, 4, device=kernel_device, requires_grad=True)
    text_ND = torch.randn(2, 4, device=kernel_device)
    result = compute(audio_MD, text_ND, None, torch.float32, normalize=True)
    assert result.dot_N.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(result.dot_N.sum(), audio_MD)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_embeddings_and_their_gradient(kernel_device: torch.device, weighted: bool) -> None:
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    audio_MD, text_ND = (torch.randn(7, 12, device=kernel_device).requires_grad_() for _ in range(2))
    # Both captions of clip 0 have weight 0.
    weights_N = torch.tensor([1.0, 0, 0, 2, 0, 1e-30, 3], device=kernel_device) if weighted else None
    groups = group_by_owner(owner_N, 7)[:2]
    result = pair_products(audio_MD, text_ND, owner_N, groups=groups, weights_N=weights_N, smooth=True)
    captioned = [2, 4, 6] if weighted else [0, 2, 4, 6]
    expected = torch.stack([audio_MD.sum(0), audio_MD[captioned].sum(0), text_ND.sum(0)])
    assert result.sums_3D is not None
    assert_agrees(result.sums_3D, expected, count=FEW, dtype=torch.float32, size=20)
    slope_3D = torch.randn(3, 12, device=kernel_device, dtype=torch.float64)
    gradients = torch.autograd.grad((result.sums_3D * slope_3D).sum(), (audio_MD, text_ND))
    truth = torch.autograd.grad((expected * slope_3D).sum(), (audio_MD, text_ND))
    for gradient, exact in zip(gradients, truth, strict=True):
        assert_agrees(gradient, exact, count=FEW, dtype=torch.float32)


def test_gradients_of_sums_may_have_gaps(kernel_device: torch.device) -> None:
    leaves = [torch.randn(n, 12, device=kernel_device).requires_grad_() for n in (7, 7)]
    owner_N = torch.arange(7, device=kernel_device)
    sums_3D = pair_products(*leaves, owner_N, smooth=True).sums_3D
    assert sums_3D is not None
    # The gradient of a sum is one number that is read for all elements.
    for gradient, expected in zip(torch.autograd.grad(sums_3D.sum(), leaves), (2, 1), strict=True):
        assert bool((gradient == expected).all())


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(kernel_device: torch.device, normalize: bool) -> None:
    owner_N = torch.tensor([1, 0, 1, 1], device=kernel_device)
    inputs = [torch.randn(n, 3, device=kernel_device, dtype=torch.float64).requires_grad_() for n in (3, 4)]

    def function(audio_MD: Tensor, text_ND: Tensor) -> Tensor:
        return with_rest(*compute(audio_MD, text_ND, owner_N, torch.float64, normalize=normalize)[:3])

    assert torch.autograd.gradcheck(function, inputs)


def test_the_longest_row_fits(kernel_device: torch.device) -> None:
    text_ND = torch.ones(1, positives.LARGEST_DEPTH, device=kernel_device)
    assert compute(text_ND, text_ND, None, torch.float32).dot_N.item() == positives.LARGEST_DEPTH


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (
            ValueError,
            {"audio_MD": torch.ones(3, 8193)},
            r"audio_MD must be .* at most 8192 columns, got .* \(3, 8193\)",
        ),
        (TypeError, {"audio_MD": [1.0]}, "audio_MD must be a torch.Tensor, got list"),
        (TypeError, {"weights_N": [1, 2, 3]}, "weights_N must be a torch.Tensor, got list"),
        (TypeError, {"audio_MD": torch.ones(3, 8).int()}, "audio_MD must be floating, got torch.int32"),
        (
            ValueError,
            {"audio_MD": torch.ones(0, 8)},
            r"audio_MD must be a floating, non-empty .* got torch.float32 \(0, 8\)",
        ),
        (
            ValueError,
            {"text_ND": torch.ones(8)},
            r"text_ND must be a floating, non-empty matrix .* got torch.float32 \(8,\)",
        ),
        (
            ValueError,
            {"text_ND": torch.ones(4, 7)},
            r"text_ND must be torch.float32 of shape \(4, 8\) .* \(4, 7\)",
        ),
        (
            TypeError,
            {"text_ND": torch.ones(4, 8).half()},
            "text_ND must be torch.float32 .* got torch.float16",
        ),
        (TypeError, {"owner_N": torch.zeros(4)}, "owner_N must be torch.int64 .* got torch.float32"),
        (
            ValueError,
            {"weights_N": torch.ones(3)},
            r"weights_N must be floating of shape \(4,\) .* got torch.float32 \(3,\)",
        ),
        (ValueError, {"groups": None}, "without groups, each row must have one text, got 3 rows and 4 texts"),
        (
            ValueError,
            {"groups": (torch.zeros(4).int(), torch.zeros(3).int())},
            r"offset of groups must be torch.int32 of shape \(4,\) .* \(3,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(
    kernel_device: torch.device, error: type[Exception], changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "audio_MD": torch.ones(3, 8),
        "text_ND": torch.ones(4, 8),
        "owner_N": torch.zeros(4, dtype=torch.int64),
        "groups": (torch.zeros(4).int(), torch.zeros(4).int()),
    }
    arguments |= changes
    if arguments["groups"]:
        arguments["groups"] = tuple(x.to(kernel_device) for x in arguments["groups"])
    on_device = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        pair_products(**on_device)


def test_the_operators_are_registered_correctly(kernel_device: torch.device) -> None:
    owner_N = torch.tensor([1, 0, 1], device=kernel_device)
    audio_MD, text_ND = (torch.randn(n, 8, device=kernel_device) for n in (2, 3))
    order_N, offset, _ = group_by_owner(owner_N, 2)
    tests = ("test_schema", "test_faketensor")
    for normalize in (False, True):
        arguments = (audio_MD, text_ND, owner_N, normalize, torch.float32)
        torch.library.opcheck(positives._pair_products, arguments, test_utils=tests)
    torch.library.opcheck(
        positives._embedding_sums, (audio_MD, text_ND, None, order_N, offset), test_utils=tests
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_the_library_passes_gradients_as_their_operator_is_registered(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    learns: tuple[bool, bool],
) -> None:
    """A tensor that the operator changes must not be passed for another argument, too."""
    operator, calls = positives._pair_gradients, []

    def checked(*arguments: Any) -> None:
        torch.library.opcheck(
            operator, copy.deepcopy(arguments), test_utils=("test_schema", "test_faketensor")
        )
        places: dict[bool, set[int]] = {False: set(), True: set()}
        for argument, value in zip(operator._opoverload._schema.arguments, arguments, strict=True):
            if isinstance(value, Tensor) and value.numel():
                places[argument.is_write].add(value.data_ptr())
        assert len(places[True]) == sum(learns)
        assert not places[True] & places[False]
        calls.append(operator(*arguments))

    monkeypatch.setattr(positives, "_pair_gradients", checked)
    leaves = [
        torch.randn(n, 8, device=kernel_device).to(dtype).requires_grad_(needed)
        for n, needed in zip((7, 7), learns, strict=True)
    ]
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    with_rest(*compute(*leaves, owner_N, torch.float32)[:3]).backward()
    assert calls == [None]
