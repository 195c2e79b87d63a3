"""Confidence and calibration under attack, against plain loops and any-statistic bootstraps."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import MetricWarning, expected_calibration_error
from calibclip.metrics._predictions import Faults
from calibclip.metrics.bootstrap import (
    bootstrap_interval,
    calibration_error_interval,
    sums_without_one,
)
from calibclip.metrics.calibration_shift import (
    OverconfidenceOnErrors,
    calibration_shift,
    overconfidence_on_errors,
)

# Confidence of errors


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 20),
    dtype=st.sampled_from([np.float32, np.float64]),
    thresholds=st.sampled_from([(0.5, 0.9), (0.1,), (), (0.0, 1.0)]),
)
def test_overconfidence_against_a_loop(seed, n, dtype, thresholds):
    rng = np.random.default_rng(seed)
    confidence = (rng.integers(11, size=n) / 10).astype(dtype)
    correct = rng.random(n) < 0.5
    found = overconfidence_on_errors(confidence, correct, thresholds)
    errors = [c for c, a in zip(confidence, correct, strict=True) if not a]
    assert (found.count, found.n_errors) == (n, len(errors))
    mean = sum(map(float, errors)) / len(errors) if errors else math.nan
    assert found.mean_confidence == pytest.approx(mean, nan_ok=True)
    assert tuple(found.rate) == tuple(found.rate_among_errors) == thresholds
    for threshold in thresholds:
        high = sum(c > dtype(threshold) for c in errors)
        expected = high / n if n else math.nan, high / len(errors) if errors else math.nan
        rates = found.rate[threshold], found.rate_among_errors[threshold]
        assert rates == pytest.approx(expected, nan_ok=True)


def test_overconfidence_in_a_stream():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(60), rng.random(60) < 0.4
    whole = overconfidence_on_errors(confidence, correct, [0.25, 0.75])
    first, second = OverconfidenceOnErrors((0.25, 0.75)), OverconfidenceOnErrors([0.25, 0.75])
    first.update(confidence[:1], correct[:1]).update(confidence[1:1], correct[1:1])
    second.update(torch.tensor(confidence[1:]), torch.tensor(correct[1:]))
    found = first.merge(second).compute()
    assert (found.rate, found.rate_among_errors) == (whole.rate, whole.rate_among_errors)
    assert found.mean_confidence == pytest.approx(whole.mean_confidence)
    assert repr(first) == "OverconfidenceOnErrors(thresholds=(0.25, 0.75), nan='raise')"


def test_overconfidence_policy_for_nan():
    confidence, correct = torch.tensor([math.nan, 0.75, 0.95]), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"^confidence: expected finite values, got 1 of 3 rows"):
        overconfidence_on_errors(confidence, correct)
    with pytest.warns(MetricWarning, match="OverconfidenceOnErrors: 1 rows"):
        found = overconfidence_on_errors(confidence, correct, nan="omit")
    assert (found.count, found.n_errors, found.mean_confidence) == (2, 1, 0.75)
    assert found.rate == {0.5: 0.5, 0.9: 0.0}
    assert math.isnan(overconfidence_on_errors(confidence, correct, nan="propagate").rate[0.5])


def test_an_accelerator_is_not_waited_for():
    # A look at a tensor without values raises.
    nothing, errors = torch.ones(3, device="meta"), OverconfidenceOnErrors()
    assert errors.update(nothing, nothing.bool()) is errors


def test_overconfidence_that_an_accelerator_reports_late():
    metric = OverconfidenceOnErrors()
    metric.count_faults(Faults.none()._replace(improper=torch.tensor(2)))
    with pytest.raises(
        ValueError, match=r"^confidence: expected confidences in \[0, 1\], got 2 that"
    ):
        metric.compute()


def test_overconfidence_of_a_confidence_above_one_by_rounding():
    confidence = torch.tensor([1 + 5e-5, 1 + 5e-5, 0.5])
    found = overconfidence_on_errors(confidence, torch.tensor([0, 1, 1]), (0.9, 1.0))
    assert found.mean_confidence == 1.0
    assert found.rate == {0.9: pytest.approx(1 / 3), 1.0: 0.0}


@pytest.mark.parametrize(
    ("thresholds", "error"), [((1.5,), ValueError), (0.5, TypeError), ("0.5", TypeError)]
)
def test_overconfidence_refuses_thresholds(thresholds, error):
    with pytest.raises(error, match=r"^thresholds: expected a (number|sequence)"):
        overconfidence_on_errors(torch.ones(1), torch.ones(1), thresholds)


# Calibration


def predictions(seed, n, n_classes=4):
    rng = np.random.default_rng(seed)
    clean = 2 * rng.normal(size=(n, n_classes))
    adv = clean + rng.normal(size=(n, n_classes))
    target = np.where(rng.random(n) < 0.5, clean.argmax(1), rng.integers(n_classes, size=n))
    return clean, adv, target


def sides(clean, adv, target):
    probs = [torch.tensor(z).softmax(1) for z in (clean, adv)]
    confidence = [p.amax(1) for p in probs]
    return *confidence, *(p.argmax(1) == torch.tensor(target) for p in probs)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
def test_calibration_against_any_statistic(method):
    clean, adv, target = predictions(0, 50)
    given = sides(clean, adv, target)
    options = {"n_resamples": 60, "level": 0.8, "method": method, "seed": 5}
    found = calibration_shift(*given, 6, **options)

    def error(logits, y):
        return expected_calibration_error(logits=logits, target=y, n_bins=6)

    def gap(c, a):
        return c.mean() - a.double().mean()

    expected = {
        "ece_clean": bootstrap_interval(error, clean, target, **options),
        "ece_adv": bootstrap_interval(error, adv, target, **options),
        "ece_difference": bootstrap_interval(
            lambda u, v, y: error(v, y) - error(u, y), clean, adv, target, **options
        ),
        "gap_clean": bootstrap_interval(gap, given[0], given[2], **options),
        "gap_adv": bootstrap_interval(gap, given[1], given[3], **options),
        "gap_difference": bootstrap_interval(
            lambda c, d, a, b: gap(d, b) - gap(c, a), *given, **options
        ),
    }
    assert found.count == 50
    for name, value in expected.items():
        assert tuple(getattr(found, name)) == pytest.approx(tuple(value), abs=1e-9), name
    alone = calibration_error_interval(given[1], given[3], 6, **options)
    assert tuple(alone) == pytest.approx(tuple(found.ece_adv), abs=1e-12)


def test_what_is_shared_does_not_widen_the_difference():
    confidence, _, correct, _ = sides(*predictions(1, 300))
    found = calibration_shift(confidence, confidence, correct, correct, n_resamples=50)
    assert found.ece_difference[:3] == (0.0, 0.0, 0.0)
    assert found.gap_difference[:3] == (0.0, 0.0, 0.0)
    assert found.ece_clean == found.ece_adv
    assert found.ece_clean.upper > found.ece_clean.lower


def test_rows_are_left_out_once_for_all_intervals(monkeypatch):
    # The package has a function of the name of the module.
    module, calls = sys.modules[calibration_shift.__module__], []

    def counted(rows):
        calls.append(rows)
        return sums_without_one(rows)

    monkeypatch.setattr(module, "sums_without_one", counted)
    calibration_shift(*sides(*predictions(1, 30)), n_resamples=20, method="bca")
    assert len(calls) == 2


def test_coverage_of_the_difference():
    # Bins whose gaps are known and far from 0: 0.1 clean, 0.1 and 0.3 in equal parts under attack.
    rng, hits = np.random.default_rng(2), 0
    for seed in range(150):
        confidence = rng.choice([0.65, 0.95], size=300)
        chance = rng.random(300)
        clean, adv = chance < confidence - 0.1, chance < confidence - 0.1 - 0.2 * (confidence > 0.9)
        found = calibration_shift(
            confidence, confidence, clean, adv, 10, n_resamples=200, level=0.9, seed=seed
        )
        hits += found.ece_difference.lower <= 0.1 <= found.ece_difference.upper
    # Three standard errors of the share are 0.073.
    assert hits / 150 == pytest.approx(0.9, abs=0.073)


def test_calibration_at_the_edges():
    nothing = calibration_shift(*[torch.zeros(0)] * 4)
    assert nothing.count == 0
    assert math.isnan(nothing.ece_difference.estimate)
    for method in ("percentile", "basic", "bca"):
        one = torch.ones(1)
        found = calibration_shift(one, one, one, 0 * one, method=method)
        assert found.ece_difference[:3] == (1.0, 1.0, 1.0)
        assert found.gap_adv[:3] == (1.0, 1.0, 1.0)


def test_calibration_policy_for_nan():
    c, d, a, b = sides(*predictions(3, 20))
    c[4], d[7] = math.nan, math.inf
    kept = [i for i in range(20) if i not in (4, 7)]
    message = "^confidence_clean, confidence_adv: expected finite values, got 2 of 20 rows"
    with pytest.raises(ValueError, match=message):
        calibration_shift(c, d, a, b)
    with pytest.warns(MetricWarning, match="calibration_shift: 2 rows with NaN"):
        found = calibration_shift(c, d, a, b, nan="omit")
    assert found == calibration_shift(*(x[kept] for x in (c, d, a, b)))
    assert math.isnan(calibration_shift(c, d, a, b, nan="propagate").ece_adv.estimate)


def test_calibration_prints_as_a_table():
    found = calibration_shift(*sides(*predictions(3, 20)), level=0.9)
    head, ece, gap = str(found).splitlines()
    assert head.endswith("90 % interval of the difference")
    assert ece.split()[:2] == ["ECE", f"{found.ece_clean.estimate:.4f}"]
    assert gap.endswith(f"[{found.gap_difference.lower:+.4f}, {found.gap_difference.upper:+.4f}]")
    assert found._repr_html_().count("<td>") == 10


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(3), "confidence_adv: expected the shape of confidence_clean"),
        (0, torch.full((2,), 1.5), "confidence_clean: expected confidences in"),
        (1, torch.full((2,), -0.5), "confidence_adv: expected confidences in"),
        (2, torch.tensor([2, 0]), "correct_clean: expected bool"),
        (3, torch.tensor([True]), "correct_adv: expected bool"),
    ],
)
def test_calibration_refuses(index, value, message):
    arguments = [torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2)]
    arguments[index] = value
    if index == 0 and len(value) == 3:
        arguments[2] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        calibration_shift(*arguments)
