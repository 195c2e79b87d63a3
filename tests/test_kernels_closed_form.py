"""The closed form at its edges: its series, its rows that need more care, its few numbers."""

import mpmath
import numpy as np
import pytest
import torch
from test_dirichlet_kl import clip_like, errors, evaluate

from calibclip import dirichlet_kl
from calibclip._kernels import closed_form, dirichlet_kl_parts, small, special

BOUND = 5e-6
F32, F64 = torch.float32, torch.float64


def assert_close(found, want, bound=BOUND):
    for got, expected in zip(found, want, strict=True):
        assert got.shape == expected.shape
        columns = expected.shape[-1] if expected.ndim > 1 else 1
        assert errors(got.reshape(-1, columns), expected.reshape(-1, columns)).max() <= bound


# e^t - 1 and e^t - 1 - t


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("bound", [0.25, 0.5, 1.0, 1.5, 2.0, 2.99, 80.0])
def test_orders(bound, dtype):
    sizes = torch.cat([torch.linspace(0, bound, 200), torch.logspace(-12, np.log10(bound), 100)])
    t = torch.cat([sizes, -sizes]).clamp(-bound, bound).to(dtype)
    growth, curve = special.orders(t, bound)
    assert torch.equal(special.second_order(t, bound), curve)
    with mpmath.workdps(50):
        exact = [mpmath.expm1(float(x)) for x in t]
        rest = [float(value - float(x)) for value, x in zip(exact, t, strict=True)]
    allowed = (8 if bound < special.CLOSE else 80) * torch.finfo(dtype).eps
    for found, want in ((growth, [float(value) for value in exact]), (curve, rest)):
        want = torch.tensor(want, dtype=F64)
        torch.testing.assert_close(found.double(), want, rtol=allowed, atol=0)


# Rows that a number near all gaps does not divide well


def hard_pairs(rows, n_classes):
    """Changes of nearly all concentrations alike, and of rows with nearly all in one class."""
    generator = torch.Generator().manual_seed(0)

    def noise(factor):
        return factor * torch.randn(rows, n_classes, generator=generator)

    common = torch.linspace(-1.5, 2.5, rows)[:, None]
    for low in (14.0, 30.0, 60.0, 75.0):
        row = low + torch.rand(rows, n_classes, generator=generator)
        yield f"common change, {low}", (row, row + common)
        higher = row.clone()
        higher[:, 3] = low + 5.5
        yield f"top class, {low}", (higher, higher + noise(0.1) + 0.5)
        yield f"top class stays behind, {low}", (higher, row + common)
    for margin in (10.0, 20.0, 30.0, 40.0, 50.0):
        row = 14 + torch.rand(rows, n_classes, generator=generator)
        row[:, 7] += margin
        yield f"one class, {margin}", (row, row + noise(0.1))
        yield f"one class, common change, {margin}", (row, row + noise(0.1) + common)
        second = row + common
        second[:, 0] += 1e-2
        yield f"one class, another changes, {margin}", (row, second)


HARD_PAIRS = dict(hard_pairs(6, 30))


def assert_same_divergence(found, want):
    """Judge the whole divergence and both gradients."""
    assert_close([found[0] + found[1], *found[2:]], [want[0] + want[1], *want[2:]])


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", HARD_PAIRS)
def test_hard_rows(name, few, monkeypatch):
    pair = HARD_PAIRS[name]
    if not few:
        monkeypatch.setattr(small, "_FEW", 0)
    found = evaluate(*pair, impl="eager")
    assert_same_divergence(found, evaluate(*pair, impl="reference"))


FAR_APART = {
    "down": ([[100.0, 100.5]], [[1.0, 1.2]]),
    "down, large": ([[90.0, 90.5]], [[60.0, 60.7]]),
    "up": ([[-80.0, -80.5]], [[20.0, 20.25]]),
    "one class": ([[100.0]], [[1.0]]),
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", FAR_APART)
def test_a_common_change_of_any_size(name, few, monkeypatch):
    """The second Dirichlet's total fits float32, and so does the shape part."""
    pair = [torch.tensor(rows) for rows in FAR_APART[name]]
    if not few:
        monkeypatch.setattr(small, "_FEW", 0)
    found, want = (evaluate(*pair, impl=impl) for impl in ("eager", "reference"))
    judged = (0, 2, 3) if name != "up" else (0,)  # whose evidence is infinite
    for i in judged:
        torch.testing.assert_close(found[i], want[i].float(), rtol=1e-4, atol=1e-30)


# The path for few numbers


@pytest.mark.parametrize("scale", [1.0, 1 / 7])
@pytest.mark.parametrize("sd", [0.0, 1e-5, 1e-3, 0.03, 0.4])
@pytest.mark.parametrize("n_classes", [2, 10, 200])
def test_few_numbers_agree_with_many(n_classes, sd, scale, monkeypatch):
    pair = [x + 12 for x in clip_like(6, n_classes, sd, seed=n_classes)]
    options = {}
    if scale != 1:
        pair = [100 * (0.07 * x - 1) for x in pair]
        options = {"scale": scale, "shift": 1 / 0.07, "log_weight": -17.3}
    upstream = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))

    def parts_and_gradients():
        leaves = [x.clone().requires_grad_() for x in pair]
        parts = dirichlet_kl_parts(*leaves, impl="eager", **options)
        grads = []
        for of_shape in (1, 0):  # next to which the evidence would not be seen
            given = [of_shape * upstream[0], upstream[1]]
            grads += torch.autograd.grad(parts, leaves, given, retain_graph=True)
        return [*(part.detach() for part in parts), *grads]

    weight = torch.tensor(options.get("log_weight", 0.0), dtype=F64)
    call = (*pair, scale, options.get("shift", 0.0), weight)
    assert small.forward(*call) is not None
    few = parts_and_gradients()
    monkeypatch.setattr(small, "_FEW", 0)
    assert small.forward(*call) is None
    many = parts_and_gradients()
    assert [x.dtype for x in few] == [x.dtype for x in many]
    if sd == 0:
        assert not any(values.any() for values in (*few, *many))
    else:
        assert_close(few, many)


def test_few_numbers_are_told_from_others():
    """From many, from float64, from small and huge concentrations, and from none."""

    def suits(first, second, scale=1.0, shift=0.0):
        return small.forward(first, second, scale, shift, torch.zeros((), dtype=F64)) is not None

    pair = clip_like(2, 8, 0.02)
    assert suits(*pair)
    assert suits(*(x.bfloat16() for x in pair))
    assert not suits(*clip_like(8, 1 << 13, 0.02))
    assert not suits(pair[0].double(), pair[1])
    assert not suits(*(x - 12 for x in pair))
    assert suits(*(x - 12 for x in pair), shift=12.0)
    assert not suits(*(x + 30 for x in pair))
    assert not suits(*pair, scale=1 / 7)
    assert not suits(*torch.empty(2, 0, 8))
    for value in (-3.0, torch.inf):
        second = pair[1].clone()
        second[1, 0] = value
        assert not suits(pair[0], second)


def test_few_numbers_far_apart_or_huge():
    """As with a tiny temperature: what float64 cannot hold goes to the form for many."""
    for temperature in (1e-2, 1e-3, 1e-4):
        first, second = (torch.tensor([row]) for row in ([0.3, -0.5, 0.1], [-0.5, 0.3, 0.12]))
        options = {"scale": 1 / temperature, "shift": 1 / temperature}
        options["log_weight"] = -1.3 / temperature
        want = sum(dirichlet_kl_parts(first, second, impl="reference", **options))
        for rows in (1, 1 << 15):
            pair = [x.expand(rows, -1) for x in (first, second)]
            found = sum(dirichlet_kl_parts(*pair, impl="eager", **options))[:1].double()
            rtol = max(5e-6, 1e-7 / temperature)  # that of c / T in float32
            torch.testing.assert_close(found, want, rtol=rtol, atol=0)
    huge = torch.full((1, 3), 800.0)
    assert float(dirichlet_kl(huge, huge, impl="eager")) == 0


def test_backward_follows_forward():
    """Backward of a call is of the path that forward took, told by a mark."""
    for shift, few in ((0.0, True), (-12.0, False)):
        pair = [x + shift for x in clip_like(2, 8, 0.02)]
        weight = torch.zeros((), dtype=F64)
        *parts, stats = closed_form.forward(*pair, 1.0, 0.0, weight)
        assert small.suited(*pair, stats) == few
        grads = closed_form.backward(
            *map(torch.ones_like, parts), *pair, stats, 1.0, 0.0, weight, (True, True)
        )
        want = evaluate(*pair, impl="reference")
        assert_close([*parts, *grads], want)
