"""The Triton kernels: on a CUDA device if there is one, else by Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton_worker
from test_dirichlet_kl import assert_rows, clip_like, errors, golden
from test_kernels_closed_form import assert_same_divergence
from triton_worker import GOLDEN_ROWS, HARD_CASES, Case, evaluate, spread

from calibclip import DirichletAlignLoss, dirichlet_kl, explain_impl
from calibclip._kernels import dirichlet_kl_gradient

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
BOUND = 5e-6
REFERENCE_CASES = triton_worker.reference_cases()
OTHER_CASES = triton_worker.other_cases()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results of all cases; the interpreter's come from one process."""
    if CUDA:
        return triton_worker.everything("cuda")
    path = tmp_path_factory.mktemp("triton") / "found.pt"
    process = subprocess.run(
        [sys.executable, triton_worker.__file__, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(path, weights_only=True)


def assert_close(got, want):
    """Judge both parts and both gradients, row by row."""
    for values, expected in zip(got, want, strict=True):
        expected = expected.float() if expected.ndim == 1 else expected
        assert (values.shape, values.dtype) == (expected.shape, expected.dtype)
        same = np.asarray(values.double() == expected.double())
        same = same if same.ndim == 1 else same.all(-1)
        assert ((errors(values, expected) <= BOUND) | same).all()  # both may be 0


def assert_equal(got, want):
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))


def assert_zero(found):
    for values in found:
        assert values.numel() > 0
        assert torch.equal(values, torch.zeros_like(values))


@pytest.mark.parametrize("n_classes", GOLDEN_ROWS)
def test_golden_table(n_classes, found):
    rows = slice(None) if CUDA else GOLDEN_ROWS[n_classes]
    kind, _, _, kl, shape, evidence, *grads = (column[rows] for column in golden(n_classes))
    found_shape, found_evidence, *found_grads = found[f"golden {n_classes}"]
    assert (found_shape >= 0).all()
    assert (found_evidence >= 0).all()

    largest, found_kl = torch.finfo(torch.float32).max, found_shape + found_evidence
    finite = kl < largest
    assert (found_kl[~torch.from_numpy(finite)] == torch.inf).all()
    assert_rows(found_kl, kl, BOUND, kind, finite)
    for found_grad, grad in zip(found_grads, grads, strict=True):
        assert_rows(found_grad, grad, BOUND, kind, np.abs(grad).max(-1) < largest)

    # As in test_dirichlet_kl.py, the evidence of unrelated rows is promised no digits.
    shift, far = kind == "common shift", np.isin(kind, ["unrelated", "extremes", "one class"])
    assert_rows(found_shape, shape, BOUND, kind, ~shift & finite)
    assert (np.asarray(found_shape, dtype=np.float64)[shift] <= BOUND * kl[shift]).all()
    assert_rows(found_evidence, evidence, BOUND, kind, ~far & finite)
    assert_rows(found_evidence, evidence, 1e-3, kind, finite)


@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_agrees_with_the_reference(name, found):
    assert_close(found[name], evaluate(REFERENCE_CASES[name], "reference"))
    assert all((part >= 0).all() for part in found[name][:2])


@pytest.mark.parametrize("name", HARD_CASES)
def test_hard_rows(name, found):
    assert_same_divergence(found[name], evaluate(HARD_CASES[name], "reference"))


def test_exactly_zero_at_equality(found):
    assert_zero(found["equal"])
    assert_zero(found["equal beyond the range"][:2])


def test_exactly_zero_beside_other_rows(found):
    assert_zero([values[:1] for values in found["equal beside others"]])
    assert all(values[1:].any() for values in found["equal beside others"])


def test_no_weight_is_no_divergence(found):
    assert_zero(found["weight 0"])


def test_one_class_has_no_divergence(found):
    assert_zero(found["C=1"])


def test_beyond_the_range_is_right_or_not_finite(found):
    want = evaluate(OTHER_CASES["beyond the range"], "reference")
    for values, expected in zip(found["beyond the range"], want, strict=True):
        right = torch.isclose(values.double(), expected.double(), rtol=BOUND, atol=0)
        assert (right | ~values.isfinite()).all()


def test_what_is_no_number_stays_in_its_row(found):
    shape, evidence, *grads = found["spoilt"]
    bad = list(range(1, 9))
    assert not (shape + evidence)[bad].isfinite().any()
    assert all(grad[bad].isnan().any(-1).all() for grad in grads)
    good = [0, 9]
    assert_equal([x[good] for x in found["spoilt"]], [x[good] for x in found["clean"]])


@pytest.mark.parametrize("name", ["bf16", "fp16", "mixed"])
def test_half_precision_is_upcast_first(name, found):
    """And differs from float32 in the gradients' last rounding only."""
    case, want = OTHER_CASES[name], found[f"{name}, upcast"]
    assert_equal(found[name][:2], want[:2])
    leaves = (case.first, case.second)
    for grad, wide, leaf in zip(found[name][2:], want[2:], leaves, strict=True):
        assert grad.dtype == leaf.dtype
        # The interpreter cuts digits off where a device rounds.
        cut = 2**-7 if leaf.dtype == torch.bfloat16 and not CUDA else 0
        torch.testing.assert_close(grad, wide.to(leaf.dtype), rtol=cut, atol=0)
    assert_close(want, evaluate(OTHER_CASES[f"{name}, upcast"], "reference"))


def test_no_rows(found):
    assert [x.shape for x in found["no rows"]] == [(0,), (0,), (0, 7), (0, 7)]


def test_every_subset_of_gradients(found):
    shape, evidence, *grads = found["few"]
    first, second = found["first only"], found["second only"]
    assert_equal(first[:3], [shape, evidence, grads[0]])
    assert_equal([*second[:2], second[3]], [shape, evidence, grads[1]])
    assert first[3] is None
    assert second[2] is None


def test_the_same_bits_again(found):
    assert_equal(found["few again"], found["few"])


def test_rows_do_not_see_each_other(found):
    assert_equal(found["few"], [values[:3] for values in found["clean"]])


def test_value_and_gradient_at_once(found):
    pair = clip_like(2, 40, 0.02)
    options = {"scale": 0.5, "shift": 3.0, "log_weight": torch.tensor(-2.0).double()}
    want = [
        values
        for reverse in (True, False)
        for values in dirichlet_kl_gradient(*pair, **options, reverse=reverse, impl="reference")
    ]
    for got, expected in zip(found["gradient at once"], want, strict=True):
        assert errors(got, expected).max() <= BOUND


def test_tracers_are_told_the_truth(found):
    for got, told in zip(found["operators"], triton_worker.operators("meta"), strict=True):
        assert (got.shape, got.dtype) == (told.shape, told.dtype)


def test_triton_is_the_automatic_choice(found):
    """On CUDA, or where the interpreter is switched on."""
    assert found["auto"] == "triton"


# On a device


def on_cuda(*tensors):
    return [x.cuda().requires_grad_() for x in tensors]


@needs_cuda
@pytest.mark.parametrize("n_classes", [21841, 100_000])
@pytest.mark.parametrize(("low", "gap"), [(14, 1e-3), (14, 9.0), (3, 0.1), (0, 0.1)])
def test_many_classes(n_classes, low, gap):
    case = Case(*spread(low, gap, n_classes, rows=3))
    assert_close(evaluate(case, "triton", "cuda"), evaluate(case, "reference"))


@needs_cuda
def test_more_numbers_than_int32_counts():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a device of 40 GB")
    rows, n_classes = (1 << 15) + 2, 1 << 16
    pair = [
        torch.empty(rows, n_classes, dtype=torch.bfloat16, device="cuda").uniform_(14, 18)
        for _ in range(2)
    ]
    pair = [x.requires_grad_() for x in pair]
    kl = dirichlet_kl(*pair, impl="triton")
    kl.sum().backward()
    for rows in (slice(0, 2), slice(-2, None)):
        alone = [x.detach()[rows].clone().requires_grad_() for x in pair]
        want = dirichlet_kl(*alone, impl="triton")
        want.sum().backward()
        assert want.isfinite().all()
        assert_equal([kl[rows], *(x.grad[rows] for x in pair)], [want, *(x.grad for x in alone)])


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits(dtype):
    """Whatever waits raises, in the second step."""
    pair = on_cuda(*clip_like(64, 300, 0.02, dtype=dtype))
    target = torch.zeros(64, dtype=torch.long, device="cuda")
    loss = DirichletAlignLoss()

    def step():
        dirichlet_kl(*pair, "mean").backward()
        loss(*pair, target).backward()

    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad.isfinite().all() for x in pair)


@needs_cuda
def test_the_gradient_is_all_the_memory():
    first, second = on_cuda(*clip_like(2048, 4096, 0.02))
    second = second.detach()
    dirichlet_kl(first, second, "sum").backward()  # compiles
    first.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dirichlet_kl(first, second, "sum").backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.1 * first.numel() * first.element_size()


@needs_cuda
def test_automatic_on_a_device():
    pair = on_cuda(*clip_like(4, 40, 0.02))
    assert explain_impl(*pair).impl == "triton"
    assert torch.equal(dirichlet_kl(*pair), dirichlet_kl(*pair, impl="triton"))
    compiled = torch.compile(dirichlet_kl, fullgraph=True, backend="aot_eager")(*pair)
    assert torch.equal(compiled, dirichlet_kl(*pair))
