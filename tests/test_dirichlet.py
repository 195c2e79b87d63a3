import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibclip
from calibclip import (
    DirichletHead,
    aleatoric_uncertainty,
    cosine_similarity,
    epistemic_uncertainty,
    log_concentration,
    mutual_information,
    predictive_entropy,
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


# The head


def cosines(n_rows=6, n_classes=9, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0.2, 0.06, (n_rows, n_classes))).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_log_concentration_is_the_affine_map(dtype, temperature):
    rows = cosines(dtype=dtype)
    log_alpha = log_concentration(rows, temperature)
    want = [[(float(c) + 1) / temperature for c in row] for row in rows]
    assert log_alpha.dtype == dtype
    np.testing.assert_allclose(log_alpha, want, rtol=3e-7 if dtype == F32 else 1e-15)
    scaled = log_concentration(30 * rows, temperature, logit_scale=30.0)
    np.testing.assert_allclose(scaled, want, rtol=3e-7 if dtype == F32 else 1e-15)


def test_default_temperature_is_the_papers():
    assert torch.equal(log_concentration(cosines()), log_concentration(cosines(), 0.07))
    assert log_concentration(torch.tensor([-1.0])).abs() < 1e-6
    assert torch.equal(DirichletHead()(cosines()), log_concentration(cosines()))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=8),
    st.floats(0.005, 10),
    st.sampled_from([1.0, 14.3, 100.0]),
)
def test_argmax_is_kept(row, temperature, logit_scale):
    logits = torch.tensor(row) * logit_scale
    log_alpha = log_concentration(logits, temperature, logit_scale=logit_scale)
    # Rounding may merge two neighbours into a tie, never swap them.
    assert log_alpha[logits.argmax()] == log_alpha.max()
    order = logits.sort().indices
    assert (log_alpha[order].diff() >= 0).all()
    if temperature <= 1 and logits.max() - logits.sort().values[-2] > 1e-5 * logit_scale:
        assert log_alpha.argmax() == logits.argmax()


@pytest.mark.parametrize("logit_scale", [14.3, 50.0, 100.0])
def test_inverse_scale_as_temperature_is_clips_softmax(logit_scale):
    logits = logit_scale * cosines()
    log_alpha = log_concentration(logits, 1 / logit_scale, logit_scale=logit_scale)
    # log_alpha is near 120, where float32 resolves 8e-6.
    torch.testing.assert_close(log_alpha.softmax(-1), logits.softmax(-1), rtol=2e-5, atol=1e-6)
    wide = logits.double()
    exact = log_concentration(wide, 1 / logit_scale, logit_scale=logit_scale)
    torch.testing.assert_close(exact.softmax(-1), wide.softmax(-1), rtol=1e-12, atol=0)
    mean = torch.exp(log_alpha.double() - log_alpha.double().logsumexp(-1, keepdim=True))
    torch.testing.assert_close(mean.float(), logits.softmax(-1), rtol=2e-5, atol=1e-6)


def test_head_takes_cosines_logits_or_features():
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(5, 16, generator=rng), 3 * torch.randn(7, 16, generator=rng)
    rows = torch.tensor(
        [[float(i @ t) / math.sqrt(float(i @ i) * float(t @ t)) for t in text] for i in image]
    )
    torch.testing.assert_close(cosine_similarity(image, text), rows)
    want = (rows + 1) / 0.05
    head = DirichletHead(0.05)
    torch.testing.assert_close(head(rows), want)
    torch.testing.assert_close(head.from_features(image, text), want)
    scaled = DirichletHead(0.05, logit_scale=100.0)
    torch.testing.assert_close(scaled(100 * rows), want)
    torch.testing.assert_close(scaled.from_features(image, text), want)
    assert repr(scaled) == "DirichletHead(temperature=0.05, logit_scale=100)"
    assert not list(head.parameters())
    assert not head.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_upcast_before_the_affine_map(dtype, autocast):
    rows = cosines(64, 20).to(dtype)
    image, text = torch.randn(4, 8).to(dtype), torch.randn(5, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_alpha = log_concentration(rows)
        similarity = cosine_similarity(image, text)
        measures = all_measures(rows)
    assert log_alpha.dtype == similarity.dtype == F32
    assert torch.equal(log_alpha, log_concentration(rows.float()))
    assert torch.equal(similarity, cosine_similarity(image.float(), text.float()))
    for name, value in measures.items():
        assert torch.equal(value, getattr(calibclip, name)(rows.float()))


def test_cosine_similarity_ignores_autocast():
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 32, generator=rng), torch.randn(9, 32, generator=rng)
    want = cosine_similarity(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image @ text.T).dtype == torch.bfloat16
        found = cosine_similarity(image, text)
        log_alpha = DirichletHead().from_features(image, text)
    assert torch.equal(found, want)
    assert torch.equal(log_alpha, log_concentration(want))
    assert cosine_similarity(image.double(), text).dtype == F64
    assert cosine_similarity(image[:0], text).shape == (0, 9)


def test_gradients_of_the_head():
    rng = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(size, 5, generator=rng, dtype=F64).requires_grad_() for size in (3, 4)
    )
    head = DirichletHead(0.5)
    assert torch.autograd.gradcheck(head.from_features, (image, text))
    half = torch.randn(2, 3, generator=rng).half().requires_grad_()
    log_concentration(half).sum().backward()
    assert half.grad.dtype == torch.float16
    assert torch.allclose(half.grad.float(), torch.tensor(1 / 0.07), rtol=1e-3)


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


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.__name__)
def test_normalize_divides_by_the_log_of_the_classes(measure):
    log_alpha = 3 * torch.rand(4, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(measure(log_alpha, normalize=True), measure(log_alpha) / math.log(7))
    assert predictive_entropy(torch.full((7,), 5.0), normalize=True) == approx(1, rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.__name__)
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


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("low", [0.0, 1.2, 3.2, 8.0])
def test_gradcheck(measure, low):
    rng = torch.Generator().manual_seed(1)
    log_alpha = low + torch.rand(3, 4, generator=rng, dtype=F64)
    assert torch.autograd.gradcheck(measure, log_alpha.requires_grad_())


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.__name__)
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


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: log_concentration([0.1]),
            TypeError,
            r"^cosine: expected a floating.*list \[0\.1\]",
        ),
        (
            lambda: log_concentration(torch.ones(3).int()),
            TypeError,
            r"got int32 tensor of shape \(3",
        ),
        (lambda: log_concentration(torch.tensor(0.2)), ValueError, r"\(\.\.\., C\), got float32"),
        (lambda: log_concentration(torch.ones(2), 0), ValueError, r"^temperature: .* > 0, got 0$"),
        (
            lambda: log_concentration(torch.ones(2), -0.07),
            ValueError,
            r"^temperature: .*got -0\.07$",
        ),
        (
            lambda: log_concentration(torch.ones(2), math.nan),
            ValueError,
            r"^temperature: .*got nan$",
        ),
        (
            lambda: log_concentration(torch.ones(2), math.inf),
            ValueError,
            r"^temperature: .*got inf$",
        ),
        (
            lambda: log_concentration(torch.ones(2), "warm"),
            TypeError,
            r"^temperature: .*str 'warm'$",
        ),
        (lambda: log_concentration(torch.ones(2), True), TypeError, r"^temperature: .*bool True$"),
        (
            lambda: log_concentration(torch.ones(2), logit_scale=torch.tensor(100.0)),
            TypeError,
            r"^logit_scale: .* > 0, got float32 tensor of shape \(\); pass float\(logit_scale\)$",
        ),
        (lambda: DirichletHead(0.0), ValueError, r"^temperature: expected a number > 0, got 0\.0$"),
        (lambda: DirichletHead(logit_scale=-1), ValueError, r"^logit_scale: .* > 0, got -1$"),
        (
            lambda: cosine_similarity(torch.ones(3), torch.ones(2, 3)),
            ValueError,
            r"^image_features: .* shape \(B, D\), got float32 tensor of shape \(3,\)$",
        ),
        (
            lambda: cosine_similarity(torch.ones(1, 3), torch.ones(3)),
            ValueError,
            r"^text_features: .* shape \(C, D\), got float32 tensor of shape \(3,\)$",
        ),
        (
            lambda: cosine_similarity(torch.ones(1, 3), torch.ones(2, 4)),
            ValueError,
            r"^image_features: expected features of size 4, as text_features, got .*\(1, 3\)$",
        ),
        (
            lambda: cosine_similarity(torch.ones(1, 3).long(), torch.ones(2, 3)),
            TypeError,
            r"^image_features: .* got int64 tensor",
        ),
    ],
)
def test_bad_arguments_of_the_head(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.__name__)
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


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_cosines_do_not_follow_a_lowered_matmul_precision(precision):
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 512, generator=generator) for n in (32, 64))
    want = cosine_similarity(image.double(), text.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got = cosine_similarity(image, text)
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-7)


def test_cosines_of_features_on_two_devices():
    with pytest.raises(ValueError, match=r"^text_features: .* cpu, got meta; move one of the two$"):
        cosine_similarity(torch.ones(2, 3), torch.ones(4, 3, device="meta"))


@pytest.mark.parametrize("measure", [predictive_entropy, aleatoric_uncertainty])
def test_gradient_of_a_confident_row(measure):
    """The largest class's own entropy gradient is 1e-12 of the terms that cancel around it."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        log_alpha = torch.tensor([30.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        measure(log_alpha).backward()
        grads.append(log_alpha.grad.double())
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()
