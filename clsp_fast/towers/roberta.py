"""The text tower: RoBERTa (Liu et al., arXiv 1907.11692), with the parameter names of Hugging Face's
RobertaModel.

A post-LayerNorm transformer with exact GELU and learned positions, which are counted from the padding id + 1.
Padding is masked, so a caption's result does not depend on its batch.

Shape suffixes: N captions, L tokens, C channels, H heads, D dimensions of a head, 1 a broadcast dimension.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsp_fast.config import TextConfig
from clsp_fast.towers.layers import checkpointed

_MIN_SAVED_TOKENS = 1024
"""A split that saves fewer padding tokens than this saves less than the launches of a second call cost."""


def _table(rows: int, channels: int) -> nn.Embedding:
    """An embedding table. On the meta device its initial values are not drawn: torch would import its
    compiler for that, which takes longer than reading a small model."""
    weight = torch.empty(rows, channels)
    return nn.Embedding(rows, channels, _weight=weight if weight.is_meta else None)


class Embeddings(nn.Module):
    """Sum of token, position and type embeddings, LayerNorm, dropout."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = _table(config.vocab_size, config.hidden_size)
        self.position_embeddings = _table(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = _table(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob
        self.pad = config.pad_token_id

    def forward(self, token_ids_NL: Tensor) -> Tensor:
        real_NL = token_ids_NL != self.pad
        positions_NL = real_NL.cumsum(1) * real_NL + self.pad
        x = self.word_embeddings(token_ids_NL) + self.position_embeddings(positions_NL)
        x = self.LayerNorm(x + self.token_type_embeddings.weight[0])
        return F.dropout(x, self.dropout, self.training)


class Projections(nn.Module):
    """Self-attention: the projections to queries, keys and values, and the weighted sum."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x_NLC: Tensor, keys_N11L: Tensor | None) -> Tensor:
        q, k, v = (
            linear(x_NLC).view(*x_NLC.shape[:2], self.heads, -1).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        mixed_NHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=keys_N11L, dropout_p=dropout)
        return mixed_NHLD.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """LayerNorm(residual + dropout(dense(x))), which ends both halves of a layer."""

    def __init__(self, config: TextConfig, channels_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + residual))


class RobertaLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual and LayerNorm after it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        attention = {"self": Projections(config), "output": Residual(config, config.hidden_size)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Residual(config, config.intermediate_size)

    def forward(self, x_NLC: Tensor, keys_N11L: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x_NLC, keys_N11L), x_NLC)
        return cast(Tensor, self.output(F.gelu(self.intermediate["dense"](x)), x))


def split_by_length(lengths_N: Tensor) -> list[Tensor]:
    """Groups captions to compute together: all in one group, or the shorter and the longer ones apart if that
    saves enough padding to pay for a second call.

    Args:
        lengths_N: int64 (N,), tokens, on the CPU.

    Returns:
        One or two tensors of row numbers (int64), from the shortest caption to the longest.
    """
    sorted_N, order_N = lengths_N.sort(stable=True)
    shorter_N = torch.arange(1, len(lengths_N) + 1)
    # Entry i: number of tokens, with padding, if the i + 1 shortest captions are computed apart.
    tokens_N = shorter_N * sorted_N + (len(lengths_N) - shorter_N) * sorted_N[-1]
    cut = int(tokens_N.argmin()) + 1
    saved = int(tokens_N[-1] - tokens_N[cut - 1])
    if saved > max(_MIN_SAVED_TOKENS, int(tokens_N[-1]) // 8):
        return [order_N[:cut], order_N[cut:]]
    return [order_N]


class Roberta(nn.Module):
    """Token ids -> one vector per caption.

    With pooling "cls", the vector is RobertaModel's pooler_output. With pooling "mean", it is the mean over
    the caption's tokens, and there is no pooler.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.recompute = False
        layers = nn.ModuleList(RobertaLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        if config.pooling == "cls":
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def hidden(self, token_ids_NL: Tensor, attention_mask_NL: Tensor) -> Tensor:
        """Hidden states (N, L, C) of the last layer; those at padding are meaningless."""
        keys_N11L: Tensor | None = attention_mask_NL[:, None, None, :] != 0
        # Attention without a mask is faster. Reading the mask is free on the CPU, but synchronises a GPU.
        readable = attention_mask_NL.device.type == "cpu" and not torch.compiler.is_exporting()
        if readable and bool(attention_mask_NL.all()):
            keys_N11L = None
        x = self.embeddings(token_ids_NL)
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x = checkpointed(layer, x, keys_N11L, recompute=self.recompute)
        return cast(Tensor, x)

    def forward(self, token_ids_NL: Tensor, attention_mask_NL: Tensor) -> Tensor:
        """Vectors (N, C) of token ids (N, L) with their mask (N, L; 1 = token, 0 = padding), both int64."""
        x_NLC = self.hidden(token_ids_NL, attention_mask_NL)
        if hasattr(self, "pooler"):
            return torch.tanh(self.pooler["dense"](x_NLC[:, 0]))
        mask_NL1 = (attention_mask_NL != 0).to(x_NLC.dtype)[:, :, None]
        return (x_NLC * mask_NL1).sum(1) / mask_NL1.sum(1)


@torch.no_grad()
def initialise(tower: Roberta) -> None:
    """Initial values for training from scratch, in place.

    Weights are drawn from normal(0, 0.02) and biases are 0, as in RoBERTa. Unlike in RoBERTa, the last matrix
    of each residual branch is zero, so the layers at first only pass on the embeddings. Short training runs
    then learn words before combinations of words. A tower without layers cannot use word order, so its
    position embeddings start at zero.
    """
    for name, module in tower.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(std=0.02)
        if isinstance(module, nn.Linear):
            module.bias.zero_()
            if name.endswith("output.dense"):
                module.weight.zero_()
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    if len(cast(nn.ModuleList, tower.encoder["layer"])) == 0:
        tower.embeddings.position_embeddings.weight.zero_()
