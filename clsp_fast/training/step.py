"""The parts of a training step: embeddings, loss, and gradients averaged over the ranks.

With `micro_seconds`, the towers embed a batch in parts, as in gradient caching (arXiv 2101.06983). The
activations of a part are dropped after the forward pass and recomputed in the backward pass, so they take the
memory of one part. The loss is computed from the embeddings of all parts, so each clip is contrasted with the
whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clsp_fast import copies
from clsp_fast.config import OptimConfig, TrainConfig
from clsp_fast.data import Batch
from clsp_fast.loss import contrastive_loss
from clsp_fast.model import CLSP, ClspOutput
from clsp_fast.storage.ranks import Ranks
from clsp_fast.towers.layers import RunningNorm

_FRAMES_PER_S = 100


def forward(model: CLSP, batch: Batch, ranks: Ranks, config: TrainConfig) -> tuple[ClspOutput, Tensor]:
    """Embeddings of a batch, and the contrastive loss over the batches of all ranks together."""
    model.train()
    model.recompute_layers(config.recompute_layers)
    for norm in model.running_norms:
        norm.batch_moments = None
    bf16 = config.precision == "bf16"
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
        output = embed_batch(model, batch, config.micro_seconds)
    loss = contrastive_loss(
        output.audio.float(),
        output.text.float(),
        output.logit_scale,
        # With one caption per clip, caption i describes clip i, which is the loss's default.
        text_owner=None
        if len(batch.text_owner) == len(batch.ids)
        else copies.to_device(batch.text_owner, ranks.device),
        group=ranks.group,
        compute_dtype=torch.bfloat16 if bf16 else None,
    )
    return output, loss


def embed_batch(model: CLSP, batch: Batch, micro_seconds: float) -> ClspOutput:
    """Embeds clips and captions, at most `micro_seconds` of padded audio at a time (0: the whole batch)."""
    clips, frames = len(batch.lengths), int(batch.lengths.max())
    part_clips = max(1, int(_FRAMES_PER_S * micro_seconds / frames)) if micro_seconds else clips
    if part_clips >= clips:
        return _embed(model, batch.features, batch.lengths, batch.token_ids, batch.attention_mask)
    caption_rows, outputs = [], []
    for first in range(0, clips, part_clips):
        part = slice(first, first + part_clips)
        (captions,) = ((batch.text_owner >= first) & (batch.text_owner < part.stop)).nonzero(as_tuple=True)
        inputs = (
            batch.features[part],
            batch.lengths[part],
            batch.token_ids[captions],
            batch.attention_mask[captions],
        )
        seed = int(torch.randint(2**62, ()))
        caption_rows.append(captions)
        if part.stop < clips:
            output = checkpoint(
                _embed_seeded,
                seed,
                model,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(_contexts, model),
            )
        else:  # backward begins with the last part: its activations are kept instead of recomputed
            output = _embed_seeded(seed, model, *inputs)
        outputs.append(output)
    audio, text = (torch.cat(embeddings) for embeddings in list(zip(*outputs, strict=True))[:2])
    order = copies.to_device(torch.cat(caption_rows).argsort(), text.device)
    return ClspOutput(audio, text[order], model.logit_scale)


def _embed_seeded(seed: int, model: CLSP, *inputs: Tensor) -> ClspOutput:
    """Embeds a part after setting the seed, so that the recomputation draws the same dropout.

    `checkpoint` cannot ensure this: it restores the random state of the inputs' devices, but the inputs are
    still on the host.
    """
    torch.manual_seed(seed)
    return _embed(model, *inputs)


def _embed(
    model: CLSP, features: Tensor, lengths: Tensor, token_ids: Tensor, attention_mask: Tensor
) -> ClspOutput:
    # The model takes tokens to the device itself, after sorting them by length on the host.
    features = copies.to_device(features, model.device)
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


def average_and_clip_gradients(model: CLSP, ranks: Ranks, config: OptimConfig) -> Tensor:
    """Averages the gradients over the ranks. With AdamW, clips them to `config.clip_norm`; ScaledAdam clips
    in its own step.

    Returns:
        The norm of the averaged gradients before clipping, a scalar on their device.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    ranks.average(gradients)
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if config.algorithm == "adamw":
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm, foreach=True)
    return norm


def flag_bad_step(loss: Tensor, norm: Tensor, ranks: Ranks) -> Tensor:
    """1.0 if the loss or the gradient norm is not finite on any rank, else 0.0: a float32 scalar.

    The flag stays on the device, so the host does not wait for the step.
    """
    finite = torch.stack([loss.detach(), norm]).isfinite().all()
    return ranks.largest(finite.logical_not().to(torch.float32))


def update_running_statistics(model: CLSP, ranks: Ranks, bad: Tensor) -> None:
    """Averages the batch's moments over the ranks, then updates the running moments with them. So the running
    moments stay the same on all ranks. If `bad` is 1 instead of 0, they do not change."""
    norms = model.running_norms
    ranks.average([norm.batch_moments for norm in norms if norm.batch_moments is not None])
    for norm in norms:
        norm.update_running(bad)
