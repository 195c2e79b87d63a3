r"""Objectives that aim at the uncertainty: wrong and certain, or right and uncertain.

Both take the aleatoric uncertainty (AU) of the Dirichlet :math:`\ln\alpha_k = (z_k/s + 1)/T`, and
both fall back to the margin on the side of the decision boundary where they do not apply. The
margin there is at most 0 and the uncertainty part at least 0, so the order of two losses is right
across the boundary.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from calibclip._checks import check_number
from calibclip.attacks.objectives._numbers import at_least_float32, at_least_zero, never_flat
from calibclip.attacks.objectives.classification import margin, misclassified
from calibclip.attacks.objectives.record import Objective
from calibclip.dirichlet import log_concentration
from calibclip.uncertainty import aleatoric_uncertainty

# A class at -infinity is one of no share; this logit has none either, and a finite logarithm.
_NO_SHARE = -1e30


def certainty_when_wrong(
    logits: Tensor, target: Tensor, *, logit_scale: float = 100.0, temperature: float = 0.07
) -> Tensor:
    r"""What `overconfidence` maximises.

    .. math::
        \max_{j \ne y} z_j - z_y \le 0 \text{ while right}, \qquad
        \ln K - \mathrm{AU} \ge 0 \text{ once wrong}

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: ``y``, class indices, shape ``(B,)``, int64.
        logit_scale: s > 0, multiplicative.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``, float32 or float64.

    Example:
        >>> logits = torch.tensor([[25.0, 20.0], [25.0, 20.0]])
        >>> certainty_when_wrong(logits, torch.tensor([0, 1]))
        tensor([-5.0000,  0.0599])
    """
    logits = at_least_float32(logits)
    certainty = math.log(logits.shape[1]) - _aleatoric(logits, logit_scale, temperature)
    wrong = misclassified(logits, target)
    return torch.where(wrong, at_least_zero(certainty), margin(logits, target))


def overconfidence(logit_scale: float = 100.0, temperature: float = 0.07) -> Objective:
    """Return the objective "wrong and certain": cross the boundary, then lose all uncertainty.

    Args:
        logit_scale: Factor s > 0 that the model's logits carry, multiplicative.
        temperature: T > 0.

    Returns:
        The objective, with `certainty_when_wrong` as loss; success is a misclassification.

    Raises:
        TypeError: An option is no number.
        ValueError: An option is not positive.

    Example:
        >>> overconfidence(temperature=0.1).loss.keywords
        {'logit_scale': 100.0, 'temperature': 0.1}
    """
    options = _checked(logit_scale, temperature)
    return Objective(partial(certainty_when_wrong, **options))


def uncertainty_when_right(
    logits: Tensor,
    target: Tensor,
    reference: Tensor | None = None,
    *,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
) -> Tensor:
    r"""What `underconfidence` maximises.

    .. math::
        \mathrm{AU} \ge 0 \text{ while right}, \qquad
        z_y - \max_{j \ne y} z_j \le 0 \text{ while wrong}

    Where the prediction is so certain that the slope of AU underflows, the margin shows the way.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: ``y``, class indices, shape ``(B,)``, int64.
        reference: Not looked at; success is measured against it.
        logit_scale: s > 0, multiplicative.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``, float32 or float64.

    Example:
        >>> logits = torch.tensor([[25.0, 20.0], [25.0, 20.0]])
        >>> uncertainty_when_right(logits, torch.tensor([0, 1]))
        tensor([ 0.6332, -5.0000])
    """
    logits = at_least_float32(logits)
    lead = margin(logits, target)
    uncertainty = at_least_zero(_aleatoric(logits, logit_scale, temperature))
    return torch.where(misclassified(logits, target), -lead, never_flat(uncertainty, lead))


def right_and_less_certain(
    outputs: Tensor,
    target: Tensor,
    reference: Tensor,
    *,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
) -> Tensor:
    """Success of `underconfidence`: still right, and more uncertain than the reference.

    Args:
        outputs: Logits, shape ``(B, K)``.
        target: Class indices, shape ``(B,)``, int64.
        reference: Logits of the clean images, the same shape.
        logit_scale: s > 0, multiplicative.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``, bool.

    Example:
        >>> clean, attacked = torch.tensor([[25.0, 20.0]]), torch.tensor([[25.0, 24.0]])
        >>> right_and_less_certain(attacked, torch.tensor([0]), clean)
        tensor([True])
    """
    before, after = (
        _aleatoric(at_least_float32(logits), logit_scale, temperature)
        for logits in (reference, outputs)
    )
    return ~misclassified(outputs, target) & (after > before)


def underconfidence(logit_scale: float = 100.0, temperature: float = 0.07) -> Objective:
    """Return the objective "right and uncertain": raise the uncertainty, keep the prediction.

    Args:
        logit_scale: Factor s > 0 that the model's logits carry, multiplicative.
        temperature: T > 0.

    Returns:
        The objective, with `uncertainty_when_right` as loss and `right_and_less_certain` as
        success, the latter against the clean outputs.

    Raises:
        TypeError: An option is no number.
        ValueError: An option is not positive.

    Example:
        >>> underconfidence().reference
        'clean'
    """
    options = _checked(logit_scale, temperature)
    return Objective(
        partial(uncertainty_when_right, **options),
        success=partial(right_and_less_certain, **options),
        reference="clean",
    )


def _aleatoric(logits: Tensor, logit_scale: float, temperature: float) -> Tensor:
    """Return AU, (B,), of logits that are float32 or float64; NaN if all of a row are -infinity."""
    absent = (logits == -torch.inf) & (logits.amax(1, keepdim=True) > -torch.inf)
    logits = torch.where(absent, _NO_SHARE, logits)
    log_alpha = log_concentration(logits, temperature, logit_scale=logit_scale)
    return aleatoric_uncertainty(log_alpha)


def _checked(logit_scale: float, temperature: float) -> dict[str, float]:
    return {
        "logit_scale": check_number("logit_scale", logit_scale, above=0),
        "temperature": check_number("temperature", temperature, above=0),
    }
