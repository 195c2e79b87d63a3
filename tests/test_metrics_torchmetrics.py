"""The adapter to torchmetrics, and where torchmetrics and this package differ."""

import pickle

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from calibclip import metrics
from calibclip.metrics.torchmetrics import TorchMetric

GENERATOR = torch.Generator().manual_seed(0)
PROBS = torch.randn(80, 6, generator=GENERATOR).mul(2).softmax(1)
TARGET = torch.randint(6, (80,), generator=GENERATOR)


def collection(scores="probs"):
    members = {
        "ece": metrics.ExpectedCalibrationError(),
        "mass": metrics.ExpectedCalibrationError(binning="mass"),
        "classwise": metrics.ClasswiseCalibrationError(n_classes=6),
        "brier": metrics.BrierDecomposition(),
        "table": metrics.Reliability(),
    }
    return MetricCollection({name: TorchMetric(m, scores) for name, m in members.items()})


def check(found):
    assert float(found["ece"]) == pytest.approx(
        metrics.expected_calibration_error(PROBS, target=TARGET), abs=1e-12
    )
    assert float(found["mass"]) == pytest.approx(
        metrics.expected_calibration_error(PROBS, target=TARGET, binning="mass"), abs=1e-12
    )
    assert float(found["classwise"]) == pytest.approx(
        metrics.classwise_calibration_error(PROBS, target=TARGET), abs=1e-12
    )
    terms = metrics.brier_decomposition(PROBS, target=TARGET)
    for name, value in terms._asdict().items():
        # A dict within a collection is flattened, with or without the member's name before it.
        matching = [float(v) for key, v in found.items() if key.endswith(name)]
        assert matching == [pytest.approx(value, abs=1e-12)]
    table = metrics.reliability_table(PROBS, target=TARGET)
    (count,) = [v for key, v in found.items() if key.endswith("count")]
    assert count.tolist() == table.count.tolist()


def test_in_a_collection():
    group = collection()
    group.update(PROBS[:30], TARGET[:30])
    group.update(PROBS[30:], TARGET[30:])
    check(group.compute())
    check(pickle.loads(pickle.dumps(group)).compute())
    group.reset()
    group(PROBS, TARGET)
    check(group.compute())


def test_logits():
    group = collection("logits")
    group.update(PROBS.log(), TARGET)
    ece = metrics.expected_calibration_error(PROBS, target=TARGET)
    assert float(group.compute()["ece"]) == pytest.approx(ece, abs=1e-6)


def test_keywords_and_metrics_of_other_inputs():
    group = collection()
    group.update(preds=PROBS, target=TARGET)
    check(group.compute())
    uncertainty, flags = torch.arange(6.0), torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    adapted = TorchMetric(metrics.FailureAUROC())
    adapted.update(uncertainty, flags)
    assert float(adapted.compute()) == pytest.approx(metrics.failure_auroc(uncertainty, flags))
    shift = TorchMetric(metrics.UncertaintyShift())
    shift.update(uncertainty, uncertainty + 1, flags, flags)
    assert float(shift.compute()["rise"]) == 1.0
    errors = TorchMetric(metrics.OverconfidenceOnErrors())
    errors.update(uncertainty / 6, flags)
    assert int(errors.compute()["n_errors"]) == 3


def test_refusals():
    with pytest.raises(TypeError, match="metric: expected a metric of calibclip, got int 3"):
        TorchMetric(3)
    with pytest.raises(ValueError, match="scores: expected one of 'probs', 'logits', got 'z'"):
        TorchMetric(metrics.Accuracy(), "z")
    with pytest.raises(ValueError, match=r"metric: expected a state .*; pass n_classes"):
        TorchMetric(metrics.ClasswiseCalibrationError())


# ------------------------------------------------------------- where the two agree, and where not


@pytest.mark.parametrize(("norm", "mine"), [("l1", 1), ("l2", 2), ("max", float("inf"))])
def test_agreement_where_no_confidence_is_on_an_edge(norm, mine):
    theirs = MulticlassCalibrationError(num_classes=6, n_bins=15, norm=norm)(PROBS, TARGET)
    ours = metrics.expected_calibration_error(PROBS, target=TARGET, norm=mine)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_a_confidence_of_one_gets_no_bin_of_its_own():
    # https://github.com/Lightning-AI/torchmetrics/issues/3510
    probs, target = torch.tensor([[0.95, 0.05], [1.0, 0.0]]), torch.tensor([0, 1])
    theirs = MulticlassCalibrationError(num_classes=2, n_bins=10, norm="l1")(probs, target)
    assert metrics.expected_calibration_error(probs, target=target, n_bins=10) == pytest.approx(
        0.475, abs=1e-7
    )
    assert float(theirs) == pytest.approx(0.525, abs=1e-6)


def test_probabilities_are_not_told_from_logits_by_their_range():
    # https://github.com/Lightning-AI/torchmetrics/issues/3269
    cosines, target = torch.tensor([[0.31, 0.22], [0.28, 0.24]]), torch.tensor([0, 0])
    theirs = MulticlassCalibrationError(num_classes=2, n_bins=10, norm="l1")(cosines, target)
    assert float(theirs) == pytest.approx(1 - 0.295, abs=1e-6)  # taken for probabilities
    with pytest.raises(ValueError, match=r"probs: .*; if these are logits pass logits="):
        metrics.expected_calibration_error(probs=cosines, target=target)
    ours = metrics.expected_calibration_error(logits=100 * cosines, target=target)
    confidence = torch.softmax(100 * cosines, 1).amax(1).mean()
    assert ours == pytest.approx(1 - float(confidence), abs=1e-6)


def test_a_zero_of_the_l2_norm_is_a_float():
    probs, target = torch.tensor([[0.0, 1.0]]), torch.tensor([1])
    value = metrics.expected_calibration_error(probs, target=target, norm=2)
    assert type(value) is float
    assert value == 0.0
