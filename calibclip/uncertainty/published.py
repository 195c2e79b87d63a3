"""What the paper's published code evaluates, where it is not what the paper defines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibclip._checks import check_floating
from calibclip.dirichlet import simplex
from calibclip.uncertainty._measure import normalized
from calibclip.uncertainty.entropies import aleatoric_uncertainty

# What it adds: to alpha, and to p inside the logarithm.
_ALPHA_OFFSET, _PROB_OFFSET = 1e-6, 1e-12


def published_log_concentration(logits: Tensor) -> Tensor:
    r"""The concentrations on which the paper's published code *evaluates* uncertainty.

    .. math:: \alpha_k = 10^{-6} + e^{\mathrm{softplus}(z_k)} = 1 + 10^{-6} + e^{z_k}

    They are not those it trains, `calibclip.log_concentration`: the slope is that of the scaled
    logits, about 100 per unit of cosine instead of 14, and one is added.

    Args:
        logits: CLIP's scaled logits z, shape ``(..., C)``.

    Returns:
        ``log_alpha``, shape ``(..., C)``, float32 or float64.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: ``logits`` has no dimension or no class.

    Example:
        >>> published_log_concentration(torch.tensor([25.0, 0.0]))
        tensor([25.0000,  0.6931])

    References:
        The code of Lu et al. (2025), https://github.com/VivienLu/UCAT, ``validate`` in main.py.
    """
    check_floating("logits", logits, shape="(..., C)")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logaddexp(logits, logits.new_tensor(math.log1p(_ALPHA_OFFSET)))


def published_aleatoric_uncertainty(logits: Tensor) -> Tensor:
    r"""The "AU" that the paper's published code reports.

    `aleatoric_uncertainty` divided by :math:`\ln C`, of `published_log_concentration`. The formula
    is the paper's, the concentrations are so large that it equals the softmax entropy.

    Args:
        logits: CLIP's scaled logits z, shape ``(..., C)`` with C > 1.

    Returns:
        The share of :math:`\ln C`, shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: ``logits`` has no dimension or fewer than two classes.

    Example:
        >>> published_aleatoric_uncertainty(torch.tensor([25.0, 24.0, 20.0]))
        tensor(0.5555)

    References:
        The code of Lu et al. (2025), https://github.com/VivienLu/UCAT, ``au_dirichlet`` in main.py.
    """
    aleatoric = aleatoric_uncertainty(published_log_concentration(logits))
    return normalized(aleatoric, "logits", logits)


def published_epistemic_uncertainty(logits: Tensor) -> Tensor:
    r"""The "EU" that the paper's published code reports, which is not the paper's.

    .. math:: \frac{C}{\ln C \; \ln \sum_k e^{\alpha_k + 1}}

    of `published_log_concentration`: about :math:`C / ((\max_k \alpha_k + 1) \ln C)`. The sum of
    the concentrations does not occur in it, as the exponential is taken of :math:`\alpha` itself.

    Args:
        logits: CLIP's scaled logits z, shape ``(..., C)`` with C > 1. Beyond 88 the result is 0
            in float32.

    Returns:
        Shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: ``logits`` has no dimension or fewer than two classes.

    Example:
        >>> published_epistemic_uncertainty(torch.tensor([1.0, 0.0, 0.0]))
        tensor(0.5434)

    References:
        The code of Lu et al. (2025), https://github.com/VivienLu/UCAT, ``eu_dirichlet`` in main.py.
    """
    alpha = torch.exp(published_log_concentration(logits))
    epistemic = logits.shape[-1] / (torch.logsumexp(alpha, -1) + 1)
    return normalized(epistemic, "logits", logits)


def published_predictive_entropy(logits: Tensor) -> Tensor:
    r"""The "PU" that the paper's published code reports: the entropy of CLIP's softmax.

    .. math:: -\frac{1}{\ln C} \sum_k p_k \ln (p_k + 10^{-12}), \qquad p = \mathrm{softmax}(z)

    Not of a Dirichlet mean. Without the 1e-12, which makes a certain prediction's value negative,
    it is ``predictive_entropy(logits, normalize=True)``.

    Args:
        logits: CLIP's scaled logits z, shape ``(..., C)`` with C > 1.

    Returns:
        The share of :math:`\ln C`, shape ``(...,)``, float32 or float64; good to 1e-18 absolute
        where it passes through zero.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: ``logits`` has no dimension or fewer than two classes.

    Example:
        >>> published_predictive_entropy(torch.tensor([25.0, 24.0, 20.0]))
        tensor(0.5555)

    References:
        The code of Lu et al. (2025), https://github.com/VivienLu/UCAT, ``entropy_from_logits`` in
        main.py.
    """
    check_floating("logits", logits, shape="(..., C)")
    row = simplex(logits)
    floor = row.gap.new_tensor(math.log(_PROB_OFFSET))
    log_probs = torch.logaddexp(-row.surprise, floor)
    return normalized(-(row.probs * log_probs).sum(-1), "logits", logits)
