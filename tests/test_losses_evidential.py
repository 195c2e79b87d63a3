import math

import loss_oracles
import numpy as np
import pytest
import torch
from loss_cases import (
    BOUNDS,
    CASES,
    F32,
    F64,
    SHAPES,
    Case,
    check_against_oracle,
    check_terms,
    error,
    make_inputs,
    prepared,
    single,
)

from calibclip import EDLLoss, PriorNetworkLoss, dirichlet_kl, edl_loss, prior_network_loss

EVIDENTIAL = [case for name in ("edl", "prior_network") for case in CASES[name]]
KINDS = ("mse", "log", "digamma")
mpmath = loss_oracles.mpmath


def log_alphas(batch=4, classes=5, dtype=F64, **shape):
    inputs, target = make_inputs(("log_alpha_adv",), batch=batch, classes=classes, **shape)
    return torch.from_numpy(inputs["log_alpha_adv"]).to(dtype), torch.from_numpy(target)


# The oracles

BLOCKS = {
    **{f"fit {kind}": lambda row, kind=kind: loss_oracles.edl_fit(row, 1, kind) for kind in KINDS},
    "kl": lambda row: loss_oracles.edl_kl(row, 1),
    "reverse": lambda row: loss_oracles.prior_kl(row, 1, 30.0, "reverse")[::2],
    "forward": lambda row: loss_oracles.prior_kl(row, 1, 30.0, "forward")[::2],
    "flat": lambda row: loss_oracles.prior_kl(row, None, 30.0, "reverse")[::2],
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_gradients_of_the_oracles_are_derivatives(block):
    row = np.random.default_rng(3).normal(1, 1, 4)
    want = loss_oracles.difference_gradient(lambda row: block(row)[0], [row], 0)
    with mpmath.workdps(loss_oracles.DIGITS):
        found = block([loss_oracles.number(x) for x in row])[1]
        gap = max(abs(a - b) for a, b in zip(found, want, strict=True))
    assert gap < 1e-18


# Values and gradients


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", EVIDENTIAL, ids=str)
def test_values_and_gradients(case, shape, dtype):
    check_against_oracle(case, *prepared(case, **SHAPES[shape]), dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", EVIDENTIAL, ids=str)
def test_terms(case, dtype):
    check_terms(case, *prepared(case, **SHAPES["ten classes"]), dtype)


# Rows at the edges, and the label of each.
EDGES = {
    "flat": ([[0.0, 0.0, 0.0, 0.0]] * 2, [0, 3]),
    "flat, two classes": ([[0.0, 0.0]], [1]),
    "e^28 everywhere": ([[28.0, 28.0, 28.0], [27.9, 28.0, 27.5]], [0, 1]),
    "from 1 to e^28": ([[0.0, 14.0, 28.0, 7.0]] * 4, [0, 1, 2, 3]),
    "two classes": ([[28.0, 0.0], [0.0, 28.0], [3.0, 2.0]], [1, 1, 0]),
    "one class leads, wrongly": ([[25.0, 1.0, 1.5, 0.0]], [1]),
    "little evidence": ([[-3.0, -2.0, -4.0], [-8.0, 0.0, -8.0]], [0, 1]),
    "CLIP": ([[17.0, 16.5, 16.0, 18.5, 17.2]] * 2, [3, 0]),
}
EDGE_CASES = [
    *[Case("edl", {"kind": kind}) for kind in KINDS],
    Case("prior_network"),
    Case("prior_network", {"direction": "forward"}),
    Case("prior_network", labelled=False),
]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, case, dtype):
    rows, target = np.array(EDGES[edge][0]), np.array(EDGES[edge][1])
    inputs = {"log_alpha_adv": single(rows)}
    terms = case.terms(inputs, target)
    check_against_oracle(case, inputs, target, terms, dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_right_class_leads(kind, dtype):
    """The fit falls to 0 with C / alpha, and is no rounding noise of 1 - p on the way there."""
    rows = np.array([[28.0, 1.0, 0.5, 2.0], [20.0, 1.0, 0.5, 2.0], [12.0, 1.0, 0.5, 2.0]])
    target = np.zeros(3, dtype=np.int64)
    want = loss_oracles.edl({"log_alpha_adv": rows}, target, kind=kind)["fit"]
    log_alpha = torch.from_numpy(rows).to(dtype).requires_grad_()
    found = EDLLoss(kind=kind, reduction="none").terms(log_alpha, torch.from_numpy(target)).fit
    found.sum().backward()
    assert (want.values < [1e-10, 1e-7, 1e-3]).all()
    bound = BOUNDS[dtype]
    np.testing.assert_allclose(found.detach(), want.values, rtol=bound, atol=0)
    np.testing.assert_allclose(log_alpha.grad, want.grads["log_alpha_adv"], rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_little_evidence(kind, dtype):
    """The fit alone, where the methods' networks start: alpha near 1, alpha_0 near C."""
    rng = np.random.default_rng(1)
    rows, target = single(rng.uniform(-0.5, 1.5, (40, 5))), rng.integers(5, size=40)
    want = loss_oracles.edl({"log_alpha_adv": rows}, target, kind=kind)["fit"]
    log_alpha = torch.from_numpy(rows).to(dtype).requires_grad_()
    found = EDLLoss(kind=kind, reduction="none").terms(log_alpha, torch.from_numpy(target)).fit
    found.sum().backward()
    assert error(found.detach(), want.values) <= BOUNDS[dtype]
    assert error(log_alpha.grad, want.grads["log_alpha_adv"]) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4, 8, 10, 16, 30])
def test_flat_evidence_of_any_number_of_classes(count, kind, dtype):
    """alpha_0 = C exactly, whichever branch of a special function that falls on."""
    rows, target = np.zeros((1, count)), np.array([1])
    want = loss_oracles.edl({"log_alpha_adv": rows}, target, kind=kind)["fit"]
    log_alpha = torch.from_numpy(rows).to(dtype).requires_grad_()
    terms = EDLLoss(kind=kind).terms(log_alpha, torch.from_numpy(target))
    assert terms.kl == 0
    terms.total.backward()
    assert error(terms.fit.detach(), want.values[0]) <= BOUNDS[dtype]
    assert error(log_alpha.grad, want.grads["log_alpha_adv"]) <= BOUNDS[dtype]


# Evidential deep learning


def test_edl_by_hand():
    """alpha = (3, 1), label 0: S = 4, p = (3/4, 1/4); the label's own evidence costs nothing."""
    log_alpha = torch.tensor([[3.0, 1.0]], dtype=F64).log()
    target = torch.tensor([0])
    found = {kind: EDLLoss(kind=kind).terms(log_alpha, target) for kind in KINDS}
    assert float(found["mse"].fit) == pytest.approx(2 / 16 + 2 * 3 / 16 / 5, rel=1e-12)
    assert float(found["log"].fit) == pytest.approx(math.log(4 / 3), rel=1e-12)
    assert float(found["digamma"].fit) == pytest.approx(1 / 3, rel=1e-12)  # psi(4) - psi(3)
    assert all(abs(terms.kl) < 1e-14 for terms in found.values())
    # Label 1: abar = (3, 1), KL = ln 3 + 2 (psi(3) - psi(4)) = ln 3 - 2/3.
    wrong = EDLLoss().terms(log_alpha, torch.tensor([1]))
    assert float(wrong.kl) == pytest.approx(math.log(3) - 2 / 3, rel=1e-12)
    assert torch.equal(wrong.total, wrong.fit + wrong.kl)


def test_edl_kl_is_against_flat_evidence():
    log_alpha, target = log_alphas()
    kept = log_alpha.scatter(1, target[:, None], 0.0)
    want = dirichlet_kl(kept, torch.zeros_like(kept), reduction="none")
    found = EDLLoss(reduction="none").terms(log_alpha, target).kl
    torch.testing.assert_close(found, want)


def test_the_labels_evidence_is_not_regularized():
    log_alpha, target = log_alphas()
    log_alpha.requires_grad_()
    EDLLoss().terms(log_alpha, target).kl.backward()
    own = log_alpha.grad.gather(1, target[:, None])
    assert not own.any()
    assert log_alpha.grad.norm() > 0


def test_annealing():
    log_alpha, target = log_alphas()
    terms = EDLLoss().terms(log_alpha, target)
    for epoch, annealing, weight in (
        (None, 10, 1.0),
        (0, 10, 0.0),
        (1, 10, 0.1),
        (10, 10, 1.0),
        (25, 10, 1.0),
        (3, 4, 0.75),
        (2.5, 10, 0.25),
        (1, 1, 1.0),
    ):
        want = terms.fit + weight * terms.kl
        found = edl_loss(log_alpha, target, epoch=epoch, annealing_epochs=annealing)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
        loss = EDLLoss(annealing_epochs=annealing)
        assert torch.equal(loss(log_alpha, target, epoch=epoch), found)
        again = loss.terms(log_alpha, target, epoch=epoch)
        assert torch.equal(again.total, found)
        assert torch.equal(again.kl, terms.kl)


def test_official_edl_is_the_papers():
    log_alpha, target = log_alphas()
    loss = EDLLoss.official()
    assert (loss.kind, loss.annealing_epochs) == ("mse", 10)
    assert torch.equal(loss(log_alpha, target), edl_loss(log_alpha, target))


# Prior networks


def test_prior_network_by_hand():
    """KL(Dir(3, 1) || Dir(1, 1)) = ln 3 - 2/3; the target of label 0 is Dir(1 + c, 1)."""
    log_alpha = torch.tensor([[3.0, 1.0]], dtype=F64).log()
    value = math.log(3) - 2 / 3
    assert float(prior_network_loss(log_alpha)) == pytest.approx(value, rel=1e-12)
    other = prior_network_loss(log_alpha, direction="forward")
    # KL(Dir(1, 1) || Dir(3, 1)) = -ln 3 - 2 (psi(1) - psi(2)) = 2 - ln 3.
    assert float(other) == pytest.approx(2 - math.log(3), rel=1e-12)
    target = torch.tensor([0])
    for direction in ("reverse", "forward"):
        here = prior_network_loss(log_alpha, target, target_concentration=2.0, direction=direction)
        assert abs(here) < 1e-14
        there = prior_network_loss(
            log_alpha, torch.tensor([1]), target_concentration=2.0, direction=direction
        )
        assert there > 1


def test_prior_network_is_a_dirichlet_kl():
    log_alpha, target = log_alphas()
    beta = torch.ones_like(log_alpha)
    beta[range(4), target] += 1000.0
    pair = (log_alpha, beta.log())
    for direction in ("reverse", "forward"):
        want = dirichlet_kl(*(pair if direction == "reverse" else pair[::-1]), reduction="none")
        found = prior_network_loss(log_alpha, target, direction=direction, reduction="none")
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(prior_network_loss(log_alpha, target), dirichlet_kl(*pair).mean())


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("labelled", [True, False])
def test_parts_of_the_prior_networks_kl(direction, labelled):
    log_alpha, target = log_alphas()
    inputs = {"log_alpha_adv": log_alpha.numpy()}
    labels = target if labelled else None
    want = loss_oracles.prior_network(
        inputs, None if labels is None else labels.numpy(), direction=direction
    )
    for reduction in ("none", "mean", "sum"):
        terms = PriorNetworkLoss(direction=direction, reduction=reduction).terms(log_alpha, labels)
        shape = loss_oracles.reduced(want["shape"].values, reduction)
        evidence = loss_oracles.reduced(want["kl"].values - want["shape"].values, reduction)
        assert error(terms.shape, shape) <= 1e-10
        assert error(terms.evidence, evidence) <= 1e-10
        torch.testing.assert_close(terms.total, terms.shape + terms.evidence)


def test_official_prior_network_is_reverse():
    log_alpha, target = log_alphas()
    loss = PriorNetworkLoss.official()
    assert (loss.direction, loss.target_concentration) == ("reverse", 1000.0)
    assert torch.equal(loss(log_alpha, target), prior_network_loss(log_alpha, target))
    assert loss(log_alpha, target) != prior_network_loss(log_alpha, target, direction="forward")
    assert loss(log_alpha) != loss(log_alpha, target)


@pytest.mark.parametrize("batch", [1, 2])
def test_one_image_and_a_concentration_that_broke_the_original(batch):
    """The published code squeezes its batch away and tests tensors for truth."""
    log_alpha, target = log_alphas(batch)
    assert prior_network_loss(log_alpha, target, reduction="none").shape == (batch,)
    assert edl_loss(log_alpha, target, reduction="none").shape == (batch,)


@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_half_precision_evidence_does_not_overflow(case):
    """alpha = e^28 is 1e12, far beyond float16."""
    rows = np.array([[28.0, 11.5, 20.0], [12.0, 28.0, -1.0]])
    target = np.array([1, 1])
    terms = case.terms({"log_alpha_adv": rows}, target)
    value, grads = loss_oracles.combine(terms, "mean")
    for dtype in (torch.float16, torch.bfloat16):
        log_alpha = torch.from_numpy(rows).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = case.call({"log_alpha_adv": log_alpha}, torch.from_numpy(target))
        found.backward()
        assert found.dtype == F32
        assert float(found.detach()) == pytest.approx(float(value), rel=BOUNDS[F32])
        fits = np.abs(grads["log_alpha_adv"]) < 6e4
        assert log_alpha.grad.isfinite().numpy()[fits].all()


# Errors

L, Y = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda: edl_loss(L[0], Y), ValueError, r"^log_alpha_adv: .*\(B, C\).*\(3,\)"),
        (lambda: edl_loss(None, Y), TypeError, r"^log_alpha_adv: .*, got NoneType None"),
        (lambda: edl_loss(L, None), TypeError, r"^target: .*, got NoneType None"),
        (lambda: edl_loss(L, Y + 1), ValueError, r"^target: .* in \[0, 2\], got 3"),
        (lambda: edl_loss(L, Y, epoch=-1), ValueError, r"^epoch: .*>= 0, got -1"),
        (lambda: edl_loss(L, Y, epoch="3"), TypeError, r"^epoch: .*, got str '3'"),
        (lambda: EDLLoss()(L, Y, epoch=-1), ValueError, r"^epoch: .*>= 0, got -1"),
        (lambda: edl_loss(L, Y, kind="l2"), ValueError, r"^kind: .*'digamma', got 'l2'"),
        (lambda: EDLLoss(kind="l2"), ValueError, r"^kind: .*'mse', 'log', 'digamma', got 'l2'"),
        (lambda: edl_loss(L, Y, annealing_epochs=0), ValueError, r"^annealing_epochs: .*, got 0"),
        (lambda: EDLLoss(annealing_epochs=0), ValueError, r"^annealing_epochs: .*, got 0"),
        (lambda: EDLLoss(annealing_epochs="t"), TypeError, r"^annealing_epochs: .*, got str 't'"),
        (lambda: prior_network_loss(L[None]), ValueError, r"^log_alpha_adv: .*\(B, C\).*1, 2, 3"),
        (lambda: prior_network_loss(L, Y[:1]), ValueError, r"^target: .*\(2,\), got .*\(1,\)"),
        (lambda: prior_network_loss(L, Y - 1), ValueError, r"^target: .* in \[0, 2\], got -1"),
        (
            lambda: prior_network_loss(L, Y, target_concentration=-1.0),
            ValueError,
            r"^target_concentration: .*, got -1\.0",
        ),
        (
            lambda: PriorNetworkLoss(target_concentration=math.nan),
            ValueError,
            r"^target_concentration: .*, got nan",
        ),
        (
            lambda: prior_network_loss(L, Y, target_concentration=torch.tensor(10.0)),
            TypeError,
            r"^target_concentration: .*; pass float\(target_concentration",
        ),
        (
            lambda: prior_network_loss(L, Y, direction="both"),
            ValueError,
            r"^direction: .*'reverse', 'forward', got 'both'",
        ),
        (lambda: PriorNetworkLoss(direction=None), ValueError, r"^direction: .*, got None"),
    ],
)
def test_bad_input(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("concentration", [20.0, 1000.0])
def test_prior_network_near_its_target(direction, concentration):
    """Where the loss drives the model: ln beta rounded to float32 would be wrong by 1e-3."""
    log_beta = torch.zeros(3, 4, dtype=F64)
    log_beta[range(3), range(3)] = math.log(1 + concentration)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    log_alpha = (log_beta + 1e-4 * noise).float().requires_grad_()
    loss = prior_network_loss(
        log_alpha,
        torch.arange(3),
        target_concentration=concentration,
        direction=direction,
        reduction="none",
    )
    loss.sum().backward()
    assert loss.dtype == log_alpha.grad.dtype == F32
    exact = log_alpha.detach().double().requires_grad_()
    pair = (exact, log_beta) if direction == "reverse" else (log_beta, exact)
    want = dirichlet_kl(*pair)
    want.sum().backward()
    assert (loss - want).norm() <= 1e-6 * want.norm()
    assert (log_alpha.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def test_huge_half_precision_concentrations_stay_finite():
    log_alpha = torch.tensor([[6e4, 0.0, 5.0], [88.0, 100.0, 0.0]], dtype=torch.float16)
    for kind in ("mse", "log", "digamma"):
        value = edl_loss(log_alpha.requires_grad_(), torch.tensor([0, 1]), kind=kind)
        (gradient,) = torch.autograd.grad(value, log_alpha)
        assert value.isfinite()
        assert gradient.isfinite().all()
