import dataclasses
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import ranking_oracles as oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import MetricWarning
from calibclip.metrics.acceptance import (
    AcceptedAndWrong,
    CleanThreshold,
    accepted_and_wrong,
    clean_threshold,
)
from calibclip.metrics.ranking import failure_auroc
from calibclip.metrics.selective import (
    AURC,
    CONVENTIONS,
    CoverageAtRisk,
    RiskCoverage,
    RiskCoverageCurve,
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    risk_coverage_curve,
)

UNCERTAINTY = -torch.tensor([0.9, 0.8, 0.7, 0.6])
CORRECT = torch.tensor([1, 0, 1, 0])
every_convention = pytest.mark.parametrize("convention", CONVENTIONS)
samples = st.lists(st.tuples(st.integers(-1, 1), st.booleans()), min_size=1, max_size=6)


def split(pairs):
    uncertainty, correct = zip(*pairs, strict=True)
    return [float(u) for u in uncertainty], list(correct)


class TestCurve:
    def test_points_are_the_distinct_thresholds(self):
        uncertainty = torch.tensor([2.0, 1.0, math.inf, 2.0, -1.0])
        curve = risk_coverage_curve(uncertainty, torch.tensor([0, 1, 1, 1, 0]))
        assert curve.coverage.tolist() == pytest.approx([0.2, 0.4, 0.8, 1.0])
        assert curve.risk.tolist() == pytest.approx([1, 1 / 2, 2 / 4, 2 / 5])
        assert curve.threshold.tolist() == [-1.0, 1.0, 2.0, math.inf]
        assert len(curve) == 4
        assert repr(curve) == (
            "RiskCoverageCurve(n_thresholds=4, coverage=0.2000..1, risk=1.0000..0.4000, "
            "threshold=-1..inf)"
        )

    @settings(max_examples=50, deadline=None)
    @given(samples)
    def test_equals_the_loop(self, pairs):
        uncertainty, correct = split(pairs)
        curve = risk_coverage_curve(np.array(uncertainty), np.array(correct))
        points = oracles.curve(uncertainty, correct)
        assert curve.coverage.tolist() == [k / len(correct) for k, _ in points]
        assert curve.risk.tolist() == [e / k for k, e in points]
        assert curve.threshold.tolist() == sorted(set(uncertainty))

    def test_is_frozen(self):
        curve = risk_coverage_curve(UNCERTAINTY, CORRECT)
        with pytest.raises(dataclasses.FrozenInstanceError, match="risk"):
            curve.risk = 0
        with pytest.raises(ValueError, match="read-only"):
            curve.risk[0] = 0

    def test_nothing(self):
        for metric in (RiskCoverage(), RiskCoverage(sketch=True)):
            curve = metric.compute()
            assert isinstance(curve, RiskCoverageCurve)
            assert len(curve) == 0
            assert repr(curve) == "RiskCoverageCurve(n_thresholds=0)"


class TestAreas:
    def test_hand_values(self):
        areas = [aurc(UNCERTAINTY, CORRECT, convention) for convention in CONVENTIONS]
        assert areas == pytest.approx([0.333333, 0.361111, 0.270833], abs=1e-6)
        assert aurc(UNCERTAINTY, CORRECT) == areas[0]
        assert augrc(UNCERTAINTY, CORRECT) == 0.1875
        assert excess_aurc(UNCERTAINTY, CORRECT) == pytest.approx(0.125, abs=1e-15)
        perfect = aurc(UNCERTAINTY, torch.tensor([1, 1, 0, 0]))
        assert perfect == pytest.approx(0.208333, abs=1e-6)

    @pytest.mark.parametrize("n_errors", [0, 1, 3, 7, 10])
    def test_all_tied(self, n_errors):
        correct, rate = torch.arange(10) >= n_errors, n_errors / 10
        for convention in CONVENTIONS:
            assert aurc(torch.ones(10), correct, convention) == pytest.approx(rate, abs=1e-15)
        assert augrc(torch.ones(10), correct) == pytest.approx(rate / 2, abs=1e-15)

    @settings(max_examples=60, deadline=None)
    @given(samples)
    def test_equal_all_orders_of_ties(self, pairs):
        uncertainty, correct = split(pairs)
        given = np.array(uncertainty), np.array(correct)
        for convention in CONVENTIONS:
            expected = oracles.aurc(uncertainty, correct, convention)
            assert aurc(*given, convention) == pytest.approx(float(expected), abs=1e-14)
            excess = expected - oracles.optimal(correct, convention)
            assert excess_aurc(*given, convention) == pytest.approx(float(excess), abs=1e-14)
        expected = oracles.augrc(uncertainty, correct)
        assert augrc(*given) == pytest.approx(float(expected), abs=1e-15)

    @pytest.mark.parametrize("digits", [1, 3, 9])
    def test_many_samples(self, digits):
        # Ties in groups of hundreds, of a few, and none.
        rng = np.random.default_rng(digits)
        correct = rng.random(5000) < 0.9
        uncertainty = (rng.normal(size=5000) - correct).round(digits)
        order = np.lexsort([rng.random(5000), uncertainty])
        values, start = np.unique(uncertainty[order], return_index=True)
        start = [*start, 5000]
        accepted_errors, risks = 0, []
        for first, last in itertools.pairwise(start):
            errors = int((~correct[order][first:last]).sum())
            share = Fraction(errors, last - first)
            risks += [
                float((accepted_errors + share * j) / (first + j))
                for j in range(1, last - first + 1)
            ]
            accepted_errors += errors
        assert len(values) == len(start) - 1
        assert aurc(uncertainty, correct) == pytest.approx(math.fsum(risks) / 5000, rel=1e-13)
        inner = math.fsum(risks) - (risks[0] + risks[-1]) / 2
        assert aurc(uncertainty, correct, "trapezoid") == pytest.approx(inner / 4999, rel=1e-13)
        curve = risk_coverage_curve(uncertainty, correct)
        x, y = [0, *curve.coverage], [curve.risk[0], *curve.risk]
        area = np.trapezoid(y, x)
        assert aurc(uncertainty, correct, "fd-shifts") == pytest.approx(area, rel=1e-12)
        rate = 1 - correct.mean()
        identity = (1 - rate) * rate * (1 - failure_auroc(uncertainty, correct)) + rate**2 / 2
        assert augrc(uncertainty, correct) == pytest.approx(identity, rel=1e-13)

    @every_convention
    def test_excess_of_a_perfect_ranking(self, convention):
        for n_errors in (0, 1, 60, 99, 100):
            correct, uncertainty = torch.arange(100) < 100 - n_errors, torch.arange(100).float()
            assert excess_aurc(uncertainty, correct, convention) == pytest.approx(0, abs=1e-14)
            if 0 < n_errors < 100:
                assert excess_aurc(-uncertainty, correct, convention) > 0.01

    @every_convention
    def test_one_sample(self, convention):
        assert aurc(torch.ones(1), torch.tensor([0]), convention) == 1.0
        assert aurc(torch.ones(1), torch.tensor([1]), convention) == 0.0
        assert excess_aurc(torch.ones(1), torch.tensor([0]), convention) == 0.0
        assert augrc(torch.ones(1), torch.tensor([0])) == 0.5
        assert math.isnan(aurc(torch.ones(0), torch.ones(0), convention))
        assert math.isnan(AURC(convention, sketch=True).error_bound())

    def test_a_long_stream(self):
        # The counts of 4e9 samples, whose mean is the integral of the risk over the coverage:
        # 0 up to 1/4, then (x - 1/4) / 2x up to 3/4, then (x - 1/2) / x.
        metric = AURC(sketch=True)
        metric.update(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1, 0, 1, 0]))
        metric._sums["counts"] *= 10**9
        middle = (1 / 2 - math.log(3) / 4) / 2
        assert metric.compute() == pytest.approx(middle + 1 / 4 - math.log(4 / 3) / 2, abs=1e-9)
        assert 0 < metric.error_bound() < 0.1

    def test_options(self):
        with pytest.raises(ValueError, match="convention: expected one of 'mean', 'trapezoid'"):
            aurc(UNCERTAINTY, CORRECT, "geifman")
        assert repr(AURC("fd-shifts")) == "AURC(convention='fd-shifts', sketch=False, nan='raise')"


class TestCoverageAtRisk:
    @settings(max_examples=50, deadline=None)
    @given(samples, st.sampled_from([0, 1, 2, 5, 10]))
    def test_equals_the_loop(self, pairs, tenths):
        uncertainty, correct = split(pairs)
        expected = oracles.coverage_at_risk(uncertainty, correct, Fraction(tenths, 10))
        value = coverage_at_risk(np.array(uncertainty), np.array(correct), tenths / 10)
        assert value == float(expected)

    def test_risk_is_met_exactly(self):
        correct = torch.arange(20) > 0
        assert coverage_at_risk(torch.ones(20), correct, 0.05) == 1.0
        assert coverage_at_risk(torch.ones(20), correct, 0.0499) == 0.0
        # Not the first crossing but the last.
        assert coverage_at_risk(torch.arange(20.0), correct, 0.05) == 1.0

    def test_options(self):
        for risk in (-0.1, 1.1):
            with pytest.raises(ValueError, match="risk: expected a number >= 0 and <= 1"):
                CoverageAtRisk(risk)


class TestThreshold:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=25), st.integers(1, 20))
    def test_is_the_least_that_accepts_enough(self, values, twentieths):
        wanted = Fraction(twentieths, 20)
        shares = {t: Fraction(sum(v <= t for v in values), len(values)) for t in values}
        expected = min(t for t, share in shares.items() if share >= wanted)
        assert clean_threshold(np.array(values, dtype=float), twentieths / 20) == expected

    def test_edges(self):
        clean = torch.tensor([3.0, 1.0, 2.0, math.inf])
        assert clean_threshold(clean, 1.0) == math.inf
        assert clean_threshold(clean, 0.0) == -math.inf
        assert clean_threshold(clean, 0.75) == 3.0
        assert math.isnan(clean_threshold(clean[:0]))
        for sketch in (False, True):
            assert math.isnan(CleanThreshold(sketch=sketch).compute())
        metric = CleanThreshold(1.0, sketch=True).update(clean)
        assert metric.compute() == math.inf
        assert metric.error_bound() == 0.0
        metric = CleanThreshold(0.0, sketch=True).update(clean)
        assert metric.compute() == -math.inf
        assert metric.error_bound() == 0.0
        with pytest.raises(ValueError, match="coverage: expected a number >= 0 and <= 1"):
            clean_threshold(clean, 95)
        with pytest.raises(ValueError, match="uncertainty_clean: expected numbers, got 1 of 2"):
            clean_threshold(torch.tensor([math.nan, 1.0]))

    def test_sketch_reaches_the_coverage(self):
        clean = torch.from_numpy(np.random.default_rng(0).normal(size=1001)).float()
        metric = CleanThreshold(0.9, sketch=True)
        for part in clean.split(100):
            metric.update(part)
        assert (clean <= metric.compute()).float().mean() >= 0.9
        assert metric.compute() == pytest.approx(clean_threshold(clean, 0.9), rel=1 / 128)


class TestAcceptedAndWrong:
    def test_rate_is_among_all(self):
        uncertainty = torch.tensor([1.0, 2.0, 2.0, 3.0, -math.inf])
        correct = torch.tensor([1, 0, 1, 0, 0])
        assert accepted_and_wrong(uncertainty, correct, 2.0) == 0.4
        assert accepted_and_wrong(uncertainty, correct, 1.9) == 0.2
        assert accepted_and_wrong(uncertainty, correct, math.inf) == 0.6
        assert accepted_and_wrong(uncertainty, correct, -math.inf) == 0.2
        assert math.isnan(accepted_and_wrong(uncertainty, correct, math.nan))
        assert math.isnan(accepted_and_wrong(uncertainty[:0], correct[:0], 2.0))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_ties_with_the_threshold_accept(self, dtype):
        # No decimal of these is a binary number: the threshold must come back unrounded.
        uncertainty = torch.tensor([0.1, 0.3, 0.7]).to(dtype)
        threshold = clean_threshold(uncertainty, 1 / 3)
        assert accepted_and_wrong(uncertainty, torch.zeros(3), threshold) == pytest.approx(1 / 3)

    def test_stream(self):
        rng = np.random.default_rng(0)
        uncertainty, correct = rng.normal(size=50), rng.random(50) < 0.4
        expected = ((uncertainty <= 0.3) & ~correct).mean()
        first, second = AcceptedAndWrong(0.3), AcceptedAndWrong(np.float64(0.3))
        first.update(uncertainty[:7], correct[:7]).update(uncertainty[:0], correct[:0])
        second.update(uncertainty[7:], correct[7:])
        assert first.merge(second).compute() == pytest.approx(expected, abs=1e-15)
        loaded = AcceptedAndWrong(0.3).load_state_dict(first.state_dict())
        assert loaded.compute() == first.compute()
        assert repr(first) == "AcceptedAndWrong(threshold=0.3, nan='raise')"

    def test_nan(self):
        uncertainty, correct = torch.tensor([1.0, math.nan, 1.0]), torch.tensor([0, 0, 1])
        with pytest.raises(ValueError, match="uncertainty_adv: expected numbers, got 1 of 3"):
            accepted_and_wrong(uncertainty, correct, 2.0)
        with pytest.warns(MetricWarning, match="1 rows"):
            assert accepted_and_wrong(uncertainty, correct, 2.0, nan="omit") == 0.5
        assert math.isnan(accepted_and_wrong(uncertainty, correct, 2.0, nan="propagate"))

    @pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
    def test_a_threshold_that_is_not_finite_reloads_and_merges(self, threshold):
        metric = AcceptedAndWrong(threshold).update(UNCERTAINTY, CORRECT)
        # Pickling makes another NaN.
        state = pickle.loads(pickle.dumps(metric.state_dict()))
        loaded = AcceptedAndWrong(float(str(threshold))).load_state_dict(state)
        value = loaded.merge(metric).compute()
        assert value == pytest.approx(metric.compute(), nan_ok=True)
        for other in (0.5, math.nan if math.isinf(threshold) else math.inf):
            with pytest.raises(ValueError, match="state: expected options"):
                AcceptedAndWrong(other).load_state_dict(state)

    @pytest.mark.parametrize("kind", [int, np.int64, np.float32])
    def test_any_real_threshold(self, kind):
        metric = AcceptedAndWrong(kind(2)).update(torch.tensor([2.0, 3.0]), torch.zeros(2))
        assert metric.compute() == 0.5
        assert type(metric.options["threshold"]) is float

    def test_arguments(self):
        for threshold in ("2", None, True, torch.tensor(2.0)):
            with pytest.raises(TypeError, match="threshold: expected a number"):
                accepted_and_wrong(UNCERTAINTY, CORRECT, threshold)
        with pytest.raises(ValueError, match="correct_adv: expected bool, or 0 and 1"):
            accepted_and_wrong(UNCERTAINTY, CORRECT + 1, 1.0)

    def test_update_does_not_wait_for_the_device(self):
        accepted = AcceptedAndWrong(0.5, nan="propagate")
        threshold = CleanThreshold(0.5, nan="propagate")
        with oracles.NoLook():
            assert accepted.update(UNCERTAINTY, CORRECT.bool()) is accepted
            assert threshold.update(UNCERTAINTY) is threshold
