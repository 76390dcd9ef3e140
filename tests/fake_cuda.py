"""What training, embedding, retrieval and the loss would do on a card: launches, bytes, synchronisations.

`python tests/fake_cuda.py` prints the figures of all cases as JSON; `python tests/fake_cuda.py "step*"
"topk*"` those of some. `python tests/fake_cuda.py write` writes the counts to tests/golden/cuda_counts.json,
with which test_cuda_counts.py compares them. The installed package is measured: run `pip install .` first.
launch_counter.py says what is counted and how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from launch_counter import CARD, Counter, Figures, card, fake_model  # isort: skip  # it must be imported before torch

import numpy as np
import torch
from torch import Tensor

from clsp_fast import copies, features, search, similarity
from clsp_fast.config import MODEL_PRESETS, TRAIN_PRESETS, OptimConfig
from clsp_fast.data.loader import Batch, _page_locked
from clsp_fast.loss import contrastive_loss
from clsp_fast.model import CLSP
from clsp_fast.storage.embedding_folder import EmbeddingHeader, write_shard
from clsp_fast.storage.ranks import Ranks
from clsp_fast.tokenizer import Tokenizer
from clsp_fast.training import optim
from clsp_fast.training import run as run_module

GOLDEN = Path(__file__).parent / "golden/cuda_counts.json"
Case = Callable[[Counter], None]
CASES: dict[str, Case] = {}
WORDS = ["A calm, low-pitched male voice.", "A lively woman speaks fast.", "She whispers."]


def add(name: str, case: Case) -> None:
    """Adds a case. A case prepares its inputs, calls `counter.begin()`, and does what is counted."""
    CASES[name] = case


def model_of(preset: str, dtype: torch.dtype = torch.float32) -> CLSP:
    """A model on the card."""
    with torch.device("meta"):
        model = CLSP(MODEL_PRESETS[preset])
    return cast(CLSP, fake_model(model, dtype))


def batch_of(step: int, clips: int, frames: int, captions: int) -> Batch:
    """A batch in page-locked memory, as the loader makes it. Lengths differ by a factor of two."""
    tokens, texts = 48, captions * clips
    length_N = torch.linspace(8, tokens, texts).long()
    mask_NL = (torch.arange(tokens) < length_N[:, None]).long()
    batch = Batch(
        step=step,
        ids=[str(i) for i in range(clips)],
        features=torch.zeros(clips, frames, features.NUM_MEL_BINS),
        lengths=torch.linspace(frames // 2, frames, clips).long(),
        token_ids=torch.full((texts, tokens), 7).where(mask_NL > 0, 1),
        attention_mask=mask_NL,
        text_owner=torch.arange(clips).repeat(captions),
        seconds=1.0,
    )
    return _page_locked(batch)


# The functions that `fit` calls for the parts of a step -> the name of the part.
PARTS = {
    "forward": "forward",
    "average_and_clip_gradients": "clip",
    "flag_bad_step": "guard",
    "apply_gradients": "update",
    "read_outcomes": "log",
    "log_progress": "log",
}


@contextlib.contextmanager
def step_in_parts(counter: Counter) -> Iterator[None]:
    """In this context the parts of a training step are counted apart."""

    def counted(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with counter.part(part):
                return function(*arguments)

        return call

    with contextlib.ExitStack() as stack:
        for name, part in PARTS.items():
            function = counted(getattr(run_module, name), part)
            stack.enter_context(mock.patch.object(run_module, name, function))
        backward = counted(torch.autograd.backward, "backward")
        stack.enter_context(mock.patch.object(torch.autograd, "backward", backward))
        yield


def training_step(
    preset: str,
    *,
    clips: int,
    frames: int,
    captions: tuple[int, ...],
    algorithm: str = "adamw",
    log_every: int = 1000,
    **changes: Any,
) -> Case:
    """For each number of captions a step of a run, after a first step that is not counted. ScaledAdam learns
    sizes in it, which it does in every fourth step."""

    def case(counter: Counter) -> None:
        settings = OptimConfig(algorithm=algorithm, average_steps=100)  # type: ignore[arg-type]
        config = dataclasses.replace(TRAIN_PRESETS[preset], optim=settings, log_every=log_every, **changes)
        model = model_of(preset)
        optimizer = optim.build(model, config.optim)
        parts: dict[str, Figures] = {}

        def batches(first: int, stop: int) -> Iterator[Batch]:
            yield batch_of(0, clips, frames, captions[0])
            for step, texts in enumerate(captions, 1):
                for group in optimizer.param_groups:
                    if "history" in group:
                        group["history"][0] = 3
                counter.begin()
                yield batch_of(step, clips, frames, texts)
                parts.update({f"{part}, {texts} captions a clip": x for part, x in counter.parts.items()})

        loader = SimpleNamespace(batches=batches, plan=SimpleNamespace(steps_per_epoch=100))
        log = SimpleNamespace(record=lambda *_, **__: None, say=lambda _: None)
        ranks = Ranks(0, 1, CARD, None)
        arguments: list[Any] = [config, None, model, optimizer, ranks, log, loader]
        with step_in_parts(counter):
            run_module.fit(run_module.Run(*arguments, first_step=0))
        counter.parts = parts

    return case


TINY = {"clips": 16, "frames": 400}
BASE = {"clips": 8, "frames": 800}
add("step tiny", training_step("tiny", **TINY, captions=(1, 2)))
add("step tiny, ScaledAdam", training_step("tiny", **TINY, captions=(2,), algorithm="scaled_adam"))
add("step tiny, in parts", training_step("tiny", **TINY, captions=(2,), micro_seconds=32.0))
add("step tiny, recomputed", training_step("tiny", **TINY, captions=(2,), recompute_layers=True))
add("step base", training_step("base", **BASE, captions=(1, 2)))
add("logged step tiny", training_step("tiny", **TINY, captions=(2,), log_every=2))


def embedding(preset: str, dtype: torch.dtype, task: Callable[[CLSP], object]) -> Case:
    """Embeds with a model in evaluation mode, whose tokenizer has 300 tokens."""

    def case(counter: Counter) -> None:
        model = model_of(preset, dtype).eval()
        model._tokenizer = Tokenizer.train(WORDS * 5, 300)
        task(model)  # computes the tables of positions, which are kept
        counter.begin()
        with counter.part("embed"):
            task(model)

    return case


def waves(*seconds: float) -> list[np.ndarray]:
    return [np.full(int(16_000 * s), 0.1, np.float32) for s in seconds]


MANY = waves(*np.linspace(1.0, 4.0, 24))
LONG = waves(2.0, 35.0, 64.0)
for preset, dtype in (("tiny", torch.float32), ("base", torch.bfloat16)):
    add(f"encode_text {preset}", embedding(preset, dtype, lambda m: m.encode_text(WORDS, batch_size=2)))
    add(
        f"encode_audio {preset}, 1 batch", embedding(preset, dtype, lambda m: m.encode_audio(waves(2.0, 3.0)))
    )
add(
    "encode_audio tiny, many batches",
    embedding("tiny", torch.float32, lambda m: m.encode_audio(MANY, batch_seconds=12)),
)
add(
    "encode_audio tiny, windows",
    embedding("tiny", torch.float32, lambda m: m.encode_audio(LONG, long_audio="window", batch_seconds=60)),
)
add("classify tiny", embedding("tiny", torch.float32, lambda m: m.classify(waves(2.0), ["calm", "fast"])))


def on_card(rows: int, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> Tensor:
    """Embeddings (rows, 512)."""
    return torch.empty(rows, 512, device=CARD, dtype=dtype).requires_grad_(grad)


def retrieval(task: Callable[[], object]) -> Case:
    def case(counter: Counter) -> None:
        counter.begin()
        with counter.part("all"):
            task()

    return case


HOST_ROWS = np.ones((50_000, 512), np.float32)
add("ranks 10k", retrieval(lambda: similarity.ranks(on_card(10_000), on_card(10_000))))
add(
    "ranks 10k, 2 captions on the CPU",
    retrieval(
        lambda: similarity.ranks(on_card(10_000), on_card(20_000), text_owner=torch.arange(20_000) % 10_000)
    ),
)
add(
    "topk 10 of 1M", retrieval(lambda: similarity.topk(on_card(1000), on_card(1_000_000, torch.bfloat16), 10))
)
add("topk 100 of 50k", retrieval(lambda: similarity.topk(on_card(1000), on_card(50_000), 100)))
add("topk 10 of 50k numpy rows", retrieval(lambda: similarity.topk(on_card(100), HOST_ROWS, 10)))


def search_case(counter: Counter) -> None:
    """A search through a folder of three shards."""
    model = model_of("tiny").eval()
    model._tokenizer = Tokenizer.train(WORDS * 5, 300)
    model.fingerprint = lambda precision: "fake"  # type: ignore[method-assign]
    header = EmbeddingHeader(model="fake", frontend=features.identity(), dim=model.config.joint_dim)
    with tempfile.TemporaryDirectory() as name:
        folder, lines = Path(name), [header.to_line()]
        for shard in range(3):
            write_shard(header.shard(folder, shard), np.ones((header.shard_rows, header.dim), np.float32))
            for row in range(header.shard_rows):
                lines.append(
                    json.dumps({"id": f"{shard}-{row}", "audio": "a.wav", "shard": shard, "row": row})
                )
        (folder / "index.jsonl").write_text("\n".join(lines) + "\n")
        config = search.SearchConfig(folder=folder, text=tuple(WORDS), device="cuda")
        search.search(config, model=model)
        counter.begin()
        with counter.part("all"):
            search.search(config, model=model)


add("search 3 shards", search_case)


def loss_case(rows: int, *, captions: int = 1, kind: str = "softmax") -> Case:
    def case(counter: Counter) -> None:
        audio, text = (on_card(n, torch.bfloat16, grad=True) for n in (rows, captions * rows))
        scale, bias = (torch.empty((), device=CARD).requires_grad_() for _ in range(2))
        owner = torch.empty(captions * rows, dtype=torch.int64, device=CARD) if captions > 1 else None
        counter.begin()
        with counter.part("forward"):
            loss = contrastive_loss(
                audio,
                text,
                scale,
                text_owner=owner,
                kind=kind,  # type: ignore[arg-type]
                logit_bias=bias if kind == "sigmoid" else None,
            )
        with counter.part("backward"):
            loss.backward()

    return case


for thousands in (8, 32, 65):
    size = 65_536 if thousands == 65 else 1024 * thousands
    add(f"loss softmax {thousands}k", loss_case(size))
    add(f"loss softmax {thousands}k, 2 captions", loss_case(size, captions=2))
    add(f"loss sigmoid {thousands}k", loss_case(size, kind="sigmoid"))


# Mistakes that the counter must find. test_cuda_counts.py expects the line of each.


def mistakes(counter: Counter) -> None:
    """One mistake of each kind."""
    x, host = on_card(4), torch.ones(4, 512)
    rows, locked = torch.tensor([1, 2]), host.pin_memory()
    narrow = locked[:, :8]
    counter.begin()
    with counter.part("item"):
        x.sum().item()
    with counter.part("read"):
        x.cpu()
    with counter.part("nonzero"):
        x.nonzero()
    with counter.part("pageable copy"):
        host.to(CARD, non_blocking=True)
    with counter.part("blocking copy"):
        host.pin_memory().to(CARD)
    with counter.part("index"):
        x[rows]
    with counter.part("gaps"):
        narrow.to(CARD, non_blocking=True)
    with counter.part("dtype"):
        locked.to(CARD, torch.bfloat16, non_blocking=True)
    with counter.part("stream"):
        torch.cuda.current_stream().synchronize()
    with counter.part("device"):
        torch.cuda.synchronize()
    with counter.part("event"):
        torch.cuda.Event().synchronize()
    with counter.part("mismatch"):
        x + host
    with counter.part("library"):
        copies.to_device(narrow, CARD)
    with counter.part("faultless"):
        (x + host.pin_memory().to(CARD, non_blocking=True)).to("cpu", non_blocking=True)


def measure(case: Case) -> dict[str, Any]:
    """Part -> its figures."""
    torch.manual_seed(0)
    counter = Counter()
    with card(counter):
        case(counter)
    return {part: figures.to_dict() for part, figures in counter.parts.items() if figures != Figures()}


def write(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Writes the counts of all cases, as test_cuda_counts.py reads them."""
    counts = {
        name: {part: counts_of(figures) for part, figures in parts.items()}
        for name, parts in results.items()
        if name in CASES
    }
    versions = {"torch": torch.__version__.partition("+")[0]}
    GOLDEN.write_text(json.dumps(versions | {"cases": counts}, indent=1) + "\n")


def counts_of(figures: dict[str, Any]) -> dict[str, int]:
    """The numbers in the figures of a part; lines are counted."""
    return {name: sum(x.values()) if isinstance(x, dict) else x for name, x in figures.items()}


def main(arguments: list[str]) -> None:
    results = {}
    for name, case in (CASES | {"mistakes": mistakes}).items():
        if arguments in ([], ["write"]) or any(fnmatch(name, pattern) for pattern in arguments):
            started = time.perf_counter()
            results[name] = measure(case)
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if arguments == ["write"]:
        write(results)
    else:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
