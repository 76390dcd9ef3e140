"""The contrastive loss, forward and backward: gradients of both embeddings and of the scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Call, Case, Gate, Provider, relative
from clsp_fast.loss import contrastive_loss, contrastive_loss_reference

DIM = 512
SCALE = 1 / 0.07
RECIPE = "the recipe's and open_clip's form"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Embeddings of M clips with K captions each; texts j*K to j*K + K - 1 describe clip j."""

    audio_MD: Tensor
    text_ND: Tensor
    scale: Tensor
    captions: int
    bias: Tensor | None = None
    """Only for the sigmoid kind."""

    @property
    def owner_N(self) -> Tensor:
        return torch.arange(len(self.audio_MD), device=self.audio_MD.device).repeat_interleave(self.captions)


def batch(clips: int, captions: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Batch:
    """Unit vectors; a caption has a cosine of about 0.45 with its clip, and of about 0 with others."""
    generator = torch.Generator().manual_seed(0)
    audio_MD = F.normalize(torch.randn(clips, DIM, generator=generator), dim=1)
    noise_ND = F.normalize(torch.randn(clips * captions, DIM, generator=generator), dim=1)
    text_ND = F.normalize(0.5 * audio_MD.repeat_interleave(captions, 0) + noise_ND, dim=1)
    tensors = [x.to(device, dtype).requires_grad_() for x in (audio_MD, text_ND)]
    return Batch(*tensors, torch.tensor(SCALE, device=device, requires_grad=True), captions)


def exact(given: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients in float64 from their formulas, in blocks of rows: no M x N matrix."""
    x_MD, y_ND = (t.detach().double() for t in (given.audio_MD, given.text_ND))
    scale, owner_N, m, n = float(given.scale), given.owner_N, len(x_MD), len(y_ND)
    blocks = torch.arange(m, device=x_MD.device).split(1024)
    row_M, column_N = x_MD.new_empty(m), x_MD.new_full((n,), -torch.inf)
    for rows in blocks:
        logits_RN = scale * x_MD[rows] @ y_ND.T
        row_M[rows] = logits_RN.logsumexp(1)
        column_N = torch.logaddexp(column_N, logits_RN.logsumexp(0))
    positive_N = scale * (x_MD[owner_N] * y_ND).sum(1)
    loss = ((row_M.sum() - positive_N.sum() / given.captions) / m + (column_N - positive_N).mean()) / 2
    dx_MD, dy_ND = torch.empty_like(x_MD), torch.zeros_like(y_ND)
    for rows in blocks:
        logits_RN = scale * x_MD[rows] @ y_ND.T
        positive_RN = (rows[:, None] == owner_N).double()
        row_RN = ((logits_RN - row_M[rows, None]).exp() - positive_RN / given.captions) / m
        grad_RN = (row_RN + ((logits_RN - column_N).exp() - positive_RN) / n) / 2
        dx_MD[rows] = scale * grad_RN @ y_ND
        dy_ND += scale * grad_RN.T @ x_MD[rows]
    return loss, dx_MD, dy_ND, (x_MD * dx_MD).sum() / scale


def sigmoid_batch(clips: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Batch:
    """The embeddings of `batch`, and the bias with which training starts (arXiv 2303.15343)."""
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    return replace(batch(clips, 1, dtype, device), bias=bias)


def exact_sigmoid(given: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean over pairs and gradients in float64 from their formulas, in blocks of rows: no M x N matrix."""
    assert given.bias is not None
    x_MD, y_ND = (t.detach().double() for t in (given.audio_MD, given.text_ND))
    scale, bias, owner_N = given.scale.item(), given.bias.item(), given.owner_N
    pairs = len(x_MD) * len(y_ND)
    loss, d_bias = x_MD.new_zeros(()), x_MD.new_zeros(())
    dx_MD, dy_ND = torch.empty_like(x_MD), torch.zeros_like(y_ND)
    for rows in torch.arange(len(x_MD), device=x_MD.device).split(1024):
        logits_RN = scale * x_MD[rows] @ y_ND.T + bias
        positive_RN = (rows[:, None] == owner_N).double()
        loss += (F.softplus(logits_RN) - positive_RN * logits_RN).sum() / pairs
        grad_RN = (logits_RN.sigmoid() - positive_RN) / pairs
        d_bias += grad_RN.sum()
        dx_MD[rows] = scale * grad_RN @ y_ND
        dy_ND += scale * grad_RN.T @ x_MD[rows]
    return loss, dx_MD, dy_ND, (x_MD * dx_MD).sum() / scale, d_bias


def gradients(given: Batch, loss: Loss, *, cast: bool = False, scale: bool = True) -> Call:
    """The timed call of a loss function: its value and the gradients, in the order of `exact`."""

    def call() -> tuple[Tensor, ...]:
        audio_MD, text_ND = given.audio_MD, given.text_ND
        value = loss(
            *((t.float() for t in (audio_MD, text_ND)) if cast else (audio_MD, text_ND)), given.scale
        )
        wanted = [audio_MD, text_ND, given.scale if scale else None, given.bias]
        return value.detach(), *torch.autograd.grad(value, [x for x in wanted if x is not None])

    return call


def fused(given: Batch, **settings: Any) -> Call:
    owner_N = given.owner_N if given.captions > 1 else None
    return gradients(given, partial(contrastive_loss, text_owner=owner_N, **settings))


def reference(given: Batch) -> Call:
    owner_N = given.owner_N if given.captions > 1 else None
    return gradients(given, partial(contrastive_loss_reference, text_owner=owner_N))


def fused_sigmoid(given: Batch) -> Call:
    return gradients(given, partial(contrastive_loss, kind="sigmoid", logit_bias=given.bias))


def reference_sigmoid(given: Batch) -> Call:
    """`binary_cross_entropy_with_logits` of all pairs."""
    return gradients(given, partial(contrastive_loss_reference, kind="sigmoid", logit_bias=given.bias))


def fused_one_caption(given: Batch) -> Call:
    first = Batch(given.audio_MD, given.text_ND.detach()[:: given.captions].requires_grad_(), given.scale, 1)
    return fused(first)


def targets(given: Batch) -> Tensor:
    """The target of each clip's cross-entropy: a text, or a distribution over texts."""
    if given.captions == 1:
        return given.owner_N
    clips_M1 = torch.arange(len(given.audio_MD), device=given.audio_MD.device)[:, None]
    return (clips_M1 == given.owner_N).to(torch.float32) / given.captions


def dense(given: Batch, products: int, *, cast: bool = False) -> Call:
    """Two cross-entropies of M x N logits. They share one product, or each has its own (`products=2`)."""
    targets_M, owner_N = targets(given), given.owner_N

    def loss(audio_MD: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        logits_MN = scale * audio_MD @ text_ND.T
        logits_NM = scale * text_ND @ audio_MD.T if products == 2 else logits_MN.T
        return (F.cross_entropy(logits_MN, targets_M) + F.cross_entropy(logits_NM, owner_N)) / 2

    return gradients(given, loss, cast=cast)


def linear_cross_entropy(given: Batch, *, chunked: bool) -> Call:
    try:
        from torch.nn import LinearCrossEntropyOptions
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy") from error
    options = LinearCrossEntropyOptions() if chunked else None
    targets_M, owner_N = targets(given), given.owner_N

    def loss(audio_MD: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        audio_MD = scale * audio_MD
        rows = F.linear_cross_entropy(audio_MD, text_ND, targets_M, options=options)
        return (rows + F.linear_cross_entropy(text_ND, audio_MD, owner_N, options=options)) / 2

    return gradients(given, loss)


class ChunkedCrossEntropy(torch.autograd.Function):
    """mean_i (logsumexp_j s_ij - s_i,target(i)) with s = scale X Y^T, in plain torch, for any number of rows.

    A chunk of rows of the logits exists at a time. The forward pass computes the gradients as well, because
    the logits are gone in the backward pass. Fused linear cross-entropies for language models work like this.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_MD: Tensor, y_ND: Tensor, scale: Tensor, target_M: Tensor, rows: int
    ) -> Tensor:
        dx_MD, dy_ND = torch.empty_like(x_MD), torch.zeros_like(y_ND, dtype=torch.float32)
        total, d_scale = scale.new_zeros(()), scale.new_zeros(())
        for start in range(0, len(x_MD), rows):
            chunk = slice(start, start + rows)
            cosine_RN = (x_MD[chunk] @ y_ND.T).float()
            logits_RN, target_R1 = scale * cosine_RN, target_M[chunk, None]
            lse_R1 = logits_RN.logsumexp(1, keepdim=True)
            total += (lse_R1 - logits_RN.gather(1, target_R1)).sum()
            grad_RN = logits_RN.sub_(lse_R1).exp_()
            grad_RN.scatter_add_(1, target_R1, grad_RN.new_full(target_R1.shape, -1.0))
            d_scale += torch.linalg.vecdot(grad_RN, cosine_RN).sum()
            grad_RN = (scale * grad_RN).to(x_MD.dtype)
            dx_MD[chunk] = grad_RN @ y_ND
            dy_ND += grad_RN.T @ x_MD[chunk]
        ctx.save_for_backward(dx_MD / len(x_MD), dy_ND / len(x_MD), d_scale / len(x_MD))
        return total / len(x_MD)

    @staticmethod
    def backward(ctx, d_loss: Tensor):  # type: ignore[no-untyped-def]
        dx_MD, dy_ND, d_scale = ctx.saved_tensors
        return d_loss * dx_MD, (d_loss * dy_ND).to(dx_MD.dtype), d_loss * d_scale, None, None


def chunked_cross_entropy(given: Batch, *, rows: int = 2048) -> Call:
    """A chunked cross-entropy for each direction: how a language model's loss serves a contrastive one."""
    owner_N = given.owner_N

    def loss(audio_MD: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        audio_to_text = ChunkedCrossEntropy.apply(audio_MD, text_ND, scale, owner_N, rows)
        text_to_audio = ChunkedCrossEntropy.apply(text_ND, audio_MD, scale, owner_N, rows)
        return (audio_to_text + text_to_audio) / 2  # type: ignore[no-any-return]

    return gradients(given, loss)


def memeff(given: Batch) -> Call:
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return gradients(given, lambda audio_MD, text_ND, _: loss(audio_MD, text_ND), scale=False)


def inf_cl(given: Batch) -> Call:
    from inf_cl import cal_flash_loss

    def loss(audio_MD: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        both = cal_flash_loss(audio_MD, text_ND, scale=scale), cal_flash_loss(text_ND, audio_MD, scale=scale)
        return sum(x.mean() for x in both) / 2  # type: ignore[return-value]

    return gradients(given, loss)


def dense_sigmoid(given: Batch, *, cast: bool = False) -> Call:
    """-log sigmoid(+-s) with a matrix of signs, as SigLIP and open_clip write it."""
    clips = len(given.audio_MD)

    def loss(audio_MD: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        logits_MN = scale * audio_MD @ text_ND.T + given.bias
        signs_MN = 2 * torch.eye(clips, dtype=logits_MN.dtype, device=logits_MN.device) - 1
        return -F.logsigmoid(signs_MN * logits_MN).sum() / clips**2

    return gradients(given, loss, cast=cast)


def siglip_kernel(given: Batch) -> Call:
    from siglip_kernel import fused_siglip_loss

    clips = len(given.audio_MD)

    def loss(audio_MD: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        # fused_siglip_loss divides the sum over pairs by the clips once, and has the embeddings' dtype.
        return fused_siglip_loss(audio_MD, text_ND, scale.log(), given.bias).float() / clips

    return gradients(given, loss)


def without_scale(gate: Gate) -> Gate:
    return lambda expected, result: gate(expected[:3], result)


def another_loss(expected: Any, result: Any) -> tuple[bool, str]:
    return bool(torch.isfinite(result[0])), "another loss, with one caption a clip: only its time is compared"


def loss_case(
    clips: int,
    *,
    captions: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    goals: dict[str, float] | None = None,
    dense_fits: bool = True,
    workspace_mb: int | None = None,
    **settings: Any,
) -> Case:
    half = dtype == torch.bfloat16
    gate = relative(1e-2 if half else 3e-5)
    texts = clips * captions
    one = Provider("dense, one product", partial(dense, products=1))
    if half:
        peers = [one, Provider(RECIPE, partial(dense, products=2, cast=True), note="in float32")]
    else:
        peers = [
            Provider("reference", reference),
            one,
            Provider(RECIPE, partial(dense, products=2), note="a product each way"),
            Provider("F.linear_cross_entropy", partial(linear_cross_entropy, chunked=False)),
        ]
    if clips <= 1024 and captions == 1:
        chunks = partial(linear_cross_entropy, chunked=True)
        peers.append(Provider("F.linear_cross_entropy, chunked", chunks))
    if captions > 1:
        peers.append(Provider("clsp_fast, one caption", fused_one_caption, gate=another_loss))
    if device == "cuda":
        rounded = relative(5e-2)  # they use TF32, or round to bfloat16 before the subtraction
        if captions == 1:
            peers.append(Provider("chunked cross-entropy", chunked_cross_entropy, gate=rounded))
        peers.append(Provider("memeff", memeff, "memeff", without_scale(rounded)))
        peers.append(Provider("Inf-CL", inf_cl, "inf-cl", rounded))
    labels = ["loss", *["cuda"] * (device == "cuda"), str(clips), *["two-captions"] * (captions == 2)]
    subject, limit = partial(fused), ""
    if workspace_mb is not None:
        subject, limit = (
            partial(fused, workspace_bytes=workspace_mb << 20),
            f", workspace of {workspace_mb} MB",
        )
        labels.append(f"{workspace_mb}mb")
    return Case(
        name="-".join([*labels, *["bf16"] * half]),
        area="loss",
        what=f"{clips} clips, {texts} captions, D = {DIM}, {'bfloat16' if half else 'float32'}{limit}",
        inputs=partial(batch, clips, captions, dtype, device),
        expected=exact,
        gate=gate,
        providers=(Provider("clsp_fast", subject), *(peers if dense_fits else ())),
        goals=goals or {},
        amount=clips,
        unit="clips",
        # One product forward and two backward are necessary. Logits that are recomputed do not count.
        flops=3 * 2.0 * clips * texts * DIM,
        bytes=(2 if half else 4) * 2 * DIM * (clips + texts),
        threads=2,
        device=device,
        memory=clips >= 4096,
        **settings,
    )


def sigmoid_case(
    clips: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", dense_fits: bool = True
) -> Case:
    half = dtype == torch.bfloat16
    peers = []
    if dense_fits:
        form = partial(dense_sigmoid, cast=half)
        peers.append(Provider("SigLIP's and open_clip's form", form, note="in float32" if half else ""))
    if dense_fits and not half:
        peers.append(Provider("reference", reference_sigmoid))
    if device == "cuda":
        peers.append(Provider("siglip-kernel", siglip_kernel, "siglip-kernel", relative(5e-2)))
    labels = ["loss-sigmoid", *["cuda"] * (device == "cuda"), str(clips), *["bf16"] * half]
    return Case(
        name="-".join(labels),
        area="loss",
        what=f"sigmoid kind, {clips} clips and texts, D = {DIM}, {'bfloat16' if half else 'float32'}",
        inputs=partial(sigmoid_batch, clips, dtype, device),
        expected=exact_sigmoid,
        gate=relative(1e-2 if half else 3e-5),
        providers=(Provider("clsp_fast", fused_sigmoid), *peers),
        amount=clips,
        unit="clips",
        flops=3 * 2.0 * clips**2 * DIM,
        bytes=(2 if half else 4) * 2 * DIM * 2 * clips,
        threads=2,
        device=device,
        memory=clips >= 4096,
    )


ONE_CAPTION = {"clsp_fast, one caption": 1 / 2.05}
CASES = (
    loss_case(1024),
    loss_case(4096, goals={RECIPE: 2.2}),
    loss_case(4096, goals={RECIPE: 1.8}, workspace_mb=16),
    loss_case(4096, dtype=torch.bfloat16, goals={RECIPE: 4.0}),
    loss_case(2048, captions=2, goals=ONE_CAPTION),
    loss_case(4096, captions=2, goals=ONE_CAPTION, optional=True),
    loss_case(8192, goals={RECIPE: 2.2}, optional=True),
    loss_case(8192, goals={RECIPE: 1.8}, workspace_mb=16, optional=True),
    loss_case(16384, optional=True, dense_fits=False),
    # Memory goals: two gradients of 64 MB each, and 600 or 64 MB more.
    loss_case(32768, optional=True, dense_fits=False, memory_goal=2 * 4 * DIM * 32768 + 600 * 2**20),
    loss_case(
        32768,
        optional=True,
        dense_fits=False,
        workspace_mb=16,
        memory_goal=2 * 4 * DIM * 32768 + 64 * 2**20,
    ),
    *(
        loss_case(clips, dtype=torch.bfloat16, device="cuda", dense_fits=clips <= 32768)
        for clips in (8192, 32768, 65536, 262144)
    ),
    loss_case(8192, captions=2, dtype=torch.bfloat16, device="cuda"),
    sigmoid_case(2048),
    *(
        sigmoid_case(clips, dtype=torch.bfloat16, device="cuda", dense_fits=clips <= 32768)
        for clips in (8192, 32768, 65536)
    ),
)
