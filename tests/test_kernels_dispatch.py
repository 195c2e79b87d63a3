"""Which implementation computes the Dirichlet KL, and the call as an operator of PyTorch."""

import itertools
import shutil
import sys

import pytest
import torch
from test_dirichlet_kl import clip_like, evaluate
from test_kernels_closed_form import HARD_PAIRS, assert_close, assert_same_divergence
from torch.func import grad, vmap

from calibclip import DirichletAlignLoss, dirichlet_kl, explain_impl
from calibclip._kernels import closed_form, compiled, dirichlet_kl_parts, dispatch, small
from calibclip._kernels.dispatch import IMPLEMENTATIONS, choose

BOUND = 5e-6
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
CUDA = torch.device("cuda", 0)
needs_vmap = pytest.mark.skipif(
    not hasattr(torch.library, "register_vmap"), reason="vmap of operators needs PyTorch 2.5"
)


def clear_caches():
    dispatch._without_triton.cache_clear()
    dispatch._too_old.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends: Triton is there or not, the card is as old as said."""

    def pretend(*, triton=True, capability=(9, 0), hip=None):
        def load(impl):
            if impl == "triton" and not triton:
                raise ModuleNotFoundError("No module named 'triton'")

        monkeypatch.setattr(dispatch, "load", load)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    clear_caches()
    yield pretend
    monkeypatch.undo()
    clear_caches()


def assert_equal(found, want):
    assert len(found) == len(want)
    assert all(map(torch.equal, found, want))


# Which implementation


OBSTACLES = {
    "float64": ({}, CUDA, F64, "float32 and half precision, and an input is float64"),
    "not installed": ({"triton": False}, CUDA, F32, r"cannot be imported .*No module named .*\)"),
    "cpu": ({}, torch.device("cpu"), F32, "tensors are on cpu, .* needs a CUDA device"),
    "old card": ({"capability": (7, 5)}, CUDA, F32, r"capability is 7\.5, .* needs 8\.0"),
    "AMD": ({"hip": "6.2"}, CUDA, F32, "untested on AMD's"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_why_not_triton(name, machine):
    pretence, device, dtype, reason = OBSTACLES[name]
    machine(**pretence)
    choice = choose("auto", device, dtype)
    assert choice.impl == "eager"
    with pytest.raises(
        ValueError, match=rf"^impl: .* got 'triton'; .*{reason}: use impl=\"auto\"$"
    ):
        choose("triton", device, dtype)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(choice.reason)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_why_triton(capability, machine):
    machine(capability=capability)
    assert choose("auto", CUDA, F32) == (
        "triton",
        "the tensors are torch.float32 on cuda:0 and Triton is there",
    )
    assert choose("triton", CUDA, F32) == ("triton", "it was asked for")


def test_the_interpreter_runs_on_a_cpu(machine, monkeypatch):
    machine()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("auto", torch.device("cpu"), F32).impl == "triton"
    assert choose("auto", torch.device("cpu"), F64).impl == "eager"


def test_explain_impl(machine):
    machine()
    row = torch.zeros(2, 3)
    assert explain_impl(row) == explain_impl(row, row, "auto")
    assert explain_impl(row).impl == explain_impl(row.bfloat16()).impl == "eager"
    assert "on cpu" in explain_impl(row).reason
    assert "float64" in explain_impl(row, row.double()).reason
    assert "float64" in explain_impl(row.double(), row).reason
    for impl in set(IMPLEMENTATIONS) - {"auto", "triton", "compile"}:
        assert explain_impl(row, impl=impl) == (impl, "it was asked for")


@pytest.mark.parametrize(
    ("device", "compiler", "reason"),
    [
        ("cpu", "cc-of-nowhere", "needs a C.. compiler, and there is no cc-of-nowhere"),
        ("cuda", sys.executable, r"triton cannot be imported \(No module named"),
        ("meta", sys.executable, "untested on meta"),
    ],
)
def test_why_not_compile(device, compiler, reason, machine, monkeypatch):
    machine(triton=False)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ValueError, match=rf"^impl: .* got 'compile'; .*{reason}.*: use impl="):
        choose("compile", torch.device(device), F32)
    assert choose("auto", torch.device(device), F32).impl == "eager"


def test_why_compile(machine, monkeypatch):
    machine()
    monkeypatch.setenv("CXX", sys.executable)
    for device in ("cpu", "cuda"):
        assert choose("compile", torch.device(device), F32) == ("compile", "it was asked for")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "^log_alpha: expected a floating-point tensor"),
        ((torch.zeros(3), torch.zeros(3).long()), TypeError, "^log_beta: .* got int64"),
        (
            (torch.zeros(3), torch.zeros(3, device="meta")),
            ValueError,
            "^log_beta: .* log_alpha, cpu, got meta; move one of the two$",
        ),
        ((torch.zeros(3), None, "fast"), ValueError, "^impl: expected one of .* got 'fast'$"),
        ((torch.zeros(3), None, "triton"), ValueError, "^impl: .* on cpu, and .* CUDA device"),
        ((torch.zeros(3), torch.zeros(3).double(), "triton"), ValueError, "^impl: .* is float64"),
    ],
)
def test_explain_impl_errors(arguments, error, message, machine):
    machine()
    with pytest.raises(error, match=message):
        explain_impl(*arguments)


def test_triton_on_a_cpu_is_refused(machine):
    machine()
    row = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="on cpu, and the Triton kernel needs a CUDA device"):
        dirichlet_kl(row, row, impl="triton")
    with pytest.raises(ValueError, match="on cpu, and the Triton kernel needs a CUDA device"):
        DirichletAlignLoss(impl="triton")(row, row)


# torch.compile and torch.export


REGIMES = {"close": (1e-3, 0.07), "far": (0.4, 0.07), "small": (0.1, 1.0)}


@pytest.fixture
def compiling():
    """Forget what was compiled before, and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    value = function(*leaves)
    value.sum().backward()
    return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.usefixtures("compiling")
def test_compiled_calls_are_the_eager_ones():
    fullgraph = {"fullgraph": True, "backend": "aot_eager"}
    kl = torch.compile(dirichlet_kl, **fullgraph)
    loss = DirichletAlignLoss(detach_ref=False)
    compiled_loss = torch.compile(loss, **fullgraph)
    target = torch.tensor([0, 5, 3])
    for sd, temperature in REGIMES.values():
        pair = [x.requires_grad_() for x in clip_like(3, 8, sd, temperature=temperature)]
        assert_equal(gradients(kl, pair), gradients(dirichlet_kl, pair))
        logits = [x.detach().requires_grad_() for x in clip_like(3, 8, sd, temperature=0.01)]
        found = gradients(lambda *xs: compiled_loss(*xs, target), logits)
        assert_close(found, gradients(lambda *xs: loss(*xs, target), logits))


@pytest.mark.usefixtures("compiling")
def test_compiled_dtypes_and_subsets():
    kl = torch.compile(dirichlet_kl, fullgraph=True, backend="aot_eager")
    first, second = clip_like(3, 8, 0.1)
    for dtypes in ((BF16, F32), (F32, F64)):
        for needs in ((True, True), (True, False), (False, True)):
            pair = [
                x.detach().to(dtype, copy=True).requires_grad_(need)
                for x, dtype, need in zip((first, second), dtypes, needs, strict=True)
            ]
            found, want = gradients(kl, pair), gradients(dirichlet_kl, pair)
            assert [x.dtype for x in found] == [x.dtype for x in want]
            assert_equal(found, want)


def test_exported_program():
    class Divergence(torch.nn.Module):
        def forward(self, log_alpha, log_beta):
            return dirichlet_kl(log_alpha, log_beta, "mean")

    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        Divergence(), clip_like(4, 8, 0.02), dynamic_shapes=[{0: rows}, {0: rows}]
    )
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "calibclip.dirichlet_kl.default" in called
    for n in (4, 7):
        pair = clip_like(n, 8, 0.4, seed=n)
        assert torch.equal(program.module()(*pair), dirichlet_kl(*pair, "mean"))


def operator_arguments(dtypes=(F32, F32), rows=3):
    pair = [x.to(dtype) for x, dtype in zip(clip_like(rows, 8, 0.02), dtypes, strict=True)]
    return *pair, 0.5, 2.0, torch.tensor(-1.0, dtype=F64), "eager"


# opcheck's doing, not the operator's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F32), (BF16, BF16)], ids=str)
def test_operator_keeps_pytorchs_rules(dtypes):
    first, second, *options = operator_arguments(dtypes)
    for needs in ((False, False), (True, False), (True, True)):
        inputs = [
            x.clone().requires_grad_(need) for x, need in zip((first, second), needs, strict=True)
        ]
        torch.library.opcheck(torch.ops.calibclip.dirichlet_kl.default, (*inputs, *options))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
def test_backward_operator_keeps_pytorchs_rules(dtypes, needs):
    first, second, *options = operator_arguments(dtypes)
    *parts, stats = torch.ops.calibclip.dirichlet_kl(first, second, *options)
    arguments = (*map(torch.ones_like, parts), first, second, stats, *options, *needs)
    torch.library.opcheck(torch.ops.calibclip.dirichlet_kl_backward.default, arguments)


@pytest.mark.parametrize("few", [True, False])
def test_tracers_are_told_the_gradients_strides(few, monkeypatch):
    """Of inputs whose rows are columns, too."""
    if not few:
        monkeypatch.setattr(small, "_FEW", 0)
    pair = [x.T for x in (14 + torch.rand(5, 50), 14 + torch.rand(5, 50))]
    weight = torch.zeros((), dtype=F64)
    *parts, stats = torch.ops.calibclip.dirichlet_kl(*pair, 1.0, 0.0, weight, "eager")
    ones = map(torch.ones_like, parts)
    arguments = (*ones, *pair, stats, 1.0, 0.0, weight, "eager", True, True)
    found = torch.ops.calibclip.dirichlet_kl_backward(*arguments)
    assert all(grad.is_contiguous() for grad in found)


# torch.func


@needs_vmap
@pytest.mark.parametrize(
    ("in_dims", "shapes"),
    [
        ((0, 0), ((4, 3, 8), (4, 3, 8))),
        ((1, 0), ((3, 4, 8), (4, 3, 8))),
        ((-1, 2), ((3, 8, 4), (3, 8, 4))),
        ((0, None), ((4, 3, 8), (3, 8))),
        ((None, 1), ((3, 8), (3, 4, 8))),
        ((0, 0), ((4, 8), (4, 8))),
        ((0, 1), ((4, 0, 8), (0, 4, 8))),
    ],
)
@pytest.mark.parametrize("name", REGIMES)
def test_vmap(name, in_dims, shapes):
    sd, temperature = REGIMES[name]
    size = max(torch.Size(shape).numel() for shape in shapes)
    pool = clip_like(1, max(size, 1), sd, temperature=temperature)
    pair = [
        x[0, : torch.Size(shape).numel()].view(shape).requires_grad_()
        for x, shape in zip(pool, shapes, strict=True)
    ]

    def directly(*pair):
        count = next(x.shape[dim] for x, dim in zip(pair, in_dims, strict=True) if dim is not None)
        wide = [
            x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(pair, in_dims, strict=True)
        ]
        return dirichlet_kl(*wide)

    found = gradients(vmap(dirichlet_kl, in_dims=in_dims), pair)
    want = gradients(directly, pair)
    assert [x.shape for x in found] == [x.shape for x in want]
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4 if got.ndim > 2 else BOUND, atol=0)


@needs_vmap
def test_nested_vmap():
    first, second = (x.view(2, 3, 4, 8) for x in clip_like(24, 8, 0.02))
    first.requires_grad_()
    nested = vmap(vmap(dirichlet_kl), in_dims=(1, 1), out_dims=1)
    assert_close(gradients(nested, (first, second)), gradients(dirichlet_kl, (first, second)))
    every_pair = vmap(vmap(dirichlet_kl, in_dims=(None, 0)), in_dims=(0, None))
    rows, others = clip_like(3, 8, 0.1)
    wide = [x.expand(3, 3, 8) for x in (rows.unsqueeze(1), others.unsqueeze(0))]
    assert_close([every_pair(rows, others)], [dirichlet_kl(*wide)])


@needs_vmap
@pytest.mark.parametrize("mapped", [(0, 0), (None, 0), (0, None)], ids=str)
def test_vmap_over_weights(mapped):
    """Weights of which the smallest vanishes, and another is of no float32 on its own."""
    stack = [x.view(4, 3, 8) for x in clip_like(12, 8, 0.02)]
    inputs = [x if dim == 0 else x[0] for x, dim in zip(stack, mapped, strict=True)]
    weights = torch.tensor([-130.0, -torch.inf, 2.0, -3.0], dtype=F64)
    options = {"scale": 0.9, "shift": 1.5}

    def parts(first, second, log_weight):
        return dirichlet_kl_parts(first, second, log_weight=log_weight, **options)

    leaves = [x.clone().requires_grad_() for x in inputs]
    shape, evidence = vmap(parts, in_dims=(*mapped, 0))(*leaves, weights)
    (shape + 2 * evidence).sum().backward()
    one_by_one = [x.clone().requires_grad_() for x in inputs]
    want = [
        parts(*(x[i] if dim == 0 else x for x, dim in zip(one_by_one, mapped, strict=True)), weight)
        for i, weight in enumerate(weights)
    ]
    want_shape, want_evidence = (torch.stack(part) for part in zip(*want, strict=True))
    (want_shape + 2 * want_evidence).sum().backward()
    found = [shape, evidence, *(x.grad for x in leaves)]
    expected = [want_shape, want_evidence, *(x.grad for x in one_by_one)]
    for got, values in zip(found, expected, strict=True):
        torch.testing.assert_close(got, values, rtol=BOUND, atol=1e-37)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's jvp
def test_derivatives_of_torch_func_are_refused():
    """Rather than taken for zero."""
    first, second = clip_like(2, 8, 0.02)
    message = "expected tensors of torch.autograd, got those of a derivative of torch.func"
    for function in (
        grad(lambda x: dirichlet_kl(x, second, "sum")),
        grad(lambda x: dirichlet_kl(first, x, "sum")),
        vmap(grad(lambda row: dirichlet_kl(row, second[0], "sum"))),
        torch.func.jacrev(lambda x: dirichlet_kl(x, second)),
        lambda x: torch.func.jvp(lambda y: dirichlet_kl(y, second), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=message):
            function(first)


@needs_vmap
def test_second_derivative_of_the_operator_is_refused():
    first, second = (x.requires_grad_() for x in clip_like(4, 8, 0.02))
    for source, other in itertools.product((0, 1), repeat=2):
        pair = (first, second)
        kl = vmap(dirichlet_kl)(*pair).sum()
        (slope,) = torch.autograd.grad(kl, pair[source], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once only"):
            torch.autograd.grad(slope.square().sum(), pair[other])


@pytest.mark.usefixtures("compiling")
def test_second_derivative_of_a_compiled_call_is_refused():
    pair = [x.requires_grad_() for x in clip_like(4, 8, 0.02)]
    kl = torch.compile(dirichlet_kl, fullgraph=True, backend="aot_eager")(*pair, "sum")
    (slope,) = torch.autograd.grad(kl, pair[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.square().sum().backward()


@needs_vmap
def test_vmap_of_nothing_and_of_the_weight_alone():
    a = torch.full((0, 3, 5), 14.0)
    assert vmap(dirichlet_kl)(a, a).shape == (0, 3)
    first, second = 14 + torch.rand(2, 3, 5).unbind()[0], 14 + torch.rand(3, 5)
    weights = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    found = vmap(lambda w: dirichlet_kl_parts(first, second, log_weight=w)[0])(weights)
    want = [dirichlet_kl_parts(first, second, log_weight=float(w))[0] for w in weights]
    torch.testing.assert_close(found, torch.stack(want), rtol=5e-6, atol=0)


# impl="compile"


@pytest.mark.usefixtures("compiling")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_compile_is_the_closed_form(monkeypatch):
    """All in one, since compiling takes its time."""
    fallen_back = []
    for name in ("forward", "backward"):
        real = getattr(closed_form, name)

        def counted(*arguments, real=real):
            fallen_back.append(real.__name__)
            return real(*arguments)

        monkeypatch.setattr(closed_form, name, counted)

    def both_ways(pair, upstream=None):
        fallen_back.clear()
        found = evaluate(*pair, impl="compile", upstream=upstream)
        calls = list(fallen_back)
        wide = None if upstream is None else upstream.double()
        return found, evaluate(*pair, impl="reference", upstream=wide), calls

    shape = (6, 30)
    upstream = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for sd in (1e-5, 1e-3, 0.02):
        found, want, calls = both_ways(clip_like(*shape, sd), upstream)
        assert not calls
        assert_close(found, want)

    # What its formulas do not hold for goes to the closed form, forward and backward.
    small_row = list(clip_like(*shape, 1e-3))
    small_row[1][2] -= 10
    low = [x - 13 for x in clip_like(*shape, 1e-3)]
    one_wide = list(clip_like(*shape, 1e-3))
    one_wide[0][4, 7] += 3.5
    spoilt = list(clip_like(*shape, 1e-3))
    spoilt[0][3, 3] = torch.nan
    good = [0, 1, 2, 4, 5]
    for pair in (small_row, low, one_wide, clip_like(*shape, 0.4), spoilt):
        found, want, calls = both_ways(pair)
        assert calls == ["forward", "backward"]
        assert_close([x[good] for x in found], [x[good] for x in want])
    assert found[0][3].isnan()

    equal, _ = clip_like(*shape, 0)
    found, _, calls = both_ways((equal, equal))
    assert not calls
    assert not any(values.any() for values in found)
    # A common change of all concentrations: all is evidence.
    shifted = (equal * 1024).round() / 1024
    found, want, _ = both_ways((shifted, shifted + 0.25))
    assert_close(found[1:], want[1:])

    for pair in HARD_PAIRS.values():
        found, want, _ = both_ways(pair)
        assert_same_divergence(found, want)

    pair = clip_like(*shape, 0.02)
    with_weight = {"scale": 1 / 7, "shift": 1 / 0.07, "log_weight": -17.3}
    logits = [100 * (0.07 * x - 1) for x in pair]
    found = dirichlet_kl_parts(*logits, impl="compile", **with_weight)
    assert_close(found, dirichlet_kl_parts(*logits, impl="reference", **with_weight))
    assert compiled._compiled.cache_info().currsize == 2
    empty = torch.empty(0, 30, requires_grad=True)
    dirichlet_kl(empty, empty, "sum", impl="compile").backward()
    assert empty.grad.shape == (0, 30)
