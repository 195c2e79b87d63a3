r"""The Dirichlet KL by ``torch.compile``: two fused functions for what CLIP's cosines come to.

They hold for gaps that are not wide (``REACH``, ``ETA``) and for concentrations above
:math:`e^{12}` in float32, as at the paper's temperature; whether a call's are, forward finds out on
its way. Others go to the eager closed form, of which these are the formulas. Compiling takes half a
minute, once for a process and anew when the number of rows or classes changes for the first time;
so nothing chooses this implementation on its own.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calibclip._kernels import closed_form, special
from calibclip._kernels.common import ETA, N_STATS, POOR, REACH, WHOSE, compute_dtype

# In the column of ``WHOSE``.
_MARK = 2.0

# Up to this |t| the series of ``special``, in plain numbers, which become constants of the code.
_NEAR = 1.0
_SERIES = {dtype: special.economized(_NEAR, dtype) for dtype in (torch.float32, torch.float64)}


def _orders(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^t - 1 and e^t - 1 - t, as ``special.orders`` does."""
    square = t * t
    *lower, series = _SERIES[t.dtype]
    for coefficient in reversed(lower):
        series = series * square + coefficient
    r = series * square + 0.5 * t
    near, growth = t.abs() < _NEAR, torch.exp(t) - 1
    growth = torch.where(near, t / (1 - r), growth)
    return growth, torch.where(near, growth * r, growth - t)


def _forward(
    first: Tensor, second: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(first, second)
    u, v, factor = first.to(dtype), second.to(dtype), scale.to(dtype)
    d = (v - u) * factor
    u_top = u.amax(-1, keepdim=True)
    p = torch.exp((u - u_top) * factor)  # times their sum
    total = p.sum(-1, keepdim=True)
    anchor = (p * d).sum(-1, keepdim=True) / total
    t = d - anchor
    growth, curve = _orders(t)
    low = torch.minimum(u.amin(-1), v.amin(-1)).double() * scale + shift
    u_top, anchor, total = (x.squeeze(-1).double() for x in (u_top, anchor, total))
    eta = torch.log1p((p * growth).sum(-1).double() / total)
    leading = (p * (t * growth - curve)).sum(-1).double() / total
    squares, plain, reach = curve.sum(-1).double(), t.sum(-1).double(), t.abs().amax(-1)

    d0, log_a0 = anchor + eta, u_top * scale + shift + total.log()
    categorical = torch.exp(-eta) * leading - (torch.expm1(-eta) + eta)
    change, change0 = torch.expm1(anchor), torch.expm1(d0)
    level, slope = first.shape[-1] * (change - anchor), change * plain
    second_order = (1 + change) * squares + level + slope
    strength = torch.exp(log_a0 + d0 + log_weight)
    evidence = 0.5 * log_weight.exp() * (second_order - (change0 - d0))
    holds = (reach < REACH) & (anchor.abs() < REACH)
    # Else digits are lost.
    holds &= (eta < ETA) & (eta.abs() <= POOR * categorical)
    holds &= second_order >= 0.1 * (level + slope.abs())
    # What the loop of backward would compute again for every class is kept.
    columns = [anchor, eta, strength, u_top, 1 / total, change0]
    columns += [torch.full_like(d0, _MARK)] * (N_STATS - len(columns))
    stats = torch.stack(columns, -1)
    shape = torch.clamp(torch.where(categorical == 0, 0, strength * categorical), min=0)
    seen = torch.where(holds, low, -math.inf).amin()
    return shape.to(dtype), evidence.clamp(min=0).to(dtype), stats, seen


def _backward(
    grad_shape: Tensor,
    grad_evidence: Tensor,
    first: Tensor,
    second: Tensor,
    stats: Tensor,
    scale: Tensor,
    log_weight: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    dtype = compute_dtype(first, second)
    u, v, factor = first.to(dtype), second.to(dtype), scale.to(dtype)
    kept = stats[:, :6]
    anchor, eta, _, u_top, p_scale, level = kept.to(dtype).split(1, -1)
    half = 0.5 * scale * log_weight.exp()
    by_shape = (grad_shape[:, None].double() * kept[:, 2:3] * scale).to(dtype)
    by_evidence = (grad_evidence[:, None].double() * half).to(dtype)
    delta = (v - u) * factor - anchor - eta
    p = torch.exp((u - u_top) * factor) * p_scale
    growth = _orders(delta)[0]
    slope = level + growth * (1 + level)  # e^d - 1
    difference = p * growth
    grad_first = grad_second = None
    if needs[0]:
        grad_first = (-by_shape * difference - by_evidence * (slope - p * level)).to(first.dtype)
    if needs[1]:
        q = p + difference
        grad_second = by_shape * (q * delta) + by_evidence * (slope - q * level)
        grad_second = grad_second.to(second.dtype)
    return grad_first, grad_second


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True)


def forward(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two parts and what backward needs, as ``closed_form.forward`` does."""
    dtype = compute_dtype(first, second)
    if first.numel() > 0:
        numbers = torch.tensor(scale, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64)
        *results, seen = _compiled(_forward)(first, second, *numbers, log_weight)
        if special.is_large(float(seen), dtype):
            return results[0], results[1], results[2]
    return closed_form.forward(first, second, scale, shift, log_weight)


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
    if first.numel() > 0 and float(stats[0, WHOSE]) == _MARK:
        number = torch.tensor(scale, dtype=torch.float64)
        return _compiled(_backward)(
            grad_shape, grad_evidence, first, second, stats, number, log_weight, needs
        )
    return closed_form.backward(
        grad_shape, grad_evidence, first, second, stats, scale, shift, log_weight, needs
    )
