"""The losses of TeCoA, PMG-AFT and FARE, to replace line by line.

Each module's plain constructor is the loss as it is meant, and ``official()`` the loss as its
authors' code computes it; the docstring lists every difference. No loss runs a model:
``requires`` names the passes to run.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calibclip._checks import check_number, describe, wrong
from calibclip._kernels import categorical_kl
from calibclip.dirichlet import Reduction, reduce
from calibclip.losses._shell import (
    LossModule,
    check_features,
    check_labels,
    check_logits,
    check_options,
    cosine_distance,
    cross_entropies,
    unit_rows,
)

# TeCoA


class TeCoATerms(NamedTuple):
    """What ``TeCoALoss`` is made of: the cross-entropy is all of it."""

    total: Tensor
    cross_entropy: Tensor


def _tecoa_terms(
    logits_adv: Tensor,
    target: Tensor,
    *,
    label_smoothing: float,
    reduction: Reduction,
) -> TeCoATerms:
    (logits_adv,) = check_logits(logits_adv=logits_adv)
    check_labels(target, logits_adv)
    total = reduce(cross_entropies(logits_adv, target, label_smoothing), reduction)
    return TeCoATerms(total, total)


def tecoa_loss(
    logits_adv: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""TeCoA: cross-entropy of the attacked image against the class prompts.

    .. math:: \mathcal{L} = -\ln \mathrm{softmax}(z_{\mathrm{adv}})_y

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``, ``logit_scale * cosine``.
        target: Class indices, shape ``(B,)``, int64.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input), also for half
        precision and under autocast.

    Raises:
        TypeError: Logits that are not a floating-point tensor, or a target that is not int64.
        ValueError: Shapes that do not fit, labels out of range (checked on a CPU only), or an
            option out of range.

    Example:
        >>> tecoa_loss(torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([0]))
        tensor(0.3133)

    References:
        Mao et al. (2023), "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models",
        https://arxiv.org/abs/2212.07016: the text-guided contrastive objective.
    """
    options = check_options(
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return _tecoa_terms(logits_adv, target, **options).total


class TeCoALoss(LossModule):
    """``tecoa_loss`` with its options kept; see there.

    ``official()`` is the plain loss: the published one has nothing to correct.

    Example:
        >>> TeCoALoss()(torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([0]))
        tensor(0.3133)
    """

    requires = frozenset({"logits_adv"})

    def __init__(self, *, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(label_smoothing=label_smoothing, reduction=reduction)

    @classmethod
    def official(cls) -> TeCoALoss:
        """Return the loss with the published constants."""
        return cls()

    def terms(self, logits_adv: Tensor, target: Tensor) -> TeCoATerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _tecoa_terms(logits_adv, target, **self.options)

    def forward(self, logits_adv: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``(B, C)`` and labels ``(B,)``."""
        return self.terms(logits_adv, target).total


# PMG-AFT


class PMGAFTTerms(NamedTuple):
    """What ``PMGAFTLoss`` is made of, unweighted, each reduced as it enters the loss."""

    total: Tensor
    cross_entropy: Tensor
    kl_ref: Tensor
    kl_clean: Tensor


def _pmg_aft_terms(
    logits_adv: Tensor,
    target: Tensor,
    logits_adv_ref: Tensor,
    logits_clean: Tensor,
    *,
    temperature: float,
    ref_weight: float,
    clean_weight: float,
    kl_reduction: Reduction | None,
    detach_ref: bool,
    detach_clean: bool,
    reduction: Reduction,
) -> PMGAFTTerms:
    _check_reductions(kl_reduction, reduction)
    adv, ref, clean = check_logits(
        logits_adv=logits_adv, logits_adv_ref=logits_adv_ref, logits_clean=logits_clean
    )
    check_labels(target, adv)
    ref = ref.detach() if detach_ref else ref
    clean = clean.detach() if detach_clean else clean
    scale = 1 / temperature
    cross_entropy = reduce(cross_entropies(adv * scale, target), reduction)
    kl_ref = reduce(categorical_kl(ref, adv, scale), kl_reduction or reduction)
    kl_clean = reduce(categorical_kl(clean, adv, scale), kl_reduction or reduction)
    total = cross_entropy + ref_weight * kl_ref + clean_weight * kl_clean
    return PMGAFTTerms(total, cross_entropy, kl_ref, kl_clean)


def _check_reductions(kl_reduction: Reduction | None, reduction: Reduction) -> None:
    if kl_reduction is not None and reduction == "none":
        expected = 'None with reduction="none"'
        raise ValueError(wrong("kl_reduction", expected, repr(kl_reduction)))


def pmg_aft_loss(
    logits_adv: Tensor,
    target: Tensor,
    logits_adv_ref: Tensor,
    logits_clean: Tensor,
    *,
    temperature: float = 1.0,
    ref_weight: float = 1.0,
    clean_weight: float = 1.0,
    kl_reduction: Reduction | None = None,
    detach_ref: bool = True,
    detach_clean: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""PMG-AFT: cross-entropy, guided by the frozen model and by the clean prediction.

    .. math::
        \mathcal{L} = \mathrm{CE}(z_{\mathrm{adv}}, y)
            + a\, \mathrm{KL}(p_{\mathrm{adv,ref}} \,\|\, p_{\mathrm{adv}})
            + b\, \mathrm{KL}(p_{\mathrm{clean}} \,\|\, p_{\mathrm{adv}}),
        \qquad p = \mathrm{softmax}(z/T)

    The cross-entropy is at T too. Both KLs are computed without cancellation.

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``.
        target: Class indices, shape ``(B,)``, int64.
        logits_adv_ref: Frozen original model on the *attacked* image, the same shape.
        logits_clean: Trained model on the clean image, the same shape.
        temperature: T > 0, dividing all logits. ``logit_scale`` turns scaled logits into cosines.
        ref_weight: a >= 0.
        clean_weight: b >= 0.
        kl_reduction: ``"mean"`` or ``"sum"`` over the batch for the two KLs; ``None``: as
            ``reduction``.
        detach_ref: Whether gradients stop at ``logits_adv_ref``.
        detach_clean: Whether gradients stop at ``logits_clean``, which makes its pass cheaper.
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
        >>> adv, ref = torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> pmg_aft_loss(adv, torch.tensor([0]), ref, ref)
        tensor(0.7956)

    References:
        Wang et al. (2024), "Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial
        Robustness", https://arxiv.org/abs/2401.04350: the training objective.
    """
    options = check_options(
        "kl_reduction",
        temperature=temperature,
        ref_weight=ref_weight,
        clean_weight=clean_weight,
        kl_reduction=kl_reduction,
        detach_ref=detach_ref,
        detach_clean=detach_clean,
        reduction=reduction,
    )
    return _pmg_aft_terms(logits_adv, target, logits_adv_ref, logits_clean, **options).total


class PMGAFTLoss(LossModule):
    """``pmg_aft_loss`` with its options kept; see there.

    What ``official()`` does differently:

    - the logits are divided by the logit scale, so all three terms see bare cosines: with 200
      classes the cross-entropy stays near its maximum of ln 200;
    - the KLs are summed over the batch and the cross-entropy averaged, so their balance depends on
      the batch size (256 in the published configuration);
    - gradients also flow into the frozen model's logits, where nothing trains.

    Example:
        >>> adv, ref = torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> PMGAFTLoss()(adv, torch.tensor([0]), ref, ref)
        tensor(0.7956)
        >>> PMGAFTLoss.official()(adv, torch.tensor([0]), ref, ref)
        tensor(1.0631)
    """

    requires = frozenset({"logits_adv", "logits_adv_ref", "logits_clean"})

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ref_weight: float = 1.0,
        clean_weight: float = 1.0,
        kl_reduction: Reduction | None = None,
        detach_ref: bool = True,
        detach_clean: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            "kl_reduction",
            temperature=temperature,
            ref_weight=ref_weight,
            clean_weight=clean_weight,
            kl_reduction=kl_reduction,
            detach_ref=detach_ref,
            detach_clean=detach_clean,
            reduction=reduction,
        )
        _check_reductions(kl_reduction, reduction)

    @classmethod
    def official(cls, logit_scale: float = 100.0) -> PMGAFTLoss:
        """Return the loss as published, for logits that carry ``logit_scale``."""
        return cls(temperature=logit_scale, kl_reduction="sum", detach_ref=False)

    def terms(
        self, logits_adv: Tensor, target: Tensor, logits_adv_ref: Tensor, logits_clean: Tensor
    ) -> PMGAFTTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _pmg_aft_terms(logits_adv, target, logits_adv_ref, logits_clean, **self.options)

    def forward(
        self, logits_adv: Tensor, target: Tensor, logits_adv_ref: Tensor, logits_clean: Tensor
    ) -> Tensor:
        """Return the loss of three logits ``(B, C)`` and labels ``(B,)``."""
        return self.terms(logits_adv, target, logits_adv_ref, logits_clean).total


# FARE

Metric = Literal["l2", "cosine"]


class FARETerms(NamedTuple):
    """What ``FARELoss`` is made of, unweighted, each reduced like the loss."""

    total: Tensor
    adv: Tensor
    clean: Tensor


def _fare_terms(
    features_adv: Tensor,
    features_ref: Tensor,
    features_clean: Tensor | None = None,
    *,
    clean_weight: float,
    metric: Metric,
    normalize: bool,
    detach_ref: bool,
    reduction: Reduction,
) -> FARETerms:
    check_number("clean_weight", clean_weight, at_least=0, at_most=1)  # here it is a share
    inputs: dict[str, Tensor | None] = {"features_adv": features_adv, "features_ref": features_ref}
    if clean_weight > 0:
        if features_clean is None:
            expected, remedy = "features with clean_weight > 0", "pass them, or set clean_weight=0"
            raise ValueError(wrong("features_clean", expected, "None", remedy))
        inputs["features_clean"] = features_clean
    elif features_clean is not None:
        got = describe(features_clean)
        remedy = "set clean_weight > 0, or leave it out"
        raise ValueError(wrong("features_clean", "None with clean_weight=0", got, remedy))
    adv, ref, *clean = check_features(**inputs)
    ref = ref.detach() if detach_ref else ref
    distances = []
    for features in (adv, *clean):
        if metric == "cosine":
            distances.append(cosine_distance(features, ref))
            continue
        pair = (unit_rows(features)[0], unit_rows(ref)[0]) if normalize else (features, ref)
        distances.append((pair[0] - pair[1]).square().sum(1))
    distance_adv = distances[0]
    distance_clean = distances[1] if clean else torch.zeros_like(distance_adv)
    total = (1 - clean_weight) * distance_adv + clean_weight * distance_clean
    return FARETerms(*(reduce(term, reduction) for term in (total, distance_adv, distance_clean)))


def fare_loss(
    features_adv: Tensor,
    features_ref: Tensor,
    features_clean: Tensor | None = None,
    *,
    clean_weight: float = 0.0,
    metric: Metric = "l2",
    normalize: bool = False,
    detach_ref: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""FARE: keep the attacked image's features where the frozen model had the clean ones.

    .. math::
        \mathcal{L} = (1 - w)\, d(f_{\mathrm{adv}}, f_{\mathrm{ref}})
            + w\, d(f_{\mathrm{clean}}, f_{\mathrm{ref}}),
        \qquad d(a, b) = \lVert a - b \rVert_2^2 \;\text{ or }\; 1 - \cos(a, b)

    The squared distance is summed over the D features and averaged over the batch:
    ``F.mse_loss`` is D times smaller. No labels and no text are involved.

    Args:
        features_adv: Trained encoder on the attacked image, shape ``(B, D)``, as the encoder gives
            them: not normalised (``ZeroShotClassifier.embed``).
        features_ref: Frozen encoder on the clean image, the same shape. To hold on to the trained
            encoder instead, as TRADES does, pass its detached clean features.
        features_clean: Trained encoder on the clean image; only with ``clean_weight > 0``.
        clean_weight: w in [0, 1].
        metric: ``"l2"`` (squared) or ``"cosine"``.
        normalize: Whether ``"l2"`` compares features of unit length, as ``"cosine"`` always does.
        detach_ref: Whether gradients stop at ``features_ref``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input), also for half
        precision, whose squares overflow beyond 255.

    Raises:
        TypeError: Features that are not floating-point tensors.
        ValueError: Features that are not ``(B, D)`` or differ in shape, clean features without a
            weight or the other way round, or an option out of range.

    Example:
        >>> fare_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]]))
        tensor(4.)
        >>> fare_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), metric="cosine")
        tensor(0.0400)

    References:
        Schlarmann et al. (2024), "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision
        Embeddings for Robust Large Vision-Language Models", https://arxiv.org/abs/2402.12336: the
        embedding loss of FARE.
    """
    options = check_options(
        clean_weight=clean_weight,
        metric=metric,
        normalize=normalize,
        detach_ref=detach_ref,
        reduction=reduction,
    )
    return _fare_terms(features_adv, features_ref, features_clean, **options).total


class FARELoss(LossModule):
    """``fare_loss`` with its options kept; see there.

    ``official()`` is the plain loss: the published one has nothing to correct. (Its code's default
    attack compares a *normalised* attacked embedding with the plain reference; give your attack
    this loss's own distance.)

    Example:
        >>> FARELoss()(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]]))
        tensor(4.)
        >>> sorted(FARELoss(clean_weight=0.5).requires)
        ['features_adv', 'features_clean', 'features_ref']
    """

    def __init__(
        self,
        *,
        clean_weight: float = 0.0,
        metric: Metric = "l2",
        normalize: bool = False,
        detach_ref: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            clean_weight=clean_weight,
            metric=metric,
            normalize=normalize,
            detach_ref=detach_ref,
            reduction=reduction,
        )
        check_number("clean_weight", clean_weight, at_least=0, at_most=1)

    @property
    def requires(self) -> frozenset[str]:
        """The passes to run; the clean one only with a weight."""
        clean = {"features_clean"} if self.options["clean_weight"] > 0 else set()
        return frozenset({"features_adv", "features_ref"} | clean)

    @classmethod
    def official(cls) -> FARELoss:
        """Return the loss with the published constants."""
        return cls()

    def terms(
        self, features_adv: Tensor, features_ref: Tensor, features_clean: Tensor | None = None
    ) -> FARETerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _fare_terms(features_adv, features_ref, features_clean, **self.options)

    def forward(
        self, features_adv: Tensor, features_ref: Tensor, features_clean: Tensor | None = None
    ) -> Tensor:
        """Return the loss of features ``(B, D)``."""
        return self.terms(features_adv, features_ref, features_clean).total
