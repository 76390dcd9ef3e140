"""A batch that is spread over processes has the loss and the gradients of the whole batch in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from numerics import assert_agrees, norm
from torch import Tensor

from clsp_fast.loss import contrastive_loss

# Shards of different sizes with different numbers of captions; a world of n ranks has the first n.
CLIPS, TEXTS = [3, 5, 1, 2], [6, 7, 1, 2]
OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"kind": "sigmoid", "logit_bias": -2.0},
    {"weights": True},
    {"one_caption": True},
    {"normalize": True},
    {"kind": "sigmoid", "label_smoothing": 0.2},
    {"weights": True, "label_smoothing": 0.2},
]


def loss_and_gradients(
    data: dict, ranks: range, options: dict, implementation: str, group: object
) -> list[Tensor]:
    """Loss and gradients of the batch of `ranks`. Without `group`, this process holds the whole batch."""
    options, dtype = dict(options), torch.float32 if implementation == "triton" else torch.float64
    matrix, scale = (data[name].to(dtype, copy=True).requires_grad_() for name in ("matrix", "scale"))
    texts, one_caption = data["text"], options.pop("one_caption", False)
    if one_caption:
        texts = [text[: len(audio)] for audio, text in zip(data["audio"], texts, strict=True)]
    first = [sum(CLIPS[ranks.start : rank]) for rank in ranks]
    owner = torch.cat([data["owner"][rank] + start for rank, start in zip(ranks, first, strict=True)])
    arguments = {**options, "implementation": implementation, "group": group}
    arguments["text_owner"] = None if one_caption else owner
    if "weights" in options:
        arguments["weights"] = torch.cat([data["weight"][rank] for rank in ranks])
    audio, text = (torch.cat([rows[rank] for rank in ranks]).to(dtype) for rows in (data["audio"], texts))
    loss = contrastive_loss(audio @ matrix, text @ matrix, scale, **arguments)
    loss.backward()
    return [loss.detach(), matrix.grad, scale.grad]


def exchanges(rank: int, kind: str) -> list[tuple[str, str, int]]:
    """(collective, dtype, count of numbers that this rank sends) for each exchange of a step in bfloat16."""
    sent_by_rank, real = [], {name: getattr(dist, name) for name in ("all_gather", "reduce_scatter")}

    def spy(name: str) -> Callable[..., None]:
        def call(out: object, given: object, **options: object) -> None:
            sent = given if isinstance(given, Tensor) else torch.cat(given)
            sent_by_rank.append((name, str(sent.dtype), sent.numel()))
            real[name](out, given, **options)

        return call

    audio, text = (torch.randn(n, 6).bfloat16().requires_grad_() for n in (CLIPS[rank], TEXTS[rank]))
    owner = torch.arange(TEXTS[rank]) % CLIPS[rank]
    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(dist, name, spy(name))
        contrastive_loss(audio, text, 10.0, text_owner=owner, kind=kind, group=dist.group.WORLD).backward()
    return sent_by_rank


def _rank_main(rank: int, folder: str) -> None:
    """The main function of a process. For every number of ranks, it saves the results of its shard to a file,
    with gradients averaged over the ranks as DDP averages them."""
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=len(CLIPS))
    data = torch.load(f"{folder}/batch.pt", weights_only=True)
    recorded = {"exchanges": {kind: exchanges(rank, kind) for kind in ("softmax", "sigmoid")}}
    for world in range(1, len(CLIPS) + 1):
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        for case, options in enumerate(OPTIONS):
            for implementation in ["cpu", "reference", *["triton"] * (world == 3)]:
                results = loss_and_gradients(data, range(rank, rank + 1), options, implementation, group)
                for gradient in results[1:]:
                    dist.all_reduce(gradient, group=group)
                    gradient /= world
                recorded[f"{world} {case} {implementation}"] = results
    torch.save(recorded, f"{folder}/{rank}.pt")
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
        recorded = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        check_exchanges(recorded.pop("exchanges"))
        for name, results in recorded.items():
            world, case, implementation = name.split()
            whole = loss_and_gradients(data, range(int(world)), OPTIONS[int(case)], "reference", None)
            # Sums of tens of terms whose exponents are logits of up to 12. Kernels add them in float32.
            dtype = torch.float32 if implementation == "triton" else torch.float64
            gradient = norm([norm(x) for x in whole[1:]])
            for value, expected, size in zip(results, whole, (whole[0], gradient, gradient), strict=True):
                assert_agrees(value, expected, count=100, dtype=dtype, size=size, name=f"{rank}: {name}")


def check_exchanges(steps_of_kind: dict[str, list[tuple[str, str, int]]]) -> None:
    """The exchanges are those that the docstring of gather.py lists, padded to the longest shard."""
    texts, all_texts, world, dim = max(TEXTS), sum(TEXTS), len(CLIPS), 6
    for kind, steps in steps_of_kind.items():
        columns = all_texts if kind == "softmax" else 0
        large = [step for step in steps if step[2] > world]  # the rest are scalars
        expected = [
            ("all_gather", "torch.int64", texts),
            ("all_gather", "torch.bfloat16", texts * dim),
            ("reduce_scatter", "torch.float32", world * texts * dim),
        ]
        if columns:
            expected += [
                ("all_gather", "torch.float32", columns),
                ("reduce_scatter", "torch.float32", world * columns),
            ]
        assert sorted(large) == sorted(expected), kind


def test_one_clip_alone_in_a_group_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        for texts in (1, 2):
            audio, text = torch.ones(1, 4, requires_grad=True), torch.ones(texts, 4, requires_grad=True)
            owner = torch.zeros(texts, dtype=torch.int64)
            loss = contrastive_loss(audio, text, 10.0, text_owner=owner, group=dist.group.WORLD)
            loss.backward()
            alone = contrastive_loss(audio.detach(), text.detach(), 10.0, text_owner=owner)
            assert_agrees(loss, alone, count=8, dtype=torch.float32)
            assert audio.grad.isfinite().all()
            assert text.grad.isfinite().all()
    finally:
        dist.destroy_process_group()
