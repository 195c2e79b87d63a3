"""What is special about single objectives: saturation, ties, missing classes, wrong arguments."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_oracles import evaluate, is_misranked, make_case

from calibclip.attacks.objectives import (
    OBJECTIVES,
    certainty_when_wrong,
    check_multilabel,
    cross_entropy,
    dirichlet_divergence,
    dirichlet_drift,
    dlr,
    dlr_targeted,
    embedding_distance,
    kl_to_reference,
    margin,
    misclassified,
    misranked,
    multilabel_cross_entropy,
    multilabel_margin,
    never,
    overconfidence,
    right_and_less_certain,
    uncertainty_when_right,
    underconfidence,
)

INF, NAN = math.inf, math.nan
FLOATS = [torch.float64, torch.float32]


def run(loss, row, *others, dtype=torch.float32):
    """Value and gradient of one row, as Python numbers."""
    logits = torch.tensor([row], dtype=dtype, requires_grad=True)
    others = (x if isinstance(x, torch.Tensor) else torch.tensor([x]) for x in others)
    value = loss(logits, *others)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.item(), gradient[0].tolist()


def direction(gradient):
    size = gradient.abs().amax(-1, keepdim=True)
    assert (size > 0).all()
    return gradient / size


# Cross-entropy


LEADS = [
    0.0,
    5.0,
    16.0,
    17.0,
    18.0,
    21.0,
    36.0,
    40.0,
    68.0,
    70.0,
    90.0,
    103.0,
    110.0,
    700.0,
    800.0,
    2e4,
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [sign * lead for lead in LEADS for sign in (1, -1)])
def test_the_direction_of_cross_entropy_survives_saturation(lead, dtype):
    others = [0.0, -1.0, -0.5, -3.0, 0.25, -8.0]
    for n_others in (1, 2, 6):
        row = torch.tensor([[lead, *others[:n_others]]], dtype=dtype)
        logits = row.clone().requires_grad_()
        value = cross_entropy(logits, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        # In mpmath e^-20000 is a number; in float64 the oracle's gradient would be zero.
        near = row.clone()
        near[0, 0] = min(lead, 600.0)
        _, wanted = evaluate("ce", near, torch.tensor([0]))
        found, wanted = direction(gradient.double()), direction(wanted)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-12)
        assert gradient[0, 0] < 0 < gradient[0, 1]
        exact, _ = evaluate("ce", row, torch.tensor([0]))
        rtol = 1e-13 if dtype == torch.float64 else 2e-5
        assert torch.allclose(value.double(), exact, rtol=rtol, atol=1e-37)


def test_of_a_thousand_saturated_classes_each_has_its_share():
    case = make_case(1000, 1.0, torch.float32)
    logits = case.logits.scatter(1, case.target[:, None], 500.0).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, case.target).sum(), logits)
    others = logits.detach().double().scatter(1, case.target[:, None], -INF)
    wanted = others.softmax(1).scatter(1, case.target[:, None], -1.0)
    assert torch.allclose(gradient.double() * 2.0**100, wanted, rtol=1e-5, atol=1e-12)


def test_the_least_slope_leaves_the_value_alone():
    row = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    for shift in (0.0, 30.0, 745.0, 1e4):
        value = cross_entropy(row + torch.tensor([shift, 0.0]), torch.tensor([0]))
        assert float(value) == pytest.approx(math.log1p(math.exp(-3 - shift)), rel=1e-13, abs=0)


def test_large_logits_near_each_other_keep_their_digits():
    row = torch.tensor([[10000.0, 10000.5, 9999.25]])
    expected, slopes = evaluate("ce", row, torch.tensor([0]))
    value, gradient = run(cross_entropy, row[0].tolist(), 0)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert gradient == pytest.approx(slopes[0].tolist(), rel=1e-6)


@pytest.mark.parametrize("pattern", [*itertools.product([-INF, 0.5, 2.0], repeat=3)])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_cross_entropy_of_missing_classes_is_the_plain_one(pattern, label):
    def plain(logits, target):
        return F.cross_entropy(logits, target, reduction="none")

    value, gradient = run(cross_entropy, pattern, label, dtype=torch.float64)
    wanted, slopes = run(plain, pattern, label, dtype=torch.float64)
    assert value == pytest.approx(wanted, rel=1e-12, nan_ok=True)
    assert gradient == pytest.approx(slopes, rel=1e-12, abs=1e-29) or math.isnan(wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([-INF, -3e38, -1e4, -100.0, 0.0, 1.0, 1e4, 3e38]), min_size=1),
    st.integers(0, 100),
)
def test_cross_entropy_is_never_nan_where_the_plain_one_is_not(row, label):
    label %= len(row)
    wanted, slopes = run(lambda z, y: F.cross_entropy(z, y, reduction="none"), row, label)
    value, gradient = run(cross_entropy, row, label)
    if not any(map(math.isnan, [wanted, *slopes])):
        assert not any(map(math.isnan, [value, *gradient]))


# A class at minus infinity is as good as absent


@pytest.mark.parametrize("name", ["ce", "margin", "dlr", "dlr-targeted", "kl", "underconfidence"])
@pytest.mark.parametrize("n_classes", [1, 2, 3, 4, 5])
def test_a_class_at_minus_infinity_takes_no_part(name, n_classes):
    case, objective = make_case(n_classes, 20.0, torch.float32), OBJECTIVES[name]
    wide = case._replace(
        logits=F.pad(case.logits, (1, 2), value=-INF),
        reference=F.pad(case.reference, (1, 2), value=-INF),
        target=case.target + 1,
        rival=case.rival + 1,
    )
    results = []
    for each in (case, wide):
        logits = each.logits.requires_grad_()
        values = objective.loss(logits, *each.arguments(objective))
        results.append((values, torch.autograd.grad(values.sum(), logits)[0]))
    (values, gradient), (wide_values, wide_gradient) = results
    assert torch.allclose(values, wide_values, rtol=1e-6)
    # With the true class alone the margin has no rival to name.
    others = 1 if n_classes == 1 and name in ("margin", "dlr", "underconfidence") else 0
    assert torch.allclose(gradient, wide_gradient[:, 1:-2], rtol=1e-5, atol=1e-7)
    assert int((wide_gradient[:, [0, -2, -1]] != 0).sum()) <= others * len(gradient)


def test_certainty_counts_the_missing_classes_too():
    row = [1.0, 9.0, 4.0]
    value, gradient = run(certainty_when_wrong, [*row, -INF], 0)
    less, slopes = run(certainty_when_wrong, row, 0)
    assert value == pytest.approx(less + math.log(4 / 3), rel=1e-6)
    assert gradient == pytest.approx([*slopes, 0.0])


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("row", [[-INF, 1.0], [-INF, 1.0, 2.0], [-INF, 1.0, 2.0, 3.0, 4.0]])
def test_a_true_class_at_minus_infinity(loss, row):
    value, gradient = run(loss, row, 0)
    assert value == INF
    assert gradient[0] == -1
    assert all(0 <= slope <= 1 for slope in gradient[1:])
    assert sum(gradient) == pytest.approx(0, abs=1e-6)


def test_a_rival_at_minus_infinity():
    value, gradient = run(dlr_targeted, [-INF, 1.0, 2.0, 3.0, 4.0], 3, 0)
    assert value == -INF
    assert gradient == [1.0, 0.0, 0.0, -1.0, 0.0]


# One class


def test_one_class():
    for name, (value, slope) in {
        "ce": (0.0, 0.0),
        "margin": (-INF, -1.0),
        "dlr": (-INF, -1.0),
        "overconfidence": (-INF, -1.0),
        "underconfidence": (0.0, 0.0),
    }.items():
        assert run(OBJECTIVES[name].loss, [2.0], 0) == (value, [slope]), name
    assert run(dlr_targeted, [2.0], 0, 0) == (0.0, [0.0])
    assert run(kl_to_reference, [2.0], 0, torch.tensor([[7.0]])) == (0.0, [0.0])
    assert run(multilabel_margin, [2.0], torch.tensor([[1]])) == (-2.0, [-1.0])
    value, gradient = run(multilabel_cross_entropy, [0.0], torch.tensor([[1]]))
    assert (value, gradient) == (pytest.approx(math.log(2)), [-0.5])
    assert not misclassified(torch.tensor([[2.0]]), torch.tensor([0])).any()


# Ties and ranks


def test_the_first_of_the_largest_is_predicted():
    tied = torch.tensor([[2.0, 2.0, 1.0]] * 3)
    assert misclassified(tied, torch.tensor([0, 1, 2])).tolist() == [False, True, True]


def test_margin_sends_the_gradient_of_a_tie_to_one_class():
    _, gradient = run(margin, [1.0, 2.0, 2.0], 0)
    assert sorted(gradient) == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label", [0, 1, 2, 3, 4])
def test_ratios_of_ties_are_numbers(label, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for row in ([7.0] * 5, [7.0, 7.0, 7.0, 7.0, 1.0], [7.0, 7.0, 7.0, 1.0, 1.0]):
        logits = torch.tensor([row], dtype=dtype)
        for loss in (dlr, lambda z, y: dlr_targeted(z, y, (y + 1) % 5)):
            value, gradient = run(loss, logits[0].tolist(), label, dtype=wide)
            assert all(map(math.isfinite, [value, *gradient]))
    value, gradient = run(dlr, [7.0] * 5, label, dtype=wide)
    assert value == 0
    assert gradient[label] == pytest.approx(-1e12)
    assert max(gradient) == pytest.approx(1e12)


def test_the_constant_of_the_ratios():
    # Where three or four tie it is all that divides.
    assert run(dlr, [7.0, 7.0, 7.0, 6.0], 3)[0] == pytest.approx(1e12)
    rows = [7.0, 7.0, 7.0, 7.0, 6.0]
    assert run(dlr_targeted, rows, 4, 0)[0] == pytest.approx(1e12)
    assert run(dlr_targeted, rows, 0, 4)[0] == pytest.approx(-1e12)


def test_dlr_by_the_rank_of_the_true_class():
    row, values = [8.0, 5.0, 4.0, 1.0], [-0.75, 0.75, 1.0, 1.75]
    for label, expected in enumerate(values):
        value, gradient = run(dlr, row, label, dtype=torch.float64)
        assert value == pytest.approx(expected)
        assert (max(map(abs, gradient)) < 1e-12) == (label == 2)  # flat at the third rank


def test_dlr_targeted_by_hand():
    row = [8.0, 5.0, 4.0, 2.0, 1.0]  # spread 8 - 3
    for label, rival in itertools.permutations(range(5), 2):
        value, _ = run(dlr_targeted, row, label, rival, dtype=torch.float64)
        assert value == pytest.approx((row[rival] - row[label]) / 5)


def test_ratios_of_a_partly_broken_row():
    for n_broken in (1, 2, 3):
        row = torch.tensor([[2.0, 1.0, *[NAN] * n_broken, 0.0, 0.0]])
        assert dlr(row, torch.tensor([0])).isnan().all()
        assert dlr_targeted(row, torch.tensor([0]), torch.tensor([1])).isnan().all()


@pytest.mark.parametrize("row", [[3.0, 1.0], [3.0, 1.0, -4.0]])
def test_too_few_classes_for_a_ratio(row):
    assert run(dlr_targeted, row, 0, 1) == (-2.0, [-1.0, 1.0, 0.0][: len(row)])
    assert (run(dlr, row, 0) == run(margin, row, 0)) == (len(row) == 2)


# Drift


@pytest.mark.parametrize("loss", [kl_to_reference, embedding_distance, dirichlet_divergence])
def test_drift_starts_at_zero_and_leaves_the_reference_alone(loss):
    case = make_case(5, 10.0, torch.float32)
    reference = case.logits.clone().requires_grad_()
    logits = case.logits.clone().requires_grad_()
    value = loss(logits, None, reference)
    value.sum().backward()
    assert value.tolist() == [0.0] * len(value)
    assert not logits.grad.any()
    value = loss(logits + 1e-3 * torch.arange(5), None, reference)
    assert (value > 0).all()
    value.sum().backward()
    assert logits.grad.any(1).all()
    assert reference.grad is None


@pytest.mark.parametrize(("name", "tolerance"), [("kl", 1e-5), ("dirichlet-kl", 1e-5)])
def test_drift_is_exact_next_to_the_reference(name, tolerance):
    case = make_case(6, 10.0, torch.float32)
    for step in (1e-1, 1e-3, 1e-5):
        logits = case.reference + step * torch.linspace(-1, 1, 6).roll(2)
        arguments = (case.target, case.reference)
        expected, slopes = evaluate(name, logits, *arguments)
        logits.requires_grad_()
        values = OBJECTIVES[name].loss(logits, *arguments)
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert torch.allclose(values.double(), expected, rtol=tolerance, atol=0)
        assert torch.allclose(direction(gradient.double()), direction(slopes), atol=tolerance)


def test_the_kl_has_the_reference_first():
    row, reference = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]])
    p = 1 / (1 + math.exp(-3))
    expected = -math.log(2) - (math.log(1 - p) + math.log(p)) / 2
    assert float(kl_to_reference(row, None, reference)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("logit_scale", "temperature"), [(100.0, 0.1), (30.0, 0.07), (1.0, 1.0)])
@pytest.mark.parametrize("factory", [dirichlet_drift, overconfidence, underconfidence])
def test_options_are_those_of_the_dirichlet(factory, logit_scale, temperature):
    options = {"logit_scale": logit_scale, "temperature": temperature}
    objective = factory(**options)
    case = make_case(5, 0.2 * logit_scale)
    name = {dirichlet_drift: "dirichlet-kl"}.get(factory, factory.__name__)
    arguments = case.arguments(objective)
    expected, slopes = evaluate(name, case.logits, *arguments, **options)
    logits = case.logits.requires_grad_()
    values = objective.loss(logits, *arguments)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.allclose(values, expected, rtol=1e-8)
    assert torch.allclose(gradient, slopes, rtol=1e-8, atol=1e-8 * float(slopes.abs().max()))
    assert not torch.allclose(values, factory().loss(case.logits, *arguments), rtol=1e-3)


def test_embeddings_are_compared_in_full_and_in_float32():
    features = torch.full((2, 1000), 300.0).half()
    assert embedding_distance(features, None, -features).tolist() == [3.6e8] * 2
    assert never(features, None).tolist() == [False, False]


@pytest.mark.parametrize("loss", [kl_to_reference, embedding_distance, dirichlet_divergence])
@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (None, TypeError, "expected a floating-point tensor of shape (2, 3), got NoneType None"),
        (torch.zeros(2, 3).long(), TypeError, "got int64 tensor of shape (2, 3); call reference.f"),
        (torch.zeros(1, 3), ValueError, "expected the shape of {}, (2, 3), got (1, 3)"),
        (torch.zeros(2, 4), ValueError, "expected the shape of {}, (2, 3), got (2, 4)"),
        (torch.zeros(2, 3, device="meta"), ValueError, "expected the device of {}, cpu, got meta"),
    ],
)
def test_bad_references(loss, reference, error, message):
    outputs = "features" if loss is embedding_distance else "logits"
    with pytest.raises(error, match=re.escape(message.format(outputs))) as caught:
        loss(torch.zeros(2, 3), None, reference)
    assert str(caught.value).startswith("reference: ")


# Several labels

LABEL_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_labels_of_any_dtype(dtype):
    case = make_case(6, 5.0)
    labels = case.labels.to(dtype)
    for function in (multilabel_cross_entropy, multilabel_margin, misranked):
        assert torch.equal(function(case.logits, labels), function(case.logits, case.labels))
    assert check_multilabel(labels, (8, 6), case.logits.device) is labels


def test_rows_of_one_kind():
    row = [3.0, 1.0, 2.0]
    ones, zeros = torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]])
    assert run(multilabel_margin, row, ones) == (-1.0, [0.0, -1.0, 0.0])
    assert run(multilabel_margin, row, zeros) == (3.0, [1.0, 0.0, 0.0])
    for labels in (ones, zeros):
        for sign in (1, -1):
            assert misranked(sign * torch.tensor([row]), labels).tolist() == [False]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([-INF, -1.0, 0.0, 1e-45, 1.0, INF]), st.booleans()), min_size=1
    )
)
def test_misranked_by_pairs(pairs):
    z, present = map(list, zip(*pairs, strict=True))
    found = misranked(torch.tensor([z]), torch.tensor([present]))
    assert found.tolist() == [is_misranked(z, present)]


def test_a_tie_is_not_misranked():
    assert misranked(torch.tensor([[1.0, 1.0]]), torch.tensor([[1, 0]])).tolist() == [False]


def test_the_multilabel_margin_sends_ties_to_one_class():
    _, gradient = run(multilabel_margin, [1.0, 1.0, 2.0, 2.0], torch.tensor([[1, 1, 0, 0]]))
    assert sorted(gradient) == [-1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [10.0, 18.0, 40.0, 90.0, 200.0, 800.0, 2e4])
def test_the_direction_of_multilabel_cross_entropy_survives_saturation(lead, dtype):
    doubts = torch.tensor([[0.0, -1.0, -0.5, -3.0]], dtype=dtype)
    labels = torch.tensor([[1, 0, 1, 0]])
    signs = 1.0 - 2.0 * labels
    logits = (signs * (doubts - lead)).to(dtype).requires_grad_()
    value = multilabel_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    near = signs * (doubts - min(lead, 600.0))
    _, wanted = evaluate("bce", near.to(dtype), labels)
    assert torch.allclose(direction(gradient.double()), direction(wanted), rtol=1e-5)


def test_multilabel_cross_entropy_of_infinite_logits():
    labels = torch.tensor([[1, 0, 1, 0]])
    value, gradient = run(multilabel_cross_entropy, [INF, -INF, 0.0, 0.0], labels)
    assert value == pytest.approx(2 * math.log(2))
    assert gradient == [0.0, 0.0, -0.5, 0.5]
    value, gradient = run(multilabel_cross_entropy, [-INF, INF, 0.0, -INF], labels)
    assert value == INF
    assert gradient == [-1.0, 1.0, -0.5, 0.0]
    value, gradient = run(multilabel_cross_entropy, [INF, -INF, INF, -INF], labels)
    assert (value, gradient) == (0.0, [0.0] * 4)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            [[0, 1]],
            TypeError,
            "expected a tensor of 0 and 1 of shape (1, 2), one number per class, got list [[0, 1]]",
        ),
        (torch.zeros(1, 2, dtype=torch.complex64), TypeError, "got complex64 tensor of shape"),
        (
            torch.tensor([1]),
            ValueError,
            "got int64 tensor of shape (1,); one-hot class indices, or use an objective for",
        ),
        (torch.zeros(1, 3), ValueError, "got float32 tensor of shape (1, 3)"),
        (torch.zeros(2), ValueError, "got float32 tensor of shape (2,)"),
        (torch.zeros(1, 2, device="meta"), ValueError, "expected a tensor on cpu, got one on meta"),
        (torch.tensor([[0, 2]]), ValueError, "expected 0 or 1 for each class, got 2"),
        (torch.tensor([[0.0, 0.5]]), ValueError, "expected 0 or 1 for each class, got 0.5"),
        (torch.tensor([[-1, 1]]), ValueError, "expected 0 or 1 for each class, got -1"),
        (torch.tensor([[NAN, 1.0]]), ValueError, "expected 0 or 1 for each class, got nan"),
    ],
)
def test_bad_labels(target, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        check_multilabel(target, (1, 2), torch.device("cpu"))
    assert str(caught.value).startswith("target: ")
    assert str(caught.value).endswith(message) or "one-hot" in message or "complex" in message


def test_labels_on_an_accelerator_are_not_looked_at():
    target = torch.zeros(1, 2, device="meta")
    assert check_multilabel(target, (1, 2), torch.device("meta")) is target


# Uncertainty


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_classes", [2, 3, 7, 100, 1000])
def test_losses_are_ordered_across_the_boundary(n_classes, dtype):
    generator = torch.Generator().manual_seed(n_classes)
    noise = torch.randn(400, n_classes, generator=generator, dtype=dtype)
    # Uniform, nearly uniform, and CLIP-like predictions; the true class next to the best, or far.
    logits = 20 + noise * torch.tensor([0.0, 1e-6, 1e-3, 1.0, 5.0] * 80, dtype=dtype)[:, None]
    target = logits.topk(2).indices[:, 1].where(torch.rand(400, generator=generator) < 0.5, 0)
    lift = torch.tensor([0.0, 1e-5, 0.01, 1.0] * 100, dtype=dtype)
    logits = logits.scatter_add(1, target[:, None], lift[:, None])
    wrong = misclassified(logits, target)
    assert 0 < int(wrong.sum()) < 400
    certain = certainty_when_wrong(logits, target)
    assert (certain[wrong] >= 0).all()
    assert (certain[~wrong] <= 0).all()
    uncertain = uncertainty_when_right(logits, target)
    assert (uncertain[wrong] <= 0).all()
    assert (uncertain[~wrong] >= 0).all()


def test_a_tie_is_on_the_side_that_the_prediction_says():
    tied = [20.0, 20.0]
    assert run(certainty_when_wrong, tied, 0)[0] == 0  # the margin
    assert run(certainty_when_wrong, tied, 1)[0] == pytest.approx(0, abs=1e-6)
    assert run(uncertainty_when_right, tied, 0)[0] == pytest.approx(math.log(2), rel=1e-3)
    assert run(uncertainty_when_right, tied, 1)[0] == 0


def test_across_the_boundary_the_gradient_changes_sides():
    row = [21.0, 20.0, 18.0]
    assert run(certainty_when_wrong, row, 0)[1] == [-1.0, 1.0, 0.0]
    assert run(uncertainty_when_right, row, 1)[1] == [-1.0, 1.0, 0.0]
    _, wrong = run(certainty_when_wrong, row, 1)
    _, right = run(uncertainty_when_right, row, 0)
    assert wrong == pytest.approx([-slope for slope in right], rel=1e-5)
    assert right[0] < 0 < right[2]


def test_rounding_keeps_its_gradient():
    # ln K - AU of a uniform prediction is below 0 by rounding in some of these.
    for n_classes in range(2, 60):
        row = [60.0] * n_classes
        value, gradient = run(certainty_when_wrong, row, 1)
        assert 0 <= value < 2e-6
        assert all(map(math.isfinite, gradient))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_wide_logits_leave_both_sides_finite(scale, dtype):
    case = make_case(6, scale, dtype)
    for function in (certainty_when_wrong, uncertainty_when_right):
        for logit_scale in (1.0, 100.0):
            logits = case.logits.clone().requires_grad_()
            values = function(logits, case.target, logit_scale=logit_scale)
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            assert values.isfinite().all()
            assert gradient.isfinite().all()


def test_a_certain_prediction_still_knows_its_rival():
    _, gradient = run(uncertainty_when_right, [5000.0, 10.0, 20.0], 0)
    assert gradient[0] == -gradient[2] < 0 == gradient[1]
    assert gradient[2] == 2.0**-100


def test_success_of_underconfidence():
    objective = underconfidence()
    clean = [25.0, 22.0, 20.0]
    after = {
        (25.0, 24.0, 20.0): True,  # right, less certain
        (25.0, 22.0, 20.0): False,  # as certain
        (25.0, 20.0, 20.0): False,  # more certain
        (25.0, 25.5, 24.0): False,  # less certain, wrong
        (NAN, NAN, NAN): False,
    }
    outputs, reference = torch.tensor(list(after)), torch.tensor([clean] * len(after))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        target = torch.zeros(len(after), dtype=torch.int64)
        found = objective.success(outputs.to(dtype), target, reference.to(dtype))
        assert found.tolist() == list(after.values())


def test_success_of_underconfidence_is_measured_by_the_options():
    # At a high temperature all that counts is the evidence, at a low one the lead.
    target = torch.tensor([0])
    clean, after = torch.tensor([[0.0, -3.0, -9.0]]), torch.tensor([[0.0, -4.0, -4.0]])
    found = {
        t: bool(right_and_less_certain(after, target, clean, logit_scale=1.0, temperature=t))
        for t in (0.5, 10.0)
    }
    values = {
        t: [
            float(evaluate("underconfidence", z, target, logit_scale=1.0, temperature=t)[0])
            for z in (clean, after)
        ]
        for t in found
    }
    assert found == {t: after > before for t, (before, after) in values.items()}
    assert set(found.values()) == {True, False}
