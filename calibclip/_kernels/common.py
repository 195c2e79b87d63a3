"""What the implementations of the Dirichlet KL have in common: their dtypes, and what they keep."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the matrix that forward leaves for backward, to be used as each implementation likes.
N_STATS = 12
# The column that tells whose they are: 0 of the closed form, else the mark of another one.
WHOSE = N_STATS - 1


def compute_dtype(first: Tensor, second: Tensor) -> torch.dtype:
    """Return float32, or float64 as soon as one input is."""
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype the device has; weights and totals are kept in it."""
    return torch.float32 if device.type == "mps" else torch.float64
