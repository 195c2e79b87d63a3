"""What every streaming metric of class predictions promises."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch

from calibclip import metrics
from calibclip.metrics import MetricGroup, MetricWarning
from calibclip.metrics._predictions import Faults, Predictions
from calibclip.metrics._streaming import Column, PredictionMetric

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(90, 5, generator=GENERATOR)
TARGET = torch.randint(5, (90,), generator=GENERATOR)
PARTS = (slice(0, 1), slice(1, 1), slice(1, 40), slice(40, 90))

# With options that are not the defaults, so that none is lost on the way.
METRICS = {
    "accuracy": metrics.Accuracy,
    "nll": metrics.NegativeLogLikelihood,
    "brier": lambda **nan: metrics.BrierScore(scale="mean", **nan),
    "decomposition": lambda **nan: metrics.BrierDecomposition(7, **nan),
    "sharpness": metrics.Sharpness,
    "ece": lambda **nan: metrics.ExpectedCalibrationError(7, 2, debias=True, **nan),
    "mass": lambda **nan: metrics.ExpectedCalibrationError(7, binning="mass", **nan),
    "mce": lambda **nan: metrics.MaximumCalibrationError(7, min_count=3, **nan),
    "signed": lambda **nan: metrics.SignedCalibrationError(7, **nan),
    "table": lambda **nan: metrics.Reliability(7, interval="clopper-pearson", **nan),
    "classwise": lambda **nan: metrics.ClasswiseCalibrationError(7, n_classes=5, **nan),
    "smooth": lambda **nan: metrics.SmoothCalibrationError(bandwidth=0.1, **nan),
    "sweep": lambda **nan: metrics.SweepCalibrationError(norm=2, **nan),
    "kernel": lambda **nan: metrics.KernelCalibrationError(estimator="unbiased", **nan),
    "mmce": lambda **nan: metrics.MaximumMeanCalibrationError(bandwidth=0.3, **nan),
}
FUNCTIONS = {
    "accuracy": metrics.accuracy,
    "nll": metrics.negative_log_likelihood,
    "brier": lambda *given, **named: metrics.brier_score(*given, **named, scale="mean"),
    "decomposition": lambda *given, **named: metrics.brier_decomposition(*given, **named, n_bins=7),
    "sharpness": metrics.sharpness,
    "ece": lambda *given, **named: metrics.expected_calibration_error(
        *given, **named, n_bins=7, norm=2, debias=True
    ),
    "mass": lambda *given, **named: metrics.expected_calibration_error(
        *given, **named, n_bins=7, binning="mass"
    ),
    "mce": lambda *given, **named: metrics.maximum_calibration_error(
        *given, **named, n_bins=7, min_count=3
    ),
    "signed": lambda *given, **named: metrics.signed_calibration_error(*given, **named, n_bins=7),
    "table": lambda *given, **named: metrics.reliability_table(
        *given, **named, n_bins=7, interval="clopper-pearson"
    ),
    "classwise": lambda *given, **named: metrics.classwise_calibration_error(
        *given, **named, n_bins=7
    ),
    "smooth": lambda *given, **named: metrics.smooth_calibration_error(
        *given, **named, bandwidth=0.1
    ),
    "sweep": lambda *given, **named: metrics.sweep_calibration_error(*given, **named, norm=2),
    "kernel": lambda *given, **named: metrics.kernel_calibration_error(
        *given, **named, estimator="unbiased"
    ),
    "mmce": lambda *given, **named: metrics.mmce(*given, **named, bandwidth=0.3),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def numbers(value):
    """All numbers of a value, whatever kind of record it is."""
    if isinstance(value, metrics.ReliabilityTable):
        columns = [getattr(value, column) for column in ("count", "confidence", "ci_lower")]
        return np.concatenate(columns)
    return np.atleast_1d(np.asarray(value, dtype=np.float64))


def assert_close(value, expected):
    np.testing.assert_allclose(numbers(value), numbers(expected), rtol=0, atol=1e-12)


def filled(name, parts=PARTS, **nan):
    metric = METRICS[name](**nan)
    for part in parts:
        assert metric.update(logits=LOGITS[part], target=TARGET[part]) is metric
    return metric


@every_metric
class TestEveryMetric:
    def test_batches_are_the_whole(self, name):
        expected = FUNCTIONS[name](logits=LOGITS, target=TARGET)
        assert np.isfinite(numbers(expected)[:1]).all()
        metric = filled(name)
        assert_close(metric.compute(), expected)
        # To ask changes nothing, and the stream goes on.
        assert_close(metric.compute(), expected)
        metric.reset()
        assert np.isnan(numbers(metric.compute())).any()
        assert_close(metric.update(logits=LOGITS, target=TARGET).compute(), expected)

    def test_nothing_is_nan(self, name):
        metric = METRICS[name]()
        for _ in range(2):
            assert np.isnan(numbers(metric.compute())).any()
            metric.update(logits=LOGITS[:0], target=TARGET[:0])

    def test_merged(self, name):
        first, *others = (filled(name, [part]) for part in PARTS)
        before = [copy.deepcopy(other.state_dict()) for other in others]
        assert first.merge(*others) is first
        assert_close(first.compute(), FUNCTIONS[name](logits=LOGITS, target=TARGET))
        for other, state in zip(others, before, strict=True):
            assert str(other.state_dict()) == str(state)

    def test_saved_and_loaded(self, name):
        metric = filled(name, PARTS[:3])
        stored = io.BytesIO()
        torch.save(metric.state_dict(), stored)
        stored.seek(0)
        loaded = METRICS[name]().load_state_dict(torch.load(stored, weights_only=True))
        loaded.update(logits=LOGITS[PARTS[3]], target=TARGET[PARTS[3]])
        assert_close(loaded.compute(), FUNCTIONS[name](logits=LOGITS, target=TARGET))
        # The state that was saved is not the one that goes on.
        assert_close(metric.compute(), filled(name, PARTS[:3]).compute())
        assert_close(pickle.loads(pickle.dumps(loaded)).compute(), loaded.compute())

    def test_strangers_are_refused(self, name):
        metric = METRICS[name]()
        stranger = metrics.Accuracy() if name != "accuracy" else metrics.Sharpness()
        with pytest.raises(TypeError, match=f"others: expected a {type(metric).__name__}, got"):
            metric.merge(stranger)
        with pytest.raises(ValueError, match=r"others: expected options .*, got "):
            metric.merge(METRICS[name](nan="omit"))
        with pytest.raises(ValueError, match="state: expected metric"):
            metric.load_state_dict(stranger.state_dict())
        with pytest.raises(ValueError, match="state: expected options"):
            metric.load_state_dict(METRICS[name](nan="omit").state_dict())

    def test_repr_is_the_constructor_call(self, name):
        metric = METRICS[name](nan="omit")
        again = eval(repr(metric), vars(metrics) | {"inf": math.inf})
        assert again.options == metric.options
        assert type(again) is type(metric)

    def test_nan_policies(self, name):
        logits = torch.cat([LOGITS, torch.full((2, 5), torch.nan)])
        target = torch.cat([TARGET, TARGET[:2]])
        expected = FUNCTIONS[name](logits=LOGITS, target=TARGET)
        with pytest.raises(
            ValueError, match=r"logits: .* got 2 of 92 rows with NaN or .*nan='omit'"
        ):
            FUNCTIONS[name](logits=logits, target=target)
        with pytest.warns(MetricWarning, match="2 rows with NaN or infinity were left out"):
            assert_close(FUNCTIONS[name](logits=logits, target=target, nan="omit"), expected)
        value = FUNCTIONS[name](logits=logits, target=target, nan="propagate")
        assert np.isnan(numbers(value)).any()
        metric = METRICS[name](nan="propagate").update(logits=logits, target=target)
        assert metric.n_faulty == 2
        # A fault once seen is not outweighed by what comes later.
        assert np.isnan(numbers(metric.update(logits=LOGITS, target=TARGET).compute())).any()

    def test_faults_that_an_accelerator_reports_late(self, name):
        one = torch.ones((), dtype=torch.int64)
        for faults, message in (
            (
                Faults.none()._replace(nonfinite=one),
                "probs, logits: expected finite values, got 1 rows",
            ),
            (Faults.none()._replace(improper=one), "probs: expected rows of prob.* got 1 that do"),
            (Faults.none()._replace(mislabelled=one), "target: expected class indices below K"),
        ):
            metric = METRICS[name]()
            metric.take(Predictions(LOGITS, True, TARGET, faults))
            with pytest.raises(ValueError, match=message):
                metric.compute()

    def test_nothing_that_requires_a_gradient_is_kept(self, name):
        logits = LOGITS.clone().requires_grad_()
        metric = METRICS[name]().update(logits=logits, target=TARGET)
        tensors = [*metric._sums.values(), *(c.values for c in metric._columns.values())]
        assert not any(tensor.requires_grad for tensor in tensors)
        assert_close(metric.compute(), FUNCTIONS[name](logits=LOGITS, target=TARGET))

    @pytest.mark.parametrize("argument", ["probs", "logits"])
    @pytest.mark.parametrize("nan", ["raise", "propagate"])
    def test_an_accelerator_is_not_waited_for(self, name, argument, nan):
        # A look at a tensor without values raises.
        scores, target = torch.ones(4, 5, device="meta"), torch.zeros(4, device="meta").long()
        metric = METRICS[name](nan=nan)
        assert metric.update(**{argument: scores}, target=target) is metric

    def test_autocast_and_inference_mode_around_it(self, name):
        expected = FUNCTIONS[name](logits=LOGITS, target=TARGET)
        metric = METRICS[name]()
        with torch.inference_mode():
            metric.update(logits=LOGITS[:50], target=TARGET[:50])
        with torch.autocast("cpu", torch.bfloat16):
            metric.update(logits=LOGITS[50:], target=TARGET[50:])
        assert_close(metric.compute(), expected)


class TestGroup:
    def group(self):
        return MetricGroup({name: make() for name, make in METRICS.items()})

    def test_values_are_those_of_the_members(self):
        group = self.group()
        for part in PARTS:
            group.update(logits=LOGITS[part], target=TARGET[part])
        values = group.compute()
        assert list(values) == list(METRICS)
        for name, value in values.items():
            assert_close(value, FUNCTIONS[name](logits=LOGITS, target=TARGET))
        assert len(group) == len(METRICS)
        assert_close(group["ece"].compute(), values["ece"])
        assert "ExpectedCalibrationError(n_bins=7" in repr(group)
        assert math.isnan(group.reset().compute()["ece"])

    def test_scores_are_checked_once(self, monkeypatch):
        from calibclip.metrics import group

        calls, read = [], group.read_predictions

        def counted(*given):
            calls.append(given)
            return read(*given)

        monkeypatch.setattr(group, "read_predictions", counted)
        self.group().update(logits=LOGITS, target=TARGET)
        assert len(calls) == 1

    def test_merged_saved_and_loaded(self):
        first, second = self.group(), self.group()
        first.update(logits=LOGITS[:40], target=TARGET[:40])
        second.update(logits=LOGITS[40:], target=TARGET[40:])
        loaded = self.group().load_state_dict(first.merge(second).state_dict())
        for name, value in loaded.compute().items():
            assert_close(value, FUNCTIONS[name](logits=LOGITS, target=TARGET))
        with pytest.raises(ValueError, match="others: expected groups of"):
            first.merge(MetricGroup({"ece": metrics.ExpectedCalibrationError()}))
        with pytest.raises(ValueError, match="state: expected states of"):
            first.load_state_dict({})

    @pytest.mark.parametrize(
        ("members", "error", "message"),
        [
            ([metrics.Accuracy()], TypeError, "metrics: expected a mapping from names"),
            ({"a": 3}, TypeError, "metrics: expected .*, got 'a': int"),
            ({3: metrics.Accuracy()}, TypeError, "metrics: expected .*, got 3: Accuracy"),
            ({}, ValueError, "metrics: expected metrics with one and the same nan, got no metric"),
            (
                {"a": metrics.Accuracy(), "b": metrics.Accuracy(nan="omit")},
                ValueError,
                "metrics: expected metrics with one and the same nan, got omit, raise",
            ),
        ],
    )
    def test_refusals(self, members, error, message):
        with pytest.raises(error, match=message):
            MetricGroup(members)


def test_a_column_grows_by_doubling():
    column, sizes = Column(torch.float32), set()
    for k in range(1000):
        column.append(torch.tensor([float(k)]))
        sizes.add(len(column._data))
    assert torch.equal(column.values, torch.arange(1000.0))
    assert len(sizes) == 11
    assert column.values.dtype == torch.float32


def test_counts_are_exact_and_sums_do_not_drift():
    metric = metrics.ExpectedCalibrationError(1)
    assert metric._sums["n_samples"].dtype == torch.int64
    metric._sums["n_samples"] += 2**53
    metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([0]))
    assert int(metric._sums["n_samples"]) == 2**53 + 1


def test_a_state_that_does_not_fit():
    metric = metrics.ExpectedCalibrationError(3)
    state = metric.state_dict()
    del state["sums"]["n_correct"]
    with pytest.raises(ValueError, match=r"state: expected .*'n_correct'"):
        metric.load_state_dict(state)


def test_a_refused_state_changes_nothing():
    metric = filled("ece")
    expected = metric.compute()
    state = metric.state_dict()
    state["sums"]["n_correct"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"state: expected n_correct of shape \(7,\), got \(3,\)"):
        metric.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: expected .*'sum_confidence'"):
        metric.load_state_dict({"metric": state["metric"], "options": state["options"]})
    assert metric.compute() == expected


def test_a_group_takes_all_or_nothing():
    def group(nan="raise"):
        members = {
            "acc": metrics.Accuracy(nan=nan),
            "cls": metrics.ClasswiseCalibrationError(nan=nan),
        }
        return MetricGroup(members).update(logits=LOGITS, target=TARGET)

    whole = group()
    expected = whole.compute()
    with pytest.raises(ValueError, match="probs, logits: expected 5 classes, as before, got 3"):
        whole.update(logits=LOGITS[:, :3], target=TARGET % 3)
    other = MetricGroup({"acc": metrics.Accuracy(), "cls": metrics.ClasswiseCalibrationError(3)})
    with pytest.raises(ValueError, match="others: expected options"):
        whole.merge(other.update(logits=LOGITS, target=TARGET))
    with pytest.raises(ValueError, match="state: expected options"):
        whole.load_state_dict(other.state_dict())
    assert whole.compute() == expected
    one = metrics.Accuracy()
    with pytest.raises(ValueError, match="metrics: expected different metrics, got one under two"):
        MetricGroup({"a": one, "b": one})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 3}, "norm: expected 1, 2 or math.inf, got int 3"),
        ({"norm": "inf"}, "norm: expected 1, 2 or math.inf, got str 'inf'"),
        ({"norm": math.inf, "debias": True}, "debias: expected False with norm=inf"),
        ({"squared": True}, "squared: expected False with norm=1"),
        ({"min_count": 5}, "min_count: expected 1 with norm=1, got 5"),
    ],
)
def test_the_error_of_a_table_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        filled("table").compute().error(**options)


def test_another_type_of_metric_may_be_written():
    class Doubt(PredictionMetric):
        """Share of predictions below one half."""

        def __init__(self, nan="raise"):
            super().__init__(nan=nan)

        def _begin(self):
            zero = torch.zeros((), dtype=torch.int64)
            return {"n": zero, "doubtful": zero}, {}

        def _take(self, predictions):
            confidence = predictions.confidence
            self._add(n=torch.tensor(len(confidence)), doubtful=(confidence < 0.5).sum())

        def _value(self):
            return float(self._sums["doubtful"] / self._sums["n"])

    probs = torch.tensor([[0.4, 0.3, 0.3], [0.8, 0.1, 0.1]])
    metric = Doubt().update(probs, target=torch.tensor([0, 0]))
    assert metric.compute() == 0.5
