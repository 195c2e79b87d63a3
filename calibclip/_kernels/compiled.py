r"""The Dirichlet KL by ``torch.compile``: two fused functions for what CLIP's cosines come to.

They hold for gaps that are not wide (``_REACH``, ``_GROWTH``) and for concentrations above
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
from calibclip._kernels.common import N_STATS, compute_dtype

# Up to gaps of this size, and this KL(p || q), the sums around the mean keep their digits.
_REACH, _GROWTH = 16.0, 1.0
# The column of what forward leaves for backward that tells whose it is; others leave it at 0.
_MARK = N_STATS - 2


# Of (e^t - 1 - t) / t^2 for |t| < 1, in plain numbers, which become constants of the compiled code.
_SERIES = {dtype: special.economized(1.0, dtype) for dtype in (torch.float32, torch.float64)}


def _second_order(t: Tensor) -> Tensor:
    *lower, series = _SERIES[t.dtype]
    for coefficient in reversed(lower):
        series = series * t + coefficient
    # exp costs half as much as expm1, and further out it is as good.
    return torch.where(t.abs() < 1, t * t * series, torch.exp(t) - 1 - t)


def _forward(
    first: Tensor, second: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(first, second)
    u, v, factor = first.to(dtype), second.to(dtype), scale.to(dtype)
    d = (v - u) * factor
    u_top = u.amax(-1, keepdim=True)
    # Of classes that share the largest concentration any will do.
    d_top = torch.where(u == u_top, d, -math.inf).amax(-1, keepdim=True)
    p = torch.exp((u - u_top) * factor)
    total = p.sum(-1, keepdim=True)
    p = p / total
    mean = (p * (d - d_top)).sum(-1, keepdim=True)
    t = d - d_top - mean
    curve = _second_order(t)
    growth = (p * curve).sum(-1).double()
    leading = (p * t * (t + curve)).sum(-1).double() - growth
    squares, plain = curve.sum(-1).double(), t.sum(-1).double()
    reach = t.abs().amax(-1)
    low = torch.minimum(u.amin(-1), v.amin(-1)).double() * scale + shift

    u_top, d_top, mean, total = (x.squeeze(-1).double() for x in (u_top, d_top, mean, total))
    eta = torch.log1p(growth)
    centre, beyond = d_top + mean, mean + eta
    d0, log_a0 = d_top + beyond, u_top * scale + shift + total.log()
    categorical = torch.exp(-eta) * leading - (torch.expm1(-eta) + eta)
    change = torch.expm1(centre)
    level, slope = first.shape[-1] * (change - centre), change * plain
    second_order = (1 + change) * squares + level + slope
    strength = torch.exp(log_a0 + d0 + log_weight)
    evidence = 0.5 * log_weight.exp() * (second_order - (torch.expm1(d0) - d0))
    holds = (reach < _REACH) & (growth < _GROWTH) & (centre.abs() < _REACH)
    holds &= second_order >= 0.1 * (level + slope.abs())  # else digits cancel
    nothing = torch.zeros_like(d0)
    columns = [d_top, beyond, strength, u_top, total]
    columns += [nothing] * (_MARK - len(columns)) + [nothing + 1, nothing]
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
    d_top, beyond, strength, u_top, total = stats[:, :5].split(1, -1)
    half = 0.5 * scale * log_weight.exp()
    by_shape = (grad_shape[:, None].double() * strength * scale).to(dtype)
    by_evidence = (grad_evidence[:, None].double() * half).to(dtype)
    level = torch.expm1(d_top + beyond).to(dtype)
    delta = (v - u) * factor - d_top.to(dtype) - beyond.to(dtype)
    p = torch.exp((u - u_top.to(dtype)) * factor) * (1 / total).to(dtype)
    growth = delta + _second_order(delta)  # e^delta - 1
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
    if first.numel() > 0 and stats[0, _MARK].item() == 1:
        number = torch.tensor(scale, dtype=torch.float64)
        return _compiled(_backward)(
            grad_shape, grad_evidence, first, second, stats, number, log_weight, needs
        )
    return closed_form.backward(
        grad_shape, grad_evidence, first, second, stats, scale, shift, log_weight, needs
    )
