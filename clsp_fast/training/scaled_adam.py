"""ScaledAdam, the optimiser of the Zipformer recipes, and Eden, its schedule.

A tensor moves in proportion to its own root mean square, and its size is learned apart from its direction.
Updates run over lists of tensors in place; what decides about a whole tensor (its norm, its size) is computed
on the host from one transfer a step and group, two in every fourth. Nothing of the model's size is made but
square roots, _ELEMENTS_AT_ONCE at a time.

Source: Yao et al., arXiv 2310.11230, section 3.5 and appendix; icefall's recipe for its constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 24
# Columns of what is known of a tensor's size: its root mean square, the second moment of the gradient by its
# size, and that gradient in the last _PERIOD steps.
_RMS, _SQUARE, _FIRST = 0, 1, 2
_PERIOD = 4
_NORMS = 100
"""Steps whose norms decide how gradients are clipped in as many following ones."""


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose steps are relative to a tensor's size, with a rate of its own for the size.

    Gradients of a group are scaled down to `clipping_scale` times the median of its norms of 100 steps; norms
    count each gradient times its tensor's root mean square, so that large tensors do not rule. Single numbers
    are updated by Adam at `scalar_lr_scale` of the rate. Gradients are changed in place. A parameter that has
    a gradient in some steps only is corrected for the steps of its group.

    Args:
        params: parameters or groups; "lr" of a group is set before each step.
        lr: learning rate; a tensor changes by about lr of its size a step.
        betas: decay of the momentum and of the second moment.
        clipping_scale: see above.
        scalar_lr_scale: rate of sizes and single numbers, relative to lr.
        eps: added to denominators.
        rms_range: sizes below the first are not shrunk and count as it; none grows over the second.
        scalar_max: single numbers stay within -scalar_max .. scalar_max, before momentum.

    The state of a parameter is "delta", "exp_avg_sq" and, for tensors, "sizes" (6 numbers on the host); that
    of a group is "history" (steps, threshold, 100 norms).
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
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if present:
                tensors, scalars = ([p for p in present if (p.numel() > 1) == many] for many in (True, False))
                self._update(group, tensors, scalars)
        return loss

    def _update(self, group: dict[str, Any], tensors: list[Tensor], scalars: list[Tensor]) -> None:
        for parameter in (*tensors, *scalars):
            self._begin(parameter)
        history = group.setdefault("history", torch.zeros(2 + _NORMS, dtype=torch.float64))
        step, (beta1, beta2) = int(history[0]), self.betas
        sizes = [self.state[p]["sizes"].cpu() for p in tensors]
        sizes_P6 = torch.stack(sizes) if sizes else torch.zeros(0, _FIRST + _PERIOD)
        norm_P, slope_P, scalar_norms = _norms_and_slopes(tensors, scalars)
        norm = float(((norm_P * sizes_P6[:, _RMS]).square().sum() + scalar_norms.square().sum()).sqrt())
        share = _clip(history, step, norm, self.clipping_scale)
        if share < 1:
            torch._foreach_mul_(_gradients([*tensors, *scalars]), share)
        torch._foreach_mul_([self.state[p]["delta"] for p in (*tensors, *scalars)], beta1)

        sizes_P6[:, _FIRST + step % _PERIOD] = slope_P * share
        if tensors and step % _PERIOD == _PERIOD - 1:
            self._learn_sizes(group["lr"], step, tensors, sizes_P6)
        correction = 1 - beta2 ** (step + 1)
        rates_P = -group["lr"] * (1 - beta1) * sizes_P6[:, _RMS].clamp(min=self.rms_range[0])
        # Where the correction hardly matters the recipe leaves it out.
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
            state["sizes"] = torch.zeros(_FIRST + _PERIOD)
            state["sizes"][_RMS] = parameter.square().mean().sqrt()

    def _learn_sizes(self, lr: float, step: int, tensors: list[Tensor], sizes_P6: Tensor) -> None:
        """Adds to the momentum what makes tensors larger or smaller as the last gradients by size ask."""
        smallest, largest = self.rms_range
        counts_P = torch.tensor([float(p.numel()) for p in tensors]).sqrt()
        rms_P = torch.stack(torch._foreach_norm(tensors)).cpu() / counts_P
        sizes_P6[:, _RMS] = rms_P
        slopes_P4 = sizes_P6[:, _FIRST:]
        beta = self.betas[1] ** _PERIOD
        square_P = sizes_P6[:, _SQUARE].mul_(beta).add_(slopes_P4.square().mean(1), alpha=1 - beta)
        correction = (1 - beta ** ((step + 1) // _PERIOD)) ** 0.5
        change_P = -lr * self.scalar_lr_scale * correction * slopes_P4.sum(1) / (square_P.sqrt() + self.eps)
        change_P = change_P.masked_fill(rms_P < smallest, 0.0).minimum((largest - rms_P) / rms_P)
        shares = (change_P * (1 - self.betas[0])).tolist()
        for parameter, share in zip(tensors, shares, strict=True):
            self.state[parameter]["delta"].add_(parameter, alpha=share)

    def _adam(self, parameters: list[Tensor], rates: list[float], correction: float) -> None:
        """Takes gradients up into the second moments, and their quotients times the rates into momentum and
        parameters."""
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
    """Eden's share of the base learning rate at a step (from 0): falls with the square root of steps and of
    epochs, with a linear warm-up from `start`."""
    rise = start + (1 - start) * step / warmup if step < warmup else 1.0
    by_batches = ((step**2 + batches**2) / batches**2) ** -0.25
    by_epochs = ((epoch**2 + epochs**2) / epochs**2) ** -0.25
    return float(by_batches * by_epochs * rise)


def _norms_and_slopes(tensors: list[Tensor], scalars: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the tensors' gradients, products <gradient, tensor>, and norms of the scalars' gradients, on
    the host."""
    norms = torch._foreach_norm(_gradients([*tensors, *scalars]))
    pairs = zip(_gradients(tensors), tensors, strict=True)
    slopes = [torch.dot(g.flatten(), p.flatten()) for g, p in pairs]
    values = torch.stack([*norms, *slopes]).float().cpu()
    count = len(tensors)
    return values[:count], values[len(norms) :], values[count : len(norms)]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _clip(history: Tensor, step: int, norm: float, clipping_scale: float) -> float:
    """What gradients are multiplied by; notes the norm, and every 100 steps the threshold."""
    if step == 0:
        return 1.0
    norms = history[2:]
    norms[step % _NORMS] = norm
    if step % _NORMS == 0:
        history[1] = clipping_scale * norms.sort().values[_NORMS // 2]
    return 1.0 if step < _NORMS else min(1.0, float(history[1]) / (norm + 1e-20))


def _chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Runs of tensors of _ELEMENTS_AT_ONCE elements or little more."""
    start = elements = 0
    for i, tensor in enumerate(tensors):
        elements += tensor.numel()
        if elements >= _ELEMENTS_AT_ONCE or i == len(tensors) - 1:
            yield slice(start, i + 1)
            start, elements = i + 1, 0
