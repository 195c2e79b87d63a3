"""examples/finetune.py: what saves memory or time without changing the update."""

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


def step_and_gradients(finetune, loss, out, *more):
    """Take a step; return the run, the loss's terms and the gradients."""
    run = prepare(finetune, loss, out, *more)
    terms = finetune.training_step(run, *first_batch(run))
    return run, terms, torch.cat([weight.grad.flatten() for weight in run.visual.parameters()])


def assert_same_gradients(got, want):
    assert want.norm() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


# Accumulation


@pytest.mark.parametrize("loss", [*LOSSES, "pmg --official", "ucat --official"])
def test_a_batch_in_parts_has_the_update_of_the_whole(finetune, tmp_path, loss):
    loss, *flags = loss.split()
    run, whole, want = step_and_gradients(finetune, loss, tmp_path, *flags)
    parts_run, parts, got = step_and_gradients(
        finetune, loss, tmp_path, *flags, "--accumulate", "4"
    )
    assert_same_gradients(got, want)
    torch.testing.assert_close(parts["total"], whole["total"], rtol=1e-5, atol=1e-6)
    # The next step's attack starts where it would have started, too.
    assert torch.equal(parts_run.generator.get_state(), run.generator.get_state())


def test_each_part_runs_the_passes_and_one_update_follows(finetune, tmp_path, capsys):
    run = prepare(finetune, "ucat", tmp_path, "--accumulate", "4")
    passes = Passes().watch(run.classifier)
    sizes, updates = [], []
    run.classifier.model.visual.conv1.register_forward_hook(
        lambda *call: sizes.append(len(call[2]))
    )
    run.optimizer.register_step_post_hook(lambda *_: updates.append(1))
    finetune.training_step(run, *first_batch(run))
    assert passes.take() == (4 * 3, 0, 4 * 2, 4)
    assert set(sizes) == {4}
    assert len(updates) == 1
    finetune.print_plan(run)
    assert "0 of the text encoder, for each of 4 parts" in capsys.readouterr().out


def test_processes_exchange_gradients_in_the_last_part_only(finetune, tmp_path, monkeypatch):
    run = prepare(finetune, "tecoa", tmp_path, "--accumulate", "4")
    events = []

    class Exchange:
        def __enter__(self):
            events.append("kept")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(finetune, "DistributedDataParallel", type(run.trained))
    monkeypatch.setattr(type(run.trained), "no_sync", lambda _: Exchange(), raising=False)
    backward = finetune.backward
    monkeypatch.setattr(
        finetune, "backward", lambda *a, **k: events.append("part") or backward(*a, **k)
    )
    finetune.training_step(run, *first_batch(run))
    assert events == ["kept", "part"] * 3 + ["part"]


def test_parts_that_do_not_divide_the_batch_are_refused(finetune, options_module, tmp_path, capsys):
    with pytest.raises(SystemExit, match="--accumulate 3: expected a divisor of the 16 images"):
        prepare(finetune, "ucat", tmp_path, "--accumulate", "3")
    with pytest.raises(SystemExit):
        prepare(finetune, "ucat", tmp_path, "--accumulate", "0")
    assert "expected a number >= 1, got 0" in capsys.readouterr().err
    options = finetune.read_options(arguments("ucat", tmp_path, "--accumulate", "16"))
    with pytest.raises(SystemExit, match="expected a divisor of the 8 images of a process"):
        options_module.fit_schedule(options, 64, 2)


# Checkpointing


@pytest.mark.parametrize("where", ["training", "all"])
@pytest.mark.parametrize("loss", LOSSES)
def test_checkpointing_changes_no_gradient(finetune, tmp_path, loss, where):
    _, _, want = step_and_gradients(finetune, loss, tmp_path)
    run, _, got = step_and_gradients(finetune, loss, tmp_path, "--checkpointing", where)
    assert_same_gradients(got, want)
    assert not run.visual.transformer.grad_checkpointing  # nor does it slow the evaluation down


@pytest.mark.parametrize(("where", "repeats"), [(None, 0), ("training", 1), ("all", 3)])
def test_checkpointing_repeats_the_blocks_of_the_passes_it_names(
    finetune, tmp_path, capsys, where, repeats
):
    more = () if where is None else ("--checkpointing", where)
    run = prepare(finetune, "tecoa", tmp_path, *more)
    blocks = []
    for block in run.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda *_: blocks.append(1))
    passes = Passes().watch(run.classifier)
    finetune.training_step(run, *first_batch(run))
    assert passes.take() == (3, 0, 2, 1)
    assert len(blocks) == (3 + repeats) * len(run.visual.transformer.resblocks)
    finetune.print_plan(run)
    printed = capsys.readouterr().out
    assert ("to the weights (blocks run again)" in printed) == (repeats > 0)
    assert ("to the pixels (blocks run again)" in printed) == (where == "all")


def test_checkpointing_needs_a_transformer_that_does_it(
    finetune, data_module, preparation_module, tmp_path, monkeypatch
):
    with pytest.raises(SystemExit, match=r"--checkpointing: expected .* got Linear"):
        preparation_module.check_checkpointing(torch.nn.Linear(2, 2))
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    monkeypatch.setitem(data_module.TINY_CLIP, "vision_cfg", resnet)
    with pytest.raises(SystemExit, match=r"--checkpointing: expected .* got ModifiedResNet"):
        prepare(finetune, "ucat", tmp_path, "--checkpointing", "training")


# Compilation

# Dynamo looks at the gradients of what it traces; it hides the warning where that is no error.
traces = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def compiled(monkeypatch):
    """Trace with Dynamo as --compile does, without building code; return the traced graphs."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, backend=counter, **options)
    )
    yield counter
    torch._dynamo.reset()


@traces
@pytest.mark.parametrize("more", [(), ("--checkpointing", "training", "--accumulate", "2")])
@pytest.mark.parametrize("loss", ["ucat", "pmg", "fare"])
def test_a_compiled_encoder_takes_the_same_step(finetune, tmp_path, compiled, loss, more):
    _, _, want = step_and_gradients(finetune, loss, tmp_path, *more)
    assert compiled.frame_count == 0
    run, _, got = step_and_gradients(finetune, loss, tmp_path, "--compile", *more)
    assert_same_gradients(got, want)
    graphs = compiled.frame_count
    assert graphs == 2  # of the attack, to the pixels, and of the training passes
    for _ in range(2):
        finetune.training_step(run, *first_batch(run))
    assert compiled.frame_count == graphs


@traces
def test_a_compiled_run_reports_and_leaves_the_usual_checkpoint(
    finetune, tmp_path, compiled, capsys
):
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    finetune.main(arguments("tecoa", plain, "--log-every", "1"))
    assert "cpu, compiled" not in capsys.readouterr().out
    finetune.main(arguments("tecoa", fast, "--log-every", "1", "--compile"))
    assert compiled.frame_count > 0
    assert "fp32 on 1 x cpu, compiled" in capsys.readouterr().out
    torch.testing.assert_close(losses(fast), losses(plain), rtol=1e-4, atol=1e-4)
    saved = [torch.load(out / "last.pt", weights_only=True)["visual"] for out in (fast, plain)]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.parametrize("loss", ["tga", "comp-tga"])
def test_attention_is_not_read_from_a_compiled_encoder(finetune, tmp_path, capsys, loss):
    with pytest.raises(SystemExit):
        prepare(finetune, loss, tmp_path, "--compile")
    assert f"--compile: {loss} reads patch tokens by a hook" in capsys.readouterr().err


# Together


def test_the_savers_belong_to_a_run_and_it_resumes_with_them(finetune, tmp_path, monkeypatch):
    savers = ("--accumulate", "2", "--checkpointing", "training", "--precision", "bf16")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune.main(arguments("ucat", whole, "--log-every", "1", *savers))
    logged = read_log(whole)[0]["options"]
    assert (logged["accumulate"], logged["checkpointing"], logged["compile"]) == (
        2,
        "training",
        False,
    )

    def interrupted(run, *batch):
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(run, *batch)

    step, taken = finetune.training_step, []
    monkeypatch.setattr(finetune, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(arguments("ucat", broken, "--log-every", "1", *savers))
    monkeypatch.undo()
    for other in (("--accumulate", "4"), ("--checkpointing", "all"), ("--compile",)):
        with pytest.raises(SystemExit, match=f"{other[0]} \\(was"):
            finetune.main(arguments("ucat", broken, "--resume", *savers, *other))
    finetune.main(arguments("ucat", broken, "--log-every", "1", "--resume", *savers))
    assert [line["step"] for line in steps(broken)] == list(range(1, 9))
    torch.testing.assert_close(losses(broken), losses(whole), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(weights(broken), weights(whole), rtol=1e-2, atol=1e-3)
