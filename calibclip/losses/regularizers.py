"""Clean-to-adversarial consistency: the losses of TRADES, FAP and Sim-CLIP.

TRADES and FAP hold the attacked prediction to the clean one of the *same* model. Their clean pass
is in the graph. Sim-CLIP does the same with features.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from calibclip._checks import wrong
from calibclip._kernels import categorical_kl
from calibclip.dirichlet import Reduction, reduce
from calibclip.losses._shell import (
    LossModule,
    check_features,
    check_labels,
    check_logits,
    check_options,
    check_same_batch,
    cosine_distance,
    cross_entropies,
)

# TRADES


class TRADESTerms(NamedTuple):
    """What ``TRADESLoss`` is made of, unweighted, each reduced like the loss."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def _trades_terms(
    logits_adv: Tensor,
    target: Tensor,
    logits_clean: Tensor,
    *,
    weight: float,
    detach_clean: bool,
    reduction: Reduction,
) -> TRADESTerms:
    adv, clean = check_logits(logits_adv=logits_adv, logits_clean=logits_clean)
    check_labels(target, adv)
    cross_entropy = cross_entropies(clean, target)
    kl = categorical_kl(clean.detach() if detach_clean else clean, adv)
    total = cross_entropy + weight * kl
    return TRADESTerms(*(reduce(term, reduction) for term in (total, cross_entropy, kl)))


def trades_loss(
    logits_adv: Tensor,
    target: Tensor,
    logits_clean: Tensor,
    *,
    weight: float = 6.0,
    detach_clean: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""TRADES: cross-entropy on the clean image, and consistency under attack.

    .. math::
        \mathcal{L} = \mathrm{CE}(z_{\mathrm{clean}}, y)
            + \beta\, \mathrm{KL}(p_{\mathrm{clean}} \,\|\, p_{\mathrm{adv}})

    Its attack maximises the KL, not the cross-entropy. The KL is computed without cancellation.

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``.
        target: Class indices, shape ``(B,)``, int64.
        logits_clean: Trained model on the clean image, the same shape.
        weight: :math:`\beta \ge 0`.
        detach_clean: Whether the KL's gradient stops at ``logits_clean``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input), also for half
        precision and under autocast. The KL
        differentiates once, and not under ``torch.func``.

    Raises:
        TypeError: Logits that are not floating-point tensors, or a target that is not int64.
        ValueError: Shapes that differ, labels out of range (checked on a CPU only), or an option
            out of range.

    Example:
        >>> import torch
        >>> adv, clean = torch.tensor([[24.0, 25.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> trades_loss(adv, torch.tensor([0]), clean)
        tensor(7.2492)

    References:
        Zhang et al. (2019), "Theoretically Principled Trade-off between Robustness and Accuracy",
        https://arxiv.org/abs/1901.08573: the training objective, with their code's beta of 6.
    """
    options = check_options(
        weight=weight,
        detach_clean=detach_clean,
        reduction=reduction,
    )
    return _trades_terms(logits_adv, target, logits_clean, **options).total


class TRADESLoss(LossModule):
    """``trades_loss`` with its options kept; see there.

    ``official()`` is the plain loss: the published one has nothing to correct.

    Example:
        >>> import torch
        >>> adv, clean = torch.tensor([[24.0, 25.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> TRADESLoss()(adv, torch.tensor([0]), clean)
        tensor(7.2492)
    """

    requires = frozenset({"logits_adv", "logits_clean"})

    def __init__(
        self,
        *,
        weight: float = 6.0,
        detach_clean: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, detach_clean=detach_clean, reduction=reduction)

    @classmethod
    def official(cls) -> TRADESLoss:
        """Return the loss with the published constants."""
        return cls()

    def terms(self, logits_adv: Tensor, target: Tensor, logits_clean: Tensor) -> TRADESTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _trades_terms(logits_adv, target, logits_clean, **self.options)

    def forward(self, logits_adv: Tensor, target: Tensor, logits_clean: Tensor) -> Tensor:
        """Return the loss of two logits ``(B, C)`` and labels ``(B,)``."""
        return self.terms(logits_adv, target, logits_clean).total


# FAP


class FAPTerms(NamedTuple):
    """What ``FAPLoss`` is made of, each reduced like the loss; ``kl`` carries its cosine factor."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def _fap_terms(
    logits_adv: Tensor,
    target: Tensor,
    features_adv: Tensor,
    logits_clean: Tensor,
    features_clean: Tensor,
    *,
    weight: float,
    reduction: Reduction,
) -> FAPTerms:
    adv, clean = check_logits(logits_adv=logits_adv, logits_clean=logits_clean)
    check_labels(target, adv)
    features = check_features(features_adv=features_adv, features_clean=features_clean)
    check_same_batch("features_adv", features_adv, adv)
    cross_entropy = cross_entropies(clean, target)
    kl = categorical_kl(clean, adv) * (2 - cosine_distance(*features))
    total = cross_entropy + weight * kl
    return FAPTerms(*(reduce(term, reduction) for term in (total, cross_entropy, kl)))


def fap_loss(
    logits_adv: Tensor,
    target: Tensor,
    features_adv: Tensor,
    logits_clean: Tensor,
    features_clean: Tensor,
    *,
    weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""FAP: TRADES for prompt learning, with each sample's KL weighted by its features' cosine.

    .. math::
        \mathcal{L}_i = \mathrm{CE}(z_{\mathrm{clean}}, y)
            + \lambda\, \mathrm{KL}(p_{\mathrm{clean}} \,\|\, p_{\mathrm{adv}})\,
              [\cos(f_{\mathrm{clean}}, f_{\mathrm{adv}}) + 1]

    Nothing is detached, so lowering the cosine lowers the loss as well: the features of clean and
    attacked images are pushed apart where the predictions disagree, as the authors intend.

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``.
        target: Class indices, shape ``(B,)``, int64.
        features_adv: Trained encoder on the attacked image, shape ``(B, D)``, any length.
        logits_clean: Trained model on the clean image, shape ``(B, C)``.
        features_clean: Trained encoder on the clean image, shape ``(B, D)``.
        weight: :math:`\lambda \ge 0`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input), also for half
        precision and under autocast. The KL
        differentiates once, and not under ``torch.func``.

    Raises:
        TypeError: Logits or features that are not floating-point tensors, or a target that is not
            int64.
        ValueError: Shapes that differ, labels out of range (checked on a CPU only), or an option
            out of range.

    Example:
        >>> import torch
        >>> adv, clean = torch.tensor([[24.0, 25.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> features_adv, features_clean = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> fap_loss(adv, torch.tensor([0]), features_adv, clean, features_clean)
        tensor(2.3803)

    References:
        Zhou et al. (2024), "Few-Shot Adversarial Prompt Learning on Vision-Language Models",
        https://arxiv.org/abs/2403.14774, and ``trainers/fap.py`` of their code.
    """
    options = check_options(
        weight=weight,
        reduction=reduction,
    )
    return _fap_terms(
        logits_adv, target, features_adv, logits_clean, features_clean, **options
    ).total


class FAPLoss(LossModule):
    """``fap_loss`` with its options kept; see there.

    ``official()`` is the plain loss: the published one has nothing to correct.

    Example:
        >>> import torch
        >>> adv, clean = torch.tensor([[24.0, 25.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> features_adv, features_clean = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> FAPLoss()(adv, torch.tensor([0]), features_adv, clean, features_clean)
        tensor(2.3803)
    """

    requires = frozenset({"logits_adv", "features_adv", "logits_clean", "features_clean"})

    def __init__(self, *, weight: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(weight=weight, reduction=reduction)

    @classmethod
    def official(cls) -> FAPLoss:
        """Return the loss with the published constants."""
        return cls()

    def terms(
        self,
        logits_adv: Tensor,
        target: Tensor,
        features_adv: Tensor,
        logits_clean: Tensor,
        features_clean: Tensor,
    ) -> FAPTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        inputs = (logits_adv, target, features_adv, logits_clean, features_clean)
        return _fap_terms(*inputs, **self.options)

    def forward(
        self,
        logits_adv: Tensor,
        target: Tensor,
        features_adv: Tensor,
        logits_clean: Tensor,
        features_clean: Tensor,
    ) -> Tensor:
        """Return the loss of logits ``(B, C)``, labels ``(B,)`` and features ``(B, D)``."""
        return self.terms(logits_adv, target, features_adv, logits_clean, features_clean).total


# Sim-CLIP


class SimCLIPTerms(NamedTuple):
    """What ``SimCLIPLoss`` is made of, each reduced like the loss: minus half a cosine each.

    Gradients of ``adv`` reach the attacked features only, those of ``other`` the other ones only.
    """

    total: Tensor
    adv: Tensor
    other: Tensor


def _simclip_terms(
    features_adv: Tensor,
    features_ref: Tensor | None = None,
    features_clean: Tensor | None = None,
    *,
    reduction: Reduction,
) -> SimCLIPTerms:
    given = {"features_ref": features_ref, "features_clean": features_clean}
    given = {name: features for name, features in given.items() if features is not None}
    if len(given) != 1:
        got = " and ".join(given) or "neither"
        raise ValueError(wrong("features_clean", "one of features_ref and features_clean", got))
    adv, other = check_features(features_adv=features_adv, **given)
    if features_ref is not None:
        other = other.detach()
    half_adv = (cosine_distance(adv, other.detach()) - 1) / 2
    half_other = (cosine_distance(other, adv.detach()) - 1) / 2
    terms = (half_adv + half_other, half_adv, half_other)
    return SimCLIPTerms(*(reduce(term, reduction) for term in terms))


def simclip_loss(
    features_adv: Tensor,
    features_ref: Tensor | None = None,
    features_clean: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Sim-CLIP: a symmetric negative cosine of attacked and other features, with stop-gradients.

    .. math::
        \mathcal{L} = -\tfrac12 \cos(f_{\mathrm{adv}}, \mathrm{sg}[g])
            - \tfrac12 \cos(g, \mathrm{sg}[f_{\mathrm{adv}}])

    The value is that of a single cosine; the two terms differ in where their gradients go. Which
    features g are decides whether the second term lives:

    - ``features_clean``, the *trained* encoder on the clean image: both terms train.
    - ``features_ref``, the *frozen* encoder on the clean image, as in the published code: the
      second term is constant, and the gradient is half that of ``fare_loss(metric="cosine")``.

    Args:
        features_adv: Trained encoder on the attacked image, shape ``(B, D)``, any length.
        features_ref: Frozen encoder's features, the same shape; always detached.
        features_clean: Trained encoder's clean features, the same shape. Exactly one of the two.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``, in [-1, 1]; float32 (float64 for float64 input), also for
        half precision and under autocast.

    Raises:
        TypeError: Features that are not floating-point tensors.
        ValueError: Both or neither of the other features, features that are not ``(B, D)`` or
            differ in shape, or an unknown reduction.

    Example:
        >>> import torch
        >>> adv, clean = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> simclip_loss(adv, features_clean=clean)
        tensor(-0.9600)

    References:
        Hossain and Imteaj (2024), "Sim-CLIP: Unsupervised Siamese Adversarial Fine-Tuning for
        Robust and Semantically-Rich Vision-Language Models", https://arxiv.org/abs/2407.14971.
    """
    options = check_options(
        reduction=reduction,
    )
    return _simclip_terms(features_adv, features_ref, features_clean, **options).total


class SimCLIPLoss(LossModule):
    """``simclip_loss`` with its options kept; see there.

    What ``official()`` does differently:

    - the other features are the frozen encoder's, ``features_ref``: the second term is constant.

    Args:
        frozen_reference: Whether ``requires`` asks for ``features_ref`` and not
            ``features_clean``, and ``forward`` insists on it.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Example:
        >>> import torch
        >>> adv, clean = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> SimCLIPLoss()(adv, features_clean=clean)
        tensor(-0.9600)
        >>> sorted(SimCLIPLoss.official().requires)
        ['features_adv', 'features_ref']
    """

    def __init__(self, *, frozen_reference: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(frozen_reference=frozen_reference, reduction=reduction)

    @property
    def requires(self) -> frozenset[str]:
        """The passes to run: the attacked image's features, and those of one other encoder."""
        return frozenset({"features_adv", self._other})

    @property
    def _other(self) -> str:
        return "features_ref" if self.options["frozen_reference"] else "features_clean"

    @classmethod
    def official(cls) -> SimCLIPLoss:
        """Return the loss as published."""
        return cls(frozen_reference=True)

    def terms(
        self,
        features_adv: Tensor,
        features_ref: Tensor | None = None,
        features_clean: Tensor | None = None,
    ) -> SimCLIPTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        given = {"features_ref": features_ref, "features_clean": features_clean}
        if given[self._other] is None:
            expected = f"features with frozen_reference={self.options['frozen_reference']}"
            got = next((name for name, features in given.items() if features is not None), "none")
            remedy = "pass them by name, or build the loss with the other frozen_reference"
            raise ValueError(wrong(self._other, expected, got, remedy))
        return _simclip_terms(features_adv, **given, reduction=self.options["reduction"])

    def forward(
        self,
        features_adv: Tensor,
        features_ref: Tensor | None = None,
        features_clean: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features ``(B, D)``."""
        return self.terms(features_adv, features_ref, features_clean).total
