"""examples/finetune.py: the passes of a step, counted, and the references kept in memory."""

import pytest
import torch
from finetune_tools import LOSSES, Passes, first_batch, prepare

from calibclip import attention

# Passes


# Beyond the k of the attack: forward, of these with the frozen model, and backward to the weights.
# With the references in memory; the columns "minimum" of the table of costs.
MINIMUM = {
    "tecoa": {"first": (1, 0, 1), "later": (1, 0, 1)},
    "pmg": {"first": (3, 1, 2), "later": (3, 1, 2)},
    "fare": {"first": (2, 1, 1), "later": (1, 0, 1)},
    "tga": {"first": (3, 1, 2), "later": (2, 0, 2)},
    "comp-tga": {"first": (3, 1, 2), "later": (2, 0, 2)},
    "ucat": {"first": (2, 1, 1), "later": (1, 0, 1)},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_runs_no_more_passes_than_the_method_needs(finetune, tmp_path, loss, steps):
    run = prepare(finetune, loss, tmp_path, "--attack-steps", str(steps))
    passes = Passes().watch(run.classifier).watch(run.references.frozen)
    text = []
    for classifier in (run.classifier, run.references.frozen):
        classifier.model.token_embedding.register_forward_hook(lambda *_: text.append(1))
    batch = first_batch(run)
    for when in ("first", "later", "later"):
        finetune.training_step(run, *batch)
        forward, no_grad, full = MINIMUM[loss][when]
        assert passes.take() == (steps + forward, no_grad, steps, full), when
    assert not text


@pytest.mark.parametrize("loss", LOSSES)
def test_the_printed_passes_are_those_of_the_step(finetune, passes_module, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    keeps = bool(passes_module.required(run.loss, "ref"))
    described = passes_module.describe(run.loss, 2, keeps)
    first, later = (MINIMUM[loss][when][0] + 2 for when in ("first", "later"))
    assert described.startswith(f"{first} forward")
    assert (f"({later} once" in described) == (later < first)
    assert f"2 backward to the pixels, {MINIMUM[loss]['first'][2]} to the weights" in described


@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_computes_no_gradient_of_a_weight(finetune, passes_module, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    index, images, target = first_batch(run)
    computed = []
    for weight in run.visual.parameters():
        weight.register_hook(lambda _: computed.append(1))
    references = run.references.on_clean(index, images, target)
    images_adv = passes_module.craft(
        run.classifier, run.encoder, images, target, references, eps=0.1, step_size=0.1, steps=2
    )
    assert not computed
    assert all(weight.grad is None for weight in run.trained.parameters())
    assert all(weight.requires_grad for weight in run.visual.parameters())
    assert 0 < (images_adv - images).abs().max() <= 0.1 + 1e-7


def test_fare_attacks_the_embedding_not_the_prediction(finetune, passes_module, tmp_path):
    gains = {}
    for loss in ("fare", "tecoa"):
        run = prepare(finetune, loss, tmp_path)
        index, images, target = first_batch(run)
        references = run.references.on_clean(index, images, target)
        images_adv = passes_module.craft(
            run.classifier,
            run.encoder,
            images,
            target,
            references,
            eps=0.1,
            step_size=0.05,
            steps=4,
        )
        with torch.no_grad():
            embeddings = [run.classifier.embed(batch) for batch in (images_adv, images)]
            logits = run.classifier(images_adv)
        gains[loss] = (
            float((embeddings[0] - embeddings[1]).square().sum(1).mean()),
            float(torch.nn.functional.cross_entropy(logits, target)),
        )
    assert gains["fare"][0] > 1.5 * gains["tecoa"][0]
    assert gains["tecoa"][1] > gains["fare"][1]


# References in memory


@pytest.mark.parametrize("loss", ["ucat", "fare", "tga", "comp-tga"])
def test_the_second_epoch_runs_no_reference_pass(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path, "--log-every", "100")
    frozen = Passes().watch(run.references.frozen)
    tmp_path.mkdir(exist_ok=True)
    finetune.train(run, 0)
    assert frozen.take()[0] == 64 / 16


@pytest.mark.parametrize("loss", ["ucat", "fare", "tga", "comp-tga"])
def test_references_from_memory_equal_computed_ones(finetune, passes_module, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    kept = run.references
    computed = passes_module.References(
        kept.frozen, run.encoder, run.loss, keep=None, gather=lambda value: [value]
    )
    index, images, target = first_batch(run)
    some = torch.tensor([0, 3, 4])
    kept.on_clean(index[some], images[some], target[some])
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    batch = (index[shuffled], images[shuffled], target[shuffled])
    for _ in range(2):
        from_memory, anew = kept.on_clean(*batch), computed.on_clean(*batch)
        assert from_memory.keys() == anew.keys() == {n for n in run.loss.requires if "_ref" in n}
        for name, values in anew.items():
            torch.testing.assert_close(from_memory[name], values, rtol=1e-5, atol=1e-5)


def test_a_partly_known_batch_computes_the_missing_images_only(finetune, tmp_path):
    run = prepare(finetune, "ucat", tmp_path)
    sizes = []
    layer = run.references.frozen.model.visual.conv1
    layer.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    index, images, target = first_batch(run)
    for some in (slice(0, 6), slice(4, 16), slice(0, 16)):
        run.references.on_clean(index[some], images[some], target[some])
    assert sizes == [6, 10]


def test_pmg_keeps_no_reference_and_augmented_images_have_none_to_keep(finetune, tmp_path):
    run = prepare(finetune, "ucat", tmp_path, "--augment")
    frozen = Passes().watch(run.references.frozen)
    batch = first_batch(run)
    for _ in range(2):
        finetune.training_step(run, *batch)
        assert frozen.take()[0] == 1
    assert not run.references.kept
    run = prepare(finetune, "pmg", tmp_path)
    finetune.training_step(run, *batch)
    assert not run.references.kept


@pytest.mark.parametrize("loss", ["ucat", "fare", "tga", "comp-tga"])
def test_the_printed_memory_is_what_the_references_take(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    expected = run.references.memory(run.train_data[0][1])
    assert not run.references.kept
    finetune.train(run, 0)
    assert expected == sum(rows.nbytes for rows in run.references.kept.values()) > 0


def test_references_are_not_kept_where_the_user_does_not_want_it(finetune, tmp_path):
    run = prepare(finetune, "ucat", tmp_path, "--no-keep")
    frozen = Passes().watch(run.references.frozen)
    for _ in range(2):
        finetune.training_step(run, *first_batch(run))
        assert frozen.take()[0] == 1
    assert run.references.memory(run.train_data[0][1]) == 0
    assert not run.references.kept


@pytest.mark.parametrize("loss", ["tga", "comp-tga"])
def test_the_maps_are_those_of_calibclip_attention(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    index, images, target = first_batch(run)
    maps = run.references.on_clean(index, images, target)["attention_ref"]
    with torch.no_grad():
        _, tokens = run.classifier.embed_with_tokens(images)
    texts = [run.classifier.text_features[target]]
    if loss == "comp-tga":
        texts.append(run.encoder.negative_text[target])
        assert not torch.equal(*texts)
        expected = attention.complementary_attention(tokens, *texts, image_size=32)
    else:
        expected = attention.text_guided_attention(tokens, *texts, image_size=32)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)
