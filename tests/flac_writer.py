"""Writes FLAC streams bit by bit (RFC 9639), so that tests cover streams that no encoder produces.

Bits are strings of "0" and "1"; samples are lists of Python integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIXED: list[list[int]] = [[], [1], [2, -1], [3, -3, 1], [4, -6, 4, -1]]
STEREO = {"left/side": 8, "side/right": 9, "mid/side": 10}


def number(value: int, width: int) -> str:
    """The lowest `width` bits, for two's complement and unsigned numbers."""
    return format(value & (1 << width) - 1, f"0{width}b") if width else ""


def crc(data: bytes, polynomial: int, width: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << width - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> width - 1 else 0)
            value &= (1 << width) - 1
    return value


@dataclass(frozen=True)
class Rice:
    """How residuals are coded: in 2^order partitions, with a Rice parameter or as numbers of `raw` bits."""

    parameter: int = 4
    order: int = 0
    wide: bool = False  # parameters of 5 bits instead of 4
    raw: int | None = None

    def encode(self, residuals: Sequence[int], block: int, warm_up: int) -> str:
        bits = 5 if self.wide else 4
        out = [number(self.wide, 2), number(self.order, 4)]
        size = block >> self.order
        for part in range(1 << self.order):
            chunk = residuals[max(0, part * size - warm_up) : (part + 1) * size - warm_up]
            if self.raw is not None:
                out += ["1" * bits, number(self.raw, 5), *(number(r, self.raw) for r in chunk)]
                continue
            out.append(number(self.parameter, bits))
            for r in chunk:
                folded = 2 * r if r >= 0 else -2 * r - 1
                out += ["0" * (folded >> self.parameter), "1", number(folded, self.parameter)]
        return "".join(out)


def subframe_head(kind: int, wasted: int) -> str:
    return number(kind, 7) + ("1" + "0" * (wasted - 1) + "1" if wasted else "0")


def constant(x: Sequence[int], width: int, wasted: int = 0) -> str:
    return subframe_head(0, wasted) + number(x[0] >> wasted, width - wasted)


def verbatim(x: Sequence[int], width: int, wasted: int = 0) -> str:
    return subframe_head(1, wasted) + "".join(number(v >> wasted, width - wasted) for v in x)


def residuals_of(x: Sequence[int], weights: Sequence[int], shift: int) -> list[int]:
    order = len(weights)
    return [
        x[i] - (sum(w * x[i - 1 - j] for j, w in enumerate(weights)) >> shift) for i in range(order, len(x))
    ]


def predicted(
    x: Sequence[int],
    width: int,
    weights: Sequence[int] | int,
    coding: Rice,
    *,
    shift: int = 0,
    precision: int = 15,
    wasted: int = 0,
) -> str:
    """A subframe with a fixed predictor if `weights` is an order, with a linear predictor if it is a list."""
    x, width = [v >> wasted for v in x], width - wasted
    fixed = isinstance(weights, int)
    taps = FIXED[weights] if isinstance(weights, int) else list(weights)
    out = subframe_head(8 + len(taps) if fixed else 31 + len(taps), wasted)
    out += "".join(number(v, width) for v in x[: len(taps)])
    if not fixed:
        out += number(precision - 1, 4) + number(shift, 5) + "".join(number(w, precision) for w in taps)
    return out + coding.encode(residuals_of(x, taps, shift), len(x), len(taps))


def frame(
    subframes: Sequence[str],
    block: int,
    index: int,
    *,
    stereo: str | None = None,
    variable: bool = False,
    size_code: int = 0,
    rate_bits: tuple[int, str] = (0, ""),
) -> bytes:
    """A frame of `block` samples per channel; `index` counts frames, or samples if `variable`."""
    coded = bytes([index & 0x7F])
    if index >= 0x80:
        length = next(n for n in range(2, 8) if index < 1 << 5 * n + 1)
        tail = [0x80 | index >> 6 * i & 0x3F for i in reversed(range(length - 1))]
        coded = bytes([(0xFF << 8 - length & 0xFF) | index >> 6 * (length - 1), *tail])
    channels = STEREO[stereo] if stereo else len(subframes) - 1
    bits = "111111111111100" + number(variable, 1) + "0111" + number(rate_bits[0], 4)
    bits += number(channels, 4) + number(size_code, 3) + "0" + "".join(number(b, 8) for b in coded)
    head = pack(bits + number(block - 1, 16) + rate_bits[1])
    data = head + pack(number(crc(head, 0x07, 8), 8) + "".join(subframes))
    return data + crc(data, 0x8005, 16).to_bytes(2, "big")


def pack(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def stream(
    frames: Sequence[bytes],
    *,
    rate: int = 16000,
    channels: int = 1,
    bits: int = 16,
    total: int = 0,
    blocks: tuple[int, int] = (16, 65535),
    metadata: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """A file: the STREAMINFO block, more metadata blocks (kind, content), and the frames."""
    info = number(blocks[0], 16) + number(blocks[1], 16) + number(0, 48)
    info += number(rate, 20) + number(channels - 1, 3) + number(bits - 1, 5) + number(total, 36)
    contents = [(0, pack(info) + bytes(16)), *metadata]
    out = b"fLaC"
    for i, (kind, content) in enumerate(contents):
        last = 0x80 if i == len(contents) - 1 else 0
        out += bytes([last | kind]) + len(content).to_bytes(3, "big") + content
    return out + b"".join(frames)
