"""Arithmetic that the objectives share: precision, and values that differ from their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

# Far below any slope that matters and far above the smallest float32.
_LEAST_SLOPE = 2.0**-100


def at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32, other logits as they are.

    The gradient of cross-entropy is a probability per class, which float16 rounds to zero long
    before float32 does.

    Args:
        logits: Any shape, any floating dtype.

    Returns:
        The same shape, float32 or float64.

    Example:
        >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def never_flat(loss: Tensor, lead: Tensor) -> Tensor:
    """Return ``loss`` as it is, with 2^-100 times the gradient of ``lead`` added to its own.

    ``lead`` is what ``loss`` grows with: where the slope of the loss underflows, an attack, which
    follows the direction of a gradient and not its length, still knows where to go. An infinite
    lead has no direction to add.

    Args:
        loss: Any shape.
        lead: The same shape.

    Returns:
        The values of ``loss``.

    Example:
        >>> lead = torch.tensor(-200.0, requires_grad=True)
        >>> loss = never_flat(lead.exp(), lead)
        >>> loss.item(), torch.autograd.grad(loss, lead)[0].item() == 2**-100
        (0.0, True)
    """
    # Infinity less infinity would turn the value into NaN.
    lead = torch.where(lead.isfinite(), lead, 0.0)
    return loss + _LEAST_SLOPE * (lead - lead.detach())


def at_least_zero(value: Tensor) -> Tensor:
    """Lift negative values to 0 and keep their gradient, which ``clamp`` would drop.

    Args:
        value: Any shape; never below 0 but for rounding.

    Returns:
        The same shape.

    Example:
        >>> at_least_zero(torch.tensor([-1e-8, 0.5]))
        tensor([0.0000, 0.5000])
    """
    rounded = value.detach()
    return value + (rounded.clamp(min=0) - rounded)
