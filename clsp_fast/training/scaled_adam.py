"""ScaledAdam, the optimiser of the Zipformer recipes, and Eden, its learning rate schedule.

The size of a tensor is its root mean square. A step moves a tensor in proportion to its size, and the size
itself is learned separately. Updates run in place over lists of tensors. The numbers per tensor (norm, size)
are processed on the host, which waits for the device once a step. The only temporary tensors are the square
roots of the second moments, of about _ELEMENTS_AT_ONCE elements at a time.

Source: Yao et al., arXiv 2310.11230, section 3.5 and appendix; icefall's recipe for its constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 24
# Columns of "sizes": the tensor's size, the second moment of the gradient with respect to the size, and, from
# _SLOPES on, this gradient in the last _PERIOD steps.
_RMS, _SQUARE, _SLOPES = 0, 1, 2
_PERIOD = 4
_NORMS = 100
"""Every _NORMS steps, the clipping threshold is computed from the gradient norms of the last _NORMS steps."""


class ScaledAdam(torch.optim.Optimizer):
    """Adam with steps relative to a tensor's size, and with a separate learning rate for the size.

    The gradients of a group are clipped to `clipping_scale` times the median of the group's norms in 100
    steps. For this norm, each gradient is multiplied by the size of its tensor, so the scale of a tensor does
    not affect the norm. Clipping changes the gradients in place. Parameters of one element take Adam's steps
    at `scalar_lr_scale` times the learning rate. The bias correction counts all steps of the group, even if a
    parameter has no gradient in some of them.

    Args:
        params: parameters or groups; "lr" of a group is set before each step.
        lr: learning rate; a tensor changes by about lr times its size in a step.
        betas: decay of the momentum and of the second moment.
        clipping_scale: see above.
        scalar_lr_scale: learning rate of sizes and of parameters of one element, relative to lr.
        eps: added to denominators.
        rms_range: smallest and largest size. A tensor below the smallest size takes steps as if it had that
            size, and its size is not learned. No tensor grows beyond the largest size.
        scalar_max: before each update, parameters of one element are clamped to -scalar_max .. scalar_max.

    If the attribute `found_inf` is a scalar tensor other than 0, a step changes nothing. torch's fused
    optimisers have the same attribute.

    The state of a parameter is "delta" (momentum), "exp_avg_sq" (second moment) and, unless it has one
    element, "sizes" (6 numbers on the host). A group has "history": steps, clipping threshold, 100 norms.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        clipping_scale: float = 2.0,
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        rms_range: tuple[float, float] = (1e-5, 3.0),
        scalar_max: float = 10.0,
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.betas, self.clipping_scale, self.scalar_lr_scale = betas, clipping_scale, scalar_lr_scale
        self.eps, self.rms_range, self.scalar_max = eps, rms_range, scalar_max
        self.found_inf: Tensor | None = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chosen: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if present:
                tensors, scalars = ([p for p in present if (p.numel() > 1) == many] for many in (True, False))
                group.setdefault("history", torch.zeros(2 + _NORMS, dtype=torch.float64))
                chosen.append((group, tensors, scalars))
        for parameter in (p for _, tensors, scalars in chosen for p in (*tensors, *scalars)):
            self._begin(parameter)
        vectors = [vector for parts in chosen for vector in self._measure(*parts)]
        if self.found_inf is not None:
            vectors.append(self.found_inf.reshape(1))
        values = _to_host(vectors)
        if self.found_inf is None or not values.pop():
            for parts, numbers, rms in zip(chosen, values[::2], values[1::2], strict=True):
                self._update(*parts, numbers, rms)
        return loss

    def _measure(
        self, group: dict[str, Any], tensors: list[Tensor], scalars: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """On the device: norms of all gradients and dot products of the tensors with their gradients; and the
        norms of the tensors, if this step learns their sizes."""
        pairs = zip(_gradients(tensors), tensors, strict=True)
        slopes = [torch.dot(g.flatten(), p.flatten()) for g, p in pairs]
        numbers = torch.stack([*torch._foreach_norm(_gradients([*tensors, *scalars])), *slopes]).float()
        learns_sizes = bool(tensors) and int(group["history"][0]) % _PERIOD == _PERIOD - 1
        norms = torch.stack(torch._foreach_norm(tensors)) if learns_sizes else numbers.new_zeros(0)
        return numbers, norms

    def _update(
        self,
        group: dict[str, Any],
        tensors: list[Tensor],
        scalars: list[Tensor],
        numbers: Tensor,
        norm_P: Tensor,
    ) -> None:
        """Updates a group with the numbers of `_measure`, which are on the host now."""
        history, count = group["history"], len(tensors)
        step, (beta1, beta2) = int(history[0]), self.betas
        sizes = [self.state[p]["sizes"].cpu() for p in tensors]
        sizes_P6 = torch.stack(sizes) if sizes else torch.zeros(0, _SLOPES + _PERIOD)
        gradient_norm_P, scalar_norms, slope_P = torch.split(numbers, [count, len(scalars), count])
        norm = float(
            ((gradient_norm_P * sizes_P6[:, _RMS]).square().sum() + scalar_norms.square().sum()).sqrt()
        )
        clip_factor = _clip(history, step, norm, self.clipping_scale)
        if clip_factor < 1:
            torch._foreach_mul_(_gradients([*tensors, *scalars]), clip_factor)
        torch._foreach_mul_([self.state[p]["delta"] for p in (*tensors, *scalars)], beta1)

        sizes_P6[:, _SLOPES + step % _PERIOD] = slope_P * clip_factor
        if len(norm_P):
            self._learn_sizes(group["lr"], step, tensors, sizes_P6, norm_P)
        correction = 1 - beta2 ** (step + 1)
        rates_P = -group["lr"] * (1 - beta1) * sizes_P6[:, _RMS].clamp(min=self.rms_range[0])
        # The recipe leaves the correction out once it is within 1 % of 1.
        self._adam(tensors, rates_P.tolist(), correction if correction < 0.99 else 1.0)
        rate = -group["lr"] * self.scalar_lr_scale * (1 - beta1)
        if scalars:
            torch._foreach_clamp_min_(scalars, -self.scalar_max)
            torch._foreach_clamp_max_(scalars, self.scalar_max)
        self._adam(scalars, [rate] * len(scalars), correction)
        for parameter, sizes_6 in zip(tensors, sizes_P6, strict=True):
            self.state[parameter]["sizes"] = sizes_6
        history[0] = step + 1

    def _begin(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if "delta" in state:
            return
        state["delta"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        if parameter.numel() > 1:
            state["sizes"] = torch.zeros(_SLOPES + _PERIOD)
            state["sizes"][_RMS] = parameter.square().mean().sqrt()

    def _learn_sizes(
        self, lr: float, step: int, tensors: list[Tensor], sizes_P6: Tensor, norm_P: Tensor
    ) -> None:
        """Computes a change of each tensor's size from the size's last _PERIOD gradients, and adds it to the
        momentum."""
        smallest, largest = self.rms_range
        counts_P = torch.tensor([float(p.numel()) for p in tensors]).sqrt()
        rms_P = norm_P / counts_P
        sizes_P6[:, _RMS] = rms_P
        slopes_P4 = sizes_P6[:, _SLOPES:]
        beta = self.betas[1] ** _PERIOD
        square_P = sizes_P6[:, _SQUARE].mul_(beta).add_(slopes_P4.square().mean(1), alpha=1 - beta)
        correction = (1 - beta ** ((step + 1) // _PERIOD)) ** 0.5
        change_P = -lr * self.scalar_lr_scale * correction * slopes_P4.sum(1) / (square_P.sqrt() + self.eps)
        change_P = change_P.masked_fill(rms_P < smallest, 0.0).minimum((largest - rms_P) / rms_P)
        changes = (change_P * (1 - self.betas[0])).tolist()
        for parameter, change in zip(tensors, changes, strict=True):
            self.state[parameter]["delta"].add_(parameter, alpha=change)

    def _adam(self, parameters: list[Tensor], rates: list[float], correction: float) -> None:
        """Updates second moments, momentum and parameters, in this order; `rates` are negative."""
        beta2 = self.betas[1]
        for span in _chunks(parameters):
            chunk, gradients = parameters[span], _gradients(parameters[span])
            squares, deltas = ([self.state[p][key] for p in chunk] for key in ("exp_avg_sq", "delta"))
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            if correction != 1:
                torch._foreach_div_(roots, correction**0.5)
            torch._foreach_add_(roots, self.eps)
            torch._foreach_addcdiv_(deltas, gradients, roots, rates[span])
            torch._foreach_add_(chunk, deltas)


def eden(step: int, epoch: float, *, batches: float, epochs: float, warmup: int, start: float = 0.5) -> float:
    """Eden's factor for the base learning rate at a step (from 0). It warms up linearly from `start`, and
    falls as 1 / sqrt(step) beyond `batches` steps, and as 1 / sqrt(epoch) beyond `epochs` epochs."""
    warm_up = start + (1 - start) * step / warmup if step < warmup else 1.0
    by_batches = ((step**2 + batches**2) / batches**2) ** -0.25
    by_epochs = ((epoch**2 + epochs**2) / epochs**2) ** -0.25
    return float(by_batches * by_epochs * warm_up)


def _to_host(vectors: list[Tensor]) -> list[Tensor]:
    """The vectors on the host, by one transfer. It is in float64, which holds the values of every dtype."""
    if not vectors:
        return []
    values = torch.cat([vector.to(torch.float64) for vector in vectors]).cpu()
    parts = torch.split(values, [len(vector) for vector in vectors])
    return [part.to(vector.dtype) for part, vector in zip(parts, vectors, strict=True)]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _clip(history: Tensor, step: int, norm: float, clipping_scale: float) -> float:
    """The factor that clips the gradients. Updates the norms and the threshold in `history`."""
    if step == 0:
        return 1.0
    norms = history[2:]
    norms[step % _NORMS] = norm
    if step % _NORMS == 0:
        history[1] = clipping_scale * norms.sort().values[_NORMS // 2]
    return 1.0 if step < _NORMS else min(1.0, float(history[1]) / (norm + 1e-20))


def _chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Slices of the list. Each ends as soon as it has _ELEMENTS_AT_ONCE elements."""
    start = elements = 0
    for i, tensor in enumerate(tensors):
        elements += tensor.numel()
        if elements >= _ELEMENTS_AT_ONCE or i == len(tensors) - 1:
            yield slice(start, i + 1)
            start, elements = i + 1, 0
