"""The presets on the card: forward pass and training step at 800 s of audio a batch, in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench import model_cases
from bench.card.record import Record
from bench.card.timing import kernel_times, time_together
from bench.measure import Call, one_line, relative
from bench.model_cases import Ragged, ragged
from clsp_fast.model import CLSP

PRESETS = ("base", "xlarge")
DRY_PRESETS = ("tiny",)
CLIPS, FRAMES = 100, 800
DRY_CLIPS, DRY_FRAMES = 2, 60
COMPARED_CLIPS = 8
TOP_KERNELS = 25
PARITY_LIMIT, TF32_LIMIT = 1e-4, 2e-2
"""Relative. Some hundred operations follow one another, and round at 1e-7, or at 5e-4 in TF32."""


def run(record: Record) -> None:
    """The presets one after the other; then the convolution alone, and agreement with the CPU."""
    for preset in DRY_PRESETS if record.dry_run else PRESETS:
        try:
            measure_preset(record, preset)
        except (RuntimeError, ValueError) as error:  # the other preset is still worth measuring
            record.add(f"model/{preset}", {"error": one_line(repr(error))})
    measure_convolution(record)
    record.add("model/tiny against the CPU, float32", parity(record.device, PARITY_LIMIT))
    # By default, torch's convolutions in float32 round their operands to 11 bits on a card.
    record.add("model/tiny against the CPU, default", parity(record.device, TF32_LIMIT, None))


def measure_preset(record: Record, preset: str) -> None:
    """Forward pass and training step with clips of equal and of different lengths."""
    equal, different = (
        ragged(
            preset,
            DRY_CLIPS if record.dry_run else CLIPS,
            shortest=shortest,
            longest=DRY_FRAMES if record.dry_run else FRAMES,
            device=record.device.type,
        )
        for shortest in ((DRY_FRAMES, DRY_FRAMES // 4) if record.dry_run else (FRAMES, FRAMES // 4))
    )
    model = equal.model()
    batches = {"equal": equal, "ragged": different}
    record.add(f"model/{preset}/bf16 against float32", agreement(model, different))
    for name, batch in batches.items():
        call = model_cases.forward(batch, half=True, model=model)
        _add_timed(record, f"model/{preset}/forward, {name}", call, batch)
    for name, batch in batches.items():
        call = model_cases.training_step(batch, half=True, model=model)
        _add_timed(record, f"model/{preset}/step, {name}", call, batch)
    call = model_cases.training_step(equal, half=True, model=model)
    call()
    kernels = kernel_times(call, record.device, rounds=1)
    total_ms = sum(kernel["ms"] for kernel in kernels.values())
    top = {name[:100]: values for name, values in list(kernels.items())[:TOP_KERNELS]}
    record.add(f"model/{preset}/step, equal: kernels", {"ms": total_ms, "n": 1, "kernels": top})
    model.recompute_layers(True)
    _add_timed(record, f"model/{preset}/step, equal, recomputed layers", call, equal)


def _add_timed(record: Record, case: str, call: Call, batch: Ragged) -> None:
    values = time_together({case: [call]}, record.device, seconds=2.0)[case]
    if "ms" in values:
        values |= {"audio_s": batch.audio_s, "audio_s_per_s": 1e3 * batch.audio_s / values["ms"]}
    record.add(case, values)


def agreement(model: CLSP, batch: Ragged) -> dict[str, Any]:
    """How far bfloat16 embeddings of a few clips are from float32 ones."""
    first = slice(0, COMPARED_CLIPS)
    model.eval()
    with torch.inference_mode():
        expected = model.encode_features(batch.features_BTF[first], batch.lengths_B[first])
        with torch.autocast(batch.features_BTF.device.type, torch.bfloat16):
            result = model.encode_features(batch.features_BTF[first], batch.lengths_B[first])
    return _judged(expected, result, 5e-2)


def parity(device: torch.device, limit: float, convolutions: str | None = "ieee") -> dict[str, Any]:
    """The same weights and clips on both devices. `convolutions`: their precision; None: torch's default."""
    batch = ragged("tiny", 5, shortest=90, longest=300)
    model = batch.model().eval()
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    try:
        setting.fp32_precision = convolutions or before
        with torch.inference_mode():
            expected = model.encode_features(batch.features_BTF, batch.lengths_B)
            result = model.to(device).encode_features(batch.features_BTF.to(device), batch.lengths_B)
    finally:
        setting.fp32_precision = before
    return _judged(expected, result, limit)


def _judged(expected: torch.Tensor, result: torch.Tensor, limit: float) -> dict[str, Any]:
    agrees, how = relative(limit)(expected, result)
    return {"agreement": how} if agrees else {"error": f"disagrees: {how}"}


def measure_convolution(record: Record) -> None:
    """A depthwise convolution over time, as a layer of base computes it: forward and backward."""
    clips, channels, frames = (2, 8, 20) if record.dry_run else (CLIPS, 512, FRAMES // 4)
    for kernel in (15, 31):
        x_NTC, weight = (
            torch.randn(shape, device=record.device, dtype=torch.bfloat16).requires_grad_()
            for shape in ((clips, frames, channels), (channels, 1, 1, kernel))
        )

        # The image has height 1, and its memory layout is that of (N, T, C).
        def forward(x_NTC: torch.Tensor = x_NTC, weight: torch.Tensor = weight) -> torch.Tensor:
            image = x_NTC.transpose(1, 2)[:, :, None]
            return F.conv2d(image, weight, padding=(0, weight.shape[3] // 2), groups=len(weight))

        def both(inputs: tuple[torch.Tensor, ...] = (x_NTC, weight), call: Call = forward) -> Any:
            return torch.autograd.grad(call().sum(), inputs)

        times = time_together({"forward": [forward], "both": [both]}, record.device, seconds=0.5)
        moved = 2 * x_NTC.nbytes
        for name, values in times.items():
            if "ms" in values and name == "forward":
                values |= {"tb_per_s": moved / values["ms"] / 1e9}
            record.add(f"model/depthwise convolution of {kernel} frames/{name}", values)
