"""Projected patch tokens of open_clip, OpenAI's clip and transformers, from one encoder pass."""

import copy

import pytest
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from test_zero_shot import from_clip, random_images, tiny_clip
from tiny_models import (
    NAMES,
    clip_processor,
    disturb,
    from_hf,
    from_openai,
    siglip_processor,
    tiny_hf_clip,
    tiny_openai,
    tiny_siglip,
    transformers,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calibclip import ZeroShotClassifier


@pytest.fixture(params=["open_clip", "openai", "transformers"])
def classifier(request):
    """Classifiers whose model pools by its class token, one of each library."""
    if request.param == "open_clip":
        return from_clip(disturb(tiny_clip()), NAMES)
    if request.param == "openai":
        clip = request.getfixturevalue("clip")
        return from_openai(clip, tiny_openai(clip))
    return from_hf(tiny_hf_clip(), clip_processor())


def tokens_by_hand(model, images):
    """Return projected tokens with the steps of each library's own forward pass written out."""
    if isinstance(model, transformers.CLIPModel):
        output = model.vision_model(pixel_values=images, output_hidden_states=True)
        return model.vision_model.post_layernorm(output.hidden_states[-1]) @ (
            model.visual_projection.weight.T
        )
    visual = model.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    if isinstance(model, CLIP):
        for block in visual.transformer.resblocks:
            x = block(x)
    else:
        x = visual.transformer.resblocks(x.transpose(0, 1)).transpose(0, 1)
    return visual.ln_post(x) @ visual.proj


def test_tokens_and_features_come_from_one_pass(classifier):
    images, calls = random_images(3, 3, 40, 36), []
    convolution = next(m for m in classifier.model.modules() if isinstance(m, nn.Conv2d))
    handle = convolution.register_forward_hook(lambda *call: calls.append(call))
    features, tokens = classifier.embed_with_tokens(images)
    handle.remove()
    assert len(calls) == 1
    assert tokens.shape == (3, 17, features.shape[1])
    expected = tokens_by_hand(classifier.model, classifier.preprocess(images))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, 0], features, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(features, classifier.embed(images), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(classifier.classify(features), classifier(images))


@pytest.mark.parametrize("batch", [1, 17])  # 17: as many images as tokens
def test_the_batch_is_not_taken_for_the_sequence(classifier, batch):
    images = random_images(batch, 3, 32, 32)
    features, tokens = classifier.embed_with_tokens(images)
    torch.testing.assert_close(tokens[:, 0], features, atol=1e-6, rtol=1e-6)
    _, last = classifier.embed_with_tokens(images[-1:])
    torch.testing.assert_close(tokens[-1:], last, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_features_and_tokens(classifier):
    weights = dict(classifier.model.named_parameters())
    results = []
    for by_hand in (False, True):
        images = random_images(2, 3, 32, 32).requires_grad_()
        if by_hand:
            tokens = tokens_by_hand(classifier.model, classifier.preprocess(images))
            features = tokens[:, 0]
        else:
            features, tokens = classifier.embed_with_tokens(images)
        loss = features.square().sum() + tokens[:, 1:].sin().sum()
        inputs = [images, *weights.values()]
        results.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    assert results[0][0].abs().max() > 0
    reached = {n for n, g in zip(["", *weights], results[0], strict=True) if g is not None}
    assert any(name.endswith(("proj", "visual_projection.weight")) for name in reached)
    for ours, theirs in zip(*results, strict=True):
        if theirs is not None or ours is not None:
            # An element small beside the others of its tensor is the rest of large terms.
            atol = 1e-5 * max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-3)


def test_tokens_are_float32_under_autocast(classifier):
    images = random_images(2, 3, 32, 32).requires_grad_()
    _, whole = classifier.embed_with_tokens(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, tokens = classifier.embed_with_tokens(images)
    assert features.dtype == tokens.dtype == torch.float32
    error = (tokens - whole).abs().max()
    assert 0 < error < 0.1 * whole.abs().max()
    tokens.sum().backward()
    assert images.grad.isfinite().all()


def test_half_precision_open_clip_tokens():
    model = tiny_clip(cast_dtype=torch.float16)
    convert_weights_to_lp(model, torch.float16)
    features, tokens = from_clip(model).embed_with_tokens(random_images(2, 3, 32, 32))
    assert features.dtype == tokens.dtype == torch.float32
    torch.testing.assert_close(tokens[:, 0], features, atol=2e-3, rtol=2e-3)


def hooks(model):
    registries = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_")
    return [
        (name, key, list(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.startswith(registries)
    ]


def test_nothing_of_the_hook_is_left_also_after_an_error(classifier):
    model, images = classifier.model, random_images(2, 3, 32, 32)
    norm = next(m for n, m in model.named_modules() if n.endswith(("ln_post", "post_layernorm")))
    own = norm.register_forward_hook(lambda *_: None)
    before, attributes = hooks(model), [set(vars(module)) for module in model.modules()]
    classifier.embed_with_tokens(images)
    assert hooks(model) == before
    with pytest.raises((RuntimeError, ValueError)):  # the wrong size for the model
        classifier.encode_tokens(images[..., :16])
    assert hooks(model) == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    own.remove()


def test_an_error_after_the_hook_has_run():
    model = tiny_clip()
    classifier = from_clip(model)
    model.visual.ln_post.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        classifier.embed_with_tokens(random_images(1, 3, 32, 32))
    assert not model.visual.transformer._forward_hooks


def test_hooks_of_the_user_are_seen():
    model, images = tiny_clip(), random_images(2, 3, 32, 32)
    classifier = from_clip(model)
    _, plain = classifier.embed_with_tokens(images)
    handle = model.visual.transformer.register_forward_hook(lambda module, args, x: x.flip(1))
    features, tokens = classifier.embed_with_tokens(images)
    torch.testing.assert_close(tokens, plain.flip(1))
    torch.testing.assert_close(tokens[:, 0], features)
    handle.remove()


def test_open_clip_model_that_returns_its_tokens():
    plain, images = from_clip(tiny_clip()), random_images(2, 3, 32, 32)
    classifier = from_clip(tiny_clip(vision={"output_tokens": True}))
    assert torch.equal(classifier(images), plain(images))
    features, tokens = classifier.embed_with_tokens(images)
    torch.testing.assert_close(features, plain.embed(images))
    # theirs are before the projection
    visual = classifier.model.visual
    theirs = visual(classifier.preprocess(images))[1] @ visual.proj
    torch.testing.assert_close(tokens[:, 1:], theirs, atol=1e-6, rtol=1e-6)
    assert torch.equal(copy.deepcopy(classifier)(images), plain(images))


class SequenceFirst(nn.Module):
    """The transformer of older open_clip versions: (1 + N, B, width) in and out."""

    def __init__(self, transformer):
        super().__init__()
        self.resblocks = transformer.resblocks

    def forward(self, x):
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x)
        return x.transpose(0, 1)


def test_open_clip_before_it_put_the_batch_first():
    model, images = tiny_clip(), random_images(17, 3, 32, 32)
    expected, visual = from_clip(model).embed_with_tokens(images), model.visual
    visual.transformer = SequenceFirst(visual.transformer)

    def forward(x):
        x = visual.transformer(visual._embeds(x).transpose(0, 1)).transpose(0, 1)
        return visual.ln_post(x)[:, 0] @ visual.proj

    visual.forward = forward
    actual = from_clip(model).embed_with_tokens(images)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_average_pooling_and_a_grid_that_is_not_square():
    model = tiny_clip(vision={"image_size": (32, 16), "pool_type": "avg"})
    features, tokens = from_clip(disturb(model)).embed_with_tokens(random_images(2, 3, 32, 16))
    assert tokens.shape == (2, 9, 16)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), features, atol=1e-6, rtol=1e-5)


def test_a_tower_without_projection():
    model = tiny_clip()
    model.visual.proj, model.text_projection = None, None
    features, tokens = from_clip(model).embed_with_tokens(random_images(2, 3, 32, 32))
    assert tokens.shape == (2, 17, 64)
    torch.testing.assert_close(tokens[:, 0], features)


def test_a_copy_has_tokens_of_its_own(classifier):
    images = random_images(2, 3, 32, 32)
    reference, (features, tokens) = copy.deepcopy(classifier), classifier.embed_with_tokens(images)
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.mul_(1.2)
    again = reference.embed_with_tokens(images)
    assert torch.equal(again[0], features)
    assert torch.equal(again[1], tokens)
    assert not torch.allclose(classifier.embed_with_tokens(images)[1], tokens, atol=1e-2)


def test_tokens_never_wait_for_the_device(classifier):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a value read here raises
        features, tokens = classifier.embed_with_tokens(
            mode.from_tensor(random_images(2, 3, 40, 36))
        )
    assert tokens.shape == (2, 17, features.shape[1])


def test_an_empty_batch_of_tokens(classifier):
    features, tokens = classifier.embed_with_tokens(random_images(0, 3, 32, 32))
    assert features.shape == (0, tokens.shape[2])
    assert tokens.shape[:2] == (0, 17)


class Student(nn.Module):
    """What a training script hands to DistributedDataParallel."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier.embed_with_tokens(images)


def test_tokens_inside_distributed_data_parallel():
    classifier, images = from_clip(tiny_clip()), random_images(2, 3, 32, 32)
    for parameter in classifier.parameters():
        parameter.requires_grad_(False)
    for parameter in classifier.model.visual.parameters():
        parameter.requires_grad_(True)
    single = copy.deepcopy(classifier)
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        student = nn.parallel.DistributedDataParallel(Student(classifier))
        for _ in range(2):
            sum(output.square().sum() for output in student(images)).backward()
    finally:
        distributed.destroy_process_group()
    sum(output.square().sum() for output in single.embed_with_tokens(images)).backward()
    for ours, theirs in zip(
        classifier.model.visual.parameters(), single.model.visual.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, 2 * theirs.grad, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- models without patch tokens


def linear(encode_tokens=None):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    return ZeroShotClassifier(
        encoder,
        encoder,
        torch.eye(2),
        logit_scale=1.0,
        class_names=["a", "b"],
        image_size=2,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        encode_tokens=encode_tokens,
    )


WITHOUT = r"^model: expected a model with patch tokens in the joint space: a ViT .* got "


def refused(classifier, images=None):
    images = random_images(1, 3, 32, 32) if images is None else images
    with pytest.raises(TypeError, match=WITHOUT) as error:
        classifier.embed_with_tokens(images)
    return str(error.value).partition(" got ")[2]


def test_models_without_tokens_are_refused(clip):
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 32}
    assert refused(from_clip(tiny_clip(vision=resnet))) == "ModifiedResNet"
    assert refused(from_openai(clip, tiny_openai(clip, (1, 1, 1, 1)))) == "ModifiedResNet"
    pooled = tiny_clip(vision={"attentional_pool": True, "attn_pooler_heads": 2})
    assert refused(from_clip(pooled)) == "VisionTransformer with attn_pool"
    siglip = from_hf(tiny_siglip(), siglip_processor())
    assert refused(siglip).startswith("SiglipModel without encode_tokens; for an encoder of your")
    own = refused(linear(), random_images(1, 3, 2, 2))
    assert own.startswith("Sequential without encode_tokens; for an encoder of your own, pass enco")


def test_timm_libraries_are_refused():
    timm = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_pool": "token"}
    assert refused(from_clip(tiny_clip(vision=timm))) == "TimmModel"


def test_active_patch_dropout():
    classifier = from_clip(tiny_clip(vision={"patch_dropout": 0.5}))
    images = random_images(2, 3, 32, 32)
    assert classifier.embed_with_tokens(images)[1].shape == (2, 17, 16)
    classifier.train()
    with pytest.raises(ValueError, match=r"^model: expected 17 tokens, .* got 9; patch dropout is"):
        classifier.embed_with_tokens(images)


def test_a_transformer_that_runs_no_hooks():
    model = tiny_clip()
    classifier = from_clip(model)
    # As a compiled or traced tower: there is a module of this name, and it is not called.
    transformer = copy.deepcopy(model.visual.transformer)
    model.visual._embeds = lambda x, embeds=model.visual._embeds: transformer(embeds(x))
    model.visual.forward = lambda x: (
        model.visual.ln_post(model.visual._embeds(x))[:, 0] @ (model.visual.proj)
    )
    with pytest.raises(TypeError, match=r"^model: expected a vision transformer that runs forward"):
        classifier.embed_with_tokens(random_images(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.ones(2, 2), TypeError, r"^encode_tokens: expected a tuple of features .* float32 t"),
        ((torch.ones(2, 2), [1]), TypeError, r"^encode_tokens: .* \(B, 1 \+ N, D\), got list"),
        ((torch.ones(2, 2), torch.ones(2, 2)), ValueError, r"^encode_tokens: .* shape \(2, 2\)"),
        ((torch.ones(2, 3), torch.ones(2, 5, 3)), ValueError, r"^encode_image: .* 2, got 3; take"),
        ((torch.ones(1, 2), torch.ones(1, 5, 2)), ValueError, r"^encode_image: .* of 2 images, go"),
        ((torch.ones(2, 2), torch.ones(5, 2, 2)), ValueError, r"^encode_tokens: .* features' shap"),
        ((torch.ones(2, 2), torch.ones(2, 5, 3)), ValueError, r"^encode_tokens: .* features' shap"),
    ],
)
def test_outputs_of_encode_tokens(output, error, message):
    with pytest.raises(error, match=message):
        linear(lambda images: output).embed_with_tokens(random_images(2, 3, 2, 2))


def test_encoders_of_your_own():
    features, tokens = random_images(2, 2), random_images(2, 5, 2)
    classifier = linear(lambda images: (features.half(), tokens.half()))
    outputs = classifier.embed_with_tokens(random_images(2, 3, 2, 2))
    assert [output.dtype for output in outputs] == [torch.float32] * 2
    torch.testing.assert_close(outputs[1], tokens, atol=1e-3, rtol=0)
    with pytest.raises(TypeError, match=r"^encode_tokens: expected a bound .* got function"):
        copy.deepcopy(classifier)
    with pytest.raises(TypeError, match=r"^encode_tokens: expected a callable from .*, got int 3"):
        linear(3)


def test_a_module_as_encode_tokens_is_not_registered_twice():
    plain, tower = linear(), nn.Linear(12, 2)
    classifier = linear(tower)
    assert list(classifier.state_dict()) == list(plain.state_dict())
    assert classifier.encode_tokens is tower
