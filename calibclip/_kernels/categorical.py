r"""KL divergence of two softmax distributions, and its gradient, without cancellation.

With the log-ratios :math:`\delta_k = \ln(q_k/p_k)`,

.. math::
    \mathrm{KL}(p\,\|\,q) = -\sum_k p_k \delta_k = \sum_k p_k\,(e^{\delta_k} - 1 - \delta_k),

since :math:`\sum_k p_k e^{\delta_k} = \sum_k p_k = 1`. The terms of the first sum cancel to second
order as q approaches p, where float32 leaves noise; those of the second are non-negative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from calibclip._kernels import special
from calibclip._kernels.closed_form import row_blocks
from calibclip._kernels.common import compute_dtype
from calibclip._kernels.once import once_only

# |delta| up to which the second sum is used term by term; beyond, nothing cancels.
_NEAR = 1.0


class _Block:
    """Both distributions of a block of rows, and their ratios; all tensors are (rows, C)."""

    def __init__(self, logits_p: Tensor, logits_q: Tensor, scale: float) -> None:
        dtype = compute_dtype(logits_p, logits_q)
        first, second = logits_p.to(dtype), logits_q.to(dtype)
        self.p = torch.softmax(_scaled(first, scale), -1)
        # The gap of the largest class is taken out, since a change common to all logits changes no
        # probability; and what rounding took from the gaps is put back, since it is relative to
        # that common change. Scaling comes last: scaled logits would have lost the digits.
        top = self.p.argmax(-1, keepdim=True)
        gap, lost = _difference(second, first)
        self.t = (gap - gap.gather(-1, top)).add_(lost - lost.gather(-1, top)).mul_(scale)
        growth = (self.p * torch.expm1(self.t)).sum(-1, keepdim=True)
        # Two predictions that are near each other throughout, as far as a look may tell.
        self.all_near = special.largest(self.t) < _NEAR / 2
        if self.all_near:
            self.delta = self.t - torch.log1p(growth)
            return
        log_q = torch.log_softmax(_scaled(second, scale), -1)
        self.q = log_q.exp()
        near = torch.log1p(growth.clamp(-0.5, 0.5))
        # ln sum_k p_k e^(t_k) = ln p_top - ln q_top, where nothing cancels
        far = self.p.gather(-1, top).log() - log_q.gather(-1, top)
        self.delta = self.t - torch.where(growth.abs() < 0.5, near, far)
        # A small difference of large gaps has lost its digits.
        self.near = (self.delta.abs() < _NEAR) & (self.t.abs() < 4 * _NEAR)

    def divergence(self) -> Tensor:
        p, delta = self.p, self.delta
        if self.all_near:
            return (p * special.second_order(delta, _NEAR)).sum(-1)
        series = p * special.second_order(delta.clamp(-_NEAR, _NEAR), _NEAR)
        # For p_k = 0 delta may be infinite, and the term is q_k.
        apart = self.q - p - torch.where(p == 0, 0, p * delta)
        return torch.where(self.near, series, apart).sum(-1)

    def slope_p(self) -> Tensor:
        """Return p_k (sum_j p_j t_j - t_k), the derivative in the scaled logits of p."""
        weighted = self.p * self.t
        if not self.all_near:
            weighted = torch.where(self.p == 0, 0, weighted)
        return self.p * weighted.sum(-1, keepdim=True) - weighted

    def slope_q(self) -> Tensor:
        """Return q_k - p_k, the derivative in the scaled logits of q."""
        if self.all_near:
            return self.p * torch.expm1(self.delta)
        growth = self.p * torch.expm1(self.delta.clamp(-_NEAR, _NEAR))
        return torch.where(self.near, growth, self.q - self.p)


def _scaled(logits: Tensor, scale: float) -> Tensor:
    # Below the largest, so that the rounding of the product is relative to the gap to it.
    return logits if scale == 1 else (logits - logits.amax(-1, keepdim=True)).mul_(scale)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a - b`` rounded, and what the rounding lost (Knuth's two-sum)."""
    rounded = a - b
    minus_b = rounded - a
    lost = (a - (rounded - minus_b)) - (b + minus_b)
    # A class that both leave out has no gap, and an infinite one has lost nothing.
    rounded = torch.where(a == b, 0, rounded)
    return rounded, torch.where(rounded.abs() < math.inf, lost.nan_to_num(nan=0.0), 0)


class CategoricalKL(torch.autograd.Function):
    """(logits_p, logits_q, scale) -> KL(softmax(scale logits_p) || softmax(scale logits_q)).

    Keeps the inputs only, and differentiates once.
    """

    @staticmethod
    def forward(ctx: Any, logits_p: Tensor, logits_q: Tensor, scale: float) -> Tensor:
        """Sum non-negative terms."""
        ctx.save_for_backward(logits_p, logits_q)
        ctx.scale = scale
        rows_p, rows_q = (x.reshape(-1, x.shape[-1]) for x in (logits_p, logits_q))
        parts = [
            _Block(rows_p[part], rows_q[part], scale).divergence() for part in row_blocks(rows_p)
        ]
        return torch.cat(parts).view(logits_p.shape[:-1])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients in both inputs; differentiating them again raises."""
        with torch.no_grad():
            grads = _gradients(ctx, grad)
        grads = once_only(grads, (*ctx.saved_tensors, grad), "use torch's kl_div for one")
        return (*grads, None)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    inputs = ctx.saved_tensors
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    rows_p, rows_q = (x.reshape(-1, x.shape[-1]) for x in inputs)
    upstream = grad.reshape(-1, 1) * ctx.scale
    for part in row_blocks(rows_p):
        block = _Block(rows_p[part], rows_q[part], ctx.scale)
        for target, slope in zip(grads, (block.slope_p, block.slope_q), strict=True):
            if target is not None:
                target.view(rows_p.shape)[part] = slope().mul_(upstream[part])
    return grads


def categorical_kl(logits_p: Tensor, logits_q: Tensor, scale: float = 1.0) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p\,\|\,q)` of the softmax of two scaled logits, the target first.

    Args:
        logits_p: Shape ``(..., C)``, any floating dtype.
        logits_q: The same shape.
        scale: Factor of both logits. To multiply them beforehand would round every gap between
            the two relative to the logits themselves.

    Returns:
        Shape ``(...,)``, at least float32, never negative. In float32 the value and both gradients
        are good to a relative 5e-6 however close the two are.
    """
    return CategoricalKL.apply(logits_p, logits_q, scale)
