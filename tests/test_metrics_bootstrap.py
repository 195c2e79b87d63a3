"""Bootstrap intervals against SciPy's, against plain loops and by simulation."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from calibclip.metrics import MetricWarning
from calibclip.metrics.bootstrap import (
    Interval,
    bootstrap_interval,
    calibration_error_interval,
    check_options,
    interval,
)

METHODS = ("percentile", "basic", "bca")
RNG = np.random.default_rng(0)
CLEAN = RNG.exponential(size=37)
ADV = CLEAN + RNG.normal(size=37)


def ratio(clean, adv):
    return adv.mean() / clean.mean()


def loop_error(confidence, correct, n_bins, closed="right"):
    """ECE from its definition, bin by bin."""
    error = 0.0
    for b in range(n_bins):
        low, high = (confidence.dtype.type(k / n_bins) for k in (b, b + 1))
        if closed == "right":
            member = ((confidence > low) | (b == 0)) & ((confidence <= high) | (b == n_bins - 1))
        else:
            member = ((confidence >= low) | (b == 0)) & ((confidence < high) | (b == n_bins - 1))
        if member.any():
            gap = confidence[member].astype(np.float64).sum() - correct[member].sum()
            error += abs(gap) / len(confidence)
    return error


# Any statistic


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_agrees_with_scipy(method, level):
    expected = scipy.stats.bootstrap(
        (CLEAN, ADV),
        lambda clean, adv, axis: adv.mean(axis) / clean.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=501,
        confidence_level=level,
        method={"bca": "BCa"}.get(method, method),
        rng=np.random.default_rng(3),
    ).confidence_interval
    options = {"n_resamples": 501, "level": level, "method": method, "seed": 3}
    for arrays in ((CLEAN, ADV), (torch.tensor(CLEAN), torch.tensor(ADV))):
        found = bootstrap_interval(ratio, *arrays, **options)
        assert found.estimate == pytest.approx(ratio(CLEAN, ADV))
        assert (found.lower, found.upper) == pytest.approx(tuple(expected), rel=1e-12)
        assert found.level == level
    blocks = bootstrap_interval(
        lambda clean, adv: adv.mean(1) / clean.mean(1), CLEAN, ADV, vectorized=True, **options
    )
    assert tuple(blocks) == pytest.approx(tuple(found), rel=1e-12)


def test_vectorized_goes_in_blocks_of_any_size(monkeypatch):
    whole = bootstrap_interval(lambda x: x.mean(1), CLEAN, vectorized=True, n_resamples=50)
    monkeypatch.setattr("calibclip.metrics.bootstrap._BLOCK", 3 * len(CLEAN) + 1)
    sizes = []

    def mean(x):
        sizes.append(len(x))
        return x.mean(1)

    assert bootstrap_interval(mean, CLEAN, vectorized=True, n_resamples=50) == whole
    assert sizes == [1, *[3] * 16, 2]


def test_arrays_are_resampled_together():
    found = bootstrap_interval(lambda a, b: (b - a).mean(), CLEAN, CLEAN + 0.25)
    assert (found.lower, found.upper) == pytest.approx((0.25, 0.25), abs=1e-14)
    alone = bootstrap_interval(np.mean, CLEAN + 0.25)
    assert alone.upper - alone.lower > 0.1


def test_arrays_of_any_shape_and_kind():
    matrix, flags = torch.arange(12.0).view(6, 2).bfloat16(), np.arange(6) % 2 == 0

    def statistic(scores, correct):
        assert scores.dtype == torch.bfloat16
        assert scores.shape == (6, 2)
        assert correct.dtype == bool
        return scores[:, 0].float().mean() + correct.mean()

    found = bootstrap_interval(statistic, matrix.requires_grad_(), flags, n_resamples=5)
    assert found.estimate == 5.5


def test_seed_and_global_generators():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = bootstrap_interval(np.mean, CLEAN)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert bootstrap_interval(np.mean, CLEAN) == first
    assert bootstrap_interval(np.mean, CLEAN, seed=1) != first
    # The same rows, whatever else the arrays hold.
    assert bootstrap_interval(np.mean, 2 * CLEAN).lower == pytest.approx(2 * first.lower)


@pytest.mark.parametrize("method", METHODS)
def test_edges(method):
    nothing = bootstrap_interval(np.mean, np.zeros(0), method=method)
    assert np.isnan(nothing[:3]).all()
    assert bootstrap_interval(np.mean, np.array([2.0]), method=method)[:3] == (2.0, 2.0, 2.0)
    assert bootstrap_interval(np.mean, np.full(9, 2.0), method=method)[:3] == (2.0, 2.0, 2.0)
    undefined = bootstrap_interval(lambda x: math.nan, CLEAN, method=method)
    assert np.isnan(undefined[:3]).all()
    huge = bootstrap_interval(np.mean, 1e30 * CLEAN, method=method)
    usual = bootstrap_interval(np.mean, CLEAN, method=method)
    assert huge[:3] == pytest.approx([1e30 * x for x in usual[:3]], rel=1e-9)
    # The maximum of a resample is never above that of the sample.
    top = bootstrap_interval(np.max, CLEAN, method=method)
    assert all(math.isfinite(end) for end in top)


def test_resamples_without_a_value_are_left_out():
    def mean_of_positive(x):
        return x[x > 0].mean() if (x > 0).any() else math.nan

    x = np.array([-1.0, -1.0, 1.0, 3.0])
    with pytest.warns(MetricWarning, match=r"^\d+ of 200 resamples were NaN and left out"):
        found = bootstrap_interval(mean_of_positive, x, n_resamples=200)
    assert found[:3] == (2.0, 1.0, 3.0)
    calls = []

    def only_once(x):
        calls.append(x)
        return 1.0 if len(calls) == 1 else math.nan

    with pytest.warns(MetricWarning, match="20 of 20 resamples"):
        found = bootstrap_interval(only_once, x, n_resamples=20)
    assert found.estimate == 1.0
    assert math.isnan(found.lower)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_infinite_resamples(method, sign):
    def infinite_of_some(x):
        return sign * math.inf if (x == 3).sum() > 1 else float(x.sum())

    x = np.array([0.0, 1.0, 2.0, 3.0])
    found = bootstrap_interval(infinite_of_some, x, n_resamples=200, method=method)
    assert found.estimate == 6.0
    infinite, finite = (found.lower, found.upper)[:: -1 if (sign > 0) != (method == "basic") else 1]
    assert abs(infinite) == math.inf
    assert math.isfinite(finite)
    # Of infinities alone both ends are.
    options, infinities = check_options(99, 0.9, method, 0), np.full(99, sign * math.inf)
    found = interval(1.0, infinities, options, lambda: infinities)
    assert {abs(end) for end in (found.lower, found.upper)} == {math.inf}


@pytest.mark.parametrize(
    ("replicates", "level", "ends"),
    [
        ([1, 2, 3, math.inf, math.inf], 0.5, (2, math.inf)),
        ([-math.inf, 1, 2, 3, 4], 0.5, (1, 3)),
        ([-math.inf, 1, 2, 3, math.inf], 0.6, (-math.inf, math.inf)),
        ([1, 2, 3, math.inf, math.inf], 0.25, (2.5, math.inf)),
        ([-math.inf] * 3 + [math.inf] * 3, 0.1, (-math.inf, math.inf)),
        ([math.inf] * 5, 0.9, (math.inf, math.inf)),
        ([1, 2, 3, 4, 5], 0.6, (1.8, 4.2)),
    ],
)
def test_ends_next_to_infinity(replicates, level, ends):
    options = check_options(5, level, "percentile", 0)
    found = interval(2.0, np.array(replicates, dtype=float), options, lambda: np.empty(0))
    assert (found.lower, found.upper) == pytest.approx(ends, rel=1e-12)


def test_an_infinite_estimate():
    x = np.array([1.0, 2.0, math.inf])
    for method in ("percentile", "bca"):
        found = bootstrap_interval(np.mean, x, method=method)
        assert (found.estimate, found.upper) == (math.inf, math.inf)
        assert not math.isnan(found.lower)
    with pytest.warns(MetricWarning, match="^the estimate is infinite: it has no basic interval"):
        found = bootstrap_interval(np.mean, x, method="basic")
    assert found.estimate == math.inf
    assert math.isnan(found.lower)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_coverage_of_a_mean(method):
    rng, hits = np.random.default_rng(7), 0
    for seed in range(400):
        found = bootstrap_interval(
            lambda x: x.mean(1),
            rng.normal(1.0, size=100),
            n_resamples=400,
            level=0.9,
            method=method,
            vectorized=True,
            seed=seed,
        )
        hits += found.lower <= 1.0 <= found.upper
    # Three standard errors of the share are 0.045.
    assert hits / 400 == pytest.approx(0.9, abs=0.045)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ValueError, "arrays: expected at least one array, got none"),
        (([1.0],), {}, TypeError, "arrays: expected tensors or NumPy arrays, got list"),
        ((CLEAN, CLEAN[1:]), {}, ValueError, r"arrays: expected shape \(37, ...\), got float64"),
        ((np.array(1.0),), {}, ValueError, r"arrays: expected shape \(N, ...\), got float64"),
        ((CLEAN,), {"level": 1}, ValueError, "level: expected a number between 0 and 1, got 1"),
        ((CLEAN,), {"level": 0}, ValueError, "level: expected a number > 0, got 0"),
        ((CLEAN,), {"method": "normal"}, ValueError, "method: expected one of 'percentile'"),
        ((CLEAN,), {"n_resamples": 0}, ValueError, "n_resamples: expected an integer >= 1"),
        ((CLEAN,), {"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
        ((CLEAN,), {"vectorized": 1}, TypeError, "vectorized: expected True or False"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        bootstrap_interval(np.mean, *arguments, **options)


def test_refuses_a_statistic_of_another_shape():
    with pytest.raises(ValueError, match=r"^statistic: expected one number, got shape \(37,\)"):
        bootstrap_interval(lambda x: x, CLEAN)
    # The estimate is of one row, where it goes unnoticed that the wrong dimension is left.
    with pytest.raises(ValueError, match=r"^statistic: expected 1000 numbers, one a resample"):
        bootstrap_interval(lambda x: x.mean(), CLEAN, vectorized=True)


def test_interval_prints():
    assert str(Interval(0.12345, 0.1, 0.2, 0.95)) == "0.1235 [0.1000, 0.2000]"


# Calibration error


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("closed", ["right", "left"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calibration_error_against_a_loop(method, closed, dtype):
    rng = np.random.default_rng(4)
    # Many confidences on an edge.
    confidence = rng.choice(np.concatenate([np.arange(8) / 7, rng.random(9)]), size=40)
    confidence, correct = confidence.astype(dtype), rng.random(40) < 0.6
    found = calibration_error_interval(
        confidence, correct, 7, closed=closed, method=method, n_resamples=80, seed=2
    )
    expected = bootstrap_interval(
        lambda c, a: loop_error(c, a, 7, closed),
        confidence,
        correct,
        method=method,
        n_resamples=80,
        seed=2,
    )
    # Rounding may decide how many resamples equal the estimate.
    assert tuple(found) == pytest.approx(tuple(expected), abs=1e-12 if method != "bca" else 1e-3)


def test_calibration_error_takes_tensors():
    confidence = torch.rand(50, generator=torch.Generator().manual_seed(0))
    correct = torch.arange(50) % 3 == 0
    whole = calibration_error_interval(confidence, correct)
    assert calibration_error_interval(confidence.numpy(), correct.numpy().astype(float)) == whole
    assert calibration_error_interval(confidence.requires_grad_(), correct.long()) == whole
    half = calibration_error_interval(confidence.bfloat16(), correct)
    assert half == calibration_error_interval(confidence.bfloat16().float(), correct)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = calibration_error_interval(confidence[order], correct[order])
    assert shuffled.estimate == pytest.approx(whole.estimate, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_error_at_the_edges(method):
    nothing = calibration_error_interval(torch.zeros(0), torch.zeros(0).bool(), method=method)
    assert np.isnan(nothing[:3]).all()
    for n in (1, 9):
        for c, a, error in ((1.0, 1, 0), (1.0, 0, 1), (0.0, 1, 1), (0.0, 0, 0)):
            found = calibration_error_interval(np.full(n, c), np.full(n, a), method=method)
            assert found[:3] == (error, error, error)


def test_policy_for_nan():
    confidence, correct = torch.tensor([0.5, math.nan, 0.75]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"^confidence: expected finite values, got 1 of 3 rows"):
        calibration_error_interval(confidence, correct)
    with pytest.warns(MetricWarning, match="calibration_error_interval: 1 rows with NaN"):
        found = calibration_error_interval(confidence, correct, nan="omit")
    assert found == calibration_error_interval(confidence[[0, 2]], correct[[0, 2]])
    assert math.isnan(calibration_error_interval(confidence, correct, nan="propagate").estimate)


@pytest.mark.parametrize(
    ("confidence", "correct", "options", "error", "message"),
    [
        ([0.5], [1], {}, TypeError, "confidence: expected a floating-point tensor"),
        (torch.tensor([1]), torch.tensor([1]), {}, TypeError, "confidence: expected a floating"),
        (torch.ones(2, 2), torch.ones(2), {}, ValueError, "confidence: expected a floating"),
        (
            torch.tensor([1.5]),
            torch.tensor([1]),
            {},
            ValueError,
            r"confidence: expected conf.* 1 o",
        ),
        (torch.tensor([-0.5]), torch.tensor([1]), {}, ValueError, "confidence: expected confidenc"),
        (torch.ones(1), torch.tensor([2]), {}, ValueError, "correct: expected bool, or 0 and 1"),
        (torch.ones(1), torch.ones(2), {}, ValueError, "correct: expected bool"),
        (torch.ones(1), torch.ones(1), {"n_bins": 0}, ValueError, "n_bins: expected an integer"),
        (torch.ones(1), torch.ones(1), {"closed": "up"}, ValueError, "closed: expected one of"),
        (torch.ones(1), torch.ones(1), {"nan": "keep"}, ValueError, "nan: expected one of"),
        (torch.ones(1), torch.ones(1), {"level": 2}, ValueError, "level: expected a number betw"),
    ],
)
def test_calibration_error_refuses(confidence, correct, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        calibration_error_interval(confidence, correct, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_above_one_by_rounding_is_one(dtype):
    correct = torch.tensor([1, 0, 1])
    above, ones = torch.full((3,), 1 + 5e-5, dtype=dtype), torch.ones(3, dtype=dtype)
    found = calibration_error_interval(above, correct)
    assert found == calibration_error_interval(ones, correct)
    with pytest.raises(
        ValueError, match=r"^confidence: expected confidences in .* got 3 of 3 rows"
    ):
        calibration_error_interval(ones + 2e-4, correct)


@pytest.mark.parametrize(("level", "size", "wrong"), [(0.83, 30, 10), (0.83, 30, 6), (0.7, 50, 16)])
def test_bca_counts_ties_that_differ_by_rounding(level, size, wrong):
    confidence = torch.full((size,), level, dtype=torch.float64)
    correct = torch.arange(size) >= wrong

    def rounded_ece(confidence, correct):
        return round(abs(float(confidence.mean()) - float(correct.double().mean())), 12)

    found = calibration_error_interval(confidence, correct, method="bca")
    expected = bootstrap_interval(rounded_ece, confidence, correct, method="bca")
    assert found == pytest.approx(expected, abs=1e-9)
