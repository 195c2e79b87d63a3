r"""The paper's objective from features, without the B×C matrix of logits ever in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from calibclip._checks import (
    check_choice,
    check_count,
    check_floating,
    check_same_device,
    check_same_shape,
    check_target,
    describe,
    wrong,
)
from calibclip._kernels import dirichlet_kl_gradient, scalar_dtype, special
from calibclip._kernels.dispatch import Implementation, choose
from calibclip._kernels.once import once_only
from calibclip.dirichlet import exact_dtype, without_autocast
from calibclip.losses._shell import Direction, check_options
from calibclip.losses.dirichlet_align import (
    check_one_weight,
    log_mean_strength,
    log_strength,
    log_weight,
)

# Cosines of a chunk, unless its rows are given: about seven such matrices exist at a time. An
# accelerator needs more of them to be busy.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 1 << 20, 1 << 23


class _Options(NamedTuple):
    logit_scale: float
    temperature: float
    relative_weight: float | None
    weight: float | None
    direction: Direction
    mean: bool
    rows: int
    impl: Implementation


def linear_dirichlet_align(
    features_adv: Tensor,
    features_ref: Tensor,
    text_features: Tensor,
    target: Tensor | None = None,
    *,
    text_features_ref: Tensor | None = None,
    logit_scale: float = 100.0,
    temperature: float = 0.07,
    weight: float | None = None,
    relative_weight: float | None = None,
    direction: Direction = "reverse",
    reduction: Literal["mean", "sum"] = "mean",
    chunk_rows: int | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    r"""``dirichlet_align_loss`` of the cosines of features, a few rows at a time.

    .. math::
        \mathcal{L} = \mathrm{CE}(s\,c_{\mathrm{adv}}, y)
            + \lambda\, \mathrm{KL}\big(\mathrm{Dir}(\alpha_{\mathrm{adv}}) \,\|\,
                                        \mathrm{Dir}(\alpha_{\mathrm{ref}})\big),
        \qquad c_{ik} = \frac{\langle f_i, t_k\rangle}{\lVert f_i\rVert\,\lVert t_k\rVert}

    For many classes: at B = 4,096 and C = 21,841 each B×C matrix takes 340 MiB. The loss of logits
    keeps three of them for its backward, and five exist at its peak. Here the gradients in the
    features are computed together with the loss, chunk by chunk, so that backward only scales
    them. Products and sums are in float32, also for features in half precision, under autocast,
    and next to a lowered precision of matrix products.

    Args:
        features_adv: Trained model's features of the attacked images, ``(B, D)``, any length.
        features_ref: Frozen model's features of the clean images, ``(B, D)``, not differentiated.
        text_features: One text per class, ``(C, D)``, any length. If it requires a gradient, its
            normalized copy and a gradient of its size are kept as well.
        target: Class indices, ``(B,)``, int64. ``None``: the KL part alone.
        text_features_ref: The frozen model's, ``(C, D)``, not differentiated; ``None`` takes
            ``text_features``.
        logit_scale: s > 0 of the cross-entropy.
        temperature: T > 0.
        weight: :math:`\lambda \ge 0`; ``None`` is the paper's :math:`10^5/(1 + e^{2/T})`.
        relative_weight: As for ``dirichlet_align_loss``. The mean of :math:`\alpha_0` takes one
            more product of the reference's features.
        direction: ``"reverse"`` or ``"forward"``, as for ``dirichlet_align_loss``.
        reduction: ``"mean"`` or ``"sum"`` over the batch.
        chunk_rows: Images at a time; ``None`` takes as many as make a million cosines on a CPU,
            eight on an accelerator.
        impl: As for ``dirichlet_kl``, ``"torch_distributions"`` excepted.

    Returns:
        0-d, float32 (float64 if any features are, or for ``impl="reference"``). Equal to
        ``dirichlet_align_loss`` of ``logit_scale`` times the cosines but for rounding. An image
        whose weighted KL does not fit the dtype makes the loss infinite, and NaN the gradients in
        itself and in the texts, not those in other images. ``torch.compile`` breaks the graph here
        and gets the same values.

    Raises:
        TypeError: Features that are not floating-point tensors, a target that is not int64.
        ValueError: Shapes or devices that differ, labels out of range (checked on a CPU only), an
            option out of range, both weights given.
        RuntimeError: A transform of ``torch.func`` is at work, or a second derivative is used.

    Example:
        >>> from calibclip import cosine_similarity, dirichlet_align_loss
        >>> image, ref = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> linear_dirichlet_align(image, ref, torch.eye(2), relative_weight=1.0)
        tensor(2.5468)
        >>> logits, logits_ref = (cosine_similarity(x, torch.eye(2)) for x in (image, ref))
        >>> dirichlet_align_loss(logits, logits_ref, logit_scale=1.0, relative_weight=1.0)
        tensor(2.5468)

    References:
        Lu et al. (2025), https://arxiv.org/abs/2512.12997: the training objective. Computing a
        loss's gradient in forward, in chunks of rows: Hsu et al. (2024), "Liger Kernel",
        https://arxiv.org/abs/2410.10989.
    """
    _check_features(features_adv, features_ref, text_features, text_features_ref)
    given = (features_adv, features_ref, text_features, text_features_ref, target)
    tensors = [x for x in given if isinstance(x, Tensor)]
    if not torch.compiler.is_compiling() and special.is_wrapped(*tensors):
        raise RuntimeError(
            "linear_dirichlet_align: expected tensors of torch.autograd, got those of a transform "
            "of torch.func; use torch.autograd.grad, or torch.func.vmap of dirichlet_align_loss"
        )
    if target is not None:
        check_target(target, len(features_adv), len(text_features), features_adv.device)
    checked = check_options(
        "weight",
        "relative_weight",
        logit_scale=logit_scale,
        temperature=temperature,
        weight=weight,
        relative_weight=relative_weight,
        direction=direction,
        impl=impl,
    )
    check_choice("reduction", reduction, ("mean", "sum"))
    if impl == "torch_distributions":
        raise ValueError(wrong("impl", "an exact implementation", repr(impl), 'use "auto"'))
    check_one_weight(weight, relative_weight)
    chunk = _CHUNK_ON_CPU if features_adv.device.type == "cpu" else _CHUNK_ELSEWHERE
    rows = max(1, chunk // len(text_features))
    if chunk_rows is not None:
        rows = check_count("chunk_rows", chunk_rows, at_least=1)
    floating = (x.dtype for x in tensors if x is not target)
    dtype = reduce(torch.promote_types, floating, torch.float32)
    checked["impl"] = choose(impl, features_adv.device, dtype).impl
    options = _Options(**checked, mean=reduction == "mean", rows=rows)
    text_ref = None
    if text_features_ref is not None and text_features_ref is not text_features:
        text_ref = text_features_ref.detach()
    with without_autocast(features_adv.device):
        image = F.normalize(features_adv.to(dtype), dim=-1)
        text = text_features
        if text.requires_grad:
            text = F.normalize(text.to(dtype), dim=-1)
        return _LinearAlign.apply(image, features_ref.detach(), text, text_ref, target, options)


def _check_features(
    features_adv: Tensor, features_ref: Tensor, text: Tensor, text_ref: Tensor | None
) -> None:
    check_floating("features_adv", features_adv, shape="(B, D)", ndim=2)
    check_floating("features_ref", features_ref, shape="(B, D)", ndim=2)
    check_floating("text_features", text, shape="(C, D)", ndim=2)
    if len(text) == 0:
        expected = "a floating-point tensor of shape (C, D), the first size >= 1"
        raise ValueError(wrong("text_features", expected, describe(text)))
    check_same_shape("features_ref", features_ref, "features_adv", features_adv)
    if text.shape[1] != features_adv.shape[1]:
        expected = f"features of size {features_adv.shape[1]}, as features_adv"
        raise ValueError(wrong("text_features", expected, describe(text)))
    check_same_device("text_features", text, "features_adv", features_adv)
    if text_ref is not None:
        check_floating("text_features_ref", text_ref, shape="(C, D)", ndim=2)
        check_same_shape("text_features_ref", text_ref, "text_features", text)


class _Texts:
    """The classes' side of the products; the texts are copied only to change their dtype."""

    def __init__(self, text: Tensor, dtype: torch.dtype) -> None:
        norms = torch.linalg.vector_norm(text, dim=-1, dtype=dtype)
        self.inverse = 1 / norms.clamp(min=1e-12)
        self.exact, self.dtype = exact_dtype(dtype, text.device), dtype
        self.text = text.to(self.exact)

    def cosines(self, image: Tensor) -> Tensor:
        """Return the cosines of images of unit length."""
        return (image.to(self.exact) @ self.text.T).to(self.dtype).mul_(self.inverse)

    def cosines_of_any(self, image: Tensor) -> Tensor:
        """Return the cosines of images of any length."""
        return self.cosines(F.normalize(image.to(self.dtype), dim=-1))

    def to_images(self, gradient: Tensor) -> Tensor:
        """Return the gradient in the images; overwrites the one in the cosines."""
        return (gradient.mul_(self.inverse).to(self.exact) @ self.text).to(self.dtype)


class _LinearAlign(torch.autograd.Function):
    """(image, ref, text, text_ref, target, options) -> loss.

    ``image`` has unit length, and ``text`` if it is differentiated. ``text_ref`` is ``None`` if it
    is the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        ref: Tensor,
        text: Tensor,
        text_ref: Tensor | None,
        target: Tensor | None,
        options: _Options,
    ) -> Tensor:
        """Compute the loss and the gradients that are needed."""
        need_image, _, need_text, *_ = ctx.needs_input_grad
        texts = _Texts(text, image.dtype)
        texts_ref = texts if text_ref is None else _Texts(text_ref, image.dtype)
        log_lambda = _log_lambda(ref, texts_ref, options)
        wide = scalar_dtype(image.device)
        total = torch.zeros((), dtype=wide, device=image.device)
        grad_image = torch.empty_like(image) if need_image else None
        grad_text = torch.zeros_like(texts.text) if need_text else None
        for part in _chunks(len(image), options.rows):
            cosines = texts.cosines(image[part])
            values, gradient = dirichlet_kl_gradient(
                cosines,
                texts_ref.cosines_of_any(ref[part]),
                scale=1 / options.temperature,
                shift=1 / options.temperature,
                log_weight=log_lambda,
                reverse=options.direction == "reverse",
                impl=options.impl,
                with_gradient=need_image or need_text,
            )
            total += values.sum(dtype=wide)
            if target is not None:
                total += _add_cross_entropy(cosines, target[part], options.logit_scale, gradient)
            if gradient is None:
                continue
            if grad_text is not None:
                grad_text.addmm_(gradient.to(texts.exact).T, image[part].to(texts.exact))
            if grad_image is not None:
                grad_image[part] = texts.to_images(gradient)
        if options.mean:
            total /= len(image)
            for grad in (grad_image, grad_text):
                if grad is not None:
                    grad /= max(1, len(image))
        ctx.save_for_backward(grad_image, grad_text, image, text)
        return total if options.impl == "reference" else total.to(image.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scale the gradients that forward has computed."""
        *kept, image, text = ctx.saved_tensors
        grads = [g if g is None else g * grad for g in kept]
        remedy = 'dirichlet_align_loss(..., impl="torch_distributions") has one'
        grad_image, grad_text = once_only(grads, (image, text, grad), remedy)
        return grad_image, None, grad_text, None, None, None


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


def _log_lambda(ref: Tensor, texts: _Texts, options: _Options) -> Tensor:
    """Return the logarithm of the KL's weight, 0-d."""
    number = log_weight(options.temperature, options.weight, options.relative_weight)
    log_lambda = torch.full((), number, dtype=scalar_dtype(ref.device), device=ref.device)
    if options.relative_weight is None:
        return log_lambda
    strengths = [log_lambda.new_empty(0)]
    for part in _chunks(len(ref), options.rows):
        cosines = texts.cosines_of_any(ref[part])
        strengths.append(log_strength(cosines, 1.0, options.temperature))
    return log_lambda - log_mean_strength(torch.cat(strengths))


def _add_cross_entropy(
    cosines: Tensor, target: Tensor, logit_scale: float, gradient: Tensor | None
) -> Tensor:
    """Return the sum of the cross-entropies, and add its gradient; overwrites the cosines."""
    log_probs = torch.log_softmax(cosines.mul_(logit_scale), -1)
    chosen = target[:, None]
    total = -log_probs.gather(-1, chosen).sum(dtype=scalar_dtype(cosines.device))
    if gradient is None:
        return total
    gradient.add_(log_probs.exp_(), alpha=logit_scale)
    minus = torch.full_like(chosen, -logit_scale, dtype=gradient.dtype)
    gradient.scatter_add_(-1, chosen, minus)
    return total
