"""Borrowing a user's module and giving it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def without_ddp(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a DistributedDataParallel wraps, and any other model as it is.

    The wrapper adds nothing to a pass without gradients of parameters, and with ``static_graph``
    it takes the first backward pass for a training step: later gradients are not averaged.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


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
    """Freeze a module's parameters, and give each its own ``requires_grad`` back at the end.

    FSDP2 puts other parameters under the same names while they are gathered, and may leave them
    there. So a flag goes back to the parameter that had it and to the one now under its name.
    """
    parameters = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in (*parameters.items(), *model.named_parameters()):
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
