r"""Losses that train a Dirichlet against the label: evidential deep learning, Prior Networks.

Both take :math:`\ln\alpha`, as everything in this package that reads a Dirichlet does. For the
methods' own networks: evidence e gives ``log_alpha = torch.log1p(e)`` (EDL), and the logits of a
Prior Network *are* ``log_alpha``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calibclip._checks import check_number
from calibclip._kernels import dirichlet_kl_parts, scalar_dtype
from calibclip.dirichlet import Reduction, digamma_excess, reduce, simplex
from calibclip.losses._shell import (
    Direction,
    LossModule,
    check_labels,
    check_logits,
    check_options,
)

# Evidential deep learning

Kind = Literal["mse", "log", "digamma"]


class EDLTerms(NamedTuple):
    """What ``EDLLoss`` is made of, each reduced like the loss; ``kl`` without its annealing."""

    total: Tensor
    fit: Tensor
    kl: Tensor


def _edl_terms(
    log_alpha_adv: Tensor,
    target: Tensor,
    *,
    kind: Kind,
    epoch: float | None,
    annealing_epochs: int,
    reduction: Reduction,
) -> EDLTerms:
    epoch = annealing_epochs if epoch is None else check_number("epoch", epoch, at_least=0)
    (log_alpha,) = check_logits(log_alpha_adv=log_alpha_adv)
    check_labels(target, log_alpha)
    own = target.unsqueeze(1)
    fit = _squared_error(log_alpha, own) if kind == "mse" else _own_class(log_alpha, own, kind)
    # alpha with the label's evidence taken away: what is left should be none.
    misleading = log_alpha.scatter(1, own, 0.0)
    shape, evidence = dirichlet_kl_parts(misleading, torch.zeros_like(misleading))
    kl = shape + evidence
    total = fit + min(1.0, epoch / annealing_epochs) * kl
    return EDLTerms(*(reduce(term, reduction) for term in (total, fit, kl)))


def _squared_error(log_alpha: Tensor, own: Tensor) -> Tensor:
    row = simplex(log_alpha)
    probs, others = row.probs, -torch.expm1(-row.surprise)  # p and 1 - p, both to full precision
    error = torch.where(torch.zeros_like(probs).scatter(1, own, 1.0) > 0, others, probs).square()
    variance = probs * others * torch.sigmoid(-row.log_alpha0).unsqueeze(1)  # / (alpha_0 + 1)
    return (error + variance).sum(1)


def _own_class(log_alpha: Tensor, own: Tensor, kind: Kind) -> Tensor:
    row = simplex(log_alpha)
    surprise = row.surprise.gather(1, own).squeeze(1)  # ln alpha_0 - ln alpha_y
    if kind == "log":
        return surprise
    # psi(x) = ln x + g(x) - 1/x
    log_own = log_alpha.gather(1, own).squeeze(1)
    series = digamma_excess(row.log_alpha0) - digamma_excess(log_own)
    return surprise + series + (torch.exp(-log_own) - torch.exp(-row.log_alpha0))


def edl_loss(
    log_alpha_adv: Tensor,
    target: Tensor,
    *,
    kind: Kind = "mse",
    epoch: float | None = None,
    annealing_epochs: int = 10,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Evidential deep learning: a Bayes risk under the Dirichlet, and no evidence elsewhere.

    With :math:`p = \alpha/\alpha_0` and y one-hot, the risk is one of

    .. math::
        \text{mse: } \sum_k (y_k - p_k)^2 + \frac{p_k(1 - p_k)}{\alpha_0 + 1}, \qquad
        \text{log: } \ln\alpha_0 - \ln\alpha_y, \qquad
        \text{digamma: } \psi(\alpha_0) - \psi(\alpha_y)

    and to it is added :math:`\min(1, t/t_0)\, \mathrm{KL}(\mathrm{Dir}(\tilde\alpha) \,\|\,
    \mathrm{Dir}(1))`, with :math:`\tilde\alpha_k = \alpha_k` but :math:`\tilde\alpha_y = 1`.

    Args:
        log_alpha_adv: :math:`\ln\alpha` on the attacked image, shape ``(B, C)``; the methods'
            :math:`\alpha = e + 1` is never below 1. CLIP's concentrations at T = 0.07 reach
            :math:`e^{28}`: the KL then dwarfs the risk, and a larger T is needed.
        target: Class indices, shape ``(B,)``, int64.
        kind: ``"mse"``, ``"log"`` or ``"digamma"``.
        epoch: t >= 0; ``None`` is past the annealing.
        annealing_epochs: :math:`t_0 \ge 1`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input). It differentiates
        once, and not under ``torch.func``.

    Raises:
        TypeError: Concentrations that are not a floating-point tensor, or a target that is not
            int64.
        ValueError: Shapes that do not fit, labels out of range (checked on a CPU only), or an
            option out of range.

    Example:
        >>> log_alpha = torch.tensor([[3.0, 1.0, 1.0]]).log()
        >>> edl_loss(log_alpha, torch.tensor([0]))
        tensor(0.3333)
        >>> edl_loss(log_alpha, torch.tensor([1]), kind="log", epoch=5)
        tensor(1.9220)

    References:
        Sensoy et al. (2018), "Evidential Deep Learning to Quantify Classification Uncertainty",
        https://arxiv.org/abs/1806.01768: the three risks and the annealed KL of section 4.
    """
    options = check_options(
        kind=kind,
        annealing_epochs=annealing_epochs,
        reduction=reduction,
    )
    return _edl_terms(log_alpha_adv, target, epoch=epoch, **options).total


class EDLLoss(LossModule):
    """``edl_loss`` with its options kept; see there. ``epoch`` is given at the call.

    ``official()`` is the plain loss: the published one has nothing to correct.

    Example:
        >>> loss = EDLLoss(kind="log")
        >>> loss(torch.tensor([[3.0, 1.0, 1.0]]).log(), torch.tensor([1]), epoch=5)
        tensor(1.9220)
    """

    requires = frozenset({"log_alpha_adv"})

    def __init__(
        self,
        *,
        kind: Kind = "mse",
        annealing_epochs: int = 10,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(kind=kind, annealing_epochs=annealing_epochs, reduction=reduction)

    @classmethod
    def official(cls) -> EDLLoss:
        """Return the loss with the published constants."""
        return cls()

    def terms(
        self, log_alpha_adv: Tensor, target: Tensor, *, epoch: float | None = None
    ) -> EDLTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _edl_terms(log_alpha_adv, target, epoch=epoch, **self.options)

    def forward(
        self, log_alpha_adv: Tensor, target: Tensor, *, epoch: float | None = None
    ) -> Tensor:
        """Return the loss of ``log_alpha`` of shape ``(B, C)`` and labels ``(B,)``."""
        return self.terms(log_alpha_adv, target, epoch=epoch).total


# Prior Networks


class PriorNetworkTerms(NamedTuple):
    """What ``PriorNetworkLoss`` is made of, each reduced like the loss; see ``AlignTerms``."""

    total: Tensor
    shape: Tensor
    evidence: Tensor


def _prior_network_terms(
    log_alpha_adv: Tensor,
    target: Tensor | None = None,
    *,
    target_concentration: float,
    direction: Direction,
    reduction: Reduction,
) -> PriorNetworkTerms:
    (log_alpha,) = check_logits(log_alpha_adv=log_alpha_adv)
    # ln beta rounded to float32 would be all that is left of the KL near the target.
    exact = log_alpha.to(scalar_dtype(log_alpha.device))
    log_beta = torch.zeros_like(exact)
    if target is not None:
        check_labels(target, log_alpha)
        log_beta = log_beta.scatter(1, target.unsqueeze(1), math.log1p(target_concentration))
    parts = dirichlet_kl_parts(
        *((exact, log_beta) if direction == "reverse" else (log_beta, exact))
    )
    shape, evidence = (part.to(log_alpha.dtype) for part in parts)
    terms = (shape + evidence, shape, evidence)
    return PriorNetworkTerms(*(reduce(term, reduction) for term in terms))


def prior_network_loss(
    log_alpha_adv: Tensor,
    target: Tensor | None = None,
    *,
    target_concentration: float = 1000.0,
    direction: Direction = "reverse",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Prior Networks: the KL to a sharp Dirichlet at the label, or to the flat one without.

    .. math::
        \mathcal{L} = \mathrm{KL}(\mathrm{Dir}(\alpha) \,\|\, \mathrm{Dir}(\beta)),
        \qquad \beta_k = 1 + \beta_{\mathrm{t}}\, [k = y]

    Args:
        log_alpha_adv: :math:`\ln\alpha` on the attacked image, shape ``(B, C)``: a Prior Network's
            logits.
        target: Class indices, shape ``(B,)``, int64. ``None``: :math:`\beta = 1`, the target of
            out-of-domain data.
        target_concentration: :math:`\beta_{\mathrm{t}} > 0`. The authors divide the sum of their
            in- and out-of-domain losses by it; so may you.
        direction: ``"reverse"`` is KL(model || target), the authors' choice since 2019;
            ``"forward"`` is KL(target || model).
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input), computed in float64
        where the device has it. It differentiates once, and not under ``torch.func``.

    Raises:
        TypeError: Concentrations that are not a floating-point tensor, or a target that is not
            int64.
        ValueError: Shapes that do not fit, labels out of range (checked on a CPU only), or an
            option out of range.

    Example:
        >>> log_alpha = torch.tensor([[6.9, 0.0, 0.0]])
        >>> prior_network_loss(log_alpha, torch.tensor([0]))
        tensor(7.6792e-05)
        >>> prior_network_loss(log_alpha)
        tensor(11.1109)

    References:
        Malinin and Gales (2019), "Reverse KL-Divergence Training of Prior Networks: Improved
        Uncertainty and Adversarial Robustness", https://arxiv.org/abs/1905.13472, and (2018),
        https://arxiv.org/abs/1802.10501, for the forward direction.
    """
    options = check_options(
        target_concentration=target_concentration,
        direction=direction,
        reduction=reduction,
    )
    return _prior_network_terms(log_alpha_adv, target, **options).total


class PriorNetworkLoss(LossModule):
    """``prior_network_loss`` with its options kept; see there.

    ``official()`` is the plain loss. The published code also adds 1e-8 to every concentration and
    computes the KL from gamma functions in float32; its values are these, less exactly.

    Example:
        >>> PriorNetworkLoss()(torch.tensor([[6.9, 0.0, 0.0]]), torch.tensor([0]))
        tensor(7.6792e-05)
    """

    requires = frozenset({"log_alpha_adv"})

    def __init__(
        self,
        *,
        target_concentration: float = 1000.0,
        direction: Direction = "reverse",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            target_concentration=target_concentration, direction=direction, reduction=reduction
        )

    @classmethod
    def official(cls) -> PriorNetworkLoss:
        """Return the loss with the published constants."""
        return cls()

    def terms(self, log_alpha_adv: Tensor, target: Tensor | None = None) -> PriorNetworkTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _prior_network_terms(log_alpha_adv, target, **self.options)

    def forward(self, log_alpha_adv: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss of ``log_alpha`` of shape ``(B, C)`` and labels ``(B,)``."""
        return self.terms(log_alpha_adv, target).total
