"""One entry to all implementations of the Dirichlet KL. Private: use ``calibclip.dirichlet_kl``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, Dirichlet, kl_divergence

from calibclip._checks import check_choice
from calibclip._kernels.categorical import categorical_kl as categorical_kl
from calibclip._kernels.common import compute_dtype, scalar_dtype
from calibclip._kernels.dispatch import IMPLEMENTATIONS, Implementation, choose, load
from calibclip._kernels.function import apply


def dirichlet_kl_parts(
    first: Tensor,
    second: Tensor,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    log_weight: Tensor | float = 0.0,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Return the shape and the evidence part of ``w KL(Dir(a) || Dir(b))``, each ``(...,)``.

    ``ln a = scale * first + shift``, likewise ``b`` from ``second``, and ``w = exp(log_weight)``.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if not isinstance(log_weight, Tensor):
        dtype = scalar_dtype(first.device)
        log_weight = torch.full((), log_weight, dtype=dtype, device=first.device)
    if impl == "torch_distributions" and first.numel() > 0:  # which rejects an empty batch
        return _torch_distributions(first, second, scale, shift, log_weight)
    if impl == "reference":
        first, second = first.double(), second.double()
    if first.ndim == 2:
        return apply(first, second, scale, shift, log_weight, impl)
    rows, rows_second = (x.reshape(-1, x.shape[-1]) for x in (first, second))
    shape, evidence = apply(rows, rows_second, scale, shift, log_weight, impl)
    return shape.view(first.shape[:-1]), evidence.view(first.shape[:-1])


def dirichlet_kl_gradient(
    cosines: Tensor,
    cosines_ref: Tensor,
    *,
    scale: float,
    shift: float,
    log_weight: Tensor,
    reverse: bool,
    impl: Implementation,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted KL of every row and, if it is wanted, its gradient in the first argument.

    ``reverse`` puts the reference second, as in the paper. Nothing is recorded for autograd.
    """
    dtype = cosines.dtype
    if impl == "reference":
        cosines, cosines_ref = cosines.double(), cosines_ref.double()
    pair = (cosines, cosines_ref) if reverse else (cosines_ref, cosines)
    kernel = load(choose(impl, cosines.device, compute_dtype(*pair)).impl)
    with torch.no_grad():
        shape, evidence, stats = kernel.forward(*pair, scale, shift, log_weight)
        if not with_gradient:
            return shape + evidence, None
        ones = torch.ones_like(shape)
        grads = kernel.backward(
            ones, ones, *pair, stats, scale, shift, log_weight, (reverse, not reverse)
        )
    gradient = grads[0] if reverse else grads[1]
    return shape + evidence, gradient.to(dtype)


def _torch_distributions(
    first: Tensor, second: Tensor, scale: float, shift: float, log_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what published code does: differences of gamma functions, in the dtype it gets."""
    dtype = compute_dtype(first, second)
    log_a, log_b = first.to(dtype) * scale + shift, second.to(dtype) * scale + shift
    alpha, beta = log_a.exp(), log_b.exp()
    weight = log_weight.exp().to(dtype)
    kl = kl_divergence(Dirichlet(alpha), Dirichlet(beta)) * weight
    categorical = kl_divergence(Categorical(logits=log_b), Categorical(logits=log_a))
    shape = beta.sum(-1) * categorical * weight
    return shape, kl - shape
