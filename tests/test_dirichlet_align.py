import math
from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip import (
    AlignTerms,
    DirichletAlignLoss,
    DirichletHead,
    dirichlet_align_loss,
    dirichlet_align_terms,
    dirichlet_kl,
)

F32, F64 = torch.float32, torch.float64
mp = oracles.mpmath


def approx(want, rel, abs=0.0):
    """As pytest's, whose silent absolute tolerance of 1e-12 would pass any tiny value."""
    return pytest.approx(want, rel=rel, abs=abs)


def clip_logits(n_rows, n_classes, sd=0.03, *, scale=100.0, seed=0, dtype=F32):
    """Return logits of the attacked and of the clean images, and labels."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(0.2, 0.06, (n_rows, n_classes))
    cosines = np.clip([reference + rng.normal(0, sd, reference.shape), reference], -1, 1)
    adv, ref = (scale * torch.from_numpy(cosines)).to(dtype).unbind()
    return adv, ref, torch.from_numpy(rng.integers(n_classes, size=n_rows))


def exact(adv, ref, *, scale=100.0, temperature=0.07, direction="reverse"):
    """Return, per row and by mpmath: KL, shape, gradients in both logits, alpha_0(ref)."""
    rows = []
    for pair in zip(adv.detach(), ref.detach(), strict=True):
        log_adv, log_ref = (oracles.log_concentrations(z, scale, temperature) for z in pair)
        with mp.workdps(120):
            strength = mp.fsum(mp.exp(x) for x in log_ref)
            slope = 1 / (oracles.number(scale) * oracles.number(temperature))
        if direction == "reverse":
            kl, by_adv, by_ref, shape = oracles.dirichlet_kl(log_adv, log_ref, digits=120)
        else:
            kl, by_ref, by_adv, shape = oracles.dirichlet_kl(log_ref, log_adv, digits=120)
        rows.append((kl, shape, [slope * g for g in by_adv], [slope * g for g in by_ref], strength))
    return [list(column) for column in zip(*rows, strict=True)]


def norm_error(got, want):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def cross_entropy(logits, target):
    """Textbook cross-entropy and its gradient, per row, by plain loops."""
    values, grads = [], []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        values.append(math.log(sum(weights)) + top - row[label])
        grads.append([w / sum(weights) - (k == label) for k, w in enumerate(weights)])
    return np.array(values), np.array(grads)


# Accuracy


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("sd", [1e-5, 1e-3, 0.05])
@pytest.mark.parametrize("temperature", [0.07, 0.03, 0.01])
def test_float32_logits_against_mpmath(temperature, sd, direction):
    """At T = 0.01 alpha itself, near e^125, does not fit float32."""
    adv, ref, target = clip_logits(3, 20, sd)
    loss = DirichletAlignLoss(
        temperature=temperature, direction=direction, detach_ref=False, reduction="none"
    )
    kl, _, by_adv, by_ref, strength = exact(adv, ref, temperature=temperature, direction=direction)
    paper = oracles.paper_weight(temperature)
    relative = 170 / (mp.fsum(strength) / 3)
    weights = {"weight": paper, "relative_weight": relative}
    for option, weight in weights.items():
        loss.relative_weight = 170.0 if option == "relative_weight" else None
        inputs = [values.clone().requires_grad_() for values in (adv, ref)]
        value = loss(*inputs)
        value.sum().backward()
        want = [float(weight * row) for row in kl]
        assert value.dtype == F32
        assert value.tolist() == approx(want, rel=5e-6)
        for row, grads in zip(inputs, (by_adv, by_ref), strict=True):
            for got, grad in zip(row.grad, grads, strict=True):
                grad = [float(weight * g) for g in grad]
                if max(map(abs, grad)) > 1e-30:  # the paper's weight at T = 0.01 leaves nothing
                    assert norm_error(got, grad) <= 5e-6

        total = loss(adv, ref, target)
        entropy, _ = cross_entropy(adv, target)
        assert total.tolist() == approx(list(entropy + want), rel=5e-6)
        assert total.isfinite().all()


def test_temperature_so_low_that_alpha_fits_no_float():
    """At T = 0.002 ln alpha is near 600: alpha overflows float32 and almost float64."""
    adv, ref, _ = clip_logits(3, 10, 1e-3)
    kl, _, by_adv, _, strength = exact(adv, ref, temperature=0.002)
    weight = 3 / mp.fsum(strength)
    adv.requires_grad_()
    value = dirichlet_align_loss(adv, ref, temperature=0.002, relative_weight=1.0, reduction="none")
    value.sum().backward()
    # Logits over s T are near 125 here, and float32 rounds them by half the bound already.
    assert value.tolist() == approx([float(weight * row) for row in kl], rel=1e-5)
    assert norm_error(adv.grad, [[float(weight * g) for g in row] for row in by_adv]) <= 5e-6


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_unrelated_predictions(temperature, direction):
    """At T = 0.01 ln alpha runs from 0 to 200: even the gaps' exponentials overflow float32."""
    cosines = np.random.default_rng(5).uniform(-1, 1, (2, 6, 8))
    adv, ref = (100 * torch.from_numpy(cosines)).float().unbind()
    ref[0, 3], adv[1, 4] = -99, -99.5
    options = {"temperature": temperature, "direction": direction}
    kl, _, by_adv, _, strength = exact(adv, ref, **options)
    weight = 6 / mp.fsum(strength)
    adv.requires_grad_()
    value = dirichlet_align_loss(adv, ref, relative_weight=1.0, reduction="none", **options)
    value.sum().backward()
    largest = max(float(weight * row) for row in kl)
    for i in range(6):
        want = float(weight * kl[i])
        if 1e-30 * largest < want < 1e37:
            assert value[i].item() == approx(want, rel=1e-5)
            assert norm_error(adv.grad[i], [float(weight * g) for g in by_adv[i]]) <= 1e-5
        else:
            assert not value[i].isnan()


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_nothing_is_left_at_equality(temperature):
    adv, _, _ = clip_logits(4, 30)
    inputs = [adv.clone().requires_grad_() for _ in range(2)]
    value = dirichlet_align_loss(
        *inputs, temperature=temperature, relative_weight=170.0, detach_ref=False
    )
    value.backward()
    assert value == 0
    assert not any(row.grad.any() for row in inputs)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    sd=st.sampled_from([1e-4, 1e-2, 0.3]),
    temperature=st.sampled_from([0.03, 0.07, 0.5]),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
)
def test_any_scale_against_float64(seed, sd, temperature, scale):
    adv, ref, target = clip_logits(4, 7, sd, scale=scale, seed=seed)
    options = {"logit_scale": scale, "temperature": temperature, "relative_weight": 5.0}
    value = dirichlet_align_loss(adv, ref, target, **options)
    wide = dirichlet_align_loss(adv.double(), ref.double(), target, **options)
    assert value.dtype == F32
    assert wide.dtype == F64
    assert float(value) == approx(float(wide), rel=5e-6)
    rows = [[(z / scale + 1) / temperature for z in row] for row in (adv.double(), ref.double())]
    log_adv, log_ref = (torch.stack(list(row)) for row in rows)
    strength = log_ref.exp().sum(-1).mean()
    entropy, _ = cross_entropy(adv, target)
    want = entropy.mean() + 5 * float((dirichlet_kl(log_adv, log_ref) / strength).mean())
    assert float(wide) == approx(want, rel=1e-9)


# Terms


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_terms_are_the_textbook_parts(direction, dtype):
    adv, ref, target = clip_logits(4, 12, dtype=dtype)
    loss = DirichletAlignLoss(temperature=0.07, direction=direction, reduction="none")
    terms = loss.terms(adv, ref, target)
    assert isinstance(terms, AlignTerms)
    assert terms._fields == (
        "total",
        "cross_entropy",
        "kl",
        "shape",
        "evidence",
        "effective_weight",
    )
    bound = 5e-6 if dtype == F32 else 1e-10

    kl, shape, *_, strength = exact(adv, ref, direction=direction)
    paper = 1e5 / (1 + math.exp(2 / 0.07))
    entropy, _ = cross_entropy(adv, target)
    mean_strength = float(mp.fsum(strength) / 4)
    want = {
        "total": [float(e + paper * row) for e, row in zip(entropy, kl, strict=True)],
        "cross_entropy": list(entropy),
        "kl": [float(row) for row in kl],
        "shape": [float(row) for row in shape],
        "evidence": [float(k - s) for k, s in zip(kl, shape, strict=True)],
    }
    for name, values in want.items():
        assert getattr(terms, name).tolist() == approx(values, rel=bound), name
    assert float(terms.effective_weight) == approx(paper * mean_strength, rel=bound)

    # The shape is b_0 KL_cat(q || p) of the softmaxes at T, by plain loops.
    first, second = (adv, ref) if direction == "reverse" else (ref, adv)
    for i in range(4):
        a, b = (
            [math.exp((float(z) / 100 + 1) / 0.07) for z in row] for row in (first[i], second[i])
        )
        a0, b0 = sum(a), sum(b)
        categorical = sum(
            y / b0 * (math.log(y / b0) - math.log(x / a0)) for x, y in zip(a, b, strict=True)
        )
        assert float(terms.shape[i]) == approx(b0 * categorical, rel=max(bound, 1e-9))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
def test_identities_between_the_terms(temperature, reduction):
    adv, ref, target = clip_logits(5, 9)
    fixed = math.exp(-1.3 / temperature)
    for options in ({}, {"weight": fixed}, {"relative_weight": 20.0}):
        terms = dirichlet_align_terms(
            adv, ref, target, temperature=temperature, reduction=reduction, **options
        )
        strength = ((ref.double() / 100 + 1) / temperature).exp().sum(-1).mean()
        weight = float(terms.effective_weight / strength)
        if "weight" in options:
            assert weight == approx(fixed, rel=1e-5)
        elif not options:
            assert weight == approx(float(oracles.paper_weight(temperature)), rel=1e-5)
        else:
            assert float(terms.effective_weight) == approx(20, rel=1e-12)
        # alpha_0 reaches e^125: such terms need float64.
        for value in (terms.kl, terms.shape, terms.evidence):
            assert value.dtype == F64
            assert value.isfinite().all()
        torch.testing.assert_close(terms.kl, terms.shape + terms.evidence)
        total = terms.cross_entropy.double() + weight * terms.kl
        torch.testing.assert_close(terms.total.double(), total, rtol=2e-5, atol=0)
        assert terms.total.dtype == F32
        assert terms.total.shape == terms.kl.shape == ((5,) if reduction == "none" else ())


def test_the_paper_trains_shape_and_hardly_evidence():
    adv, ref, _ = clip_logits(8, 200)
    terms = dirichlet_align_terms(adv, ref)
    assert terms.evidence < 1e-6 * terms.kl
    shifted = dirichlet_align_terms(ref - 10, ref)
    assert shifted.total < 1e-4
    assert shifted.evidence == approx(float(shifted.kl), rel=1e-2)


def test_weight_none_is_the_papers():
    adv, ref, _ = clip_logits(4, 9)
    for temperature in (0.07, 0.2, 1.0, 5.0):
        weight = 1e5 / (1 + math.exp(2 / temperature))
        torch.testing.assert_close(
            dirichlet_align_loss(adv, ref, temperature=temperature),
            dirichlet_align_loss(adv, ref, temperature=temperature, weight=weight),
        )
    kl = dirichlet_kl(*(DirichletHead(logit_scale=100.0)(logits) for logits in (adv, ref)))
    torch.testing.assert_close(
        dirichlet_align_loss(adv, ref, weight=2.5e-6), 2.5e-6 * kl.mean(), rtol=1e-5, atol=0
    )


def test_relative_weight_means_the_same_everywhere():
    """KL / mean alpha_0(ref) is a categorical KL; scale, T and a common shift cancel out of it."""
    adv, ref, _ = clip_logits(6, 40, dtype=F64)
    base = dirichlet_align_loss(adv, ref, relative_weight=170.0)
    rescaled = dirichlet_align_loss(0.3 * adv, 0.3 * ref, logit_scale=30.0, relative_weight=170.0)
    torch.testing.assert_close(rescaled, base, rtol=1e-12, atol=0)
    # z / (s T) unchanged: the same shape, at another evidence.
    hotter = dirichlet_align_loss(
        adv, ref, logit_scale=70.0, temperature=0.1, relative_weight=170.0
    )
    torch.testing.assert_close(hotter, base, rtol=1e-4, atol=0)
    moved = dirichlet_align_loss(adv + 5, ref + 5, relative_weight=170.0)
    torch.testing.assert_close(moved, base, rtol=1e-6, atol=0)
    log_alpha, log_beta = ((logits / 7.0).double() for logits in (adv, ref))
    p, q = log_alpha.softmax(-1), log_beta.softmax(-1)
    strength = log_beta.logsumexp(-1).exp()
    categorical = (q * (q.log() - p.log())).sum(-1) * strength / strength.mean()
    torch.testing.assert_close(base, 170 * categorical.mean(), rtol=1e-6, atol=0)

    # Detached: the mean strength is a number, not something to train.
    refs = [ref.clone().requires_grad_() for _ in range(2)]
    dirichlet_align_loss(adv, refs[0], relative_weight=170.0, detach_ref=False).backward()
    weight = 170 / float((strength * math.exp(1 / 0.07)).mean())
    dirichlet_align_loss(adv, refs[1], weight=weight, detach_ref=False).backward()
    torch.testing.assert_close(refs[0].grad, refs[1].grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("option", ["weight", "relative_weight"])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_weight_zero_is_cross_entropy_alone(option, temperature):
    adv, ref, target = clip_logits(4, 9)
    adv.requires_grad_()
    terms = dirichlet_align_terms(adv, ref, target, temperature=temperature, **{option: 0.0})
    terms.total.backward()
    plain = adv.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain, target)
    expected.backward()
    assert torch.equal(terms.total, expected)
    assert torch.equal(adv.grad, plain.grad)
    assert terms.effective_weight == 0
    assert terms.kl > 0


def test_reductions_and_no_target():
    adv, ref, target = clip_logits(5, 9)
    rows = dirichlet_align_loss(adv, ref, target, reduction="none")
    assert rows.shape == (5,)
    for reduction in ("mean", "sum"):
        value = dirichlet_align_loss(adv, ref, target, reduction=reduction)
        torch.testing.assert_close(value, getattr(rows, reduction)())
        module = DirichletAlignLoss(reduction=reduction)
        assert torch.equal(module(adv, ref, target), value)
    alone = dirichlet_align_terms(adv, ref, reduction="none")
    assert not alone.cross_entropy.any()
    entropy, _ = cross_entropy(adv, target)
    np.testing.assert_allclose(rows, entropy + alone.total.numpy(), rtol=1e-6)


# Implementations


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_implementations_agree_where_differences_are_large(direction):
    adv, ref, target = clip_logits(4, 12, 0.1, dtype=F64)
    options = {"direction": direction, "temperature": 0.2, "relative_weight": 3.0}
    found = {}
    for impl in ("auto", "eager", "reference", "torch_distributions"):
        logits = adv.clone().requires_grad_()
        value = DirichletAlignLoss(**options, impl=impl)(logits, ref, target)
        value.backward()
        found[impl] = value.detach(), logits.grad
    for value, grad in found.values():
        torch.testing.assert_close(value, found["auto"][0], rtol=1e-8, atol=0)
        assert norm_error(grad, found["auto"][1]) <= 1e-8
    assert torch.equal(found["eager"][1], found["auto"][1])


def test_reference_computes_float32_logits_in_float64():
    adv, ref, _ = clip_logits(4, 50, 1e-4)
    value = dirichlet_align_loss(adv, ref, impl="reference")
    wide = dirichlet_align_loss(adv.double(), ref.double())
    assert float(value) == approx(float(wide), rel=1e-6)


def test_published_form_is_noise_where_the_loss_leads():
    adv, ref, _ = clip_logits(32, 200, 1e-5)
    wide = dirichlet_align_loss(adv.double(), ref.double())
    published = dirichlet_align_loss(adv, ref, impl="torch_distributions")
    assert abs(published / wide - 1) > 1
    assert dirichlet_align_loss(adv, ref) == approx(float(wide), rel=5e-6)


# Gradients


def test_gradient_is_the_textbooks():
    adv, ref, target = clip_logits(4, 12)
    *_, by_adv, by_ref, _ = exact(adv, ref)
    paper = oracles.paper_weight(0.07)
    _, grad = cross_entropy(adv, target)
    want = grad + np.array([[float(paper * g) for g in row] for row in by_adv])
    adv.requires_grad_()
    ref.requires_grad_()

    upstream = torch.tensor([0.3, -1.7, 2.0, 0.0])
    value = dirichlet_align_loss(adv, ref, target, reduction="none")
    value.backward(upstream)
    assert norm_error(adv.grad, want * upstream.numpy()[:, None]) <= 5e-6
    assert ref.grad is None

    adv.grad = None
    dirichlet_align_loss(adv, ref, target, detach_ref=False).backward()
    assert norm_error(adv.grad, want / 4) <= 5e-6
    want = np.array([[float(paper * g) for g in row] for row in by_ref])
    assert norm_error(ref.grad, want / 4) <= 5e-6

    adv = adv.detach()
    assert not dirichlet_align_loss(adv, ref, target).requires_grad
    assert dirichlet_align_loss(adv, ref, target, detach_ref=False).requires_grad


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("options", [{}, {"weight": 0.2}, {"relative_weight": 3.0}], ids=str)
def test_gradcheck(direction, options):
    adv, ref, target = clip_logits(3, 4, 0.1, dtype=F64)

    def loss(adv, ref):
        # The mean strength is detached, so the gradient in ref is that at a fixed one.
        fixed = {"detach_ref": "relative_weight" in options}
        return dirichlet_align_loss(
            adv, ref, target, temperature=0.4, direction=direction, **options, **fixed
        )

    ref.requires_grad_("relative_weight" not in options)
    assert torch.autograd.gradcheck(loss, (adv.requires_grad_(), ref))


@pytest.mark.parametrize("options", [{}, {"relative_weight": 3.0}], ids=["paper", "relative"])
def test_gradients_through_the_terms(options):
    """The terms differentiate too: a user may weigh shape and evidence apart."""
    adv, ref, _ = clip_logits(3, 5, 0.1, dtype=F64)

    def parts(adv, ref):
        terms = dirichlet_align_terms(adv, ref, temperature=0.4, detach_ref=False, **options)
        return terms.shape, terms.evidence, terms.kl

    assert torch.autograd.gradcheck(parts, (adv.requires_grad_(), ref.requires_grad_()))


def test_keeps_no_matrix_but_the_cross_entropys():
    adv, ref, target = clip_logits(16, 50)
    kept = {}

    def pack(tensor):
        if tensor.numel() >= adv.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    adv.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alone = dirichlet_align_loss(adv, ref)
        inputs = {values.untyped_storage().data_ptr() for values in (adv, ref)}
        assert alone.requires_grad
        assert kept.keys() == inputs
        both = dirichlet_align_loss(adv, ref, target)
    assert both.requires_grad
    assert len(kept.keys() - inputs) == 1


def test_inputs_are_left_alone():
    adv, ref, target = clip_logits(4, 9)
    before = adv.clone(), ref.clone(), target.clone()
    adv.requires_grad_()
    dirichlet_align_loss(adv, ref, target).backward()
    assert [t._version for t in (adv, ref, target)] == [0, 0, 0]
    assert all(map(torch.equal, (adv.detach(), ref, target), before))


# Dtypes and edges


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_upcast_first(dtype, autocast):
    adv, ref, target = clip_logits(5, 20, 0.05)
    adv, ref = adv.to(dtype), ref.to(dtype)
    logits, wide = adv.clone().requires_grad_(), adv.float().requires_grad_()
    want = dirichlet_align_loss(wide, ref.float(), target)
    want.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = dirichlet_align_terms(logits, ref, target)
        terms.total.backward()
    assert terms.total.dtype == terms.cross_entropy.dtype == F32
    torch.testing.assert_close(terms.total, want, rtol=1e-6, atol=0)
    assert logits.grad.dtype == dtype
    # Cross-entropy's and the KL's gradients are rounded to the dtype one by one.
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.float(), wide.grad, rtol=bound, atol=bound)

    shifted = dirichlet_align_loss(adv, ref, relative_weight=1.0)
    exactly = dirichlet_align_loss(adv.double(), ref.double(), relative_weight=1.0)
    assert float(shifted) == approx(float(exactly), rel=5e-6)


def test_mixed_dtypes():
    adv, ref, target = clip_logits(5, 20)
    wide = dirichlet_align_loss(adv.double(), ref.double(), target)
    assert dirichlet_align_loss(adv, ref.double(), target).dtype == F64
    assert dirichlet_align_loss(adv.double(), ref, target).dtype == F64
    for pair in ((adv, ref.double()), (adv.double(), ref)):
        assert float(dirichlet_align_loss(*pair, target)) == approx(float(wide), rel=1e-6)
    half = dirichlet_align_loss(adv, ref.bfloat16(), target)
    assert torch.equal(half, dirichlet_align_loss(adv, ref.bfloat16().float(), target))


def test_strides():
    adv, ref, target = clip_logits(5, 20)
    want = dirichlet_align_loss(adv, ref, target)
    padded = torch.full((5, 40), torch.nan)
    padded[:, ::2] = adv
    found = dirichlet_align_loss(padded[:, ::2], ref.T.contiguous().T, target)
    torch.testing.assert_close(found, want)
    row = ref[:1]
    torch.testing.assert_close(
        dirichlet_align_loss(adv, row.expand(5, 20), target),
        dirichlet_align_loss(adv, row.repeat(5, 1), target),
    )


@pytest.mark.parametrize("options", [{}, {"relative_weight": 3.0}], ids=["paper", "relative"])
def test_batches_of_none_and_one(options):
    adv, ref, target = clip_logits(1, 6)
    one = dirichlet_align_loss(adv, ref, target, **options)
    assert one == dirichlet_align_loss(adv, ref, target, reduction="sum", **options)

    adv, ref, target = adv[:0].requires_grad_(), ref[:0], target[:0]
    assert dirichlet_align_loss(adv, ref, target, reduction="none", **options).shape == (0,)
    assert dirichlet_align_loss(adv, ref, target, **options).isnan()
    total = dirichlet_align_loss(adv, ref, target, reduction="sum", **options)
    assert total == 0
    total.backward()


def test_few_classes():
    adv, ref, target = clip_logits(4, 2)
    kl, *_ = exact(adv, ref)
    value = dirichlet_align_loss(adv, ref, reduction="none", weight=1.0)
    assert value.tolist() == approx([float(row) for row in kl], rel=5e-6)
    single = dirichlet_align_loss(adv[:, :1], ref[:, :1], torch.zeros_like(target), weight=1.0)
    assert 0 <= single < 1e-6  # a difference of equal evidences, near 0.1


def test_nan_stays_in_its_row():
    adv, ref, target = clip_logits(5, 9)
    want = dirichlet_align_loss(adv, ref, target, reduction="none", relative_weight=3.0)
    spoilt = adv.clone()
    spoilt[2, 4] = torch.nan
    spoilt.requires_grad_()
    found = dirichlet_align_loss(spoilt, ref, target, reduction="none", relative_weight=3.0)
    good = [0, 1, 3, 4]
    found[good].sum().backward()
    assert found[2].isnan()
    torch.testing.assert_close(found[good], want[good], rtol=5e-6, atol=0)
    assert spoilt.grad[good].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"weight": 1e-7}], ids=["paper", "weight"])
def test_nan_in_one_reference_leaves_the_other_rows(options):
    adv, ref, target = clip_logits(5, 9)
    want = dirichlet_align_loss(adv, ref, target, reduction="none", **options)
    ref[2, 4] = torch.nan
    adv.requires_grad_()
    found = dirichlet_align_loss(adv, ref, target, reduction="none", **options)
    good = [0, 1, 3, 4]
    found[good].sum().backward()
    assert found[2].isnan()
    torch.testing.assert_close(found[good], want[good], rtol=5e-6, atol=0)
    assert adv.grad[good].isfinite().all()


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 5))
def test_order_and_splitting_do_not_matter(seed, cut):
    adv, ref, target = clip_logits(6, 9, seed=seed)
    rng = np.random.default_rng(seed)
    rows, classes = torch.from_numpy(rng.permutation(6)), torch.from_numpy(rng.permutation(9))

    def per_row(adv, ref, target):
        return dirichlet_align_loss(adv, ref, target, reduction="none")

    whole = per_row(adv, ref, target)
    halves = (
        per_row(adv[:cut], ref[:cut], target[:cut]),
        per_row(adv[cut:], ref[cut:], target[cut:]),
    )
    torch.testing.assert_close(torch.cat(halves), whole, rtol=5e-6, atol=0)
    labels = classes.argsort()[target[rows]]
    moved = per_row(adv[rows][:, classes], ref[rows][:, classes], labels)
    torch.testing.assert_close(moved, whole[rows], rtol=5e-6, atol=0)


# The module


def test_module_passes_every_option_on():
    adv, ref, target = clip_logits(4, 9)
    options = {
        "logit_scale": 50.0,
        "temperature": 0.1,
        "weight": 1e-6,
        "direction": "forward",
        "detach_ref": False,
        "reduction": "sum",
        "impl": "reference",
    }
    module = DirichletAlignLoss(**options)
    assert torch.equal(module(adv, ref, target), dirichlet_align_loss(adv, ref, target, **options))
    want = dirichlet_align_terms(adv, ref, target, **options)
    assert all(map(torch.equal, module.terms(adv, ref, target), want))
    assert torch.equal(module(adv, ref), dirichlet_align_loss(adv, ref, **options))
    default = dirichlet_align_loss(adv, ref, target)
    for name, value in options.items():
        if name not in ("detach_ref", "impl"):
            assert not torch.equal(dirichlet_align_loss(adv, ref, target, **{name: value}), default)
    assert torch.equal(DirichletAlignLoss()(adv, ref, target), default)
    assert not module.state_dict()


def test_module_shows_its_options():
    loss = DirichletAlignLoss(14.0, weight=0.25, direction="forward", reduction="sum")
    assert repr(loss) == (
        "DirichletAlignLoss(logit_scale=14.0, temperature=0.07, weight=0.25, relative_weight=None, "
        "direction='forward', detach_ref=True, reduction='sum', impl='auto')"
    )
    assert repr(eval(repr(loss))) == repr(loss)


# Errors

ADV, REF, TARGET = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((ADV.tolist(), REF), TypeError, r"^logits_adv: .* shape \(B, C\), got list"),
        (
            (ADV.long(), REF),
            TypeError,
            r"^logits_adv: .* got int64 tensor .*; call logits_adv.float",
        ),
        (
            (ADV, REF.long()),
            TypeError,
            r"^logits_ref: .* got int64 tensor .*; call logits_ref.float",
        ),
        ((ADV[0], REF[0]), ValueError, r"^logits_adv: .* \(B, C\), got float32 .* \(3,\)$"),
        ((torch.tensor(1.0), REF), ValueError, r"^logits_adv: .* of shape \(\)$"),
        ((ADV, REF[None]), ValueError, r"^logits_ref: .* \(B, C\), got float32 .* \(1, 2, 3\)$"),
        (
            (ADV, REF[:, :2]),
            ValueError,
            r"^logits_ref: .* logits_adv, \(2, 3\), got \(2, 2\); build",
        ),
        ((ADV, REF[:1]), ValueError, r"^logits_ref: .* logits_adv, \(2, 3\), got \(1, 3\); build"),
        ((ADV, REF.to("meta")), ValueError, r"^logits_ref: .* device of logits_adv, cpu, got meta"),
        (
            (ADV, REF, [0, 2]),
            TypeError,
            r"^target: expected a tensor .* \(2,\), got list \[0, 2\]$",
        ),
        ((ADV, REF, TARGET.int()), TypeError, r"^target: .*int32.*; call target\.long\(\)$"),
        ((ADV, REF, TARGET.float()), TypeError, r"^target: .* got float32 .*; call target\.long"),
        ((ADV, REF, TARGET[:1]), ValueError, r"^target: .* shape \(2,\), got int64 .* \(1,\)$"),
        ((ADV, REF, TARGET[:, None]), ValueError, r"^target: .* shape \(2,\), got .* \(2, 1\)$"),
        ((ADV, REF, TARGET + 1), ValueError, r"^target: expected .* in \[0, 2\], got 3$"),
        ((ADV, REF, TARGET - 1), ValueError, r"^target: expected .* in \[0, 2\], got -1$"),
        (
            (ADV, REF, TARGET.to("meta")),
            ValueError,
            r"^target: .* a tensor on cpu, got one on meta",
        ),
    ],
)
def test_bad_inputs(inputs, error, message):
    for loss in (dirichlet_align_loss, dirichlet_align_terms, DirichletAlignLoss()):
        with pytest.raises(error, match=message):
            loss(*inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, r"^temperature: expected a number > 0, got 0$"),
        ({"temperature": -0.07}, ValueError, r"^temperature: .* > 0, got -0\.07$"),
        ({"temperature": torch.tensor(0.07)}, TypeError, r"^temperature: .*; pass float\(temp"),
        ({"logit_scale": 0.0}, ValueError, r"^logit_scale: expected a number > 0, got 0\.0$"),
        ({"logit_scale": torch.tensor(100.0)}, TypeError, r"^logit_scale: .*; pass float\(logit_s"),
        ({"logit_scale": math.inf}, ValueError, r"^logit_scale: .* got inf$"),
        ({"weight": -1}, ValueError, r"^weight: expected a number >= 0, got -1$"),
        ({"weight": math.nan}, ValueError, r"^weight: .* got nan$"),
        ({"weight": "paper"}, TypeError, r"^weight: .* got str 'paper'$"),
        ({"relative_weight": -0.5}, ValueError, r"^relative_weight: .* >= 0, got -0\.5$"),
        ({"relative_weight": torch.ones(1)}, TypeError, r"^relative_weight: .*; pass float\(rel"),
        (
            {"weight": 1.0, "relative_weight": 0},
            ValueError,
            r"^weight: expected weight or relative_weight, not both, got weight=1\.0 and rel",
        ),
        ({"direction": "both"}, ValueError, r"^direction: .* 'reverse', 'forward', got 'both'$"),
        ({"reduction": "max"}, ValueError, r"^reduction: .* 'none', 'mean', 'sum', got 'max'$"),
        ({"impl": "fast"}, ValueError, r"^impl: expected one of 'auto', .*, got 'fast'$"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        dirichlet_align_loss(ADV, REF, TARGET, **options)
    with pytest.raises(error, match=message):
        DirichletAlignLoss(**options)


@pytest.mark.parametrize("number", [np.float32, Fraction], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["logit_scale", "temperature", "weight", "relative_weight"])
def test_numbers_of_any_kind(number, name):
    inputs = clip_logits(3, 5)
    found = dirichlet_align_loss(*inputs, **{name: number(8)})
    assert found == dirichlet_align_loss(*inputs, **{name: 8.0})


def test_detach_ref_is_a_bool():
    with pytest.raises(TypeError, match=r"^detach_ref: expected True or False, got str 'no'$"):
        DirichletAlignLoss(detach_ref="no")


def test_an_infinite_reference_leaves_the_other_rows():
    adv, ref, _ = clip_logits(4, 10, 1e-2)
    want = dirichlet_align_loss(adv, ref, weight=1e-8, reduction="none")
    ref[2, 0] = torch.inf
    found = dirichlet_align_loss(adv, ref, weight=1e-8, reduction="none")
    good = [0, 1, 3]
    torch.testing.assert_close(found[good], want[good], rtol=5e-6, atol=0)


def test_terms_where_alpha_overflows_every_float():
    adv, ref, _ = clip_logits(3, 10, 1e-2)
    terms = dirichlet_align_terms(adv, ref, temperature=0.0005, relative_weight=1.0)
    assert terms.total.isfinite()
    assert not terms.kl.isnan()
