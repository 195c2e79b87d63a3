"""The benchmarks of the kernels: what they refuse, and what they write where."""

import contextlib
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import calibclip
from calibclip._kernels import closed_form, compiled

ROOT = Path(__file__).parents[1]
KL, LINEAR = calibclip.dirichlet_kl, calibclip.linear_dirichlet_align


@pytest.fixture(scope="module")
def benchmarks():
    """Return the directory's modules by name."""
    names = ("_report", "_timing", "dirichlet_kl", "linear_align", "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def kl(benchmarks, monkeypatch):
    """Return the Dirichlet KL's at little work, the compiled functions not compiled."""
    module = benchmarks["dirichlet_kl"]
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    monkeypatch.setattr(module, "CLASSES", (10,))
    monkeypatch.setattr(module, "SIZES", {"cpu": [(32, 12)]})
    monkeypatch.setattr(module, "THREADS", torch.get_num_threads())
    return module


def printed_before_exit(main, arguments, capsys, match):
    with pytest.raises(SystemExit, match=match):
        main(arguments)
    return capsys.readouterr().out


class Off(torch.autograd.Function):
    """The identity, with a relative error in the value or in the gradient."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * (1 + value)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + ctx.gradient), None, None


WRONG = [(1e-4, 0.0), (0.0, 1e-4), (float("nan"), 0.0), (0.0, float("nan"))]


def cases_of(printed, column):
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    at = [cell.strip() for cell in rows[0]].index(column)
    return {tuple(cell.strip() for cell in row[:3]): row[at].strip() for row in rows[1:]}


def test_compiled_function_is_judged_by_what_it_computes(kl, capsys):
    assert kl.accuracy("cpu")
    printed = capsys.readouterr().out
    for what in ("KL", "gradient"):
        by_compile, by_eager = (cases_of(printed, f"{who}, {what}") for who in ("compile", "eager"))
        assert by_compile["CLIP-like", "1", "0.01"] == by_compile["unrelated", "", ""] == "eager"
        assert "eager" not in by_eager.values()
        taken = {case for case, error in by_compile.items() if error != "eager"}
        assert ("CLIP-like", "0.07", "0.01") in taken
        assert all(float(by_compile[case]) <= kl.BOUND for case in taken)


def test_compiled_function_alone_is_found_wrong(kl, monkeypatch, capsys):
    right = compiled._forward

    def wrong(*inputs):
        shape, *others = right(*inputs)
        return shape * 1.001, *others

    monkeypatch.setattr(compiled, "_forward", wrong)
    printed = printed_before_exit(kl.main, [], capsys, match="No speed is reported")
    assert "**One of ours misses its bound: CLIP-like 0.07 0.01.**" in printed
    assert "bound: CLIP-like 1 0.01" not in printed
    assert "call, ms" not in printed


def test_compiled_function_that_takes_nothing_is_refused(kl, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "forward", closed_form.forward)
    printed = printed_before_exit(kl.main, [], capsys, match="compile: none of the rows of 10")
    assert "call, ms" not in printed


@pytest.mark.parametrize("off", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_is_checked(kl, off, dtype):
    inputs = kl.clip_like(40, 12, "cpu", dtype)
    right = kl.providers("cpu")
    kl.verify(right, inputs)
    wrong = {**right, "eager": lambda a, b: Off.apply(KL(a, b), *(100 * x for x in off))}
    what = "KL" if off[0] else "gradient"
    with pytest.raises(SystemExit, match=f"eager, 40x12: {what} off by .*No speed is reported"):
        kl.verify(wrong, inputs)
    kl.verify({"torch.distributions": wrong["eager"]}, inputs)  # the published one may be wrong


def test_a_wrong_size_gets_no_time(kl, monkeypatch, capsys):
    def wrong(a, b, **options):
        values = KL(a, b, **options)
        return Off.apply(values, 1e-4, 0.0) if len(a) == 32 and a.shape[1] == 12 else values

    monkeypatch.setattr(calibclip, "dirichlet_kl", wrong)
    printed = printed_before_exit(kl.main, [], capsys, match="eager, 32x12: KL off by 1.0e-04")
    assert "call, ms" not in printed


def test_speed_says_when_the_compiled_form_fell_back(kl, monkeypatch, capsys):
    kl.speed("cpu", 2, quick=True)
    assert "| 32x12 | compile |" in capsys.readouterr().out
    monkeypatch.setattr(compiled, "forward", closed_form.forward)
    kl.speed("cpu", 2, quick=True)
    assert "| 32x12 | compile (fell back to eager) |" in capsys.readouterr().out


@pytest.fixture
def linear(benchmarks, monkeypatch):
    module = benchmarks["linear_align"]
    for name, value in {"BATCH": 32, "SIZE": 16, "CLASSES": 12, "SLICE": 8}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return module


def test_linear_loss_right_is_timed(linear, capsys):
    linear.main([])
    assert "peak, BxC" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [8, 32])  # of the slice in float64, of the whole
@pytest.mark.parametrize("off", WRONG)
def test_linear_loss_wrong_is_refused(linear, monkeypatch, capsys, off, rows):
    def wrong(adv, *others):
        loss = LINEAR(adv, *others)
        return Off.apply(loss, *off) if len(adv) == rows else loss

    monkeypatch.setattr(calibclip, "linear_dirichlet_align", wrong)
    printed = printed_before_exit(linear.main, [], capsys, match="No speed is reported")
    assert "peak" not in printed


def test_times_and_peak(benchmarks):
    timing, seen = benchmarks["_timing"], []

    @contextlib.contextmanager
    def around(name):
        seen.append(f"before {name}")
        yield
        seen.append(f"after {name}")

    def call(name):
        return lambda: seen.append(name)

    providers = {name: call(name) for name in "ab"}
    times = timing.calls(providers, "cpu", samples=2, warm_up=1, around=around)
    assert seen == 3 * ["before a", "a", "after a", "before b", "b", "after b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    with timing.peak("cpu") as found:
        kept = torch.empty(1000).double()
    assert found.bytes == kept.nbytes + kept.nbytes // 2
    assert timing.peak_bytes(lambda: None) == 0
    # What makes malloc keep its memory comes before all calls, and is gone again.
    assert timing.peak_bytes(lambda: timing.calls({}, "cpu", samples=1)) == 28 << 20


def test_spread_and_ratio(benchmarks):
    timing = benchmarks["_timing"]
    assert timing.spread(np.arange(11) / 1e3) == "5 (2-8)"
    assert timing.ratio(np.array([2.0, 9.0, 4.0]), np.array([1.0, 3.0, 1.0])) == 3.0


def test_insert_replaces_one_part_of_the_page(benchmarks):
    run = benchmarks["run"]
    page = (
        "top\n<!-- cpu: written by benchmarks/run.py -->\nold\n<!-- end of cpu -->\n"
        "between\n<!-- cuda: written by benchmarks/run.py -->\nkept\n<!-- end of cuda -->\nend\n"
    )
    text = "\nnew \\1 \\d\n"  # nothing of it is a pattern
    changed = run.insert(page, "cpu", text)
    assert changed == page.replace("\nold\n", "\n\nnew \\1 \\d\n\n")
    assert run.insert(changed, "cpu", text) == changed
    with pytest.raises(SystemExit, match="expected the marks <!-- tpu"):
        run.insert(page, "tpu", text)


def test_load_is_looked_at_once_before_the_work(benchmarks, monkeypatch, tmp_path, capsys):
    run, report = benchmarks["run"], benchmarks["_report"]
    done, page = [], tmp_path / "page.md"
    page.write_text("<!-- cpu: written by benchmarks/run.py -->\n<!-- end of cpu -->\n")

    def section(_):
        done.append("section")
        print("# Section\n\ntext\n")

    def load():
        done.append("load")
        return 1e3, 0, 0

    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "SECTIONS", {"cpu": 2 * [(section, [])]})
    monkeypatch.setattr(report.os, "getloadavg", load, raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    run.main()
    assert done == ["load", "section", "section"]
    written = page.read_text()
    assert written.count("**Load average 1000.0: the machine is busy.") == 1
    assert written.index("Load average") < written.index("### Section\n")
    assert "Written into" in capsys.readouterr().out
