"""benchmarks/training_step.py and docs/training-step.md: the same step, at fewer passes."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("training_step")


@pytest.fixture
def steps_and_batch(benchmark, data_module):
    name = data_module.register_tiny_clip()
    settings = benchmark.Settings(
        model=name,
        batch_size=6,
        image_size=32,
        device="cpu",
        samples=1,
        compiled=False,
        bf16=True,
        quick=False,
    )
    return benchmark.build(settings, n_prompts=5)


def test_the_recipe_takes_the_published_step_with_the_documented_passes(benchmark, steps_and_batch):
    steps, batch = steps_and_batch
    observed = {name: benchmark.observe(step, batch) for name, step in steps.items()}
    assert observed["published"].update.norm() > 0
    for name in ("recipe", "without kept references"):
        found = benchmark.differences(observed["published"], observed[name])
        assert max(found) < benchmark.BOUND
    for name in ("published, bf16", "bf16"):
        assert benchmark.differences(observed["published"], observed[name])[1] > 1e-3
    assert {name: tuple(seen.passes.values()) for name, seen in observed.items()} == {
        "published": (4, 0, 3, 4, 3),
        "recipe": (3, 2, 1, 0, 0),
        "without kept references": (4, 2, 1, 0, 0),
        "published, bf16": (4, 0, 3, 4, 3),
        "bf16": (3, 2, 1, 0, 0),
    }
    assert 0 < observed["recipe"].peak < observed["published"].peak


@pytest.mark.parametrize("off", [0.1, float("nan")])
def test_another_step_is_noticed_and_gets_no_time(
    benchmark, steps_and_batch, monkeypatch, capsys, off
):
    steps, batch = steps_and_batch
    steps["recipe"].kept += off
    monkeypatch.setattr(benchmark, "build", lambda *_: (steps, batch))
    settings = benchmark.Settings("", 6, 32, "cpu", 1, compiled=False, bf16=False, quick=False)
    with pytest.raises(SystemExit, match="No time is reported"):
        benchmark.measured(settings, 5)
    printed = capsys.readouterr().out
    assert "update (norm)" in printed
    assert "p20-p80" not in printed


def test_nan_in_the_update_alone_is_refused(benchmark):
    right, wrong = (benchmark.Observed(1.0, torch.tensor([1.0, x])) for x in (1.0, float("nan")))
    assert benchmark.check({"published": right, "recipe": right})
    assert not benchmark.check({"published": right, "recipe": wrong})


def small(data_module, **options):
    return {
        "model": data_module.register_tiny_clip(),
        "batch_size": 2,
        "image_size": 32,
        "device": "cpu",
        "samples": 2,
        "compiled": False,
        "quick": False,
    } | options


def test_all_steps_of_a_mode_get_a_time(benchmark, data_module, capsys):
    benchmark.measured(benchmark.Settings(**small(data_module, bf16=True)), 3)
    times = capsys.readouterr().out.split("s (p20-p80)")[1].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in times if line] == [
        "published",
        "recipe",
        "without kept references",
        "published, bf16",
        "bf16",
    ]


def test_bound_counts_the_faster_of_two_encodings(benchmark, data_module, monkeypatch, capsys):
    def calls(providers, device, samples, **options):
        for call in providers.values():
            call()
        return {name: np.array([5.0, 3.0]) for name in providers}

    monkeypatch.setattr(benchmark, "calls", calls)
    benchmark.bounded(benchmark.Settings(**small(data_module, bf16=False)), 3)
    printed = capsys.readouterr().out
    assert "| encoding the prompts once | 3 |" in printed
    assert "| published, more than | 12 |" in printed


def test_measuring_leaves_the_models_as_they_were(benchmark, steps_and_batch):
    steps, batch = steps_and_batch
    before = {name: benchmark.observe(step, batch).loss for name, step in steps.items()}
    times = benchmark.seconds(steps, batch, samples=2)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(steps, 2)
    for name, step in steps.items():
        assert benchmark.observe(step, batch).loss == before[name]


def test_the_documented_step_runs(data_module, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "training-step.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "training_step_page"}
    for block in blocks:
        assert "ViT-B-32-quickgelu" in block
        block = block.replace("ViT-B-32-quickgelu", data_module.register_tiny_clip())
        exec(compile(block, "training-step.md", "exec"), names)

    # From equal weights and starts, parts have the update of their whole.
    attack = names["pgd"]
    names["pgd"] = lambda *inputs, generator, **options: attack(*inputs, **options, seed=1)
    names["optimizer"].param_groups[0]["lr"] = 0.0
    updates = []
    for size in (8, 2):
        columns = (column.split(size) for column in names["loader"].dataset.tensors)
        names["training_step"](list(zip(*columns, strict=True)))
        weights = names["model"].visual.parameters()
        updates.append(torch.cat([weight.grad.flatten() for weight in weights]))
    whole, parts = updates
    assert whole.norm() > 0
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
