"""What attacks maximise. A name, a callable ``(logits, target) -> (B,)``, or an `Objective`.

A loss gives one number per sample, which grows as the prediction moves away from the target. Losses
are in at least float32, also for half-precision outputs.
"""

from calibclip.attacks.objectives._numbers import at_least_float32 as at_least_float32
from calibclip.attacks.objectives.classification import (
    cross_entropy,
    dlr,
    dlr_targeted,
    margin,
    misclassified,
)
from calibclip.attacks.objectives.drift import (
    dirichlet_divergence,
    dirichlet_drift,
    embedding_distance,
    kl_to_reference,
    never,
)
from calibclip.attacks.objectives.multilabel import check_multilabel as check_multilabel
from calibclip.attacks.objectives.multilabel import (
    misranked,
    multilabel_cross_entropy,
    multilabel_margin,
)
from calibclip.attacks.objectives.record import Objective
from calibclip.attacks.objectives.registry import OBJECTIVES, resolve_objective
from calibclip.attacks.objectives.uncertainty import (
    certainty_when_wrong,
    overconfidence,
    right_and_less_certain,
    uncertainty_when_right,
    underconfidence,
)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "certainty_when_wrong",
    "cross_entropy",
    "dirichlet_divergence",
    "dirichlet_drift",
    "dlr",
    "dlr_targeted",
    "embedding_distance",
    "kl_to_reference",
    "margin",
    "misclassified",
    "misranked",
    "multilabel_cross_entropy",
    "multilabel_margin",
    "never",
    "overconfidence",
    "resolve_objective",
    "right_and_less_certain",
    "uncertainty_when_right",
    "underconfidence",
]
