"""The losses of TGA-ZSR and Comp-TGA, which hold attention maps to the frozen model's.

The maps themselves are made by ``calibclip.attention``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from calibclip.dirichlet import Reduction, reduce
from calibclip.losses._shell import (
    LossModule,
    check_labels,
    check_logits,
    check_maps,
    check_options,
    check_same_batch,
    cosine_distance,
    cross_entropies,
    row_norm,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Distance = Literal["l2", "l1", "cosine"]


class TGATerms(NamedTuple):
    """What ``TGALoss`` is made of, unweighted, each reduced like the loss.

    The two distances are those of the attacked and of the clean image's map from the reference.
    """

    total: Tensor
    cross_entropy: Tensor
    attention_adv: Tensor
    attention_clean: Tensor


def _tga_terms(
    logits_adv: Tensor,
    target: Tensor,
    attention_adv: Tensor,
    attention_ref: Tensor,
    attention_clean: Tensor,
    *,
    adv_weight: float,
    clean_weight: float,
    distance: Distance,
    detach_ref: bool,
    reduction: Reduction,
) -> TGATerms:
    (logits_adv,) = check_logits(logits_adv=logits_adv)
    check_labels(target, logits_adv)
    adv, ref, clean = check_maps(
        attention_adv=attention_adv, attention_ref=attention_ref, attention_clean=attention_clean
    )
    check_same_batch("attention_adv", attention_adv, logits_adv)
    ref = ref.detach() if detach_ref else ref
    cross_entropy = cross_entropies(logits_adv, target)
    distance_adv, distance_clean = (_map_distance(maps, ref, distance) for maps in (adv, clean))
    total = cross_entropy + adv_weight * distance_adv + clean_weight * distance_clean
    terms = (total, cross_entropy, distance_adv, distance_clean)
    return TGATerms(*(reduce(term, reduction) for term in terms))


def _map_distance(maps: Tensor, reference: Tensor, distance: Distance) -> Tensor:
    if distance == "cosine":
        return cosine_distance(maps, reference)
    if distance == "l1":
        return (maps - reference).abs().mean(1)
    # Its derivative where both maps are equal, as they are in the first step, is 0.
    return row_norm(maps - reference)


def tga_loss(
    logits_adv: Tensor,
    target: Tensor,
    attention_adv: Tensor,
    attention_ref: Tensor,
    attention_clean: Tensor,
    *,
    adv_weight: float = 0.08,
    clean_weight: float = 0.05,
    distance: Distance = "l2",
    detach_ref: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""TGA-ZSR: cross-entropy, and attention maps held to the frozen model's on the clean image.

    .. math::
        \mathcal{L} = \mathrm{CE}(z_{\mathrm{adv}}, y)
            + a\, \lVert A_{\mathrm{adv}} - A_{\mathrm{ref}} \rVert_2
            + b\, \lVert A_{\mathrm{clean}} - A_{\mathrm{ref}} \rVert_2

    The norms are not squared and go over all pixels of a map, so the weights fit maps of one
    size: the published ones fit 224 × 224, the default of ``attention.text_guided_attention``.

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``, ``logit_scale * cosine``.
        target: Class indices, shape ``(B,)``, int64.
        attention_adv: Map of the trained model on the attacked image, shape ``(B, ...)``.
        attention_ref: Map of the frozen model on the clean image, the same shape.
        attention_clean: Map of the trained model on the clean image, the same shape.
        adv_weight: a >= 0.
        clean_weight: b >= 0.
        distance: ``"l2"`` as above, ``"l1"`` (the *mean* absolute difference, hence far smaller)
            or ``"cosine"`` (one minus the cosine).
        detach_ref: Whether gradients stop at ``attention_ref``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input), also for half
        precision and under autocast.

    Raises:
        TypeError: Logits or maps that are not floating-point tensors, a target that is not int64.
        ValueError: Maps that differ in size, shapes that do not fit, labels out of range (checked
            on a CPU only), or an option out of range.

    Example:
        >>> import torch
        >>> logits, maps = torch.tensor([[25.0, 24.0, 15.0]]), torch.zeros(1, 224, 224)
        >>> tga_loss(logits, torch.tensor([0]), maps + 0.1, maps, maps)
        tensor(2.1053)

    References:
        Yu et al. (2024), "Text-Guided Attention is All You Need for Zero-Shot Robustness in
        Vision-Language Models", https://arxiv.org/abs/2410.21802: the training objective.
    """
    options = check_options(
        adv_weight=adv_weight,
        clean_weight=clean_weight,
        distance=distance,
        detach_ref=detach_ref,
        reduction=reduction,
    )
    return _tga_terms(
        logits_adv, target, attention_adv, attention_ref, attention_clean, **options
    ).total


def comp_tga_loss(
    logits_adv: Tensor,
    target: Tensor,
    attention_adv: Tensor,
    attention_ref: Tensor,
    attention_clean: Tensor,
    *,
    adv_weight: float = 0.10,
    clean_weight: float = 0.07,
    distance: Distance = "l2",
    detach_ref: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Comp-TGA: ``tga_loss`` with other weights, for ``attention.complementary_attention`` maps.

    .. math::
        \mathcal{L} = \mathrm{CE}(z_{\mathrm{adv}}, y)
            + 0.10\, \lVert A_{\mathrm{adv}} - A_{\mathrm{ref}} \rVert_2
            + 0.07\, \lVert A_{\mathrm{clean}} - A_{\mathrm{ref}} \rVert_2

    Args:
        logits_adv: As for ``tga_loss``, like all that follow.
        target: Class indices.
        attention_adv: Map of the trained model on the attacked image.
        attention_ref: Map of the frozen model on the clean image.
        attention_clean: Map of the trained model on the clean image.
        adv_weight: Weight of the attacked image's distance, >= 0.
        clean_weight: Weight of the clean image's distance, >= 0.
        distance: ``"l2"``, ``"l1"`` or ``"cosine"``.
        detach_ref: Whether gradients stop at ``attention_ref``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 or float64.

    Raises:
        TypeError: As for ``tga_loss``.
        ValueError: As for ``tga_loss``.

    Example:
        >>> import torch
        >>> logits, maps = torch.tensor([[25.0, 24.0, 15.0]]), torch.zeros(1, 224, 224)
        >>> comp_tga_loss(logits, torch.tensor([0]), maps + 0.1, maps, maps)
        tensor(2.5533)

    References:
        Yu et al., "Complementary Text-Guided Attention for Zero-Shot Adversarial Robustness", IEEE
        TPAMI 2026: the objective of ``Comp-TGA.py`` in https://github.com/zhyblue424/TGA-ZSR.
    """
    options = check_options(
        adv_weight=adv_weight,
        clean_weight=clean_weight,
        distance=distance,
        detach_ref=detach_ref,
        reduction=reduction,
    )
    return _tga_terms(
        logits_adv, target, attention_adv, attention_ref, attention_clean, **options
    ).total


class TGALoss(LossModule):
    """``tga_loss`` with its options kept; see there.

    What ``official()`` does differently:

    - gradients also flow into the frozen model's map, where nothing trains.

    Example:
        >>> import torch
        >>> logits, maps = torch.tensor([[25.0, 24.0, 15.0]]), torch.zeros(1, 224, 224)
        >>> TGALoss()(logits, torch.tensor([0]), maps + 0.1, maps, maps)
        tensor(2.1053)
    """

    requires = frozenset({"logits_adv", "attention_adv", "attention_ref", "attention_clean"})

    def __init__(
        self,
        *,
        adv_weight: float = 0.08,
        clean_weight: float = 0.05,
        distance: Distance = "l2",
        detach_ref: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            adv_weight=adv_weight,
            clean_weight=clean_weight,
            distance=distance,
            detach_ref=detach_ref,
            reduction=reduction,
        )

    @classmethod
    def official(cls) -> Self:
        """Return the loss as published."""
        return cls(detach_ref=False)

    def terms(
        self,
        logits_adv: Tensor,
        target: Tensor,
        attention_adv: Tensor,
        attention_ref: Tensor,
        attention_clean: Tensor,
    ) -> TGATerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        maps = (attention_adv, attention_ref, attention_clean)
        return _tga_terms(logits_adv, target, *maps, **self.options)

    def forward(
        self,
        logits_adv: Tensor,
        target: Tensor,
        attention_adv: Tensor,
        attention_ref: Tensor,
        attention_clean: Tensor,
    ) -> Tensor:
        """Return the loss of logits ``(B, C)``, labels ``(B,)`` and maps ``(B, ...)``."""
        return self.terms(logits_adv, target, attention_adv, attention_ref, attention_clean).total


class CompTGALoss(TGALoss):
    """``comp_tga_loss`` with its options kept: ``TGALoss`` with other weights.

    What ``official()`` does differently:

    - gradients also flow into the frozen model's map, where nothing trains.

    Its code also resets the global random state in every step, so that the attack always starts at
    the same noise; this package never touches that state.

    Example:
        >>> import torch
        >>> logits, maps = torch.tensor([[25.0, 24.0, 15.0]]), torch.zeros(1, 224, 224)
        >>> CompTGALoss()(logits, torch.tensor([0]), maps + 0.1, maps, maps)
        tensor(2.5533)
    """

    def __init__(
        self,
        *,
        adv_weight: float = 0.10,
        clean_weight: float = 0.07,
        distance: Distance = "l2",
        detach_ref: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            adv_weight=adv_weight,
            clean_weight=clean_weight,
            distance=distance,
            detach_ref=detach_ref,
            reduction=reduction,
        )
