r"""KL(Dir(a) || Dir(b)) in a form that does not cancel, with its closed-form gradient.

With :math:`x = \ln a,\; y = \ln b,\; p = a/a_0,\; q = b/b_0` the divergence splits exactly into

.. math:: b_0 \, \mathrm{KL}(q \,\|\, p) \;+\; \Big[\sum_k E(b_k, a_k) - E(b_0, a_0)\Big],

the *shape* part, a categorical KL weighted by the second Dirichlet's total evidence, and the
*evidence* part, with :math:`E` the Bregman divergence of :math:`\ln\Gamma(x) - x \ln x + x`
(``special``). Both are non-negative. ``docs/closed-form.md`` derives this.

Inputs are logits ``u`` and ``v`` with ``x = scale * u + shift``: the gap ``y - x`` is formed from
them, where it is exact, and the constant ``shift`` never meets a float32 number it could blur.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from calibclip._kernels import special

# Elements per block of rows. On a CPU a block's temporaries should stay in the cache; elsewhere
# the bound only keeps the temporaries of a huge call small.
_BLOCK = {"cpu": 1 << 17}
_BLOCK_ELSEWHERE = 1 << 26


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices that cut the rows of a matrix into blocks of bounded size."""
    rows, columns = matrix.shape
    size = max(1, _BLOCK.get(matrix.device.type, _BLOCK_ELSEWHERE) // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def compute_dtype(first: Tensor, second: Tensor) -> torch.dtype:
    """Return float32, or float64 as soon as one input is."""
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


class _Extent(NamedTuple):
    """What forward has seen of a block; backward need not look again."""

    gap: float  # bound on |ln b_k - ln a_k|
    smallest: float  # smallest ln a_k, ln b_k less the shift
    spread: float  # bound on |ln q_k - ln p_k|


class _Block:
    """A block of rows of both Dirichlets; every field is (rows, C)."""

    def __init__(self, first: Tensor, second: Tensor, scale: float) -> None:
        dtype = compute_dtype(first, second)
        u, v = first.to(dtype), second.to(dtype)
        self._v, self._scale = v, scale
        self.d = v - u  # ln b_k - ln a_k
        self.x = u  # ln a_k less the shift
        if scale != 1:
            self.d.mul_(scale)
            self.x = u * scale
        self.p = torch.softmax(self.x, -1)  # a_k / a_0

    def second(self) -> tuple[Tensor, Tensor]:
        """Return ``y``, which is ln b_k less the shift, and q, which is b_k / b_0."""
        y = self._v * self._scale
        return y, torch.softmax(y, -1)

    def extent(self, spread: float) -> _Extent:
        """Look at the block, where looking does not stall the device."""
        smallest = min(special.smallest(self.x), special.smallest(self._v) * self._scale)
        return _Extent(special.largest(self.d), smallest, spread)

    def pairs(self, shift: float, extent: _Extent) -> special.Pairs:
        """Return a_k and b_k of every class."""
        return special.Pairs(self.d, self.x, shift, extent.gap, extent.smallest + shift)


class _Totals(NamedTuple):
    """What each row comes to, (rows, 1); all that forward leaves for backward."""

    middle: Tensor  # some gap d in the middle of the row's,
    beyond: Tensor  # and how far d0 = ln b_0 - ln a_0 lies beyond it
    log_a0: Tensor
    strength: Tensor  # w b_0

    def pairs(self) -> special.Pairs:
        """Return a_0 and b_0 of every row."""
        d0 = self.middle + self.beyond
        smallest = special.smallest(self.log_a0, self.log_a0 + d0)
        return special.Pairs(d0, self.log_a0, 0.0, special.largest(d0), smallest)


def _categorical(block: _Block, shift: float, log_weight: Tensor) -> tuple[Tensor, _Totals, float]:
    """Return KL(q || p) of every row, (rows, 1), its totals, and a bound on |ln q - ln p|."""
    d, x, p = block.d, block.x, block.p
    offset = (shift + log_weight).to(d.dtype)
    x_top, p_top = x.amax(-1, keepdim=True), p.amax(-1, keepdim=True)
    log_a0 = x_top + shift - p_top.log()
    # d0 = ln sum_k p_k e^(d_k) is measured from the mean gap, so that small gaps keep their
    # relative precision; with eta = d0 - mean = KL(p || q),
    # KL(q || p) = e^-eta sum_k p_k h(d_k - mean) - (e^-eta - 1 + eta),   h(t) = t e^t - e^t + 1.
    mean = (p * d).sum(-1, keepdim=True)
    t = d - mean
    bound = special.largest(t)
    if bound < special.CLOSE:
        second_order = special.second_order(t, bound)
        growth = t + second_order
        eta = torch.log1p((p * growth).sum(-1, keepdim=True))
        minus_h = torch.addcmul(second_order, growth, t, value=-1, out=second_order)
        leading = -minus_h.mul_(p).sum(-1, keepdim=True)
        reach = special.largest(eta)
        divergence = torch.exp(-eta) * leading - special.second_order(-eta, reach)
        # Not exp(log_b0): rounding a logarithm of size 20 costs a relative 1e-6.
        strength = torch.exp(x_top + offset) * torch.exp(mean + eta) / p_top
        return divergence, _Totals(mean, eta, log_a0, strength), bound + reach
    # Gaps too wide for that: both sets of probabilities are needed, so that neither e^t nor
    # e^-t can overflow. Measured from the gap of the largest class.
    y, q = block.second()
    y_top, q_top = y.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
    d_top = d.gather(-1, p.argmax(-1, keepdim=True))
    excess = (p * torch.expm1(d - d_top)).sum(-1, keepdim=True)
    near = torch.log1p(excess.clamp(-0.5, 0.5))
    far = (y_top - x_top) - (q_top.log() - p_top.log()) - d_top
    from_top = torch.where(excess.abs() < 0.5, near, far)
    delta = (d - d_top) - from_top
    # p h(delta) = q (e^-delta - 1 + delta) = p - q + q delta
    series = special.second_order(-delta.clamp(-1, 1), 1.0).mul_(q)
    terms = torch.where(delta.abs() < 1, series, p - q + q * delta)
    strength = torch.exp(y_top + offset) / q_top
    return terms.sum(-1, keepdim=True), _Totals(d_top, from_top, log_a0, strength), math.inf


def _probability_change(
    block: _Block, middle: Tensor, beyond: Tensor, spread: float
) -> tuple[Tensor, Tensor]:
    """Return ``delta = ln(q / p)`` and ``q - p``, the latter to full relative precision."""
    delta = (block.d - middle).sub_(beyond)
    if spread < special.CLOSE:
        return delta, special.second_order(delta, spread).add_(delta).mul_(block.p)
    _, q = block.second()
    size = torch.expm1(-delta.abs()).neg_().mul_(torch.maximum(block.p, q))
    return delta, torch.copysign(size, delta)


class DirichletKL(torch.autograd.Function):
    """(first, second, scale, shift, log_weight) -> (shape, evidence), each of shape ``(...,)``.

    Keeps nothing of size B×C but the inputs themselves and computes everything again in backward,
    in blocks of rows, so that the peak is one B×C matrix for each gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute both parts, block by block."""
        dtype = compute_dtype(first, second)
        first_rows, second_rows = _as_rows(first), _as_rows(second)
        categorical, classes, *columns = first.new_empty((6, len(first_rows), 1), dtype=dtype)
        totals, extents = _Totals(*columns), []
        for part in row_blocks(first_rows):
            block = _Block(first_rows[part], second_rows[part], scale)
            categorical[part], found, spread = _categorical(block, shift, log_weight)
            for column, values in zip(totals, found, strict=True):
                column[part] = values
            extents.append(block.extent(spread))
            pairs = block.pairs(shift, extents[-1])
            every = special.evidence_divergence(pairs, log_weight.to(dtype))
            classes[part] = every.sum(-1, keepdim=True)
        total = special.evidence_divergence(totals.pairs(), log_weight.to(dtype))
        evidence = torch.where(classes == torch.inf, classes, classes - total)
        shape = totals.strength * categorical
        ctx.save_for_backward(first, second, log_weight, *totals)
        ctx.scale, ctx.shift, ctx.extents = scale, shift, extents
        sizes = first.shape[:-1]
        return shape.clamp_(min=0).view(sizes), evidence.clamp_(min=0).view(sizes)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_shape: Tensor, grad_evidence: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients in both inputs, with ``slope`` of the evidence from ``special``.

        d/dx_k = b_0 (p_k - q_k)  -  [slope(a_k) - p_k slope(a_0)]
        d/dy_k = b_k ln(q_k / p_k)  +  slope(b_k) - q_k slope(b_0)
        """
        first, second, log_weight, *columns = ctx.saved_tensors
        inputs, totals = (_as_rows(first), _as_rows(second)), _Totals(*columns)
        log_weight = log_weight.to(totals.strength.dtype)
        by_evidence = grad_evidence.reshape(-1, 1) * ctx.scale
        by_shape = grad_shape.reshape(-1, 1) * ctx.scale * totals.strength
        grad_first, grad_second = (
            torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if needed else None
            for rows, needed in zip(inputs, ctx.needs_input_grad[:2], strict=True)
        )
        sums = totals.pairs()
        slope_first = special.evidence_slope_first(sums, log_weight)
        slope_second = special.evidence_slope_second(sums, log_weight)
        blocks = row_blocks(inputs[0])
        for part, extent in zip(blocks, ctx.extents, strict=True):
            block = _Block(inputs[0][part], inputs[1][part], ctx.scale)
            delta, change = _probability_change(
                block, totals.middle[part], totals.beyond[part], extent.spread
            )
            pairs = block.pairs(ctx.shift, extent)
            if grad_first is not None:
                every = special.evidence_slope_first(pairs, log_weight)
                every.addcmul_(block.p, slope_first[part], value=-1).mul_(-by_evidence[part])
                grad_first[part] = every.addcmul_(change, by_shape[part], value=-1)
            if grad_second is not None:
                q = block.p + change
                every = special.evidence_slope_second(pairs, log_weight)
                every.addcmul_(q, slope_second[part], value=-1).mul_(by_evidence[part])
                grad_second[part] = every.addcmul_(q.mul_(delta), by_shape[part])
        grads = (g if g is None else g.view(first.shape) for g in (grad_first, grad_second))
        return (*grads, None, None, None)


def _as_rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])
