"""Objectives that need no label: how far the outputs have moved from where they were.

At the clean image each of these is at its minimum, where the gradient is exactly zero: start at
random.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from calibclip._checks import check_floating, check_number, check_same_shape
from calibclip._kernels import categorical_kl, dirichlet_kl_parts
from calibclip.attacks.objectives._numbers import at_least_float32
from calibclip.attacks.objectives.record import Objective


def never(outputs: Tensor, target: Tensor | None, reference: Tensor | None = None) -> Tensor:
    """Return False for each sample: success of an objective that has no point of success.

    Args:
        outputs: Shape ``(B, ...)``.
        target: Not looked at.
        reference: Not looked at.

    Returns:
        Shape ``(B,)``, bool.

    Example:
        >>> never(torch.zeros(2, 3), None)
        tensor([False, False])
    """
    return torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)


def kl_to_reference(logits: Tensor, target: Tensor | None, reference: Tensor) -> Tensor:
    r"""KL divergence of the prediction from the reference's.

    .. math:: \mathrm{KL}(\mathrm{softmax}(z_{\mathrm{ref}}) \,\|\, \mathrm{softmax}(z))

    Computed without cancellation, so that the first steps away from the reference have a
    direction in float32 too. It differentiates once.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: Not looked at.
        reference: Logits, the same shape. Gradients stop here.

    Returns:
        Shape ``(B,)``, float32 or float64, >= 0.

    Raises:
        TypeError: ``reference`` is not a floating-point tensor.
        ValueError: ``reference`` has another shape or device.

    Example:
        >>> kl_to_reference(torch.tensor([[0.0, 1.0]]), None, torch.tensor([[0.0, 0.0]]))
        tensor([0.1201])

    References:
        Zhang et al. (2019), Theoretically principled trade-off between robustness and accuracy,
        equation 5, https://arxiv.org/abs/1901.08573
    """
    return categorical_kl(_fixed(reference, "logits", logits), at_least_float32(logits))


def embedding_distance(features: Tensor, target: Tensor | None, reference: Tensor) -> Tensor:
    r"""Squared Euclidean distance to the reference's features, :math:`\|f - f_{\mathrm{ref}}\|^2`.

    For a model that returns features: an encoder, or `ZeroShotClassifier.embed`.

    Args:
        features: ``f``, shape ``(B, D)``. Half precision is computed in float32.
        target: Not looked at.
        reference: Features, the same shape. Gradients stop here.

    Returns:
        Shape ``(B,)``, float32 or float64. Summed over the D features.

    Raises:
        TypeError: ``reference`` is not a floating-point tensor.
        ValueError: ``reference`` has another shape or device.

    Example:
        >>> embedding_distance(torch.tensor([[3.0, 4.0]]), None, torch.tensor([[3.0, 2.0]]))
        tensor([4.])

    References:
        Schlarmann et al. (2024), Robust CLIP, https://arxiv.org/abs/2402.12336: the attack inside
        FARE.
    """
    gap = at_least_float32(features) - at_least_float32(_fixed(reference, "features", features))
    return gap.square().sum(1)


def dirichlet_divergence(
    logits: Tensor,
    target: Tensor | None,
    reference: Tensor,
    *,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
) -> Tensor:
    r"""KL divergence of the prediction's Dirichlet from the reference's.

    .. math::
        \mathrm{KL}(\mathrm{Dir}(\alpha) \,\|\, \mathrm{Dir}(\alpha_{\mathrm{ref}})),
        \qquad \ln\alpha_k = \frac{z_k/s + 1}{T}

    As `calibclip.dirichlet_kl` of `calibclip.log_concentration`, but the gaps are formed from the
    logits, before the division by T rounds them. It differentiates once.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: Not looked at.
        reference: Logits, the same shape. Gradients stop here.
        logit_scale: s > 0, multiplicative.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``, float32 or float64, >= 0. NaN with a class at :math:`-\infty`, whose
        concentration would be 0.

    Raises:
        TypeError: ``reference`` is not a floating-point tensor.
        ValueError: ``reference`` has another shape or device.

    Example:
        >>> adv, ref = torch.tensor([[0.25, 0.24]]), torch.tensor([[0.26, 0.22]])
        >>> dirichlet_divergence(adv, None, ref, logit_scale=1.0, temperature=0.5)
        tensor([0.0112])

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997: the alignment term of the training
        objective, here maximised.
    """
    reference = _fixed(reference, "logits", logits)
    shape, evidence = dirichlet_kl_parts(
        at_least_float32(logits),
        reference,
        scale=1 / (logit_scale * temperature),
        shift=1 / temperature,
    )
    return shape + evidence


def dirichlet_drift(logit_scale: float = 100.0, temperature: float = 0.07) -> Objective:
    """Return the objective that maximises `dirichlet_divergence` from the clean outputs.

    Args:
        logit_scale: Factor s > 0 that the model's logits carry, multiplicative.
        temperature: T > 0.

    Returns:
        The objective; success is a misclassification.

    Raises:
        TypeError: An option is no number.
        ValueError: An option is not positive.

    Example:
        >>> dirichlet_drift(temperature=0.1).loss.keywords
        {'logit_scale': 100.0, 'temperature': 0.1}
    """
    options = {
        "logit_scale": check_number("logit_scale", logit_scale, above=0),
        "temperature": check_number("temperature", temperature, above=0),
    }
    return Objective(partial(dirichlet_divergence, **options), reference="clean")


def _fixed(reference: Tensor, name: str, outputs: Tensor) -> Tensor:
    """Check the reference for ``outputs``, called ``name``, and cut it from its graph."""
    check_floating("reference", reference, shape=str(tuple(outputs.shape)))
    check_same_shape("reference", reference, name, outputs)
    return reference.detach()
