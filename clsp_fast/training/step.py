"""What a training step does with a batch: embeddings, loss and gradients, over the ranks, in little memory.

`micro_seconds` is the gradient cache (arXiv 2101.06983): a batch goes through the towers in parts, whose
activations are dropped and made again when their gradients are due. The loss sees the embeddings of all of
them, so that its contrast is that of the whole batch, in the memory of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clsp_fast.config import OptimConfig, TrainConfig
from clsp_fast.data import Batch
from clsp_fast.loss import contrastive_loss
from clsp_fast.model import CLSP, ClspOutput
from clsp_fast.storage.ranks import Ranks
from clsp_fast.towers.layers import RunningNorm

_FRAMES_PER_S = 100


def forward(model: CLSP, batch: Batch, ranks: Ranks, config: TrainConfig) -> tuple[ClspOutput, Tensor]:
    """Embeddings and loss of a batch; the loss is that of the batches of all ranks together."""
    model.train()
    model.recompute_layers(config.recompute_layers)
    for norm in model.running_norms:
        norm.batch_moments = None
    bf16 = config.precision == "bf16"
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
        output = embed(model, batch, config.micro_seconds)
    loss = contrastive_loss(
        output.audio.float(),
        output.text.float(),
        output.logit_scale,
        # With one caption a clip, captions are in the order of their clips.
        text_owner=None
        if len(batch.text_owner) == len(batch.ids)
        else batch.text_owner.to(ranks.device, non_blocking=True),
        group=ranks.group,
        compute_dtype=torch.bfloat16 if bf16 else None,
    )
    return output, loss


def embed(model: CLSP, batch: Batch, micro_seconds: float) -> ClspOutput:
    """Both embeddings of a batch, at most `micro_seconds` of audio with padding at a time; 0: all at once."""
    clips, frames = len(batch.lengths), int(batch.lengths.max())
    most = max(1, int(_FRAMES_PER_S * micro_seconds / frames)) if micro_seconds else clips
    if most >= clips:
        return _embed(model, batch.features, batch.lengths, batch.token_ids, batch.attention_mask)
    texts, parts = [], []
    for first in range(0, clips, most):
        part = slice(first, first + most)
        (own,) = ((batch.text_owner >= first) & (batch.text_owner < part.stop)).nonzero(as_tuple=True)
        rows = batch.features[part], batch.lengths[part], batch.token_ids[own], batch.attention_mask[own]
        seed = int(torch.randint(2**62, ()))
        texts.append(own)
        if part.stop < clips:
            contexts = partial(_contexts, model)
            again = checkpoint(
                _embed_seeded,
                seed,
                model,
                *rows,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
            )
            parts.append(again)
        else:  # backward comes to the last part first, while its activations are still there
            parts.append(_embed_seeded(seed, model, *rows))
    audio, text = (torch.cat(x) for x in list(zip(*parts, strict=True))[:2])
    return ClspOutput(audio, text[torch.cat(texts).argsort().to(text.device)], model.logit_scale)


def _embed_seeded(seed: int, model: CLSP, *rows: Tensor) -> ClspOutput:
    """A part, with the same dropout whenever it is computed: its tensors, and so the generators that
    `checkpoint` would restore, are not yet where the model is."""
    torch.manual_seed(seed)
    return _embed(model, *rows)


def _embed(
    model: CLSP, features: Tensor, lengths: Tensor, token_ids: Tensor, attention_mask: Tensor
) -> ClspOutput:
    # From page-locked memory they arrive while the host goes on; tokens stay, because it looks at them.
    features = features.to(model.device, non_blocking=True)
    return model(features, lengths, token_ids, attention_mask)  # type: ignore[no-any-return]


def _contexts(model: CLSP) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward pass and for its recomputation: only the first records the batch's moments."""
    return nullcontext(), _without_recording(model.running_norms)


@contextmanager
def _without_recording(norms: list[RunningNorm]) -> Iterator[None]:
    for norm in norms:
        norm.record_moments = False
    try:
        yield
    finally:
        for norm in norms:
            norm.record_moments = True


def clip_gradients(model: CLSP, ranks: Ranks, config: OptimConfig) -> float:
    """Averages the gradients over the ranks, scales them down to the largest norm, unless the optimiser does
    that, and returns the norm they had."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    ranks.average(gradients)
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if config.algorithm == "adamw":
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm, foreach=True)
    return float(norm)


def absorb_statistics(model: CLSP, ranks: Ranks) -> None:
    """Takes up the batch's moments, averaged over the ranks, so that all ranks keep the same ones."""
    norms = model.running_norms
    ranks.average([norm.batch_moments for norm in norms if norm.batch_moments is not None])
    for norm in norms:
        norm.update_running()
