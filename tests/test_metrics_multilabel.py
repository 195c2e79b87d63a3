"""Multi-label metrics against scikit-learn and plain loops."""

import io
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import MetricWarning
from calibclip.metrics._predictions import Faults
from calibclip.metrics.multilabel import (
    AveragePrecisions,
    MeanAveragePrecision,
    MultilabelPrecisionRecallF1,
    mean_average_precision,
    multilabel_precision_recall_f1,
)

PARTS = (slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 70))


def images(seed=0, n=70, n_classes=6, coarse=False, unknown=0.0):
    rng = np.random.default_rng(seed)
    target = (rng.random((n, n_classes)) < rng.random(n_classes) * 0.6).astype(np.int64)
    scores = rng.normal(size=(n, n_classes)) + target
    if coarse:
        scores = scores.round()
    target[rng.random((n, n_classes)) < unknown] = -1
    return scores.astype(np.float32), target


def plain_average_precision(scores, labels):
    """Precision and recall at each distinct score, from the largest on."""
    known = labels >= 0
    scores, labels = scores[known], labels[known]
    total, last, area = labels.sum(), 0.0, 0.0
    if total == 0:
        return math.nan
    for bound in sorted(set(scores.tolist()), reverse=True):
        accepted = labels[scores >= bound]
        recall = accepted.sum() / total
        area += (recall - last) * accepted.sum() / len(accepted)
        last = recall
    return area


def plain_predictions(scores, k, threshold):
    """The k largest by index among equal ones, image by image."""
    predicted = np.zeros(scores.shape, bool)
    for row, values in zip(predicted, scores, strict=True):
        order = sorted(range(len(values)), key=lambda c: (-values[c], c))
        for c in order if k is None else order[:k]:
            row[c] = threshold is None or values[c] > scores.dtype.type(threshold)
    return predicted


# Average precision


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 30),
    n_classes=st.integers(1, 6),
    coarse=st.booleans(),
    unknown=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_average_precision_against_a_loop(seed, n, n_classes, coarse, unknown):
    scores, target = images(seed, n, n_classes, coarse, unknown)
    found = mean_average_precision(scores, target)
    expected = [
        plain_average_precision(*columns) for columns in zip(scores.T, target.T, strict=True)
    ]
    np.testing.assert_allclose(found.per_class, expected, rtol=1e-12)
    known = [value for value in expected if not math.isnan(value)]
    assert found.n_left_out == n_classes - len(known)
    mean = sum(known) / len(known) if known else math.nan
    assert found.mean == pytest.approx(mean, nan_ok=True)


@pytest.mark.parametrize("coarse", [False, True])
def test_average_precision_agrees_with_sklearn(coarse):
    scores, target = images(coarse=coarse)
    found = mean_average_precision(scores, target)
    expected = sklearn.metrics.average_precision_score(target, scores, average=None)
    np.testing.assert_allclose(found.per_class, expected, rtol=1e-12)
    macro = sklearn.metrics.average_precision_score(target, scores, average="macro")
    assert found.mean == pytest.approx(macro, rel=1e-12)


def test_average_precision_at_the_edges():
    tied = mean_average_precision(torch.zeros(4, 2), torch.tensor([[1, 1]] + [[0, 1]] * 3))
    assert tied.per_class.tolist() == [0.25, 1.0]
    nothing = mean_average_precision(torch.zeros(0, 3), torch.zeros(0, 3))
    assert math.isnan(nothing.mean)
    assert nothing.n_left_out == 3
    assert np.isnan(nothing.per_class).all()
    one = mean_average_precision(torch.tensor([[1e30, -1e30]]), torch.tensor([[True, False]]))
    assert one.mean == 1.0
    assert one.n_left_out == 1
    assert repr(one) == "AveragePrecisions(mean=1.0000, n_classes=2, n_left_out=1)"
    with pytest.raises(ValueError, match="read-only"):
        one.per_class[0] = 0.0
    empty = MeanAveragePrecision().compute()
    assert math.isnan(empty.mean)
    assert MeanAveragePrecision(n_classes=4).compute().n_left_out == 4


@pytest.mark.parametrize("scores", [[[1.0], [1.0 + 1e-9]], [[1e300], [1e305]]])
def test_scores_are_ranked_as_given_and_in_a_stream_in_float32(scores):
    target, scores = torch.tensor([[0], [1]]), torch.tensor(scores, dtype=torch.float64)
    assert mean_average_precision(scores, target).mean == 1.0
    assert MeanAveragePrecision().update(scores, target).compute().mean == 0.5


def test_scores_of_bfloat16():
    target = torch.tensor([[0], [1]])
    bfloat16 = torch.tensor([[0.5], [0.75]], dtype=torch.bfloat16)
    assert mean_average_precision(bfloat16, target).mean == 1.0


def test_the_array_of_the_caller_stays_writable():
    values = np.array([0.5, 1.0])
    record = AveragePrecisions(0.75, values, 0)
    values[0] = 0.25
    assert record.per_class.tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        record.per_class[0] = 0.0


# Precision, recall, F1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 20),
    n_classes=st.integers(1, 6),
    coarse=st.booleans(),
    unknown=st.sampled_from([0.0, 0.3, 1.0]),
    rule=st.sampled_from([(1, None), (3, None), (9, None), (None, 0.0), (2, 0.1), (None, 9.0)]),
)
def test_precision_and_recall_against_a_loop(seed, n, n_classes, coarse, unknown, rule):
    scores, target = images(seed, n, n_classes, coarse, unknown)
    k, threshold = rule
    found = multilabel_precision_recall_f1(scores, target, k, threshold=threshold)
    predicted = plain_predictions(scores, k, threshold) & (target >= 0)
    hits, m, p = (predicted & (target == 1)).sum(0), predicted.sum(0), (target == 1).sum(0)
    known = [c for c in range(n_classes) if p[c] > 0]
    assert found.n_left_out == n_classes - len(known)
    if not known:
        assert all(math.isnan(value) for value in found[1:6])
        assert found.overall_precision == 0.0 if m.sum() else math.isnan(found.overall_precision)
        return
    op = hits.sum() / m.sum() if m.sum() else 0.0
    cp = sum(hits[c] / m[c] if m[c] else 0.0 for c in known) / len(known)
    r, cr = hits.sum() / p.sum(), sum(hits[c] / p[c] for c in known) / len(known)
    f1 = [2 * a * b / (a + b) if a + b else 0.0 for a, b in ((op, r), (cp, cr))]
    assert found[:6] == pytest.approx((op, r, f1[0], cp, cr, f1[1]), rel=1e-12)


@pytest.mark.parametrize("rule", [(2, None), (None, 0.5)])
def test_precision_and_recall_agree_with_sklearn(rule):
    scores, target = images()
    target[:, 4] = 0
    found = multilabel_precision_recall_f1(scores, target, rule[0], threshold=rule[1])
    predicted = plain_predictions(scores, *rule)
    for average, start, labels in (("micro", 0, None), ("macro", 3, [0, 1, 2, 3, 5])):
        precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
            target, predicted, average=average, labels=labels, zero_division=0
        )
        assert found[start : start + 2] == pytest.approx((precision, recall), rel=1e-12)
        if average == "micro":
            assert found.overall_f1 == pytest.approx(f1, rel=1e-12)
    assert found.n_left_out == 1


def test_of_equal_scores_the_lowest_class_is_predicted():
    n_classes = 40  # enough for torch.topk and unstable sorts to take others
    for k in (1, 3, 39):
        target = torch.zeros(1, n_classes)
        target[0, :k] = 1
        scores = torch.zeros(1, n_classes)
        assert multilabel_precision_recall_f1(scores, target, k).overall_f1 == 1.0


def test_unknown_labels_count_neither_way_but_keep_their_place():
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    found = multilabel_precision_recall_f1(scores, torch.tensor([[-1, 1, 1]]), k=2)
    assert found[:2] == (1.0, 0.5)


def test_a_score_at_the_threshold_is_not_above_it():
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([[0.7, 0.8]], dtype=dtype)
        found = multilabel_precision_recall_f1(scores, torch.ones(1, 2), None, threshold=0.7)
        assert found.overall_recall == 0.5


# Both


BOTH = {
    "map": (MeanAveragePrecision, mean_average_precision),
    "top-k": (MultilabelPrecisionRecallF1, multilabel_precision_recall_f1),
    "threshold": (
        lambda **options: MultilabelPrecisionRecallF1(None, threshold=0.5, **options),
        lambda *given, **options: multilabel_precision_recall_f1(
            *given, None, threshold=0.5, **options
        ),
    ),
}
both = pytest.mark.parametrize("name", BOTH)


def numbers(value):
    return value.per_class if hasattr(value, "per_class") else np.array(value)


def assert_same(found, expected):
    np.testing.assert_array_equal(numbers(found), numbers(expected))


@both
@pytest.mark.parametrize("n_classes", [None, 6])
def test_stream(name, n_classes):
    make, function = BOTH[name]
    scores, target = images(coarse=True, unknown=0.1)
    whole = function(scores, target)
    metrics = [make(n_classes=n_classes) for _ in range(4)]
    for rows, metric in zip(PARTS, (metrics[0], metrics[2], metrics[2], metrics[3]), strict=True):
        metric.update(torch.tensor(scores[rows]), target[rows])
    # One of them has seen nothing; one starts with nothing.
    merged = make(n_classes=n_classes).merge(*metrics)
    assert_same(merged.compute(), whole)
    buffer = io.BytesIO()
    torch.save(merged.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(n_classes=n_classes).load_state_dict(torch.load(buffer))
    assert_same(loaded.compute(), whole)
    assert_same(
        loaded.update(scores, target).compute(),
        function(*map(np.tile, *zip((scores, (2, 1)), (target, (2, 1)), strict=True))),
    )
    assert n_classes is None or f"n_classes={n_classes}" in repr(loaded)


@both
def test_a_mean_over_batches_is_another_number(name):
    _, function = BOTH[name]
    scores, target = images()
    whole = numbers(function(scores, target))
    parts = [numbers(function(scores[rows], target[rows])) for rows in (slice(35), slice(35, 70))]
    assert np.abs(whole - np.mean(parts, axis=0)).max() > 1e-3


@both
def test_order_and_kind_do_not_matter(name):
    _, function = BOTH[name]
    scores, target = images(coarse=True)
    whole = function(scores, target)
    order = np.random.default_rng(1).permutation(len(scores))
    np.testing.assert_allclose(numbers(function(scores[order], target[order])), numbers(whole))
    given = torch.tensor(scores, requires_grad=True), torch.tensor(target)
    for labels in (given[1], given[1].bool(), given[1].float(), given[1].to(torch.int8)):
        assert_same(function(given[0], labels), whole)
    assert_same(function(given[0].double().bfloat16(), given[1]), whole)
    assert_same(function(torch.tensor(scores.T.copy()).T, np.asfortranarray(target)), whole)
    assert np.array_equal(given[1].numpy(), target)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_policy_for_nan(name, bad):
    _, function = BOTH[name]
    scores, target = images()
    broken = scores.copy()
    broken[[2, 5], [0, 3]] = bad
    kept = [i for i in range(70) if i not in (2, 5)]
    with pytest.raises(ValueError, match=r"^scores: expected finite values, got 2 of 70 rows"):
        function(broken, target)
    with pytest.warns(MetricWarning, match="2 rows with NaN or infinity were left out"):
        found = function(broken, target, nan="omit")
    assert_same(found, function(scores[kept], target[kept]))
    propagated = function(broken, target, nan="propagate")
    assert math.isnan(propagated.mean if name == "map" else propagated.overall_f1)


@both
def test_empty_does_not_warn(name):
    make, function = BOTH[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = make().compute(), function(torch.zeros(0, 2), torch.zeros(0, 2))
    assert all(np.isnan(numbers(value)[:6]).all() for value in values)


@both
@pytest.mark.parametrize(
    ("scores", "target", "error", "message"),
    [
        ([[0.5]], torch.ones(1, 1), TypeError, "scores: expected a floating-point tensor"),
        (torch.ones(1, 1).int(), torch.ones(1, 1), TypeError, "scores: expected a floating-point"),
        (torch.ones(2), torch.ones(2), ValueError, r"scores: expected .* of shape \(N, K\), got"),
        (torch.ones(1, 0), torch.ones(1, 0), ValueError, "scores: expected .* the last size >= 1"),
        (torch.ones(2, 2), [[1, 0]], TypeError, "target: expected bool, or 1, 0 and -1"),
        (torch.ones(2, 2), torch.ones(2), ValueError, r"target: .* of shape \(2, 2\), got float32"),
        (torch.ones(1, 2), torch.tensor([[1, 2]]), ValueError, "target: .* got 1 other values"),
        (torch.ones(1, 2), torch.tensor([[0.5, 1]]), ValueError, "target: .* got 1 other values"),
        (torch.ones(1, 1), torch.tensor([[math.nan]]), ValueError, "target: .* got 1 other values"),
    ],
)
def test_refuses(name, scores, target, error, message):
    with pytest.raises(error, match=f"^{message}"):
        BOTH[name][1](scores, target)


@both
def test_an_accelerator_is_not_waited_for(name):
    # A look at a tensor without values raises.
    metric = BOTH[name][0]()
    scores = torch.ones(3, 2, device="meta")
    assert metric.update(scores, scores) is metric


@both
def test_refuses_other_classes(name):
    make, _ = BOTH[name]
    metric = make().update(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^scores: expected 2 classes, as before, got 3"):
        metric.update(torch.ones(1, 3), torch.ones(1, 3))
    other = make().update(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"^others: expected 2 classes, as before, got 3"):
        metric.merge(other)
    with pytest.raises(ValueError, match=r"^n_classes: expected an integer >= 1, got 0"):
        make(n_classes=0)


@both
def test_labels_that_an_accelerator_reports_late(name):
    metric = BOTH[name][0]()
    metric.count_faults(Faults.none()._replace(mislabelled=torch.tensor(3)))
    with pytest.raises(ValueError, match=r"^target: expected bool, or 1, 0 and -1, got 3 that"):
        metric.compute()


def test_refuses_options():
    scores, target = torch.ones(1, 2), torch.ones(1, 2)
    with pytest.raises(TypeError, match=r"^k, threshold: expected at least one of the two"):
        multilabel_precision_recall_f1(scores, target, None)
    with pytest.raises(ValueError, match=r"^k: expected an integer >= 1, got 0"):
        multilabel_precision_recall_f1(scores, target, 0)
    with pytest.raises(ValueError, match=r"^threshold: expected a number, got nan"):
        multilabel_precision_recall_f1(scores, target, threshold=math.nan)
    with pytest.raises(ValueError, match=r"^nan: expected one of"):
        mean_average_precision(scores, target, nan="keep")
