"""What all metrics accept and refuse."""

import math
import re

import numpy as np
import pytest
import torch

from calibclip import metrics
from calibclip.metrics._predictions import read_binary, read_confidence, read_predictions

METRICS = [
    metrics.accuracy,
    metrics.negative_log_likelihood,
    metrics.brier_score,
    metrics.expected_calibration_error,
    metrics.maximum_calibration_error,
    lambda *args, **kwargs: metrics.reliability_table(*args, **kwargs).mean_confidence,
]
NAMES = ["accuracy", "nll", "brier", "ece", "mce", "table"]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=NAMES)

LOGITS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3
PROBS = LOGITS.softmax(dim=1)
TARGET = torch.arange(40) % 5


def message(text):
    return "^" + re.escape(text)


@every_metric
class TestAgreement:
    def test_numpy_torch_and_mixed(self, metric):
        expected = metric(probs=PROBS, target=TARGET)
        assert type(expected) is float
        assert metric(probs=PROBS.numpy(), target=TARGET.numpy()) == expected
        assert metric(probs=PROBS.numpy(), target=TARGET) == expected
        assert metric(PROBS, None, TARGET.numpy()) == expected

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
    def test_integer_targets(self, metric, dtype):
        expected = metric(logits=LOGITS, target=TARGET)
        assert metric(logits=LOGITS, target=TARGET.to(dtype)) == expected
        assert metric(logits=LOGITS, target=TARGET.to(dtype).numpy()) == expected

    @pytest.mark.parametrize("dtype", ["uint16", "uint64", ">i4"])
    def test_numpy_only_targets(self, metric, dtype):
        expected = metric(logits=LOGITS, target=TARGET)
        assert metric(logits=LOGITS, target=TARGET.numpy().astype(dtype)) == expected

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_equals_its_upcast(self, metric, dtype):
        half = LOGITS.to(dtype)
        assert metric(logits=half, target=TARGET) == metric(logits=half.float(), target=TARGET)
        half = PROBS.to(dtype)
        assert metric(probs=half, target=TARGET) == pytest.approx(
            metric(probs=PROBS, target=TARGET), abs=0.05
        )

    @pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", "longdouble"])
    def test_numpy_floats(self, metric, dtype):
        logits = LOGITS.numpy().astype(dtype)
        expected = metric(logits=LOGITS, target=TARGET)
        tolerance = 1e-2 if dtype == "float16" else 1e-6
        assert metric(logits=logits, target=TARGET) == pytest.approx(expected, abs=tolerance)

    def test_layout_does_not_matter(self, metric):
        expected = metric(logits=LOGITS, target=TARGET)
        assert metric(logits=LOGITS.T.contiguous().T, target=TARGET) == expected
        doubled = torch.stack([LOGITS, LOGITS.flip(0)], dim=1)
        assert metric(logits=doubled[:, 0], target=torch.stack([TARGET, TARGET], 1)[:, 0]) == (
            expected
        )
        backwards, targets = LOGITS.numpy()[::-1], TARGET.numpy()[::-1]
        assert metric(logits=backwards, target=targets) == pytest.approx(expected, abs=1e-12)

    def test_softmax_is_the_same_prediction(self, metric):
        expected = metric(probs=LOGITS.double().softmax(dim=1), target=TARGET)
        assert metric(logits=LOGITS.double(), target=TARGET) == pytest.approx(expected, rel=1e-12)

    def test_inputs_stay_as_they_are(self, metric):
        logits = LOGITS.clone().requires_grad_()
        probs, target = PROBS.numpy().copy(), TARGET.clone()
        probs.setflags(write=False)
        metric(logits=logits, target=target)
        metric(probs=probs, target=target)
        assert torch.equal(logits, LOGITS)
        assert logits.grad is None
        assert torch.equal(target, TARGET)
        assert np.array_equal(probs, PROBS.numpy())

    def test_one_sample(self, metric):
        assert np.isfinite(metric(logits=LOGITS[:1], target=TARGET[:1]))

    def test_no_samples(self, metric):
        nothing, no_target = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
        assert np.isnan(metric(logits=nothing, target=no_target))
        assert np.isnan(metric(probs=nothing.numpy(), target=no_target.numpy()))

    def test_masked_class(self, metric):
        masked = torch.cat([LOGITS, torch.full((40, 1), -torch.inf)], dim=1)
        # One class more of probability 0 changes none of the metrics.
        assert metric(logits=masked, target=TARGET) == pytest.approx(
            metric(logits=LOGITS, target=TARGET), rel=1e-6
        )


@every_metric
class TestRefusals:
    def test_both_or_neither(self, metric):
        start = "probs, logits: expected exactly one of the two, got "
        end = "; name the arguments: probs= or logits=, and target="
        with pytest.raises(TypeError, match=message(start + "neither" + end)):
            metric(target=TARGET)
        with pytest.raises(TypeError, match=message(start + "both" + end)):
            metric(probs=PROBS, logits=LOGITS, target=TARGET)
        with pytest.raises(TypeError, match=message(start + "both" + end)):
            metric(PROBS, TARGET)

    def test_missing_target(self, metric):
        expected = "target: expected integer class indices of shape (40,), got nothing; "
        with pytest.raises(TypeError, match=message(expected + "pass target=")):
            metric(probs=PROBS)

    @pytest.mark.parametrize("argument", ["probs", "logits"])
    def test_scores_must_be_a_floating_matrix(self, metric, argument):
        start = f"{argument}: expected a floating-point tensor of shape (N, K), got "
        with pytest.raises(TypeError, match=message(start + "list [[0.5, 0.5]]")):
            metric(**{argument: [[0.5, 0.5]]}, target=TARGET)
        with pytest.raises(TypeError, match=message(start + "int64 tensor of shape (1, 2)")):
            metric(**{argument: np.array([[0, 1]])}, target=TARGET)
        with pytest.raises(TypeError, match=message(start + "object array of shape (1, 2)")):
            metric(**{argument: np.array([[0, None]])}, target=TARGET)
        with pytest.raises(ValueError, match=message(start + "float32 tensor of shape (40,)")):
            metric(**{argument: PROBS[:, 0]}, target=TARGET)

    def test_at_least_two_classes(self, metric):
        with pytest.raises(
            ValueError,
            match=message(
                "probs: expected shape (N, K) with K >= 2, got float32 tensor of shape (40, 1); "
                "for a two-class score s pass torch.stack([1 - s, s], dim=1)"
            ),
        ):
            metric(probs=PROBS[:, :1], target=TARGET)

    def test_target_type(self, metric):
        start = "target: expected integer class indices of shape (40,), got "
        end = "; convert it to int64"
        with pytest.raises(TypeError, match=message(start + "float32 tensor of shape (40,)" + end)):
            metric(probs=PROBS, target=TARGET.float())
        with pytest.raises(TypeError, match=message(start + "float64 array of shape (40,)" + end)):
            metric(probs=PROBS, target=TARGET.double().numpy())
        with pytest.raises(TypeError, match=message(start + "bool tensor of shape (40,)" + end)):
            metric(probs=PROBS, target=TARGET > 0)
        with pytest.raises(TypeError, match=message(start + "list [0]")):
            metric(probs=PROBS, target=[0])

    def test_target_shape_and_range(self, metric):
        start = "target: expected a tensor of int64 class indices of shape (40,), got "
        with pytest.raises(ValueError, match=message(start + "int64 tensor of shape (39,)")):
            metric(probs=PROBS, target=TARGET[1:])
        with pytest.raises(ValueError, match=message(start + "int64 tensor of shape (40, 5)")):
            metric(probs=PROBS, target=torch.zeros(40, 5, dtype=torch.int64))
        start = "target: expected class indices in [0, 4], got "
        with pytest.raises(ValueError, match=message(start + "5")):
            metric(probs=PROBS, target=TARGET + 1)
        with pytest.raises(ValueError, match=message(start + "-1")):
            metric(probs=PROBS, target=(TARGET - 1).numpy())

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_not_finite(self, metric, bad):
        logits, probs = LOGITS.clone(), PROBS.clone()
        logits[3, 1] = logits[3, 2] = logits[7, 0] = bad
        probs[3, 1] = probs[9, 0] = bad
        expected = "logits: expected finite logits, or -inf for a masked class, got 2 of 40 rows"
        with pytest.raises(ValueError, match=message(expected + " with NaN or +inf")):
            metric(logits=logits, target=TARGET)
        expected = "probs: expected finite values, got 2 of 40 rows with NaN or infinity"
        with pytest.raises(ValueError, match=message(expected)):
            metric(probs=probs, target=TARGET)

    def test_all_classes_masked(self, metric):
        logits = LOGITS.clone()
        logits[5] = -torch.inf
        expected = "logits: expected at least one class above -inf in every row, got 1 of 40 rows"
        with pytest.raises(ValueError, match=message(expected + " of -inf only")):
            metric(logits=logits, target=TARGET)

    def test_logits_or_cosines_given_as_probs(self, metric):
        with pytest.raises(
            ValueError,
            match=message(
                "probs: expected rows of probabilities in [0, 1] that sum to 1 within 0.0001, got "
                "1 of 2 rows that do not fit, first row 1 with minimum -1 and sum 1; "
                "if these are logits pass logits="
            ),
        ):
            metric(probs=torch.tensor([[0.5, 0.5], [2.0, -1.0]]), target=torch.tensor([0, 1]))
        cosines = torch.full((2, 3), 0.25)  # in [0, 1], as CLIP's often are
        with pytest.raises(ValueError, match=r"2 of 2 rows .* sum 0\.75; if these are logits pass"):
            metric(probs=cosines, target=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("dtype", "off", "fits"),
    [
        (torch.float64, 0.9e-4, True),
        (torch.float64, 1.1e-4, False),
        (torch.float32, 0.9e-4, True),
        (torch.float32, 1.1e-4, False),
        (torch.float16, 0.9e-3, True),
        (torch.float16, 2e-3, False),
        (torch.bfloat16, 4e-3, True),
        (torch.bfloat16, 1.6e-2, False),
    ],
)
def test_row_sum_tolerance_follows_the_dtype(dtype, off, fits):
    probs, target = torch.tensor([[0.75, 0.25 + off]], dtype=dtype), torch.tensor([0])
    if fits:
        metrics.accuracy(probs, target=target)
    else:
        with pytest.raises(ValueError, match=r"^probs: expected rows of probabilities"):
            metrics.accuracy(probs, target=target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_classes", [2, 3, 7, 1000])
def test_rounded_probabilities_are_accepted(dtype, n_classes):
    uniform = torch.full((1, n_classes), 1 / n_classes, dtype=torch.float64)
    logits = torch.randn(50, n_classes, generator=torch.Generator().manual_seed(1)).double()
    probs = torch.cat([uniform, logits.softmax(1), (5 * logits).softmax(1)]).to(dtype)
    accuracy = metrics.accuracy(probs, target=torch.zeros(101, dtype=torch.int64))
    assert accuracy == pytest.approx(float((probs.argmax(1) == 0).double().mean()))


def test_top_label_takes_the_lowest_of_equal_classes():
    probs = torch.tensor([[0.4, 0.2, 0.4], [0.2, 0.4, 0.4], [0.5, 0.25, 0.25]])
    target = torch.tensor([0, 2, 1])
    predictions = read_predictions(probs, None, target)
    confidence, correct = predictions.confidence, predictions.correct
    assert confidence.tolist() == pytest.approx([0.4, 0.4, 0.5])
    assert correct.tolist() == [True, False, False]
    correct = read_predictions(None, torch.zeros(3, 3), target).correct
    assert correct.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_tell_apart_what_saturates(dtype):
    logits = torch.tensor(
        [[0.0, 1.0, -1.0], [20.0, 0.0, 0.0], [60.0, 0.0, 1.0], [150.0, 0.0, 0.0], [200.0, 0.0, 0.0],
         [0.0, 1e4, 5.0], [3.0, -torch.inf, -torch.inf]], dtype=dtype,
    )  # fmt: skip
    found = read_predictions(None, logits, torch.zeros(7, dtype=torch.int64)).log_odds
    expected = []
    for row in logits.tolist():
        *others, top = sorted(row)
        largest = max(others)
        if largest == -math.inf:
            expected.append(math.inf)
            continue
        total = math.fsum(math.exp(z - largest) for z in others)
        expected.append(top - largest - math.log(total))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    probs = read_predictions(torch.tensor([[1.0, 1e-9]]), None, torch.tensor([0]))
    assert float(probs.log_odds) == pytest.approx(math.log(1e9), rel=1e-6)


def test_predicted_class_is_read_off_the_logits():
    logits = torch.tensor([[0.0, 1e-9]])  # so close that their probabilities are the same float32
    assert torch.equal(*logits.softmax(1).unbind(1))
    assert metrics.accuracy(logits=logits, target=torch.tensor([1])) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_probability_above_one_by_rounding_is_one_everywhere(dtype):
    off = max(5e-5, torch.finfo(dtype).eps)
    probs, one = torch.tensor([1 + off, 0.5], dtype=dtype), torch.ones(1)
    rows = torch.stack([probs, 1 - probs], dim=1).clamp(min=0)
    predictions = read_predictions(rows, None, torch.tensor([0, 0]))
    confidence, outside = read_confidence("confidence", probs)
    binary, _, _ = read_binary(probs, torch.tensor([1, 0]))
    for found in (predictions.confidence, confidence, binary):
        assert found.tolist() == [1.0, 0.5]
    assert not outside.any()
    assert metrics.reliability_table(rows[:1], target=one.long() - 1).confidence[-1] == 1.0
    assert metrics.binary_reliability_table(probs[:1], one).confidence[-1] == 1.0
    # More than rounding can do is refused, and what is not finite passes to the policy for it.
    with pytest.raises(ValueError, match=r"^probs: expected prob.* got 1 of 2 rows outside; apply"):
        read_binary(probs + torch.tensor([off + 1e-4, 0]), torch.tensor([1, 0]))
    passed, outside = read_confidence("confidence", torch.tensor([torch.nan, torch.inf]))
    assert not passed.isfinite().any()
    assert not outside.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_metric
def test_device_does_not_matter(metric):
    expected = metric(logits=LOGITS, target=TARGET)
    assert metric(logits=LOGITS.cuda(), target=TARGET.cuda()) == pytest.approx(expected, rel=1e-6)
    assert metric(logits=LOGITS.cuda(), target=TARGET.numpy()) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"^target: expected class indices in"):
        metric(logits=LOGITS.cuda(), target=TARGET.cuda() + 1)
