"""Evaluate the Triton kernels on the cases that test_kernels_triton.py judges.

Without a CUDA device that takes Triton's interpreter, which TRITON_INTERPRET=1 must have switched
on before Triton is imported: so the tests run this file as a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from test_dirichlet_kl import clip_like, golden
from test_kernels_closed_form import hard_pairs
from torch import Tensor

from calibclip import explain_impl
from calibclip._kernels import dirichlet_kl_gradient, dirichlet_kl_parts

# How many golden rows the interpreter has the time for; a device takes all.
GOLDEN_ROWS = {2: slice(3, None, 4), 10: slice(0, None, 4), 200: [2, 9, 43, 51, 54, 59], 1000: [9]}
# One, less than a block, both sides of a block, many blocks, and more warps than one.
WIDTHS = (1, 37, 127, 128, 129, 1000, 8193)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    first: Tensor  # leaves
    second: Tensor
    views: tuple[Callable[[Tensor], Tensor], ...] = (lambda t: t,) * 2
    upstream: tuple[Tensor, Tensor] | None = None  # of the two parts; None: ones, expanded
    needs: tuple[bool, bool] = (True, True)
    options: dict[str, float] = {}  # noqa: RUF012


def evaluate(case: Case, impl: str, device: str = "cpu") -> list[Tensor | None]:
    """Return both parts and the gradients of both leaves."""
    leaves = [
        x.to(device).clone().requires_grad_(need)
        for x, need in zip((case.first, case.second), case.needs, strict=True)
    ]
    inputs = [view(x) for view, x in zip(case.views, leaves, strict=True)]
    parts = dirichlet_kl_parts(*inputs, impl=impl, **case.options)
    if case.upstream is None:
        (parts[0] + parts[1]).sum().backward()
    else:
        upstream = [x.to(device=device, dtype=parts[0].dtype) for x in case.upstream]
        torch.autograd.backward(parts, upstream)
    found = [*parts, *(x.grad for x in leaves)]
    return [None if x is None else x.detach().cpu() for x in found]


def spread(low: float, gap: float, n_classes: int, rows: int = 1) -> list[Tensor]:
    """Concentrations from ``low`` on, and others whose logarithms differ by about ``gap``."""
    generator = torch.Generator().manual_seed(n_classes)
    first = low + 4 * torch.rand(rows, n_classes, generator=generator)
    return [first, first + gap * torch.randn(rows, n_classes, generator=generator)]


def together(*pairs: list[Tensor]) -> list[Tensor]:
    return [torch.cat(side) for side in zip(*pairs, strict=True)]


def padded(x: Tensor) -> Tensor:
    """Rows further apart than they are long, beside NaN."""
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[:, : x.shape[-1]]


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def spoilt() -> Case:
    """Rows 0, 1, ... as in "clean", but for one or all numbers of rows 1 to 8."""
    first, second = (x.clone() for x in CLEAN)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        first[1 + 2 * i, 3] = second[2 + 2 * i, 40] = value
    first[7], second[8] = torch.nan, -torch.inf
    return Case(first, second)


CLEAN = clip_like(10, 41, 1e-2)


def golden_case(n_classes: int, *, all_rows: bool) -> Case:
    _, first, second, *_ = golden(n_classes)
    rows = slice(None) if all_rows else GOLDEN_ROWS[n_classes]
    return Case(torch.from_numpy(first[rows]), torch.from_numpy(second[rows]))


def reference_cases() -> dict[str, Case]:
    """What is compared with the closed form in float64."""
    generator = torch.Generator().manual_seed(0)
    cases = {}
    for n in WIDTHS[1:]:
        rows = [spread(14, 1e-3, n)]
        if n < 1000:
            rows.append(spread(14, 9.0, n))  # wide gaps
        if n in (37, 127):
            rows.append(spread(3, 0.1, n))  # the Bernoulli numbers
        if n in (37, 129):
            rows.append(spread(0, 0.1, n))  # the recurrence
        cases[f"C={n}"] = Case(*together(*rows))
    few = clip_like(3, 40, 0.02)
    cases["padded"] = Case(*few, views=(padded, padded))
    cases["columns apart"] = Case(*few, views=(every_second, every_second))
    row = few[1][:1]
    cases["expanded second"] = Case(few[0], row, views=(lambda t: t, lambda t: t.expand(3, -1)))
    cases["expanded first"] = Case(row, few[0], views=(lambda t: t.expand(3, -1), lambda t: t))
    cases["transposed"] = Case(few[0].T.contiguous(), few[1], views=(lambda t: t.T, lambda t: t))
    cases["largest is shared"] = Case(
        torch.full((2, 300), 16.0), 16 + torch.randn(2, 300, generator=generator)
    )
    upstream = tuple(torch.randn(2, 3, generator=generator))
    cases["upstream"] = Case(*few, upstream=upstream)
    no_shape = (torch.zeros(3), upstream[1])
    cases["evidence alone"] = Case(*few, upstream=no_shape)
    cases["shape alone"] = Case(*few, upstream=(upstream[0], torch.zeros(3)))
    small = spread(-2, 0.3, 40)
    cases["small, evidence alone"] = Case(*small, upstream=(torch.zeros(1), upstream[1][:1]))

    logits = [100 * (0.07 * x - 1) for x in few]
    paper = {"scale": 1 / 7, "shift": 1 / 0.07, "log_weight": -17.3}
    cases["logits"] = Case(*logits, options=paper, upstream=upstream)
    # So large a shift that a float32's rounding of it would show.
    sharp = {"scale": 1 / (100 * 0.003), "shift": 1 / 0.003, "log_weight": -1.25 / 0.003}
    cases["sharp logits"] = Case(*logits, options=sharp)
    # 1/3 and 0.1 are no float32s, and small concentrations are summed in float64.
    inexact = {"scale": 1 / 3, "shift": 0.1, "log_weight": 1 / 7}
    cases["small logits"] = Case(*(3 * x for x in small), options=inexact)
    cases["wide logits"] = Case(*(3 * x for x in spread(14, 9.0, 40)), options=inexact)
    # Concentrations near e^130 do not fit float32; their weighted divergence does.
    cases["large weighted"] = Case(*few, options={"shift": 110.0, "log_weight": -130.0})
    cases["heavy"] = Case(*few, options={"log_weight": 40.0})
    return cases


def other_cases() -> dict[str, Case]:
    """What is compared with one another, or with a number."""
    equal = torch.cat([spread(low, 0, 37)[0] for low in (-60, 1.5, 10, 60)])
    few = [x[:3] for x in CLEAN]
    distant = clip_like(1, 37, 0.5)
    cases = {
        "equal": Case(equal, equal),
        "equal beside others": Case(*together([equal[1:2]] * 2, list(distant))),
        "equal beyond the range": Case(*[torch.full((2, 1000), 85.0)] * 2),
        "beyond the range": Case(*torch.tensor([[[100.0, 99, 98]], [[100, 99, 98 + 1e-5]]])),
        "C=1": Case(torch.tensor([[0.5], [15.0], [40.0]]), torch.tensor([[1.5], [15.1], [35.0]])),
        "weight 0": Case(*few, options={"log_weight": -torch.inf}),
        "clean": Case(*CLEAN),
        "few": Case(*few),
        "few again": Case(*few),
        "spoilt": spoilt(),
        "first only": Case(*few, needs=(True, False)),
        "second only": Case(*few, needs=(False, True)),
        "no rows": Case(*torch.empty(2, 0, 7)),
    }
    halves = [x / 6 for x in together(list(clip_like(1, 40, 0.1)), spread(60, 9.0, 40))]
    for name, dtypes in {"bf16": (BF16, BF16), "fp16": (F16, F16), "mixed": (BF16, F32)}.items():
        half = [x.to(dtype) for x, dtype in zip(halves, dtypes, strict=True)]
        cases[name] = Case(*half)
        cases[f"{name}, upcast"] = Case(*(x.float() for x in half))
    return cases


# Of more classes than the kernel makes its anchor of.
HARD_CASES = {f"hard, {name}": Case(*pair) for name, pair in hard_pairs(4, 300)}


def gradient_at_once(device: str) -> list[Tensor]:
    """What the loss on features calls: the values and a gradient, by each direction."""
    pair = [x.to(device) for x in clip_like(2, 40, 0.02)]
    options = {"scale": 0.5, "shift": 3.0, "log_weight": torch.tensor(-2.0).double().to(device)}
    found = []
    for reverse in (True, False):
        results = dirichlet_kl_gradient(*pair, **options, reverse=reverse, impl="triton")
        found += [x.cpu() for x in results]
    return found


def operators(device: str) -> list[Tensor]:
    """Call both operators, those of tracers, on inputs of two dtypes."""
    first, second = (x.to(device) for x in clip_like(2, 8, 0.02))
    first, ones = first.bfloat16(), torch.ones(2, device=device)
    weight = torch.zeros((), dtype=torch.float64, device=device)
    calls = torch.ops.calibclip
    outputs = calls.dirichlet_kl(first, second, 1.0, 0.0, weight, "triton")
    arguments = (first, second, outputs[2], 1.0, 0.0, weight, "triton", True, True)
    return [*outputs, *calls.dirichlet_kl_backward(ones, ones, *arguments)]


def everything(device: str) -> dict[str, object]:
    """Return all results, by the names of their cases."""
    # PyTorch then fills new buffers with NaN, and what a kernel has not written shows.
    torch.use_deterministic_algorithms(True)
    try:
        cases = {f"golden {n}": golden_case(n, all_rows=device != "cpu") for n in GOLDEN_ROWS}
        cases |= reference_cases() | other_cases() | HARD_CASES
        found: dict[str, object] = {
            name: evaluate(case, "triton", device) for name, case in cases.items()
        }
        found["gradient at once"] = gradient_at_once(device)
        found["operators"] = [x.cpu() for x in operators(device)]
    finally:
        torch.use_deterministic_algorithms(False)
    found["auto"] = explain_impl(torch.empty(1, 1, device=device)).impl
    return found


if __name__ == "__main__":
    with np.errstate(all="ignore"):  # the interpreter is NumPy, and evaluates both sides of a where
        torch.save(everything("cpu"), sys.argv[1])
