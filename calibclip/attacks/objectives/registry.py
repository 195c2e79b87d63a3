"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calibclip._checks import check_choice, describe, wrong
from calibclip.attacks.objectives.classification import cross_entropy, dlr, dlr_targeted, margin
from calibclip.attacks.objectives.drift import (
    dirichlet_drift,
    embedding_distance,
    kl_to_reference,
    never,
)
from calibclip.attacks.objectives.multilabel import (
    misranked,
    multilabel_cross_entropy,
    multilabel_margin,
)
from calibclip.attacks.objectives.record import Objective
from calibclip.attacks.objectives.uncertainty import overconfidence, underconfidence

OBJECTIVES: dict[str, Objective] = {
    "ce": Objective(cross_entropy, targeted=True),
    "margin": Objective(margin, targeted=True),
    "dlr": Objective(dlr, targeted=True),
    "dlr-targeted": Objective(dlr_targeted, reference="rival"),
    "kl": Objective(kl_to_reference, reference="clean"),
    "dirichlet-kl": dirichlet_drift(),
    "embedding-l2": Objective(embedding_distance, never, reference="clean", target="none"),
    "bce": Objective(multilabel_cross_entropy, misranked, target="multilabel"),
    "multilabel-margin": Objective(multilabel_margin, misranked, target="multilabel"),
    "overconfidence": overconfidence(),
    "underconfidence": underconfidence(),
}


def resolve_objective(objective: str | Objective | Callable[..., Tensor]) -> Objective:
    """Return the objective of a name, or for a callable to maximise; an `Objective` as it is.

    Args:
        objective: A name in `OBJECTIVES`, an `Objective`, or a callable ``(logits, target) ->
            (B,)``. A loss of this package that has a name is the objective of that name; of any
            other callable it is unknown what target it takes.

    Returns:
        The objective.

    Raises:
        TypeError: ``objective`` is neither a string nor callable.
        ValueError: The name is unknown.

    Example:
        >>> resolve_objective("margin")
        Objective(loss=margin, targeted=True)
        >>> resolve_objective(lambda logits, target: -logits[:, 0])
        Objective(loss=<lambda>, target='any', targeted=True)
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        check_choice("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]
    if not callable(objective):
        raise TypeError(
            wrong("objective", "a name or a callable (logits, target) -> (B,)", describe(objective))
        )
    for known in OBJECTIVES.values():
        if known.loss is objective:
            return known
    return Objective(objective, target="any", targeted=True)
