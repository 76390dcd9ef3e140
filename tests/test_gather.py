"""The loss of a batch that is spread over processes is that of the whole batch in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.loss import contrastive_loss

# Shards of unequal sizes with unequal numbers of captions; world n is the first n of them.
CLIPS, TEXTS = [3, 5, 1, 2], [6, 7, 1, 2]
SPREAD = [{}, {"label_smoothing": 0.2}, {"kind": "sigmoid", "logit_bias": -2.0}, {"weights": True}]
IMPLEMENTATIONS = ["cpu", "reference"]


def spread_case(data: dict, ranks: range, options: dict, implementation: str, group: object) -> list[Tensor]:
    """Loss and gradients of the batch of these ranks, of which this process has all or one."""
    matrix, scale = (data[name].clone().requires_grad_() for name in ("matrix", "scale"))
    first = [sum(CLIPS[ranks.start : rank]) for rank in ranks]
    owner = torch.cat([data["owner"][rank] + start for rank, start in zip(ranks, first, strict=True)])
    arguments = {**options, "implementation": implementation, "group": group, "text_owner": owner}
    if "weights" in options:
        arguments["weights"] = torch.cat([data["weight"][rank] for rank in ranks])
    audio, text = (torch.cat([data[name][rank] for rank in ranks]) for name in ("audio", "text"))
    loss = contrastive_loss(audio @ matrix, text @ matrix, scale, **arguments)
    loss.backward()
    return [loss.detach(), matrix.grad, scale.grad]


def _rank_main(rank: int, folder: str) -> None:
    """One process: its shard's results, averaged over ranks as DDP would, for every number of ranks, go to a
    file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=len(CLIPS))
    data = torch.load(f"{folder}/batch.pt", weights_only=True)
    found = {}
    for world in range(1, len(CLIPS) + 1):
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        for case, options in enumerate(SPREAD):
            for implementation in IMPLEMENTATIONS:
                results = spread_case(data, range(rank, rank + 1), options, implementation, group)
                for gradient in results[1:]:
                    dist.all_reduce(gradient, group=group)
                    gradient /= world
                found[f"{world} {case} {implementation}"] = results
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiproc
def test_gradients_over_ranks_equal_those_of_one_process(tmp_path: Path) -> None:
    data = {
        "audio": [F.normalize(torch.randn(c, 6, dtype=torch.float64), dim=1) for c in CLIPS],
        "text": [F.normalize(torch.randn(t, 6, dtype=torch.float64), dim=1) for t in TEXTS],
        "owner": [torch.arange(t) % c for c, t in zip(CLIPS, TEXTS, strict=True)],
        "weight": [torch.rand(t, dtype=torch.float64) for t in TEXTS],
        "matrix": torch.randn(6, 6, dtype=torch.float64),
        "scale": torch.tensor(12.0, dtype=torch.float64),
    }
    torch.save(data, tmp_path / "batch.pt")
    mp.spawn(_rank_main, args=(str(tmp_path),), nprocs=len(CLIPS))
    for rank in range(len(CLIPS)):
        for name, results in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            world, case, implementation = name.split()
            whole = spread_case(data, range(int(world)), SPREAD[int(case)], implementation, None)
            for found, expected in zip(results, whole, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12, msg=f"{rank}: {name}")
