import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from calibclip.metrics import (
    MetricWarning,
    binary_reliability_table,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_table,
    signed_calibration_error,
)
from calibclip.metrics._table import bin_sums, tabulate

COLUMNS = ["lower", "upper", "count", "confidence", "accuracy", "gap", "ci_lower", "ci_upper"]


def table_of(confidence, correct, n_bins, dtype=torch.float32):
    """Table from confidences and correctness, entering after the top-label stage."""
    confidence = torch.as_tensor(confidence, dtype=dtype)
    return tabulate(bin_sums(confidence, torch.as_tensor(correct).bool(), n_bins))


def random_case(seed, n=300, n_classes=5, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, n_classes)) * scale, rng.integers(n_classes, size=n)


class TestOptions:
    def test_left_closed_bins(self):
        confidence, correct = torch.tensor([0.5, 0.9]), torch.tensor([False, True])
        left = tabulate(bin_sums(confidence, correct, 2, "left"))
        assert left.ece == pytest.approx(0.2, abs=1e-7)
        assert left.count.tolist() == [0, 2]
        probs, target = torch.tensor([[0.5, 0.5], [0.1, 0.9]]), torch.tensor([1, 1])
        options = {"probs": probs, "target": target, "n_bins": 2}
        assert expected_calibration_error(**options, closed="left") == pytest.approx(0.2, abs=1e-7)
        assert expected_calibration_error(**options) == pytest.approx(0.3, abs=1e-7)
        assert expected_calibration_error(**options, norm=2) == pytest.approx(0.360555, abs=1e-6)

    def test_norms(self):
        probs, target = torch.tensor([0.25, 0.25, 0.55, 0.75, 0.75]), torch.tensor([0, 0, 1, 1, 1])
        table = binary_reliability_table(probs, target, n_bins=2)
        errors = [table.error(norm) for norm in (1, 2, math.inf)]
        assert errors == pytest.approx([0.29, 0.291833, 0.316667], abs=1e-6)
        assert table.over_confidence + table.under_confidence == pytest.approx(table.ece)

    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
    def test_equal_mass_keeps_ties_together(self, order):
        confidence = torch.tensor([0.6, 0.6, 0.6, 0.9])[order]
        correct = torch.tensor([True, True, False, True])[order]
        table = binary_reliability_table(confidence, correct, n_bins=2, binning="mass")
        assert table.ece == pytest.approx(0.075, abs=1e-7)
        assert table.count.tolist() == [3, 1]
        assert table.lower.tolist() == pytest.approx([0, 0.6])
        assert table.upper.tolist() == pytest.approx([0.6, 1.0])

    def test_debiased(self):
        def one_bin(confidence, correct):
            return binary_reliability_table(torch.full((4,), confidence), correct, n_bins=1)

        table = one_bin(0.9, torch.tensor([1, 0, 0, 1]))
        assert table.error(2) == pytest.approx(0.4, abs=1e-6)
        assert table.error(2, debias=True, squared=True) == pytest.approx(0.0766667, abs=1e-6)
        assert table.error(2, debias=True) == pytest.approx(0.276888, abs=1e-6)
        table = one_bin(0.8, torch.tensor([1, 1, 1, 0]))
        assert table.error(2, debias=True, squared=True) == pytest.approx(-0.06, abs=1e-6)
        assert table.error(2, debias=True) == 0.0
        assert one_bin(0.8, torch.ones(4)).error(1, debias=True) == pytest.approx(0.2, abs=1e-7)

    def test_debiased_l1_is_the_expectation_over_accuracies(self):
        rng = np.random.default_rng(0)
        probs, target = rng.uniform(size=60), rng.integers(2, size=60)
        table = binary_reliability_table(probs, target, n_bins=4)
        spread = np.sqrt(table.accuracy * (1 - table.accuracy) / table.count)
        draws = table.gap[:, None] + spread[:, None] * rng.normal(size=(4, 400_000))
        inflated = table.count / 60 @ np.abs(draws).mean(1)
        assert table.error(1, debias=True) == pytest.approx(2 * table.ece - inflated, abs=1e-3)

    def test_debiasing_takes_the_error_of_a_calibrated_model_to_zero(self):
        rng = np.random.default_rng(1)
        squares, plain = [], []
        for _ in range(2000):
            probs = rng.uniform(size=50)
            table = binary_reliability_table(probs, rng.uniform(size=50) < probs, n_bins=5)
            squares.append(table.error(2, debias=True, squared=True))
            plain.append(table.error(2) ** 2)
        # Inside a bin the probabilities differ, which the debiasing does not know of: within 5 %.
        assert abs(np.mean(squares)) < 0.05 * np.mean(plain)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"norm": 3}, "norm: expected 1, 2 or math.inf, got int 3"),
            ({"norm": True}, "norm: expected 1, 2 or math.inf, got bool True"),
            ({"norm": math.inf, "debias": True}, "debias: expected False with norm=inf"),
            ({"squared": True}, "squared: expected False with norm=1"),
            ({"binning": "rank"}, "binning: expected one of 'width', 'mass', got 'rank'"),
            ({"closed": "both"}, "closed: expected one of 'right', 'left', got 'both'"),
            ({"closed": "left", "binning": "mass"}, "closed: expected 'right' with binning='mass'"),
            ({"nan": "skip"}, "nan: expected one of 'raise', 'omit', 'propagate', got 'skip'"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(torch.eye(2), target=torch.tensor([0, 1]), **options)

    def test_min_count(self):
        probs = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
        options = {"probs": probs, "target": torch.tensor([0, 0, 0, 1])}
        assert maximum_calibration_error(**options) == pytest.approx(0.6)
        assert maximum_calibration_error(**options, min_count=2) == pytest.approx(0.1)
        assert math.isnan(maximum_calibration_error(**options, min_count=4))

    def test_intervals(self):
        probs = torch.tensor([[0.75, 0.25]] * 4)
        target = torch.tensor([0, 0, 0, 1])
        wilson = reliability_table(probs, target=target, n_bins=1)
        exact = reliability_table(probs, target=target, n_bins=1, interval="clopper-pearson")
        assert [*wilson.ci_lower, *wilson.ci_upper] == pytest.approx([0.300642, 0.954413], abs=1e-6)
        assert [*exact.ci_lower, *exact.ci_upper] == pytest.approx([0.194120, 0.993691], abs=1e-6)
        for hits in (0, 4):
            target = torch.tensor([0] * hits + [1] * (4 - hits))
            table = reliability_table(probs, target=target, n_bins=2, interval="clopper-pearson")
            expected = binomtest(hits, 4).proportion_ci(method="exact")
            assert (table.ci_lower[1], table.ci_upper[1]) == pytest.approx(tuple(expected))
            assert np.isnan(table.ci_lower[0])
            assert np.isnan(table.ci_upper[0])

    def test_signed(self):
        probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
        terms = signed_calibration_error(probs, target=torch.tensor([0, 1, 0]))
        assert terms == pytest.approx((0.8 / 3, 0.4 / 3, 0.4 / 3), abs=1e-6)

    @pytest.mark.parametrize(
        ("probs", "target", "error", "message"),
        [
            ([0.5], [1], TypeError, "probs: expected a floating-point tensor of shape"),
            (torch.tensor([0.5]), torch.tensor([2]), ValueError, "target: expected bool, or 0 and"),
            (torch.tensor([1.5]), torch.tensor([1]), ValueError, "probs: .*; apply a sigmoid"),
            (torch.tensor([torch.nan]), torch.tensor([1]), ValueError, "1 of 1 rows with NaN"),
            (torch.tensor([0.5]), torch.tensor([1, 0]), ValueError, r"target: .* of shape \(1,\)"),
            (torch.tensor([0.5]), "yes", TypeError, "target: expected bool"),
        ],
    )
    def test_binary_refusals(self, probs, target, error, message):
        with pytest.raises(error, match=message):
            binary_reliability_table(probs, target)

    def test_binary_nan_policies(self):
        probs, target = torch.tensor([0.25, torch.nan]), torch.tensor([False, True])
        with pytest.warns(MetricWarning, match="1 rows with NaN or infinity were left out"):
            table = binary_reliability_table(probs, target, nan="omit")
        assert (table.total, table.ece) == (1, 0.25)
        assert math.isnan(binary_reliability_table(probs, target, nan="propagate").ece)
        assert binary_reliability_table(probs[:0], target[:0]).total == 0


def loop_bins(logits, target, n_bins):
    """Confidences and correctness by bin, written as a loop over samples and bins."""
    bins = [[] for _ in range(n_bins)]
    for row, y in zip(logits, target, strict=True):
        weights = [math.exp(z) for z in row]
        probs = [w / sum(weights) for w in weights]
        confidence = max(probs)
        for b in range(n_bins):
            if b / n_bins < confidence <= (b + 1) / n_bins:
                bins[b].append((confidence, probs.index(confidence) == y))
    return bins


class TestHandValues:
    def test_binary_scores(self):
        table = table_of([0.25, 0.25, 0.55, 0.75, 0.75], [0, 0, 1, 1, 1], n_bins=2)
        assert table.ece == pytest.approx(0.29, abs=1e-7)
        assert table.mce == pytest.approx(0.316667, abs=1e-6)

    def test_confidence_one_is_in_the_last_bin(self):
        table = table_of([0.95, 1.0], [1, 0], n_bins=10)
        assert table.ece == pytest.approx(0.475, abs=1e-7)  # 0.525 with a bin for 1 alone
        assert table.mce == pytest.approx(0.475, abs=1e-7)
        assert table.count.tolist() == [0] * 9 + [2]

    def test_bins_are_closed_on_the_right(self):
        table = table_of([0.5, 0.9], [0, 1], n_bins=2)
        assert table.ece == pytest.approx(0.3, abs=1e-7)  # 0.2 if closed on the left
        assert table.mce == pytest.approx(0.5, abs=1e-7)

    @pytest.mark.parametrize("as_numpy", [False, True])
    def test_three_classes(self, as_numpy):
        probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
        target = torch.tensor([0, 1, 2, 1])
        if as_numpy:
            probs, target = probs.numpy(), target.numpy()
        assert expected_calibration_error(probs, target=target, n_bins=2) == pytest.approx(0.15)
        assert maximum_calibration_error(probs, target=target, n_bins=2) == pytest.approx(0.5)

    def test_two_classes_are_top_label(self):
        # Binary scores .25 .25 .55 .75 .75 as (1 - s, s): the confidences are .75 .75 .55 .75 .75.
        score = torch.tensor([0.25, 0.25, 0.55, 0.75, 0.75])
        probs, target = torch.stack([1 - score, score], dim=1), torch.tensor([0, 0, 1, 1, 1])
        table = reliability_table(probs, target=target, n_bins=2)
        assert table.ece == pytest.approx(0.29, abs=1e-7)
        assert table.count.tolist() == [0, 5]

    def test_all_at_one_confidence(self):
        table = table_of([0.8] * 4, [1, 0, 1, 0], n_bins=15)
        assert table.ece == pytest.approx(0.3, abs=1e-7)

    def test_wilson(self):
        table = table_of([0.9] * 4, [1, 1, 1, 0], n_bins=1)
        assert table.ci_lower[0] == pytest.approx(0.300642, abs=1e-6)
        assert table.ci_upper[0] == pytest.approx(0.954413, abs=1e-6)


class TestEdges:
    @pytest.mark.parametrize("n_bins", range(5, 31))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_confidence_on_an_edge_is_in_the_nominal_bin(self, n_bins, dtype):
        # float32(k / n) is the last value of bin k - 1, its successor the first of bin k.
        edges = torch.tensor([k / n_bins for k in range(1, n_bins)], dtype=dtype)
        every_but_last = [1] * (n_bins - 1) + [0]
        assert table_of(edges, edges > 0, n_bins, dtype).count.tolist() == every_but_last
        above = torch.nextafter(edges, torch.ones_like(edges))
        assert table_of(above, above > 0, n_bins, dtype).count.tolist() == every_but_last[::-1]

    def test_the_same_through_the_public_function(self):
        edges = np.float32([k / 15 for k in range(8, 15)])
        table = reliability_table(np.stack([edges, 1 - edges], 1), target=np.zeros(7, int))
        assert table.count.tolist() == [0] * 7 + [1] * 7 + [0]

    def test_zero_is_in_the_first_bin(self):
        assert table_of([0.0], [0], n_bins=3).count.tolist() == [1, 0, 0]

    def test_rounding_above_one_is_in_the_last_bin(self):
        assert table_of([1 + 2**-20], [1], n_bins=3).count.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_saturated_logits(self, dtype):
        # At CLIP's scale of 100 a softmax of exactly 1 is the common case.
        logits = torch.tensor([[100.0, 0.0], [0.0, 100.0], [90.0, 0.0], [0.0, 80.0]], dtype=dtype)
        table = reliability_table(logits=logits, target=torch.tensor([0, 0, 1, 1]))
        assert table.count.tolist() == [0] * 14 + [4]
        assert (table.ece, table.mce) == (0.5, 0.5)
        assert table.gap[-1] == 0.5  # over-confident is positive

    def test_one_bin(self):
        table = table_of([0.0, 0.5, 1.0], [1, 1, 0], n_bins=1)
        assert table.count.tolist() == [3]
        assert table.ece == pytest.approx(1 / 6)

    def test_counts_are_exact_where_half_precision_is_not(self):
        probs = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16).expand(5000, 2)
        table = reliability_table(probs, target=torch.zeros(5000, dtype=torch.int64))
        assert (table.total, table.ece) == (5000, 0.0)


class TestOracles:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("n_bins", [1, 7, 15])
    def test_loop(self, seed, n_bins):
        logits, target = random_case(seed)
        bins = loop_bins(logits, target, n_bins)
        table = reliability_table(logits=logits, target=target, n_bins=n_bins)

        ece, mce = 0.0, 0.0
        for b, members in enumerate(bins):
            assert table.lower[b] == pytest.approx(b / n_bins)
            assert table.upper[b] == pytest.approx((b + 1) / n_bins)
            assert table.count[b] == len(members)
            if not members:
                continue
            confidence = sum(c for c, _ in members) / len(members)
            hits = sum(a for _, a in members)
            accuracy = hits / len(members)
            assert table.confidence[b] == pytest.approx(confidence, rel=1e-12)
            assert table.accuracy[b] == pytest.approx(accuracy, rel=1e-12)
            assert table.gap[b] == pytest.approx(confidence - accuracy, rel=1e-9)
            interval = binomtest(hits, len(members)).proportion_ci(method="wilson")
            assert table.ci_lower[b] == pytest.approx(interval.low, abs=1e-12)
            assert table.ci_upper[b] == pytest.approx(interval.high, abs=1e-12)
            ece += len(members) / len(target) * abs(confidence - accuracy)
            mce = max(mce, abs(confidence - accuracy))
        given_as = {"logits": logits, "target": target, "n_bins": n_bins}
        assert expected_calibration_error(**given_as) == pytest.approx(ece, rel=1e-12)
        assert maximum_calibration_error(**given_as) == pytest.approx(mce, rel=1e-12)

    @pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 10**6])
    def test_wilson_at_the_ends(self, n):
        for hits in {0, 1, n - 1, n}:
            correct = torch.arange(n) < hits
            table = table_of(torch.full((n,), 0.5), correct, n_bins=1)
            interval = binomtest(hits, n).proportion_ci(method="wilson")
            assert table.ci_lower[0] == pytest.approx(interval.low, abs=1e-12)
            assert table.ci_upper[0] == pytest.approx(interval.high, abs=1e-12)
            assert 0 <= table.ci_lower[0] <= table.accuracy[0] <= table.ci_upper[0] <= 1


class TestTable:
    def test_empty_bins_are_nan_and_count_for_nothing(self):
        table = table_of([0.9, 0.9], [1, 0], n_bins=4)
        assert table.count.tolist() == [0, 0, 0, 2]
        for name in COLUMNS[3:]:
            column = getattr(table, name)
            assert np.isnan(column[:3]).all()
            assert np.isfinite(column[3])
        assert table.ece == table.mce == pytest.approx(0.4)

    def test_no_samples(self):
        table = reliability_table(
            logits=torch.empty(0, 3), target=torch.empty(0, dtype=torch.int64), n_bins=3
        )
        assert table.count.tolist() == [0, 0, 0]
        assert table.total == 0
        values = [table.ece, table.mce, table.mean_accuracy, table.mean_confidence]
        assert np.isnan(values).all()
        assert str(table).endswith("N = 0, ECE = nan, MCE = nan")

    def test_columns(self):
        table = table_of([0.3, 0.9], [1, 0], n_bins=4)
        assert [column.name for column in dataclasses.fields(table)] == COLUMNS
        for name in COLUMNS:
            column = getattr(table, name)
            assert column.shape == (4,)
            assert column.dtype == (np.int64 if name == "count" else np.float64)
        assert (table.n_bins, table.total) == (4, 2)
        assert table.mean_confidence == pytest.approx(0.6)
        assert table.mean_accuracy == 0.5

    def test_immutable(self):
        sums = bin_sums(torch.tensor([0.3, 0.9]), torch.tensor([True, False]), 4)
        table = tabulate(sums)
        with pytest.raises(dataclasses.FrozenInstanceError):
            table.count = None
        for name in COLUMNS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(table, name)[0] = 0
        sums.n_samples.zero_()
        assert table.total == 2

    def test_sums_of_batches_add_up(self):
        confidence = torch.rand(50, generator=torch.Generator().manual_seed(0))
        correct = torch.arange(50) % 3 == 0
        whole = bin_sums(confidence, correct, 6)
        parts = [bin_sums(confidence[s], correct[s], 6) for s in (slice(0, 20), slice(20, 50))]
        for total, first, second in zip(whole, *parts, strict=True):
            torch.testing.assert_close(first + second, total)
        assert [column.dtype for column in whole] == [torch.int64, torch.float64, torch.int64]

    def test_text(self):
        table = table_of([0.5, 0.75, 1.0], [1, 0, 1], n_bins=4)
        assert str(table).splitlines() == [
            " lower   upper  count  confidence  accuracy      gap  ci_lower  ci_upper",
            "0.0000  0.2500      0           -         -        -         -         -",
            "0.2500  0.5000      1      0.5000    1.0000  -0.5000    0.2065    1.0000",
            "0.5000  0.7500      1      0.7500    0.0000  +0.7500    0.0000    0.7935",
            "0.7500  1.0000      1      1.0000    1.0000  +0.0000    0.2065    1.0000",
            "N = 3, ECE = 0.4167, MCE = 0.7500",
        ]
        assert repr(table) == "ReliabilityTable(n_bins=4, total=3, ece=0.4167, mce=0.7500)"

    def test_html(self):
        html = table_of([0.5, 1.0], [1, 0], n_bins=2)._repr_html_()
        assert "<caption>N = 2, ECE = 0.7500, MCE = 1.0000</caption>" in html
        assert "<th>count</th>" in html
        assert html.count("<tr>") == 3
        assert html.count("<td>") == 16


@pytest.mark.parametrize(
    "metric", [expected_calibration_error, maximum_calibration_error, reliability_table]
)
class TestBinCount:
    def test_default_is_fifteen(self, metric):
        logits, target = random_case(0)
        default = metric(logits=logits, target=target)
        assert str(default) == str(metric(logits=logits, target=target, n_bins=15))

    def test_refusals(self, metric):
        logits, target = random_case(0)
        with pytest.raises(ValueError, match=r"^n_bins: expected an integer >= 1, got 0$"):
            metric(logits=logits, target=target, n_bins=0)
        with pytest.raises(TypeError, match=r"^n_bins: expected an integer >= 1, got float 15.0$"):
            metric(logits=logits, target=target, n_bins=15.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    n_classes=st.integers(2, 6),
    n_bins=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_properties(seed, n, n_classes, n_bins, scale, dtype):
    logits, target = random_case(seed, n, n_classes, scale)
    logits = logits.astype(dtype)
    table = reliability_table(logits=logits, target=target, n_bins=n_bins)
    filled = table.count > 0

    assert table.total == n
    assert 0 <= table.ece <= table.mce + 1e-12
    assert table.mce <= 1
    # Means of a bin lie in the bin, up to the rounding of its edges to the compare dtype.
    slack = np.finfo(dtype).eps
    assert (table.confidence >= table.lower - slack)[filled].all()
    assert (table.confidence <= table.upper + slack)[filled].all()
    # Over- and under-confidence: sum_b w_b gap_b = mean confidence - accuracy.
    probs = torch.from_numpy(logits).softmax(1).double()
    signed = (table.count[filled] @ table.gap[filled]) / n
    mean_accuracy = (logits.argmax(1) == target).mean()
    assert signed == pytest.approx(probs.amax(1).mean().item() - mean_accuracy, abs=1e-7)
    assert signed == pytest.approx(table.mean_confidence - table.mean_accuracy, abs=1e-12)

    order = np.random.default_rng(seed).permutation(n)
    shuffled = reliability_table(logits=logits[order], target=target[order], n_bins=n_bins)
    assert np.array_equal(shuffled.count, table.count)
    assert shuffled.ece == pytest.approx(table.ece, abs=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), n_classes=st.integers(2, 6))
def test_class_order_does_not_matter(seed, n, n_classes):
    logits, target = random_case(seed, n, n_classes)  # continuous, so without ties
    probs = torch.from_numpy(logits).softmax(1).numpy()
    classes = np.random.default_rng(seed).permutation(n_classes)
    table = reliability_table(probs, target=target)
    renamed = reliability_table(probs[:, classes], target=np.argsort(classes)[target])
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(renamed, name), getattr(table, name))
