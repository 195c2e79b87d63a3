"""Entropies of the Dirichlet: total, aleatoric, their difference, and that of the density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibclip._kernels.entropies import Gaps, entropy_term, trigamma_term
from calibclip.dirichlet import Simplex, digamma_excess
from calibclip.uncertainty._measure import measure

# Below the logarithm of any share that float32 or float64 can hold.
_NO_SHARE = -1e4


def _gaps(row: Simplex) -> Gaps:
    log_total = row.log_top + torch.log1p(row.others)
    surprise = torch.log1p(row.others) - row.gap.clamp(min=_NO_SHARE)
    return Gaps(row.log_alpha, log_total, surprise)


def _entropy(row: Simplex) -> Tensor:
    surprise = torch.log1p(row.others) - row.gap.clamp(min=_NO_SHARE)
    return (row.probs * surprise).sum(-1)


def _entropy_slope(row: Simplex) -> Tensor:
    # p_k (-ln p_k - H), from the gaps: of nearly equal classes those are exact.
    gap = row.gap.clamp(min=_NO_SHARE)
    return row.probs * ((row.probs * gap).sum(-1, keepdim=True) - gap)


def predictive_entropy(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Total uncertainty: the entropy of the Dirichlet mean :math:`p_k = \alpha_k/\alpha_0`.

    .. math:: H[p] = -\sum_k p_k \ln p_k = \mathrm{AU} + \mathrm{MI}

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`, the largest possible value.

    Returns:
        Nats (or the share of :math:`\ln C`), shape ``(...,)``, float32 or float64. Accurate also
        for a nearly one-hot ``p``, where a softmax entropy in float32 loses its digits.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.

    Example:
        >>> predictive_entropy(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(1.0397)

    References:
        Malinin and Gales (2018), "Predictive Uncertainty Estimation via Prior Networks",
        https://arxiv.org/abs/1802.10501, section 3.
    """
    return measure(log_alpha, _entropy, _entropy_slope, normalize)


def _aleatoric(row: Simplex) -> Tensor:
    return (row.probs * _gaps(row).digamma()).sum(-1)


def _aleatoric_slope(row: Simplex) -> Tensor:
    probs, gaps = row.probs, _gaps(row)
    digamma, excess = gaps.digamma(), gaps.excess()
    aleatoric = (probs * digamma).sum(-1, keepdim=True)
    mutual = (probs * excess).sum(-1, keepdim=True)
    direct = digamma - aleatoric + gaps.trigamma()
    # The total's less the mutual information's, where that is the smaller part.
    gap = row.gap.clamp(min=_NO_SHARE)
    total = (probs * gap).sum(-1, keepdim=True) - gap
    return probs * torch.where(mutual < aleatoric, total - (gaps.curvature() - mutual), direct)


def aleatoric_uncertainty(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Aleatoric uncertainty (AU): the entropy expected of a categorical drawn from the Dirichlet.

    .. math::
        \mathrm{AU} = \sum_k \frac{\alpha_k}{\alpha_0}\,[\psi(\alpha_0 + 1) - \psi(\alpha_k + 1)]

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`, as the paper's code reports it.

    Returns:
        Nats (or the share of :math:`\ln C`), shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.

    Example:
        >>> aleatoric_uncertainty(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.8333)

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997 (definition of AU); Malinin and Gales
        (2018), https://arxiv.org/abs/1802.10501, section 3 (expected data uncertainty).
    """
    return measure(log_alpha, _aleatoric, _aleatoric_slope, normalize)


def _mutual(row: Simplex) -> Tensor:
    return (row.probs * _gaps(row).excess()).sum(-1)


def _mutual_slope(row: Simplex) -> Tensor:
    probs, gaps = row.probs, _gaps(row)
    mutual = (probs * gaps.excess()).sum(-1, keepdim=True)
    return probs * (gaps.curvature() - mutual)


def mutual_information(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Mutual information between the label and the categorical: total less aleatoric uncertainty.

    .. math::
        \mathrm{MI} = H[p] - \mathrm{AU} = \sum_k p_k\,[g(\alpha_k) - g(\alpha_0)],
        \qquad g(x) = \psi(x + 1) - \ln x

    It falls like :math:`(C-1)/(2\alpha_0)`: about 1e-8 at the paper's concentrations, where the
    difference of two float32 entropies is noise and the second form is not.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`.

    Returns:
        Nats (or the share of :math:`\ln C`), shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.

    Example:
        >>> mutual_information(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.2064)

    References:
        Malinin and Gales (2018), https://arxiv.org/abs/1802.10501, section 3.
    """
    return measure(log_alpha, _mutual, _mutual_slope, normalize)


def _differential(row: Simplex) -> Tensor:
    gaps = _gaps(row)
    classes = row.log_alpha.shape[-1]
    log_total = gaps.log_total.squeeze(-1)
    # Stirling's leading terms, of one sign where alpha_0 is large, and what they leave.
    leading = (1 - classes) / 2 * (log_total - math.log(2 * math.pi) - 1)
    parts = (entropy_term(row.log_alpha) - gaps.surprise / 2).sum(-1)
    total = entropy_term(log_total)
    # psi(x) - ln x = g(x) - 1/x
    digamma = digamma_excess(log_total) - torch.exp(-log_total)
    return leading + parts - total - (classes - 1) * digamma


def _differential_slope(row: Simplex) -> Tensor:
    classes = row.log_alpha.shape[-1]
    log_total = row.log_alpha0.unsqueeze(-1)
    own, total = trigamma_term(row.log_alpha), trigamma_term(log_total)
    shared = classes - total + classes * total * torch.exp(-log_total)
    return 1 - own + own * torch.exp(-row.log_alpha) - row.probs * shared


def differential_entropy(log_alpha: Tensor) -> Tensor:
    r"""Differential entropy of the Dirichlet: the logarithm of the volume it fills, so to speak.

    .. math::
        h = \ln \mathrm{B}(\alpha) + (\alpha_0 - C)\,\psi(\alpha_0)
        - \sum_k (\alpha_k - 1)\,\psi(\alpha_k) \le -\ln (C - 1)!

    The largest value is that of :math:`\alpha_k = 1`, the uniform density; it falls without bound
    both as the mean becomes certain (:math:`\alpha \to \infty`) and as the Dirichlet concentrates
    on the corners (:math:`\alpha \to 0`). It depends on the number of classes far more than on
    anything else, so compare it at one C only; no scale normalises it.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.

    Returns:
        Nats, shape ``(...,)``, float32 or float64; 0 for one class. For two classes around
        :math:`\alpha = 1`, where it is 0, the float32 error is 1e-6 absolute.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.
        ValueError: ``log_alpha`` has no dimension or no class.

    Example:
        >>> differential_entropy(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(-0.9584)
        >>> differential_entropy(torch.full((10,), 28.0))
        tensor(-135.1041)

    References:
        Malinin and Gales (2018), https://arxiv.org/abs/1802.10501, section 3.
    """
    return measure(log_alpha, _differential, _differential_slope)
