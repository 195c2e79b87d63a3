"""What ``special`` computes, for Triton kernels: of polynomials and ``triton.language`` alone.

``d`` is the gap ``ln b - ln a`` of two concentrations, ``u = 1/b`` and ``v = 1/a``, and results
carry the factor ``w = exp(log_w)``. The functions whose names begin with ``small`` take any
concentrations and are for float64; the others take those of at least 6.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG_6: tl.constexpr = tl.constexpr(math.log(6))


@triton.jit
def second_order(t):
    """Return e^t - 1 - t: by its series for small t, where the difference loses digits."""
    p = 1 / 40320 + t * (1 / 362880 + t * (1 / 3628800))
    p = 1 / 720 + t * (1 / 5040 + t * p)
    p = 0.5 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * p)))
    return tl.where(tl.abs(t) < 0.7, t * t * p, tl.exp(t) - 1 - t)


@triton.jit
def expm1(t):
    return t + second_order(t)


@triton.jit
def log1p(x):
    """Return ln(1 + x) to full relative precision (Kahan)."""
    w = 1 + x
    safe = tl.where(w == 1, 2.0, w)
    return tl.where(w == 1, x, tl.log(safe) * (x / (safe - 1)))


@triton.jit
def weighted_second_order(t, log_w):
    """Return w (e^t - 1 - t), which may overflow only if the product does."""
    near = tl.abs(t) < 1
    w = tl.exp(log_w)
    return tl.where(near, w * second_order(tl.where(near, t, 0.0)), tl.exp(t + log_w) - w * (1 + t))


@triton.jit
def weighted_growth(t, log_w):
    """Return w (e^t - 1)."""
    near = tl.abs(t) < 1
    w = tl.exp(log_w)
    return tl.where(near, w * expm1(tl.where(near, t, 0.0)), tl.exp(t + log_w) - w)


@triton.jit
def stirling_divergence(d, log_a, log_w):
    """Return w times the Bregman divergence of the Stirling series (1/12x - ...), for a, b >= 6."""
    v, u = tl.exp(-log_a), tl.exp(-log_a - d)
    near = tl.abs(d) < 1
    gap = tl.where(near, expm1(tl.where(near, d, 0.0)) * u, v - u)
    v2, u2, uv = v * v, u * u, u * v
    third = 3 * v2 + 2 * uv + u2
    fifth = v2 * (5 * v2 + 4 * uv + 3 * u2) + u2 * (2 * uv + u2)
    return weighted_growth(d, log_w) * gap * (1 / 12 - third / 360 + fifth / 1260)


@triton.jit
def curvature(v):
    """Return x^2 psi_1(x) - x for v = 1/x, x >= 6."""
    v2 = v * v
    return 0.5 + v * (1 / 6 - v2 * (1 / 30 - v2 / 42))


@triton.jit
def slope_ratio(u, v):
    """Return (phi'(b) - phi'(a)) / (1/a - 1/b) for a, b >= 6."""
    u2, v2 = u * u, v * v
    squares = u2 + v2
    return 0.5 + (u + v) * (1 / 12 - squares / 120 + (u2 * squares + v2 * v2) / 252)


@triton.jit
def gap_after(i, d, ratio, u, v):
    """Return ln((b + i) / (a + i)), with u = 1/b, v = 1/a."""
    near = tl.abs(d) < 1
    close = log1p(tl.where(near, ratio, 0.0) / (1 + i * v))
    return tl.where(near, close, d + log1p(i * u) - log1p(i * v))


@triton.jit
def small_divergence(d, log_a, log_w):
    """Return the evidence part of a class with any a and b; for float64."""
    needed = tl.minimum(log_a, log_a + d) < LOG_6
    log_b = log_a + d
    v, u = tl.exp(-log_a), tl.exp(-log_b)
    near = tl.abs(d) < 1
    ratio = expm1(tl.where(near, d, 0.0))
    top = gap_after(6, d, ratio, u, v)
    lifted = log_a + log1p(6 * v)
    total = weighted_second_order(top, log_w) * 0.5 + stirling_divergence(top, lifted, log_w)
    for i in tl.static_range(6):
        total += weighted_second_order(gap_after(i, d, ratio, u, v), log_w)
    b, w = tl.exp(log_b), tl.exp(log_w)
    leading = ((b + 6) * second_order(-top) - b * second_order(-d)) * w
    logs = log1p(6 * u) - log1p(6 * v)
    apart = tl.exp(log_b + log_w) * logs + w * 6 * top
    total += tl.where(near, leading, apart)
    large = 0.5 * weighted_second_order(d, log_w) + stirling_divergence(d, log_a, log_w)
    return tl.where(needed, total, large)


@triton.jit
def small_slope_first(d, log_a, log_w):
    """Return w (b - a) a phi''(a) for any a and b; for float64."""
    a = tl.exp(tl.minimum(log_a, LOG_6))
    v = 1 / (a + 6)
    bent = a * a * (v + v * v * curvature(v)) - a
    for i in tl.static_range(6):
        bent += (a / (a + i)) * (a / (a + i))
    bent = tl.where(log_a < LOG_6, bent, curvature(tl.exp(-log_a)))
    return weighted_growth(d, log_w) * bent


@triton.jit
def small_slope_second(d, log_a, log_w):
    """Return w b (phi'(b) - phi'(a)) for any a and b; for float64."""
    log_b = log_a + d
    needed = tl.minimum(log_a, log_b) < LOG_6
    v, u = tl.exp(-log_a), tl.exp(-log_b)
    near = tl.abs(d) < 1
    top = gap_after(6, d, expm1(tl.where(near, d, 0.0)), u, v)
    log_lifted = log_a + log1p(6 * v)
    factor = slope_ratio(tl.exp(-log_lifted - top), tl.exp(-log_lifted)) / (
        (1 + 6 * v) * (1 + 6 * u)
    )
    for i in tl.static_range(6):
        factor += 1 / ((1 + i * v) * (1 + i * u))
    moved = tl.exp(log_b + log_w) * (top - d)
    change = weighted_growth(d, log_w)
    return tl.where(needed, change * factor + moved, change * slope_ratio(u, v))
