"""examples/finetune.py: whole runs, and that resumed and shared ones equal them."""

import dataclasses
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import open_clip
import pytest
import torch
from finetune_tools import (
    LOSSES,
    Passes,
    arguments,
    first_batch,
    losses,
    prepare,
    read_log,
    steps,
    weights,
)

EXAMPLES = Path(__file__).parents[1] / "examples"

# What a run does


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_method_runs_and_reports(finetune, tmp_path, capsys, loss, official):
    finetune.main(arguments(loss, tmp_path, "--log-every", "3", *["--official"] * official))
    first, *lines, last = read_log(tmp_path)
    assert first["options"]["loss"] == loss
    assert first["processes"] == 1
    assert first["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
    for model, view in itertools.product(("original", "finetuned"), ("clean", "pgd")):
        assert 0 <= last[f"{model}_{view}_accuracy"] <= 1
        assert 0 <= last[f"{model}_{view}_expected_calibration_error"] <= 1
    printed = capsys.readouterr().out
    for part in ("passes", "32 x 32 pixels", "PGD-2: eps", "worst iterate", "A smoke test"):
        assert part in printed
    assert "10 classes: 'This is a photo of a zero', 'This is a photo of a one'" in printed
    assert ("MiB of references" in printed) == (loss not in ("tecoa", "pmg"))


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_image_encoder_trains(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    before = {name: weight.clone() for name, weight in run.classifier.model.state_dict().items()}
    finetune.training_step(run, *first_batch(run))
    for name, weight in run.classifier.model.state_dict().items():
        changed = not torch.equal(weight, before[name])
        assert changed == name.startswith("visual."), name
    for name, weight in run.references.frozen.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_each_epoch_has_its_own_order(finetune, tmp_path, monkeypatch):
    seen = []
    step = finetune.training_step
    monkeypatch.setattr(
        finetune, "training_step", lambda run, *batch: seen.append(batch[0]) or step(run, *batch)
    )
    finetune.main(arguments("tecoa", tmp_path))
    first, second = (torch.cat(seen[start : start + 4]).tolist() for start in (0, 4))
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second


def test_the_learning_rate_warms_up_and_falls_to_zero(finetune, tmp_path):
    finetune.main(arguments("tecoa", tmp_path, "--log-every", "1"))
    rates = [line["lr"] / 0.05 for line in steps(tmp_path)]
    falling = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx([0.5, 1, *falling])


def test_the_original_is_evaluated_beside_the_trained_model(
    finetune, report_module, tmp_path, monkeypatch
):
    attacks = []
    both = report_module.clean_and_attacked
    monkeypatch.setattr(
        report_module,
        "clean_and_attacked",
        lambda attack, *batch: attacks.append(attack) or both(attack, *batch),
    )
    run = prepare(finetune, "tecoa", tmp_path, "--val-eps", "8/255")
    before = report_module.evaluate(run)
    with torch.no_grad():
        for weight in run.visual.parameters():
            weight.add_(torch.randn_like(weight))
    after = report_module.evaluate(run)
    assert before["pgd_eps"] == 8 / 255
    assert {(attack.eps, attack.steps, attack.select) for attack in attacks} == {
        (8 / 255, 2, "worst")
    }
    for name in (name for name in before if name.startswith("original")):
        assert after[name] == before[name] == before[name.replace("original", "finetuned")]
    assert any(after[name] != before[name] for name in after if name.startswith("finetuned"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("official", [False, True])
def test_losses_and_gradients_stay_finite_in_fp16(
    finetune, passes_module, tmp_path, loss, official
):
    run = prepare(finetune, loss, tmp_path, *["--official"] * official)
    index, images, target = first_batch(run)
    exact = run.trained(images, images, target, references(run, index, images, target))
    half = dataclasses.replace(run.encoder, precision=torch.float16)
    run.trained.encoder = run.references.encoder = half
    run.references.known.zero_()
    rounded = run.trained(images, images, target, references(run, index, images, target))
    rounded["total"].backward()
    for name, value in rounded.items():
        torch.testing.assert_close(value, exact[name], rtol=0.02, atol=0.02)
    assert all(weight.grad.isfinite().all() for weight in run.visual.parameters())


def references(run, index, images, target):
    clean = run.references.on_clean(index, images, target)
    return clean | run.references.on_attacked(images, target)


@pytest.mark.parametrize("loss", ["tecoa", "comp-tga"])
def test_bf16_trains_float32_weights_less_precisely(finetune, tmp_path, loss):
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        finetune.main(arguments(loss, out, "--log-every", "1", "--precision", precision))
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert weights(tmp_path / "bf16").dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)


def test_the_file_runs_as_a_script(monkeypatch, tmp_path):
    script = str(EXAMPLES / "finetune.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments("tecoa", tmp_path)])
    runpy.run_path(script, run_name="__main__")
    assert read_log(tmp_path)[-1]["pgd_steps"] == 2


# Resume


@pytest.mark.parametrize("loss", ["ucat", "fare", "comp-tga"])
def test_a_resumed_run_goes_on_as_if_never_interrupted(finetune, tmp_path, monkeypatch, loss):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("--epochs", "3", "--log-every", "1")
    finetune.main(arguments(loss, whole, *more))

    taken = []

    def interrupted(run, *batch):
        taken.append(1)
        if len(taken) == 7:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return step(run, *batch)

    step = finetune.training_step
    monkeypatch.setattr(finetune, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(arguments(loss, broken, *more))
    monkeypatch.undo()
    finetune.main(arguments(loss, broken, *more, "--resume"))

    assert [line["step"] for line in steps(broken)] == list(range(1, 13))
    # Which images a frozen pass sees together differs after a resume, hence its last bits.
    torch.testing.assert_close(losses(broken), losses(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(broken), weights(whole), rtol=1e-4, atol=1e-5)
    assert not list(broken.glob("*.tmp"))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_checkpoint_goes_back_into_open_clip_as_the_docstring_says(
    finetune, tmp_path, monkeypatch, quick_gelu
):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *names: {"quick_gelu": quick_gelu})
    run = prepare(finetune, "tecoa", tmp_path)
    index, images, target = first_batch(run)
    finetune.training_step(run, index, images, target)
    finetune.save_checkpoint(run, 1)
    recipe = finetune.__doc__.split("goes back into open_clip's model with")[1]
    found = {"open_clip": open_clip, "torch": torch}
    exec(textwrap.dedent(recipe).replace("DIR", str(tmp_path)), found)
    with torch.no_grad():
        torch.testing.assert_close(found["model"].eval().visual(images), run.visual(images))


def test_a_checkpoint_is_not_replaced_by_one_that_is_not_finite(finetune, tmp_path, monkeypatch):
    def diverge(run, *batch):
        terms = step(run, *batch)
        taken.append(1)
        return terms if len(taken) <= 4 else dict.fromkeys(terms, torch.tensor(math.nan))

    step, taken = finetune.training_step, []
    monkeypatch.setattr(finetune, "training_step", diverge)
    with pytest.raises(SystemExit, match="the loss is nan"):
        finetune.main(arguments("tecoa", tmp_path, "--log-every", "1000"))
    assert len(taken) == 8
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1

    run = prepare(finetune, "tecoa", tmp_path)
    next(run.visual.parameters()).data[0] = math.nan  # the last update, after a finite loss
    with pytest.raises(SystemExit, match="a weight is not finite"):
        finetune.save_checkpoint(run, 2)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


def test_the_log_of_a_killed_run_is_continued(finetune, tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    whole = '{"epoch": 0, "step": 1}\n{"epoch": 0, "step": 2}\n'
    broken = whole + '{"epoch": 1, "step": 3}\n{"epoch": 1, "st'
    run = prepare(finetune, "tecoa", tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    path.write_text(broken)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.start_log(run, 1)
    monkeypatch.undo()
    assert path.read_text() == broken
    finetune.start_log(run, 1)
    assert path.read_text().startswith(whole)
    assert [line.get("step") for line in read_log(tmp_path)] == [1, 2, None]
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 0, 1]


def test_a_checkpoint_is_replaced_only_by_a_whole_one(finetune, tmp_path, monkeypatch):
    run = prepare(finetune, "tecoa", tmp_path)
    finetune.save_checkpoint(run, 1)

    def full_disk(_, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        finetune.save_checkpoint(run, 2)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


# Processes

# AdamW turns the rounding of a gradient that is zero (of the keys' biases) into full steps; FARE's
# own optimizer would therefore compare noise.
METHODS_OF_TWO = {
    "ucat": (),
    "tecoa": (),
    "tecoa --augment": (),
    "pmg": (),
    "pmg --official": ("--lr", "0.5"),
    "pmg --official --accumulate 2": ("--lr", "0.5"),
    "fare": ("--optimizer", "sgd", "--lr", "1e-3"),
    "tga": (),
    "comp-tga": (),
}

SEVERAL_RUNS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import finetune
with finetune.join_world("cpu") as world:
    for arguments in json.loads(sys.argv[2]):
        finetune.execute(finetune.read_options(arguments), world)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The output folders of all methods, run under torchrun by two processes that start once."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "several_runs.py"
    script.write_text(SEVERAL_RUNS)
    outs = {name: folder / name.replace(" ", "") for name in METHODS_OF_TWO}
    runs = [arguments_of_two(name, out) for name, out in outs.items()]
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    run = subprocess.run(
        [sys.executable, *launcher, str(script), str(EXAMPLES), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("2 x cpu") == len(METHODS_OF_TWO)
    return outs


def arguments_of_two(name, out):
    # 75 images: the last of an epoch are left out, and are others in the next one.
    loss, *flags = name.split()
    return arguments(loss, out, *flags, "--images", "75", "--log-every", "1", *METHODS_OF_TWO[name])


@pytest.mark.parametrize("name", METHODS_OF_TWO)
def test_two_processes_take_the_steps_of_one(finetune, tmp_path, two_processes, name):
    finetune.main(arguments_of_two(name, tmp_path))
    out = two_processes[name]
    torch.testing.assert_close(losses(out), losses(tmp_path), rtol=1e-5, atol=1e-5)

    run = prepare(finetune, name.split()[0], tmp_path)
    untrained = torch.cat([weight.flatten() for weight in run.visual.state_dict().values()])
    moved = float((weights(tmp_path) - untrained).abs().max())
    assert moved > 1e-4
    torch.testing.assert_close(weights(out), weights(tmp_path), rtol=0, atol=1e-3 * moved)

    results = [read_log(folder)[-1] for folder in (out, tmp_path)]
    for result in results:
        result.pop("seconds")
    assert results[0] == pytest.approx(results[1], abs=1e-4)


def test_all_processes_together_see_each_batch_of_one(finetune, data_module):
    images = data_module.labelled(data_module.Digits(train=True), names=None, limit=71, seed=0)

    def epoch(world_size):
        ranks = []
        for rank in range(world_size):
            loader, sampler = data_module.training_loader(
                images, 24, rank=rank, world_size=world_size, seed=3
            )
            sampler.set_epoch(1)
            ranks.append([index.tolist() for index, _, _ in loader])
        return [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]

    # The last 23 images are no batch, also where a share could be filled up to one.
    assert len(epoch(1)) == 2
    assert epoch(1) == epoch(2) == epoch(3)


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_an_error_while_one_process_downloads_leaves_no_other_waiting(
    finetune, monkeypatch, local_rank
):
    met = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append(1))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    world = finetune.World(int(local_rank) + 8, 16, torch.device("cpu"))  # on the second machine

    def download():
        with world.one_process_first():
            assert len(met) == int(local_rank)
            raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        download()
    assert len(met) == 1


def test_references_computed_by_other_processes_are_kept(finetune, passes_module, tmp_path):
    run = prepare(finetune, "tga", tmp_path)
    index, images, target = first_batch(run)
    options = {"frozen": run.references.frozen, "encoder": run.encoder, "loss": run.loss}
    gathered = []

    def gather(value):
        gathered.append(value)
        return [value]

    theirs = passes_module.References(**options, keep=16, gather=gather)
    theirs.on_clean(index[8:], images[8:], target[8:])
    mine = passes_module.References(**options, keep=16, gather=lambda mine: [mine, *gathered])
    mine.on_clean(index[:8], images[:8], target[:8])
    assert mine.complete
    passes = Passes().watch(mine.frozen)
    (maps,) = mine.on_clean(index[8:], images[8:], target[8:]).values()
    assert passes.take()[0] == 0
    (expected,) = theirs.on_clean(index[8:], images[8:], target[8:]).values()
    assert torch.equal(maps, expected)
