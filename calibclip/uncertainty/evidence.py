"""What the amount of evidence says, and whether it contradicts itself or another opinion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibclip._checks import check_floating, check_same_shape
from calibclip.dirichlet import Simplex, simplex
from calibclip.uncertainty._measure import measure

# `dissonance` takes as many rows at a time as hold this many numbers: they stay in the cache.
_CHUNK = 1 << 17
# A bound on logarithms that keeps exponentials finite in float32.
_CEILING = 85.0


def _reciprocal_total(row: Simplex) -> Tensor:
    # From both halves of ln alpha: the half is exact, and the square neither over- nor underflows
    # before the result does. Of ln alpha_0 = 82 float32 has lost exp's last 5 bits.
    half = torch.exp(-0.5 * row.log_top)
    return (half / (1 + row.others) * half).squeeze(-1)


def _vacuity(row: Simplex) -> Tensor:
    return row.log_alpha.shape[-1] * _reciprocal_total(row)


def vacuity(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Vacuity of subjective logic: the evidence-free share of belief.

    .. math:: u = \frac{C}{\alpha_0}

    At most 1 as long as every :math:`\alpha_k \ge 1`; :math:`\mathrm{EU} = u/(1 + u)`.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`, for uniformity with the other measures.

    Returns:
        Shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.

    Example:
        >>> vacuity(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.7500)

    References:
        Sensoy et al. (2018), "Evidential Deep Learning to Quantify Classification Uncertainty",
        https://arxiv.org/abs/1806.01768, equation 1.
    """
    return measure(
        log_alpha,
        _vacuity,
        lambda row: -row.probs * _vacuity(row).unsqueeze(-1),
        normalize,
    )


def _log_vacuity(row: Simplex) -> Tensor:
    return math.log(row.log_alpha.shape[-1]) - row.log_alpha0


def _epistemic(row: Simplex) -> Tensor:
    log_vacuity = _log_vacuity(row)
    small = log_vacuity < 0
    # u (1 - EU): the second factor does not feel the rounding of a large ln u.
    top = torch.where(small.unsqueeze(-1), row.log_top, 0.0)
    product = _vacuity(row._replace(log_top=top)) * torch.sigmoid(-log_vacuity)
    return torch.where(small, product, torch.sigmoid(log_vacuity))


def _epistemic_slope(row: Simplex) -> Tensor:
    both = _epistemic(row) * torch.sigmoid(-_log_vacuity(row))
    return -row.probs * both.unsqueeze(-1)


def epistemic_uncertainty(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Epistemic uncertainty (EU): how little evidence there is in total.

    .. math:: \mathrm{EU} = \frac{C}{\alpha_0 + C} \in (0, 1)

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`, for uniformity with the other measures; EU is a share
            already.

    Returns:
        Shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.

    Example:
        >>> epistemic_uncertainty(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.4286)

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997 (definition of EU). Their evaluation code
        computes something else: `published_epistemic_uncertainty`.
    """
    return measure(log_alpha, _epistemic, _epistemic_slope, normalize)


def _pairwise_kl(row: Simplex) -> Tensor:
    return (row.log_alpha.shape[-1] - 1) * _reciprocal_total(row)


def expected_pairwise_kl(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Expected pairwise KL divergence (EPKL) of two categoricals drawn from the Dirichlet.

    .. math:: \mathrm{EPKL} = \frac{C - 1}{\alpha_0} \ge \mathrm{MI}

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`, as `mutual_information`, which it bounds; EPKL itself
            has no bound.

    Returns:
        Nats (or multiples of :math:`\ln C`), shape ``(...,)``, float32 or float64; 0 for one class.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor, or ``normalize`` no bool.
        ValueError: ``log_alpha`` has no dimension or no class, or with ``normalize`` only one.

    Example:
        >>> expected_pairwise_kl(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.5000)

    References:
        Malinin (2019), "Uncertainty Estimation in Deep Learning with application to Spoken Language
        Assessment", PhD thesis, University of Cambridge.
    """
    return measure(
        log_alpha,
        _pairwise_kl,
        lambda row: -row.probs * _pairwise_kl(row).unsqueeze(-1),
        normalize,
    )


# Beliefs


def _beliefs(row: Simplex) -> Tensor:
    """Return ``(alpha - 1) / alpha_0``, negative where alpha is below 1, (..., C)."""
    # Relative to the largest class on either side of alpha = 1, so that nothing overflows.
    some = row.probs * -torch.expm1(-row.log_alpha.clamp(min=0))
    less = torch.expm1(row.log_alpha.clamp(max=0)) * _reciprocal_total(row).unsqueeze(-1)
    return torch.where(row.log_alpha >= 0, some, less)


@torch.no_grad()
def dissonance(log_alpha: Tensor) -> Tensor:
    r"""Dissonance of subjective logic: how evenly the evidence speaks for different classes.

    .. math::
        \sum_k b_k\,\frac{\sum_{j \ne k} b_j\,\mathrm{Bal}(b_j, b_k)}{\sum_{j \ne k} b_j},
        \qquad \mathrm{Bal}(x, y) = 1 - \frac{|x - y|}{x + y},
        \qquad b_k = \frac{\alpha_k - 1}{\alpha_0}

    0 for evidence of one class only or of none, 1 for much and equally distributed evidence. The
    evidence :math:`\alpha_k - 1` cannot be negative: below 1, a concentration counts as 1 there.

    Exact, over all pairs of classes: :math:`C^2/2` steps for each row, but working memory for a few
    rows only. 1000 rows of 1000 classes take about a second on one CPU core.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.

    Returns:
        A share in [0, 1], shape ``(...,)``, float32 or float64, cut from autograd.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.
        ValueError: ``log_alpha`` has no dimension or no class.

    Example:
        >>> dissonance(torch.tensor([[6.0, 6.0, 1.0], [11.0, 1.0, 1.0]]).log())
        tensor([0.7692, 0.0000])

    References:
        Jøsang, Cho and Chen (2018), "Uncertainty Characteristics of Subjective Opinions", FUSION.
    """
    row = simplex(log_alpha)
    beliefs = _beliefs(row).clamp(min=0).reshape(-1, log_alpha.shape[-1])
    rows = max(1, _CHUNK // log_alpha.shape[-1])
    chunks = [_dissonance(chunk) for chunk in beliefs.split(rows)]
    return torch.cat(chunks).reshape(log_alpha.shape[:-1])


def _dissonance(beliefs: Tensor) -> Tensor:
    """Return the dissonance of ``(rows, C)`` beliefs >= 0, (rows,)."""
    # Classes along the rows of memory: a shift by some classes is one contiguous block.
    belief = beliefs.sort(-1, descending=True).values.T.contiguous()
    # All other classes' belief. The largest is left out of a sum, not taken from one.
    rest = belief[1:].sum(0)
    others = torch.cat((rest[None], belief[:1] + (rest - belief[1:])))
    tiny = torch.finfo(belief.dtype).tiny
    weight, positive = 1 / others.clamp(min=tiny), belief.clamp(min=tiny)
    result = torch.zeros_like(rest)
    # Of a pair x >= y, x y Bal(x, y) = 2 y^2 x / (x + y); y^2 alone might underflow.
    for shift in range(1, len(belief)):
        larger, smaller = positive[:-shift], belief[shift:]
        share = (larger + smaller).reciprocal_().mul_(larger).mul_(smaller)
        weights = (weight[:-shift] + weight[shift:]).mul_(smaller)
        result += share.mul_(weights).sum(0)
    return 2 * result


def conflictiveness(log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    r"""Conflict of two opinions: of two views, say, or of a clean and an attacked image.

    .. math::
        \Big(\tfrac12 \sum_k |p_k - q_k|\Big)\,(1 - u_\alpha)\,(1 - u_\beta),
        \qquad q_k = \beta_k/\beta_0, \qquad u_\alpha = C/\alpha_0

    Their projected distance times their conjunctive certainty: large where both are sure of
    different things. A vacuity :math:`u` above 1, which needs concentrations below 1, counts as 1.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        log_beta: :math:`\ln\beta`, the same shape.

    Returns:
        A share in [0, 1], shape ``(...,)``, float32 or float64, differentiable. Accurate also for
        nearly equal opinions.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes or devices differ, or there is no dimension or no class.

    Example:
        >>> one, other = torch.tensor([8.0, 1.0, 1.0]), torch.tensor([1.0, 8.0, 1.0])
        >>> conflictiveness(one.log(), other.log())
        tensor(0.3430)

    References:
        Xu et al. (2024), "Reliable Conflictive Multi-View Learning", AAAI,
        https://arxiv.org/abs/2402.16897.
    """
    check_floating("log_alpha", log_alpha, shape="(..., C)")
    check_floating("log_beta", log_beta, shape="(..., C)")
    check_same_shape("log_beta", log_beta, "log_alpha", log_alpha)
    dtype = torch.promote_types(log_alpha.dtype, log_beta.dtype)
    first, second = simplex(log_alpha.to(dtype)), simplex(log_beta.to(dtype))
    distance = _total_variation(first, second)
    certainty = [_beliefs(row).sum(-1).clamp(min=0) for row in (first, second)]
    return distance * certainty[0] * certainty[1]


def _total_variation(first: Simplex, second: Simplex) -> Tensor:
    """Return half the sum of ``|p - q|`` to full relative precision, (...,).

    From ``p - q = q (p/q - 1)`` where the two are close, and without the largest class of ``q``,
    whose difference is minus the sum of the others': next to a share of 1 it would be rounded away.
    """
    where = second.log_alpha.argmax(-1, keepdim=True)
    probs, other = first.probs, second.probs
    # ln(p_k / q_k) less that of the largest class; evidence in common has left without rounding.
    change = first.log_alpha - second.log_alpha
    change = change - change.gather(-1, where)
    # q_k p_k / q_k * (q/p of the largest) - q_k, whose sum is (q/p of the largest) - 1.
    to_largest = (first.log_alpha - first.log_alpha.gather(-1, where)).clamp(max=_CEILING)
    far = other.gather(-1, where) * torch.exp(to_largest) - other
    growth = torch.where(change < 1, other * torch.expm1(change.clamp(max=1)), far)
    growth = growth.sum(-1, keepdim=True)
    near = growth.abs() < 0.5
    largest = first.surprise.gather(-1, where) - second.surprise.gather(-1, where)
    largest = torch.where(near, torch.log1p(torch.where(near, growth, 0.0)), largest)
    ratio = change - largest
    close = other * torch.expm1(ratio.clamp(-1, 1))
    difference = torch.where(ratio.abs() < 1, close, probs - other).scatter(-1, where, 0.0)
    return (difference.abs().sum(-1) + difference.sum(-1).abs()) / 2
