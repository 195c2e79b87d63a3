"""One entry to all implementations of the Dirichlet KL. Private: use ``calibclip.dirichlet_kl``."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Categorical, Dirichlet, kl_divergence

from calibclip._checks import check_choice
from calibclip._kernels.categorical import categorical_kl as categorical_kl
from calibclip._kernels.closed_form import DirichletKL, compute_dtype

Implementation = Literal["auto", "eager", "reference", "torch_distributions"]
IMPLEMENTATIONS = get_args(Implementation)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype the device has; weights and totals are kept in it."""
    return torch.float32 if device.type == "mps" else torch.float64


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
        log_weight = torch.tensor(log_weight, dtype=scalar_dtype(first.device))
    if impl == "torch_distributions" and first.numel() > 0:  # which rejects an empty batch
        return _torch_distributions(first, second, scale, shift, log_weight)
    if impl == "reference":
        first, second = first.double(), second.double()
    return DirichletKL.apply(first, second, scale, shift, log_weight)


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
