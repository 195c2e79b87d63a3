r"""The Triton kernels of the forward pass: what a row of both Dirichlets comes to.

``sum_rows`` does all rows as if they were like CLIP's, and marks those that are not;
``finish_rows`` does these once more, and makes the result of everyone's sums.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from calibclip._kernels.common import ETA, N_STATS, REACH
from calibclip._kernels.triton_special import (
    LOG_6,
    expm1,
    log1p,
    second_order,
    small_divergence,
    stirling_divergence,
    weighted_second_order,
)

# What is known of a row, of which some makes room for what backward needs: 0 the largest u, of the
# first classes only unless the row needed more care, 1 the sum of e^(x - its x), 2 an anchor near
# all gaps, 3 the mean of what they differ from it by, if that was summed apart (then ln b0/a0 less
# the anchor), 4 growth (strength w b0), 5 leading (ln a0), 6 the smallest concentration's
# logarithm, 7 whether the row needs more care (whether the gaps are wide), 8 the evidence of all
# classes, and of wide rows 9 the largest v and 10 the sum of e^(y - its y).
STATS: tl.constexpr = tl.constexpr(N_STATS)
# The limits are those of ``common``, but for POOR: here the norm of the gradient is at hand.
# Above this one no Bernoulli number matters, 1/(6 a) being 2e-6, nor does a square of 1/a.
LARGE: tl.constexpr = tl.constexpr(-math.log(6 * 2e-6))
_REACH: tl.constexpr = tl.constexpr(REACH)
_GROWTH: tl.constexpr = tl.constexpr(math.expm1(ETA))


@triton.jit
def load_pair(first, second, row, stride_first, stride_second, columns, C, fill):
    """Return two pieces of a row, with ``fill`` for classes that there are not."""
    mask = columns < C
    u = tl.load(first + row * stride_first + columns, mask=mask, other=fill).to(tl.float32)
    v = tl.load(second + row * stride_second + columns, mask=mask, other=fill).to(tl.float32)
    return u, v, mask


@triton.jit
def aligned(row, stride, C, ALIGN: tl.constexpr):
    """Return where in a matrix a row's wide loads may begin, and at which class that is.

    The classes before it come last, at the places from C on; ``class_at`` undoes that.
    """
    begin = row * stride
    lead = ((ALIGN - begin % ALIGN) % ALIGN).to(tl.int32)
    return tl.multiple_of(begin + lead, ALIGN), tl.where(lead < C, lead, 0)


@triton.jit
def class_at(place, C):
    return tl.where(place < C, place, place - C)


@triton.jit
def sum_rows(
    first,
    second,
    stride_first,
    stride_second,
    log_weight,
    stats,
    C,
    scale,
    shift,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sum a row up, in one sweep, around the mean gap of its first classes."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    log2_scale = scale * 1.4426950408889634
    u, v, mask = load_pair(first, second, row, stride_first, stride_second, lanes, C, 0.0)
    reference = tl.max(tl.where(mask, u, float("-inf")), 0)
    size = tl.where(mask, tl.exp2((u - reference) * log2_scale), 0.0)
    anchor = tl.sum(size * (v - u), 0) / tl.sum(size, 0) * scale

    total_sum = tl.zeros((BLOCK,), tl.float32)
    growth_sum = tl.zeros((BLOCK,), tl.float32)
    leading_sum = tl.zeros((BLOCK,), tl.float32)
    curve_sum = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    size_square = tl.zeros((BLOCK,), tl.float32)
    size_drift = tl.zeros((BLOCK,), tl.float32)
    drift_square = tl.zeros((BLOCK,), tl.float32)
    reach = tl.zeros((BLOCK,), tl.float32)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    begin_first, lead = aligned(row, stride_first, C, ALIGN)
    begin_second, _ = aligned(row, stride_second, C, ALIGN)
    whole = (C - lead) // BLOCK * BLOCK
    for tail in tl.static_range(2):  # whole blocks, then what is left, with a mask
        for start in range(whole * tail, whole + (C - whole) * tail, BLOCK):
            mask = start + lanes < C
            if tail:
                at = class_at(lead + start + lanes, C)
                u = tl.load(first + row * stride_first + at, mask=mask, other=0.0)
                v = tl.load(second + row * stride_second + at, mask=mask, other=0.0)
            else:
                u = tl.load(first + begin_first + start + lanes)
                v = tl.load(second + begin_second + start + lanes)
            u, v = u.to(tl.float32), v.to(tl.float32)
            size = tl.exp2((u - reference) * log2_scale)
            t = (v - u) * scale - anchor
            low = tl.minimum(u, v)
            if tail:
                size, t = tl.where(mask, size, 0.0), tl.where(mask, t, 0.0)
                low = tl.where(mask, low, float("inf"))
            curve = second_order(t)
            drift = size * t
            total_sum += size
            growth_sum += drift + size * curve
            leading_sum += drift * (t + curve) - size * curve
            curve_sum += curve
            plain_sum += t
            size_square += size * size
            size_drift += size * drift
            drift_square += drift * drift
            reach = tl.maximum(reach, tl.abs(t))
            lowest = tl.minimum(lowest, low)
    total = tl.sum(total_sum, 0)
    growth, leading = tl.sum(growth_sum, 0) / total, tl.sum(leading_sum, 0) / total
    curves, plain, spread = tl.sum(curve_sum, 0), tl.sum(plain_sum, 0), tl.max(reach, 0)
    smallest = tl.min(lowest, 0) * scale + shift

    # Over d = anchor + t the sum of e^d - 1 - d follows from that over t, unless digits cancel.
    level, slope = C * second_order(anchor), expm1(anchor) * plain
    over_d = tl.exp(anchor) * curves + level + slope
    special = (over_d < 0.1 * (level + tl.abs(slope))) | (tl.abs(anchor) > _REACH)
    special |= (spread >= _REACH) | (smallest < LARGE)
    special |= (growth >= _GROWTH) | (growth <= -_GROWTH / (1 + _GROWTH))  # |eta| >= ETA
    # Rounding blurs what is left of ln b0/a0, eta. In KL(q || p) its square must not be most of
    # the sum; and p eta not 30 times the norm of p ln(q/p), which is nearly the gradient.
    eta = log1p(tl.where(growth < _GROWTH, growth, 0.0))
    special |= eta * eta > 4 * (tl.exp(-eta) * leading - second_order(-eta))
    of_eta = eta * eta * tl.sum(size_square, 0)
    norm = tl.sum(drift_square, 0) - 2 * eta * tl.sum(size_drift, 0) + of_eta
    special |= of_eta > 900 * norm
    special |= total > 1e7  # the largest u is so far above the first that p is rounded

    out = stats + row * STATS
    tl.store(out, reference.to(tl.float64))
    tl.store(out + 1, total.to(tl.float64))
    # What is not finite of the first has reached the total, of the second the growth.
    tl.store(out + 2, (anchor + total * 0).to(tl.float64))
    tl.store(out + 3, tl.full((), 0.0, tl.float64))
    tl.store(out + 4, growth.to(tl.float64))
    tl.store(out + 5, leading.to(tl.float64))
    tl.store(out + 6, smallest.to(tl.float64))
    tl.store(out + 7, special.to(tl.float64))
    tl.store(out + 8, 0.5 * over_d.to(tl.float64) * tl.exp(tl.load(log_weight).to(tl.float64)))


@triton.jit
def _sum_again(
    first,
    second,
    stride_first,
    stride_second,
    log_w,
    row,
    C,
    scale,
    s,
    shift,
    offset,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Sum up a row with more care: the gap of the class with the largest a_k is the anchor.

    Return what ``sum_rows`` stores, but for the columns 6 and 7, whether the gaps are wide, and
    what is kept of wide rows.
    """
    lanes = tl.arange(0, BLOCK)
    log_w32 = log_w.to(tl.float32)
    u_top = tl.full((BLOCK,), float("-inf"), tl.float32)
    v_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    u_low = tl.full((BLOCK,), float("inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        u, v, mask = load_pair(
            first, second, row, stride_first, stride_second, at, C, float("-inf")
        )
        where = tl.where(u > u_top, start, where)
        u_top, v_max = tl.maximum(u_top, u), tl.maximum(v_max, v)
        u_low = tl.minimum(u_low, tl.where(mask, tl.minimum(u, v), float("inf")))
    top, lane, v_top = tl.max(u_top, 0), tl.argmax(u_top, 0), tl.max(v_max, 0)
    smallest = tl.min(u_low, 0) * scale + shift
    at_top = tl.sum(tl.where(lanes == lane, where, 0), 0) + lane
    v_at = tl.load(second + row * stride_second + at_top).to(tl.float32)
    anchor = (v_at - tl.load(first + row * stride_first + at_top).to(tl.float32)) * scale

    total_sum = tl.zeros((BLOCK,), tl.float32)
    drift_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        u, v, mask = load_pair(first, second, row, stride_first, stride_second, at, C, top)
        size = tl.where(mask, tl.exp((u - top) * scale), 0.0)
        total_sum += size
        drift_sum += size * ((v - u) * scale - anchor)
    total, drift = tl.sum(total_sum, 0), tl.sum(drift_sum, 0)
    mean, p_scale = drift / total, 1 / total

    growth_sum = tl.zeros((BLOCK,), tl.float32)
    leading_sum = tl.zeros((BLOCK,), tl.float32)
    reach = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        u, v, mask = load_pair(first, second, row, stride_first, stride_second, at, C, top)
        t = tl.where(mask, (v - u) * scale - anchor - mean, 0.0)
        p = tl.exp((u - top) * scale) * p_scale
        curve = second_order(t)
        growth_sum += p * curve  # for sum p t = 0
        leading_sum += p * (t * (t + curve) - curve)
        reach = tl.maximum(reach, tl.abs(t))
    growth, leading = tl.sum(growth_sum, 0), tl.sum(leading_sum, 0)
    wide = (tl.max(reach, 0) >= _REACH) | (growth >= _GROWTH)
    beyond, q_total = mean.to(tl.float64), tl.full((), 1.0, tl.float64)
    if wide:
        # Neither e^t nor its inverse may overflow: from both sets of probabilities.
        q_sum = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            at = start + lanes
            u, v, mask = load_pair(first, second, row, stride_first, stride_second, at, C, top)
            q_sum += tl.where(mask, tl.exp((v - v_top) * scale), 0.0)
        q_total = tl.sum(q_sum, 0).to(tl.float64)
        far = (v_top.to(tl.float64) - top) * s + tl.log(q_total / total) - anchor
        near = mean.to(tl.float64) + log1p(growth.to(tl.float64))
        beyond = tl.where(tl.abs(growth) < 0.5, near, far)
        beyond32, q_scale = beyond.to(tl.float32), (1 / q_total).to(tl.float32)
        terms = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            at = start + lanes
            u, v, mask = load_pair(first, second, row, stride_first, stride_second, at, C, top)
            p = tl.exp((u - top) * scale) * p_scale
            q = tl.exp((v - v_top) * scale) * q_scale
            delta = (v - u) * scale - anchor - beyond32
            close = tl.abs(delta) < 1
            series = q * second_order(tl.where(close, -delta, 0.0))
            terms += tl.where(mask, tl.where(close, series, p - q + q * delta), 0.0)
        leading = tl.sum(terms, 0)

    classes = tl.full((), 0.0, tl.float64)
    if smallest < LOG_6:
        wide_sum = tl.zeros((SMALL,), tl.float64)
        for start in range(0, C, SMALL):
            at = start + tl.arange(0, SMALL)
            u, v, mask = load_pair(first, second, row, stride_first, stride_second, at, C, top)
            d = tl.where(mask, (v - u) * scale, 0.0).to(tl.float64)
            log_a = tl.where(mask, u.to(tl.float64) * s + offset, 4.0)
            wide_sum += tl.where(mask, small_divergence(d, log_a, log_w), 0.0)
        classes = tl.sum(wide_sum, 0)
    else:
        class_sum = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            at = start + lanes
            u, v, mask = load_pair(first, second, row, stride_first, stride_second, at, C, top)
            d = tl.where(mask, (v - u) * scale, 0.0)
            log_a = tl.where(mask, u * scale + shift, 4.0)
            term = 0.5 * weighted_second_order(d, log_w32)
            class_sum += tl.where(mask, term + stirling_divergence(d, log_a, log_w32), 0.0)
        classes = tl.sum(class_sum, 0).to(tl.float64)
    # Whatever is not finite has reached one of the two.
    anchor64 = (anchor + (drift * 0 + total * 0)).to(tl.float64)
    growth64, leading64 = growth.to(tl.float64), leading.to(tl.float64)
    top64, total64, v_top64 = top.to(tl.float64), total.to(tl.float64), v_top.to(tl.float64)
    return top64, total64, anchor64, beyond, growth64, leading64, wide, classes, v_top64, q_total


@triton.jit
def finish_rows(
    first,
    second,
    stride_first,
    stride_second,
    log_weight,
    stats,
    shape,
    evidence,
    C,
    scale,
    scale_low,
    shift,
    shift_low,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Make the two parts of a row's sums, in float64; sum it up once more if it needs more care."""
    row = tl.program_id(0).to(tl.int64)
    log_w = tl.load(log_weight).to(tl.float64)
    s = tl.full((), 0.0, tl.float64) + scale + scale_low
    offset = tl.full((), 0.0, tl.float64) + shift + shift_low
    out = stats + row * STATS
    top, total, anchor, mean = tl.load(out), tl.load(out + 1), tl.load(out + 2), tl.load(out + 3)
    growth, leading, smallest = tl.load(out + 4), tl.load(out + 5), tl.load(out + 6)
    classes, wide = tl.load(out + 8), tl.load(out + 7) > 1  # no row is yet
    if tl.load(out + 7) > 0:
        top, total, anchor, mean, growth, leading, wide, classes, v_top, q_total = _sum_again(
            first,
            second,
            stride_first,
            stride_second,
            log_w,
            row,
            C,
            scale,
            s,
            shift,
            offset,
            BLOCK,
            SMALL,
        )
        tl.store(out, top)
        tl.store(out + 1, total)
        tl.store(out + 2, anchor)
        tl.store(out + 9, v_top)
        tl.store(out + 10, q_total)
    eta = tl.where(wide, 0.0, log1p(tl.where(wide, 0.0, growth)))
    beyond = mean + eta
    d0 = anchor + beyond
    log_a0 = top * s + offset + tl.log(total)
    categorical = tl.where(wide, leading, tl.exp(-eta) * leading - second_order(-eta))
    if smallest < LOG_6:  # else the total is not below 6 either
        of_total = small_divergence(d0, log_a0, log_w)
    else:
        of_total = 0.5 * weighted_second_order(d0, log_w) + stirling_divergence(d0, log_a0, log_w)
    strength = tl.exp(log_a0 + d0 + log_w)
    # What is not a number is neither above nor equal to 0, and stays.
    whole = tl.where(categorical <= 0, 0.0, strength * categorical)
    rest = classes - of_total
    rest = tl.where(classes == float("inf"), classes, tl.where(rest < 0, 0.0, rest))
    rest = tl.where(C == 1, 0.0, rest)  # a single class has no divergence
    not_finite = anchor * 0
    tl.store(shape + row, (whole + not_finite).to(tl.float32))
    tl.store(evidence + row, (rest + not_finite).to(tl.float32))
    tl.store(out + 3, beyond)
    tl.store(out + 4, strength)
    tl.store(out + 5, log_a0)
    tl.store(out + 7, wide.to(tl.float64))
