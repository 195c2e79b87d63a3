r"""KL(Dir(a) || Dir(b)) in a form that does not cancel, with its closed-form gradient.

With :math:`x = \ln a,\; y = \ln b,\; p = a/a_0,\; q = b/b_0` the divergence splits exactly into

.. math:: b_0 \, \mathrm{KL}(q \,\|\, p) \;+\; \Big[\sum_k E(b_k, a_k) - E(b_0, a_0)\Big],

the *shape* part, a categorical KL weighted by the second Dirichlet's total evidence, and the
*evidence* part, with :math:`E` the Bregman divergence of :math:`\ln\Gamma(x) - x \ln x + x`
(``special``). Both are non-negative. ``docs/closed-form.md`` derives this.

Inputs are logits ``u`` and ``v`` with ``x = scale * u + shift``: the gap ``y - x`` is formed from
them, where it is exact, and the constant ``shift`` never meets a float32 number it could blur.

``forward`` and ``backward`` keep nothing of size B×C: backward computes everything again, in blocks
of rows, so that a large call's peak is one B×C matrix for each gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calibclip._kernels import small, special
from calibclip._kernels.common import N_STATS, POOR, compute_dtype, scalar_dtype

# Elements per block of rows, so that the temporaries of a huge call stay small; fewer would cost
# more, since an operation has its price however little it works on.
_BLOCK_ON_CPU, _BLOCK_ELSEWHERE = 1 << 18, 1 << 22


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices that cut the rows of a matrix into blocks of bounded size, at least one."""
    rows, columns = matrix.shape
    size = max(1, (_BLOCK_ON_CPU if matrix.device.type == "cpu" else _BLOCK_ELSEWHERE) // columns)
    for start in range(0, max(1, rows), size):
        yield slice(start, start + size)


class _Extent(NamedTuple):
    """What forward has seen of a block; backward need not look again."""

    gap: float  # bound on |ln b_k - ln a_k|
    spread: float  # bound on |ln q_k - ln p_k|
    smallest: float  # lower bound on ln a_k and ln b_k


class _Block:
    """A block of rows of both Dirichlets; every tensor is (rows, C)."""

    def __init__(self, first: Tensor, second: Tensor, scale: float) -> None:
        dtype = compute_dtype(first, second)
        u, self.v, self.scale = first.to(dtype), second.to(dtype), scale
        self.d = self.v - u  # ln b_k - ln a_k
        self.x = u  # ln a_k less the shift
        if scale != 1:
            self.d.mul_(scale)
            self.x = u * scale
        self.p = torch.softmax(self.x, -1)  # a_k / a_0

    def smallest(self) -> float:
        """Look for the smallest ln a_k, ln b_k less the shift."""
        return min(special.smallest(self.x), special.smallest(self.v) * self.scale)

    def pairs(self, shift: float, extent: _Extent) -> special.Pairs:
        """Return a_k and b_k of every class."""
        return special.Pairs(self.d, self.x, shift, extent.gap, extent.smallest)


class _Sums(NamedTuple):
    """What a block comes to, each (rows, 1).

    The gap d0 = ln b_0 - ln a_0 = ln sum_k p_k e^(d_k) is approached in steps, anchor + mean + eta,
    so that small gaps keep their relative precision: a number near all gaps, the mean of what they
    differ from it by, and what is left, eta = ln(1 + growth).
    """

    anchor: Tensor
    mean: Tensor
    growth: Tensor  # sum_k p_k (e^(t_k) - 1),        t_k = d_k - anchor - mean
    leading: Tensor  # sum_k p_k (t_k e^(t_k) - e^(t_k) + 1)
    plain: Tensor  # sum_k t_k
    squares: Tensor  # sum_k e^(t_k) - 1 - t_k
    log_a0: Tensor  # less the shift
    log_b: Tensor  # a number near ln b_0, less the shift,
    ratio: Tensor  # and what b_0 is of its exponential, less the factor e^eta


def _sum_up(block: _Block, from_top: bool) -> tuple[_Sums, float]:
    """Sum a block up; return also a bound on its |t_k|, infinite if some gaps are too wide.

    The anchor is the mean gap as float32 has it. ``from_top`` takes that of the class with the
    largest a_k, then the mean around it, which costs more and is exact where all probability is in
    one class, or all concentrations change alike.
    """
    d, p = block.d, block.p
    if from_top:
        anchor = d.gather(-1, p.argmax(-1, keepdim=True))
        t = d - anchor
        mean = (p * t).sum(-1, keepdim=True)
        t.sub_(mean)
    else:
        work = p * d
        anchor = work.sum(-1, keepdim=True)
        mean = torch.zeros_like(anchor)
        t = torch.sub(d, anchor, out=work)
    bound = special.largest(t)
    if bound >= special.CLOSE:
        return _sum_up_wide(block), math.inf
    growth, curve = special.orders(t, bound)
    squares = curve.sum(-1, keepdim=True)
    minus_h = torch.addcmul(curve, growth, t, value=-1, out=curve)
    x_top, p_top = block.x.amax(-1, keepdim=True), p.amax(-1, keepdim=True)
    sums = _Sums(
        anchor=anchor,
        mean=mean,
        growth=growth.mul_(p).sum(-1, keepdim=True),
        leading=-minus_h.mul_(p).sum(-1, keepdim=True),
        plain=t.sum(-1, keepdim=True),
        squares=squares,
        log_a0=x_top - p_top.log(),
        log_b=x_top + anchor,
        ratio=torch.exp(mean) / p_top,
    )
    return sums, bound


def _sum_up_wide(block: _Block) -> _Sums:
    """Sum a block up from both sets of probabilities, so that neither e^t nor e^-t can overflow."""
    p, y = block.p, block.v * block.scale
    q = torch.softmax(y, -1)
    p_top, top = p.max(-1, keepdim=True)
    d_top, x_top, log_p_top = block.d.gather(-1, top), block.x.gather(-1, top), p_top.log()
    y_top, q_top = y.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
    t = block.d - d_top
    growth = (p * torch.expm1(t)).sum(-1, keepdim=True)
    near = torch.log1p(growth.clamp(-0.5, 0.5))
    far = (y_top - x_top) - (q_top.log() - log_p_top) - d_top
    beyond = torch.where(growth.abs() < 0.5, near, far)
    delta = t - beyond
    # p (delta e^delta - e^delta + 1) = q (e^-delta - 1 + delta) = p - q + q delta
    series = special.second_order(-delta.clamp(-1, 1), 1.0).mul_(q)
    terms = torch.where(delta.abs() < 1, series, p - q + q * delta)
    nothing = torch.zeros_like(beyond)
    return _Sums(
        anchor=d_top,
        mean=beyond,
        growth=nothing,
        leading=terms.sum(-1, keepdim=True),
        plain=nothing,
        squares=nothing,
        log_a0=x_top - log_p_top,
        log_b=y_top,
        ratio=1 / q_top,
    )


def _sum_blocks(
    first: Tensor, second: Tensor, scale: float, from_top: bool
) -> tuple[_Sums, list[float], list[float]]:
    """Sum all rows up; return also each block's bound, and its smallest ln a_k and ln b_k."""
    parts, bounds, smallest = [], [], []
    for part in row_blocks(first):
        block = _Block(first[part], second[part], scale)
        sums, bound = _sum_up(block, from_top)
        parts.append(sums)
        bounds.append(bound)
        smallest.append(block.smallest())
    # Most calls are a single block, which need not be copied.
    sums = parts[0] if len(parts) == 1 else _Sums(*map(torch.cat, zip(*parts, strict=True)))
    return sums, bounds, smallest


class _Divergence(NamedTuple):
    """What follows from the sums, each (rows, 1) but for ``reach``."""

    eta: Tensor
    centre: Tensor  # anchor + mean
    reach: float  # bound on |eta|, |centre| and |d0|
    categorical: Tensor  # KL(q || p)
    of_centre: Tensor  # e^centre - 1 - centre
    of_d0: Tensor

    @classmethod
    def of(cls, sums: _Sums) -> _Divergence:
        # With h(t) = t e^t - e^t + 1,  KL(q || p) = e^-eta sum_k p_k h(t_k) - (e^-eta - 1 + eta).
        eta, centre = torch.log1p(sums.growth), sums.anchor + sums.mean
        steps = torch.cat((-eta, centre, centre + eta), -1)
        reach = special.largest(steps)
        of_eta, of_centre, of_d0 = special.second_order(steps, reach).split(1, -1)
        categorical = torch.exp(-eta) * sums.leading - of_eta
        return cls(eta, centre, reach, categorical, of_centre, of_d0)

    def is_poor(self) -> bool:
        """Return whether in some row the changes of the probabilities are not told well."""
        return bool((self.eta.abs() > POOR * self.categorical).any())


class _Totals(NamedTuple):
    """What forward leaves for backward, each (rows, 1)."""

    anchor: Tensor
    beyond: Tensor  # d0 - anchor
    log_a0: Tensor
    strength: Tensor  # w b_0

    def pairs(self, extents: list[_Extent]) -> special.Pairs:
        """Return a_0 and b_0 of every row: their gaps and sizes are within those of the classes."""
        gap = max((extent.gap for extent in extents), default=0.0)
        smallest = min((extent.smallest for extent in extents), default=0.0)
        return special.Pairs(self.anchor + self.beyond, self.log_a0, 0.0, gap, smallest)


class _Change(NamedTuple):
    """How the probabilities of a block change, to full relative precision."""

    delta: Tensor  # ln(q / p)
    growth: Tensor | None  # q / p - 1, if it cannot overflow,
    q: Tensor | None  # else q
    difference: Tensor  # q - p

    @classmethod
    def of(cls, block: _Block, totals: _Totals, part: slice, spread: float) -> _Change:
        delta = (block.d - totals.anchor[part]).sub_(totals.beyond[part])
        if spread < special.CLOSE:
            growth = torch.expm1(delta)
            return cls(delta, growth, None, growth * block.p)
        q = torch.softmax(block.v * block.scale, -1)
        size = torch.expm1(-delta.abs()).neg_().mul_(torch.maximum(block.p, q))
        return cls(delta, None, q, torch.copysign(size, delta))


def forward(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shape and the evidence part of every row, and what backward needs of them.

    Args:
        first: Logits of a, ``(rows, C)``.
        second: Logits of b, the same shape.
        scale: Factor of both.
        shift: Added to both.
        log_weight: Logarithm of the factor w of the result, 0-d.

    Returns:
        Two vectors ``(rows,)``, at least float32, and a float64 matrix ``(rows, N_STATS)``.
    """
    few = small.forward(first, second, scale, shift, log_weight)
    if few is not None:
        return few
    dtype = compute_dtype(first, second)
    sums, bounds, smallest = _sum_blocks(first, second, scale, from_top=not special.may_look(first))
    divergence = _Divergence.of(sums)
    if special.may_look(first) and divergence.is_poor():
        sums, bounds, smallest = _sum_blocks(first, second, scale, from_top=True)
        divergence = _Divergence.of(sums)
    eta, centre, reach, categorical, of_centre, of_d0 = divergence
    # Two factors, since rounding a logarithm of size 20 costs a relative 1e-6.
    offset = (shift + log_weight).to(dtype)
    strength = torch.exp(sums.log_b + offset) * (sums.ratio * torch.exp(eta))
    totals = _Totals(sums.anchor, sums.mean + eta, sums.log_a0 + shift, strength)
    extents = [
        _Extent(bound + reach, bound + reach, low + shift)
        for bound, low in zip(bounds, smallest, strict=True)
    ]

    weight = log_weight.to(dtype)
    pairs = totals.pairs(extents)
    evidence = None
    if pairs.large and pairs.close:
        # E is (e^d - 1 - d) / 2 here, and over d = centre + t its sum follows from that over t.
        growth, count = torch.expm1(centre), first.shape[-1]
        level, slope = count * of_centre, growth * sums.plain
        squares = (1 + growth) * sums.squares + level + slope
        if bool((squares >= 0.1 * (level + slope.abs())).all()):  # else digits are lost
            evidence = (0.5 * weight.exp()) * (squares - of_d0)
    if evidence is None:
        classes = torch.empty_like(strength)
        for part, extent in zip(row_blocks(first), extents, strict=True):
            block = _Block(first[part], second[part], scale)
            every = special.evidence_divergence(block.pairs(shift, extent), weight)
            classes[part] = every.sum(-1, keepdim=True)
        evidence = classes - special.evidence_divergence(pairs, weight)
        evidence = torch.where(classes == torch.inf, classes, evidence)
    # Equal predictions stay at 0 even where the evidence itself overflows.
    shape = torch.where(categorical == 0, categorical, strength * categorical)
    stats = _remember(totals, extents, first)
    return shape.clamp_(min=0).squeeze(-1), evidence.clamp_(min=0).squeeze(-1), stats


def _remember(totals: _Totals, extents: list[_Extent], first: Tensor) -> Tensor:
    """Return the columns of ``totals``, then the extent of each row's block."""
    stats = first.new_zeros(len(first), N_STATS, dtype=scalar_dtype(first.device))
    stats[:, : len(totals)] = torch.cat(totals, -1)
    for part, extent in zip(row_blocks(first), extents, strict=True):
        for column, bound in enumerate(extent, start=len(totals)):
            stats[part, column] = bound
    return stats


def _recall(first: Tensor, stats: Tensor, dtype: torch.dtype) -> tuple[_Totals, list[_Extent]]:
    """Undo ``_remember``; on an accelerator, where nothing has been seen, without a look."""
    totals = _Totals(*stats[:, : len(_Totals._fields)].to(dtype).split(1, -1))
    starts = [part.start for part in row_blocks(first)]
    if stats.device.type != "cpu":
        return totals, [_Extent(math.inf, math.inf, -math.inf)] * len(starts)
    bounds = (
        stats[starts, len(_Totals._fields) :][:, : len(_Extent._fields)].tolist()
        if len(first) > 0
        else [[0.0] * 3]
    )
    return totals, [_Extent(*row) for row in bounds]


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
    """Return the gradients in both inputs that are needed, each of its input's dtype.

    With ``slope`` of the evidence from ``special``,

    d/dx_k = b_0 (p_k - q_k)  -  [slope(a_k) - p_k slope(a_0)]
    d/dy_k = b_k ln(q_k / p_k)  +  slope(b_k) - q_k slope(b_0)
    """
    if small.suited(first, second, stats):
        return small.backward(
            grad_shape, grad_evidence, first, second, stats, scale, shift, log_weight, needs
        )
    dtype = compute_dtype(first, second)
    totals, extents = _recall(first, stats, dtype)
    weight = log_weight.to(dtype)
    by_evidence = grad_evidence.reshape(-1, 1) * scale
    by_shape = grad_shape.reshape(-1, 1) * scale * totals.strength
    sums = totals.pairs(extents)
    # For large concentrations both slopes are w (e^(d_k) - 1) / 2, here from e^(d_k - d0) - 1:
    # rounded relative to the row's largest, enough for a term of relative size 1 / alpha_k.
    half = 0.5 * weight.exp()
    level = half * torch.expm1(sums.d) * by_evidence
    rise = level + half * by_evidence
    total_first = special.evidence_slope_first(sums, weight) * by_evidence
    total_second = special.evidence_slope_second(sums, weight) * by_evidence
    grad_first = grad_second = None
    for part, extent in zip(row_blocks(first), extents, strict=True):
        block = _Block(first[part], second[part], scale)
        change = _Change.of(block, totals, part, extent.spread)
        pairs = block.pairs(shift, extent)
        shared = None
        if change.growth is not None and pairs.large:
            shared = change.growth.mul_(rise[part]).add_(level[part])
        if needs[0]:
            if shared is None:
                every = special.evidence_slope_first(pairs, weight).mul_(by_evidence[part])
            else:
                every = shared.clone() if needs[1] else shared
            every.addcmul_(block.p, total_first[part], value=-1)
            every.addcmul_(change.difference, by_shape[part])
            grad_first = _stored(grad_first, part, every.neg_(), first)
        if needs[1]:
            q = change.difference.add_(block.p) if change.q is None else change.q
            if shared is None:
                every = special.evidence_slope_second(pairs, weight).mul_(by_evidence[part])
            else:
                every = shared
            every.addcmul_(q, total_second[part], value=-1)
            every.addcmul_(q.mul_(change.delta), by_shape[part])
            grad_second = _stored(grad_second, part, every, second)
    return grad_first, grad_second


def _stored(gradient: Tensor | None, part: slice, values: Tensor, like: Tensor) -> Tensor:
    """Return the gradient with a block's values in it; a single block's are the gradient."""
    if len(values) == len(like):
        return values.to(like.dtype).contiguous()
    if gradient is None:
        gradient = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    gradient[part] = values
    return gradient
