"""What an objective is to an attack: a loss to maximise, a test of success, what both need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor

from calibclip._checks import check_choice, check_flag, describe, wrong
from calibclip.attacks.objectives.classification import misclassified

REFERENCES = ("none", "clean", "rival", "given")
TARGETS = ("class", "multilabel", "none", "any")


@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """What an attack maximises, and when it has succeeded.

    Objectives are equal if all fields are, where two ``functools.partial`` of one function with
    equal options count as equal: that survives pickling.

    Attributes:
        loss: Callable ``(outputs, target) -> (B,)``, or ``(outputs, target, reference) -> (B,)``
            if there is a reference. To be picklable: a function of a module, or a partial of one.
        success: Callable with the same arguments, returns shape ``(B,)``, bool.
        reference: What the third argument is. ``"none"``: there are two only. ``"clean"``: the
            model's own outputs on the clean images, or what the caller of the attack passed
            instead. ``"rival"``: the class aimed at, shape ``(B,)``, int64. ``"given"``: what the
            caller passed.
        target: What the target is. ``"class"``: indices ``(B,)``, int64. ``"multilabel"``: 0 or 1
            per class, ``(B, K)``. ``"none"``: not looked at, may be None. ``"any"``: unknown; there
            is success only if it turns out to be class indices.
        targeted: Whether the attack may go towards the target instead, minimising the loss.

    Raises:
        TypeError: ``loss`` or ``success`` is not callable, or ``targeted`` no bool.
        ValueError: ``reference`` or ``target`` is not one of the names above, or a targeted attack
            is allowed with a target that is no class.

    Example:
        >>> from calibclip.attacks.objectives import cross_entropy
        >>> Objective(cross_entropy, targeted=True)
        Objective(loss=cross_entropy, targeted=True)
    """

    loss: Callable[..., Tensor]
    success: Callable[..., Tensor] = misclassified
    reference: str = "none"
    target: str = "class"
    targeted: bool = False

    def __post_init__(self) -> None:
        for name in ("loss", "success"):
            if not callable(getattr(self, name)):
                expected = "a callable (outputs, target[, reference]) -> (B,)"
                raise TypeError(wrong(name, expected, describe(getattr(self, name))))
        check_choice("reference", self.reference, REFERENCES)
        check_choice("target", self.target, TARGETS)
        check_flag("targeted", self.targeted)
        if self.targeted and self.target not in ("class", "any"):
            expected = f"False with target={self.target!r}"
            raise ValueError(wrong("targeted", expected, "True", "only a class can be aimed at"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Objective):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        loss, success, *rest = self._identity()
        # Without the options of a partial, which may be unhashable.
        return hash((loss[0], success[0], *rest))

    def __repr__(self) -> str:
        shown = [f"loss={_name(self.loss)}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(f"{field.name}={_name(value) if callable(value) else repr(value)}")
        return f"Objective({', '.join(shown)})"

    def _identity(self) -> tuple:
        calls = (_taken_apart(self.loss), _taken_apart(self.success))
        return (*calls, self.reference, self.target, self.targeted)


def _taken_apart(call: Callable) -> tuple:
    """Return function and options: a partial itself equals nothing but itself."""
    if isinstance(call, partial):
        return call.func, call.args, call.keywords
    return call, (), {}


def _name(call: Callable) -> str:
    function, args, keywords = _taken_apart(call)
    name = getattr(function, "__qualname__", repr(function))
    options = [*map(repr, args), *(f"{key}={value!r}" for key, value in keywords.items())]
    return f"{name}({', '.join(options)})" if options else name
