"""The Dirichlet KL as one differentiable function of matrices.

In eager PyTorch that is an autograd function. Whoever traces or transforms the call
(``torch.compile``, ``torch.export``, ``torch.func``) sees the operators ``calibclip::dirichlet_kl``
and ``calibclip::dirichlet_kl_backward`` instead: an implementation may look at values to save work,
or be a Triton kernel. Operators would do for eager calls as well, if they did not take a tenth of a
millisecond longer.
"""

# No __future__ annotations: until PyTorch 2.5 operators read their schema from real ones.

from typing import Any

import torch
from torch import Tensor

from calibclip._kernels import special
from calibclip._kernels.common import N_STATS, compute_dtype, scalar_dtype
from calibclip._kernels.dispatch import choose, load
from calibclip._kernels.once import once_only, refusal

_REMEDY = 'dirichlet_kl(..., impl="torch_distributions") has one, in float64'


def apply(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """Return the two parts of every row, by the implementation of that name."""
    if torch.compiler.is_compiling():
        shape, evidence, _ = _operator(first, second, scale, shift, log_weight, impl)
        return shape, evidence
    if special.is_wrapped(first, second, log_weight):
        if special.is_differentiated(first, second, log_weight):
            raise RuntimeError(
                "dirichlet_kl: expected tensors of torch.autograd, got those of a derivative of "
                "torch.func; use torch.autograd.grad, or torch.func.vmap of the divergence"
            )
        shape, evidence, _ = _operator(first, second, scale, shift, log_weight, impl)
        return shape, evidence
    return DirichletKL.apply(first, second, scale, shift, log_weight, impl)


def _chosen(impl: str, first: Tensor, second: Tensor) -> str:
    return choose(impl, first.device, compute_dtype(first, second)).impl


class DirichletKL(torch.autograd.Function):
    """(first, second, scale, shift, log_weight, impl) -> (shape, evidence), each ``(rows,)``.

    Keeps nothing of the inputs' size but the inputs themselves, and differentiates once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        scale: float,
        shift: float,
        log_weight: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        """Call the implementation."""
        impl = _chosen(impl, first, second)
        shape, evidence, stats = load(impl).forward(first, second, scale, shift, log_weight)
        ctx.save_for_backward(first, second, stats, log_weight)
        ctx.options = scale, shift, impl
        return shape, evidence

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_shape: Tensor, grad_evidence: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients in both inputs; differentiating them again raises."""
        first, second, stats, log_weight = ctx.saved_tensors
        scale, shift, impl = ctx.options
        with torch.no_grad():
            grads = load(impl).backward(
                grad_shape,
                grad_evidence,
                first,
                second,
                stats,
                scale,
                shift,
                log_weight,
                ctx.needs_input_grad[:2],
            )
        grads = once_only(grads, (first, second, grad_shape, grad_evidence), _REMEDY)
        return *grads, None, None, None, None


# The same two as operators. A gradient that nobody needs is a matrix without rows.


@torch.library.custom_op("calibclip::dirichlet_kl", mutates_args=())
def _operator(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = load(_chosen(impl, first, second))
    return implementation.forward(first, second, scale, shift, log_weight)


@torch.library.custom_op("calibclip::dirichlet_kl_backward", mutates_args=())
def _operator_backward(
    grad_shape: Tensor,
    grad_evidence: Tensor,
    first: Tensor,
    second: Tensor,
    stats: Tensor,
    scale: float,
    shift: float,
    log_weight: Tensor,
    impl: str,
    need_first: bool,
    need_second: bool,
) -> tuple[Tensor, Tensor]:
    grads = load(_chosen(impl, first, second)).backward(
        grad_shape,
        grad_evidence,
        first,
        second,
        stats,
        scale,
        shift,
        log_weight,
        (need_first, need_second),
    )
    grad_first, grad_second = (
        x.new_empty(0, 0) if grad is None else grad
        for x, grad in zip((first, second), grads, strict=True)
    )
    return grad_first, grad_second


@_operator.register_fake
def _(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    part = first.new_empty(first.shape[0], dtype=compute_dtype(first, second))
    stats = first.new_empty(first.shape[0], N_STATS, dtype=scalar_dtype(first.device))
    return part, torch.empty_like(part), stats


@_operator_backward.register_fake
def _(
    grad_shape: Tensor,
    grad_evidence: Tensor,
    first: Tensor,
    second: Tensor,
    stats: Tensor,
    scale: float,
    shift: float,
    log_weight: Tensor,
    impl: str,
    need_first: bool,
    need_second: bool,
) -> tuple[Tensor, Tensor]:
    grad_first, grad_second = (
        x.new_empty(x.shape if need else (0, 0))
        for x, need in ((first, need_first), (second, need_second))
    )
    return grad_first, grad_second


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    first, second, scale, shift, log_weight, impl = inputs
    ctx.save_for_backward(first, second, output[2], log_weight)
    ctx.options = scale, shift, impl


def _differentiate(ctx: Any, grad_shape: Tensor, grad_evidence: Tensor, _: Any) -> Any:
    first, second, stats, log_weight = ctx.saved_tensors
    scale, shift, impl = ctx.options
    needs = ctx.needs_input_grad[:2]
    grads = _operator_backward(
        grad_shape, grad_evidence, first, second, stats, scale, shift, log_weight, impl, *needs
    )
    chosen = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *chosen, None, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> Any:
    raise refusal(_REMEDY)


_operator.register_autograd(_differentiate, setup_context=_keep)
_operator_backward.register_autograd(_refuse)


# What torch.func.vmap maps over becomes more rows.


def _map(info: Any, in_dims: Any, first: Tensor, second: Tensor, *options: Any) -> Any:
    scale, shift, log_weight, impl = options
    rows, size, weight, factor = _fold(info, (first, second), in_dims[:2], log_weight, in_dims[4])
    results = _operator(*rows, scale, shift, weight, impl)
    return _unfold(size, results, (factor, factor, None)), (0, 0, 0)


def _map_backward(info: Any, in_dims: Any, *arguments: Any) -> Any:
    *tensors, scale, shift, log_weight, impl, need_first, need_second = arguments
    rows, size, weight, factor = _fold(info, tensors, in_dims[:5], log_weight, in_dims[7])
    grads = _operator_backward(*rows, scale, shift, weight, impl, need_first, need_second)
    return _unfold(size, grads, (factor, factor)), (0, 0)


def _fold(
    info: Any, tensors: Any, dims: Any, log_weight: Tensor, weight_dim: int | None
) -> tuple[list[Tensor], tuple[int, int], Tensor, Tensor | None]:
    """Return the tensors' rows, the samples and the rows of each, and one weight for all.

    Of several weights that is the largest; the last result are the factors that are left.
    """
    mapped = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]
    size = info.batch_size, mapped[0].shape[1]
    rows = [t.flatten(0, 1) for t in mapped]
    if weight_dim is None:
        return rows, size, log_weight, None
    top = log_weight.max()
    return rows, size, top, torch.where(log_weight == top, 1.0, torch.exp(log_weight - top))


def _unfold(size: tuple[int, int], results: Any, factors: Any) -> tuple[Tensor, ...]:
    unfolded = []
    for result, factor in zip(results, factors, strict=True):
        if result.shape[0] == size[0] * size[1]:
            result = result.unflatten(0, size)
        else:  # a gradient that nobody needs
            result = result.expand(size[0], *result.shape)
        if factor is not None and result.numel() > 0:
            result = result * factor.to(result.dtype).view(-1, *[1] * (result.ndim - 1))
        unfolded.append(result)
    return tuple(unfolded)


if hasattr(torch.library, "register_vmap"):  # from PyTorch 2.5
    _operator.register_vmap(_map)
    _operator_backward.register_vmap(_map_backward)
