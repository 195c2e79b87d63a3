r"""The Dirichlet KL of a few numbers: in float64, where the textbook functions are exact enough.

For small matrices on a CPU a call costs as many microseconds as it has operations, whatever their
precision. In float64 ``expm1(t) - t`` of a float32 input's gaps keeps eight digits, so that a third
of the operations of ``closed_form`` do. For concentrations so large that the Stirling series ends
with its first term: the evidence part is half the sum of :math:`e^d - 1 - d`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calibclip._kernels import special
from calibclip._kernels.common import N_STATS, WHOSE, compute_dtype

# Numbers up to which float64 is the faster.
_FEW = 1 << 15
# Up to this ln a the rounding of ln(q/p) where all concentrations change alike, twice that of
# float64, is nothing beside the evidence, though b_0 times it is in the result.
_HIGHEST = 45.0
# In the column of ``WHOSE``; what else forward leaves is in the first two.
_MARK = 1.0


def _few(first: Tensor, second: Tensor) -> bool:
    size = first.numel()
    return 0 < size <= _FEW and compute_dtype(first, second) == torch.float32


class _Rows(NamedTuple):
    """Both Dirichlets, each (rows, C) or (rows, 1)."""

    a0: Tensor
    p: Tensor  # a_k / a_0
    d: Tensor  # ln b_k - ln a_k
    anchor: Tensor  # their mean, rounded
    t: Tensor  # d_k - anchor, exactly where all gaps are alike

    @classmethod
    def of(cls, first: Tensor, second: Tensor, scale: float, shift: float) -> _Rows:
        x, y = first.double(), second.double()
        if scale != 1:
            x, y = x * scale, y * scale
        d = y - x
        a = torch.exp(x + shift if shift else x)
        a0 = a.sum(-1, keepdim=True)
        p = a.div_(a0)
        anchor = (p * d).sum(-1, keepdim=True)
        return cls(a0, p, d, anchor, d - anchor)


def forward(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the two parts and what backward needs, as ``closed_form.forward`` does.

    Returns:
        Or nothing: the numbers are too many, or not in the range of this file.
    """
    if not (_few(first, second) and first.device.type == "cpu"):
        return None
    extremes = [float(x) * scale + shift for of in (first, second) for x in torch.aminmax(of)]
    if not (special.is_large(min(extremes), torch.float32) and max(extremes) < _HIGHEST):
        return None
    a0, p, d, anchor, t = _Rows.of(first, second, scale, shift)
    growth = torch.expm1(t).mul_(p).sum(-1, keepdim=True)
    eta, weight = torch.log1p(growth), log_weight.exp()
    d0, delta = anchor + eta, t - eta  # ln b_0 / a_0, ln q_k / p_k
    change = torch.expm1(delta)
    # KL(q || p) = sum_k p_k (delta e^delta - e^delta + 1)
    terms = torch.addcmul(delta - change, delta, change).mul_(p)
    strength = d0.exp().mul_(a0).mul_(weight)  # w b_0
    shape = strength * terms.sum(-1, keepdim=True)
    evidence = torch.expm1(d).sub_(d).sum(-1, keepdim=True) - (torch.expm1(d0) - d0)
    both = torch.cat((shape, evidence.mul_(0.5 * weight)), -1).clamp_(min=0)
    stats = torch.cat((eta, strength, eta.new_full((len(eta), N_STATS - 2), _MARK)), -1)
    return both[:, 0].float(), both[:, 1].float(), stats


def suited(first: Tensor, second: Tensor, stats: Tensor) -> bool:
    """Return whether this file's ``forward`` took the rows."""
    on_cpu = first.device.type == "cpu"
    return on_cpu and _few(first, second) and float(stats[0, WHOSE]) == _MARK


def backward(
    grad_shape: Tensor,
    grad_evidence: Tensor,
    first: Tensor,
    second: Tensor,
    stats: Tensor,
    scale: float,
    shift: float,
    log_weight: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients, as ``closed_form.backward`` does."""
    _, p, d, anchor, t = _Rows.of(first, second, scale, shift)
    eta, strength, _ = stats.split((1, 1, N_STATS - 2), -1)
    delta, growth, growth0 = t.sub_(eta), torch.expm1(d), torch.expm1(anchor + eta)
    by_shape = grad_shape[:, None] * (strength * scale)
    by_evidence = grad_evidence[:, None] * (log_weight.exp() * (0.5 * scale))
    difference = torch.expm1(delta).mul_(p)  # q - p
    grad_first = grad_second = None
    if needs[0]:
        slope = torch.addcmul(growth, p, growth0, value=-1).mul_(by_evidence)
        slope.addcmul_(difference, by_shape).neg_()
        grad_first = slope.to(first.dtype).contiguous()
    if needs[1]:
        q = difference.add_(p)
        slope = torch.addcmul(growth, q, growth0, value=-1).mul_(by_evidence)
        slope.addcmul_(q.mul_(delta), by_shape)
        grad_second = slope.to(second.dtype).contiguous()
    return grad_first, grad_second
