"""The four loops run and make a tiny model robust; what docs say of them is what they do."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from calibclip import ZeroShotClassifier

ROOT = Path(__file__).parents[1]
SCRIPTS = ("in_tecoa_loop", "in_open_clip_training", "in_fare_loop", "in_transformers_trainer")


def source(script):
    return (ROOT / "examples" / f"{script}.py").read_text()


def docstring(script):
    return ast.get_docstring(ast.parse(source(script))) or ""


def readme_block(script):
    """Return the diff in README that comes next after the script's name."""
    readme = (ROOT / "README.md").read_text()
    found = re.search(
        rf"examples/{script}\.py\)(?:(?!examples/in_).)*?```diff\n(.*?)```", readme, re.S
    )
    assert found, f"README has no diff block for {script}"
    return found[1]


def changes(text):
    """Return the removed and the added lines of a diff, without their signs."""
    lines = [line.strip() for line in text.splitlines()]
    removed = [line[2:].strip() for line in lines if line.startswith("- ")]
    added = [line[2:].strip() for line in lines if line.startswith("+ ")]
    return removed, added


def check_diff(text, script):
    removed, added = changes(text)
    assert len(removed) >= 2
    assert 2 <= len(added) <= 4
    module = ast.parse(source(script))
    code = [line.strip() for line in ast.unparse(module.body[1:]).splitlines()]
    comments = [line.strip() for line in source(script).splitlines()]
    for line in added:
        assert ast.unparse(ast.parse(line)) in code
    for line in removed:
        assert f"# was: {line}" in comments


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_diff_in_the_docstring_is_in_the_code(script):
    check_diff(docstring(script), script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_diff_in_readme_is_in_the_code(script):
    check_diff(readme_block(script), script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loop_makes_its_model_robust(script):
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--quick"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    first, last = numbers(r"loss: (\S+) in the first step, (\S+) in the last", run.stdout)
    assert last < first
    # Two steps of attack and one of training; the frozen model sees the clean images only.
    assert "encoder passes in each step: image 3, reference 1" in run.stdout
    # Chance is 10 %. The attack does not leave much of the original, and the loop brings it back.
    accuracy = r"accuracy (\S+)% clean, (\S+)% attacked"
    clean, attacked = numbers(f"before: .*{accuracy}", run.stdout)
    tuned_clean, tuned_attacked = numbers(f"after: .*{accuracy}", run.stdout)
    assert clean > 50
    assert attacked < clean - 30
    assert tuned_clean > 50
    assert tuned_attacked > attacked + 15
    if script == "in_fare_loop":
        drift = r"drift (\S+) clean, (\S+) attacked"
        assert numbers(f"before: {drift}", run.stdout)[0] == 0
        before, after = (numbers(f"{when}: {drift}", run.stdout)[1] for when in ("before", "after"))
        assert after < before / 2


def test_open_clips_training_attacks_a_frozen_model_in_evaluation_mode(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    loop = importlib.import_module("in_open_clip_training")
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": 16, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(8, vision, text)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    classifier = ZeroShotClassifier.from_open_clip(model, tokenizer, loop.NAMES)
    seen = []
    layer = model.visual.conv1
    layer.register_forward_hook(
        lambda *_: seen.append((model.training, layer.weight.requires_grad))
    )
    attacked = loop.AttackedClip(classifier).train()
    attacked(torch.rand(2, 3, 16, 16), tokenizer(["one", "two"]))
    assert seen == [(False, False)] * loop.STEPS + [(True, True)]


def numbers(pattern, text):
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text!r}"
    return [float(number) for number in found.groups()]
