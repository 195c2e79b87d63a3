"""What all losses have in common, over one table."""

import copy
import inspect
import pickle
from itertools import pairwise

import loss_oracles
import numpy as np
import pytest
import torch
from loss_cases import (
    BOUNDS,
    CASES,
    EVERY,
    F32,
    F64,
    FORWARD,
    LOSSES,
    MAY_BE_NONE,
    OPTIONS,
    Case,
    error,
    forward_names,
    make_inputs,
    tensors_of,
)

import calibclip
from calibclip import *  # noqa: F403 - eval of what repr shows

HALVES = [torch.float16, torch.bfloat16]
ONE_EACH = [cases[0] for cases in CASES.values()]
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
cases = pytest.mark.parametrize("case", EVERY, ids=str)


def leaves(case, dtype=F32, **shape):
    inputs, target = make_inputs(case.names, **shape)
    return tensors_of(inputs, dtype, case.names), torch.from_numpy(target)


def outcome(case, tensors, target, reduction="mean"):
    """Value, and gradients by input."""
    value = case.call(tensors, target, reduction=reduction)
    value.sum().backward()
    return value.detach(), {name: t.grad for name, t in tensors.items()}


def same(found, want, **tolerance):
    torch.testing.assert_close(found[0], want[0], **tolerance)
    for name, grad in want[1].items():
        if grad is None:
            assert found[1][name] is None
        else:
            torch.testing.assert_close(found[1][name], grad, **tolerance)


# Signatures


@losses
def test_signatures(loss):
    """Adversarial, target, references, clean; options by keyword; the module's are the same."""
    positional, options = forward_names(loss.function)
    assert positional == FORWARD[loss.name].split()
    assert options == {**OPTIONS[loss.name], "reduction": "mean"}
    kept = {name: value for name, value in options.items() if name not in loss.call_options}
    if loss.name == "simclip":
        kept = {"frozen_reference": False, **kept}
    constructor = inspect.signature(loss.module).parameters
    assert {name: p.default for name, p in constructor.items()} == kept
    for method in (loss.module.forward, loss.module.terms):
        positional, options = forward_names(method)
        assert positional == FORWARD[loss.name].split()
        assert set(options) == set(loss.call_options)
        assert all(default is None for default in options.values())


@losses
def test_names_are_exported(loss):
    for name in (f"{loss.name}_loss", loss.module_name):
        assert name in calibclip.__all__
        assert name in calibclip.losses.__all__


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(module, name, id=f"{module.__name__}({name}=None)")
        for module in (*(loss.module for loss in LOSSES.values()), calibclip.DirichletAlignLoss)
        for name in inspect.signature(module).parameters
    ],
)
def test_none_is_an_option_only_where_it_has_a_meaning(module, name):
    if (module.__name__, name) in MAY_BE_NONE:
        assert f"{name}=None" in repr(module(**{name: None}))
    else:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got .*None$"):
            module(**{name: None})


# Reductions and shapes


@cases
def test_reductions(case):
    tensors, target = leaves(case)
    if "none" not in case.reductions:
        assert case.call(tensors, target).shape == ()
        return
    rows = case.call(tensors, target, reduction="none")
    assert rows.shape == (4,)
    torch.testing.assert_close(case.call(tensors, target, reduction="mean"), rows.mean())
    torch.testing.assert_close(case.call(tensors, target, reduction="sum"), rows.sum())
    assert len(set(rows.tolist())) == 4
    # One by one, and in another order.
    for i in range(4):
        alone = {name: t[i : i + 1] for name, t in tensors.items()}
        one = case.call(alone, target[i : i + 1], reduction="none")
        torch.testing.assert_close(one, rows[i : i + 1])
    order = torch.tensor([2, 0, 3, 1])
    moved = case.call({n: t[order] for n, t in tensors.items()}, target[order], reduction="none")
    torch.testing.assert_close(moved, rows[order])


@cases
def test_default_reduction_is_the_mean(case):
    tensors, target = leaves(case)
    labels = {**case.labels(target), **case.options, **case.forward}
    found = case.loss.function(**tensors, **labels)
    assert torch.equal(found, case.call(tensors, target, reduction="mean"))
    options = case.options if case.constructor is None else case.constructor
    assert torch.equal(case.through(case.loss.module(**options), tensors, target), found)


@losses
@pytest.mark.parametrize("reduction", ["max", None, "batchmean"])
def test_unknown_reduction(loss, reduction):
    tensors, target = leaves(CASES[loss.name][0])
    message = f"^reduction: expected one of 'none', 'mean', 'sum', got {reduction!r}$"
    with pytest.raises(ValueError, match=message):
        CASES[loss.name][0].call(tensors, target, reduction=reduction)
    with pytest.raises(ValueError, match=message):
        loss.module(reduction=reduction)


@cases
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_empty_batch(case, dtype):
    """As in PyTorch: no rows, a sum of 0 that still has a graph, and a mean that is NaN."""
    tensors, target = leaves(case, dtype, batch=0)
    assert case.call(tensors, target, reduction="mean").isnan()
    if "none" not in case.reductions:
        return
    assert case.call(tensors, target, reduction="none").shape == (0,)
    total = case.call(tensors, target, reduction="sum")
    assert total == 0
    assert total.dtype == F32
    total.backward()
    first = next(iter(tensors.values()))
    assert first.grad.shape == first.shape
    terms = case.through(case.build("none").terms, tensors, target)
    assert terms.total.shape == (0,)


@cases
def test_single_image_and_two_classes(case):
    tensors, target = leaves(case, F64, batch=1, classes=2, width=2, grid=(1, 2))
    value, grads = outcome(case, tensors, target)
    assert value.shape == ()
    assert value.isfinite()
    assert all(g is None or g.isfinite().all() for g in grads.values())
    if "none" in case.reductions:
        torch.testing.assert_close(case.call(tensors, target, reduction="none")[0], value)


@cases
def test_strides(case):
    tensors, target = leaves(case, F64)
    want = outcome(case, tensors, target)
    strided = {}
    for name, t in tensors.items():
        padded = torch.full((*t.shape, 2), torch.nan, dtype=F64)
        padded[..., 0] = t.detach()
        strided[name] = padded[..., 0].requires_grad_()
        assert not strided[name].is_contiguous()
    same(outcome(case, strided, target.repeat_interleave(2)[::2]), want)
    turned = {n: t.detach().mT.contiguous().mT.requires_grad_() for n, t in tensors.items()}
    same(outcome(case, turned, target), want)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [c for c in EVERY if "none" in c.reductions], ids=str)
def test_rows_do_not_touch_each_other(case, odd):
    """A NaN or an infinity spoils its own sample, in value and gradient, and no other."""
    tensors, target = leaves(case)
    want = outcome(case, tensors, target, "none")
    good = torch.tensor([0, 2, 3])
    for name in case.names:
        spoilt = {n: t.detach().clone() for n, t in tensors.items()}
        spoilt[name][1].view(-1)[2] = odd
        spoilt = {n: t.requires_grad_() for n, t in spoilt.items()}
        value, grads = outcome(case, spoilt, target, "none")
        torch.testing.assert_close(value[good], want[0][good], rtol=1e-6, atol=0)
        assert value[1].isnan() or odd == torch.inf
        for key, grad in grads.items():
            if grad is not None:
                scale = want[1][key].abs().max()
                gap = (grad[good] - want[1][key][good]).abs().max()
                assert gap <= 1e-6 * scale, f"{name}, {key}"


# Dtypes


@cases
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [None, *HALVES], ids=str)
def test_half_precision_is_upcast_first(case, dtype, autocast):
    inputs, target = make_inputs(case.names)
    low = {n: torch.from_numpy(a).to(dtype) for n, a in inputs.items()}
    want = outcome(
        case, {n: t.float().requires_grad_() for n, t in low.items()}, torch.from_numpy(target)
    )
    tensors = {n: t.requires_grad_() for n, t in low.items()}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value, grads = outcome(case, tensors, torch.from_numpy(target))
    assert value.dtype == F32
    torch.testing.assert_close(value, want[0], rtol=1e-6, atol=0)
    for name, grad in grads.items():
        if grad is None:
            assert want[1][name] is None
            continue
        assert grad.dtype == dtype
        # A few terms' gradients are rounded one by one, and some fit no float16.
        exact = want[1][name]
        fits = exact.abs() < 6e4
        gap = (grad.float() - exact)[fits].abs().max()
        assert gap <= 4 * torch.finfo(dtype).eps * exact[fits].abs().max() + 1e-7


@cases
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_lowers_nothing(case, dtype):
    want = outcome(case, *leaves(case))
    with torch.autocast("cpu", dtype):
        found = outcome(case, *leaves(case))
        terms = case.through(case.build().terms, *leaves(case))
    same(found, want, rtol=0, atol=0)
    assert all(term.dtype in (F32, F64) for term in terms)
    assert torch.equal(terms.total, want[0])


@cases
def test_mixed_dtypes(case):
    """A frozen model in half precision beside a trained one in float32; float64 wins."""
    for narrow, wide in ((torch.float16, F32), (F32, F64), (torch.bfloat16, F64)):
        inputs, target = make_inputs(case.names)
        target = torch.from_numpy(target)
        for odd in case.names:
            tensors = tensors_of(inputs, wide, case.names)
            if len(tensors) > 1:
                tensors[odd] = torch.from_numpy(inputs[odd]).to(narrow).requires_grad_()
            value, grads = outcome(case, tensors, target)
            alike = {n: t.detach().to(wide) for n, t in tensors.items()}
            assert value.dtype == wide
            torch.testing.assert_close(value, case.call(alike, target), rtol=1e-6, atol=0)
            assert all(g is None or g.dtype == tensors[n].dtype for n, g in grads.items())


HUGE = [
    *[case for case in EVERY if case.loss_name not in ("edl", "prior_network", "distillation")],
    Case("distillation", {"weight": 1.0}),
    Case("distillation", {"weight": 2.0, "direction": "reverse", "detach_ref": False}),
    Case("distillation", {"logit_scale": 60000.0, "detach_ref": False}),
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", HUGE, ids=str)
def test_the_largest_half_precision_inputs(case, autocast):
    """Up to 6e4 in float16, whose largest number is 65504: squares and sums do not fit it."""
    rng = np.random.default_rng(2)
    inputs = {}
    for name in case.names:
        shape = {"logits": (3, 5), "features": (3, 512)}.get(name.split("_")[0], (3, 7, 7))
        inputs[name] = rng.choice([-60000.0, -30000.0, 0.0, 45056.0, 60000.0], shape)
    target = np.array([0, 3, 4])
    terms = case.terms(inputs, target)
    for reduction in case.reductions:
        value_want, grads_want = loss_oracles.combine(terms, reduction, 1.0, case.summed)
        tensors = tensors_of(inputs, torch.float16, case.names)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            value, grads = outcome(case, tensors, torch.from_numpy(target), reduction)
        assert value.dtype == F32
        assert error(value, value_want) <= BOUNDS[F32]
        for name, grad in grads_want.items():
            found = grads[name].double().numpy()
            fits = np.abs(grad) < 65000
            assert fits.any()
            scale = np.abs(grad[fits]).max()
            assert np.isfinite(found[fits]).all(), name
            assert np.abs(found - grad)[fits].max() <= 2e-3 * scale + 1e-7, name


# Modules


@cases
def test_module_is_the_function(case):
    """Every option is passed on, and inputs go by the names in ``requires``."""
    tensors, target = leaves(case)
    for reduction in case.reductions:
        want = case.call(tensors, target, reduction=reduction)
        module = case.build(reduction)
        assert torch.equal(case.through(module, tensors, target), want)
        terms = case.through(module.terms, tensors, target)
        assert torch.equal(terms.total, want)
        assert terms._fields == case.loss.fields
        assert terms.total.requires_grad
        scalars = {"effective_weight"}
        assert all(getattr(terms, f).shape == want.shape for f in terms._fields if f not in scalars)


@cases
def test_arguments_in_order(case):
    positional = FORWARD[case.loss_name].split()
    tensors, target = leaves(case)
    values = {**tensors, **({"target": target} if case.takes_target else {})}
    ordered = [values.get(name) for name in positional]
    while ordered[-1] is None:
        ordered.pop()
    want = case.call(tensors, target)
    assert torch.equal(case.build()(*ordered, **case.forward), want)
    assert torch.equal(case.build().terms(*ordered, **case.forward).total, want)
    found = case.loss.function(*ordered, **case.options, **case.forward)
    assert torch.equal(found, want)


@cases
def test_requires(case):
    module = case.build()
    assert isinstance(module.requires, frozenset)
    assert module.requires == set(case.names)
    official = case.loss.module.official()
    assert isinstance(official.requires, frozenset)
    assert official.requires <= set(forward_names(official.forward)[0]) - {"target"}


def test_requires_of_the_official_ones():
    for loss in LOSSES.values():
        names = set(loss.inputs)
        if loss.name == "simclip":
            names = {"features_adv", "features_ref"}
        assert loss.module.official().requires == names


@cases
def test_a_missing_input_is_named(case):
    tensors, target = leaves(case)
    module = case.build()
    for missing in sorted(module.requires):
        fewer = {name: t for name, t in tensors.items() if name != missing}
        for call in (module, module.terms):
            with pytest.raises((TypeError, ValueError), match=missing):
                case.through(call, fewer, target)
        message = rf"^{missing}: expected .*, got (.*None|none)(;|$)"
        with pytest.raises((TypeError, ValueError), match=message):
            case.through(module, {**fewer, missing: None}, target)
    if case.takes_target and not case.loss.target_optional:
        with pytest.raises(TypeError, match="target"):
            module(**tensors)


@cases
def test_an_unknown_keyword_is_refused(case):
    tensors, target = leaves(case)
    for call in (case.build(), case.build().terms):
        with pytest.raises(TypeError, match="features_extra"):
            case.through(call, {**tensors, "features_extra": torch.ones(1)}, target)
    with pytest.raises(TypeError, match="strength"):
        case.call(tensors, target, strength=1.0)
    with pytest.raises(TypeError, match="strength"):
        case.build(strength=1.0)


@losses
def test_official(loss):
    module = loss.module.official()
    assert type(module) is loss.module
    assert module.training
    case = CASES[loss.name][-1 if loss.name == "simclip" else 0]
    tensors, target = leaves(case)
    value = case.through(module, tensors, target)
    assert value.shape == ()
    assert value.isfinite()
    value.backward()

    class Special(loss.module):
        """A subclass."""

    assert type(Special.official()) is Special


@cases
def test_repr_is_the_constructor(case):
    for module in (case.build(), case.build(case.reductions[-1]), case.loss.module.official()):
        names = inspect.signature(type(module)).parameters
        shown = ", ".join(f"{name}={getattr(module, name)!r}" for name in names)
        assert repr(module) == f"{type(module).__name__}({shown})"
        assert repr(eval(repr(module))) == repr(module)
    options = case.options if case.constructor is None else case.constructor
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(case.build())


@cases
def test_copies(case):
    tensors, target = leaves(case)
    module = case.build().eval()
    want = case.through(module, tensors, target)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double()):
        assert torch.equal(case.through(twin, tensors, target), want)
        assert repr(twin) == repr(module)
        assert twin.requires == module.requires
    terms = case.through(module.terms, tensors_of(make_inputs(case.names)[0]), target)
    assert all(map(torch.equal, pickle.loads(pickle.dumps(terms)), terms))
    assert not module.state_dict()
    assert not list(module.parameters())


@cases
def test_inputs_are_left_alone(case):
    tensors, target = leaves(case)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    labels = target.clone()
    outcome(case, tensors, target)
    case.through(case.build().terms, tensors, target)
    for name, t in tensors.items():
        assert t._version == 0
        assert torch.equal(t, before[name])
        assert t.requires_grad
    assert target._version == 0
    assert torch.equal(target, labels)


@cases
def test_no_gradients_no_graph(case):
    tensors, target = leaves(case)
    with torch.no_grad():
        value = case.call(tensors, target)
    assert not value.requires_grad
    plain = {name: t.detach() for name, t in tensors.items()}
    assert torch.equal(case.call(plain, target), value)
    assert not case.call(plain, target).requires_grad


@losses
def test_second_derivatives_are_right_or_refused(loss):
    """The KLs have their gradients written out, and say so instead of returning zeros."""
    case = CASES[loss.name][0]
    inputs, target = make_inputs(case.names, batch=2, classes=3, width=3, grid=(1, 3))
    tensors = tensors_of(inputs, F64, case.names)
    first = next(iter(tensors.values()))
    value = case.call(tensors, torch.from_numpy(target))
    (grad,) = torch.autograd.grad(value, first, create_graph=True)
    if "kl" in repr(case.loss.fields) or loss.name == "prior_network":
        with pytest.raises(RuntimeError, match=r"differentiated once only"):
            torch.autograd.grad(grad.sum(), first)
        return
    assert torch.autograd.gradgradcheck(
        lambda x: case.call({**tensors, next(iter(tensors)): x}, torch.from_numpy(target)),
        (first.detach().requires_grad_(),),
    )


@cases
def test_random_numbers_are_not_drawn(case):
    """Comp-TGA's code resets the global generator at each step."""
    tensors, target = leaves(case)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is looked at
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    values = [case.call(tensors, target) for _ in range(2)]
    assert torch.equal(*values)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], other)  # noqa: NPY002


@losses
def test_every_option_is_tried_away_from_its_default(loss):
    """The table above covers what the losses can do, and each of its rows differs."""
    tried = {name for case in CASES[loss.name] for name in (*case.options, *case.forward)}
    assert tried == set(OPTIONS[loss.name])
    shown = [str(case) for case in CASES[loss.name]]
    assert all(a != b for a, b in pairwise(sorted(shown)))
