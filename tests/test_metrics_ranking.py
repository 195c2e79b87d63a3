import copy
import io
import math
import pickle
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import ranking_oracles as oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from calibclip.metrics import MetricWarning
from calibclip.metrics import _ranking_measures as measures
from calibclip.metrics._predictions import Faults
from calibclip.metrics._ranking_state import sketch_edges, sketch_index
from calibclip.metrics.acceptance import AcceptedAndWrong, CleanThreshold
from calibclip.metrics.detection import (
    DetectionAUPR,
    DetectionAUROC,
    DetectionFPR95,
    detection_aupr,
    detection_auroc,
    detection_fpr95,
)
from calibclip.metrics.ranking import (
    FailureAUPRError,
    FailureAUPRSuccess,
    FailureAUROC,
    FailureFPR95,
    FPRAtTPR,
    failure_aupr_error,
    failure_aupr_success,
    failure_auroc,
    failure_fpr95,
    failure_scores,
    fpr_at_tpr,
)
from calibclip.metrics.selective import (
    AUGRC,
    AURC,
    CONVENTIONS,
    CoverageAtRisk,
    ExcessAURC,
    RiskCoverage,
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    risk_coverage_curve,
)

# With options that are not the defaults, so that none is lost on the way.
METRICS = {
    "auroc": FailureAUROC,
    "aupr error": FailureAUPRError,
    "aupr success": FailureAUPRSuccess,
    "fpr95": FailureFPR95,
    "curve": RiskCoverage,
    "augrc": AUGRC,
    "coverage": lambda **options: CoverageAtRisk(0.3, **options),
    **{f"aurc {c}": lambda c=c, **options: AURC(c, **options) for c in CONVENTIONS},
    **{f"excess {c}": lambda c=c, **options: ExcessAURC(c, **options) for c in CONVENTIONS},
}
FUNCTIONS = {
    "auroc": failure_auroc,
    "aupr error": failure_aupr_error,
    "aupr success": failure_aupr_success,
    "fpr95": failure_fpr95,
    "curve": risk_coverage_curve,
    "augrc": augrc,
    "coverage": lambda *given, **nan: coverage_at_risk(*given, 0.3, **nan),
    **{f"aurc {c}": lambda *given, c=c, **nan: aurc(*given, c, **nan) for c in CONVENTIONS},
    **{
        f"excess {c}": lambda *given, c=c, **nan: excess_aurc(*given, c, **nan) for c in CONVENTIONS
    },
}
every_metric = pytest.mark.parametrize("name", METRICS)

RNG = np.random.default_rng(0)
CORRECT = torch.from_numpy(RNG.random(200) < 0.7)
# Rounded, so that there are ties of both classes.
UNCERTAINTY = torch.from_numpy(RNG.normal(size=200) - 0.8 * CORRECT.numpy()).mul(8).round().div(8)
UNCERTAINTY = UNCERTAINTY.float()
PARTS = (slice(0, 1), slice(1, 1), slice(1, 150), slice(150, 200))

samples = st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=7)


def numbers(value):
    if isinstance(value, float):
        return np.array([value])
    return np.concatenate([value.coverage, value.risk, value.threshold])


def assert_close(value, expected):
    np.testing.assert_allclose(numbers(value), numbers(expected), rtol=0, atol=1e-13)


def filled(name, parts=PARTS, **options):
    metric = METRICS[name](**options)
    for part in parts:
        assert metric.update(UNCERTAINTY[part], CORRECT[part]) is metric
    return metric


def split(pairs):
    uncertainty, correct = zip(*pairs, strict=True)
    return [float(u) for u in uncertainty], list(correct)


class TestFailure:
    def test_hand_values(self):
        uncertainty, correct = -torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 0])
        assert failure_auroc(uncertainty, correct) == 0.75
        assert failure_auroc(torch.ones(4), correct) == 0.5
        assert failure_auroc(-uncertainty, correct) == 0.25
        assert failure_fpr95(uncertainty, correct) == 0.5

    @settings(max_examples=60, deadline=None)
    @given(samples)
    def test_equal_the_loops(self, pairs):
        uncertainty, correct = split(pairs)
        error = [not c for c in correct]
        given = np.array(uncertainty), np.array(correct)
        both = any(correct) and not all(correct)
        expected = {
            failure_auroc: oracles.auroc(uncertainty, error) if both else math.nan,
            failure_fpr95: oracles.fpr_at_tpr(uncertainty, error, Fraction(19, 20))
            if both
            else math.nan,
            failure_aupr_error: oracles.average_precision(uncertainty, error)
            if any(error)
            else math.nan,
            failure_aupr_success: oracles.average_precision([-u for u in uncertainty], correct)
            if any(correct)
            else math.nan,
        }
        for function, value in expected.items():
            assert function(*given) == pytest.approx(float(value), abs=1e-14, nan_ok=True)

    @pytest.mark.parametrize("seed", range(4))
    def test_equal_scikit_learn(self, seed):
        rng = np.random.default_rng(seed)
        correct = rng.random(3000) < (0.8, 0.5, 0.99, 0.05)[seed]
        uncertainty = rng.normal(size=3000) - correct
        uncertainty = uncertainty.round(2) if seed % 2 else uncertainty
        error = ~correct
        assert failure_auroc(uncertainty, correct) == pytest.approx(
            roc_auc_score(error, uncertainty), abs=1e-12
        )
        assert failure_aupr_error(uncertainty, correct) == pytest.approx(
            average_precision_score(error, uncertainty), abs=1e-12
        )
        assert failure_aupr_success(uncertainty, correct) == pytest.approx(
            average_precision_score(correct, -uncertainty), abs=1e-12
        )
        for tpr in (0.0, 0.5, 0.95, 1.0):
            fpr, recall, _ = roc_curve(error, uncertainty, drop_intermediate=False)
            expected = fpr[recall >= tpr].min()
            assert fpr_at_tpr(uncertainty, error, tpr) == pytest.approx(expected, abs=1e-14)
            if tpr == 0.95:
                assert failure_fpr95(uncertainty, correct) == pytest.approx(expected, abs=1e-14)

    def test_fpr_is_at_no_lower_tpr(self):
        # 19 of 20 are 95 %, and 15 of 16 are not.
        for n, expected in ((20, 0.0), (16, 1.0)):
            score = torch.tensor([*range(2, n + 1), 0, 1]).float()
            assert fpr_at_tpr(score, torch.tensor([*[1] * n, 0])) == expected

    def test_log_odds_do_not_saturate(self):
        logits = torch.tensor([[40.0, 0.0, 0.0], [80.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
        assert (logits.softmax(1).amax(1) == 1).all()
        uncertainty, correct = failure_scores(logits=logits, target=torch.tensor([1, 0, 0]))
        expected = [math.log(2) - gap for gap in (40, 80, 60)]
        assert uncertainty.tolist() == pytest.approx(expected, rel=1e-6)
        assert failure_auroc(uncertainty, correct) == 1.0
        assert FailureAUROC().update(uncertainty, correct).compute() == 1.0

    def test_scores_of_nan_rows(self):
        logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0]])
        target = torch.tensor([1, 1])
        with pytest.raises(ValueError, match="1 of 2 rows"):
            failure_scores(logits=logits, target=target)
        with pytest.warns(MetricWarning, match="1 rows with NaN or infinity were left out"):
            kept = failure_scores(logits=logits, target=target, nan="omit")
        assert len(kept.uncertainty) == len(kept.correct) == 1
        scores = failure_scores(logits=logits, target=target, nan="propagate")
        assert scores.uncertainty.isnan().tolist() == [False, True]
        assert math.isnan(failure_auroc(*scores, nan="propagate"))


class TestDetection:
    def test_classes_are_named(self):
        clean = torch.tensor([0.1, 0.2, 0.3, 0.6])
        adv = torch.tensor([0.4, 0.5, 0.7, 0.8, 0.9])
        score, is_adv = [*clean.tolist(), *adv.tolist()], [False] * 4 + [True] * 5
        opposite, is_clean = [-s for s in score], [not a for a in is_adv]
        assert detection_auroc(clean, adv) == float(oracles.auroc(score, is_adv))
        assert detection_aupr(clean, adv) == pytest.approx(
            average_precision_score(is_adv, score), abs=1e-15
        )
        assert detection_aupr(clean, adv, positive="clean") == pytest.approx(
            average_precision_score(is_clean, opposite), abs=1e-15
        )
        assert detection_fpr95(clean, adv) == 0.25
        assert detection_fpr95(clean, adv, positive="clean") == pytest.approx(0.4)
        for positive, truth, ranked in (("adv", is_adv, score), ("clean", is_clean, opposite)):
            expected = float(oracles.fpr_at_tpr(ranked, truth, Fraction(19, 20)))
            assert detection_fpr95(clean, adv, positive=positive) == expected

    @pytest.mark.parametrize("cls", [DetectionAUROC, DetectionAUPR, DetectionFPR95])
    def test_sets_come_apart(self, cls):
        clean, adv = UNCERTAINTY[:70], UNCERTAINTY[70:]
        expected = cls().update(clean, adv).compute()
        metric = cls()
        assert math.isnan(metric.compute())
        metric.update(clean[:9]).update(uncertainty_adv=adv[:50])
        metric.update(clean[9:], adv[50:]).update(clean[:0], adv[:0])
        assert metric.compute() == expected
        with pytest.raises(TypeError, match="one or both, got neither"):
            metric.update()
        with pytest.raises(ValueError, match=r"uncertainty_adv: expected numbers, got 1 of 1"):
            metric.update(clean, torch.tensor([math.nan]))
        assert metric.compute() == expected

    def test_options(self):
        with pytest.raises(ValueError, match="positive: expected one of 'adv', 'clean'"):
            detection_fpr95(UNCERTAINTY, UNCERTAINTY, positive="ood")
        assert detection_auroc(np.array([1.0, 2.0]), torch.tensor([2.0])) == 0.75
        metric = DetectionFPR95(positive="clean", sketch=True)
        assert repr(metric) == "DetectionFPR95(positive='clean', sketch=True, nan='raise')"


@every_metric
class TestEveryMetric:
    def test_batches_are_the_whole(self, name):
        expected = FUNCTIONS[name](UNCERTAINTY, CORRECT)
        assert np.isfinite(numbers(expected)).all()
        metric = filled(name)
        for _ in range(2):
            assert_close(metric.compute(), expected)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
        assert numbers(FUNCTIONS[name](UNCERTAINTY[order], CORRECT[order])).tolist() == (
            numbers(expected).tolist()
        )
        assert metric.error_bound() == 0.0
        metric.reset()
        assert not np.isfinite(numbers(metric.compute())).any()

    def test_nothing_is_nan(self, name):
        for sketch in (False, True):
            metric = METRICS[name](sketch=sketch)
            for _ in range(2):
                assert not np.isfinite(numbers(metric.compute())).any()
                assert metric.error_bound() == 0.0 or math.isnan(metric.error_bound())
                metric.update(UNCERTAINTY[:0], CORRECT[:0])
        assert not np.isfinite(numbers(FUNCTIONS[name](UNCERTAINTY[:0], CORRECT[:0]))).any()

    @pytest.mark.parametrize("sketch", [False, True])
    def test_merged_saved_and_loaded(self, name, sketch):
        whole = filled(name, sketch=sketch)
        first, *others = (filled(name, [part], sketch=sketch) for part in PARTS)
        before = [copy.deepcopy(other.state_dict()) for other in others]
        assert first.merge(*others) is first
        assert_close(first.compute(), whole.compute())
        assert first.error_bound() == whole.error_bound()
        for other, state in zip(others, before, strict=True):
            assert str(other.state_dict()) == str(state)
        stored = io.BytesIO()
        torch.save(whole.state_dict(), stored)
        stored.seek(0)
        loaded = METRICS[name](sketch=sketch).load_state_dict(torch.load(stored, weights_only=True))
        assert_close(pickle.loads(pickle.dumps(loaded)).compute(), whole.compute())
        with pytest.raises(ValueError, match="options"):
            whole.merge(METRICS[name](sketch=not sketch))

    def test_nan(self, name):
        uncertainty = UNCERTAINTY.clone()
        uncertainty[[3, 5]] = math.nan
        with pytest.raises(ValueError, match=r"uncertainty: expected numbers, got 2 of 200 that"):
            FUNCTIONS[name](uncertainty, CORRECT)
        kept = ~uncertainty.isnan()
        with pytest.warns(MetricWarning, match="2 rows"):
            value = FUNCTIONS[name](uncertainty, CORRECT, nan="omit")
        assert_close(value, FUNCTIONS[name](uncertainty[kept], CORRECT[kept]))
        value = FUNCTIONS[name](uncertainty, CORRECT, nan="propagate")
        assert not np.isfinite(numbers(value)).any()
        for sketch in (False, True):
            metric = METRICS[name](nan="propagate", sketch=sketch).update(uncertainty, CORRECT)
            assert not np.isfinite(numbers(metric.compute())).any()
            assert math.isnan(metric.error_bound()) == sketch
            metric = METRICS[name](sketch=sketch).update(UNCERTAINTY, CORRECT)
            with pytest.raises(ValueError, match="2 of 200"):
                metric.update(uncertainty, CORRECT)
            assert_close(metric.compute(), filled(name, sketch=sketch).compute())
        metric = METRICS[name](nan="omit", sketch=True).update(uncertainty, CORRECT)
        with pytest.warns(MetricWarning, match="2 rows"):
            assert math.isfinite(metric.error_bound())

    @pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
    def test_only_the_order_counts(self, name, scale):
        expected = FUNCTIONS[name](UNCERTAINTY, CORRECT)
        stretched = UNCERTAINTY.double() * scale
        value = FUNCTIONS[name](stretched, CORRECT)
        if name == "curve":
            assert value.risk.tolist() == expected.risk.tolist()
            assert value.threshold.tolist() == (expected.threshold * scale).tolist()
            return
        assert value == expected
        infinite = UNCERTAINTY.clone()
        infinite[UNCERTAINTY == UNCERTAINTY.max()] = math.inf
        infinite[UNCERTAINTY == UNCERTAINTY.min()] = -math.inf
        assert FUNCTIONS[name](infinite, CORRECT) == expected
        assert METRICS[name]().update(infinite, CORRECT).compute() == expected
        # Eighths have so few digits that no bin of the sketch holds two of them.
        metric = METRICS[name](sketch=True).update(infinite, CORRECT)
        assert metric.compute() == expected
        assert abs(metric.error_bound()) <= 1.0

    def test_every_kind_of_input(self, name):
        expected = FUNCTIONS[name](UNCERTAINTY, CORRECT)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            assert_close(FUNCTIONS[name](UNCERTAINTY.to(dtype), CORRECT.long()), expected)
        arrays = UNCERTAINTY.numpy().astype(np.float64), CORRECT.numpy().astype(np.uint8)
        before = [array.copy() for array in arrays]
        assert_close(FUNCTIONS[name](*arrays), expected)
        for array, copied in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(array, copied)
        graph = UNCERTAINTY.clone().requires_grad_()
        assert_close(FUNCTIONS[name](graph * 1, CORRECT.float()), expected)
        for sketch in (False, True):
            with torch.inference_mode():
                metric = filled(name, PARTS[:2], sketch=sketch).merge(METRICS[name](sketch=sketch))
                metric.update(UNCERTAINTY[PARTS[2]], CORRECT[PARTS[2]])
            metric.update(UNCERTAINTY[PARTS[3]], CORRECT[PARTS[3]])
            if not (sketch and name == "curve"):
                assert_close(metric.compute(), expected)

    def test_zeros_of_both_signs_tie(self, name):
        correct = torch.tensor([1, 0, 1, 0])
        expected = FUNCTIONS[name](torch.zeros(4), correct)
        signed = torch.tensor([0.0, -0.0, -0.0, 0.0])
        assert_close(FUNCTIONS[name](signed, correct), expected)
        assert_close(METRICS[name]().update(signed, correct).compute(), expected)
        if name != "curve":
            assert METRICS[name](sketch=True).update(signed, correct).compute() == expected

    @pytest.mark.parametrize("sketch", [False, True])
    def test_update_does_not_wait_for_the_device(self, name, sketch):
        metric = METRICS[name](sketch=sketch, nan="propagate")
        with oracles.NoLook():
            assert metric.update(UNCERTAINTY, CORRECT) is metric

    def test_wrong_arguments(self, name):
        function = FUNCTIONS[name]
        with pytest.raises(TypeError, match="uncertainty: expected a floating-point tensor"):
            function([0.1, 0.2], torch.tensor([1, 0]))
        with pytest.raises(TypeError, match="uncertainty: expected a floating-point tensor"):
            function(torch.tensor([1, 2]), torch.tensor([1, 0]))
        with pytest.raises(ValueError, match=r"uncertainty: expected .* of shape \(N,\)"):
            function(torch.zeros(2, 1), torch.tensor([1, 0]))
        with pytest.raises(
            ValueError, match=r"correct: expected bool, or 0 and 1, of shape \(2,\)"
        ):
            function(torch.zeros(2), torch.tensor([1, 0, 1]))
        with pytest.raises(ValueError, match="correct: expected bool, or 0 and 1"):
            function(torch.zeros(2), torch.tensor([1, 2]))
        with pytest.raises(TypeError, match="correct: expected bool, or 0 and 1"):
            function(torch.zeros(2), [True, False])
        with pytest.raises(ValueError, match="nan: expected one of"):
            function(torch.zeros(2), torch.tensor([1, 0]), nan="drop")
        with pytest.raises(TypeError, match="sketch: expected True or False"):
            METRICS[name](sketch="yes")


def test_functions_tell_float64_apart_and_streams_do_not():
    uncertainty = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    correct = torch.tensor([1, 0])
    assert failure_auroc(uncertainty, correct) == 1.0
    assert FailureAUROC().update(uncertainty, correct).compute() == 0.5
    assert FailureAUROC().update(uncertainty, correct)._columns["score"].values.dtype == (
        torch.float32
    )
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    assert failure_auroc(huge, correct) == FailureAUROC().update(huge, correct).compute() == 0.0


def test_one_class_alone():
    uncertainty = torch.tensor([1.0, 2.0, 2.0])
    right, wrong = torch.ones(3), torch.zeros(3)
    for correct in (right, wrong):
        assert math.isnan(failure_auroc(uncertainty, correct))
        assert math.isnan(failure_fpr95(uncertainty, correct))
        assert math.isnan(FailureAUROC(sketch=True).update(uncertainty, correct).error_bound())
    assert math.isnan(failure_aupr_error(uncertainty, right))
    assert failure_aupr_error(uncertainty, wrong) == 1.0
    assert math.isnan(failure_aupr_success(uncertainty, wrong))
    assert failure_aupr_success(uncertainty, right) == 1.0


def test_options_of_the_generic_rate():
    for tpr in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="tpr: expected a number >= 0 and <= 1"):
            FPRAtTPR(tpr)
    with pytest.raises(ValueError, match="positive: expected bool, or 0 and 1"):
        fpr_at_tpr(torch.zeros(2), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="score: expected numbers"):
        fpr_at_tpr(torch.tensor([math.nan]), torch.tensor([1]))


class TestSketch:
    def test_bins_are_ordered_and_cover_all_floats(self):
        values = torch.tensor([-math.inf, -3e38, -1.0, -1e-40, 0.0, 1e-45, 1.0, 3e38, math.inf])
        index = sketch_index(values)
        assert (index.diff() > 0)[[0, 1, 2, 3, 5, 6, 7]].all()
        assert sketch_index(torch.tensor([-0.0])) == sketch_index(torch.tensor([0.0]))
        lower, upper = sketch_edges(index.numpy())
        assert (lower <= values.double().numpy()).all()
        assert (values.double().numpy() <= upper).all()

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
    def test_bins_hold_what_is_within_their_edges(self, values):
        score = torch.tensor(values, dtype=torch.float32)
        index = sketch_index(score)
        lower, upper = sketch_edges(index.numpy())
        assert (lower <= score.double().numpy()).all()
        assert (score.double().numpy() <= upper).all()
        order = score.argsort()
        assert (index[order].diff() >= 0).all()
        # The next float32 beyond an edge is in the next bin.
        with np.errstate(over="ignore"):
            above = np.nextafter(upper.astype(np.float32), np.float32(np.inf))
        above = torch.from_numpy(np.where(np.isinf(upper), np.inf, above).astype(np.float32))
        assert (sketch_index(above)[~np.isinf(upper)] == index[~np.isinf(upper)] + 1).all()

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from([-2.0, 0.5, 1.0, 1.5]), st.integers(0, 6), st.booleans()),
            min_size=1,
            max_size=25,
        )
    )
    def test_bound_holds(self, triples):
        # A few bins, in each of them a few distinct scores and ties.
        score = torch.tensor([base * (1 + step * 2.0**-20) for base, step, _ in triples])
        correct = torch.tensor([right for *_, right in triples])
        full = FailureAUROC().update(score, correct)._tally()
        sketch = FailureAUROC(sketch=True).update(score, correct)._tally()
        for name in METRICS:
            metric = METRICS[name]()
            exact, value = metric._measure(full), metric._measure(sketch)
            bound = metric._bound(sketch)
            if name == "curve":
                self.check_curve(value, exact, bound)
            elif math.isnan(exact):
                assert math.isnan(value)
                assert math.isnan(bound)
            else:
                assert abs(value - exact) <= bound + 1e-12
        for coverage in (0.5, 0.95, 1.0):
            metric = CleanThreshold(coverage)
            value, bound = metric._measure(sketch), metric._bound(sketch)
            assert 0 <= value - metric._measure(full) <= bound <= abs(value) / 128
        for cls in (FailureAUPRSuccess, DetectionFPR95):
            exact = cls()._measure(full.flipped())
            value, bound = cls()._measure(sketch.flipped()), cls()._bound(sketch.flipped())
            assert math.isnan(exact) or abs(value - exact) <= bound + 1e-12

    @staticmethod
    def check_curve(value, exact, bound):
        points = dict(zip(exact.coverage, exact.risk, strict=True))
        for coverage, risk in zip(value.coverage, value.risk, strict=True):
            assert points[coverage] == risk
        n = round(1 / exact.coverage.min()) if len(exact) else 0
        # The expected risk of ties: errors grow evenly between two points.
        k = np.concatenate([[0.0], value.coverage])
        errors = np.concatenate([[0.0], value.coverage * value.risk])
        expected = np.interp(exact.coverage, k, errors) / exact.coverage
        assert n >= 1
        assert (abs(expected - exact.risk) <= bound + 1e-12).all()

    @pytest.mark.parametrize("name", [name for name in METRICS if name != "coverage"])
    def test_bound_is_tight(self, name):
        # Of all rankings of what the bins hold, some are as far from the sketch as the bound says.
        bins = {1.0: (2, 3), 2.0: (3, 1), 4.0: (2, 4)}
        score = [b for b, (e, c) in bins.items() for _ in range(e + c)]
        correct = torch.tensor([i >= e for e, c in bins.values() for i in range(e + c)])
        metric = METRICS[name](sketch=True).update(torch.tensor(score), correct)
        value, bound, furthest = metric.compute(), metric.error_bound(), 0.0
        for sign in (1, -1):
            for tied in ("none", "right", "wrong"):
                steps = torch.arange(len(score)).float()
                steps[correct] = 0.0 if tied == "right" else steps[correct]
                steps[~correct] = 0.0 if tied == "wrong" else steps[~correct]
                steps += 100 * sign * correct
                shifted = torch.tensor(score) * (1 + (steps + 100) * 2.0**-20)
                exact = METRICS[name]().update(shifted, correct).compute()
                if name == "curve":
                    k = np.concatenate([[0.0], value.coverage])
                    errors = np.concatenate([[0.0], value.coverage * value.risk])
                    expected = np.interp(exact.coverage, k, errors) / exact.coverage
                    distance = abs(expected - exact.risk).max()
                else:
                    distance = abs(exact - value)
                furthest = max(furthest, distance)
        assert furthest == pytest.approx(bound, abs=1e-12)
        assert bound > 0.01

    def test_bound_is_small_on_real_numbers(self):
        rng = np.random.default_rng(0)
        correct = rng.random(20_000) < 0.8
        uncertainty = torch.from_numpy(rng.normal(-5, 4, 20_000) - 3 * correct)
        exact = failure_auroc(uncertainty, correct)
        metric = FailureAUROC(sketch=True).update(uncertainty, correct)
        assert abs(metric.compute() - exact) <= metric.error_bound() < 0.002

    def test_state_does_not_grow(self):
        metric = filled("auroc", sketch=True)
        size = sum(total.nbytes for total in metric._sums.values())
        assert not metric._columns
        assert size < 1.1 * 2**20
        exact = filled("auroc")
        assert sum(c.values.nbytes for c in exact._columns.values()) == 5 * 200


def test_harmonic_gap():
    for start, length in [(0, 1), (0, 100), (3, 5), (60, 3), (60, 9), (63, 1), (64, 1), (10**4, 7)]:
        expected = sum(Fraction(1, k) for k in range(start + 1, start + length + 1))
        gap = measures.harmonic_gap(np.array([float(start)]), np.array([float(length)]))
        assert gap[0] == pytest.approx(float(expected), rel=2e-14)
    far = measures.harmonic_gap(np.array([1e9]), np.array([1.0]))
    assert far[0] == pytest.approx(1 / (1e9 + 1), rel=1e-15)


@pytest.mark.parametrize(
    ("metric", "argument"),
    [
        (FailureAUROC, "uncertainty"),
        (AURC, "uncertainty"),
        (DetectionAUROC, "uncertainty_clean, uncertainty_adv"),
        (FPRAtTPR, "score"),
        (CleanThreshold, "uncertainty_clean"),
        (partial(AcceptedAndWrong, 0.5), "uncertainty_adv"),
    ],
)
def test_nan_that_an_accelerator_reports_late(metric, argument):
    late = Faults.none()._replace(nonfinite=torch.tensor(2))
    found = metric()
    found.count_faults(late)
    with pytest.raises(
        ValueError, match=f"^{argument}: expected values that are no NaN, got 2 rows"
    ):
        found.compute()
    found = metric(nan="omit")
    found.count_faults(late)
    with pytest.warns(MetricWarning, match=r": 2 rows with NaN were left out$"):
        found.compute()
