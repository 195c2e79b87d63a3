r"""KL divergence of two softmax distributions, and its gradient, without cancellation.

With the log-ratios :math:`\delta_k = \ln(q_k/p_k)`,

.. math::
    \mathrm{KL}(p\,\|\,q) = -\sum_k p_k \delta_k = \sum_k p_k\,(e^{\delta_k} - 1 - \delta_k),

since :math:`\sum_k p_k e^{\delta_k} = \sum_k p_k = 1`. The terms of the first sum cancel to second
order as q approaches p, where float32 leaves noise; those of the second are non-negative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibclip._kernels import special
from calibclip._kernels.closed_form import compute_dtype
from calibclip._kernels.once import once_only

# |delta| up to which the second sum is used term by term; beyond, nothing cancels.
_NEAR = 1.0


class _Pair:
    """Both distributions and their ratios; all tensors are (B, C)."""

    def __init__(self, logits_p: Tensor, logits_q: Tensor) -> None:
        dtype = compute_dtype(logits_p, logits_q)
        first, second = logits_p.to(dtype), logits_q.to(dtype)
        self.p, self.q = torch.softmax(first, -1), torch.softmax(second, -1)
        # The gap of the largest class is taken out, since a change common to all logits changes no
        # probability; and what rounding took from the gaps is put back, since it is relative to
        # that common change.
        top = self.p.argmax(-1, keepdim=True)
        gap, lost = _difference(second, first)
        self.t = (gap - gap.gather(-1, top)) + (lost - lost.gather(-1, top))
        growth = (self.p * torch.expm1(self.t)).sum(-1, keepdim=True)
        near = torch.log1p(growth.clamp(-0.5, 0.5))
        # ln sum_k p_k e^(t_k) = ln p_top - ln q_top, where nothing cancels
        far = self.p.gather(-1, top).log() - torch.log_softmax(second, -1).gather(-1, top)
        self.delta = self.t - torch.where(growth.abs() < 0.5, near, far)
        # A small difference of large gaps has lost its digits.
        self.near = (self.delta.abs() < _NEAR) & (self.t.abs() < 4 * _NEAR)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a - b`` rounded, and what the rounding lost (Knuth's two-sum)."""
    rounded = a - b
    minus_b = rounded - a
    return rounded, (a - (rounded - minus_b)) - (b + minus_b)


class CategoricalKL(torch.autograd.Function):
    """(logits_p, logits_q) -> KL(softmax(logits_p) || softmax(logits_q)), shape ``(...,)``.

    Keeps the inputs only, and differentiates once.
    """

    @staticmethod
    def forward(ctx: Any, logits_p: Tensor, logits_q: Tensor) -> Tensor:
        """Sum non-negative terms."""
        ctx.save_for_backward(logits_p, logits_q)
        pair = _Pair(logits_p, logits_q)
        p, delta = pair.p, pair.delta
        series = p * special.second_order(delta.clamp(-_NEAR, _NEAR), _NEAR)
        # For p_k = 0 delta may be infinite, and the term is q_k.
        apart = pair.q - p - torch.where(p == 0, 0, p * delta)
        return torch.where(pair.near, series, apart).sum(-1)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return p_k (sum_j p_j t_j - t_k) and q_k - p_k, times ``grad``."""
        with torch.no_grad():
            grads = _gradients(ctx, grad.unsqueeze(-1))
        return tuple(once_only(grads, (*ctx.saved_tensors, grad), "use torch's kl_div for one"))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits_p, logits_q = ctx.saved_tensors
    pair = _Pair(logits_p, logits_q)
    grad_p = grad_q = None
    if ctx.needs_input_grad[0]:
        weighted = torch.where(pair.p == 0, 0, pair.p * pair.t)
        slope = pair.p * weighted.sum(-1, keepdim=True) - weighted
        grad_p = (grad * slope).to(logits_p.dtype)
    if ctx.needs_input_grad[1]:
        growth = pair.p * torch.expm1(pair.delta.clamp(-_NEAR, _NEAR))
        difference = torch.where(pair.near, growth, pair.q - pair.p)
        grad_q = (grad * difference).to(logits_q.dtype)
    return grad_p, grad_q


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p\,\|\,q)` of the softmax of two logits, the target first.

    Args:
        logits_p: Shape ``(..., C)``, any floating dtype.
        logits_q: The same shape.

    Returns:
        Shape ``(...,)``, at least float32, never negative. In float32 the value and both gradients
        are good to about 1e-6 however close the two are.
    """
    return CategoricalKL.apply(logits_p, logits_q)
