r"""The Dirichlet KL and its gradient as Triton kernels, one program to a row.

The formulas are those of ``closed_form`` and ``special``. Forward is in ``triton_sums``; backward
computes everything again in one sweep. Rows are independent, there are no atomics, and the host
waits for nothing.

Classes are worked on in float32. The few numbers of a row are in float64, and so is a row in which
some concentration is below 6, where the recurrence of the gamma function is needed. Only core
operations of ``triton.language`` are used, so that ``TRITON_INTERPRET=1`` runs all of it on a CPU.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibclip._kernels.common import N_STATS
from calibclip._kernels.triton_special import (
    LOG_6,
    curvature,
    expm1,
    slope_ratio,
    small_slope_first,
    small_slope_second,
    weighted_growth,
)
from calibclip._kernels.triton_sums import (
    LARGE,
    STATS,
    aligned,
    class_at,
    finish_rows,
    load_pair,
    sum_rows,
)


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
    ALIGN: tl.constexpr,
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
    total, anchor, beyond = tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3)
    strength, log_a0 = tl.load(kept + 4), tl.load(kept + 5)
    smallest, wide = tl.load(kept + 6), tl.load(kept + 7) > 0
    v_top, q_total = tl.load(kept + 9).to(tl.float32), tl.load(kept + 10)
    upstream_shape = tl.load(grad_shape + row).to(tl.float64)
    by_shape = tl.where(upstream_shape == 0, 0.0, upstream_shape * s * strength).to(tl.float32)
    by_evidence = (tl.load(grad_evidence + row).to(tl.float64) * s).to(tl.float32)
    by_evidence = tl.where(C == 1, 0.0, by_evidence)
    anchor32, beyond32 = anchor.to(tl.float32), beyond.to(tl.float32)
    p_scale, q_scale = (1 / total).to(tl.float32), (1 / q_total).to(tl.float32)

    d0 = anchor + beyond
    if smallest < LOG_6:
        total_first = small_slope_first(d0, log_a0, log_w).to(tl.float32)
        total_second = small_slope_second(d0, log_a0, log_w).to(tl.float32)
    else:
        v0, u0 = tl.exp(-log_a0), tl.exp(-log_a0 - d0)
        change0 = weighted_growth(d0, log_w)
        total_first = (change0 * curvature(v0)).to(tl.float32)
        total_second = (change0 * slope_ratio(u0, v0)).to(tl.float32)

    if smallest >= LOG_6:
        begin_first, lead = aligned(row, stride_first, C, ALIGN)
        begin_second, _ = aligned(row, stride_second, C, ALIGN)
        begin, _ = aligned(row, C, C, ALIGN)
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
                d = (v - u) * scale
                p = tl.exp((u - top) * scale) * p_scale
                delta = d - anchor32 - beyond32
                difference = p * expm1(delta)
                q = p + difference
                if wide:
                    q = tl.exp((v - v_top) * scale) * q_scale
                    difference = _wide_difference(p, q, delta)
                slope_first = 0.5 * weighted_growth(d, log_w32)
                slope_second = slope_first
                if smallest < LARGE:
                    v_a, u_b = tl.exp(-u * scale - shift), tl.exp(-v * scale - shift)
                    slope_second = 2 * slope_first * slope_ratio(u_b, v_a)
                    slope_first = 2 * slope_first * curvature(v_a)
                if NEED_FIRST:
                    slope = -by_shape * difference - by_evidence * (slope_first - p * total_first)
                    slope = slope.to(grad_first.dtype.element_ty)
                    if tail:
                        tl.store(grad_first + row * C + at, slope, mask=mask)
                    else:
                        tl.store(grad_first + begin + start + lanes, slope)
                if NEED_SECOND:
                    slope = by_shape * (q * delta) + by_evidence * (slope_second - q * total_second)
                    slope = slope.to(grad_second.dtype.element_ty)
                    if tail:
                        tl.store(grad_second + row * C + at, slope, mask=mask)
                    else:
                        tl.store(grad_second + begin + start + lanes, slope)
    else:
        for start in range(0, C, SMALL):
            columns = start + few
            u, v, mask = load_pair(first, second, row, stride_first, stride_second, columns, C, top)
            d = (v - u) * scale
            p = tl.exp((u - top) * scale) * p_scale
            delta = d - anchor32 - beyond32
            difference = p * expm1(delta)
            q = p + difference
            if wide:
                q = tl.exp((v - v_top) * scale) * q_scale
                difference = _wide_difference(p, q, delta)
            d64, log_a = d.to(tl.float64), u.to(tl.float64) * s + offset
            at = row * C + columns
            if NEED_FIRST:
                slope = small_slope_first(d64, log_a, log_w).to(tl.float32)
                slope = -by_shape * difference - by_evidence * (slope - p * total_first)
                tl.store(grad_first + at, slope.to(grad_first.dtype.element_ty), mask=mask)
            if NEED_SECOND:
                slope = small_slope_second(d64, log_a, log_w).to(tl.float32)
                slope = by_shape * (q * delta) + by_evidence * (slope - q * total_second)
                tl.store(grad_second + at, slope.to(grad_second.dtype.element_ty), mask=mask)


def _launch(n_classes: int, *matrices: Tensor) -> dict[str, int]:
    """Return four classes a thread, as many as one load takes, and what the loads begin with.

    Few warps and registers, so that many rows are worked on at a time.
    """
    n = 2 if n_classes > 1024 else 1
    # Rows that follow one another begin alike in all matrices; of 16 k classes, always well.
    alike = n_classes % 16 and all(matrix.is_contiguous() for matrix in matrices)
    return {"BLOCK": 128 * n, "ALIGN": 8 if alike else 1, "num_warps": n, "maxnreg": 64}


def _launch_backward(n_classes: int, *matrices: Tensor) -> dict[str, int]:
    """Return one class a thread where float64 is at work, and more of rows that begin well."""
    launch = _launch(n_classes, *matrices)
    more = 2 if n_classes % 16 == 0 and n_classes > 1024 else 1
    return launch | {"BLOCK": more * launch["BLOCK"], "SMALL": 32 * launch["num_warps"]}


# One warp a row, since most rows leave it little to do.
_LAUNCH_FINISH = {"BLOCK": 256, "SMALL": 64, "num_warps": 1, "maxnreg": 128}


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
        inputs = first, second, first.stride(0), second.stride(0), log_weight, stats
        with torch.cuda.device_of(first):
            launch = _launch(n_classes, first, second)
            sum_rows[(rows,)](*inputs, n_classes, scale, shift, **launch)
            finish_rows[(rows,)](*inputs, shape, evidence, n_classes, *numbers, **_LAUNCH_FINISH)
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
                **_launch_backward(n_classes, first, second),
            )
    return grads[0], grads[1]


def _unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()
