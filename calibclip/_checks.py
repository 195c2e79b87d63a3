"""Argument checks. Each message reads ``<argument>: expected <what>, got <what>; <what to do>``."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Collection, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor


def wrong(argument: str, expected: str, got: object, remedy: str = "") -> str:
    """Compose the one message form used for every bad argument."""
    return f"{argument}: expected {expected}, got {got}" + (f"; {remedy}" if remedy else "")


def warn(message: str, category: type[Warning]) -> None:
    """Warn, naming the line that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("calibclip."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def describe(value: object) -> str:
    """Say what a value is, for the ``got`` part of a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"{type(value).__name__} of {len(value)} tensors"
    return f"{type(value).__name__} {value!r}"


def check_number(
    argument: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return ``value`` as a float after checking that it is a finite real number in range."""
    expected = "a number"
    if above is not None:
        expected = f"a number > {above:g}"
    elif at_least is not None:
        upper = "" if at_most is None else f" and <= {at_most:g}"
        expected = f"a number >= {at_least:g}{upper}"
    if isinstance(value, Tensor):
        raise TypeError(wrong(argument, expected, describe(value), f"pass float({argument})"))
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(wrong(argument, expected, describe(value)))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    outside = (
        (above is not None and not number > above)
        or (at_least is not None and not number >= at_least)
        or (at_most is not None and not number <= at_most)
    )
    if not math.isfinite(number) or outside:
        raise ValueError(wrong(argument, expected, f"{value!r}"))
    return number


def check_count(argument: str, value: object, *, at_least: int) -> int:
    """Return ``value`` after checking that it is an integer no smaller than ``at_least``."""
    expected = f"an integer >= {at_least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(wrong(argument, expected, describe(value)))
    if value < at_least:
        raise ValueError(wrong(argument, expected, f"{value}"))
    return int(value)


def check_size(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return ``(height, width)`` of a pair of integers >= 1, or of one for both."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2:
        raise ValueError(wrong(argument, "(height, width) or one number for both", describe(value)))
    height, width = (check_count(argument, side, at_least=1) for side in sides)
    return height, width


def check_flag(argument: str, value: object) -> None:
    """Check that ``value`` is a bool: a truthy string such as ``"no"`` is not."""
    if not isinstance(value, bool):
        raise TypeError(wrong(argument, "True or False", describe(value)))


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Check that ``value`` is one of a few names."""
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(wrong(argument, f"one of {names}", repr(value)))


def check_floating(
    argument: str, value: object, *, shape: str, ndim: int | None = None, empty: bool = False
) -> Tensor:
    """Check for a floating-point tensor; ``shape`` is how the message writes the shape.

    Without ``ndim`` any tensor of at least one dimension passes. The last must not be empty, unless
    ``empty`` allows it.
    """
    expected = f"a floating-point tensor of shape {shape}"
    if not isinstance(value, Tensor):
        remedy = f"torch.from_numpy({argument})" if isinstance(value, np.ndarray) else ""
        raise TypeError(wrong(argument, expected, describe(value), remedy))
    if type(value) is not Tensor and hasattr(value, "to_local"):  # a DTensor, without its import
        remedy = f"shard it by rows and call {argument}.to_local()"
        raise TypeError(wrong(argument, expected, f"a {type(value).__name__}", remedy))
    if not value.is_floating_point():
        raise TypeError(wrong(argument, expected, describe(value), f"call {argument}.float()"))
    if value.ndim == 0 or (ndim is not None and value.ndim != ndim):
        raise ValueError(wrong(argument, expected, describe(value)))
    if value.shape[-1] == 0 and not empty:
        raise ValueError(wrong(argument, f"{expected}, the last size >= 1", describe(value)))
    return value


def check_same_shape(
    argument: str, value: Tensor, other: str, reference: Tensor, remedy: str = ""
) -> None:
    """Check that two tensors agree in shape and device."""
    if value.shape != reference.shape:
        expected = f"the shape of {other}, {tuple(reference.shape)}"
        raise ValueError(wrong(argument, expected, tuple(value.shape), remedy))
    check_same_device(argument, value, other, reference)


def check_same_device(argument: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Check that two tensors are on one device."""
    if value.device != reference.device:
        expected = f"the device of {other}, {reference.device}"
        raise ValueError(wrong(argument, expected, value.device, "move one of the two"))


def check_target(target: object, batch: int, n_classes: int | None, device: torch.device) -> Tensor:
    """Check class indices of shape ``(batch,)``; ``None``: the number of classes is not known yet.

    The range is checked on the CPU only: on an accelerator the look would stall the device, and
    PyTorch's own index check reports the fault there, as far as no label means "skip this".
    """
    expected = f"a tensor of int64 class indices of shape ({batch},)"
    if not isinstance(target, Tensor):
        raise TypeError(wrong("target", expected, describe(target)))
    if target.dtype != torch.int64:
        raise TypeError(wrong("target", expected, describe(target), "call target.long()"))
    if target.shape != (batch,):
        raise ValueError(wrong("target", expected, describe(target)))
    if target.device != device:
        raise ValueError(wrong("target", f"a tensor on {device}", f"one on {target.device}"))
    looked_at = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if n_classes is not None and looked_at and batch > 0:
        lowest, highest = (int(bound) for bound in torch.aminmax(target))
        if lowest < 0 or highest >= n_classes:
            outside = lowest if lowest < 0 else highest
            raise ValueError(wrong("target", f"class indices in [0, {n_classes - 1}]", outside))
    return target
