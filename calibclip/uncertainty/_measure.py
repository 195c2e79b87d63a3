"""A number per row of concentrations with its closed-form gradient: what most measures are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calibclip._checks import check_flag, check_floating, describe, wrong
from calibclip.dirichlet import Simplex, simplex


class _Measure(torch.autograd.Function):
    """A number per row with its closed-form gradient; keeps nothing but its input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        log_alpha: Tensor, value: Callable[[Simplex], Tensor], slope: Callable[[Simplex], Tensor]
    ) -> Tensor:
        return value(simplex(log_alpha))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In differentiable operations on the input, so that autograd can go on from here.
        return grads[0].unsqueeze(-1) * ctx.slope(simplex(ctx.saved_tensors[0])), None, None


def measure(
    log_alpha: Tensor,
    value: Callable[[Simplex], Tensor],
    slope: Callable[[Simplex], Tensor],
    normalize: bool = False,
) -> Tensor:
    """Check the arguments of a measure and evaluate it, with its gradient.

    Args:
        log_alpha: What the user gave; half precision becomes float32.
        value: Of a row, ``(...,)``.
        slope: Its derivative in each ``log_alpha``, ``(..., C)``, in differentiable operations.
        normalize: Divide by ln C.

    Returns:
        Shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` is no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.
    """
    check_floating("log_alpha", log_alpha, shape="(..., C)")
    check_flag("normalize", normalize)
    log_alpha = log_alpha.to(torch.promote_types(log_alpha.dtype, torch.float32))
    result: Tensor = _Measure.apply(log_alpha, value, slope)
    return (
        normalized(result, "log_alpha", log_alpha, "pass normalize=False") if normalize else result
    )


def normalized(result: Tensor, argument: str, given: Tensor, remedy: str = "") -> Tensor:
    """Divide the measures of what was given, ``(..., C)``, by ln C, which must not be 0."""
    if given.shape[-1] < 2:
        expected = "at least two classes, for ln C > 0"
        raise ValueError(wrong(argument, expected, describe(given), remedy))
    return result / math.log(given.shape[-1])
