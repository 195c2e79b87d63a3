"""What an attack maximises: one number per sample, from logits and target.

To add an objective, write a function ``(logits, target) -> (B,)`` that grows as the prediction
moves away from the target, and give it a name in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from calibclip._checks import check_choice, describe, wrong

Objective = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32, other logits as they are.

    The gradient of cross-entropy is a probability per class, which float16 rounds to zero long
    before float32 does.
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross-entropy :math:`\log \sum_j e^{z_j} - z_y`.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: ``y``, class indices, shape ``(B,)``, int64.

    Returns:
        Shape ``(B,)``, float32 or float64.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])
    """
    return F.cross_entropy(at_least_float32(logits), target, reduction="none")


def margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""Lead of the best other class, :math:`\max_{j \ne y} z_j - z_y`; positive when fooled.

    Unlike cross-entropy its gradient does not vanish for a confident prediction.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: ``y``, class indices, shape ``(B,)``, int64.

    Returns:
        Shape ``(B,)``, float32 or float64.

    Example:
        >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([-2.])

    References:
        Carlini and Wagner (2017), Towards evaluating the robustness of neural networks,
        objective f6 for the true class in place of the target's, without the hinge, and maximised,
        https://arxiv.org/abs/1608.04644
    """
    logits = at_least_float32(logits)
    own = target.unsqueeze(1)
    # max, not amax: among tied classes the gradient goes to one instead of being shared.
    best_other = logits.scatter(1, own, -torch.inf).max(dim=1).values
    return best_other - logits.gather(1, own).squeeze(1)


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin}


def resolve_objective(objective: str | Objective) -> Objective:
    """Return the function for a name in `OBJECTIVES`, or a callable as it is.

    Raises:
        TypeError: ``objective`` is neither a string nor callable.
        ValueError: The name is unknown.

    Example:
        >>> resolve_objective("margin") is margin
        True
    """
    if isinstance(objective, str):
        check_choice("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]
    if not callable(objective):
        raise TypeError(
            wrong("objective", "a name or a callable (logits, target) -> (B,)", describe(objective))
        )
    return objective
