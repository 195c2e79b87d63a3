"""Which implementation of the Dirichlet KL computes a call, and why."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch

from calibclip._checks import wrong

Implementation = Literal["auto", "eager", "compile", "triton", "reference", "torch_distributions"]
IMPLEMENTATIONS = get_args(Implementation)

# The files with a ``forward`` and a ``backward``. "reference" is the closed form in float64, and
# "torch_distributions" gets here with an empty batch only.
_FILES = {
    "eager": "closed_form",
    "reference": "closed_form",
    "compile": "compiled",
    "torch_distributions": "closed_form",
    "triton": "triton_rows",
}
# What torch.compile looks for unless the environment's CXX says otherwise.
_COMPILERS = {"win32": "cl", "darwin": "clang++"}


class ImplChoice(NamedTuple):
    """Which implementation a call gets, and why.

    Attributes:
        impl: Its name.
        reason: A sentence.
    """

    impl: str
    reason: str


@cache
def load(impl: str) -> ModuleType:
    """Import an implementation when it is first used: Triton takes its time, and may be missing."""
    return importlib.import_module(f"calibclip._kernels.{_FILES[impl]}")


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> ImplChoice:
    """Return what computes a call of float32 or float64 on a device.

    Args:
        impl: What the caller asked for.
        device: Where the tensors are.
        dtype: What they are computed in.

    Returns:
        The implementation and the reason; of an explicit ``impl``, that it was asked for.

    Raises:
        ValueError: The explicit ``impl`` cannot run here.
    """
    if impl == "auto":
        obstacle = _against_triton(device, dtype)
        if obstacle is None:
            return ImplChoice("triton", f"the tensors are {dtype} on {device} and Triton is there")
        return ImplChoice("eager", obstacle)
    obstacle = None
    if impl == "triton":
        obstacle = _against_triton(device, dtype)
    elif impl == "compile":
        obstacle = _against_compiler(device.type)
    if obstacle is not None:
        remedy = f'{obstacle}: use impl="auto"'
        raise ValueError(wrong("impl", "an implementation that can run", repr(impl), remedy))
    return ImplChoice(impl, "it was asked for")


def _against_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernel cannot run, if so."""
    if dtype == torch.float64:
        return "the Triton kernel is for float32 and half precision, and an input is float64"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":  # as in its tests
            return _without_triton()
        return f"the tensors are on {device.type}, and the Triton kernel needs a CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernel is tuned for NVIDIA's cards and untested on AMD's"
    return _too_old(device) or _without_triton()


@cache
def _without_triton() -> str | None:
    try:
        load("triton")
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    return None


@cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the card's compute capability is {major}.{minor}, and the kernel needs 8.0"
    return None


def _against_compiler(device_type: str) -> str | None:
    """Return why ``torch.compile`` cannot make its code, if so."""
    if device_type == "cuda":
        return _without_triton()
    if device_type != "cpu":
        return f"the compiled form is untested on {device_type}"
    compiler = os.environ.get("CXX", _COMPILERS.get(sys.platform, "g++"))
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return None
