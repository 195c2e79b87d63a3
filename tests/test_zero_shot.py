import copy
import functools
import math
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from open_clip.transform import PreprocessCfg, image_transform, image_transform_v2
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from calibclip import ZeroShotClassifier, clean_class_name
from calibclip._libraries import OPENAI_MEAN, OPENAI_STD

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
NAMES = ["Tabby_cat", "golden-retriever", "Sea/lake", "  hot   dog "]
CLEANED = ("tabby cat", "golden retriever", "sea lake", "hot dog")
TEMPLATES = ("a photo of a {}", "itap of the {}.", "{}")
TOKENIZER = open_clip.SimpleTokenizer(context_length=16)


def tiny_clip(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(16, dict(VISION, **options.pop("vision", {})), dict(TEXT), **options)
    return model.eval()


def from_clip(model, class_names=NAMES, **options):
    return ZeroShotClassifier.from_open_clip(model, TOKENIZER, class_names, **options)


def random_images(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normalise(images, mean=OPENAI_MEAN, std=OPENAI_STD):
    mean, std = (torch.tensor(v, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images - mean) / std


def library_logits(model, images, prompts):
    """What a user of open_clip writes by hand."""
    image = model.encode_image(normalise(images), normalize=True)
    text = model.encode_text(TOKENIZER(prompts), normalize=True)
    return model.logit_scale.exp() * image @ text.T


def linear_classifier(**changes):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    options = {
        "model": encoder,
        "encode_image": encoder.forward,
        "text_features": torch.eye(2),
        "logit_scale": 10.0,
        "class_names": ["a", "b"],
        "image_size": 2,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    return ZeroShotClassifier(**{**options, **changes})


# ---------------------------------------------------------------- agreement with open_clip


def test_logits_equal_the_librarys_own_path():
    model, images = tiny_clip(), random_images(3, 3, 32, 32)
    classifier = from_clip(model)
    prompts = [f"This is a photo of a {name}" for name in CLEANED]
    logits = classifier(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, library_logits(model, images, prompts), atol=1e-5, rtol=0)
    torch.testing.assert_close(classifier.logit_scale * classifier.cosines(images), logits)
    assert classifier.logit_scale == pytest.approx(1 / 0.07)


def test_a_logit_bias_is_read_and_added():
    model, images = tiny_clip(init_logit_bias=-10.0), random_images(3, 3, 32, 32)
    classifier = from_clip(model)
    text = TOKENIZER([f"This is a photo of a {name}" for name in CLEANED])
    expected, _ = model.get_logits(normalise(images), text)
    torch.testing.assert_close(classifier(images), expected, atol=1e-5, rtol=0)
    assert classifier.logit_bias == -10.0
    cosines = classifier.cosines(images)
    torch.testing.assert_close(cosines, (expected + 10) / classifier.logit_scale)
    plain = from_clip(tiny_clip())
    assert plain.logit_bias == 0.0
    torch.testing.assert_close(classifier(images).softmax(1), plain(images).softmax(1))
    classifier.logit_bias = 0
    assert torch.equal(classifier(images), plain(images))


def test_image_gradient_equals_the_librarys_own_path():
    model = tiny_clip()
    prompts = [f"This is a photo of a {name}" for name in CLEANED]
    target = torch.tensor([0, 3])
    gradients = []
    for forward in (from_clip(model), lambda x: library_logits(model, x, prompts)):
        images = random_images(2, 3, 32, 32).requires_grad_()
        F.cross_entropy(forward(images), target).backward()
        gradients.append(images.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_ensemble_is_the_normalised_mean_of_normalised_prompt_features():
    model = tiny_clip()
    # Prompt features of unequal length, or the inner normalisation would not matter.
    model.ln_final.bias.data += random_images(64)
    rows = []
    for name in CLEANED:
        encoded = [model.encode_text(TOKENIZER([t.format(name)]))[0] for t in TEMPLATES]
        mean = sum(f / f.norm() for f in encoded) / len(encoded)
        rows.append(mean / mean.norm())
    classifier = from_clip(model, templates=TEMPLATES)
    torch.testing.assert_close(classifier.text_features, torch.stack(rows), atol=1e-5, rtol=0)


def test_batches_of_prompts_do_not_change_the_features(monkeypatch):
    model = tiny_clip()
    whole = from_clip(model, templates=TEMPLATES).text_features
    calls = []
    model.token_embedding.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    monkeypatch.setattr("calibclip._prompts.PROMPTS_PER_BATCH", 7)
    split = from_clip(model, templates=TEMPLATES).text_features
    assert calls == [6, 6]  # two whole classes of three prompts each
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=0)


def test_text_is_encoded_once_and_never_in_forward():
    model, calls = tiny_clip(), []
    model.transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    classifier = from_clip(model)
    assert calls == [False]
    images = random_images(2, 3, 32, 32).requires_grad_()
    classifier(images).sum().backward()
    assert calls == [False]


@pytest.mark.parametrize(
    ("size", "target", "resize_mode"),
    [
        ((64, 48), (32, 32), "shortest"),
        ((48, 97), (32, 32), "shortest"),  # the longer side is not a whole number
        ((11, 20), (32, 32), "shortest"),  # enlarged
        ((32, 57), (32, 32), "shortest"),  # cropped only
        ((35, 32), (32, 32), "shortest"),  # by an odd number
        ((60, 40), (24, 40), "shortest"),  # target not square
        ((33, 50), (32, 32), "squash"),
        ((20, 70), (24, 40), "squash"),
    ],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_reproduces_open_clips_transform(size, target, resize_mode, interpolation):
    if interpolation == "bilinear" and target == (24, 40) and resize_mode == "shortest":
        pytest.skip("open_clip ignores the interpolation for a target that is not square")
    rng = np.random.default_rng(0)
    # Smooth in one half, hard edges in the other: these make bicubic overshoot.
    pixels = np.linspace(0, 255, size[0] * size[1] * 3).reshape(*size, 3).astype(np.uint8)
    pixels[:, size[1] // 2 :] = 255 * rng.integers(0, 2, (size[0], size[1] - size[1] // 2, 1))
    expected = image_transform(
        target, False, (0.0,) * 3, (1.0,) * 3, resize_mode=resize_mode, interpolation=interpolation
    )(Image.fromarray(pixels))

    classifier = linear_classifier(
        image_size=target,
        interpolation=interpolation,
        resize_mode=resize_mode,
    )
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    error = (classifier.preprocess(images)[0] - expected).abs() * 255
    assert error.max() <= 1.5  # Pillow rounds after each of its two passes
    assert error.mean() < 0.33


def test_preprocessing_is_read_from_the_model():
    model = tiny_clip()
    config = {
        "size": (32, 32),
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    open_clip.set_model_preprocess_cfg(model, config)
    classifier = from_clip(model)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(Image.fromarray(pixels))
    actual = classifier.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
    torch.testing.assert_close(actual, expected, atol=2 / 255 / 0.5, rtol=0)
    changed = from_clip(
        model,
        image_size=(32, 16),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bicubic",
        resize_mode="shortest",
    )
    settings = (changed.image_size, changed.interpolation, changed.resize_mode)
    assert settings == ((32, 16), "bicubic", "shortest")
    assert torch.equal(changed.preprocess(torch.ones(1, 3, 32, 16)), torch.ones(1, 3, 32, 16))


def test_random_interpolation_is_bicubic_in_evaluation():
    model = tiny_clip()
    model.visual.preprocess_cfg = {"size": 32, "interpolation": "random"}
    classifier = from_clip(model)
    assert classifier.interpolation == "bicubic"
    assert classifier.image_size == (32, 32)


def test_recorded_statistics_come_before_the_older_attributes_and_these_before_openais():
    model = tiny_clip()
    assert from_clip(model).std.flatten().tolist() == pytest.approx(OPENAI_STD)
    model.visual.image_mean, model.visual.image_std = (0.25, 0.25, 0.25), (0.5, 0.5, 0.5)
    older = from_clip(model)
    assert older.mean.flatten().tolist() == [0.25] * 3
    assert older.std.flatten().tolist() == [0.5] * 3
    model.visual.preprocess_cfg = {"size": 32, "mean": [0.125] * 3, "std": [0.75] * 3}
    recorded = from_clip(model)
    assert recorded.mean.flatten().tolist() == [0.125] * 3
    assert recorded.std.flatten().tolist() == [0.75] * 3


# ---------------------------------------------------------------- images


def test_image_of_the_models_size_is_only_normalised():
    images = random_images(2, 3, 32, 32) * 1.2 - 0.1  # clamping would show
    assert torch.equal(from_clip(tiny_clip()).preprocess(images), normalise(images))


def test_resized_images_stay_in_range():
    images = random_images(2, 3, 9, 9).round()
    resized = linear_classifier(image_size=32).preprocess(images)
    assert resized.min() == 0
    assert resized.max() == 1


def test_gradient_passes_through_the_resize():
    images = random_images(2, 3, 20, 28).requires_grad_()
    from_clip(tiny_clip())(images).square().sum().backward()
    assert images.grad.shape == images.shape
    assert images.grad.isfinite().all()
    used = (images.grad != 0).any(dim=1)  # 20 x 28 -> 32 x 44, of which the middle 32 columns stay
    assert used[:, :, 4:-4].all()
    assert not used[:, :, [0, -1]].any()


def test_the_resize_is_differentiated_exactly():
    classifier = linear_classifier(image_size=4).double()
    images = 0.4 + 0.2 * random_images(1, 3, 6, 5, dtype=torch.float64)
    torch.autograd.gradcheck(classifier.preprocess, images.requires_grad_())


def test_images_are_not_changed_and_batch_elements_are_independent():
    classifier, images = from_clip(tiny_clip()), random_images(3, 3, 40, 36)
    before = images.clone()
    logits = classifier(images)
    assert torch.equal(images, before)
    singly = torch.cat([classifier(image[None]) for image in images])
    torch.testing.assert_close(singly, logits, atol=1e-5, rtol=0)
    assert linear_classifier()(images[:0]).shape == (0, 2)


def test_image_size_none_leaves_the_size():
    assert linear_classifier(image_size=None).preprocess(torch.zeros(1, 3, 5, 7)).shape[-2:] == (
        5,
        7,
    )


def test_forward_never_waits_for_the_device():
    classifier = from_clip(tiny_clip())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a value read here raises
        images = mode.from_tensor(random_images(2, 3, 40, 36))
        assert classifier(images).shape == (2, 4)


# ---------------------------------------------------------------- encoders of one's own


def from_encoders(model, **options):
    return ZeroShotClassifier.from_encoders(
        model, model.encode_image, model.encode_text, TOKENIZER, NAMES, TEMPLATES, **options
    )


def test_any_pair_of_encoders():
    model, images = tiny_clip(), random_images(2, 3, 40, 32)
    expected = from_clip(model, templates=TEMPLATES)
    statistics = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
    classifier = from_encoders(model, logit_scale=expected.logit_scale, image_size=32, **statistics)
    assert torch.equal(classifier(images), expected(images))
    assert classifier.prompts == expected.prompts
    assert torch.equal(copy.deepcopy(classifier)(images), expected(images))
    biased = from_encoders(
        model,
        logit_scale=1.0,
        logit_bias=-3.0,
        encode_tokens=lambda x: (model.encode_image(x), torch.ones(len(x), 5, 16)),
        **statistics,
    )
    assert biased.image_size is None
    features, tokens = biased.embed_with_tokens(images[:, :, :32])
    assert tokens.shape == (2, 5, 16)
    cosines = expected.cosines(images[:, :, :32])
    torch.testing.assert_close(biased.classify(features), cosines - 3)
    with pytest.raises(TypeError, match=r"^mean: expected three numbers"):
        from_encoders(model, logit_scale=1.0)


# ---------------------------------------------------------------- features


def test_one_pass_serves_features_and_logits():
    model, images = tiny_clip(), random_images(3, 3, 40, 32)
    classifier = from_clip(model)
    features = classifier.embed(images)
    assert torch.equal(features, model.encode_image(classifier.preprocess(images)))
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3  # as the encoder gives them
    assert torch.equal(classifier.classify(features), classifier(images))
    assert torch.equal(F.normalize(features, dim=-1), classifier.features(images))
    # Only the direction counts, and classify takes what came from elsewhere.
    torch.testing.assert_close(classifier.classify(7 * features), classifier(images))
    assert classifier.classify(features.half()).dtype == torch.float32
    assert classifier.classify(features.double()).dtype == torch.float64


def test_huge_half_precision_features_do_not_overflow():
    classifier = linear_classifier(encode_image=lambda x: (60000 * x[:, :2, 0, 0] + 1).half())
    images = random_images(4, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.float16):
        assert classifier.embed(images).dtype == torch.float32
        logits = classifier(images)
    assert logits.isfinite().all()
    assert logits.dtype == torch.float32
    expected = 10 * F.normalize(60000 * images[:, :2, 0, 0] + 1, dim=-1)
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=0)


def test_embed_takes_an_empty_batch():
    assert from_clip(tiny_clip()).embed(random_images(0, 3, 8, 8)).shape == (0, 16)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, r"^features: expected a floating-point tensor .*, got list"),
        (torch.ones(2, 2).int(), TypeError, r"^features: .*, got int32 .*; call features.float"),
        (torch.ones(2), ValueError, r"^features: expected .* shape \(B, D\), got .* \(2,\)"),
        (torch.ones(4, 3), ValueError, r"^features: .* dimension 2, got float32 .* \(4, 3\)"),
        (torch.ones(1, 2).to("meta"), ValueError, r"^features: expected the device of text_feat"),
    ],
)
def test_classify_errors(features, error, message):
    with pytest.raises(error, match=message):
        linear_classifier().classify(features)


# ---------------------------------------------------------------- precision


def test_cosines_are_float32_under_autocast():
    model = tiny_clip()
    classifier, images = from_clip(model), random_images(4, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encode_image(normalise(images))
        cosines = classifier.cosines(images)
        naive = F.normalize(features, dim=-1) @ classifier.text_features.T
        built_inside = from_clip(model)
    assert features.dtype == naive.dtype == torch.bfloat16
    assert cosines.dtype == torch.float32
    expected = F.normalize(features.float(), dim=-1) @ classifier.text_features.T
    assert torch.equal(cosines, expected)
    assert (naive.float() - expected).abs().max() > 1e-4
    assert torch.equal(built_inside.text_features, classifier.text_features)


def lower_all(model, dtype):
    return model.to(dtype)


def lower_layers(model, dtype):
    # open_clip's mixed precision, create_model(precision="fp16"): norms and embeddings stay float32
    convert_weights_to_lp(model, dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lower", [lower_all, lower_layers])
def test_low_precision_model(dtype, lower):
    model = lower(tiny_clip(cast_dtype=dtype if lower is lower_layers else None), dtype)
    classifier, images = from_clip(model), random_images(3, 3, 40, 40).requires_grad_()
    assert classifier.text_features.dtype == torch.float32
    assert classifier.preprocess(images).dtype == dtype
    cosines = classifier.cosines(images)
    assert cosines.dtype == torch.float32
    features = model.encode_image(classifier.preprocess(images))
    assert features.dtype == dtype
    expected = F.normalize(features.float(), dim=-1) @ classifier.text_features.T
    torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)
    cosines.sum().backward()
    assert images.grad.dtype == torch.float32
    assert classifier(images.detach().to(dtype)).dtype == torch.float32


def test_lowering_the_classifier_keeps_its_own_buffers_exact():
    classifier = from_clip(tiny_clip())
    text_features = classifier.text_features
    assert classifier.half() is classifier
    assert classifier.model.visual.conv1.weight.dtype == torch.float16
    assert torch.equal(classifier.text_features, text_features)
    assert torch.equal(classifier.mean.flatten(), torch.tensor(OPENAI_MEAN))
    assert classifier(random_images(2, 3, 32, 32)).dtype == torch.float32


def test_float64_model_stays_float64():
    model, images = tiny_clip().double(), random_images(2, 3, 32, 32, dtype=torch.float64)
    logits = from_clip(model)(images)
    assert logits.dtype == torch.float64
    prompts = [f"This is a photo of a {name}" for name in CLEANED]
    torch.testing.assert_close(logits, library_logits(model, images, prompts), atol=1e-12, rtol=0)
    assert from_clip(tiny_clip()).double()(images).dtype == torch.float64


# ---------------------------------------------------------------- behaviour as a module


def test_model_is_registered_and_buffers_stay_out_of_the_checkpoint():
    model = tiny_clip()
    for classifier in (
        from_clip(model),
        ZeroShotClassifier(  # a module as encode_image must not be registered a second time
            model,
            model.visual,
            torch.eye(2, 16),
            logit_scale=1.0,
            class_names="a b".split(),
            image_size=32,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
        ),
    ):
        assert list(classifier.state_dict()) == [f"model.{name}" for name in model.state_dict()]
        assert {id(p) for p in classifier.parameters()} == {id(p) for p in model.parameters()}
        assert classifier.train().model.visual.training
        assert not classifier.eval().model.visual.training


@pytest.mark.parametrize("training", [True, False])
def test_construction_leaves_the_model_as_it_was(training):
    model = tiny_clip().train(training)
    model.visual.train(not training)
    model.ln_final.weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    needs_grad = [p.requires_grad for p in model.parameters()]
    modes = []
    model.transformer.register_forward_hook(lambda module, *_: modes.append(module.training))
    classifier = from_clip(model)
    assert modes == [False]
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needs_grad
    assert all(p.grad is None for p in model.parameters())
    assert classifier.training is training


def test_training_flags_come_back_after_an_error():
    model = tiny_clip().train()
    with pytest.raises(TypeError, match="tokenizer"):
        ZeroShotClassifier.from_open_clip(model, lambda prompts: None, ["cat"])
    assert all(module.training for module in model.modules())


def test_deepcopy_is_an_independent_reference():
    classifier, images = from_clip(tiny_clip()), random_images(2, 3, 32, 32)
    classifier.itself = [classifier]  # as a hook or a training loop may hold it
    reference = copy.deepcopy(classifier)
    before = classifier(images)
    assert reference.itself == [reference]
    assert reference.encode_image.__self__ is reference.model
    assert reference.prompts == classifier.prompts
    with torch.no_grad():
        for p in classifier.model.visual.parameters():
            p += 0.1
        classifier.text_features.mul_(-1)
    assert torch.equal(reference(images), before)
    assert not torch.allclose(classifier(images), before, atol=1e-2)


@pytest.mark.parametrize("kind", ["module", "partial"])
def test_deepcopy_of_other_callables(kind):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    call = encoder if kind == "module" else functools.partial(nn.Sequential.forward, encoder)
    classifier = linear_classifier(model=encoder, encode_image=call)
    images = random_images(2, 3, 2, 2)
    reference, before = copy.deepcopy(classifier), classifier(images)
    encoder[1].weight.data.neg_()
    assert torch.equal(reference(images), before)
    assert not torch.equal(classifier(images), before)


def test_deepcopy_refuses_a_function_that_would_share_weights():
    encoder = nn.Linear(12, 2)
    classifier = linear_classifier(model=encoder, encode_image=lambda x: encoder(x.flatten(1)))
    assert classifier(torch.zeros(1, 3, 2, 2)).shape == (1, 2)
    with pytest.raises(TypeError, match=r"^encode_image: expected a bound method, .* got function"):
        copy.deepcopy(classifier)


def test_built_in_inference_mode_still_differentiates():
    model = tiny_clip()
    with torch.inference_mode():
        classifier = from_clip(model)
    images = random_images(1, 3, 32, 32).requires_grad_()
    classifier(images).sum().backward()
    assert images.grad.abs().max() > 0


def test_features_are_unit_length_and_text_features_carry_no_graph():
    text = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    classifier = linear_classifier(text_features=text)
    assert not classifier.text_features.requires_grad
    torch.testing.assert_close(classifier.text_features, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    torch.testing.assert_close(
        classifier.features(random_images(5, 3, 2, 2)).norm(dim=1), torch.ones(5)
    )


def test_names_prompts_and_repr():
    model = tiny_clip()
    model.logit_scale.data.fill_(math.log(100))
    one, many = from_clip(model), from_clip(model, templates=list(TEMPLATES))
    assert one.class_names == CLEANED
    assert one.prompts[1] == ("This is a photo of a golden retriever",)
    assert many.prompts[3] == ("a photo of a hot dog", "itap of the hot dog.", "hot dog")
    assert one.extra_repr() == "4 classes, 1 template, logit_scale=100.0, image_size=(32, 32)"
    assert many.extra_repr().startswith("4 classes, 3 templates, ")
    assert linear_classifier(text_features=torch.eye(1, 2), class_names=["a"]).extra_repr() == (
        "1 class, logit_scale=10.0, image_size=(2, 2)"
    )
    assert from_clip(model, NAMES, clean_class_names=False).class_names == tuple(NAMES)


def test_braces_in_names_and_templates_are_ordinary_characters():
    classifier = from_clip(tiny_clip(), ["{0}", "{}"], templates=["{a} {}"])
    assert classifier.prompts == (("{a} {0}",), ("{a} {}",))


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [("Egyptian_Cat", "egyptian cat"), ("a--b/ c\t", "a b c"), ("Müller", "müller"), ("_", "")],
)
def test_clean_class_name(name, cleaned):
    assert clean_class_name(name) == cleaned


def test_imagenet_names_need_allow_duplicates():
    names = open_clip.IMAGENET_CLASSNAMES
    with pytest.raises(ValueError, match="'missile', 'sunglasses' more than once"):
        from_clip(tiny_clip(), names)
    pair = [name for name in names if name == "missile"]
    classifier = from_clip(tiny_clip(), pair, allow_duplicates=True)
    assert classifier.class_names == ("missile", "missile")


def test_import_does_not_load_open_clip():
    code = "import calibclip.zero_shot, sys; sys.exit('open_clip' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": torch.relu}, TypeError, r"^model: expected a torch.nn.Module, got builtin_func"),
        ({"encode_image": None}, TypeError, r"^encode_image: expected a callable .*, got NoneType"),
        ({"logit_scale": -1.0}, ValueError, r"^logit_scale: expected a number > 0, got -1"),
        ({"logit_bias": "0"}, TypeError, r"^logit_bias: expected a number, got str"),
        ({"logit_bias": math.nan}, ValueError, r"^logit_bias: expected a number, got nan"),
        ({"encode_tokens": 3}, TypeError, r"^encode_tokens: expected a callable .*, got int 3"),
        ({"logit_scale": torch.ones(())}, TypeError, r"^logit_scale: .* pass float\(logit_scale\)"),
        ({"interpolation": "area"}, ValueError, r"^interpolation: expected one of 'bicubic', 'bil"),
        ({"resize_mode": "longest"}, ValueError, r"^resize_mode: .* 'squash', got 'longest'"),
        ({"class_names": []}, ValueError, r"^class_names: expected a non-empty .* got an empty"),
        ({"class_names": ["a"]}, ValueError, r"^text_features: .* each of 1 class names, got flo"),
        ({"text_features": [[1.0]]}, TypeError, r"^text_features: .* shape \(K, D\), got list"),
        ({"text_features": torch.ones(2)}, ValueError, r"^text_features: .*got .* shape \(2,\)"),
        ({"text_features": torch.zeros(2, 2)}, ValueError, r"^text_features: .* length > 0, got a"),
        ({"text_features": torch.full((2, 2), torch.inf)}, ValueError, "zero or not finite; check"),
        ({"image_size": 0}, ValueError, r"^image_size: expected an integer >= 1, got 0"),
        ({"image_size": (2, 2.0)}, TypeError, r"^image_size: expected an integer >= 1, got float"),
        ({"image_size": (3, 2, 2)}, ValueError, r"^image_size: expected \(height, width\) or one"),
        (
            {"mean": (0.5, 0.5)},
            ValueError,
            r"^mean: expected .* three numbers, one a channel, got tu",
        ),
        ({"mean": 0.5}, TypeError, r"^mean: expected a tuple or list of three .*, got float 0.5"),
        ({"templates": ["photo"]}, ValueError, r"^templates: expected exactly one \{\} in each"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, r"^std: expected a number > 0, got 0"),
    ],
)
def test_constructor_errors(changes, error, message):
    with pytest.raises(error, match=message):
        linear_classifier(**changes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_names": ()}, ValueError, r"^class_names: expected a non-empty list or tuple of"),
        ({"class_names": "cat"}, TypeError, r"^class_names: .* got str 'cat'; write \['cat'\]"),
        ({"class_names": {"cat": 0}}, TypeError, r"^class_names: .*, got dict"),
        ({"class_names": ["cat", 3]}, TypeError, r"^class_names: .*, got int 3 in it"),
        ({"class_names": ["cat", "_-"]}, ValueError, r"^class_names: .*, got an empty name"),
        (
            {"class_names": ["Cat", "cat", "d_g", "d-g", "x"]},
            ValueError,
            r"^class_names: expected distinct names after cleaning, got 'cat', 'd g' more than once"
            r"; tell the classes apart",
        ),
        (
            {"class_names": [str(i // 2) for i in range(24)]},
            ValueError,
            r"'9' and 2 others more than once",
        ),
        ({"templates": ()}, ValueError, r"^templates: expected a non-empty list .* an empty one"),
        ({"templates": "a {}"}, TypeError, r"^templates: .* got str 'a \{\}'; write \['a \{\}'\]"),
        ({"templates": ["a photo"]}, ValueError, r"^templates: expected exactly one \{\} in each "),
        ({"templates": ["{} {}"]}, ValueError, r"^templates: .* got '\{\} \{\}'"),
        ({"image_size": 0}, ValueError, r"^image_size: expected an integer >= 1, got 0"),
    ],
)
def test_from_open_clip_errors(options, error, message):
    with pytest.raises(error, match=message):
        from_clip(tiny_clip(), **options)


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (lambda p: {"input_ids": 0}, TypeError, r"^tokenizer: .* got dict; wrap the tokenizer so"),
        (lambda p: torch.zeros(len(p), 16), TypeError, r"^tokenizer: expected an integer tensor "),
        (lambda p: TOKENIZER(p)[0], ValueError, r"shape \(2, L\) from 2 .*, got int64 .* \(16,\)"),
        (lambda p: TOKENIZER(p[:1]), ValueError, r"^tokenizer: .* got int64 .* shape \(1, 16\)"),
    ],
)
def test_tokenizer_errors(tokenizer, error, message):
    with pytest.raises(error, match=message):
        ZeroShotClassifier.from_open_clip(tiny_clip(), tokenizer, ["cat", "dog"])


def test_model_errors():
    with pytest.raises(TypeError, match=r"^model: expected an open_clip .*, got Linear without en"):
        from_clip(nn.Linear(2, 2))
    model = tiny_clip()
    del model.visual.image_size
    with pytest.raises(TypeError, match=r"^model: .* got VisionTransformer without one; pass ima"):
        from_clip(model)
    assert from_clip(model, image_size=32).image_size == (32, 32)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([0.5], TypeError, r"^images: expected a floating-point tensor .*, got list"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), TypeError, r"pass images.float\(\) / 255$"),
        (torch.zeros(3, 2, 2), ValueError, r"^images: .* \(B, 3, H, W\) .* shape \(3, 2, 2\)"),
        (torch.zeros(1, 1, 2, 2), ValueError, r"^images: .* got .* shape \(1, 1, 2, 2\)"),
        (torch.zeros(1, 3, 2, 2, device="meta"), ValueError, r"^images: .* cpu, got one on meta"),
    ],
)
def test_image_errors(images, error, message):
    with pytest.raises(error, match=message):
        linear_classifier()(images)


def test_feature_errors():
    images = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"^encode_image: .* dimension 5, got 2; take both"):
        linear_classifier(text_features=torch.eye(2, 5))(images)
    with pytest.raises(TypeError, match=r"^encode_image: .* shape \(N, D\), got tuple"):
        linear_classifier(encode_image=lambda x: (x, x))(images)
    with pytest.raises(ValueError, match=r"^encode_image: .* shape \(N, D\), got .* \(1, 2, 2\)"):
        linear_classifier(encode_image=lambda x: x[:, 0])(images)
    with pytest.raises(ValueError, match=r"^encode_image: expected one row for each of 1 images"):
        linear_classifier(encode_image=lambda x: torch.ones(3, 2))(images)
    model = tiny_clip()
    model.encode_text = lambda tokens: (tokens, tokens)
    with pytest.raises(TypeError, match=r"^encode_text: .* shape \(N, D\), got tuple"):
        from_clip(model)


def test_an_empty_batch():
    classifier = from_clip(tiny_clip())
    assert classifier(torch.rand(0, 3, 32, 32)).shape == (0, len(classifier.class_names))


@pytest.mark.parametrize("images", [255 * torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32)])
def test_images_outside_the_range(images):
    with pytest.raises(ValueError, match=r"^images: expected values in \[0, 1\], got values in \["):
        from_clip(tiny_clip())(images)


def test_logit_scale_is_a_checked_float():
    classifier = from_clip(tiny_clip())
    classifier.logit_scale = 50
    assert classifier.logit_scale == 50.0
    with pytest.raises(TypeError, match=r"^logit_scale: .*; pass float\(logit_scale\)$"):
        classifier.logit_scale = torch.tensor(50.0)


def test_a_class_name_is_a_string():
    with pytest.raises(TypeError, match=r"^name: expected a string, got int 3$"):
        clean_class_name(3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, TypeError, r"^model: expected a torch\.nn\.Module, got NoneType"),
        ({"model": nn.Flatten()}, ValueError, r"^model: .* parameters, got Flatten without any"),
        ({"encode_text": None}, TypeError, r"^encode_text: expected a callable, got NoneType"),
        ({"tokenizer": "clip"}, TypeError, r"^tokenizer: expected a callable, got str 'clip'"),
        ({"std": None}, TypeError, r"^std: expected three numbers, one a channel, got none"),
        (
            {"encode_text": lambda tokens: torch.ones(2 * len(tokens), 2)},
            ValueError,
            r"^encode_text: expected features of shape \(2, D\) from 2 prompts, got .* \(4, 2\)$",
        ),
        ({"crop": True}, TypeError, r"^options: expected some of clean_class_names, .*, got crop$"),
    ],
)
def test_mistakes_with_encoders(changes, error, message):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    options = {
        "model": encoder,
        "encode_image": encoder,
        "encode_text": lambda tokens: torch.ones(len(tokens), 2),
        "tokenizer": lambda prompts: torch.ones(len(prompts), 1, dtype=torch.int64),
        "class_names": ["a", "b"],
        "logit_scale": 1.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    with pytest.raises(error, match=message):
        ZeroShotClassifier.from_encoders(**{**options, **changes})
