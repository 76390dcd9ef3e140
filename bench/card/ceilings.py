"""What the card reaches: memory bandwidth, a matrix product, and the noise of the measurement."""

from __future__ import annotations

import torch

from bench.card.record import Record
from bench.card.timing import time_together
from bench.measure import Call, one_line


def run(record: Record) -> None:
    """Copies a buffer, multiplies random bf16 matrices twice, and tries a mixed-precision product."""
    device = record.device
    size, copied_bytes = (128, 2**20) if record.dry_run else (8192, 2**31)
    pairs = [
        [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2)
    ]
    products: list[Call] = [lambda x=x, y=y: x @ y for x, y in pairs]  # type: ignore[misc]
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = time_together(
        {
            "product": products,
            "product, second time": products,
            "copy": [lambda: target.copy_(source)],
        },
        device,
        seconds=2.0,
    )
    flops, moved = 2 * size**3, 2 * copied_bytes
    for name in ("product", "product, second time"):
        record.add(f"ceilings/{name}", times[name] | {"tflops": flops / times[name]["ms"] / 1e9})
    record.add("ceilings/copy", times["copy"] | {"tb_per_s": moved / times["copy"]["ms"] / 1e9})
    if not record.dry_run:  # products of this size take microseconds there
        noise = abs(times["product"]["ms"] / times["product, second time"]["ms"] - 1)
        record.add("ceilings/noise", {"relative_difference": noise})
    record.add("ceilings/addmm with a float32 result", mixed_product(*pairs[0]))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        names = ("multi_processor_count", "total_memory", "L2_cache_size")
        record.add("ceilings/card", {name: getattr(properties, name) for name in names})


def mixed_product(x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
    """Whether this torch multiplies 16-bit matrices and adds to a float32 one without rounding between."""
    total = torch.zeros(x.shape[0], y.shape[1], device=x.device)
    try:
        torch.addmm(total, x, y, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:  # an older torch does not know `out_dtype`
        return {"supported": False, "reason": one_line(str(error))}
    return {"supported": True}
