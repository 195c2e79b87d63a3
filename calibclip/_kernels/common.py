"""What the implementations of the Dirichlet KL have in common: their dtypes, and what they keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Columns of the matrix that forward leaves for backward, to be used as each implementation likes.
N_STATS = 12
# The column that tells on a CPU whose they are: 0 of the closed form, else the mark of another one.
WHOSE = N_STATS - 1
# Up to gaps of this size around their mean, and this ln(b_0 / a_0) beyond it, sums over classes
# keep their digits without a look at both sets of probabilities.
REACH, ETA = 16.0, math.log(2)
# And a row is divided well around a number near its gaps while what is left of ln(b_0 / a_0), which
# rounding blurs, is within so many times KL(q || p): ln(q_k / p_k) may be as small as that.
POOR = 8.0


def compute_dtype(first: Tensor, second: Tensor) -> torch.dtype:
    """Return float32, or float64 as soon as one input is."""
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype the device has; weights and totals are kept in it."""
    return torch.float32 if device.type == "mps" else torch.float64
