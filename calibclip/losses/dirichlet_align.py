r"""Cross-entropy plus a Dirichlet KL to the frozen model's clean prediction (Lu et al., 2025)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calibclip._checks import wrong
from calibclip._kernels import dirichlet_kl_parts, scalar_dtype
from calibclip.dirichlet import Implementation, Reduction, reduce
from calibclip.losses._shell import (
    Direction,
    LossModule,
    check_labels,
    check_logits,
    check_options,
    cross_entropies,
)


class AlignTerms(NamedTuple):
    r"""What ``DirichletAlignLoss`` is made of, each reduced like the loss.

    ``total = cross_entropy + lambda * kl`` and ``kl = shape + evidence``. The KL terms are float64
    where the device has it, since :math:`\alpha_0` reaches :math:`e^{130}` at T = 0.01.
    ``effective_weight``, :math:`\lambda` times the batch mean of :math:`\alpha_0(\mathrm{ref})`, is
    what to compare between models: it multiplies a categorical KL of ordinary size.
    """

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor
    shape: Tensor
    evidence: Tensor
    effective_weight: Tensor


def paper_log_weight(temperature: float) -> float:
    r"""Return the logarithm of the paper's :math:`\lambda = 10^5 / (1 + e^{2/T})`.

    Args:
        temperature: T > 0.

    Returns:
        A number; :math:`\lambda` itself underflows below T of about 0.003.

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997: the weight of the training objective.
    """
    return math.log(1e5) - 2 / temperature - math.log1p(math.exp(-2 / temperature))


def dirichlet_align_terms(
    logits_adv: Tensor,
    logits_ref: Tensor,
    target: Tensor | None = None,
    *,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
    weight: float | None = None,
    relative_weight: float | None = None,
    direction: Direction = "reverse",
    detach_ref: bool = True,
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
) -> AlignTerms:
    r"""Compute the terms of ``dirichlet_align_loss``, with the same arguments.

    Of the KL's two parts, *shape* is :math:`\beta_0\,\mathrm{KL}(q \,\|\, p)` and *evidence* the
    rest, with p, q the means and :math:`\beta_0` the total concentration of the second argument
    (the reference for ``"reverse"``). At the paper's settings the evidence part is about
    :math:`10^{-8}` of the whole: the loss shapes predictions and hardly trains evidence.

    Returns:
        ``AlignTerms``; ``total`` carries the gradient of the loss. Without a target, the
        cross-entropy is 0. Below T of about 0.015 the evidence is too small for float32 next to
        the shape and reads 0; below about 0.002 the KL overflows float64 too, though ``total``
        stays right.

    Example:
        >>> adv, ref = torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> terms = dirichlet_align_terms(adv, ref, torch.tensor([0]))
        >>> torch.testing.assert_close(terms.kl, terms.shape + terms.evidence)
        >>> print(f"{terms.evidence / terms.kl:.0e}")
        1e-08
    """
    # The kernel takes half precision as it is, and keeps no float32 copy of it.
    upcast, _ = check_logits(logits_adv=logits_adv, logits_ref=logits_ref)
    if target is not None:
        check_labels(target, upcast)
    options = check_options(
        "weight",
        "relative_weight",
        logit_scale=logit_scale,
        temperature=temperature,
        weight=weight,
        relative_weight=relative_weight,
        direction=direction,
        detach_ref=detach_ref,
        reduction=reduction,
    )
    logit_scale, temperature = options["logit_scale"], options["temperature"]
    weight, relative_weight = options["weight"], options["relative_weight"]
    check_one_weight(weight, relative_weight)
    if detach_ref:
        logits_ref = logits_ref.detach()

    # KL / mean alpha_0(ref) has ordinary size whatever T, C and the model's cosines are, while
    # alpha_0 itself may not fit float32; so that ratio is what the kernel computes.
    log_mean = log_mean_strength(log_strength(logits_ref.detach(), logit_scale, temperature))
    log_effective_weight = torch.full_like(
        log_mean, log_weight(temperature, weight, relative_weight)
    )
    if relative_weight is None:
        log_effective_weight += log_mean
    pair = (logits_adv, logits_ref) if direction == "reverse" else (logits_ref, logits_adv)
    shape, evidence = dirichlet_kl_parts(
        *pair,
        scale=1 / (logit_scale * temperature),
        shift=1 / temperature,
        log_weight=-log_mean,
        impl=impl,
    )
    effective_weight = log_effective_weight.exp()
    aligned = (shape + evidence) * effective_weight.to(shape.dtype)
    if target is None:
        cross_entropy = torch.zeros_like(aligned)
    else:
        cross_entropy = cross_entropies(upcast, target)
    mean_strength = log_mean.exp()
    wide = (part.to(mean_strength.dtype) for part in (shape, evidence))
    shape, evidence = (torch.where(part == 0, part, part * mean_strength) for part in wide)
    return AlignTerms(
        total=reduce(cross_entropy + aligned, reduction),
        cross_entropy=reduce(cross_entropy, reduction),
        kl=reduce(shape + evidence, reduction),
        shape=reduce(shape, reduction),
        evidence=reduce(evidence, reduction),
        effective_weight=effective_weight,
    )


def dirichlet_align_loss(
    logits_adv: Tensor,
    logits_ref: Tensor,
    target: Tensor | None = None,
    *,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
    weight: float | None = None,
    relative_weight: float | None = None,
    direction: Direction = "reverse",
    detach_ref: bool = True,
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
) -> Tensor:
    r"""The paper's objective: cross-entropy, and calibration of the adversarial Dirichlet.

    .. math::
        \mathcal{L} = \mathrm{CE}(z_{\mathrm{adv}}, y)
            + \lambda\, \mathrm{KL}\big(\mathrm{Dir}(\alpha_{\mathrm{adv}}) \,\|\,
                                        \mathrm{Dir}(\alpha_{\mathrm{ref}})\big),
        \qquad \ln\alpha = (z/s + 1)/T

    The reference is the frozen original model's prediction on the *clean* image. At the paper's T
    the KL equals :math:`\alpha_0(\mathrm{ref})` times a categorical KL to eight digits, so
    :math:`\lambda` means :math:`\lambda\,\alpha_0(\mathrm{ref})`: about 170 for OpenAI's CLIP and
    200 classes, and orders of magnitude more or less for another range of cosines, T or C.
    ``relative_weight`` divides that factor out: 170 then means the same everywhere.

    Args:
        logits_adv: Trained model on the attacked image, shape ``(B, C)``, ``logit_scale * cosine``.
        logits_ref: Frozen original model on the clean image, the same shape and scale.
        target: Class indices, shape ``(B,)``, int64. ``None``: the KL part alone.
        logit_scale: s > 0, multiplicative: ``logits = s * cosine``. OpenAI's CLIP has 100.
        temperature: T > 0.
        weight: :math:`\lambda \ge 0`; ``None`` is the paper's :math:`10^5/(1 + e^{2/T})`.
        relative_weight: w >= 0 in :math:`w\,\mathrm{KL}/\overline{\alpha_0(\mathrm{ref})}`, the
            mean being over the batch and detached. Excludes ``weight``.
        direction: ``"reverse"`` is KL(adv || ref), as in the paper; ``"forward"`` is
            KL(ref || adv), which the paper's ablation finds worse.
        detach_ref: Whether gradients stop at ``logits_ref``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the batch.
        impl: As for ``dirichlet_kl``.

    Returns:
        0-d, or ``(B,)`` for ``"none"``; float32 (float64 for float64 input). float16 and bfloat16
        logits are upcast before the affine map, also under autocast; but rounding them has already
        cost them their digits (``docs/closed-form.md``): compute the cosines in float32. A mean
        over an empty batch is NaN, as in PyTorch. NaN and infinite logits give NaN in their
        rows only; as a reference they are left out of the mean of :math:`\alpha_0`.

    Raises:
        TypeError: Logits that are not floating-point tensors, a target that is not int64, a
            number given as a tensor.
        ValueError: Shapes that differ, labels out of range (checked on a CPU only), a number out
            of range, both weights given, an unknown name.

    Example:
        >>> adv, ref = torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> dirichlet_align_loss(adv, ref, torch.tensor([0]))
        tensor(0.4014)
        >>> dirichlet_align_loss(adv, ref, torch.tensor([0]), relative_weight=170.0)
        tensor(3.6079)

    References:
        Lu et al. (2025), "Calibrating Uncertainty for Zero-Shot Adversarial CLIP",
        https://arxiv.org/abs/2512.12997: the training objective.
    """
    return dirichlet_align_terms(
        logits_adv,
        logits_ref,
        target,
        logit_scale=logit_scale,
        temperature=temperature,
        weight=weight,
        relative_weight=relative_weight,
        direction=direction,
        detach_ref=detach_ref,
        reduction=reduction,
        impl=impl,
    ).total


class DirichletAlignLoss(LossModule):
    """``dirichlet_align_loss`` with its options kept; see there for their meaning.

    ``official()`` is the plain loss: its constants are the paper's. The published code differs in
    precision only: it maps half-precision logits to concentrations in half precision, adds 1e-6 to
    each, and computes the KL from gamma functions in float32.

    Example:
        >>> loss = DirichletAlignLoss(logit_scale=100.0, relative_weight=170.0)
        >>> adv, ref = torch.tensor([[25.0, 24.0, 15.0]]), torch.tensor([[26.0, 22.0, 15.0]])
        >>> loss(adv, ref, torch.tensor([0]))
        tensor(3.6079)
        >>> round(float(loss.terms(adv, ref, torch.tensor([0])).effective_weight))
        170
    """

    requires = frozenset({"logits_adv", "logits_ref"})

    def __init__(
        self,
        logit_scale: float = 100.0,
        temperature: float = 0.07,
        weight: float | None = None,
        relative_weight: float | None = None,
        direction: Direction = "reverse",
        *,
        detach_ref: bool = True,
        reduction: Reduction = "mean",
        impl: Implementation = "auto",
    ) -> None:
        super().__init__(
            "weight",
            "relative_weight",
            logit_scale=logit_scale,
            temperature=temperature,
            weight=weight,
            relative_weight=relative_weight,
            direction=direction,
            detach_ref=detach_ref,
            reduction=reduction,
            impl=impl,
        )
        check_one_weight(weight, relative_weight)

    @classmethod
    def official(cls, logit_scale: float = 100.0) -> DirichletAlignLoss:
        """Return the loss with the paper's constants, which are the defaults."""
        return cls(logit_scale)

    def terms(
        self, logits_adv: Tensor, logits_ref: Tensor, target: Tensor | None = None
    ) -> AlignTerms:
        """Return the loss as its terms; ``.total`` is what ``forward`` returns."""
        return dirichlet_align_terms(logits_adv, logits_ref, target, **self.options)

    def forward(
        self, logits_adv: Tensor, logits_ref: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return the loss of logits ``(B, C)``, ``(B, C)`` and labels ``(B,)``."""
        return self.terms(logits_adv, logits_ref, target).total


def log_weight(temperature: float, weight: float | None, relative_weight: float | None) -> float:
    """Return the logarithm of the one weight that counts: the given one, or the paper's.

    Args:
        temperature: T > 0.
        weight: ``None`` if not given.
        relative_weight: Likewise; still to be divided by the mean strength.

    Returns:
        A number, -infinity for a weight of 0.
    """
    given = weight if relative_weight is None else relative_weight
    if given is None:
        return paper_log_weight(temperature)
    return math.log(given) if given > 0 else -math.inf


def log_mean_strength(rows: Tensor) -> Tensor:
    r"""Return the logarithm of the mean of :math:`\alpha_0(\mathrm{ref})` over a batch.

    Args:
        rows: ``log_strength`` of each row, ``(B,)``.

    Returns:
        0-d. A row of NaN or infinite logits spoils its own loss only, not the scale of the others.
    """
    rows = rows.masked_fill(~(rows < math.inf), -math.inf)
    return torch.logsumexp(rows, 0) - math.log(max(1, len(rows)))


def log_strength(logits: Tensor, logit_scale: float, temperature: float) -> Tensor:
    r"""Return :math:`\ln\alpha_0` of each row of logits.

    Args:
        logits: Shape ``(B, C)``, ``logit_scale * cosine``.
        logit_scale: s > 0.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``, in the widest dtype the device has.
    """
    # What is large, 1/T and the largest logit, is added at the end, in the wide dtype: in float32
    # it would blur all that is smaller.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = logits.amax(-1, keepdim=True)
    relative = torch.logsumexp((logits - top) * (1 / (logit_scale * temperature)), -1)
    dtype = scalar_dtype(logits.device)
    return (
        relative.to(dtype)
        + top.squeeze(-1).to(dtype) / (logit_scale * temperature)
        + 1 / temperature
    )


def check_one_weight(weight: float | None, relative_weight: float | None) -> None:
    """Refuse two weights, of which one would have no effect.

    Args:
        weight: Checked already; ``None`` if not given.
        relative_weight: Likewise.

    Raises:
        ValueError: Both are given.
    """
    if weight is not None and relative_weight is not None:
        got = f"weight={weight!r} and relative_weight={relative_weight!r}"
        raise ValueError(wrong("weight", "weight or relative_weight, not both", got))
