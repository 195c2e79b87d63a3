r"""Plain distillation from the frozen model: the baseline the Dirichlet alignment has to beat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calibclip._kernels import categorical_kl
from calibclip.dirichlet import Reduction, reduce
from calibclip.losses._shell import (
    Direction,
    LossModule,
    check_labels,
    check_logits,
    check_options,
    cross_entropies,
)
from calibclip.losses.dirichlet_align import log_strength, paper_log_weight


class DistillationTerms(NamedTuple):
    """What ``DistillationLoss`` is made of, unweighted, each reduced like the loss.

    ``effective_weight`` is the batch mean of the KL's weight.
    """

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor
    effective_weight: Tensor


def _distillation_terms(
    logits_adv: Tensor,
    target: Tensor | None,
    logits_ref: Tensor,
    *,
    logit_scale: float,
    temperature: float,
    weight: float | None,
    direction: Direction,
    detach_ref: bool,
    reduction: Reduction,
) -> DistillationTerms:
    adv, ref = check_logits(logits_adv=logits_adv, logits_ref=logits_ref)
    ref = ref.detach() if detach_ref else ref
    if weight is None:
        log_weight = log_strength(ref.detach(), logit_scale, temperature)
        weights = (log_weight + paper_log_weight(temperature)).exp().to(adv.dtype)
    else:
        weights = torch.full_like(adv[:, 0], weight, requires_grad=False)
    scale = 1 / (logit_scale * temperature)
    kl = categorical_kl(*((ref, adv) if direction == "forward" else (adv, ref)), scale)
    if target is None:
        cross_entropy = torch.zeros_like(kl)
    else:
        check_labels(target, adv)
        cross_entropy = cross_entropies(adv, target)
    total = cross_entropy + weights * kl
    terms = (reduce(term, reduction) for term in (total, cross_entropy, kl))
    return DistillationTerms(*terms, effective_weight=weights.mean())


def distillation_loss(
    logits_adv: Tensor,
    target: Tensor | None,
    logits_ref: Tensor,
    *,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
    weight: float | None = None,
    direction: Direction = "forward",
    detach_ref: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy plus a categorical KL to the frozen model's clean prediction, both softened.

    .. math::
        \mathcal{L} = \mathrm{CE}(z_{\mathrm{adv}}, y)
            + w\, \mathrm{KL}(p_{\mathrm{ref}} \,\|\, p_{\mathrm{adv}}),
        \qquad p = \mathrm{softmax}\Big(\frac{z}{sT}\Big)

    At the paper's T = 0.07 ``dirichlet_align_loss`` is this loss to about eight digits, with each
    sample's :math:`w = \lambda\,\alpha_0(\mathrm{ref})`. That is ``weight=None``: whatever else
    the Dirichlet loss gains at that T is noise. A constant weight tells whether weighting samples
    by the reference's evidence matters. The KL is computed without cancellation.

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``, ``logit_scale * cosine``.
        target: Class indices, shape ``(B,)``, int64. ``None``: the KL part alone.
        logits_ref: Frozen original model on the clean image, the same shape and scale.
        logit_scale: s > 0, multiplicative: ``logits = s * cosine``.
        temperature: T > 0, of the cosines: the softmax has a temperature of sT on the logits.
        weight: w >= 0; ``None`` is the paper's :math:`\lambda` times each sample's
            :math:`\alpha_0(\mathrm{ref})`, about 170 for 200 classes and cosines in the
            range of OpenAI's CLIP. No factor
            :math:`T^2` is added.
        direction: ``"forward"`` is KL(ref || adv), which the paper's KL(Dir_adv || Dir_ref) turns
            into; ``"reverse"`` is KL(adv || ref).
        detach_ref: Whether gradients stop at ``logits_ref``. The weight carries none.
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
        >>> distillation_loss(adv, torch.tensor([0]), ref)
        tensor(0.4014)
        >>> distillation_loss(adv, torch.tensor([0]), ref, weight=170.0)
        tensor(3.6079)

    References:
        Hinton et al. (2015), "Distilling the Knowledge in a Neural Network",
        https://arxiv.org/abs/1503.02531; the equivalence is derived in ``docs/closed-form.md``.
    """
    options = check_options(
        "weight",
        logit_scale=logit_scale,
        temperature=temperature,
        weight=weight,
        direction=direction,
        detach_ref=detach_ref,
        reduction=reduction,
    )
    return _distillation_terms(logits_adv, target, logits_ref, **options).total


class DistillationLoss(LossModule):
    """``distillation_loss`` with its options kept; see there.

    ``official()`` is the plain loss, for a given logit scale: nobody has published this baseline.

    Example:
        >>> adv, ref = torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> DistillationLoss(weight=170.0)(adv, torch.tensor([0]), ref)
        tensor(3.6079)
    """

    requires = frozenset({"logits_adv", "logits_ref"})

    def __init__(
        self,
        *,
        logit_scale: float = 100.0,
        temperature: float = 0.07,
        weight: float | None = None,
        direction: Direction = "forward",
        detach_ref: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            "weight",
            logit_scale=logit_scale,
            temperature=temperature,
            weight=weight,
            direction=direction,
            detach_ref=detach_ref,
            reduction=reduction,
        )

    @classmethod
    def official(cls, logit_scale: float = 100.0) -> DistillationLoss:
        """Return the loss with the weight of the paper's objective, for a model's scale."""
        return cls(logit_scale=logit_scale)

    def terms(
        self, logits_adv: Tensor, target: Tensor | None, logits_ref: Tensor
    ) -> DistillationTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return _distillation_terms(logits_adv, target, logits_ref, **self.options)

    def forward(self, logits_adv: Tensor, target: Tensor | None, logits_ref: Tensor) -> Tensor:
        """Return the loss of two logits ``(B, C)`` and labels ``(B,)``."""
        return self.terms(logits_adv, target, logits_ref).total
