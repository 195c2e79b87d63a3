r"""The Dirichlet KL and its gradient as Triton kernels, one program to a row.

The formulas are those of ``closed_form`` and ``special``. Forward sweeps over a row three times, of
which the later ones find it in the cache: for the class with the largest concentration, for the
mean of the gaps, and for the sums around it; a second kernel makes the result of many rows' sums.
Backward computes everything again in one sweep. Rows are independent, there are no atomics, and the
host waits for nothing.

Classes are worked on in float32. The few numbers of a row are in float64, and so is a row in which
some concentration is below 6, where the recurrence of the gamma function is needed. Only core
operations of ``triton.language`` are used, so that ``TRITON_INTERPRET=1`` runs all of it on a CPU.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibclip._kernels.common import ETA, N_STATS, REACH
from calibclip._kernels.triton_special import (
    LOG_6,
    curvature,
    expm1,
    log1p,
    second_order,
    slope_ratio,
    small_divergence,
    small_slope_first,
    small_slope_second,
    stirling_divergence,
    weighted_growth,
    weighted_second_order,
)

# The sums of a row, of which some make room for what backward needs: 0 the largest u, 1 the sum of
# e^(x - its x), 2 the gap d there, 3 the mean of the other gaps around it (then ln b0/a0 less that
# gap), 4 growth (strength w b0), 5 leading (ln a0), 6 the smallest concentration's logarithm,
# 7 whether the gaps are wide, 8 the evidence of all classes, and of wide rows 9 the largest v and
# 10 the sum of e^(y - its y).
STATS: tl.constexpr = tl.constexpr(N_STATS)
# Above it no Bernoulli number matters in float32, nor does a square of 1/a.
_LARGE: tl.constexpr = tl.constexpr(-math.log(8 * 2**-23) - math.log(6))
_REACH: tl.constexpr = tl.constexpr(REACH)
_GROWTH: tl.constexpr = tl.constexpr(math.expm1(ETA))


@triton.jit
def _load(first, second, row, stride_first, stride_second, columns, C, fill):
    """Return two pieces of a row, with ``fill`` for classes that there are not."""
    mask = columns < C
    u = tl.load(first + row * stride_first + columns, mask=mask, other=fill).to(tl.float32)
    v = tl.load(second + row * stride_second + columns, mask=mask, other=fill).to(tl.float32)
    return u, v, mask


@triton.jit
def _sum_rows(
    first,
    second,
    stride_first,
    stride_second,
    log_weight,
    stats,
    C,
    scale,
    scale_low,
    shift,
    shift_low,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Sum a row up; three sweeps, of which the later ones find the row in the cache."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    u_top = tl.full((BLOCK,), float("-inf"), tl.float32)
    u_low = tl.full((BLOCK,), float("inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, C, BLOCK):
        mask = start + lanes < C
        u = tl.load(first + row * stride_first + start + lanes, mask=mask, other=float("-inf"))
        u = u.to(tl.float32)
        where = tl.where(u > u_top, start, where)
        u_top = tl.maximum(u_top, u)
        u_low = tl.minimum(u_low, tl.where(mask, u, float("inf")))
    top, lane = tl.max(u_top, 0), tl.argmax(u_top, 0)
    at = tl.sum(tl.where(lanes == lane, where, 0), 0) + lane
    v_at = tl.load(second + row * stride_second + at).to(tl.float32)
    gap_top = (v_at - tl.load(first + row * stride_first + at).to(tl.float32)) * scale
    log2_scale = scale * 1.4426950408889634

    total_sum = tl.zeros((BLOCK,), tl.float32)
    drift_sum = tl.zeros((BLOCK,), tl.float32)
    v_low = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, C, BLOCK):
        u, v, mask = _load(first, second, row, stride_first, stride_second, start + lanes, C, top)
        size = tl.where(mask, tl.exp2((u - top) * log2_scale), 0.0)
        total_sum += size
        drift_sum += size * ((v - u) * scale - gap_top)
        v_low = tl.minimum(v_low, tl.where(mask, v, float("inf")))
    total, drift = tl.sum(total_sum, 0), tl.sum(drift_sum, 0)
    mean, p_scale = drift / total, 1 / total
    smallest = tl.minimum(tl.min(u_low, 0), tl.min(v_low, 0)) * scale + shift

    growth_sum = tl.zeros((BLOCK,), tl.float32)
    leading_sum = tl.zeros((BLOCK,), tl.float32)
    squares_sum = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    reach = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        u, v, mask = _load(first, second, row, stride_first, stride_second, start + lanes, C, top)
        t = tl.where(mask, (v - u) * scale - gap_top - mean, 0.0)
        p = tl.exp2((u - top) * log2_scale) * p_scale  # of no class, times t = 0
        curve = second_order(t)
        growth_sum += p * curve
        leading_sum += p * t * (t + curve)
        squares_sum += curve
        plain_sum += t
        reach = tl.maximum(reach, tl.abs(t))
    growth = tl.sum(growth_sum, 0)  # for sum p t = 0
    leading = tl.sum(leading_sum, 0) - growth
    squares, plain, spread = tl.sum(squares_sum, 0), tl.sum(plain_sum, 0), tl.max(reach, 0)

    # Over d = centre + t the sum of e^d - 1 - d follows from that over t, unless digits cancel.
    centre = gap_top + mean
    change = expm1(centre)
    level, slope = C * second_order(centre), change * plain
    over_d = (1 + change) * squares + level + slope
    cancels = (over_d < 0.1 * (level + tl.abs(slope))) | (tl.abs(centre) > _REACH)

    wide = (spread >= _REACH) | (growth >= _GROWTH)
    out = stats + row * STATS
    tl.store(out, top.to(tl.float64))
    tl.store(out + 1, total.to(tl.float64))
    # Whatever is not finite has reached one of the two.
    tl.store(out + 2, (gap_top + (drift * 0 + total * 0)).to(tl.float64))
    tl.store(out + 3, mean.to(tl.float64))
    tl.store(out + 4, growth.to(tl.float64))
    tl.store(out + 5, leading.to(tl.float64))
    tl.store(out + 6, smallest.to(tl.float64))
    tl.store(out + 7, wide.to(tl.float64))
    tl.store(out + 8, 0.5 * over_d.to(tl.float64) * tl.exp(tl.load(log_weight).to(tl.float64)))
    if cancels | wide | (smallest < _LARGE):
        _sum_special_row(
            first,
            second,
            stride_first,
            stride_second,
            log_weight,
            out,
            row,
            C,
            top,
            total,
            gap_top,
            growth,
            mean,
            smallest,
            wide,
            scale,
            scale_low,
            shift,
            shift_low,
            SMALL,
        )


@triton.jit
def _sum_special_row(
    first,
    second,
    stride_first,
    stride_second,
    log_weight,
    out,
    row,
    C,
    top,
    total,
    gap_top,
    growth,
    mean,
    smallest,
    wide,
    scale,
    scale_low,
    shift,
    shift_low,
    SMALL: tl.constexpr,
):
    """Sum up once more what the sums around the mean do not tell well enough."""
    lanes = tl.arange(0, SMALL)
    log_w = tl.load(log_weight).to(tl.float64)
    log_w32 = log_w.to(tl.float32)
    s = tl.full((), 0.0, tl.float64) + scale + scale_low
    offset = tl.full((), 0.0, tl.float64) + shift + shift_low
    if wide:
        # Neither e^t nor its inverse may overflow: from both sets of probabilities.
        v_max = tl.full((SMALL,), float("-inf"), tl.float32)
        for start in range(0, C, SMALL):
            u, v, mask = _load(
                first, second, row, stride_first, stride_second, start + lanes, C, top
            )
            v_max = tl.maximum(v_max, tl.where(mask, v, float("-inf")))
        v_top = tl.max(v_max, 0)
        q_sum = tl.zeros((SMALL,), tl.float32)
        for start in range(0, C, SMALL):
            u, v, mask = _load(
                first, second, row, stride_first, stride_second, start + lanes, C, top
            )
            q_sum += tl.where(mask, tl.exp((v - v_top) * scale), 0.0)
        q_total = tl.sum(q_sum, 0).to(tl.float64)
        far = (v_top.to(tl.float64) - top) * s + tl.log(q_total / total) - gap_top
        near = mean.to(tl.float64) + log1p(growth.to(tl.float64))
        beyond = tl.where(tl.abs(growth) < 0.5, near, far)
        beyond32, p_scale, q_scale = beyond.to(tl.float32), 1 / total, (1 / q_total).to(tl.float32)
        terms = tl.zeros((SMALL,), tl.float32)
        for start in range(0, C, SMALL):
            u, v, mask = _load(
                first, second, row, stride_first, stride_second, start + lanes, C, top
            )
            p = tl.exp((u - top) * scale) * p_scale
            q = tl.exp((v - v_top) * scale) * q_scale
            delta = (v - u) * scale - gap_top - beyond32
            close = tl.abs(delta) < 1
            series = q * second_order(tl.where(close, -delta, 0.0))
            terms += tl.where(mask, tl.where(close, series, p - q + q * delta), 0.0)
        tl.store(out + 3, beyond)
        tl.store(out + 5, tl.sum(terms, 0).to(tl.float64))
        tl.store(out + 9, v_top.to(tl.float64))
        tl.store(out + 10, q_total)
    if smallest < LOG_6:
        wide_sum = tl.zeros((SMALL,), tl.float64)
        for start in range(0, C, SMALL):
            u, v, mask = _load(
                first, second, row, stride_first, stride_second, start + lanes, C, top
            )
            d = tl.where(mask, (v - u) * scale, 0.0).to(tl.float64)
            log_a = tl.where(mask, u.to(tl.float64) * s + offset, 4.0)
            wide_sum += tl.where(mask, small_divergence(d, log_a, log_w), 0.0)
        tl.store(out + 8, tl.sum(wide_sum, 0))
    else:
        class_sum = tl.zeros((SMALL,), tl.float32)
        for start in range(0, C, SMALL):
            u, v, mask = _load(
                first, second, row, stride_first, stride_second, start + lanes, C, top
            )
            d = tl.where(mask, (v - u) * scale, 0.0)
            log_a = tl.where(mask, u * scale + shift, 4.0)
            term = 0.5 * weighted_second_order(d, log_w32)
            class_sum += tl.where(mask, term + stirling_divergence(d, log_a, log_w32), 0.0)
        tl.store(out + 8, tl.sum(class_sum, 0).to(tl.float64))


@triton.jit
def _finish(
    stats,
    log_weight,
    shape,
    evidence,
    rows,
    C,
    scale,
    scale_low,
    shift,
    shift_low,
    BLOCK: tl.constexpr,
):
    """Make the two parts of the sums of many rows, in float64."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    log_w = tl.load(log_weight).to(tl.float64)
    s = tl.full((), 0.0, tl.float64) + scale + scale_low
    offset = tl.full((), 0.0, tl.float64) + shift + shift_low
    out = stats + row * STATS
    top = tl.load(out, mask=mask, other=0.0)
    total = tl.load(out + 1, mask=mask, other=1.0)
    gap_top = tl.load(out + 2, mask=mask, other=0.0)
    mean = tl.load(out + 3, mask=mask, other=0.0)
    growth = tl.load(out + 4, mask=mask, other=0.0)
    leading = tl.load(out + 5, mask=mask, other=0.0)
    smallest = tl.load(out + 6, mask=mask, other=100.0)
    wide = tl.load(out + 7, mask=mask, other=0.0) > 0
    classes = tl.load(out + 8, mask=mask, other=0.0)
    eta = tl.where(wide, 0.0, log1p(tl.where(wide, 0.0, growth)))
    beyond = mean + eta
    d0 = gap_top + beyond
    log_a0 = top * s + offset + tl.log(total)
    categorical = tl.where(wide, leading, tl.exp(-eta) * leading - second_order(-eta))
    of_total = 0.5 * weighted_second_order(d0, log_w) + stirling_divergence(d0, log_a0, log_w)
    # Without classes below 6 the total is not below 6 either.
    if tl.min(smallest, 0) < LOG_6:
        of_total = tl.where(smallest < LOG_6, small_divergence(d0, log_a0, log_w), of_total)
    strength = tl.exp(log_a0 + d0 + log_w)
    # What is not a number is neither above nor equal to 0, and stays.
    whole = tl.where(categorical <= 0, 0.0, strength * categorical)
    rest = classes - of_total
    rest = tl.where(classes == float("inf"), classes, tl.where(rest < 0, 0.0, rest))
    rest = tl.where(C == 1, 0.0, rest)  # a single class has no divergence
    not_finite = gap_top * 0
    tl.store(shape + row, (whole + not_finite).to(tl.float32), mask=mask)
    tl.store(evidence + row, (rest + not_finite).to(tl.float32), mask=mask)
    tl.store(out + 3, beyond, mask=mask)
    tl.store(out + 4, strength, mask=mask)
    tl.store(out + 5, log_a0, mask=mask)


@triton.jit
def _wide_difference(p, q, delta):
    """Return q - p of any two probabilities with delta = ln(q/p)."""
    size = -expm1(-tl.abs(delta)) * tl.maximum(p, q)
    return tl.where(delta < 0, -size, size)


@triton.jit
def _backward(
    first,
    second,
    stride_first,
    stride_second,
    log_weight,
    grad_shape,
    grad_evidence,
    stats,
    grad_first,
    grad_second,
    C,
    scale,
    scale_low,
    shift,
    shift_low,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    NEED_FIRST: tl.constexpr,
    NEED_SECOND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes, few = tl.arange(0, BLOCK), tl.arange(0, SMALL)
    log_w = tl.load(log_weight).to(tl.float64)
    log_w32 = log_w.to(tl.float32)
    s = tl.full((), 0.0, tl.float64) + scale + scale_low
    offset = tl.full((), 0.0, tl.float64) + shift + shift_low
    kept = stats + row * STATS
    top = tl.load(kept).to(tl.float32)
    total, gap_top, beyond = tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3)
    strength, log_a0 = tl.load(kept + 4), tl.load(kept + 5)
    smallest, wide = tl.load(kept + 6), tl.load(kept + 7) > 0
    v_top, q_total = tl.load(kept + 9).to(tl.float32), tl.load(kept + 10)
    upstream_shape = tl.load(grad_shape + row).to(tl.float64)
    by_shape = tl.where(upstream_shape == 0, 0.0, upstream_shape * s * strength).to(tl.float32)
    by_evidence = (tl.load(grad_evidence + row).to(tl.float64) * s).to(tl.float32)
    by_evidence = tl.where(C == 1, 0.0, by_evidence)
    gap_top32, beyond32 = gap_top.to(tl.float32), beyond.to(tl.float32)
    p_scale, q_scale = (1 / total).to(tl.float32), (1 / q_total).to(tl.float32)

    d0 = gap_top + beyond
    if smallest < LOG_6:
        total_first = small_slope_first(d0, log_a0, log_w).to(tl.float32)
        total_second = small_slope_second(d0, log_a0, log_w).to(tl.float32)
    else:
        v0, u0 = tl.exp(-log_a0), tl.exp(-log_a0 - d0)
        change0 = weighted_growth(d0, log_w)
        total_first = (change0 * curvature(v0)).to(tl.float32)
        total_second = (change0 * slope_ratio(u0, v0)).to(tl.float32)

    if smallest >= LOG_6:
        for start in range(0, C, BLOCK):
            columns = start + lanes
            u, v, mask = _load(first, second, row, stride_first, stride_second, columns, C, top)
            d = (v - u) * scale
            p = tl.exp((u - top) * scale) * p_scale
            delta = d - gap_top32 - beyond32
            difference = p * expm1(delta)
            if wide:
                difference = _wide_difference(p, tl.exp((v - v_top) * scale) * q_scale, delta)
            slope_first = 0.5 * weighted_growth(d, log_w32)
            slope_second = slope_first
            if smallest < _LARGE:
                v_a, u_b = tl.exp(-u * scale - shift), tl.exp(-v * scale - shift)
                slope_second = 2 * slope_first * slope_ratio(u_b, v_a)
                slope_first = 2 * slope_first * curvature(v_a)
            at = row * C + columns
            if NEED_FIRST:
                slope = -by_shape * difference - by_evidence * (slope_first - p * total_first)
                tl.store(grad_first + at, slope.to(grad_first.dtype.element_ty), mask=mask)
            if NEED_SECOND:
                q = p + difference
                slope = by_shape * (q * delta) + by_evidence * (slope_second - q * total_second)
                tl.store(grad_second + at, slope.to(grad_second.dtype.element_ty), mask=mask)
    else:
        for start in range(0, C, SMALL):
            columns = start + few
            u, v, mask = _load(first, second, row, stride_first, stride_second, columns, C, top)
            d = (v - u) * scale
            p = tl.exp((u - top) * scale) * p_scale
            delta = d - gap_top32 - beyond32
            difference = p * expm1(delta)
            if wide:
                difference = _wide_difference(p, tl.exp((v - v_top) * scale) * q_scale, delta)
            d64, log_a = d.to(tl.float64), u.to(tl.float64) * s + offset
            at = row * C + columns
            if NEED_FIRST:
                slope = small_slope_first(d64, log_a, log_w).to(tl.float32)
                slope = -by_shape * difference - by_evidence * (slope - p * total_first)
                tl.store(grad_first + at, slope.to(grad_first.dtype.element_ty), mask=mask)
            if NEED_SECOND:
                q = p + difference
                slope = small_slope_second(d64, log_a, log_w).to(tl.float32)
                slope = by_shape * (q * delta) + by_evidence * (slope - q * total_second)
                tl.store(grad_second + at, slope.to(grad_second.dtype.element_ty), mask=mask)


def _launch(n_classes: int) -> dict[str, int]:
    """Return four classes a thread, as many as one load takes; one where float64 is at work.

    Few registers, so that many rows are worked on at a time; they spill where float64 is at work.
    """
    n = min(16, max(1, triton.next_power_of_2(n_classes) // 1024))
    return {"BLOCK": 128 * n, "SMALL": 32 * n, "num_warps": n, "maxnreg": 64}


@lru_cache(maxsize=64)
def _two_floats(number: float) -> tuple[float, float]:
    """Split a number into float32s, since Triton passes no wider ones."""
    high = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


def forward(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both parts ``(rows,)`` and what backward needs ``(rows, N_STATS)``."""
    rows, n_classes = first.shape
    first, second = _unit_columns(first), _unit_columns(second)
    shape = torch.empty(rows, dtype=torch.float32, device=first.device)
    evidence = torch.empty_like(shape)
    stats = torch.empty(rows, N_STATS, dtype=torch.float64, device=first.device)
    if rows > 0:
        numbers = *_two_floats(scale), *_two_floats(shift)
        strides = first.stride(0), second.stride(0)
        launch = _launch(n_classes)
        with torch.cuda.device_of(first):
            _sum_rows[(rows,)](
                first, second, *strides, log_weight, stats, n_classes, *numbers, **launch
            )
            _finish[(triton.cdiv(rows, 32),)](
                stats, log_weight, shape, evidence, rows, n_classes, *numbers, BLOCK=32, num_warps=1
            )
    return shape, evidence, stats


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
    """Return the gradients that are needed, each contiguous and of its input's dtype."""
    rows, n_classes = first.shape
    pairs = zip((first, second), needs, strict=True)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else None for x, n in pairs]
    first, second = _unit_columns(first), _unit_columns(second)
    if rows > 0 and any(needs):
        outputs = [first if grad is None else grad for grad in grads]  # not used if not needed
        upstream = grad_shape.contiguous(), grad_evidence.contiguous()
        with torch.cuda.device_of(first):
            _backward[(rows,)](
                first,
                second,
                first.stride(0),
                second.stride(0),
                log_weight,
                *upstream,
                stats,
                *outputs,
                n_classes,
                *_two_floats(scale),
                *_two_floats(shift),
                NEED_FIRST=needs[0],
                NEED_SECOND=needs[1],
                **_launch(n_classes),
            )
    return grads[0], grads[1]


def _unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()
