"""What all losses share: their options and inputs checked in one way, and the thin module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibclip._checks import (
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_same_shape,
    check_target,
    describe,
    wrong,
)
from calibclip._kernels import IMPLEMENTATIONS
from calibclip.dirichlet import REDUCTIONS

Direction = Literal["reverse", "forward"]

_at_least_zero = partial(check_number, at_least=0)
_above_zero = partial(check_number, above=0)

# An option means the same in every loss, so its name says how to check it. (FARE's clean_weight is
# a share as well, which FARE checks.)
_CHECKS: dict[str, Callable[..., object]] = {
    "adv_weight": _at_least_zero,
    "annealing_epochs": partial(check_count, at_least=1),
    "clean_weight": _at_least_zero,
    "detach_clean": check_flag,
    "detach_ref": check_flag,
    "direction": partial(check_choice, choices=get_args(Direction)),
    "distance": partial(check_choice, choices=("l2", "l1", "cosine")),
    "frozen_reference": check_flag,
    "impl": partial(check_choice, choices=IMPLEMENTATIONS),
    "kind": partial(check_choice, choices=("mse", "log", "digamma")),
    "kl_reduction": partial(check_choice, choices=("mean", "sum")),
    "label_smoothing": partial(check_number, at_least=0, at_most=1),
    "logit_scale": _above_zero,
    "metric": partial(check_choice, choices=("l2", "cosine")),
    "normalize": check_flag,
    "reduction": partial(check_choice, choices=REDUCTIONS),
    "ref_weight": _at_least_zero,
    "relative_weight": _at_least_zero,
    "target_concentration": _above_zero,
    "temperature": _above_zero,
    "weight": _at_least_zero,
}


def check_options(*may_be_none: str, **options: Any) -> dict[str, Any]:
    """Check the options of a loss, each by its name, and return them with numbers as floats.

    ``may_be_none`` names those for which ``None`` has a meaning.
    """
    checked = dict(options)
    for name, value in options.items():
        if value is None and name in may_be_none:
            continue
        number = _CHECKS[name](name, value)
        checked[name] = value if number is None else number
    return checked


def check_logits(**logits: Tensor | None) -> list[Tensor]:
    """Check logits or concentrations ``(B, C)``, all of the first one's shape, and upcast them."""
    same_classes = "build both classifiers from one list of class names, and use one batch"
    return _check_alike("(B, C)", 2, same_classes, logits)


def check_features(**features: Tensor | None) -> list[Tensor]:
    """Check features ``(B, D)``, all of the first one's shape, and upcast them."""
    return _check_alike("(B, D)", 2, "take them from one kind of encoder and one batch", features)


def check_maps(**maps: Tensor | None) -> list[Tensor]:
    """Check maps ``(B, ...)``, all of the first one's shape, and flatten them to ``(B, M)``."""
    for name, values in maps.items():
        if isinstance(values, Tensor) and values.ndim < 2:
            raise ValueError(wrong(name, "a tensor of shape (B, ...)", describe(values)))
    same_size = "compute all maps with the same image_size"
    return [values.flatten(1) for values in _check_alike("(B, ...)", None, same_size, maps)]


def _check_alike(
    shape: str, ndim: int | None, remedy: str, inputs: Mapping[str, Tensor | None]
) -> list[Tensor]:
    for name, value in inputs.items():
        # The likeliest slip: labels where another loss takes its reference.
        if isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1:
            expected = f"a floating-point tensor of shape {shape}"
            raise TypeError(wrong(name, expected, describe(value), "labels go in target"))
    checked = [
        check_floating(name, value, shape=shape, ndim=ndim) for name, value in inputs.items()
    ]
    first, *others = inputs
    for name, value in zip(others, checked[1:], strict=True):
        check_same_shape(name, value, first, checked[0], remedy)
    # One dtype for all, and no less than float32: half precision overflows once it is squared.
    dtype = reduce(torch.promote_types, (value.dtype for value in checked), torch.float32)
    return [value.to(dtype) for value in checked]


def check_same_batch(argument: str, values: Tensor, logits: Tensor) -> None:
    """Check that features or maps belong to the batch of ``logits_adv``."""
    if len(values) != len(logits):
        expected = f"one row for each of {len(logits)} rows of logits_adv"
        raise ValueError(wrong(argument, expected, describe(values)))
    check_same_device(argument, values, "logits_adv", logits)


def check_labels(target: Tensor, logits: Tensor) -> None:
    """Check class indices against logits ``(B, C)``."""
    batch, n_classes = logits.shape
    check_target(target, batch, n_classes, logits.device)


def cross_entropies(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each row; no label is skipped.

    PyTorch skips labels of -100 by default, which would leave a row out of a mean on an
    accelerator, where labels are not looked at.
    """
    none = torch.iinfo(torch.int64).min
    return F.cross_entropy(
        logits, target, ignore_index=none, reduction="none", label_smoothing=float(label_smoothing)
    )


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""Return :math:`1 - \cos(a_i, b_i)` of each row, without cancellation for similar rows.

    With unit rows it is :math:`\tfrac12 \lVert a_i - b_i \rVert^2`. A row of zeros has a cosine of
    0 with every other.
    """
    (unit_a, empty_a), (unit_b, empty_b) = unit_rows(a), unit_rows(b)
    return ((unit_a - unit_b).square().sum(1) + empty_a + empty_b) / 2


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of unit length, and which rows are zero and stay so."""
    length = row_norm(rows)
    empty = length == 0
    return rows / length.masked_fill(empty, 1).unsqueeze(1), empty


def row_norm(rows: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, with a derivative of 0 at a row of zeros.

    ``torch.linalg.vector_norm`` adds up in a plain loop on a CPU, and is off by 3e-5 after the
    50,176 pixels of a map; ``sum`` adds up pairwise.
    """
    squares = rows.square().sum(1)
    empty = squares == 0
    return squares.masked_fill(empty, 1).sqrt().masked_fill(empty, 0)


class LossModule(nn.Module):
    """A loss with its options kept as attributes.

    Subclasses say in ``requires`` which passes they need, and how to compute the terms.
    """

    def __init__(self, *may_be_none: str, **options: Any) -> None:
        super().__init__()
        self._option_names, self._may_be_none = tuple(options), may_be_none
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an option whenever it is set: weights are changed during a training."""
        if name in self.__dict__.get("_option_names", ()):
            value = check_options(*self._may_be_none, **{name: value})[name]
        super().__setattr__(name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name: the keyword arguments of the function and of the constructor."""
        return {name: getattr(self, name) for name in self._option_names}

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
