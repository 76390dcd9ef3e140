"""The loss, forward and backward, in total and by part, beside dense and fused peers."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from bench import loss_cases
from bench.card.record import Record
from bench.card.timing import LIBRARY_PRODUCT, kernel_times, time_case, time_together
from bench.loss_cases import Batch, sigmoid_batch
from bench.machine import ROOT
from bench.measure import Call, Case, Provider, relative
from clsp_fast.kernels import _pairs
from clsp_fast.loss import contrastive_loss

SIZES = (8192, 32768, 65536)
DRY_SIZES = (40,)
LARGEST_DENSE = 32768
ROUNDED = relative(5e-2)
"""Gate of peers that use TF32, or round to bfloat16 before a subtraction."""
Kind = Literal["softmax", "sigmoid"]
# In a dry run the tensors are on the CPU, where "auto" would take the CPU engine.
fused = partial(loss_cases.fused, implementation="triton")


def run(record: Record) -> None:
    """Measures every size: total and parts, then the variants, and last the peers that compile kernels."""
    sizes = DRY_SIZES if record.dry_run else SIZES
    device = record.device.type
    for size in sizes:
        record.add_all(f"loss/{size}", time_case(softmax_case(size, device), seconds=3.0))
        measure_parts(record, size)
        record.add_all(f"loss/{size}/sigmoid", time_case(sigmoid_case(size, device), seconds=1.0))
    for size in sizes[:2]:
        record.add_all(f"loss/{size}/variants", time_case(variants_case(size, device), seconds=1.0))
    for size in sizes:
        for case in fused_peers(size, device):
            record.add_all(f"loss/{size}/beside peers/{case.area}", time_case(case, seconds=1.0))


def softmax_case(size: int, device: str) -> Case:
    """One caption a clip, in bfloat16. The subject is timed twice: the difference is the noise."""
    case = loss_cases.loss_case(size, dtype=torch.bfloat16, device=device)
    # In bfloat16 the dense form rounds its logits, so its gradients have an error of 1 %.
    dense = tuple(
        replace(peer, gate=ROUNDED) if peer.name.startswith("dense") else peer
        for peer in case.providers
        if peer.name.startswith("dense") or peer.name == loss_cases.RECIPE
    )
    providers = (
        Provider("clsp_fast", fused),
        Provider("clsp_fast, second time", fused),
        *(dense if size <= LARGEST_DENSE else ()),
        Provider("chunked cross-entropy", loss_cases.chunked_cross_entropy, gate=ROUNDED),
    )
    return replace(case, providers=providers)


def sigmoid_case(size: int, device: str) -> Case:
    """The sigmoid kind, beside the dense form in float32 where that fits."""
    case = loss_cases.sigmoid_case(size, dtype=torch.bfloat16, device=device)
    dense = case.providers[1:2] if size <= LARGEST_DENSE else ()
    return replace(case, providers=(Provider("clsp_fast", _fused_sigmoid), *dense))


def fused_peers(size: int, device: str) -> tuple[Case, Case]:
    """Both kinds beside libraries with Triton kernels, which may take long to compile them."""
    softmax = loss_cases.loss_case(size, dtype=torch.bfloat16, device=device)
    sigmoid = loss_cases.sigmoid_case(size, dtype=torch.bfloat16, device=device)
    return (
        replace(
            softmax,
            area="softmax",
            providers=(
                Provider("clsp_fast", fused),
                Provider("memeff", loss_cases.memeff, gate=loss_cases.without_scale(ROUNDED)),
                Provider("Inf-CL", loss_cases.inf_cl, gate=ROUNDED),
            ),
        ),
        replace(
            sigmoid,
            area="sigmoid",
            providers=(
                Provider("clsp_fast", _fused_sigmoid),
                Provider("siglip-kernel", loss_cases.siglip_kernel, gate=ROUNDED),
            ),
        ),
    )


def _fused_sigmoid(given: Batch) -> Call:
    return fused(given, kind="sigmoid", logit_bias=given.bias)


def variants_case(size: int, device: str) -> Case:
    """Two captions a clip with `size` captions, and smaller workspaces."""
    case = loss_cases.loss_case(size // 2, captions=2, dtype=torch.bfloat16, device=device)
    workspaces = (16, 128, 2048)
    return replace(
        case,
        providers=(
            Provider("clsp_fast, two captions", fused),
            *(
                Provider(f"clsp_fast, {mib} MiB", partial(fused, workspace_bytes=mib << 20))
                for mib in workspaces
            ),
        ),
    )


def measure_parts(record: Record, size: int) -> None:
    """Forward and backward pass by device events, and each part of them by the time of its kernels."""
    device = record.device
    given = [sigmoid_batch(size, torch.bfloat16, device.type) for _ in range(2)]
    for kind, prefix in (
        ("softmax", f"loss/{size}/clsp_fast"),
        ("sigmoid", f"loss/{size}/sigmoid/clsp_fast"),
    ):
        losses = [loss_of(x, kind) for x in given]
        calls: dict[str, list[Call]] = {
            "forward": [_forward(x, kind) for x in given],
            "backward": [_backward(x, loss) for x, loss in zip(given, losses, strict=True)],
        }
        record.add_all(prefix, time_together(calls, device, seconds=1.0))

        def both(kind: Kind = kind) -> Any:
            return _backward(given[0], loss_of(given[0], kind))()

        rounds = 1 if record.dry_run else 5
        parts = kernel_times(both, device, rounds=rounds, part_of=part_finder())
        if record.dry_run:  # the profiler sees no kernels there
            parts = {"cpu operators": _summed(parts)}
        record.add_all(f"{prefix}/part", parts)
    measure_products(record, given[0])


def measure_products(record: Record, given: Batch) -> None:
    """The two library products that follow a panel of gradients, alone, as the loss calls them."""
    audio_MD, text_ND = given.audio_MD.detach(), given.text_ND.detach()
    size, rows = len(text_ND), min(len(audio_MD), 4096)
    panel = torch.randn(rows, size, device=record.device, dtype=torch.bfloat16)
    total_ND = torch.zeros(text_ND.shape, device=record.device)
    calls: dict[str, list[Call]] = {
        "panel @ text": [lambda: _pairs.add_product(None, panel, text_ND)],
        "panel.T @ audio": [lambda: _pairs.add_product(total_ND, panel.T, audio_MD[:rows])],
    }
    flops = 2 * rows * size * loss_cases.DIM
    for name, values in time_together(calls, record.device, seconds=0.5).items():
        rate = {"tflops": flops / values["ms"] / 1e9} if "ms" in values else {}
        record.add(f"loss/{size}/{rows} rows: {name}", values | rate)


def part_finder() -> Callable[[str], str]:
    """Name of a kernel -> part: the key in KERNELS of a kernel of clsp_fast, "products" or "other"."""
    names = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if re.search(r"^KERNELS\b", path.read_text(), re.MULTILINE):
            kernels = importlib.import_module(f"clsp_fast.kernels.{path.stem}").KERNELS
            names |= {kernel.__name__: part for part, kernel in kernels.items()}

    def part_of(name: str) -> str:
        if name in names:
            return names[name]
        return "products" if LIBRARY_PRODUCT.search(name) else "other"

    return part_of


def _summed(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "ms": sum(part["ms"] for part in parts.values()),
        "launches": sum(part["launches"] for part in parts.values()),
    }


def loss_of(given: Batch, kind: Kind = "softmax") -> torch.Tensor:
    """The fused loss of a batch."""
    bias = given.bias if kind == "sigmoid" else None
    return contrastive_loss(
        given.audio_MD, given.text_ND, given.scale, logit_bias=bias, kind=kind, implementation="triton"
    )


def _forward(given: Batch, kind: Kind) -> Call:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return loss_of(given, kind)

    return call


def _backward(given: Batch, loss: torch.Tensor) -> Call:
    inputs = (given.audio_MD, given.text_ND, given.scale)
    return lambda: torch.autograd.grad(loss, inputs, retain_graph=True)
