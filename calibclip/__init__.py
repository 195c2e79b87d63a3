"""Exact Dirichlet alignment losses, attacks and calibration metrics for CLIP under attack."""

from calibclip import metrics
from calibclip._prompts import clean_class_name
from calibclip.attacks import PGD, AttackResult, pgd
from calibclip.dirichlet import (
    DirichletHead,
    aleatoric_uncertainty,
    cosine_similarity,
    dirichlet_kl,
    epistemic_uncertainty,
    log_concentration,
    mutual_information,
    predictive_entropy,
    vacuity,
)
from calibclip.losses import (
    AlignTerms,
    DirichletAlignLoss,
    dirichlet_align_loss,
    dirichlet_align_terms,
)
from calibclip.zero_shot import ZeroShotClassifier

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "AlignTerms",
    "AttackResult",
    "DirichletAlignLoss",
    "DirichletHead",
    "ZeroShotClassifier",
    "aleatoric_uncertainty",
    "clean_class_name",
    "cosine_similarity",
    "dirichlet_align_loss",
    "dirichlet_align_terms",
    "dirichlet_kl",
    "epistemic_uncertainty",
    "log_concentration",
    "metrics",
    "mutual_information",
    "pgd",
    "predictive_entropy",
    "vacuity",
]
