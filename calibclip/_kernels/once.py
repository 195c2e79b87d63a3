"""Refusing a second derivative, where autograd would silently take one for zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def once_only(
    grads: Iterable[Tensor | None], sources: tuple[Tensor, ...], remedy: str
) -> list[Tensor | None]:
    """Tie gradients computed without a graph to what they depend on, so that using one raises.

    Under ``create_graph`` autograd would take such gradients for constants. (PyTorch's
    ``once_differentiable`` looks at the incoming gradient only, which usually is one.)
    """
    if not torch.is_grad_enabled():
        return list(grads)
    return [g if g is None else _OnceDifferentiable.apply(remedy, g, *sources) for g in grads]


class _OnceDifferentiable(torch.autograd.Function):
    """Hand a gradient on, and refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, remedy: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.remedy = remedy
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise refusal(ctx.remedy)


def refusal(remedy: str) -> RuntimeError:
    """Return the error of a second derivative."""
    return RuntimeError(
        "this divergence can be differentiated once only: expected no create_graph, got a second "
        f"derivative; {remedy}"
    )
