"""Classifiers from OpenAI's clip and from transformers against the libraries' own results."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from test_zero_shot import TEXT, VISION, normalise, random_images
from tiny_models import (
    NAMES,
    PROMPTS,
    clip_processor,
    clip_tokenizer,
    from_hf,
    from_openai,
    siglip_processor,
    siglip_tokenizer,
    tiny_hf_clip,
    tiny_openai,
    tiny_siglip,
)
from torch import nn
from torch.nn import functional as F

from calibclip import ZeroShotClassifier
from calibclip._libraries import OPENAI_STD


def photo(height, width):
    """Return 8-bit pixels, smooth in one half and with hard edges in the other."""
    rng = np.random.default_rng(0)
    pixels = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    pixels[:, width // 2 :] = 255 * rng.integers(0, 2, (height, width - width // 2, 1))
    return pixels


def as_images(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def assert_equal_up_to_rounding(actual, expected, std):
    error = (actual - expected).abs() * 255 * std
    assert error.max() <= 1.5  # Pillow rounds after each of its two passes
    assert error.mean() < 0.33


# ---------------------------------------------------------------- OpenAI's clip


def test_openai_logits_and_gradients_equal_the_librarys_own_path(clip):
    model, tokens = tiny_openai(clip), clip.tokenize(PROMPTS)
    logits, gradients = [], []
    for forward in (from_openai(clip, model), lambda x: model(normalise(x), tokens)[0]):
        images = random_images(3, 3, 32, 32).requires_grad_()
        logits.append(forward(images))
        F.cross_entropy(logits[-1], torch.tensor([0, 2, 1])).backward()
        gradients.append(images.grad)
    assert logits[1].std() > 0.1
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_openai_and_open_clip_agree_on_the_same_weights(clip):
    theirs = tiny_openai(clip)
    # OpenAI's activation and context, of which open_clip has options.
    ours = CLIP(
        16, {**VISION, "head_width": 64}, {**TEXT, "context_length": 77}, quick_gelu=True
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    pair = (
        from_openai(clip, theirs),
        ZeroShotClassifier.from_open_clip(ours, tokenizer, NAMES),
    )
    images = random_images(2, 3, 50, 40)
    torch.testing.assert_close(pair[0](images), pair[1](images), atol=1e-5, rtol=0)
    for a, b in zip(*(c.embed_with_tokens(images) for c in pair), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_half_precision_openai_model(clip):
    model, images = tiny_openai(clip), random_images(3, 3, 32, 32)
    whole = from_openai(clip, model)(images)
    clip.model.convert_weights(model)
    classifier = from_openai(clip, model)
    logits = classifier(images)
    assert classifier.preprocess(images).dtype == torch.float16
    assert classifier.text_features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole, atol=0.05, rtol=0)
    features, tokens = classifier.embed_with_tokens(images)
    assert features.dtype == tokens.dtype == torch.float32
    torch.testing.assert_close(tokens[:, 0], features, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("size", [(64, 48), (48, 97), (11, 20), (32, 57), (35, 32)])
def test_openai_preprocessing_is_the_librarys(clip, size):
    classifier = from_openai(clip, tiny_openai(clip))
    pixels = photo(*size)
    expected = clip.clip._transform(32)(Image.fromarray(pixels))[None]
    std = torch.tensor(OPENAI_STD).view(3, 1, 1)
    assert_equal_up_to_rounding(classifier.preprocess(as_images(pixels)), expected, std)


def test_openai_options_and_errors(clip):
    model = tiny_openai(clip)
    classifier = from_openai(
        clip, model, image_size=(32, 16), resize_mode="squash", clean_class_names=False
    )
    assert (classifier.image_size, classifier.resize_mode) == ((32, 16), "squash")
    assert classifier.logit_bias == 0
    with pytest.raises(TypeError, match=r"^model: expected a model of OpenAI's clip with encode_"):
        from_openai(clip, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^image_size: expected an integer >= 1, got 0"):
        from_openai(clip, model, image_size=0)
    with pytest.raises(TypeError, match=r"^options: expected some of .*, got size$"):
        from_openai(clip, model, size=None)
    del model.visual.input_resolution
    with pytest.raises(TypeError, match=r"^model: .* VisionTransformer without it; .* jit=False"):
        from_openai(clip, model)
    assert from_openai(clip, model, image_size=32).image_size == (32, 32)


# ---------------------------------------------------------------- transformers


def test_clip_logits_equal_transformers_own_path():
    model, processor = tiny_hf_clip(), clip_processor()
    # Padded to the longest prompt and with a mask, as most people call it.
    text = processor(text=PROMPTS, padding=True, return_tensors="pt")
    logits, gradients = [], []
    for forward in (
        from_hf(model, processor),
        lambda x: model(**text, pixel_values=normalise(x)).logits_per_image,
    ):
        images = random_images(3, 3, 32, 32).requires_grad_()
        logits.append(forward(images))
        F.cross_entropy(logits[-1], torch.tensor([0, 2, 1])).backward()
        gradients.append(images.grad)
    assert text["input_ids"].shape[1] < 16
    assert logits[1].std() > 0.1
    assert gradients[1].abs().max() > 1e-2
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-3)


def test_siglip_logits_equal_transformers_own_path():
    model, processor = tiny_siglip(), siglip_processor()
    images = random_images(3, 3, 32, 32)
    text = processor(text=PROMPTS, padding="max_length", max_length=12, return_tensors="pt")
    pixels = normalise(images, (0.5,) * 3, (0.5,) * 3)
    expected = model(**text, pixel_values=pixels).logits_per_image
    classifier = from_hf(model, processor)
    torch.testing.assert_close(classifier(images), expected, atol=1e-5, rtol=0)
    assert classifier.logit_bias == -5
    cosines = classifier.cosines(images)
    assert cosines.abs().max() <= 1
    torch.testing.assert_close((expected + 5) / classifier.logit_scale, cosines)


def test_siglips_last_position_is_padding():
    model, processor = tiny_siglip(), siglip_processor()
    short = model.get_text_features(**processor(text=["cat"], return_tensors="pt")).pooler_output
    row = F.normalize(short, dim=-1)
    one = ZeroShotClassifier.from_transformers(model, processor, ["cat"], ["{}"])
    assert (one.text_features - row).abs().max() > 1e-2  # what full length prevents


@pytest.mark.parametrize("size", [(64, 48), (48, 97), (11, 20), (32, 57), (35, 32)])
@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_preprocessing_is_the_processors(family, resample, size):
    make, model = {
        "clip": (clip_processor, tiny_hf_clip),
        "siglip": (siglip_processor, tiny_siglip),
    }[family]
    processor, pixels = make(resample=resample), photo(*size)
    expected = processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
    classifier = from_hf(model(), processor)
    assert_equal_up_to_rounding(classifier.preprocess(as_images(pixels)), expected, classifier.std)


def test_a_processor_with_statistics_of_its_own_or_none():
    model = tiny_hf_clip()
    own = from_hf(model, clip_processor(image_mean=[0.25] * 3, image_std=[0.5] * 3))
    assert own.mean.flatten().tolist() == [0.25] * 3
    assert own.std.flatten().tolist() == [0.5] * 3
    plain = from_hf(model, clip_processor(do_normalize=False))
    assert plain.mean.flatten().tolist() == [0] * 3
    assert plain.std.flatten().tolist() == [1] * 3


def test_a_tokenizer_alone_gets_the_familys_preprocessing():
    for model, alone, processor in (
        (tiny_hf_clip(), clip_tokenizer(), clip_processor()),
        (tiny_siglip(), siglip_tokenizer(), siglip_processor()),
    ):
        images = random_images(2, 3, 32, 35)  # an odd margin to crop
        assert torch.equal(from_hf(model, alone)(images), from_hf(model, processor)(images))


def test_transformers_before_5_returns_tensors():
    model, images = tiny_hf_clip(), random_images(2, 3, 32, 32)
    expected = from_hf(model, clip_processor())(images)
    for name in ("get_image_features", "get_text_features"):
        method = getattr(model, name)
        setattr(model, name, lambda method=method, **inputs: method(**inputs).pooler_output)
    assert torch.equal(from_hf(model, clip_processor())(images), expected)


def test_long_prompts_are_cut():
    long = ["cat " * 40 + name for name in NAMES]
    assert from_hf(tiny_hf_clip(), clip_processor(), templates=["{}"]).templates == ("{}",)
    classifier = ZeroShotClassifier.from_transformers(tiny_siglip(), siglip_processor(), long)
    assert classifier.text_features.shape == (3, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_center_crop": False}, r"^processor: expected a resize of the shorter side and a cen"),
        ({"do_resize": False}, r"^processor: .* do_resize=False, size=.*; pass image_size= and re"),
        ({"size": {"shortest_edge": 40}}, r"^processor: .* got do_resize=True, size=\{'shortest_e"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, r"^processor: .*'longest_edge': 64"),
        ({"resample": 1}, r"^processor: expected resample 2 \(bilinear\) or 3 .*, got .*; pass in"),
        ({"do_rescale": False}, r"^processor: expected pixels rescaled to \[0, 1\], got do_rescal"),
        ({"rescale_factor": 1 / 127.5}, r"^processor: expected pixels rescaled .* rescale_factor="),
        (
            {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
            r"^processor: expected images of the model's size 32, got 48; take the processor that",
        ),
    ],
)
def test_processors_that_cannot_be_reproduced(options, message):
    with pytest.raises(ValueError, match=message):
        from_hf(tiny_hf_clip(), clip_processor(**options))


def test_options_replace_what_a_processor_cannot_say():
    processor = clip_processor(do_center_crop=False, resample=1)
    classifier = from_hf(
        tiny_hf_clip(),
        processor,
        image_size=32,
        resize_mode="squash",
        interpolation="bilinear",
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    assert classifier(random_images(2, 3, 40, 50)).shape == (2, 3)
    assert (classifier.interpolation, classifier.mean.abs().max()) == ("bilinear", 0)


def test_the_callers_image_size_replaces_that_of_another_models_processor():
    other = clip_processor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    classifier = from_hf(tiny_hf_clip(), other, image_size=40)
    assert classifier.preprocess(random_images(1, 3, 64, 48)).shape == (1, 3, 40, 40)
    assert classifier.resize_mode == "shortest_floor"


def test_transformers_model_errors():
    with pytest.raises(TypeError, match=r"^model: expected a CLIPModel or Sig.* without get_imag"):
        from_hf(nn.Linear(2, 2), clip_processor())
    vision = tiny_hf_clip()
    vision.config.vision_config.image_size = None
    with pytest.raises(TypeError, match=r"^model: .* got CLIPModel without one of them"):
        from_hf(vision, clip_processor())
    with pytest.raises(TypeError, match=r"^processor: expected a processor .* or a tokenizer, got"):
        from_hf(tiny_hf_clip(), None)


@pytest.mark.parametrize("output", ["text", None])
def test_a_tokenizer_of_another_library_is_refused(output):
    """open_clip's takes no padding; another returns no input_ids."""
    model = tiny_hf_clip()
    tokenizer = open_clip.SimpleTokenizer() if output is None else lambda prompts, **options: output
    with pytest.raises(TypeError, match=r"^processor: expected a processor or tokenizer of transf"):
        ZeroShotClassifier.from_transformers(model, tokenizer, ["cat", "dog"])
