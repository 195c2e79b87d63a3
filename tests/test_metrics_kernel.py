import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import MetricGroup, kernel
from calibclip.metrics._streaming import Column, MetricWarning
from calibclip.metrics.kernel import (
    KernelCalibrationError,
    MaximumMeanCalibrationError,
    kernel_calibration_error,
    mmce,
)

COMBINATIONS = [(e, c) for e in kernel.ESTIMATORS for c in kernel.CALIBRATIONS]


def random_case(n, n_classes=3, seed=0, scale=2.0):
    """Probabilities that float32 holds as they are, and targets."""
    rng = np.random.default_rng(seed)
    probs = torch.tensor(rng.normal(size=(n, n_classes)) * scale).softmax(1).float()
    return probs, torch.tensor(rng.integers(n_classes, size=n))


def term(p, y, q, z, calibration, width):
    """The definition of h for two rows, in plain floats."""
    p, q = p.double().tolist(), q.double().tolist()
    if calibration == "top-label":
        c, d = max(p), max(q)
        a, b = float(p.index(c) == y), float(q.index(d) == z)
        return (a - c) * (b - d) * math.exp(-abs(c - d) / width)
    residuals = ([(k == y) - v for k, v in enumerate(p)], [(k == z) - v for k, v in enumerate(q)])
    product = sum(u * v for u, v in zip(*residuals, strict=True))
    return product * math.exp(-math.dist(p, q) / width)


def loop_skce(probs, target, estimator, calibration, width, size=64):
    n, rows = len(probs), list(zip(probs, target.tolist(), strict=True))

    def mean(pairs):
        terms = [term(*rows[i], *rows[j], calibration, width) for i, j in pairs]
        return math.fsum(terms) / len(terms)

    if estimator == "biased":
        return mean([(i, j) for i in range(n) for j in range(n)])
    if estimator == "unbiased":
        return mean([(i, j) for j in range(n) for i in range(j)])
    blocks = [range(start, start + size) for start in range(0, n - size + 1, size)]
    return math.fsum(mean([(i, j) for j in b for i in b if i < j]) for b in blocks) / len(blocks)


class TestHandValues:
    def test_top_label(self):
        probs, target = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([1, 1])
        options = {"calibration": "top-label", "bandwidth": 0.4}
        for estimator, expected in (("unbiased", -0.140184), ("biased", 0.142408)):
            value = kernel_calibration_error(probs, target=target, estimator=estimator, **options)
            assert value == pytest.approx(expected, abs=1e-6)
        block = kernel_calibration_error(probs, target=target, block_size=2, **options)
        assert block == pytest.approx(-0.140184, abs=1e-6)
        assert mmce(probs, target=target) == pytest.approx(0.377370, abs=1e-6)

    def test_one_hot(self):
        # Residuals (-1, 1), (1, -1) and 0: at distance sqrt(2), and the products are -2 and 0.
        probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        target = torch.tensor([1, 0, 0])
        far = math.exp(-math.sqrt(2) / 0.5)
        options = {"bandwidth": 0.5}
        value = kernel_calibration_error(probs, target=target, estimator="unbiased", **options)
        assert value == pytest.approx(-2 * far / 3, abs=1e-15)
        value = kernel_calibration_error(probs, target=target, estimator="biased", **options)
        assert value == pytest.approx((4 - 4 * far) / 9, abs=1e-15)

    def test_always_right(self):
        probs, target = torch.eye(3), torch.arange(3)
        for estimator, calibration in COMBINATIONS:
            options = {"estimator": estimator, "calibration": calibration, "block_size": 2}
            assert kernel_calibration_error(probs, target=target, **options) == 0
        assert mmce(probs, target=target) == 0

    @pytest.mark.parametrize("estimator", kernel.ESTIMATORS)
    def test_always_wrong(self, estimator):
        probs, target = torch.eye(2)[[0] * 6], torch.ones(6).long()
        options = {"estimator": estimator, "block_size": 3}
        assert kernel_calibration_error(probs, target=target, **options) == 2
        options["calibration"] = "top-label"
        assert kernel_calibration_error(probs, target=target, **options) == 1
        assert mmce(probs, target=target) == 1

    def test_too_few_samples(self):
        empty = torch.zeros(0, 2), torch.zeros(0).long()
        single = torch.tensor([[0.75, 0.25]]), torch.tensor([0])
        for estimator, calibration in COMBINATIONS:
            options = {"estimator": estimator, "calibration": calibration}
            for probs, target in (empty, single):
                value = kernel_calibration_error(probs, target=target, **options)
                if estimator == "biased" and len(probs):
                    assert value == (0.0625 if calibration == "top-label" else 0.125)
                else:
                    assert math.isnan(value)
            assert math.isnan(KernelCalibrationError(**options).compute())
        assert math.isnan(mmce(empty[0], target=empty[1]))
        assert mmce(single[0], target=single[1]) == 0.25


class TestAgainstLoops:
    @pytest.mark.parametrize(("estimator", "calibration"), COMBINATIONS)
    @pytest.mark.parametrize("bandwidth", [0.01, 0.3, 5.0])
    def test_small(self, estimator, calibration, bandwidth):
        probs, target = random_case(23)
        probs[3] = probs[7]
        expected = loop_skce(probs, target, estimator, calibration, bandwidth, size=5)
        value = kernel_calibration_error(
            probs,
            target=target,
            estimator=estimator,
            calibration=calibration,
            bandwidth=bandwidth,
            block_size=5,
        )
        assert value == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize(("estimator", "calibration"), COMBINATIONS)
    def test_tiles(self, monkeypatch, estimator, calibration):
        probs, target = random_case(41, n_classes=5)
        options = {"estimator": estimator, "calibration": calibration, "block_size": 4}
        expected = kernel_calibration_error(probs, target=target, **options)
        for entries in (1, 37, 300):
            monkeypatch.setattr(kernel, "_PAIRS", entries)
            monkeypatch.setattr(kernel, "_ENTRIES", 2 * entries)
            value = kernel_calibration_error(probs, target=target, **options)
            assert value == pytest.approx(expected, abs=1e-14)

    @pytest.mark.parametrize("bandwidth", [0.01, 0.4])
    def test_sorted_sum_of_many(self, bandwidth):
        probs, target = random_case(1500, scale=6.0)
        probs = torch.cat([probs[:1000], probs[:500]])  # with ties
        confidence, predicted = probs.double().max(1)
        residual = (predicted == target).double() - confidence
        gram = (-(confidence[:, None] - confidence).abs() / bandwidth).exp()
        expected = float(residual @ gram @ residual)
        assert mmce(probs, target=target, bandwidth=bandwidth) == pytest.approx(
            math.sqrt(expected) / 1500, rel=1e-12
        )
        options = {"calibration": "top-label", "bandwidth": bandwidth}
        biased, unbiased = (
            kernel_calibration_error(probs, target=target, estimator=estimator, **options)
            for estimator in ("biased", "unbiased")
        )
        assert biased == pytest.approx(expected / 1500**2, rel=1e-12)
        expected -= float(residual.square().sum())
        assert unbiased == pytest.approx(expected / (1500 * 1499), abs=1e-14)

    def test_equal_rows_are_at_no_distance(self):
        # 1/3 and 1/7 are no float32 numbers: squares and products round in different ways.
        row = torch.tensor([1 / 3, 1 / 7, 1 - 1 / 3 - 1 / 7])
        probs, target = row.repeat(40, 1), torch.zeros(40).long()
        residual = torch.tensor([1.0, 0.0, 0.0]).double() - row.double()
        expected = float(residual @ residual)
        for estimator in kernel.ESTIMATORS:
            options = {"estimator": estimator, "block_size": 8, "bandwidth": 0.01}
            value = kernel_calibration_error(probs, target=target, **options)
            assert value == pytest.approx(expected, rel=1e-12)

    def test_close_rows(self):
        probs, target = random_case(30, n_classes=4)
        probs = (0.25 + 1e-4 * (probs - 0.25)).double().float()
        expected = loop_skce(probs, target, "biased", "full", 0.01)
        options = {"estimator": "biased", "bandwidth": 0.01}
        value = kernel_calibration_error(probs, target=target, **options)
        assert value == pytest.approx(expected, abs=1e-7)


class TestProperties:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 12), st.integers(2, 5), st.integers(0, 10**6))
    def test_relations(self, n, n_classes, seed):
        probs, target = random_case(n, n_classes, seed)
        for calibration, largest in (("full", 2), ("top-label", 1)):
            biased, unbiased, block = (
                kernel_calibration_error(
                    probs, target=target, estimator=estimator, calibration=calibration, block_size=n
                )
                for estimator in ("biased", "unbiased", "block")
            )
            assert 0 <= biased <= largest
            assert block == pytest.approx(unbiased, abs=1e-13)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            shuffled = kernel_calibration_error(
                probs[order], target=target[order], estimator="unbiased", calibration=calibration
            )
            assert shuffled == pytest.approx(unbiased, abs=1e-13)
        biased = kernel_calibration_error(
            probs, target=target, estimator="biased", calibration="top-label", bandwidth=0.2
        )
        assert mmce(probs, target=target, bandwidth=0.2) ** 2 == pytest.approx(biased, abs=1e-14)

    def test_order_of_classes(self):
        probs, target = random_case(50, n_classes=6)
        permutation = torch.tensor([3, 5, 0, 1, 4, 2])
        options = {"estimator": "unbiased"}
        value = kernel_calibration_error(probs, target=target, **options)
        moved = kernel_calibration_error(
            probs[:, permutation], target=permutation.argsort()[target], **options
        )
        assert moved == pytest.approx(value, abs=1e-14)

    def test_two_classes_full_is_twice_top_label(self):
        # p = (c, 1 - c) or mirrored: with one predicted class the residuals are (r, -r).
        confidence = torch.linspace(0.5, 1, 40)[:, None]
        probs, target = torch.cat([confidence, 1 - confidence], 1), torch.arange(40) % 3 // 2
        full = kernel_calibration_error(probs, target=target, estimator="biased", bandwidth=1.0)
        top = kernel_calibration_error(
            probs,
            target=target,
            estimator="biased",
            calibration="top-label",
            bandwidth=1 / math.sqrt(2),
        )
        assert full == pytest.approx(2 * top, rel=1e-6)

    def test_calibrated_and_not(self):
        rng = np.random.default_rng(4)
        probs = torch.tensor(rng.dirichlet([1, 1, 1], size=4000))
        target = (probs.cumsum(1) < torch.tensor(rng.random((4000, 1)))).sum(1)
        sharper = probs.square() / probs.square().sum(1, keepdim=True)
        for calibration in kernel.CALIBRATIONS:
            options = {"calibration": calibration, "block_size": 50}
            assert abs(kernel_calibration_error(probs, target=target, **options)) < 1e-3
            assert kernel_calibration_error(sharper, target=target, **options) > 2e-3


class TestStream:
    @pytest.mark.parametrize(("estimator", "calibration"), COMBINATIONS)
    def test_batches(self, estimator, calibration):
        probs, target = random_case(60)
        options = {"estimator": estimator, "calibration": calibration, "block_size": 7}
        metric = KernelCalibrationError(**options)
        for start, end in ((0, 1), (1, 1), (1, 14), (14, 20), (20, 59), (59, 60)):
            metric.update(probs[start:end], target=target[start:end])
        expected = kernel_calibration_error(probs, target=target, **options)
        assert metric.compute() == pytest.approx(expected, abs=1e-14)
        assert metric.compute() == metric.compute()
        again = KernelCalibrationError(**options).load_state_dict(metric.state_dict())
        assert again.compute() == metric.compute()
        assert again.update(probs[:30], target=target[:30]).compute() != metric.compute()
        assert math.isnan(metric.reset().compute())

    @pytest.mark.parametrize(("estimator", "calibration"), COMBINATIONS)
    def test_merge(self, estimator, calibration):
        probs, target = random_case(60)
        options = {"estimator": estimator, "calibration": calibration, "block_size": 4}
        parts = zip(probs.split([20, 40]), target.split([20, 40]), strict=True)
        metrics = [KernelCalibrationError(**options).update(p, target=t) for p, t in parts]
        merged = KernelCalibrationError(**options).merge(*metrics)
        expected = kernel_calibration_error(probs, target=target, **options)
        assert merged.compute() == pytest.approx(expected, abs=1e-14)

    def test_remainders_make_blocks(self):
        probs, target = random_case(5)
        parts = [
            KernelCalibrationError(block_size=4).update(probs[part], target=target[part])
            for part in (slice(0, 3), slice(3, 5))
        ]
        assert all(math.isnan(metric.compute()) for metric in parts)
        merged = parts[0].merge(parts[1])
        expected = kernel_calibration_error(probs, target=target, block_size=4)
        assert merged.compute() == merged.compute() == pytest.approx(expected, abs=1e-15)
        merged.update(probs[:3], target=target[:3])
        more = torch.cat([probs, probs[:3]]), torch.cat([target, target[:3]])
        expected = kernel_calibration_error(more[0], target=more[1], block_size=4)
        assert merged.compute() == pytest.approx(expected, abs=1e-15)

    def test_state_of_blocks_is_bounded(self):
        probs, target = random_case(1000)
        metric = KernelCalibrationError(block_size=64)
        for _ in range(3):
            metric.update(probs, target=target)
        state = metric.state_dict()
        assert len(state["columns"]["outcome"]) == 3000 % 64
        assert len(state["columns"]["scores"]) == 3000 % 64 * 3
        assert int(state["sums"]["n_blocks"]) == 3000 // 64

    def test_mmce(self):
        probs, target = random_case(60)
        metric, merged = MaximumMeanCalibrationError(), MaximumMeanCalibrationError()
        for part in (slice(0, 13), slice(13, 60)):
            metric.update(probs[part], target=target[part])
            merged.merge(MaximumMeanCalibrationError().update(probs[part], target=target[part]))
        expected = mmce(probs, target=target)
        assert metric.compute() == merged.compute() == pytest.approx(expected, abs=1e-15)

    @pytest.mark.parametrize("estimator", kernel.ESTIMATORS)
    def test_number_of_classes(self, estimator):
        metric = KernelCalibrationError(estimator=estimator)
        metric.update(*random_case(5, 3)[:1], target=random_case(5, 3)[1])
        with pytest.raises(ValueError, match="probs, logits: expected 3 classes, as before, got 4"):
            metric.update(random_case(5, 4)[0], target=random_case(5, 4)[1])
        other = KernelCalibrationError(estimator=estimator)
        other.update(random_case(5, 4)[0], target=random_case(5, 4)[1])
        with pytest.raises(ValueError, match="others: expected 3 classes, as before, got 4"):
            metric.merge(other)

    @pytest.mark.parametrize("estimator", kernel.ESTIMATORS)
    def test_number_of_classes_after_full_blocks(self, estimator):
        def full(n_classes):
            probs, target = random_case(4, n_classes)
            metric = KernelCalibrationError(estimator=estimator, block_size=2)
            return metric.update(probs, target=target), (probs, target)

        (metric, _), (other, batch) = full(3), full(4)
        expected, message = metric.compute(), "expected 3 classes, as before, got 4"
        empty = KernelCalibrationError(estimator=estimator, block_size=2)
        loaded = copy.deepcopy(empty).load_state_dict(metric.state_dict())
        for known in (metric, loaded, copy.deepcopy(empty).merge(metric)):
            with pytest.raises(ValueError, match=f"^probs, logits: {message}"):
                known.update(batch[0], target=batch[1])
            with pytest.raises(ValueError, match=f"^others: {message}"):
                known.merge(other)
            assert known.compute() == expected
        with pytest.raises(ValueError, match=f"^others: {message}"):
            empty.merge(metric, other)
        with pytest.raises(ValueError, match=f"^others: {message}"):
            MetricGroup({"a": metric}).merge(MetricGroup({"a": other}))
        assert math.isnan(empty.compute())
        assert empty.reset().update(batch[0], target=batch[1]).compute() == other.compute()

    def test_state_of_other_classes(self):
        probs, target = random_case(5, 3)
        metric = KernelCalibrationError(block_size=2).update(probs, target=target)
        state = metric.state_dict()
        state["columns"]["n_classes"] = torch.tensor([3, 4])
        with pytest.raises(ValueError, match=r"^state: expected 3 classes, as before, got 4"):
            metric.load_state_dict(state)
        state["columns"]["n_classes"] = torch.tensor([4])
        with pytest.raises(ValueError, match=r"^state: expected \[4\] scores .* got 3 scores"):
            metric.load_state_dict(state)

    def test_classes_of_other_processes(self):
        # What `synced` and torchmetrics make of the columns of several processes.
        metric = KernelCalibrationError(block_size=2).update(torch.eye(2), target=torch.arange(2))
        gathered = Column(torch.int64)
        gathered.append(torch.tensor([2, 3]))
        metric._columns["n_classes"] = gathered
        with pytest.raises(
            ValueError, match=r"^probs, logits: expected 2 classes, as before, got 3"
        ):
            metric.compute(sync=False)


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("estimator", "calibration"), COMBINATIONS)
    def test_dtypes(self, dtype, estimator, calibration):
        probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], dtype=dtype)
        target = torch.tensor([0, 1, 1, 1])
        expected = loop_skce(probs.double(), target, estimator, calibration, 1.0, size=2)
        options = {"estimator": estimator, "calibration": calibration, "block_size": 2}
        value = kernel_calibration_error(probs, target=target, **options)
        assert value == pytest.approx(expected, abs=1e-7)

    def test_arrays_and_logits(self):
        logits = np.array([[1e30, 0.0, -1e30], [2.0, 0.0, -np.inf], [0.0, 1.0, 0.5]])
        target = np.array([1, 1, 2])
        probs = torch.tensor(logits).softmax(1)
        for estimator, calibration in COMBINATIONS:
            options = {"estimator": estimator, "calibration": calibration, "block_size": 2}
            expected = kernel_calibration_error(probs, target=torch.tensor(target), **options)
            value = kernel_calibration_error(logits=logits, target=target, **options)
            assert value == pytest.approx(expected, abs=1e-7)
        expected = mmce(probs, target=torch.tensor(target))
        assert mmce(logits=logits, target=target) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(("estimator", "calibration"), COMBINATIONS)
    def test_nan(self, estimator, calibration):
        probs, target = random_case(4)
        probs = torch.cat([torch.full((1, 3), torch.nan), probs])
        target = torch.cat([torch.tensor([0]), target])
        options = {"estimator": estimator, "calibration": calibration, "block_size": 2}
        with pytest.raises(ValueError, match="1 of 5 rows with NaN or infinity"):
            kernel_calibration_error(probs, target=target, **options)
        value = kernel_calibration_error(probs, target=target, nan="propagate", **options)
        assert math.isnan(value)
        with pytest.warns(MetricWarning, match="1 rows"):
            value = kernel_calibration_error(probs, target=target, nan="omit", **options)
        assert value == kernel_calibration_error(probs[1:], target=target[1:], **options)
        assert math.isnan(mmce(probs, target=target, nan="propagate"))
        with pytest.warns(MetricWarning, match="1 rows"):
            assert mmce(probs, target=target, nan="omit") == mmce(probs[1:], target=target[1:])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"estimator": "linear"}, ValueError, "estimator: expected one of 'block', 'biased'"),
            ({"calibration": "top"}, ValueError, "calibration: expected one of 'full'"),
            ({"bandwidth": 0.001}, ValueError, "bandwidth: expected a number >= 0.01, got 0.001"),
            ({"bandwidth": "median"}, TypeError, "bandwidth: expected a number >= 0.01"),
            ({"block_size": 1}, ValueError, "block_size: expected an integer >= 2, got 1"),
            ({"block_size": 2.0}, TypeError, "block_size: expected an integer >= 2"),
        ],
    )
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            KernelCalibrationError(**options)

    def test_option_of_mmce(self):
        with pytest.raises(ValueError, match=r"bandwidth: expected a number >= 0\.01, got 0"):
            mmce(torch.eye(2), target=torch.tensor([0, 1]), bandwidth=0)

    def test_repr(self):
        expected = "MaximumMeanCalibrationError(bandwidth=0.4, nan='raise')"
        assert repr(MaximumMeanCalibrationError()) == expected


def test_a_refused_batch_changes_nothing():
    metric = KernelCalibrationError(block_size=4, nan="omit")
    metric.update(torch.eye(3), target=torch.arange(3))
    state = str(metric.state_dict())
    scores = torch.eye(5)
    scores[0] = torch.nan
    with pytest.raises(ValueError, match="probs, logits: expected 3 classes, as before, got 5"):
        metric.update(scores, target=torch.arange(5))
    assert str(metric.state_dict()) == state
    assert metric.n_faulty == 0
