"""Alignment losses."""

from calibclip.losses.dirichlet_align import (
    AlignTerms,
    DirichletAlignLoss,
    dirichlet_align_loss,
    dirichlet_align_terms,
)

__all__ = ["AlignTerms", "DirichletAlignLoss", "dirichlet_align_loss", "dirichlet_align_terms"]
