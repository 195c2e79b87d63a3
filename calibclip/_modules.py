"""Borrowing a user's module and giving it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and give each submodule its own flag back at the end.

    Flags are set one by one and not through ``train()``, which a module may override, and which
    would wake up a submodule that the user keeps in evaluation mode.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze a module's parameters, and give each its own ``requires_grad`` back at the end."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
