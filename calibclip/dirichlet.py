r"""CLIP's cosines read as a Dirichlet: concentrations, uncertainties, divergence.

A cosine :math:`c_k` between an image and the text of class k becomes the concentration
:math:`\ln \alpha_k = (c_k + 1)/T`. Everything here takes ``log_alpha``: :math:`\alpha` itself
reaches :math:`e^{28}` at the paper's T = 0.07, where textbook formulas lose every float32 digit.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from calibclip._checks import (
    check_choice,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_same_shape,
    describe,
    wrong,
)
from calibclip._kernels import Implementation, dirichlet_kl_parts
from calibclip._kernels.special import smallest

__all__ = [
    "DirichletHead",
    "aleatoric_uncertainty",
    "cosine_similarity",
    "dirichlet_kl",
    "epistemic_uncertainty",
    "log_concentration",
    "mutual_information",
    "predictive_entropy",
    "vacuity",
]

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)


def float32_product(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Multiply ``(B, D)`` by ``(C, D)`` transposed in full float32, whatever the user's settings.

    Autocast would round the factors to half precision, and a lowered
    ``torch.set_float32_matmul_precision`` to 10 bits or fewer: then the product is in float64.
    """
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    exact = torch.float64 if torch.get_float32_matmul_precision() != "highest" else dtype
    with torch.autocast(image_features.device.type, enabled=False):
        return (image_features.to(exact) @ text_features.to(exact).T).to(dtype)


def cosine_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    r"""Cosines of every image with every text, float32 in and out even under autocast.

    .. math:: c_{ik} = \frac{\langle f_i, t_k \rangle}{\lVert f_i \rVert \, \lVert t_k \rVert}

    A cosine rounded to float16 moves :math:`\ln\alpha` by up to 0.003 at T = 0.07, to bfloat16 by
    0.03: more than the alignment loss resolves. So the features are upcast before the product, and
    a lowered ``torch.set_float32_matmul_precision`` does not reach it.

    Args:
        image_features: Shape ``(B, D)``, any floating dtype, any length.
        text_features: Shape ``(C, D)``, any floating dtype, any length.

    Returns:
        Cosines, shape ``(B, C)``, float32 (float64 if one input is).

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: An argument is not 2-D, or the feature sizes or devices differ.

    Example:
        >>> image = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
        >>> cosine_similarity(image, torch.eye(2))
        tensor([[0.6000, 0.8000]])
    """
    check_floating("image_features", image_features, shape="(B, D)", ndim=2)
    check_floating("text_features", text_features, shape="(C, D)", ndim=2)
    if image_features.shape[1] != text_features.shape[1]:
        expected = f"features of size {text_features.shape[1]}, as text_features"
        raise ValueError(wrong("image_features", expected, describe(image_features)))
    check_same_device("text_features", text_features, "image_features", image_features)
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    image = nn.functional.normalize(image_features.to(dtype), dim=-1)
    text = nn.functional.normalize(text_features.to(dtype), dim=-1)
    return float32_product(image, text)


def log_concentration(
    cosine: Tensor, temperature: float = 0.07, *, logit_scale: float = 1.0
) -> Tensor:
    r"""Dirichlet concentrations of CLIP's cosines, or of its logits if ``logit_scale`` is given.

    .. math:: \ln \alpha_k = \frac{c_k + 1}{T}, \qquad c_k = z_k / s

    so :math:`\alpha_k \ge 1` and the ranking of the classes is kept. At :math:`T = 1/s` the mean of
    the Dirichlet, :math:`\alpha_k/\alpha_0`, is CLIP's softmax of the logits :math:`z_k = s\,c_k`.

    Args:
        cosine: Cosines ``c``, shape ``(..., C)``; or scaled logits ``z`` and their ``logit_scale``.
        temperature: T > 0. The paper's is 0.07.
        logit_scale: s > 0, multiplicative (``model.logit_scale.exp()``); 1 for plain cosines.

    Returns:
        ``log_alpha``, shape ``(..., C)``. float32, or float64 for float64 input: float16 and
        bfloat16 are upcast *before* the affine map.

    Raises:
        TypeError: ``cosine`` is not a floating-point tensor.
        ValueError: ``temperature`` or ``logit_scale`` is not a positive number.

    Example:
        >>> log_concentration(torch.tensor([0.25, 0.18]), temperature=0.07)
        tensor([17.8571, 16.8571])

    References:
        Lu et al. (2025), "Calibrating Uncertainty for Zero-Shot Adversarial CLIP",
        https://arxiv.org/abs/2512.12997 (there :math:`\tau' = 0.07`, and 1e-6 is added to
        :math:`\alpha`, which at CLIP's cosines changes no float32 digit).
    """
    check_floating("cosine", cosine, shape="(..., C)")
    temperature = check_number("temperature", temperature, above=0)
    logit_scale = check_number("logit_scale", logit_scale, above=0)
    cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    return cosine * (1 / (logit_scale * temperature)) + 1 / temperature


class DirichletHead(nn.Module):
    r"""``log_concentration`` with its two numbers kept; takes cosines unless told a scale.

    Args:
        temperature: T > 0.
        logit_scale: s > 0 by which the logits given to ``forward`` are scaled; 1 for cosines.

    Example:
        >>> head = DirichletHead(temperature=0.07, logit_scale=100.0)
        >>> log_alpha = head(torch.tensor([[25.0, 18.0]]))
        >>> epistemic_uncertainty(log_alpha)
        tensor([2.5688e-08])
        >>> head.from_features(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([[22.8571, 25.7143]])
    """

    def __init__(self, temperature: float = 0.07, *, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        self.logit_scale = check_number("logit_scale", logit_scale, above=0)

    def forward(self, logits: Tensor) -> Tensor:
        """Return ``log_alpha`` of logits ``logit_scale * cosine``, shape ``(..., C)``."""
        return log_concentration(logits, self.temperature, logit_scale=self.logit_scale)

    def from_features(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return ``log_alpha``, shape ``(B, C)``, of features ``(B, D)`` and ``(C, D)``."""
        return log_concentration(cosine_similarity(image_features, text_features), self.temperature)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"temperature={self.temperature:g}, logit_scale={self.logit_scale:g}"


def dirichlet_kl(
    log_alpha: Tensor,
    log_beta: Tensor,
    reduction: Reduction = "none",
    impl: Implementation = "auto",
) -> Tensor:
    r"""KL divergence between two Dirichlets, from the logarithms of their concentrations.

    .. math::
        \mathrm{KL}(\mathrm{Dir}(\alpha)\,\|\,\mathrm{Dir}(\beta)) =
        \ln\frac{\mathrm{B}(\beta)}{\mathrm{B}(\alpha)}
        + \sum_k (\alpha_k - \beta_k)\,[\psi(\alpha_k) - \psi(\alpha_0)]

    evaluated in a form without cancellation: in float32 the value and both gradients are good to a
    relative 5e-6 however close the two are, the value is never negative, and 0 at equality
    (``docs/closed-form.md``). The *other* direction is the call with the arguments exchanged.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``. In float32 it runs from -87 to where
            :math:`\ln\alpha_0` is 88; beyond, the result is infinite or NaN. The accuracy is for
            :math:`\alpha \ge 1`, as CLIP gives it; below, a row in which one class holds nearly all
            concentration and alone changes loses digits.
        log_beta: :math:`\ln\beta`, the same shape. Gradients flow to both arguments; detach what is
            a reference.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        impl: ``"auto"`` and ``"eager"`` are the closed form with its closed-form gradient, which
            keeps no tensor of the inputs' size and differentiates once. ``"reference"`` is the
            same in float64. ``"torch_distributions"`` is the textbook formula in the inputs' dtype,
            as in published code, for comparison; torch checks its arguments and rejects NaN.

    Returns:
        Shape ``(...,)`` for ``"none"``, else 0-d. float32, or float64 for float64 input or
        ``impl="reference"``. NaN inputs give NaN in their rows. A second derivative raises
        ``RuntimeError``, and so do the transforms of ``torch.func``.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes or devices differ, or a name is unknown.

    Example:
        >>> log_alpha = torch.tensor([[18.0, 17.0, 16.0]])
        >>> dirichlet_kl(log_alpha, log_alpha + torch.tensor([1e-4, 0.0, 0.0]))
        tensor([0.1081])
        >>> dirichlet_kl(log_alpha, log_alpha)
        tensor([0.])

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997, use it with the adversarial prediction
        first. The closed form is calibclip's own.
    """
    check_floating("log_alpha", log_alpha, shape="(..., C)")
    check_floating("log_beta", log_beta, shape="(..., C)")
    check_same_shape("log_beta", log_beta, "log_alpha", log_alpha)
    check_choice("reduction", reduction, REDUCTIONS)
    shape, evidence = dirichlet_kl_parts(log_alpha, log_beta, impl=impl)
    return reduce(shape + evidence, reduction)


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduce one value per sample, as the losses and divergences do.

    Args:
        values: Any shape.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, checked by the caller.

    Returns:
        ``values`` for ``"none"``, else 0-d of the same dtype; the mean of nothing is NaN.
    """
    if reduction == "mean":
        return values.mean()
    return values.sum() if reduction == "sum" else values


class Simplex(NamedTuple):
    """The Dirichlet mean in the log domain."""

    log_alpha: Tensor
    log_alpha0: Tensor  # (...,)
    surprise: Tensor  # -ln p_c >= 0, (..., C)

    @property
    def probs(self) -> Tensor:
        """The Dirichlet mean, (..., C)."""
        return torch.exp(-self.surprise)


def simplex(log_alpha: Tensor) -> Simplex:
    """Return the Dirichlet mean in the log domain, without losing small shares.

    Args:
        log_alpha: Shape ``(..., C)``, checked here; half precision becomes float32.

    Returns:
        ``log_alpha`` upcast, ``log_alpha0`` of shape ``(...,)``, ``surprise`` of ``(..., C)``.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.
    """
    check_floating("log_alpha", log_alpha, shape="(..., C)")
    log_alpha = log_alpha.to(torch.promote_types(log_alpha.dtype, torch.float32))
    top, where = log_alpha.max(-1, keepdim=True)
    # A constant 0 at the largest, so that its gradient is not left over from equal terms.
    gap = (log_alpha - top).scatter(-1, where, 0.0)
    # The largest class is left out of the sum: next to its 1, shares below 6e-8 would vanish, and
    # with them the uncertainty of every confident prediction.
    others = torch.exp(gap).scatter(-1, where, 0.0).sum(-1, keepdim=True)
    log_total = torch.log1p(others)
    return Simplex(log_alpha, (top + log_total).squeeze(-1), log_total - gap)


def digamma_excess(log_x: Tensor) -> Tensor:
    r"""Return :math:`g(x) = \psi(x + 1) - \ln x > 0`, which tends to 1/(2x).

    Elementary functions only: PyTorch's float64 trigamma, which the derivative of its digamma is,
    has an error of 1e-9.

    Args:
        log_x: :math:`\ln x`, any shape, float32 or float64.

    Returns:
        The same shape and dtype; value and derivative good to the dtype's last digits.

    References:
        Abramowitz and Stegun (1964), 6.3.5 (recurrence) and 6.3.18 (asymptotic series).
    """
    n = 4 if log_x.dtype == torch.float32 else 12
    if smallest(log_x) >= math.log(n):  # as CLIP's are, if it may be looked at
        return _digamma_series(torch.exp(-log_x))
    is_small = log_x < math.log(n)
    # Both branches see harmless arguments everywhere, so that neither's gradient is NaN; where, not
    # clamp, whose gradient at the bound itself depends on how the bound is rounded.
    small, large = torch.where(is_small, log_x, 0.0), torch.where(is_small, math.log(n), log_x)
    x = torch.exp(small)
    recurrence = torch.log(x + n) - small + _digamma_series(1 / (x + n))
    for i in range(1, n + 1):
        recurrence = recurrence - 1 / (x + i)
    return torch.where(is_small, recurrence, _digamma_series(torch.exp(-large)))


def _digamma_series(y: Tensor) -> Tensor:
    """Return ``g(x)`` for ``y = 1/x`` with x of at least 4 in float32, 12 in float64."""
    # psi(x) = ln x - 1/(2x) - sum_n B_2n / (2n x^2n), and psi(x+1) = psi(x) + 1/x
    y2 = y.square()
    tail = 1 / 12 - y2 * (1 / 120 - y2 * (1 / 252 - y2 * (1 / 240 - y2 * (1 / 132))))
    return y / 2 - y2 * tail


def _normalized(value: Tensor, log_alpha: Tensor, normalize: bool) -> Tensor:
    check_flag("normalize", normalize)
    if not normalize:
        return value
    if log_alpha.shape[-1] < 2:
        expected = "at least two classes, for ln C > 0"
        raise ValueError(wrong("log_alpha", expected, describe(log_alpha), "pass normalize=False"))
    return value / math.log(log_alpha.shape[-1])


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
        TypeError: ``log_alpha`` is not a floating-point tensor.

    Example:
        >>> predictive_entropy(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(1.0397)

    References:
        Malinin and Gales (2018), "Predictive Uncertainty Estimation via Prior Networks",
        https://arxiv.org/abs/1802.10501, section 3.
    """
    row = simplex(log_alpha)
    return _normalized((row.probs * row.surprise).sum(-1), log_alpha, normalize)


def aleatoric_uncertainty(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Aleatoric uncertainty (AU): the entropy expected of a categorical drawn from the Dirichlet.

    .. math::
        \mathrm{AU} = \sum_k \frac{\alpha_k}{\alpha_0}\,[\psi(\alpha_0 + 1) - \psi(\alpha_k + 1)]

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`, as the paper's code reports it.

    Returns:
        Nats (or the share of :math:`\ln C`), shape ``(...,)``, float32 or float64; relative error
        about 1e-6 in float32 for :math:`\alpha` from 1 to :math:`e^{30}` and beyond. Far below 1
        digits are lost, as psi itself diverges there.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.

    Example:
        >>> aleatoric_uncertainty(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.8333)

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997 (definition of AU); Malinin and Gales
        (2018), https://arxiv.org/abs/1802.10501, section 3 (expected data uncertainty).
    """
    row = simplex(log_alpha)
    # psi(a_0 + 1) - psi(a_k + 1) = -ln p_k + g(a_0) - g(a_k): no difference of large logarithms.
    excess = digamma_excess(row.log_alpha0).unsqueeze(-1) - digamma_excess(row.log_alpha)
    return _normalized((row.probs * (row.surprise + excess)).sum(-1), log_alpha, normalize)


def mutual_information(log_alpha: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Mutual information between the label and the categorical: total less aleatoric uncertainty.

    .. math::
        \mathrm{MI} = H[p] - \mathrm{AU}
        = \frac{1}{\alpha_0}\Big[\sum_k h(\alpha_k) - h(\alpha_0)\Big],
        \qquad h(x) = x\,[\psi(x + 1) - \ln x]

    It falls like :math:`(C-1)/(2\alpha_0)`: about 1e-8 at the paper's concentrations, where the
    difference of two float32 entropies is noise and the second form is not.

    Args:
        log_alpha: :math:`\ln\alpha`, shape ``(..., C)``.
        normalize: Divide by :math:`\ln C`.

    Returns:
        Nats (or the share of :math:`\ln C`), shape ``(...,)``, float32 or float64.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.

    Example:
        >>> mutual_information(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.2064)

    References:
        Malinin and Gales (2018), https://arxiv.org/abs/1802.10501, section 3.
    """
    row = simplex(log_alpha)
    # x g(x), taken relative to alpha_0 so that neither factor can overflow.
    classes = (row.probs * digamma_excess(row.log_alpha)).sum(-1)
    value = classes - digamma_excess(row.log_alpha0)
    return _normalized(value.clamp(min=0), log_alpha, normalize)


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
        TypeError: ``log_alpha`` is not a floating-point tensor.

    Example:
        >>> epistemic_uncertainty(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.4286)

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997 (definition of EU). Their evaluation code
        computes something else: C / logsumexp(alpha + 1).
    """
    evidence = simplex(log_alpha).log_alpha0
    return _normalized(
        torch.sigmoid(math.log(log_alpha.shape[-1]) - evidence), log_alpha, normalize
    )


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
        TypeError: ``log_alpha`` is not a floating-point tensor.

    Example:
        >>> vacuity(torch.tensor([2.0, 1.0, 1.0]).log())
        tensor(0.7500)

    References:
        Sensoy et al. (2018), "Evidential Deep Learning to Quantify Classification Uncertainty",
        https://arxiv.org/abs/1806.01768, equation 1.
    """
    evidence = simplex(log_alpha).log_alpha0
    return _normalized(torch.exp(math.log(log_alpha.shape[-1]) - evidence), log_alpha, normalize)
