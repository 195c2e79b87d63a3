r"""CLIP's cosines read as a Dirichlet: concentrations and their divergence.

A cosine :math:`c_k` between an image and the text of class k becomes the concentration
:math:`\ln \alpha_k = (c_k + 1)/T`. Everything here takes ``log_alpha``: :math:`\alpha` itself
reaches :math:`e^{28}` at the paper's T = 0.07, where textbook formulas lose every float32 digit.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from calibclip._checks import (
    check_choice,
    check_floating,
    check_number,
    check_same_device,
    check_same_shape,
    describe,
    wrong,
)
from calibclip._kernels import dirichlet_kl_parts
from calibclip._kernels.common import compute_dtype, scalar_dtype
from calibclip._kernels.dispatch import IMPLEMENTATIONS, ImplChoice, Implementation, choose
from calibclip._kernels.special import smallest

__all__ = [
    "DirichletHead",
    "cosine_similarity",
    "dirichlet_kl",
    "explain_impl",
    "log_concentration",
]

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)


def float32_product(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Multiply features in full float32, whatever autocast and the user's settings say.

    Args:
        image_features: Shape ``(B, D)``, float32 or float64, checked by the caller.
        text_features: Shape ``(C, D)``, likewise, on the same device.

    Returns:
        ``image_features @ text_features.T``, shape ``(B, C)``, of the wider of the two dtypes.
    """
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    exact = exact_dtype(dtype, image_features.device)
    with without_autocast(image_features.device):
        return (image_features.to(exact) @ text_features.to(exact).T).to(dtype)


def exact_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what to multiply in for products good to ``dtype``.

    That is ``dtype`` itself, unless the user has lowered the precision of float32 products to 10
    bits or fewer. Then it is float64, if the device has it.

    Args:
        dtype: float32 or float64.
        device: Where the factors are.

    Returns:
        A dtype at least as wide.
    """
    try:
        lowered = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch.backends has settings for each backend, and one is lower
        lowered = True
    return torch.promote_types(dtype, scalar_dtype(device)) if lowered else dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from rounding factors to half precision; not every device has it.

    Args:
        device: Any, also one that autocast does not know.

    Returns:
        A context in which products on that device are of their factors' dtype.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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
        >>> log_alpha
        tensor([[17.8571, 16.8571]])
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
        impl: ``"eager"`` is the closed form with its closed-form gradient, which keeps no tensor of
            the inputs' size and differentiates once; ``"triton"`` the same as kernels for a CUDA
            device; ``"compile"`` the same by ``torch.compile``, which takes half a minute at
            first and waits for the device. ``"auto"`` takes Triton where it can run, else
            ``"eager"``: ``explain_impl`` tells. ``"reference"`` is the closed form in float64.
            ``"torch_distributions"`` is the textbook formula in the inputs' dtype, as in
            published code, for comparison; torch checks its arguments and rejects NaN.

    Returns:
        Shape ``(...,)`` for ``"none"``, else 0-d. float32, or float64 for float64 input or
        ``impl="reference"``. NaN inputs give NaN in their rows. ``torch.compile``, ``torch.export``
        and ``torch.func.vmap`` take the call as one operator.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes or devices differ, a name is unknown, or the implementation asked
            for cannot run here, with the reason.
        RuntimeError: A second derivative is used, or ``torch.func`` differentiates.

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


def explain_impl(
    log_alpha: Tensor, log_beta: Tensor | None = None, impl: Implementation = "auto"
) -> ImplChoice:
    """Say which implementation ``dirichlet_kl`` and the alignment losses take, and why.

    Args:
        log_alpha: As for ``dirichlet_kl``; only its device and dtype matter.
        log_beta: Likewise; ``None`` if it is like ``log_alpha``.
        impl: What would be asked for.

    Returns:
        ``ImplChoice(impl, reason)``.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The name is unknown, the devices differ, or the implementation cannot run here.

    Example:
        >>> explain_impl(torch.zeros(2, 3, dtype=torch.float64)).impl
        'eager'
    """
    check_floating("log_alpha", log_alpha, shape="(..., C)")
    if log_beta is not None:
        check_floating("log_beta", log_beta, shape="(..., C)")
        check_same_device("log_beta", log_beta, "log_alpha", log_alpha)
    check_choice("impl", impl, IMPLEMENTATIONS)
    return choose(
        impl,
        log_alpha.device,
        compute_dtype(log_alpha, log_alpha if log_beta is None else log_beta),
    )


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
    """The Dirichlet mean relative to its largest class, so that no small share is lost."""

    log_alpha: Tensor
    log_top: Tensor  # ln alpha of the largest class, (..., 1)
    gap: Tensor  # ln alpha - log_top <= 0, (..., C)
    relative: Tensor  # alpha / alpha_top, (..., C)
    others: Tensor  # the sum of relative over all other classes, (..., 1)

    @property
    def log_alpha0(self) -> Tensor:
        """The logarithm of the total concentration, (...,)."""
        return (self.log_top + torch.log1p(self.others)).squeeze(-1)

    @property
    def surprise(self) -> Tensor:
        """Minus the logarithm of the Dirichlet mean, >= 0, (..., C)."""
        return torch.log1p(self.others) - self.gap

    @property
    def probs(self) -> Tensor:
        """The Dirichlet mean, (..., C)."""
        return self.relative / (1 + self.others)


def simplex(log_alpha: Tensor) -> Simplex:
    """Return the Dirichlet mean, its logarithm and the total without losing small shares.

    Args:
        log_alpha: Shape ``(..., C)``, checked here; half precision becomes float32.

    Returns:
        ``log_alpha`` upcast, and what the mean is made of.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.
    """
    check_floating("log_alpha", log_alpha, shape="(..., C)")
    log_alpha = log_alpha.to(torch.promote_types(log_alpha.dtype, torch.float32))
    log_top, where = log_alpha.max(-1, keepdim=True)
    # A constant 0 at the largest, so that its gradient is not left over from equal terms.
    gap = (log_alpha - log_top).scatter(-1, where, 0.0)
    ratio = torch.exp(gap)
    relative = torch.addcmul(ratio, ratio, _rounding(log_alpha.detach(), log_top.detach()))
    # The largest class is left out of the sum: next to its 1, shares below 6e-8 would vanish, and
    # with them the uncertainty of every confident prediction.
    others = relative.scatter(-1, where, 0.0).sum(-1, keepdim=True)
    return Simplex(log_alpha, log_top, gap, relative, others)


def _rounding(a: Tensor, b: Tensor) -> Tensor:
    """Return the rounding error of ``a - b``: at a gap of 80 it moves exp by 4e-6 in float32."""
    difference = a - b
    shift = difference - a
    return ((a - (difference - shift)) - (b + shift)).nan_to_num(0.0, 0.0, 0.0)


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
