"""The code that all kernels share: supported devices, tile sizes, operands, and the scores of a tile.

Shape suffixes: M, N rows of the two operands, D joint dimension.

Every similarity kernel computes s = <x_i, y_j> tile by tile; kernels differ in what they do with a tile.
`score_tile` computes a tile. It reads its operands through tensor-memory-accelerator (TMA) descriptors
where the card has them (compute capability 9 and later), and through pointers elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set before triton was imported: kernels then run on CPU tensors, slowly."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS = {"enable_fp_fusion": True}
"""Options of every launch. Fusion is stated because its default differs between releases of triton."""
SIZES = ["first_row", "M", "N", "tiles_m", "tiles_n"]
"""Arguments whose values must not be compiled in: the last batch of an epoch has other sizes."""
GROUP = tl.constexpr(8)
"""Number of row tiles that read a column tile one after the other; see `tile_position`."""
_ALIGNMENT_BYTES = 16


class Tile(NamedTuple):
    """Launch configuration of a similarity kernel.

    Attributes:
        rows, columns: the size of a tile of scores.
        depth: elements of a row that one step of the product loads.
        num_warps, num_stages: as in triton.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


TARGETS = (80, 89, 90, 100)
"""80: A100; 89: cards with 99 KB of shared memory per block (4090, L40S, 5090); 90: H100, H200; 100: B200."""

# Target -> bytes of an element -> tile.
_WIDE = {
    80: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 64, 32, 8, 3)},
    89: {2: Tile(128, 128, 64, 8, 2), 4: Tile(64, 128, 32, 8, 2)},
    90: {2: Tile(128, 256, 64, 8, 3), 4: Tile(128, 128, 32, 8, 3)},
    100: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 64, 32, 8, 3)},
}
TILES = {
    # Wider tiles would spill registers on target 100, or with 16 warps miss its matrix instruction.
    "lse": _WIDE | {100: _WIDE[100] | {2: Tile(128, 64, 64, 8, 4)}},
    "starved": {target: {2: Tile(128, 64, 64, 8, 2), 4: Tile(64, 64, 32, 8, 2)} for target in TARGETS},
    "panel": _WIDE,
    "softplus": _WIDE,
    "sigmoid_panel": _WIDE,
    # With a depth of 32, target 89 would spill registers.
    "rank": _WIDE | {89: _WIDE[89] | {4: Tile(64, 128, 16, 8, 3)}},
    "maxima": _WIDE,
    # Registers must hold the tile and the neighbours kept.
    "topk": {target: {2: Tile(128, 128, 64, 8, 2), 4: Tile(64, 64, 16, 8, 4)} for target in TARGETS},
}
"""Kernel -> target -> bytes of an element -> tile. budgets.json holds what each tile compiles to."""
# In the interpreter a tile is a numpy array. With small tiles, tests of several tiles and edges are cheap.
INTERPRETED_TILE = Tile(32, 64, 32, 4, 1)
_overrides: dict[str, Tile] = {}
_assumed_targets: list[int] = []

# Three TF32 products for one fp32 product: a relative error of 1e-6, where one TF32 product has 1e-3. They
# run on tensor cores; "ieee" would use scalar FMA, at less than half the speed.
FLOAT32_DOTS = "tf32x3"


def supports(device: torch.device) -> bool:
    """Whether kernels run on a device: NVIDIA, compute capability 8.0 or later; interpreted, on any."""
    if INTERPRETED:
        return True
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def target_of(device: torch.device) -> int:
    """The target that a device belongs to.

    Raises:
        ValueError: there is no kernel for the device.
    """
    if _assumed_targets:
        return _assumed_targets[-1]
    if not supports(device):
        raise ValueError(
            "Triton kernels need an NVIDIA GPU of compute capability 8.0 or later, or TRITON_INTERPRET=1, "
            f"got device {device}"
        )
    if INTERPRETED:
        return 90  # so that tests cover loads through descriptors and pointers
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10) or (major, minor) == (8, 0):
        return major * 10
    return 89


def tile_of(kernel: str, target: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel, by the kernel's name in KERNELS."""
    if kernel in _overrides:
        return _overrides[kernel]
    return INTERPRETED_TILE if INTERPRETED else TILES[kernel][target][dtype.itemsize]


@contextlib.contextmanager
def override_tiles(**tiles: Tile) -> Iterator[None]:
    """Launches and measures the named kernels with other tiles: for measurements, not thread-safe.

    Raises:
        ValueError: no kernel has this name.
    """
    unknown = sorted(set(tiles) - set(TILES))
    if unknown:
        raise ValueError(f"kernels with tiles are {', '.join(TILES)}, got {', '.join(unknown)}")
    before = _overrides.copy()
    _overrides.update(tiles)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@contextlib.contextmanager
def assume_target(target: int) -> Iterator[None]:
    """Treats every device as `target`, to learn without a card what would be launched; not thread-safe."""
    _assumed_targets.append(target)
    try:
        yield
    finally:
        _assumed_targets.pop()


def has_descriptors(target: int) -> bool:
    """Whether a target loads tiles by TMA."""
    return target >= 90


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's card the current device: Triton launches there, even if the arguments are on another card."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def operand(x_MD: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, in a layout that every kernel can read: unit stride, each row aligned to 16 bytes.

    If x has another layout, it is copied. The copy takes O(M D), the kernel O(M N D).
    """
    x_MD = x_MD.to(dtype)
    step = _ALIGNMENT_BYTES // dtype.itemsize
    rows, depth = x_MD.shape
    stride = x_MD.stride(0)
    aligned = stride % step == 0 and x_MD.data_ptr() % _ALIGNMENT_BYTES == 0
    if aligned and stride >= depth and x_MD.stride(1) == 1:
        return x_MD
    buffer = x_MD.new_empty(rows, -(-depth // step) * step)
    return buffer[:, :depth].copy_(x_MD)


def check_tensor(name: str, x: object) -> None:
    """Raises TypeError if x is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_operands(x: Tensor, y: Tensor) -> None:
    """Raises TypeError if dtypes of two operands do not fit, and ValueError if shapes or devices do not."""
    check_tensor("each side", x)
    check_tensor("each side", y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            "both sides must be matrices with the same, positive number of columns, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != y.dtype or x.dtype not in DTYPES:
        raise TypeError(
            f"both sides must share a dtype (bfloat16, float16 or float32), got {x.dtype} and {y.dtype}"
        )
    if x.device != y.device:
        raise ValueError(f"both sides must be on one device, got {x.device} and {y.device}")


def check_argument(
    name: str, x: Tensor | None, dtype: torch.dtype | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raises TypeError if x, which may be None, is no tensor of the dtype; ValueError if the shape or device
    differs. If `dtype` is None, x may have any floating dtype.
    """
    if x is None:
        return
    check_tensor(name, x)
    right = x.is_floating_point() if dtype is None else x.dtype == dtype
    if not right or x.shape != shape or x.device != device:
        error = ValueError if right else TypeError
        raise error(
            f"{name} must be {dtype or 'floating'} of shape {shape} on {device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def score_arguments(kernel: str, x_MD: Tensor, y_ND: Tensor) -> dict[str, Any]:
    """The arguments that all similarity kernels have. x and y must be results of `operand`."""
    target = target_of(x_MD.device)
    tile = tile_of(kernel, target, x_MD.dtype)
    x: Tensor | TensorDescriptor = x_MD
    y: Tensor | TensorDescriptor = y_ND
    if has_descriptors(target):
        x = TensorDescriptor.from_tensor(x_MD, [tile.rows, tile.depth])
        y = TensorDescriptor.from_tensor(y_ND, [tile.columns, tile.depth])
    return {
        "x": x,
        "y": y,
        "M": len(x_MD),
        "N": len(y_ND),
        "stride_x": x_MD.stride(0),
        "stride_y": y_ND.stride(0),
        **score_constants(tile, target, x_MD.dtype, x_MD.shape[1]),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **OPTIONS,
    }


def score_constants(tile: Tile, target: int, dtype: torch.dtype, depth: int) -> dict[str, Any]:
    """The compile-time arguments of a similarity kernel."""
    return {
        "D": depth,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "DESCRIPTORS": has_descriptors(target),
        "DOTS": FLOAT32_DOTS if dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def panel_rows(rows: int, row_bytes: int, workspace_bytes: int, step: int) -> int:
    """Number of rows of each panel: a multiple of `step` that fits into the workspace.

    If `step` rows do not fit, it is `step`. Only the last panel may have fewer rows.
    """
    largest = max(step, workspace_bytes // row_bytes // step * step)
    panels = -(-rows // largest)
    return -(-rows // (panels * step)) * step


def split_rows(tiles_m: int, tiles_n: int, longest: int) -> tuple[int, int]:
    """Row tiles of each program, at most `longest`, and programs of each column tile.

    A program keeps a column tile and runs over row tiles. The lengths are chosen so that an H100, which runs
    one program on each of its 132 multiprocessors, ends the last ones together.
    """
    fewest = triton.cdiv(tiles_m, longest)

    def cost(parts: int) -> int:
        return triton.cdiv(parts * tiles_n, 132) * triton.cdiv(tiles_m, parts)

    parts = min(range(fewest, min(tiles_m, fewest + 64) + 1), key=cost)
    run = triton.cdiv(tiles_m, parts)
    return run, triton.cdiv(tiles_m, run)


def tile_grid(arguments: dict[str, Any], first_row: int, stop_row: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a launch over a panel of rows, and the arguments that say where the panel is."""
    tiles_m = triton.cdiv(stop_row - first_row, arguments["BM"])
    tiles_n = triton.cdiv(arguments["N"], arguments["BN"])
    return (tiles_m * tiles_n,), {"first_row": first_row, "tiles_m": tiles_m, "tiles_n": tiles_n}


@triton.jit
def tile_position(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (row, column) of this program. GROUP row tiles use a column tile while L2 still holds it."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def score_tile(
    x,
    y,
    row,
    column,
    M,
    N,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DOTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """<x_i, y_j> in fp32, BM rows from `row`, BN columns from `column`; undefined beyond M and N."""
    score = tl.zeros([BM, BN], tl.float32)
    k_K = tl.arange(0, BK)
    # Indices beyond the end repeat the last row, so that no row needs a mask.
    row_M = tl.minimum(row + tl.arange(0, BM), M - 1).to(tl.int64)
    column_N = tl.minimum(column + tl.arange(0, BN), N - 1).to(tl.int64)
    for k in range(0, D, BK):
        if DESCRIPTORS:
            x_MK = x.load([row, k])
            y_NK = y.load([column, k])
        elif D % BK == 0:
            x_MK = tl.load(x + row_M[:, None] * stride_x + (k + k_K)[None, :])
            y_NK = tl.load(y + column_N[:, None] * stride_y + (k + k_K)[None, :])
        else:
            inside_K = (k + k_K)[None, :] < D
            x_MK = tl.load(x + row_M[:, None] * stride_x + (k + k_K)[None, :], mask=inside_K, other=0.0)
            y_NK = tl.load(y + column_N[:, None] * stride_y + (k + k_K)[None, :], mask=inside_K, other=0.0)
        if UPCAST:  # the interpreter would multiply the bits of bf16 as integers
            x_MK = x_MK.to(tl.float32)
            y_NK = y_NK.to(tl.float32)
        score = tl.dot(x_MK, y_NK.T, score, input_precision=DOTS)
    return score


@triton.jit
def load_owners(owner, column, M, N, BN: tl.constexpr):
    """The row of each column's positive pair, (BN,) int32: -1 if it is none of the M rows, -2 beyond N.

    `owner` points to int64 (N,); `column` is the tile's first.
    """
    # Each owner is loaded twice and reduced; otherwise, a thread would keep the owners of all its columns.
    at = column + tl.arange(0, BN)[:, None] + tl.zeros([1, 2], tl.int32)
    owner_N = tl.load(owner + at, mask=at < N, other=-1)
    owner_N = tl.where((owner_N >= 0) & (owner_N < M), owner_N, -1)
    return tl.max(tl.where(at < N, owner_N, -2).to(tl.int32), 1)


@triton.jit
def has_positives(owner_N, row, BM: tl.constexpr):
    """Whether a tile of BM rows from `row` has a positive pair."""
    return tl.max(((owner_N >= row) & (owner_N < row + BM)).to(tl.int32), 0) > 0


@triton.jit
def positives_of_tile(owner, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """The result of `load_owners`, and a boolean scalar: whether the tile has a positive pair or an edge.

    The tile is (BM, BN) at (row, column), int32 scalars. Most tiles have neither a positive pair nor an edge,
    and skip the comparison of all elements.
    """
    owner_N = load_owners(owner, column, M, N, BN)
    return owner_N, has_positives(owner_N, row, BM) | (row + BM > M) | (column + BN > N)


@triton.jit
def mask_positives(s, owner_N, row, M, fill, BM: tl.constexpr):
    """The tile s (BM, BN) with `fill` at positive pairs, and beyond M and N."""
    row_M = tl.arange(0, BM)
    clip_N = tl.where(owner_N < 0, owner_N, tl.maximum(owner_N - row, -1))
    s = tl.where((row_M < M - row)[:, None], s, fill)
    return tl.where((clip_N[None, :] == row_M[:, None]) | (clip_N == -2)[None, :], fill, s)
