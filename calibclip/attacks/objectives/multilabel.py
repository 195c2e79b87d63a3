"""Objectives for images that show several classes at once, or none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calibclip._checks import describe, wrong
from calibclip.attacks.objectives._numbers import at_least_float32, never_flat


def check_multilabel(target: object, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Check labels of 0 or 1 per class.

    The values are looked at on the CPU only: on an accelerator the look would stall the device.

    Args:
        target: Shape ``(B, K)``: bool, integer or floating.
        shape: The ``(B, K)`` of the logits.
        device: The device of the logits.

    Returns:
        ``target`` as it is.

    Raises:
        TypeError: ``target`` is no real tensor.
        ValueError: The shape or device is another, or a value is neither 0 nor 1.

    Example:
        >>> target = torch.tensor([[0, 1, 1]])
        >>> check_multilabel(target, (1, 3), torch.device("cpu")) is target
        True
    """
    expected = f"a tensor of 0 and 1 of shape {shape}, one number per class"
    if not isinstance(target, Tensor) or target.is_complex():
        raise TypeError(wrong("target", expected, describe(target)))
    if target.shape != shape:
        indices = target.dtype == torch.int64 and target.shape == shape[:1]
        remedy = "one-hot class indices, or use an objective for classes" if indices else ""
        raise ValueError(wrong("target", expected, describe(target), remedy))
    if target.device != device:
        raise ValueError(wrong("target", f"a tensor on {device}", f"one on {target.device}"))
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        odd = target[(target != 0) & (target != 1)]
        if len(odd) > 0:
            raise ValueError(wrong("target", "0 or 1 for each class", odd[0].item()))
    return target


def misranked(outputs: Tensor, target: Tensor, reference: Tensor | None = None) -> Tensor:
    """Return whether some absent class scores above some present one.

    Args:
        outputs: Logits, shape ``(B, K)``.
        target: 1 for the classes present, 0 for the absent, shape ``(B, K)``.
        reference: Not looked at.

    Returns:
        Shape ``(B,)``, bool; False where all classes are present or all are absent.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
        >>> misranked(logits, torch.tensor([[1, 1, 0], [1, 0, 1]]))
        tensor([ True, False])
    """
    weakest, strongest = _rivals(outputs, target.bool())
    return strongest > weakest


def multilabel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Binary cross-entropy of each class, summed.

    .. math:: \sum_k \log(1 + e^{d_k}), \qquad d_k = -z_k \text{ if k is present, else } z_k

    As in `cross_entropy`, the slope of a present class does not round to 0 with its probability
    rounding to 1, and where all slopes underflow the direction is kept, by adding
    :math:`2^{-100}` times the gradient of :math:`\log\sum_k e^{d_k}`.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: 1 for the classes present, 0 for the absent, shape ``(B, K)``.

    Returns:
        Shape ``(B,)``, float32 or float64. A sum, not a mean, over the classes.

    Example:
        >>> multilabel_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 0]]))
        tensor([1.3863])
    """
    logits = at_least_float32(logits)
    doubt = torch.where(target.bool(), -logits, logits)
    loss = -F.logsigmoid(-doubt).sum(1)
    # Only doubts below 0 leave a gradient to be rescued; infinite ones would make it NaN.
    lead = torch.logsumexp(doubt.clamp(torch.finfo(doubt.dtype).min, 0.0), 1)
    return never_flat(loss, lead)


def multilabel_margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""Lead of the strongest absent class over the weakest present one.

    .. math:: \max_{k \text{ absent}} z_k - \min_{k \text{ present}} z_k

    Positive exactly when `misranked`. Where no class is present it is the strongest logit, where
    none is absent minus the weakest.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: 1 for the classes present, 0 for the absent, shape ``(B, K)``.

    Returns:
        Shape ``(B,)``, float32 or float64.

    Example:
        >>> multilabel_margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1, 1, 0]]))
        tensor([1.])
    """
    present = target.bool()
    weakest, strongest = _rivals(at_least_float32(logits), present)
    # A constant where there is no such class, so that the other gets the whole gradient.
    weakest = torch.where(present.any(1), weakest, 0.0)
    return torch.where(present.all(1), 0.0, strongest) - weakest


def _rivals(logits: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weakest present logit and the strongest absent, +-infinity if there is none."""
    # min and max, not amin and amax: among tied classes the gradient goes to one.
    weakest = logits.masked_fill(~present, torch.inf).min(1).values
    return weakest, logits.masked_fill(present, -torch.inf).max(1).values
