"""The paper's loss and the field's, as functions and thin modules."""

from calibclip.losses.attention_guided import (
    CompTGALoss,
    TGALoss,
    TGATerms,
    comp_tga_loss,
    tga_loss,
)
from calibclip.losses.baselines import (
    FARELoss,
    FARETerms,
    PMGAFTLoss,
    PMGAFTTerms,
    TeCoALoss,
    TeCoATerms,
    fare_loss,
    pmg_aft_loss,
    tecoa_loss,
)
from calibclip.losses.dirichlet_align import (
    AlignTerms,
    DirichletAlignLoss,
    dirichlet_align_loss,
    dirichlet_align_terms,
)
from calibclip.losses.distillation import DistillationLoss, DistillationTerms, distillation_loss
from calibclip.losses.evidential import (
    EDLLoss,
    EDLTerms,
    PriorNetworkLoss,
    PriorNetworkTerms,
    edl_loss,
    prior_network_loss,
)
from calibclip.losses.linear_align import linear_dirichlet_align
from calibclip.losses.regularizers import (
    FAPLoss,
    FAPTerms,
    SimCLIPLoss,
    SimCLIPTerms,
    TRADESLoss,
    TRADESTerms,
    fap_loss,
    simclip_loss,
    trades_loss,
)

__all__ = [
    "AlignTerms",
    "CompTGALoss",
    "DirichletAlignLoss",
    "DistillationLoss",
    "DistillationTerms",
    "EDLLoss",
    "EDLTerms",
    "FAPLoss",
    "FAPTerms",
    "FARELoss",
    "FARETerms",
    "PMGAFTLoss",
    "PMGAFTTerms",
    "PriorNetworkLoss",
    "PriorNetworkTerms",
    "SimCLIPLoss",
    "SimCLIPTerms",
    "TGALoss",
    "TGATerms",
    "TRADESLoss",
    "TRADESTerms",
    "TeCoALoss",
    "TeCoATerms",
    "comp_tga_loss",
    "dirichlet_align_loss",
    "dirichlet_align_terms",
    "distillation_loss",
    "edl_loss",
    "fap_loss",
    "fare_loss",
    "linear_dirichlet_align",
    "pmg_aft_loss",
    "prior_network_loss",
    "simclip_loss",
    "tecoa_loss",
    "tga_loss",
    "trades_loss",
]
