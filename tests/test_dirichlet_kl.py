import gc
import itertools
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Dirichlet, kl_divergence

from calibclip import dirichlet_kl
from calibclip._kernels import closed_form, dirichlet_kl_parts, small, special

# Made by golden/make_dirichlet_kl.py, which says what is in it.
with np.load(Path(__file__).parent / "golden" / "dirichlet_kl.npz") as archive:
    GOLDEN = dict(archive)
CLASSES = (2, 10, 200, 1000)
BOUND = {torch.float32: 5e-6, torch.float64: 1e-12}
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """With deterministic algorithms PyTorch fills new buffers with NaN; unwritten outputs show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def approx(want, rel, abs=0.0):
    """As pytest's, whose silent absolute tolerance of 1e-12 would pass any tiny value."""
    return pytest.approx(want, rel=rel, abs=abs)


def golden(n_classes):
    columns = (
        "kind",
        "log_alpha",
        "log_beta",
        "kl",
        "shape",
        "evidence",
        "grad_alpha",
        "grad_beta",
    )
    return [GOLDEN[f"{name}_{n_classes}"] for name in columns]


def evaluate(log_alpha, log_beta, *, dtype=None, impl="auto", upstream=None):
    """Return both parts and both gradients, of rows ``(..., C)`` taken as one batch."""
    first, second = (
        torch.as_tensor(values).to(dtype).clone().requires_grad_()
        for values in (log_alpha, log_beta)
    )
    shape, evidence = dirichlet_kl_parts(first, second, impl=impl)
    kl = shape + evidence
    kl.backward(torch.ones_like(kl) if upstream is None else upstream)
    return shape.detach(), evidence.detach(), first.grad, second.grad


def errors(got, want):
    """Relative errors, by row; of a matrix, the relative norm."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if got.ndim == 1:
        got, want = got[:, None], want[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)


def assert_rows(got, want, bound, labels, where=None):
    wrong = errors(got, want)
    if where is not None:
        wrong = np.where(where, wrong, 0)
    failed = [f"{labels[i]} ({i}): {wrong[i]:.1e}" for i in np.flatnonzero(~(wrong <= bound))]
    assert not failed, f"relative errors above {bound}: {failed}"


def clip_like(n_rows, n_classes, sd, *, temperature=0.07, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    reference = rng.normal(0.2, 0.06, (n_rows, n_classes))
    cosines = np.clip([reference + rng.normal(0, sd, reference.shape), reference], -1, 1)
    return ((torch.from_numpy(cosines) + 1) / temperature).to(dtype).unbind()


# Accuracy


@pytest.mark.parametrize("n_classes", CLASSES)
def test_golden_table_is_mpmaths(n_classes):
    kind, log_alpha, log_beta, kl, shape, evidence, grad_alpha, grad_beta = golden(n_classes)
    rows = np.random.default_rng(7).choice(len(kind), size=1 if n_classes == 1000 else 4)
    for i in rows:
        want_kl, want_alpha, want_beta, want_shape = oracles.dirichlet_kl(
            log_alpha[i], log_beta[i], digits=100
        )
        assert kl[i] == approx(float(want_kl), rel=1e-15)
        assert evidence[i] == approx(float(want_kl - want_shape), rel=1e-15)
        assert shape[i] == approx(float(want_shape), rel=1e-15, abs=1e-80)
        np.testing.assert_allclose(grad_alpha[i], [float(g) for g in want_alpha], rtol=1e-15)
        np.testing.assert_allclose(grad_beta[i], [float(g) for g in want_beta], rtol=1e-15)


def test_golden_table_covers_the_promise():
    covered = {
        (n_classes, float(temperature), float(sd))
        for n_classes in CLASSES
        for temperature, sd in zip(
            GOLDEN[f"temperature_{n_classes}"], GOLDEN[f"sd_{n_classes}"], strict=True
        )
    }
    temperatures, sds = (0.03, 0.07, 0.5, 1.0), (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5)
    assert covered >= set(itertools.product(CLASSES, temperatures, sds))
    kinds = set(GOLDEN["kind_10"].tolist())
    assert kinds >= {"below 1", "straddling 6", "common shift", "unrelated", "extremes"}


@pytest.mark.parametrize("how", ["row-by-row", "row-by-row, many", "one-batch", "without-looking"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n_classes", CLASSES)
def test_golden_table(n_classes, dtype, how, monkeypatch):
    """Rows alone take the short cuts for their own regime; together, those for the widest.

    An accelerator takes none, since it is never looked at; nor is anything few there.
    """
    kind, log_alpha, log_beta, kl, shape, evidence, *grads = golden(n_classes)
    if how == "without-looking":
        monkeypatch.setattr(special, "may_look", lambda t: False)
    if how in ("row-by-row, many", "without-looking"):
        monkeypatch.setattr(small, "_FEW", 0)
    if not how.startswith("row-by-row"):
        found = evaluate(log_alpha, log_beta, dtype=dtype)
    else:
        pieces = [
            evaluate(log_alpha[i : i + 1], log_beta[i : i + 1], dtype=dtype)
            for i in range(len(kind))
        ]
        found = [torch.cat(values) for values in zip(*pieces, strict=True)]
    found_shape, found_evidence, *found_grads = found
    assert all(values.dtype == dtype for values in found)
    assert (found_shape >= 0).all()
    assert (found_evidence >= 0).all()

    bound, found_kl = BOUND[dtype], found_shape + found_evidence
    finite = kl < torch.finfo(dtype).max
    assert (found_kl[~torch.from_numpy(finite)] == torch.inf).all()
    assert_rows(found_kl, kl, bound, kind, finite)
    for found_grad, grad in zip(found_grads, grads, strict=True):
        assert_rows(found_grad, grad, bound, kind, np.abs(grad).max(-1) < torch.finfo(dtype).max)

    # A common shift leaves the shape alone. The evidence of unrelated rows is a small difference
    # and a small part of their KL; it is promised no digits.
    shift, far = kind == "common shift", np.isin(kind, ["unrelated", "extremes", "one class"])
    assert_rows(found_shape, shape, bound, kind, ~shift & finite)
    assert (np.asarray(found_shape, dtype=np.float64)[shift] <= bound * kl[shift]).all()
    assert_rows(found_evidence, evidence, bound, kind, ~far & finite)
    assert_rows(found_evidence, evidence, 1e-3, kind, finite)


@st.composite
def pairs(draw):
    """Two rows of 2 to 6 classes, from identical to unrelated, mostly with alpha >= 1."""
    size = draw(st.integers(2, 6))
    low = draw(st.sampled_from([-3.0, 0.0, 1.0, 10.0, 20.0]))
    level = st.floats(low, low + draw(st.sampled_from([0.5, 5.0, 14.0])), width=32)
    row = st.lists(level, min_size=size, max_size=size)
    log_alpha = draw(row)
    if draw(st.booleans()):
        scale = 10 ** draw(st.floats(-6, 0.7))
        steps = st.lists(st.floats(-1, 1), min_size=size, max_size=size)
        log_beta = [x + scale * step for x, step in zip(log_alpha, draw(steps), strict=True)]
    else:
        log_beta = draw(row)
    return np.float32([log_alpha]), np.float32([log_beta])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(pairs())
def test_against_mpmath(inputs):
    log_alpha, log_beta = inputs
    kl, *grads, shape = oracles.dirichlet_kl(log_alpha[0], log_beta[0])
    for dtype, bound in BOUND.items():
        found_shape, found_evidence, *found_grads = evaluate(log_alpha, log_beta, dtype=dtype)
        if (log_alpha == log_beta).all():
            assert not torch.stack((found_shape, found_evidence)).any()
            assert not torch.stack(found_grads).any()
            continue
        assert float(found_shape + found_evidence) == approx(float(kl), rel=bound)
        assert float(found_shape) == approx(float(shape), rel=bound, abs=bound * float(kl))
        for found_grad, grad in zip(found_grads, grads, strict=True):
            want = np.array([[float(g) for g in grad]])
            assert errors(found_grad, want) <= bound


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_exactly_zero_at_equality(dtype):
    """Also in a batch whose other rows are close, distant, or neither."""
    rng = torch.Generator().manual_seed(0)
    low = torch.tensor([-60.0, -3.0, 0.0, 1.5, 10.0, 20.0, 60.0]).unsqueeze(-1)
    rows = (low + 12 * torch.rand(len(low), 37, generator=rng)).to(dtype)
    for gap in (0.0, 1e-4, 1.0, 40.0):
        log_alpha, log_beta = rows.repeat(2, 1), rows.repeat(2, 1)
        log_beta[len(rows) :] += gap * torch.rand(rows.shape, generator=rng).to(dtype)
        found = evaluate(log_alpha, log_beta)
        assert not any(values[: len(rows)].any() for values in found)
    assert not any(values.any() for values in evaluate(rows, rows))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("low", [-20.0, -4.0, 0.0, 20.0])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1.0, 10.0])
def test_never_negative(dtype, low, gap):
    """Least certain where one class holds all the evidence and it alone moves."""
    rng = torch.Generator().manual_seed(0)
    log_alpha = low + 20 * torch.rand(1000, 3, generator=rng).square()
    change = gap * torch.randn(1000, 3, generator=rng)
    only_top = torch.nn.functional.one_hot(log_alpha.argmax(-1), 3) * change
    for moved in (log_alpha + change, log_alpha + only_top, log_alpha + change[:, :1]):
        parts = dirichlet_kl_parts(log_alpha.to(dtype), moved.to(dtype))
        assert all((part >= 0).all() for part in parts)


@pytest.mark.parametrize("temperature", [0.03, 0.07, 1.0])
def test_one_unit_in_the_last_place_is_seen(temperature):
    log_alpha, _ = clip_like(8, 20, 0, temperature=temperature)
    log_beta = log_alpha.clone()
    log_beta[:, 3] = torch.nextafter(log_beta[:, 3], torch.tensor(torch.inf))
    kl = dirichlet_kl(log_alpha, log_beta)
    want = [float(oracles.dirichlet_kl(a, b)[0]) for a, b in zip(log_alpha, log_beta, strict=True)]
    assert (kl > 0).all()
    assert errors(kl, want).max() <= 5e-6


# Implementations


def test_eager_is_the_automatic_choice():
    inputs = clip_like(4, 30, 1e-3)
    for got, want in zip(evaluate(*inputs, impl="eager"), evaluate(*inputs), strict=True):
        assert torch.equal(got, want)


def test_reference_is_in_float64():
    log_alpha, log_beta = clip_like(5, 30, 1e-3)
    assert dirichlet_kl(log_alpha, log_beta, impl="reference").dtype == F64
    shape, evidence, *grads = evaluate(log_alpha, log_beta, impl="reference")
    wide = evaluate(log_alpha, log_beta, dtype=F64)
    assert torch.equal(shape, wide[0])
    assert torch.equal(evidence, wide[1])
    for grad, want in zip(grads, wide[2:], strict=True):
        assert grad.dtype == F32
        assert torch.equal(grad, want.float())


def test_torch_distributions_is_that():
    log_alpha, log_beta = clip_like(6, 30, 0.1, temperature=0.5, dtype=F64)
    direct = kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(log_beta.exp()))
    textbook = dirichlet_kl(log_alpha, log_beta, impl="torch_distributions")
    torch.testing.assert_close(textbook, direct, rtol=1e-14, atol=0)
    shape, evidence, *grads = evaluate(log_alpha, log_beta, impl="torch_distributions")
    ours = evaluate(log_alpha, log_beta)
    for got, want in zip((shape, evidence, *grads), ours, strict=True):
        assert errors(got, want).max() <= 1e-8


def test_torch_distributions_in_float32_is_wrong_by_more_than_its_value():
    log_alpha, log_beta = clip_like(64, 200, 1e-5)
    kl = dirichlet_kl(log_alpha, log_beta, impl="reference")
    assert kl.min() > 10
    direct = kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(log_beta.exp()))
    textbook = dirichlet_kl(log_alpha, log_beta, impl="torch_distributions")
    assert textbook.dtype == F32
    for published in (direct, textbook):
        assert errors(published, kl).mean() > 1
        assert (published < 0).any()
        assert abs(published.double().mean() / kl.mean() - 1) > 1
    ours = dirichlet_kl(log_alpha, log_beta)
    assert errors(ours, kl).max() < 5e-6
    assert ours.double().mean() == approx(float(kl.mean()), rel=5e-6)


# Scale, shift and weight of the private entry


@pytest.mark.parametrize("sd", [1e-5, 1e-3, 0.2])
def test_affine_logits(sd):
    logits = [100 * cosine for cosine in clip_like(3, 12, sd, temperature=1.0)]
    logits = [values - 100 for values in logits]
    scale, shift, log_weight = 1 / (100 * 0.03), 1 / 0.03, -30.5
    first, second = (values.clone().requires_grad_() for values in logits)
    shape, evidence = dirichlet_kl_parts(
        first, second, scale=scale, shift=shift, log_weight=log_weight
    )
    (shape + evidence).sum().backward()
    for i in range(3):
        with oracles.mpmath.workdps(60):
            rows = [
                [oracles.number(scale) * oracles.number(z) + oracles.number(shift) for z in row]
                for row in (first[i].detach(), second[i].detach())
            ]
            weight = oracles.mpmath.exp(log_weight)
            kl, *grads, want_shape = oracles.dirichlet_kl(*rows)
            want_evidence = float(weight * (kl - want_shape))
            want_shape = float(weight * want_shape)
            grads = [[float(weight * oracles.number(scale) * g) for g in grad] for grad in grads]
        assert shape[i].item() == approx(want_shape, rel=5e-6)
        assert evidence[i].item() == approx(want_evidence, rel=5e-6)
        assert errors(first.grad[i : i + 1], grads[:1]) <= 5e-6
        assert errors(second.grad[i : i + 1], grads[1:]) <= 5e-6


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_extreme_weights(dtype):
    log_alpha, log_beta = (t.requires_grad_() for t in clip_like(4, 10, 0.03, dtype=dtype))
    nothing = dirichlet_kl_parts(log_alpha, log_beta, log_weight=-torch.inf)
    sum(part.sum() for part in nothing).backward()
    for values in (*nothing, log_alpha.grad, log_beta.grad):
        assert not values.any()

    # The concentrations, near e^130, do not fit float32; their weighted divergence does.
    shift = 110.0
    inputs = [t.detach().requires_grad_() for t in (log_alpha, log_beta)]
    weighted = sum(dirichlet_kl_parts(*inputs, shift=shift, log_weight=-shift - 20))
    weighted.sum().backward()
    for i in range(4):
        rows = [[oracles.number(x) + 110 for x in row.detach()[i]] for row in inputs]
        kl, *grads, _ = oracles.dirichlet_kl(*rows)
        weight = oracles.mpmath.exp(-130)
        assert weighted[i].item() == approx(float(weight * kl), rel=BOUND[dtype])
        for row, grad in zip(inputs, grads, strict=True):
            want = [[float(weight * g) for g in grad]]
            assert errors(row.grad[i : i + 1], want) <= BOUND[dtype]

    light, heavy = (
        sum(dirichlet_kl_parts(*inputs, log_weight=value)).detach() for value in (0.0, 40.0)
    )
    heavier = light * torch.tensor(40.0, dtype=F64).exp().to(dtype)
    torch.testing.assert_close(heavy, heavier, rtol=BOUND[dtype], atol=0)


def test_weight_may_be_a_tensor_on_its_own():
    inputs = clip_like(4, 10, 0.03)
    numbers = dirichlet_kl_parts(*inputs, log_weight=-3.25)
    tensors = dirichlet_kl_parts(*inputs, log_weight=torch.tensor(-3.25, dtype=F64))
    for got, want in zip(tensors, numbers, strict=True):
        assert torch.equal(got, want)


# Autograd


def regimes():
    rng = torch.Generator().manual_seed(3)
    for low, high, gap in ((-2, 1, 0.3), (0, 4, 1e-3), (1, 3, 4.0), (3, 6, 0.3)):
        first = low + (high - low) * torch.rand(3, 5, generator=rng, dtype=F64)
        yield first, first + gap * torch.randn(3, 5, generator=rng, dtype=F64)


@pytest.mark.parametrize("inputs", list(regimes()), ids=["below 1", "close", "far", "large"])
def test_gradcheck(inputs):
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(dirichlet_kl, inputs)

    def parts(first, second):
        return dirichlet_kl_parts(first, second, scale=0.7, shift=0.4, log_weight=-1.5)

    assert torch.autograd.gradcheck(parts, inputs)


def test_random_upstream_gradient_and_every_subset():
    log_alpha, log_beta = clip_like(6, 30, 0.02)
    upstream = torch.randn(6, generator=torch.Generator().manual_seed(1))
    *_, grad_alpha, grad_beta = evaluate(log_alpha, log_beta, dtype=F64)
    want = [upstream.double().unsqueeze(-1) * grad for grad in (grad_alpha, grad_beta)]
    *_, both_alpha, both_beta = evaluate(log_alpha, log_beta, upstream=upstream)
    assert errors(both_alpha, want[0]).max() <= 5e-6
    assert errors(both_beta, want[1]).max() <= 5e-6

    for needs in ((True, False), (False, True)):
        inputs = [
            values.clone().requires_grad_(need)
            for values, need in zip((log_alpha, log_beta), needs, strict=True)
        ]
        dirichlet_kl(*inputs).backward(upstream)
        for row, need, grad in zip(inputs, needs, (both_alpha, both_beta), strict=True):
            assert torch.equal(row.grad, grad) if need else row.grad is None
    assert not dirichlet_kl(log_alpha, log_beta).requires_grad


def matrices_in_python(size):
    """Return the storages of that many elements or more that Python objects hold, by address."""
    gc.collect()
    held = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    return {t.untyped_storage().data_ptr() for t in held if t.numel() >= size}


def saved_matrices(function, *inputs):
    """Count the storages of the inputs' size kept for backward beyond the inputs' own."""
    size, kept = inputs[0].numel(), {}

    def pack(tensor):
        if tensor.numel() >= size:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, lest its address be used again
        return tensor

    function(*inputs)  # imports what it uses
    before = matrices_in_python(size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    assert output.requires_grad
    return len((kept.keys() | matrices_in_python(size)) - before)


@pytest.mark.parametrize("sd", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_keeps_no_matrix(sd, dtype):
    log_alpha, log_beta = clip_like(16, 50, sd, dtype=dtype)
    for needs in ((True, False), (False, True), (True, True)):
        inputs = [
            values.detach().clone().requires_grad_(need)
            for values, need in zip((log_alpha, log_beta), needs, strict=True)
        ]
        assert saved_matrices(lambda a, b: dirichlet_kl(a, b, "sum"), *inputs) == 0


def test_the_count_of_matrices_can_fail():
    class Hoards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, first, second):
            ctx.kept = first.exp()
            return ctx.kept.sum()

    inputs = [values.requires_grad_() for values in clip_like(16, 50, 1e-2)]
    assert saved_matrices(Hoards.apply, *inputs) == 1
    assert saved_matrices(lambda a, b: (a.exp() * b.exp()).sum(), *inputs) == 2


def test_torch_distributions_keeps_several_matrices():
    inputs = [values.requires_grad_() for values in clip_like(16, 50, 1e-2)]

    def published(log_alpha, log_beta):
        return kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(log_beta.exp())).sum()

    assert saved_matrices(published, *inputs) >= 3


@pytest.mark.parametrize("other", [0, 1], ids=["own", "other"])
def test_double_backward_is_refused(other):
    """Not silently left out: a penalty on the gradient would then just not train."""
    inputs = [values.requires_grad_() for values in clip_like(2, 5, 1e-2)]
    kl = dirichlet_kl(*inputs, "sum")
    grads = torch.autograd.grad(kl, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        (kl + grads[other].square().sum()).backward()


@pytest.mark.parametrize("sd", [1e-4, 0.5])
@pytest.mark.parametrize("shift", [0, -14], ids=["large", "small"])
def test_inputs_are_left_alone(sd, shift):
    inputs = [(values + shift).requires_grad_() for values in clip_like(4, 30, sd)]
    before = [values.detach().clone() for values in inputs]
    versions = [values._version for values in inputs]
    upstream = torch.rand(4)
    kept = upstream.clone()
    dirichlet_kl(*inputs).backward(upstream)
    assert [values._version for values in inputs] == versions
    assert all(map(torch.equal, (values.detach() for values in inputs), before))
    assert torch.equal(upstream, kept)


def test_changing_an_input_before_backward_is_noticed():
    log_alpha, log_beta = clip_like(2, 5, 1e-2)
    log_alpha.requires_grad_()
    kl = dirichlet_kl(log_alpha, log_beta, "sum")
    log_beta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


# Shapes, rows, classes


def assert_same(found, want, bound=5e-6):
    for got, expected in zip(found, want, strict=True):
        size = expected.shape[-1] if expected.ndim > 1 else 1
        assert errors(got.reshape(-1, size), expected.reshape(-1, size)).max() <= bound


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10**6), sd=st.sampled_from([1e-4, 0.03, 0.4]))
def test_order_and_splitting_do_not_matter(seed, sd):
    log_alpha, log_beta = clip_like(6, 9, sd, seed=seed)
    rng = np.random.default_rng(seed)
    rows, classes, cut = rng.permutation(6), rng.permutation(9), int(rng.integers(1, 6))
    whole = evaluate(log_alpha, log_beta)

    split = [
        torch.cat(halves)
        for halves in zip(
            evaluate(log_alpha[:cut], log_beta[:cut]),
            evaluate(log_alpha[cut:], log_beta[cut:]),
            strict=True,
        )
    ]
    assert_same(split, whole)

    moved = evaluate(log_alpha[rows][:, classes], log_beta[rows][:, classes])
    assert_same(
        moved, [values[rows][:, classes] if values.ndim == 2 else values[rows] for values in whole]
    )


def test_blocks_of_rows_agree_with_single_rows(monkeypatch):
    """Equal, close, distant and small concentrations: no block is like the next."""
    n_rows, n_classes = 40, 100
    monkeypatch.setattr(closed_form, "_BLOCK_ON_CPU", 9 * n_classes + 50)
    blocks = list(closed_form.row_blocks(torch.empty(n_rows, n_classes)))
    assert len(blocks) >= 4
    assert list(range(n_rows)) == [i for block in blocks for i in range(n_rows)[block]]

    log_alpha, log_beta = clip_like(n_rows, n_classes, 1e-3)
    equal, _, distant, small = blocks[:4]
    log_beta[equal] = log_alpha[equal]
    noise = torch.randn(log_beta[distant].shape, generator=torch.Generator().manual_seed(0))
    log_beta[distant] += noise
    log_alpha[small] -= 15
    log_beta[small] -= 15
    upstream = torch.rand(n_rows, generator=torch.Generator().manual_seed(1)) + 0.5
    found = evaluate(log_alpha, log_beta, upstream=upstream)
    assert not any(values[equal].any() for values in found)
    for block in blocks[1:]:
        for i in {block.start, min(block.stop, n_rows) - 1}:
            one = slice(i, i + 1)
            alone = evaluate(log_alpha[one], log_beta[one], upstream=upstream[one])
            assert_same([values[one] for values in found], alone)


def test_a_row_larger_than_a_block(monkeypatch):
    monkeypatch.setattr(closed_form, "_BLOCK_ON_CPU", 100)
    log_alpha, log_beta = clip_like(2, 1000, 1e-2)
    assert_same(evaluate(log_alpha, log_beta), evaluate(log_alpha, log_beta, dtype=F64))


def test_leading_shapes():
    log_alpha, log_beta = clip_like(12, 7, 0.02)
    want = evaluate(log_alpha, log_beta)
    shaped = (log_alpha.view(3, 4, 7), log_beta.view(3, 4, 7))
    assert dirichlet_kl(*shaped).shape == (3, 4)
    found = evaluate(*shaped)
    assert found[2].shape == found[3].shape == (3, 4, 7)
    assert_same(found, want)

    single = evaluate(log_alpha[0], log_beta[0])
    assert dirichlet_kl(log_alpha[0], log_beta[0]).shape == ()
    assert single[2].shape == (7,)
    torch.testing.assert_close(single[0], want[0][0], rtol=5e-6, atol=0)
    torch.testing.assert_close(single[2], want[2][0], rtol=1e-5, atol=1e-2)


def test_strides():
    log_alpha, log_beta = clip_like(6, 8, 0.02)
    want = evaluate(log_alpha, log_beta)
    padded = torch.full((6, 16), torch.nan)
    padded[:, ::2] = log_alpha
    transposed = log_beta.T.contiguous().T
    assert not padded[:, ::2].is_contiguous()
    assert not transposed.is_contiguous()
    assert_same(evaluate(padded[:, ::2], transposed), want)

    row = log_beta[:1].requires_grad_()
    expanded = row.expand(6, 8)
    first = log_alpha.clone().requires_grad_()
    dirichlet_kl(first, expanded, "sum").backward()
    copied = evaluate(log_alpha, expanded.detach().contiguous())
    assert_same([first.grad], [copied[2]])
    assert_same([row.grad], [copied[3].sum(0, keepdim=True)])

    uniform = torch.tensor([[14.0]]).expand(6, 8)
    assert_same(
        [dirichlet_kl(log_alpha, uniform)], [dirichlet_kl(log_alpha, torch.full((6, 8), 14.0))]
    )


def test_reductions_and_empty_batches():
    log_alpha, log_beta = clip_like(5, 8, 0.02)
    rows = dirichlet_kl(log_alpha, log_beta)
    torch.testing.assert_close(dirichlet_kl(log_alpha, log_beta, "mean"), rows.mean())
    torch.testing.assert_close(dirichlet_kl(log_alpha, log_beta, reduction="sum"), rows.sum())

    for impl in ("auto", "reference"):
        empty = torch.empty(0, 8, requires_grad=True)
        assert dirichlet_kl(empty, empty, impl=impl).shape == (0,)
        assert dirichlet_kl(empty, empty, "mean", impl=impl).isnan()
        total = dirichlet_kl(empty, empty.detach(), "sum", impl=impl)
        assert total == 0
        total.backward()
        assert empty.grad.shape == (0, 8)
    assert dirichlet_kl(torch.empty(2, 0, 3), torch.empty(2, 0, 3)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_one_class_has_no_divergence(dtype):
    log_alpha = torch.tensor([[-3.0], [0.0], [1.7], [15.0], [40.0]], dtype=dtype)
    for gap in (1e-4, 1.0, 5.0):
        assert not any(values.any() for values in evaluate(log_alpha, log_alpha + gap))


# Dtypes and values that are not numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_upcast_first(dtype, autocast):
    log_alpha, log_beta = ((values / 6).to(dtype) for values in clip_like(5, 8, 0.1))
    want = evaluate(log_alpha, log_beta, dtype=F32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shape, evidence, *grads = evaluate(log_alpha, log_beta)
    assert torch.equal(shape, want[0])
    assert torch.equal(evidence, want[1])
    for grad, expected in zip(grads, want[2:], strict=True):
        assert grad.dtype == dtype
        assert torch.equal(grad, expected.to(dtype))


def test_autocast_does_not_touch_float32():
    inputs = clip_like(5, 8, 1e-3)
    want = evaluate(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(*inputs)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [(F32, F64, F64), (F64, F32, F64), (torch.float16, F32, F32), (F32, torch.bfloat16, F32)],
    ids=str,
)
def test_mixed_dtypes(first, second, result):
    log_alpha, log_beta = clip_like(5, 8, 0.1, temperature=0.5)
    log_alpha, log_beta = log_alpha.to(first).requires_grad_(), log_beta.to(second).requires_grad_()
    kl = dirichlet_kl(log_alpha, log_beta)
    kl.sum().backward()
    want = evaluate(log_alpha.detach(), log_beta.detach(), dtype=result)
    assert kl.dtype == result
    assert torch.equal(kl, want[0] + want[1])
    assert torch.equal(log_alpha.grad, want[2].to(first))
    assert torch.equal(log_beta.grad, want[3].to(second))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shift", [0, -14], ids=["large", "small"])
@pytest.mark.parametrize("sd", [1e-3, 0.6])
def test_nan_stays_in_its_row(dtype, shift, sd):
    log_alpha, log_beta = (values + shift for values in clip_like(6, 8, sd, dtype=dtype))
    want = evaluate(log_alpha, log_beta)
    spoilt_alpha, spoilt_beta = log_alpha.clone(), log_beta.clone()
    spoilt_alpha[1, 3] = spoilt_beta[4, 0] = torch.nan
    spoilt = evaluate(spoilt_alpha, spoilt_beta)
    good, bad = [0, 2, 3, 5], [1, 4]
    assert (spoilt[0] + spoilt[1])[bad].isnan().all()
    assert all(grad[bad].isnan().any(-1).all() for grad in spoilt[2:])
    assert_same([values[good] for values in spoilt], [values[good] for values in want])


# Errors


@pytest.mark.parametrize(
    ("log_alpha", "log_beta", "error", "message"),
    [
        ([1.0], torch.ones(1), TypeError, r"^log_alpha: expected a floating-point tensor of shape"),
        (
            torch.ones(2, 3).long(),
            torch.ones(2, 3),
            TypeError,
            r"got int64 tensor of shape \(2, 3\); call log_alpha.float\(\)$",
        ),
        (torch.ones(2, 3), np.ones((2, 3)), TypeError, r"^log_beta: .* got float64 array of shape"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"\(\.\.\., C\), got float32 .* \(\)$"),
        (torch.ones(3), torch.tensor(1.0), ValueError, r"^log_beta: .* of shape \(\)$"),
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, r"log_alpha, \(2, 3\), got \(2, 4\)$"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"log_alpha, \(2, 3\), got \(3,\)$"),
        (
            torch.ones(3),
            torch.ones(3, device="meta"),
            ValueError,
            "of log_alpha, cpu, got meta; move one of the two$",
        ),
    ],
)
def test_bad_inputs(log_alpha, log_beta, error, message):
    with pytest.raises(error, match=message):
        dirichlet_kl(log_alpha, log_beta)


def test_unknown_names():
    row = torch.ones(3)
    with pytest.raises(ValueError, match=r"^reduction: expected one of 'none', .*, got 'max'$"):
        dirichlet_kl(row, row, "max")
    with pytest.raises(ValueError, match=r"^impl: expected one of 'auto', .*, got 'fast'$"):
        dirichlet_kl(row, row, impl="fast")


def exact_evidence(log_alpha, log_beta):
    """The evidence part of one row and its gradients: what is left when the shape's are taken."""
    mp = oracles.mpmath
    with mp.workdps(80):
        kl, by_alpha, by_beta, shape = oracles.dirichlet_kl(log_alpha, log_beta)
        alpha, beta = ([mp.exp(oracles.number(x)) for x in row] for row in (log_alpha, log_beta))
        alpha_0, beta_0 = mp.fsum(alpha), mp.fsum(beta)
        p, q = [a / alpha_0 for a in alpha], [b / beta_0 for b in beta]
        shape_alpha = [beta_0 * (pk - qk) for pk, qk in zip(p, q, strict=True)]
        shape_beta = [beta_0 * qk * mp.log(qk / pk) for pk, qk in zip(p, q, strict=True)]
        pairs = ((by_alpha, shape_alpha), (by_beta, shape_beta))
        grads = [[float(g - s) for g, s in zip(*pair, strict=True)] for pair in pairs]
        return float(kl - shape), grads


@pytest.mark.parametrize("common", [0.0, 0.3, -1.0])
def test_evidence_alone_at_large_concentrations(common):
    """Where CLIP is: no term of Stirling's series matters, and the shape lends its sums."""
    generator = torch.Generator().manual_seed(3)
    log_alpha = 17 + 0.5 * torch.randn(3, 40, generator=generator)
    log_beta = log_alpha + common + 0.2 * torch.randn(3, 40, generator=generator)
    inputs = [log_alpha.requires_grad_(), log_beta.requires_grad_()]
    _, evidence = dirichlet_kl_parts(*inputs)
    evidence.sum().backward()
    for i in range(3):
        value, grads = exact_evidence(*(row.detach()[i].tolist() for row in inputs))
        assert evidence[i].item() == approx(value, rel=5e-6)
        for row, grad in zip(inputs, grads, strict=True):
            assert errors(row.grad[i : i + 1], [grad]) <= 5e-6


def test_evidence_when_the_leading_class_alone_moves():
    """The evidence of the total and of that class nearly cancel; what the others add must stay."""
    generator = torch.Generator().manual_seed(4)
    log_alpha = 17 + 0.1 * torch.randn(1, 40, generator=generator)
    log_alpha[0, 7] = 35.0
    log_beta = log_alpha + 0.01 * torch.randn(1, 40, generator=generator)
    log_beta[0, 7] += 1.0
    _, evidence = dirichlet_kl_parts(log_alpha, log_beta)
    value, _ = exact_evidence(log_alpha[0].tolist(), log_beta[0].tolist())
    assert evidence.item() == approx(value, rel=3e-4)


def test_equal_predictions_are_at_zero_beyond_the_range():
    log_alpha = torch.full((2, 1000), 85.0)
    assert dirichlet_kl(log_alpha, log_alpha.clone()).tolist() == [0.0, 0.0]
