import inspect
import math

import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from calibclip import aleatoric_uncertainty as exported
from calibclip import log_concentration
from calibclip.uncertainty import (
    aleatoric_uncertainty,
    conflictiveness,
    differential_entropy,
    dissonance,
    epistemic_uncertainty,
    expected_pairwise_kl,
    mutual_information,
    predictive_entropy,
    published_aleatoric_uncertainty,
    published_epistemic_uncertainty,
    published_log_concentration,
    published_predictive_entropy,
    vacuity,
)

F32, F64 = torch.float32, torch.float64
BOUND = {F32: 5e-6, F64: 1e-12}
MEASURES = (
    predictive_entropy,
    aleatoric_uncertainty,
    mutual_information,
    epistemic_uncertainty,
    vacuity,
)


def approx(want, rel, abs=0.0):
    """As pytest's, whose silent absolute tolerance of 1e-12 would pass any tiny value."""
    return pytest.approx(want, rel=rel, abs=abs)


def all_measures(log_alpha, **options):
    return {measure.__name__: measure(log_alpha, **options) for measure in MEASURES}


def assert_measures(log_alpha, want, bound):
    for name, value in all_measures(log_alpha).items():
        assert value.dtype == log_alpha.dtype
        assert float(value) == approx(float(want[name]), rel=bound), name


# With a closed-form gradient, and with one from autograd or none.
SMOOTH = (*MEASURES, expected_pairwise_kl, differential_entropy)
PUBLISHED = (
    published_aleatoric_uncertainty,
    published_epistemic_uncertainty,
    published_predictive_entropy,
)
ids = {"ids": lambda function: function.__name__}


# The measures


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("log_alpha", "entropy", "aleatoric", "mutual", "epistemic", "evidence_free"),
    [
        (np.log([2, 1, 1]), 1.0397208, 5 / 6, 0.2063874, 3 / 7, 3 / 4),
        (np.zeros(10), 2.3025851, 1.9289683, 0.3736168, 0.5, 1.0),
        ([28] + [0] * 9, 1.804658e-10, 1.778349e-10, 2.630970e-12, 6.914400e-12, 6.914400e-12),
        ([28] * 10, 2.3025851, 2.3025851, 3.111480e-13, 6.914400e-13, 6.914400e-13),
    ],
)
def test_hand_values(dtype, log_alpha, entropy, aleatoric, mutual, epistemic, evidence_free):
    row = torch.tensor(log_alpha, dtype=dtype)
    found = list(all_measures(row).values())
    want = [entropy, aleatoric, mutual, epistemic, evidence_free]
    assert [float(value) for value in found] == approx(want, rel=1e-6)


def concentrations():
    """Rows from alpha of 1 to e^30, by what they are like."""
    rng = np.random.default_rng(0)
    for n_classes in (2, 3, 10, 200):
        for low, high in ((0, 0), (0, 1), (1, 2.5), (3, 4), (2, 8), (12, 20), (0, 30), (30, 30)):
            yield f"{n_classes} in {low}..{high}", rng.uniform(low, high, n_classes)
        for temperature in (0.03, 0.07, 0.5, 1.0):
            row = (np.clip(rng.normal(0.2, 0.06, n_classes), -1, 1) + 1) / temperature
            yield f"{n_classes} at T={temperature}", row
        for top in (2.0, 5.0, 17.0, 30.0):
            yield f"{n_classes}, one {top}", top * (np.arange(n_classes) == 1)
    yield "around the switches", np.log([3.9, 3.99, 4, 4.01, 4.1, 29, 30, 31])
    yield "just above float32's", np.log([4.01, 4.1, 4.2])
    yield "between the two", np.log([8.1, 8.5, 9])
    yield "just above float64's", np.log([30.1, 30.5, 31])
    yield "beyond", np.array([80.0, 79.0, 40.0])
    yield "below 1", np.array([-3.0, -1.0, 0.5, -2.0])


CONCENTRATIONS = dict(concentrations())


@pytest.mark.parametrize("name", CONCENTRATIONS)
def test_against_mpmath(name):
    row = torch.from_numpy(CONCENTRATIONS[name]).float()
    want = oracles.measures(row)
    for dtype, bound in BOUND.items():
        assert_measures(row.to(dtype), want, bound)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(0, 30, width=32), min_size=2, max_size=6))
def test_against_mpmath_anywhere(row):
    want = oracles.measures(row)
    for dtype, bound in BOUND.items():
        assert_measures(torch.tensor(row, dtype=dtype), want, bound)


def harmonic(n):
    return sum(1 / k for k in range(1, n + 1))


@pytest.mark.parametrize("alpha", [(1, 1), (2, 1, 1), (5, 3, 1, 1), (40, 7, 1), (1, 2, 3, 500)])
def test_integers_by_harmonic_numbers(alpha):
    total = sum(alpha)
    want = sum(a / total * (harmonic(total) - harmonic(a)) for a in alpha)
    row = torch.tensor(alpha, dtype=F64).log()
    assert float(aleatoric_uncertainty(row)) == approx(want, rel=1e-12)
    assert float(aleatoric_uncertainty(row.float())) == approx(want, rel=5e-6)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(0, 30), min_size=2, max_size=8))
def test_identities_and_bounds(row):
    log_alpha, size = torch.tensor(row, dtype=F64), len(row)
    total, aleatoric, mutual, epistemic, free = (float(m(log_alpha)) for m in MEASURES)
    strength = float(log_alpha.exp().sum())
    slack = 1 + 1e-12
    assert aleatoric + mutual == approx(total, rel=1e-12)
    assert epistemic == approx(free / (1 + free), rel=1e-12)
    assert free == approx(size / strength, rel=1e-12)
    assert 0 <= mutual <= (size - 1) / strength * slack
    assert 0 <= aleatoric <= total <= math.log(size) * slack
    assert 0 < epistemic < 1
    assert 0 < free <= slack

    # In float32 too, order of classes aside.
    narrow = log_alpha.float()
    for measure in MEASURES:
        value = measure(narrow)
        torch.testing.assert_close(measure(narrow.flip(-1)), value, rtol=5e-6, atol=0)
        torch.testing.assert_close(measure(narrow.double()).float(), value, rtol=5e-6, atol=0)
        assert value >= 0


@pytest.mark.parametrize("measure", MEASURES, **ids)
def test_normalize_divides_by_the_log_of_the_classes(measure):
    log_alpha = 3 * torch.rand(4, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(measure(log_alpha, normalize=True), measure(log_alpha) / math.log(7))
    assert predictive_entropy(torch.full((7,), 5.0), normalize=True) == approx(1, rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES, **ids)
def test_shapes(measure):
    log_alpha = 9 * torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    whole = measure(log_alpha)
    assert whole.shape == (3, 4)
    assert measure(log_alpha[0, 0]).shape == ()
    for i in range(3):
        torch.testing.assert_close(measure(log_alpha[i]), whole[i])
    padded = torch.full((3, 4, 10), torch.nan)
    padded[..., ::2] = log_alpha
    torch.testing.assert_close(measure(padded[..., ::2]), whole)
    assert measure(torch.empty(0, 5)).shape == (0,)
    spoilt = log_alpha.clone()
    spoilt[1, 2, 3] = torch.nan
    found = measure(spoilt)
    assert found[1, 2].isnan()
    assert found.isnan().sum() == 1
    version = log_alpha._version
    measure(log_alpha)
    assert log_alpha._version == version


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_one_class_leaves_only_the_evidence_open(dtype):
    row = torch.tensor([[2.0], [0.0], [25.0]], dtype=dtype)
    for measure in (predictive_entropy, aleatoric_uncertainty, mutual_information):
        assert not measure(row).any()
    torch.testing.assert_close(vacuity(row).squeeze(), torch.exp(-row.squeeze()))


@pytest.mark.parametrize("measure", MEASURES, **ids)
@pytest.mark.parametrize("low", [0.0, 1.2, 3.2, 8.0])
def test_gradcheck(measure, low):
    rng = torch.Generator().manual_seed(1)
    log_alpha = low + torch.rand(3, 4, generator=rng, dtype=F64)
    assert torch.autograd.gradcheck(measure, log_alpha.requires_grad_())


@pytest.mark.parametrize("measure", MEASURES, **ids)
def test_gradients_at_the_extremes(measure):
    levels = (-40.0, 0.0, 30.0, 80.0, 100.0)
    rows = torch.cartesian_prod(*[torch.tensor(levels)] * 3).requires_grad_()
    measure(rows).sum().backward()
    assert rows.grad.isfinite().all()

    # Nothing is a difference of large numbers: float32 knows the gradient of a tiny value.
    rows = torch.tensor([[0.0, 0.0, 0.0], [1.5, 1.3, 1.38], [17.0, 16.0, 17.5], [30.0, 30.0, 29.0]])
    narrow, wide = (rows.to(dtype, copy=True).requires_grad_() for dtype in (F32, F64))
    measure(narrow).sum().backward()
    measure(wide).sum().backward()
    error = (narrow.grad - wide.grad).norm(dim=-1)
    assert (error <= 5e-6 * wide.grad.norm(dim=-1)).all()


@pytest.mark.parametrize("measure", [predictive_entropy, aleatoric_uncertainty])
def test_gradient_of_a_confident_row(measure):
    """The largest class's own entropy gradient is 1e-12 of the terms that cancel around it."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        log_alpha = torch.tensor([30.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        measure(log_alpha).backward()
        grads.append(log_alpha.grad.double())
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


# The whole range, values and gradients


def smooth_measures(log_alpha):
    """Value and gradient in log alpha of each smooth measure, by its definition, in 60 digits."""
    alpha = [mpmath.exp(mpf(float(x))) for x in log_alpha]
    total, size = mpmath.fsum(alpha), len(alpha)
    probs = [a / total for a in alpha]
    known = {}
    for x in {*alpha, total}:
        known[x] = mpmath.digamma(x), mpmath.psi(1, x), mpmath.loggamma(x)
    psi, trigamma, lgamma = ({x: known[x][i] for x in known} for i in range(3))
    entropy = -mpmath.fsum(p * mpmath.log(p) for p in probs)
    slope = [p * (-mpmath.log(p) - entropy) for p in probs]
    excess = {x: psi[x] + 1 / x for x in known}  # psi(x + 1)
    steep = {x: x * (trigamma[x] - 1 / x**2) for x in known}  # x psi_1(x + 1)
    aleatoric = mpmath.fsum(
        p * (excess[total] - excess[a]) for p, a in zip(probs, alpha, strict=True)
    )
    aleatoric_slope = [
        p * (excess[total] - excess[a] - aleatoric + steep[total] - steep[a])
        for p, a in zip(probs, alpha, strict=True)
    ]
    free, epistemic = size / total, size / (total + size)
    pairwise = (size - 1) / total
    differential = mpmath.fsum(lgamma[a] - (a - 1) * psi[a] for a in alpha)
    differential += (total - size) * psi[total] - lgamma[total]
    return {
        "predictive_entropy": (entropy, slope),
        "aleatoric_uncertainty": (aleatoric, aleatoric_slope),
        "mutual_information": (
            entropy - aleatoric,
            [h - a for h, a in zip(slope, aleatoric_slope, strict=True)],
        ),
        "epistemic_uncertainty": (epistemic, [-epistemic * (1 - epistemic) * p for p in probs]),
        "vacuity": (free, [-free * p for p in probs]),
        "expected_pairwise_kl": (pairwise, [-pairwise * p for p in probs]),
        "differential_entropy": (
            differential,
            [a * ((total - size) * trigamma[total] - (a - 1) * trigamma[a]) for a in alpha],
        ),
    }


def whole_range():
    """Rows from alpha of 0.01 to e^80, one class apart from the others or none."""
    levels = [math.log(x) for x in (0.01, 0.1, 0.5, 1, 3.9, 4.1, 11.9, 12.1)] + [5, 12, 28, 80]
    for level in levels:
        for other in levels:
            yield [other, level, level]
    for other in (math.log(0.01), 0, 28, 80):
        yield [other, math.log(0.01)]
        yield [math.log(0.01), other]
        yield [other] + [math.log(0.01)] * 9
        yield [other] + [math.log(0.02)] * 999
        yield [math.log(0.01)] + [other] * 999
    rng = np.random.default_rng(0)
    for low, high in ((-4.6, 0), (-4.6, 80), (-4.6, 3), (0, 5), (17, 17.5), (79, 80), (2, 2.02)):
        for size in (2, 3, 30):
            yield rng.uniform(low, high, size)


def test_against_mpmath_over_the_whole_range():
    bound = {F32: 2e-6, F64: 1e-13}
    for row in whole_range():
        row = torch.tensor(row, dtype=F32)
        with mpmath.workdps(60):
            want = smooth_measures(row)
        for dtype in (F32, F64):
            log_alpha = row.to(dtype).requires_grad_()
            for measure in SMOOTH:
                value, slope = want[measure.__name__]
                found = measure(log_alpha)
                (gradient,) = torch.autograd.grad(found, log_alpha)
                # The one quantity that passes through zero: of two classes, around alpha = 1.
                scale = max(abs(value), float(measure is differential_entropy))
                if scale > 1e-37:
                    assert abs(float(found.detach()) - value) <= bound[dtype] * scale, (
                        measure,
                        row,
                    )
                norm = mpmath.sqrt(mpmath.fsum(g**2 for g in slope))
                error = [float(g - w) for g, w in zip(gradient.tolist(), slope, strict=True)]
                scale = max(norm, float(measure is differential_entropy), 1e-36)
                assert math.hypot(*error) <= 2.5 * bound[dtype] * scale, (measure, row)


def test_gradient_of_a_small_aleatoric_uncertainty():
    """Far below alpha = 1 it is not the difference of two much larger ones."""
    row = torch.tensor([0.1] + [0.01] * 9).log()
    log_alpha = row.clone().requires_grad_()
    aleatoric_uncertainty(log_alpha).backward()
    with mpmath.workdps(60):
        _, want = smooth_measures(row)["aleatoric_uncertainty"]
    error = log_alpha.grad.double().numpy() - [float(g) for g in want]
    assert np.linalg.norm(error) <= 2e-6 * np.linalg.norm([float(g) for g in want])


def test_gradient_of_nearly_equal_classes():
    """Each class's own is a difference that a sum of logarithms near ln C would swallow."""
    row = torch.tensor([17.0, 17.0005, 17.001, 16.9993])
    for measure in (predictive_entropy, aleatoric_uncertainty):
        log_alpha = row.clone().requires_grad_()
        measure(log_alpha).backward()
        with mpmath.workdps(60):
            _, want = smooth_measures(row)[measure.__name__]
        want = [float(g) for g in want]
        np.testing.assert_allclose(log_alpha.grad, want, rtol=0, atol=2e-6 * max(map(abs, want)))


@pytest.mark.parametrize("measure", SMOOTH, **ids)
def test_formulas_chosen_without_a_look_at_the_values(measure, monkeypatch):
    """As on an accelerator, where a look would stall."""
    rows = [[17.0, 16.0, 17.5], [80.0, 79.0, 5.0], [4.5, 12.5, 4.2], [0.0, 1.0, -4.0]]
    for dtype, bound in ((F32, 2e-6), (F64, 1e-13)):
        wants, founds = [], []
        for results in (wants, founds):
            for row in rows:
                log_alpha = torch.tensor(row, dtype=dtype, requires_grad=True)
                value = measure(log_alpha)
                results += [value.detach(), *torch.autograd.grad(value, log_alpha)]
            for module in ("calibclip._kernels.entropies", "calibclip.dirichlet"):
                monkeypatch.setattr(f"{module}.smallest", lambda t: -math.inf)
        monkeypatch.undo()
        torch.testing.assert_close(founds, wants, rtol=bound, atol=0)


@pytest.mark.parametrize("measure", SMOOTH, **ids)
def test_second_derivatives(measure):
    rng = torch.Generator().manual_seed(2)
    for low, high in ((-3, 1), (0.5, 4), (10, 12)):
        rows = low + (high - low) * torch.rand(2, 3, generator=rng, dtype=F64)
        assert torch.autograd.gradcheck(measure, rows.requires_grad_())
        assert torch.autograd.gradgradcheck(measure, rows)


@pytest.mark.parametrize("measure", SMOOTH, **ids)
def test_transforms_of_torch_func(measure):
    rows = torch.tensor([[2.0, 1.0, 0.5], [9.0, 3.0, 4.0]], dtype=F64, requires_grad=True)
    measure(rows).sum().backward()
    found = torch.func.grad(lambda log_alpha: measure(log_alpha).sum())(rows.detach())
    torch.testing.assert_close(found, rows.grad)


@pytest.mark.parametrize("measure", [*SMOOTH, dissonance, *PUBLISHED], **ids)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_vmap(measure, dtype):
    rows = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 6
    for low in (-2, 1, 20):  # with and without concentrations that need a recurrence
        log_alpha = (rows + low).to(dtype)
        want = measure(log_alpha)
        rtol = 5e-6 if dtype == F32 else 1e-12
        for found in (
            torch.func.vmap(measure)(log_alpha),
            torch.func.vmap(torch.func.vmap(measure))(log_alpha),
            torch.func.vmap(measure, in_dims=1, out_dims=1)(log_alpha),
        ):
            torch.testing.assert_close(found, want, rtol=rtol, atol=0)


@pytest.mark.parametrize("measure", [*SMOOTH, *PUBLISHED], **ids)
def test_gradients_of_each_row_by_vmap(measure):
    rows = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64) * 6
    found = torch.func.vmap(torch.func.grad(measure))(rows)
    measure(rows.requires_grad_()).sum().backward()
    torch.testing.assert_close(found, rows.grad, rtol=1e-10, atol=1e-14)


def test_vmap_of_conflictiveness():
    rows = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 6
    others = rows.flip(-1)
    found = torch.func.vmap(conflictiveness)(rows, others)
    torch.testing.assert_close(found, conflictiveness(rows, others), rtol=5e-6, atol=0)
    found = torch.func.vmap(conflictiveness, in_dims=(0, None))(rows[:, 0], rows[0, 1])
    want = conflictiveness(rows[:, 0], rows[0, 1].expand(3, 5))
    torch.testing.assert_close(found, want, rtol=5e-6, atol=0)


@pytest.mark.parametrize("measure", [*MEASURES, expected_pairwise_kl], **ids)
def test_absent_classes(measure):
    """At -infinity, or as good as: a class without a share. Those that count classes count it."""
    some = torch.tensor([[3.0, 1.0]])
    for absent in (-torch.inf, -1e30):
        rows = torch.cat((some, torch.full((1, 2), absent)), 1).requires_grad_()
        value = measure(rows)
        counted = {vacuity: 2.0, expected_pairwise_kl: 3.0}.get(measure, 1.0)
        if measure is not epistemic_uncertainty:
            torch.testing.assert_close(value, counted * measure(some), rtol=1e-6, atol=0)
        value.backward()
        assert rows.grad.isfinite().all()
        assert not rows.grad[:, 2:].any()


def test_the_measures_of_the_root_are_these():
    assert exported is aleatoric_uncertainty


# The other measures of the density and the evidence


@pytest.mark.parametrize(
    ("alpha", "pairwise", "differential"),
    [
        ((2, 1, 1), 0.5, -0.9584261),
        ((1,) * 10, 0.9, -math.lgamma(10)),
        ((1, 1), 0.5, 0.0),
        ((3,), 0.0, 0.0),
        ((0.5, 0.5), 1.0, math.log(math.pi) - 2 * math.log(2)),  # the arcsine distribution
    ],
)
def test_hand_values_of_the_density(alpha, pairwise, differential):
    for dtype in (F32, F64):
        row = torch.tensor(alpha, dtype=dtype).log()
        assert float(expected_pairwise_kl(row)) == approx(pairwise, rel=1e-6)
        assert float(differential_entropy(row)) == approx(differential, rel=1e-6, abs=1e-6)
    assert differential_entropy(torch.tensor([28.0] + [0] * 9)) == approx(-243, rel=1e-6)
    assert differential_entropy(torch.full((10,), 28.0)) == approx(-135.10411, rel=1e-7)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(-4.6, 30), min_size=2, max_size=8))
def test_bounds_of_the_density(row):
    log_alpha = torch.tensor(row, dtype=F64)
    mutual, pairwise = mutual_information(log_alpha), expected_pairwise_kl(log_alpha)
    assert 0 <= mutual <= pairwise * (1 + 1e-12)
    assert differential_entropy(log_alpha) <= -math.lgamma(len(row)) + 1e-10
    narrow = log_alpha.float()
    for measure in (expected_pairwise_kl, differential_entropy):
        torch.testing.assert_close(measure(narrow.flip(-1)), measure(narrow), rtol=5e-6, atol=2e-6)


def dissonance_by_pairs(alpha):
    """As defined, in a loop over the pairs of classes, in 60 digits."""
    total = mpmath.fsum(alpha)
    belief = [max(a - 1, mpf(0)) / total for a in alpha]
    result = mpf(0)
    for k, own in enumerate(belief):
        others = [b for j, b in enumerate(belief) if j != k]
        if mpmath.fsum(others) > 0:
            balanced = [b * (1 - abs(b - own) / (b + own)) for b in others if b + own > 0]
            result += own * mpmath.fsum(balanced) / mpmath.fsum(others)
    return result


def rows_of_beliefs():
    rng = np.random.default_rng(1)
    for size in (2, 3, 7, 30):
        for low, high in ((0, 0.001), (-2, 2), (0, 5), (0, 80), (17, 18), (79, 80)):
            yield rng.uniform(low, high, size)
    yield [1e-7, 2e-7, 3e-7]
    yield [80.0, 0.0, 1e-6]
    yield [80.0, 40.0, 40.0]
    yield [80.0, 4.0, 5.0]
    yield [0.0, 0.0]
    yield [-3.0, -4.0, 2.0]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_dissonance_against_its_definition(dtype):
    for row in rows_of_beliefs():
        log_alpha = torch.tensor(row, dtype=F32)
        with mpmath.workdps(60):
            want = dissonance_by_pairs([mpmath.exp(mpf(float(x))) for x in log_alpha])
        found = dissonance(log_alpha.to(dtype))
        assert found.dtype == dtype
        assert float(found) == approx(float(want), rel=5e-6 if dtype == F32 else 1e-13, abs=1e-39)


def test_hand_values_of_dissonance():
    # Beliefs (5, 5, 0) / 13: two pairs of full balance.
    assert dissonance(torch.tensor([6.0, 6.0, 1.0]).log()) == approx(10 / 13, rel=1e-6)
    # Beliefs (4, 2, 1) / 10.
    assert dissonance(torch.tensor([5.0, 3.0, 2.0]).log()) == approx(0.413333, rel=1e-5)
    assert dissonance(torch.full((1000,), 28.0)) == approx(1, rel=1e-6)
    for nothing in ([0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [-1.0, -2.0, -3.0], [4.0]):
        assert dissonance(torch.tensor(nothing)) == 0


def test_dissonance_in_chunks(monkeypatch):
    rows = 6 * torch.rand(13, 4, 9, generator=torch.Generator().manual_seed(0))
    whole = dissonance(rows)
    assert whole.shape == (13, 4)
    monkeypatch.setattr("calibclip.uncertainty.evidence._CHUNK", 9 * 5)
    torch.testing.assert_close(dissonance(rows), whole, rtol=1e-6, atol=0)
    assert dissonance(rows[0, 0]) == approx(float(whole[0, 0]), rel=1e-6)
    shuffled = rows[..., torch.randperm(9, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(dissonance(shuffled), whole, rtol=1e-6, atol=0)
    assert dissonance(torch.empty(0, 3)).shape == (0,)
    assert not dissonance(rows.requires_grad_()).requires_grad
    spoilt = rows.detach().clone()
    spoilt[2, 1, 0] = torch.nan
    assert dissonance(spoilt).isnan().sum() == 1


def conflict(log_alpha, log_beta):
    """As defined, in 60 digits."""
    with mpmath.workdps(60):
        alpha, beta = ([mpmath.exp(mpf(float(x))) for x in row] for row in (log_alpha, log_beta))
        totals = mpmath.fsum(alpha), mpmath.fsum(beta)
        distance = mpmath.fsum(
            abs(a / totals[0] - b / totals[1]) for a, b in zip(alpha, beta, strict=True)
        )
        certain = [max(1 - len(alpha) / total, mpf(0)) for total in totals]
        return float(distance / 2 * certain[0] * certain[1])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_conflictiveness_against_its_definition(dtype):
    rng = np.random.default_rng(2)
    for size in (1, 2, 3, 40):
        for low, high in ((0, 1), (1, 5), (12, 20), (0, 80), (79, 80)):
            for change in (0, 1e-4, 0.01, 0.9, 1.1, 9):
                row = rng.uniform(low, high, size)
                moved = np.clip(row + rng.uniform(-change, change, size), 0, 80)
                pair = [torch.tensor(x, dtype=F32) for x in (row, moved)]
                want = conflict(*pair)
                found = conflictiveness(*(x.to(dtype) for x in pair))
                assert found.dtype == dtype
                assert float(found) == approx(want, rel=5e-6 if dtype == F32 else 1e-11), pair
                back = conflictiveness(*(x.to(dtype) for x in reversed(pair)))
                assert float(back) == approx(want, rel=5e-6 if dtype == F32 else 1e-11)


def test_conflictiveness_of_a_few_opinions():
    one = torch.tensor([8.0, 1.0, 1.0], requires_grad=True)
    found = conflictiveness(one.log(), torch.tensor([1.0, 8.0, 1.0]).log())
    assert float(found.detach()) == approx(0.343, rel=1e-6)
    found.backward()
    assert one.grad.isfinite().all()
    # Evidence in common is no conflict; opinions without evidence are in none.
    row = torch.tensor([17.25, 16.5, 12.0, 3.0])
    assert conflictiveness(row, row + 0.25) == 0
    assert conflictiveness(torch.zeros(3), torch.tensor([8.0, 0.0, 0.0])) == 0
    assert conflictiveness(torch.tensor([-2.0, -1.0, -3.0]), torch.tensor([8.0, 0, 0])) == 0
    certain = conflictiveness(torch.tensor([80.0, 0.0]), torch.tensor([0.0, 80.0]))
    assert certain == 1
    rows = 5 * torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert conflictiveness(rows, rows.flip(-1)).shape == (2, 3)
    assert conflictiveness(rows.half(), rows.half().flip(-1)).dtype == F32
    assert conflictiveness(rows, rows.double()).dtype == F64


# The published evaluation


def published(logits):
    """AU, EU and PU of the published code: alpha, digamma and logarithms as it has them."""
    with mpmath.workdps(60):
        size = len(logits)
        logits = [mpf(float(z)) for z in logits]
        alpha = [mpf(1e-6) + mpmath.exp(mpmath.log(1 + mpmath.exp(z))) for z in logits]
        total = mpmath.fsum(alpha)
        psi = mpmath.digamma
        aleatoric = mpmath.fsum(a / total * (psi(total + 1) - psi(a + 1)) for a in alpha)
        top = max(alpha)
        evidence = top + 1 + mpmath.log(mpmath.fsum(mpmath.exp(a - top) for a in alpha))
        scores = [mpmath.exp(z) for z in logits]
        probs = [s / mpmath.fsum(scores) for s in scores]
        entropy = -mpmath.fsum(p * mpmath.log(p + mpf(1e-12)) for p in probs)
        return [float(x / mpmath.log(size)) for x in (aleatoric, size / evidence, entropy)]


def test_published_formulas_against_mpmath():
    rng = np.random.default_rng(3)
    for size in (2, 10, 200):
        for scale in (0.1, 3, 20):
            logits = torch.from_numpy(scale * rng.normal(1, 1, size)).float()
            want = published(logits)
            for dtype, bound in ((F32, 5e-6), (F64, 1e-12)):
                found = [float(measure(logits.to(dtype))) for measure in PUBLISHED]
                assert found == approx(want, rel=bound, abs=bound * 1e-11)


def test_published_concentrations():
    logits = torch.tensor([-90.0, -20.0, 0.0, 1.0, 30.0, 100.0])
    want = [math.log(1e-6 + 1 + math.exp(z)) for z in logits.tolist()]
    np.testing.assert_allclose(published_log_concentration(logits), want, rtol=2e-7)
    assert published_log_concentration(logits.half()).dtype == F32


def test_published_values_and_the_papers():
    cosines = torch.tensor([[0.27, 0.22, 0.2, 0.15]])
    log_alpha = published_log_concentration(100 * cosines)
    found = published_aleatoric_uncertainty(100 * cosines)
    assert torch.equal(found, aleatoric_uncertainty(log_alpha, normalize=True))
    # On the concentrations it is evaluated on, AU is the softmax's entropy.
    torch.testing.assert_close(
        found, published_predictive_entropy(100 * cosines), rtol=1e-5, atol=0
    )
    assert aleatoric_uncertainty(log_concentration(cosines), normalize=True) > 2 * found
    # Nor is EU the paper's: the largest concentration in place of their sum.
    even = torch.full((1, 8), 20.0)
    ratio = published_epistemic_uncertainty(even) * math.log(8) / epistemic_uncertainty(even)
    assert float(ratio) == approx(8, rel=1e-4)
    assert published_predictive_entropy(torch.tensor([99.0, 0.0])) < 0
    assert published_epistemic_uncertainty(torch.tensor([99.0, 0.0])) == 0


@pytest.mark.parametrize("measure", PUBLISHED, **ids)
def test_published_measures_differentiate(measure):
    logits = torch.tensor([[3.0, 1.0, 0.5], [0.2, 0.1, 0.9]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(measure, logits)
    assert measure(logits.detach().bfloat16()).dtype == F32
    assert measure(torch.empty(0, 3)).shape == (0,)


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_upcast_first(dtype, autocast):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(0.2, 0.06, (64, 20))).to(dtype)
    functions = (*SMOOTH, dissonance, *PUBLISHED)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [function(rows) for function in functions]
    for function, value in zip(functions, found, strict=True):
        assert value.dtype == F32
        assert torch.equal(value, function(rows.float()))
    rows.requires_grad_()
    aleatoric_uncertainty(rows).sum().backward()
    assert rows.grad.dtype == dtype


# Errors


@pytest.mark.parametrize("measure", [*MEASURES, expected_pairwise_kl], **ids)
def test_bad_arguments_of_the_measures(measure):
    with pytest.raises(
        TypeError, match=r"^log_alpha: .* got int64 tensor .*; call log_alpha.float\(\)$"
    ):
        measure(torch.ones(3).long())
    with pytest.raises(TypeError, match=r"^log_alpha: .* got list \[1\.0\]$"):
        measure([1.0])
    with pytest.raises(ValueError, match=r"^log_alpha: .* got float32 tensor of shape \(\)$"):
        measure(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^log_alpha: .* the last size >= 1, got .* \(2, 0\)$"):
        measure(torch.ones(2, 0))
    with pytest.raises(ValueError, match=r"^log_alpha: expected at least two classes, .* \(3, 1\)"):
        measure(torch.ones(3, 1), normalize=True)


@pytest.mark.parametrize("measure", [differential_entropy, dissonance, conflictiveness], **ids)
def test_bad_arguments_of_measures_without_options(measure):
    others = [torch.ones(3)] if measure is conflictiveness else []
    with pytest.raises(TypeError, match=r"^log_alpha: .* got int64 tensor .*log_alpha.float\(\)$"):
        measure(torch.ones(3).long(), *others)
    with pytest.raises(ValueError, match=r"^log_alpha: .* the last size >= 1, got .* \(2, 0\)$"):
        measure(torch.ones(2, 0), *others)


@pytest.mark.parametrize(
    "measure",
    [*SMOOTH, dissonance, conflictiveness, *PUBLISHED, published_log_concentration],
    **ids,
)
def test_errors_are_documented(measure):
    """The docstring's line of an error names what is at fault."""
    text = inspect.getdoc(measure)
    raises = text[text.index("Raises:\n") : text.index("Example:\n")]
    lines = {line.split(":")[0].strip(): line for line in raises.splitlines()[1:]}
    others = [torch.ones(3)] if measure is conflictiveness else []
    faults = [
        (torch.ones(3).long(), {}, "floating-point tensor"),
        (torch.tensor(1.0), {}, "no dimension"),
        (torch.ones(3, 0), {}, "fewer than two" if measure in PUBLISHED else "no class"),
    ]
    if measure in (*MEASURES, expected_pairwise_kl):
        faults += [
            (torch.ones(3), {"normalize": 1}, "``normalize`` no bool"),
            (torch.ones(3, 1), {"normalize": True}, "with ``normalize`` only one"),
        ]
    for given_, options, said in faults:
        with pytest.raises((TypeError, ValueError), match=": expected") as caught:
            measure(given_, *others, **options)
        assert said in lines[caught.type.__name__]


def test_bad_arguments_of_conflictiveness():
    with pytest.raises(TypeError, match=r"^log_beta: .* got int64 tensor"):
        conflictiveness(torch.ones(3), torch.ones(3).long())
    with pytest.raises(ValueError, match=r"^log_beta: .* shape of log_alpha, \(3,\), got \(4,\)$"):
        conflictiveness(torch.ones(3), torch.ones(4))


@pytest.mark.parametrize("measure", [*MEASURES, expected_pairwise_kl], **ids)
def test_normalize_is_a_flag(measure):
    with pytest.raises(TypeError, match=r"^normalize: expected True or False, got str 'no'$"):
        measure(torch.ones(3), normalize="no")


@pytest.mark.parametrize("measure", PUBLISHED, **ids)
def test_bad_arguments_of_published_measures(measure):
    with pytest.raises(TypeError, match=r"^logits: .* got int64 tensor"):
        measure(torch.ones(3).long())
    with pytest.raises(ValueError, match=r"^logits: expected at least two classes, .* \(3, 1\)$"):
        measure(torch.ones(3, 1))
