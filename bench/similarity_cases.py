"""Retrieval ranks in both directions, and nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_cases import DIM, Batch, batch
from bench.measure import Call, Case, Provider
from clsp_fast import similarity

QUERIES = 1000
K = 10


# Ranks. With one caption a clip, text i describes clip i.


def pairs(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
    given = batch(count, 1, dtype, device)
    # With so much noise, not all ranks are 0.
    noise_ND = F.normalize(
        torch.randn(given.text_ND.shape, generator=torch.Generator().manual_seed(1)), dim=1
    )
    text_ND = F.normalize(given.text_ND.detach().cpu() + 6 * noise_ND, dim=1).to(device, dtype)
    return Batch(given.audio_MD.detach(), text_ND, given.scale, 1)


def counted(given: Batch) -> tuple[Tensor, Tensor]:
    """Ranks in float64: how many items have a higher score than the query's item."""
    audio_MD, text_ND = given.audio_MD.double(), given.text_ND.double()
    target = (audio_MD * text_ND).sum(1)
    index = torch.arange(len(target), device=target.device)

    def ranks(queries: Tensor, items: Tensor) -> Tensor:
        blocks = [(queries[i] @ items.T > target[i, None]) & (i[:, None] != index) for i in index.split(1024)]
        return torch.cat([block.sum(1) for block in blocks])

    return ranks(audio_MD, text_ND), ranks(text_ND, audio_MD)


def same_ranks(expected: Any, result: Any) -> tuple[bool, str]:
    """Equal, except that 2 % of the ranks may differ by up to 2: float32 cannot tell some scores apart."""
    moved = [(a.to(b.device) - b).abs() for a, b in zip(expected, result, strict=True)]
    worst = int(max(m.max() for m in moved))
    share = float(torch.stack([(m > 0).float().mean() for m in moved]).max())
    return worst <= 2 and share <= 0.02, f"{share:.2%} of ranks differ, by {worst} at most"


def clsp_ranks(given: Batch) -> Call:
    return lambda: tuple(similarity.ranks(given.audio_MD, given.text_ND))


def one_product(given: Batch) -> Call:
    return lambda: given.audio_MD @ given.text_ND.T


def argsort_twice(given: Batch) -> Call:
    def call() -> tuple[Tensor, ...]:
        scores_MN = given.audio_MD @ given.text_ND.T
        target_M1 = torch.arange(len(scores_MN), device=scores_MN.device)[:, None]
        orders = (scores.argsort(dim=1, descending=True) for scores in (scores_MN, scores_MN.T))
        return tuple((order == target_M1).int().argmax(1) for order in orders)

    return call


def chunked_count(given: Batch, rows: int = 4096) -> Call:
    """Counts the scores of a row that exceed the score on the diagonal, in blocks of rows."""

    def ranks(queries: Tensor, items: Tensor) -> Tensor:
        blocks = []
        for start in range(0, len(queries), rows):
            scores = queries[start : start + rows] @ items.T
            target = scores.diagonal(start).clone()
            blocks.append((scores > target[:, None]).sum(1))
        return torch.cat(blocks)

    return lambda: (ranks(given.audio_MD, given.text_ND), ranks(given.text_ND, given.audio_MD))


def no_ranks(expected: Any, result: Any) -> tuple[bool, str]:
    return result.shape == (len(expected[0]), len(expected[1])), "scores only, no ranks"


def rounded_ranks(expected: Any, result: Any) -> tuple[bool, str]:
    """For scores that a product has rounded to bfloat16: many are equal, so ranks are not compared."""
    return [len(x) for x in result] == [len(x) for x in expected], "rounded scores, ranks not compared"


def ranks_case(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any) -> Case:
    half = dtype == torch.bfloat16
    return Case(
        name=f"ranks-{'cuda-' * (device == 'cuda')}{count}{'-bf16' * half}",
        area="similarity",
        what=f"ranks of {count} clips among {count} texts and back, D = {DIM}{', bfloat16' * half}",
        inputs=partial(pairs, count, device, dtype),
        expected=counted,
        gate=same_ranks,
        providers=(
            Provider("clsp_fast", clsp_ranks),
            Provider("one product", one_product, gate=no_ranks, note="the product alone"),
            Provider("argsort twice", argsort_twice, note="the recipe's form"),
            Provider(
                "chunked count", chunked_count, gate=rounded_ranks if half else None, note="open_clip's form"
            ),
        ),
        goals={"one product": 1 / 1.1, "argsort twice": 8.0, "chunked count": 2.0},
        amount=2 * count,
        unit="queries",
        flops=2.0 * count * count * DIM,
        bytes=4 * (2 * DIM + 4) * count,
        threads=2,
        device=device,
        memory=True,
        **settings,
    )


# Top-k.


@dataclass(frozen=True)
class Search:
    queries_QD: Tensor
    database_ND: Tensor


def search(rows: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Search:
    generator = torch.Generator(device).manual_seed(0)
    database_ND = F.normalize(torch.randn(rows, DIM, generator=generator, device=device), dim=1)
    queries_QD = F.normalize(torch.randn(QUERIES, DIM, generator=generator, device=device), dim=1)
    return Search(queries_QD.to(dtype), database_ND.to(dtype))


def exact_topk(given: Search) -> tuple[Tensor, Tensor]:
    """Neighbours in float64, in blocks of queries."""
    database_DN = given.database_ND.double().T
    blocks = [(block.double() @ database_DN).topk(K) for block in given.queries_QD.split(100)]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


def same_neighbours(expected: Any, result: Any) -> tuple[bool, str]:
    """Scores agree to float32 accuracy. Rows agree, except 0.5 %: their scores may be that close."""
    scores, rows = (torch.as_tensor(x).cpu() for x in result)
    error = float((scores.double() - expected[0].cpu()).abs().max())
    share = float((rows != expected[1].cpu()).float().mean())
    return error <= 1e-5 and share <= 0.005, f"scores to {error:.1e}, {share:.2%} of rows differ"


def near_neighbours(expected: Any, result: Any) -> tuple[bool, str]:
    """For scores that a product has rounded to bfloat16: they agree to 2^-8, and rows are not compared."""
    error = float((result[0].double().cpu() - expected[0].cpu()).abs().max())
    return error <= 2**-8, f"scores to {error:.1e}; rounded scores, rows not compared"


def clsp_topk(given: Search) -> Call:
    return lambda: similarity.topk(given.queries_QD, given.database_ND, K)


def torch_topk(given: Search, rows: int = 16384) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        chunks = []
        for start in range(0, len(given.database_ND), rows):
            best = (given.queries_QD @ given.database_ND[start : start + rows].T).topk(K)
            chunks.append((best.values, best.indices + start))
        scores, order = torch.cat([values for values, _ in chunks], 1).topk(K)
        return scores, torch.cat([indices for _, indices in chunks], 1).gather(1, order)

    return call


def faiss_flat(given: Search, threads: int = 2) -> Call:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(DIM)
    index.add(given.database_ND.cpu().numpy())
    queries = given.queries_QD.cpu().numpy()
    return lambda: index.search(queries, K)


def sentence_transformers(given: Search) -> Call:
    from sentence_transformers.util import dot_score, semantic_search

    def call() -> tuple[np.ndarray, np.ndarray]:
        answers = semantic_search(given.queries_QD, given.database_ND, top_k=K, score_function=dot_score)
        scores = np.array([[hit["score"] for hit in hits] for hits in answers])
        return scores, np.array([[hit["corpus_id"] for hit in hits] for hits in answers])

    return call


def topk_case(rows: int, device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any) -> Case:
    half = dtype == torch.bfloat16
    return Case(
        name=f"topk-{'cuda-' * (device == 'cuda')}{rows}{'-bf16' * half}",
        area="similarity",
        what=f"{K} best of {rows} rows for {QUERIES} queries, D = {DIM}{', bfloat16' * half}",
        inputs=partial(search, rows, device, dtype),
        expected=exact_topk,
        gate=same_neighbours,
        providers=(
            Provider("clsp_fast", clsp_topk),
            Provider("torch.topk in chunks", torch_topk, gate=near_neighbours if half else None),
            Provider("faiss IndexFlatIP", faiss_flat, "faiss-cpu", note="index made before, on the CPU"),
            Provider("sentence-transformers", sentence_transformers, "sentence-transformers"),
        ),
        goals={"faiss IndexFlatIP": 1.0},
        amount=QUERIES,
        unit="queries",
        flops=2.0 * QUERIES * rows * DIM,
        bytes=4 * DIM * (rows + QUERIES) + 12 * K * QUERIES,
        threads=2,
        device=device,
        memory=True,
        **settings,
    )


CASES = (
    ranks_case(4096),
    ranks_case(8192, optional=True),
    topk_case(50_000),
    topk_case(200_000, optional=True),
    ranks_case(65536, "cuda"),
    topk_case(1_000_000, "cuda"),
)
