"""Every objective against its oracle and for its properties; what is special is in ..._edges."""

import copy
import pickle
import re
from functools import partial
from itertools import pairwise

import mpmath
import objective_oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loss_oracles import difference_gradient
from objective_oracles import ORACLES, Case, evaluate, make_case
from torch.autograd import gradcheck

from calibclip.attacks import objectives
from calibclip.attacks.objectives import (
    OBJECTIVES,
    Objective,
    at_least_float32,
    certainty_when_wrong,
    cross_entropy,
    dirichlet_divergence,
    dirichlet_drift,
    dlr,
    dlr_targeted,
    kl_to_reference,
    margin,
    misclassified,
    misranked,
    multilabel_margin,
    never,
    overconfidence,
    resolve_objective,
    underconfidence,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
UNCERTAIN = ("overconfidence", "underconfidence")
# Their Dirichlets are made for CLIP's logits, and leave the range of float32 far outside.
CLIP_ONLY = ("dirichlet-kl", *UNCERTAIN)
CLASS_ONLY = [name for name, objective in OBJECTIVES.items() if objective.target == "class"]


def slopes(name, case, logits=None):
    logits = (case.logits if logits is None else logits).detach().requires_grad_()
    objective = OBJECTIVES[name]
    values = objective.loss(logits, *case.arguments(objective))
    return values, torch.autograd.grad(values.sum(), logits)[0]


def size_of(name, case, gradient):
    """What a rounding error of a gradient is relative to: its largest entry or term, ``(B, 1)``."""
    size = gradient.abs().amax(1, keepdim=True)
    if name.startswith("dlr") and case.logits.shape[1] > 2:  # terms cancel if y ranks third
        top = case.logits.double().topk(3).values
        size = size + 1 / (top[:, :1] - top[:, 2:])
    if name in UNCERTAIN:  # differences of logarithms of the size of 1, over s T = 7
        size = size + 0.01
    return size


# Values and gradients


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_oracle_agrees_with_central_differences(name):
    case, oracle = make_case(5, 20.0), ORACLES[name]
    with mpmath.workdps(objective_oracles.DIGITS):
        for row, *others in zip(case.logits, *case.arguments(OBJECTIVES[name]), strict=True):
            others = [objective_oracles.exact(x.tolist()) for x in others]
            _, grad = oracle(objective_oracles.exact(row.tolist()), *others)
            found = difference_gradient(lambda z, o=others: oracle(z, *o)[0], [row.tolist()], 0)
            assert all(abs(a - b) <= 1e-25 for a, b in zip(grad, found, strict=True))


SCALES = {name: (1e-3, 1.0, 30.0, *[1e4] * (name not in CLIP_ONLY)) for name in OBJECTIVES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "scale"), [(n, s) for n in OBJECTIVES for s in SCALES[n]])
def test_values_and_gradients(name, scale, dtype):
    resolution = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for n_classes in (2, 3, 4, 7):
        case = make_case(n_classes, scale, dtype)
        objective = OBJECTIVES[name]
        values = objective.loss(case.logits, *case.arguments(objective))
        expected, expected_slopes = evaluate(name, case.logits, *case.arguments(objective))
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # ln K - AU is a difference of numbers of that size.
        floor = 16 * resolution if name in UNCERTAIN else 1e-37
        assert torch.allclose(values.double(), expected, rtol=80 * resolution, atol=floor)
        # In the dtype of the computation: half-precision leaves round their gradients.
        _, gradient = slopes(name, case, at_least_float32(case.logits))
        error = (gradient.double() - expected_slopes).abs()
        assert (error <= 80 * resolution * size_of(name, case, expected_slopes) + 2e-30).all()


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "dirichlet-kl"])
def test_a_thousand_classes(name):
    case = make_case(1000, 3.0, torch.float32)
    case = Case(*(part[[0, 1, 2, 3, -1]] for part in case))
    values, gradient = slopes(name, case)
    expected, expected_slopes = evaluate(name, case.logits, *case.arguments(OBJECTIVES[name]))
    assert torch.allclose(values.double(), expected, rtol=3e-6, atol=3e-6)
    error = (gradient.double() - expected_slopes).abs()
    assert (error <= 1e-5 * size_of(name, case, expected_slopes)).all()


@pytest.mark.parametrize("n_classes", [2, 3, 4, 6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name, n_classes):
    case = make_case(n_classes, 5.0, seed=1)
    objective = OBJECTIVES[name]
    arguments = case.arguments(objective)
    logits = case.logits.requires_grad_()
    assert gradcheck(lambda z: objective.loss(z, *arguments), (logits,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_computed_in_float32(name, dtype):
    case = make_case(5, 20.0, dtype)
    wide = Case(*(x.float() if x.is_floating_point() else x for x in case))
    (values, gradient), (wanted, wanted_gradient) = slopes(name, case), slopes(name, wide)
    assert torch.equal(values, wanted)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, wanted_gradient.to(dtype))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_sample_has_its_own_loss_and_gradient(name):
    case, objective = make_case(6, 20.0, torch.float32), OBJECTIVES[name]
    logits = case.logits.requires_grad_()
    before = logits.detach().clone()
    values = objective.loss(logits, *case.arguments(objective))
    upstream = torch.randn(len(values), generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(values, logits, upstream)
    for i in range(len(values)):
        one = Case(*(part[i : i + 1] for part in case))
        value, slope = slopes(name, one)
        assert torch.allclose(value, values[i : i + 1], rtol=1e-5, atol=1e-6)
        wanted = upstream[i] * slope
        error = (wanted - gradient[i]).abs().max()
        assert float(error) <= 1e-5 * float(wanted.abs().max()) + 1e-6
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_batch(name):
    objective = OBJECTIVES[name]
    case = Case(*(part[:0] for part in make_case(4, 1.0)))
    assert objective.loss(case.logits, *case.arguments(objective)).shape == (0,)
    success = objective.success(case.logits, *case.arguments(objective))
    assert (success.shape, success.dtype) == ((0,), torch.bool)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_broken_outputs_give_nan_in_their_row_alone(name):
    case, objective = make_case(5, 20.0), OBJECTIVES[name]
    logits = case.logits.clone()
    logits[2] = torch.nan
    values = objective.loss(logits, *case.arguments(objective))
    assert values.isnan().tolist() == [row == 2 for row in range(len(values))]


@pytest.mark.parametrize("name", [n for n in CLASS_ONLY if OBJECTIVES[n].reference != "rival"])
def test_a_row_of_minus_infinity_is_broken(name):
    case, objective = make_case(3, 20.0), OBJECTIVES[name]
    logits = case.logits.clone()
    logits[1] = -torch.inf
    logits[2] = -torch.inf
    arguments = case._replace(target=case.target.clone().index_fill_(0, torch.tensor(1), 0))
    values = objective.loss(logits, *arguments.arguments(objective))
    assert values[1:3].isnan().all()


# Properties


def rows(least=3):
    number = st.floats(-50, 50, width=32)
    return st.integers(least, 7).flatmap(
        lambda k: st.tuples(
            st.lists(number, min_size=k, max_size=k),
            st.integers(0, k - 1),
            st.integers(0, k - 1),
            st.permutations(range(k)),
        )
    )


def spread_out(z, least=0.1):
    """Whether no two logits are near each other, so that no order hangs on rounding."""
    ordered = sorted(z)
    return all(b - a >= least for a, b in pairwise(ordered))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows(), st.floats(0.01, 100), st.floats(-100, 100))
def test_dlr_knows_neither_scale_nor_shift(row, factor, shift):
    z, label, rival, _ = row
    target, rival = torch.tensor([label]), torch.tensor([rival])
    assume(spread_out(z))
    logits = torch.tensor([z], dtype=torch.float64)
    for loss, divides in ((dlr, len(z) >= 3), (partial(dlr_targeted, rival=rival), len(z) >= 4)):
        wanted = loss(logits, target) * (1 if divides else factor)
        assert torch.allclose(loss(factor * logits + shift, target), wanted, rtol=1e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows(2), st.floats(0.01, 100), st.floats(-100, 100))
def test_the_margin_scales_and_keeps_its_direction(row, factor, shift):
    z, label, _, _ = row
    assume(spread_out(z))
    logits = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    moved = (factor * logits.detach() + shift).requires_grad_()
    results = [margin(x, torch.tensor([label])) for x in (logits, moved)]
    assert torch.allclose(results[1], factor * results[0], rtol=1e-9)
    gradients = [
        torch.autograd.grad(v, x)[0] for v, x in zip(results, (logits, moved), strict=True)
    ]
    assert torch.equal(*gradients)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows(2), st.floats(-100, 100))
@pytest.mark.parametrize("name", CLASS_ONLY)
def test_class_order_does_not_matter_nor_mostly_a_shift(name, row, shift):
    z, label, rival, order = row
    assume(spread_out(z))
    order = torch.tensor(order)
    place = torch.argsort(order)
    logits = torch.tensor([z], dtype=torch.float64)
    reference = logits.flip(1)
    labels = torch.zeros(1, len(z), dtype=torch.int64)
    case = Case(logits, torch.tensor([label]), torch.tensor([rival]), reference, labels)
    moved = Case(
        logits[:, order], place[case.target], place[case.rival], reference[:, order], labels
    )
    value, gradient = slopes(name, case)
    other, other_gradient = slopes(name, moved)
    assert torch.allclose(value, other, rtol=1e-9, atol=1e-12)
    size = 1 + float(gradient.abs().max())  # a slope is a sum of terms
    assert torch.allclose(gradient[:, order], other_gradient, rtol=0, atol=1e-9 * size)
    if name in ("ce", "margin", "dlr", "dlr-targeted", "kl"):
        shifted, shifted_gradient = slopes(name, case, logits + shift)
        assert torch.allclose(value, shifted, rtol=1e-9, atol=1e-9)
        assert torch.allclose(gradient, shifted_gradient, rtol=0, atol=1e-9 * size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows(2))
def test_margins_are_positive_exactly_for_a_success(row):
    z, label, _, order = row
    assume(spread_out(z, 1e-30))
    logits, target = torch.tensor([z]), torch.tensor([label])
    for loss in (margin, dlr):
        assert torch.equal(loss(logits, target) > 0, misclassified(logits, target))
    labels = torch.tensor([order]) % 2
    wrong = misranked(logits, labels)
    assert wrong.tolist() == [objective_oracles.is_misranked(z, labels[0].tolist())]
    if labels.any() and not labels.all():
        assert torch.equal(multilabel_margin(logits, labels) > 0, wrong)


# The record


def test_what_each_objective_says_of_itself():
    said = {name: (o.success, o.reference, o.target, o.targeted) for name, o in OBJECTIVES.items()}
    right = said["underconfidence"][0]
    assert said == {
        "ce": (misclassified, "none", "class", True),
        "margin": (misclassified, "none", "class", True),
        "dlr": (misclassified, "none", "class", True),
        "dlr-targeted": (misclassified, "rival", "class", False),
        "kl": (misclassified, "clean", "class", False),
        "dirichlet-kl": (misclassified, "clean", "class", False),
        "embedding-l2": (never, "clean", "none", False),
        "bce": (misranked, "none", "multilabel", False),
        "multilabel-margin": (misranked, "none", "multilabel", False),
        "overconfidence": (misclassified, "none", "class", False),
        "underconfidence": (right, "clean", "class", False),
    }
    assert right.func is objectives.right_and_less_certain


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_copies_are_equal_and_do_the_same(objective):
    case = make_case(4, 10.0)
    arguments = case.arguments(objective)
    for other in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert other == objective
        assert hash(other) == hash(objective)
        for call in ("loss", "success"):
            values = (getattr(o, call)(case.logits, *arguments) for o in (other, objective))
            assert torch.equal(*values)


def test_no_two_objectives_are_equal():
    assert len(set(OBJECTIVES.values())) == len(OBJECTIVES)
    assert OBJECTIVES["ce"] != "ce"


@pytest.mark.parametrize("factory", [dirichlet_drift, overconfidence, underconfidence])
def test_options_decide_equality(factory):
    assert factory() == factory(100, temperature=0.07) == factory(temperature=0.07)
    assert hash(factory()) == hash(factory(100))
    others = [factory(temperature=0.08), factory(logit_scale=50.0)]
    assert factory() not in others
    assert others[0] != others[1]


def test_every_field_decides_equality():
    plain = Objective(cross_entropy)
    different = [
        Objective(margin),
        Objective(cross_entropy, never),
        Objective(cross_entropy, reference="given"),
        Objective(cross_entropy, target="any"),
        Objective(cross_entropy, targeted=True),
        Objective(partial(cross_entropy)),
    ]
    assert plain == Objective(cross_entropy, misclassified)
    assert [plain == other for other in different] == [False] * 5 + [True]


def test_a_record_cannot_be_changed():
    with pytest.raises(AttributeError):
        OBJECTIVES["ce"].loss = margin


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (OBJECTIVES["dlr"], "Objective(loss=dlr, targeted=True)"),
        (Objective(margin), "Objective(loss=margin)"),
        (OBJECTIVES["dlr-targeted"], "Objective(loss=dlr_targeted, reference='rival')"),
        (
            OBJECTIVES["embedding-l2"],
            "Objective(loss=embedding_distance, success=never, reference='clean', target='none')",
        ),
        (
            dirichlet_drift(50.0),
            "Objective(loss=dirichlet_divergence(logit_scale=50.0, temperature=0.07), "
            "reference='clean')",
        ),
        (Objective(partial(margin, 3, b="x")), "Objective(loss=margin(3, b='x'))"),
    ],
)
def test_repr(objective, text):
    assert repr(objective) == text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"loss": "ce"},
            TypeError,
            "loss: expected a callable (outputs, target[, reference]) -> (B,), got str 'ce'",
        ),
        (
            {"success": None},
            TypeError,
            "success: expected a callable (outputs, target[, reference]) -> (B,), got NoneType",
        ),
        (
            {"reference": "ref"},
            ValueError,
            "reference: expected one of 'none', 'clean', 'rival', 'given', got 'ref'",
        ),
        (
            {"target": "classes"},
            ValueError,
            "target: expected one of 'class', 'multilabel', 'none', 'any', got 'classes'",
        ),
        ({"targeted": 1}, TypeError, "targeted: expected True or False, got int 1"),
        (
            {"target": "multilabel", "targeted": True},
            ValueError,
            "targeted: expected False with target='multilabel', got True; only a class can be",
        ),
        (
            {"target": "none", "targeted": True},
            ValueError,
            "targeted: expected False with target='none', got True; only a class can be",
        ),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Objective(**{"loss": margin, **fields})


@pytest.mark.parametrize("factory", [dirichlet_drift, overconfidence, underconfidence])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logit_scale": 0}, ValueError, "logit_scale: expected a number > 0, got 0"),
        ({"temperature": -0.07}, ValueError, "temperature: expected a number > 0, got -0.07"),
        ({"temperature": "x"}, TypeError, "temperature: expected a number > 0, got str 'x'"),
    ],
)
def test_bad_options(factory, options, error, message):
    with pytest.raises(error, match=message):
        factory(**options)


# Names


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_name_or_an_objective_is_looked_up(name):
    assert resolve_objective(name) is OBJECTIVES[name]
    assert resolve_objective(OBJECTIVES[name]) is OBJECTIVES[name]


def test_a_loss_with_a_name_is_known_as_a_function_too():
    assert resolve_objective(dlr) is OBJECTIVES["dlr"]
    assert resolve_objective(kl_to_reference) is OBJECTIVES["kl"]
    assert resolve_objective(multilabel_margin) is OBJECTIVES["multilabel-margin"]


@pytest.mark.parametrize(
    "loss",
    [lambda logits, target: logits[:, 0], torch.nn.CrossEntropyLoss(), certainty_when_wrong],
    ids=["function", "module", "without a name"],
)
def test_of_another_callable_the_target_is_unknown(loss):
    assert resolve_objective(loss) == Objective(loss, target="any", targeted=True)
    assert resolve_objective(loss).success is misclassified


def test_an_objective_of_ones_own():
    mine = Objective(partial(dirichlet_divergence, temperature=0.1), reference="given")
    assert resolve_objective(mine) is mine


def test_bad_objectives():
    names = ", ".join(map(repr, OBJECTIVES))
    with pytest.raises(ValueError, match=f"objective: expected one of {names}, got 'dl'"):
        resolve_objective("dl")
    with pytest.raises(
        TypeError,
        match=r"objective: expected a name or a callable \(logits, target\) -> \(B,\), got int 3",
    ):
        resolve_objective(3)


def test_public_names():
    assert all(hasattr(objectives, name) for name in objectives.__all__)
    assert objectives.__all__ == sorted(objectives.__all__)
    for name in ("at_least_float32", "check_multilabel"):  # for the attacks alone
        assert hasattr(objectives, name)
