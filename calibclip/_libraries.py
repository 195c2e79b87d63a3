"""What each CLIP library calls its parts, and how projected patch tokens are read off its ViT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from calibclip._checks import wrong

# What open_clip assumes for a model that carries no statistics of its own.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

OPENAI_PREPROCESSING = {
    "mean": OPENAI_MEAN,
    "std": OPENAI_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
# transformers rounds the offset of its centre crop down, torchvision to the nearest integer.
CLIP_PREPROCESSING = {**OPENAI_PREPROCESSING, "resize_mode": "shortest_floor"}
SIGLIP_PREPROCESSING = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}

# Pillow's numbers of its filters, which transformers records.
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}

WITH_TOKENS = (
    "a model with patch tokens in the joint space: a ViT with a class token of open_clip (without "
    "attentional pooling) or OpenAI's clip, or a CLIPModel of transformers"
)


class Options(TypedDict, total=False):
    """Keyword options of all constructors that encode class prompts, as from_open_clip has them."""

    clean_class_names: bool
    allow_duplicates: bool
    image_size: int | Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    interpolation: str | None
    resize_mode: str | None


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing settings that are not None, and refuse what is no option."""
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(wrong("options", f"some of {', '.join(known)}", name))
    return {name: value for name, value in options.items() if value is not None}


class Parts(NamedTuple):
    """What a classifier takes from a model; the callables can be copied together with it."""

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    logit_scale: float
    logit_bias: float
    preprocessing: dict[str, Any]
    encode_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None


def open_clip_parts(model: Any, tokenizer: Any, given: Mapping[str, Any]) -> Parts:
    """Take an open_clip model apart; ``given`` are the preprocessing settings of the caller."""
    _check_interface(
        model, "an open_clip model", "encode_image", "encode_text", "logit_scale", "visual"
    )
    visual = model.visual
    recorded = getattr(visual, "preprocess_cfg", None) or {}
    preprocessing = {
        "image_size": recorded.get("size") or getattr(visual, "image_size", None),
        "mean": recorded.get("mean") or getattr(visual, "image_mean", None) or OPENAI_MEAN,
        "std": recorded.get("std") or getattr(visual, "image_std", None) or OPENAI_STD,
        # "random" is a training augmentation; open_clip evaluates such a model with bicubic.
        "interpolation": recorded.get("interpolation", "bicubic").replace("random", "bicubic"),
        "resize_mode": recorded.get("resize_mode", "shortest"),
        **given,
    }
    if preprocessing["image_size"] is None:
        raise TypeError(
            wrong(
                "model",
                "an open_clip model, whose visual tower records its image_size",
                f"{type(visual).__name__} without one",
                "pass image_size=224, or what the model takes",
            )
        )
    # A model made with output_tokens=True returns them beside the features.
    returns_tokens = getattr(visual, "output_tokens", False)
    bias = getattr(model, "logit_bias", None)
    return Parts(
        encode_image=partial(_pooled, model) if returns_tokens else model.encode_image,
        encode_text=model.encode_text,
        tokenizer=tokenizer,
        logit_scale=math.exp(model.logit_scale.item()),
        logit_bias=0.0 if bias is None else bias.item(),
        preprocessing=preprocessing,
        encode_tokens=partial(vit_tokens, model),
    )


def openai_parts(model: Any, tokenizer: Any, given: Mapping[str, Any]) -> Parts:
    """Take a model of OpenAI's ``clip`` apart."""
    _check_interface(
        model, "a model of OpenAI's clip", "encode_image", "encode_text", "logit_scale", "visual"
    )
    size = given.get("image_size", getattr(model.visual, "input_resolution", None))
    if size is None:
        raise TypeError(
            wrong(
                "model",
                "a model of OpenAI's clip, whose visual tower has input_resolution",
                f"{type(model.visual).__name__} without it",
                "load it with jit=False, or pass image_size=224, or what the model takes",
            )
        )
    return Parts(
        encode_image=model.encode_image,
        encode_text=model.encode_text,
        tokenizer=tokenizer,
        logit_scale=math.exp(model.logit_scale.item()),
        logit_bias=0.0,
        preprocessing={**OPENAI_PREPROCESSING, **given, "image_size": size},
        encode_tokens=partial(vit_tokens, model),
    )


def transformers_parts(model: Any, processor: Any, given: Mapping[str, Any]) -> Parts:
    """Take a CLIPModel or SiglipModel of transformers apart."""
    kind = "a CLIPModel or SiglipModel of transformers"
    _check_interface(
        model, kind, "get_image_features", "get_text_features", "logit_scale", "config"
    )
    model_size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    length = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
    if model_size is None or length is None:
        raise TypeError(
            wrong(
                "model",
                f"{kind}, whose config has vision_config.image_size and "
                "text_config.max_position_embeddings",
                f"{type(model).__name__} without one of them",
            )
        )
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is not None:
        preprocessing = {**_processor_settings(image_processor, given), **given}
    elif getattr(model.config, "model_type", "").startswith("siglip"):
        preprocessing = {**SIGLIP_PREPROCESSING, "image_size": model_size, **given}
    else:
        preprocessing = {**CLIP_PREPROCESSING, "image_size": model_size, **given}
    size = preprocessing["image_size"]
    if "image_size" not in given and size not in (model_size, (model_size, model_size)):
        remedy = "take the processor that belongs to the model"
        raise ValueError(
            wrong("processor", f"images of the model's size {model_size}", size, remedy)
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer):
        expected = "a processor of transformers, or a tokenizer"
        raise TypeError(wrong("processor", expected, type(processor).__name__))
    bias = getattr(model, "logit_bias", None)
    return Parts(
        encode_image=partial(_transformers_image, model),
        encode_text=partial(_transformers_text, model),
        tokenizer=partial(_transformers_tokens, tokenizer, length),
        logit_scale=math.exp(model.logit_scale.item()),
        logit_bias=0.0 if bias is None else bias.item(),
        preprocessing=preprocessing,
        # SigLIP pools by attention: its patches and its features are not in one space.
        encode_tokens=(
            partial(transformers_tokens, model) if hasattr(model, "visual_projection") else None
        ),
    )


def _check_interface(model: object, kind: str, *names: str) -> None:
    for name in names:
        if not hasattr(model, name):
            expected = f"{kind} with {', '.join(names[:-1])} and {names[-1]}"
            raise TypeError(wrong("model", expected, f"{type(model).__name__} without {name}"))


# Patch tokens


def vit_tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and projected tokens of an open_clip or OpenAI ViT from one forward pass.

    The output of the transformer is picked up on its way, by a hook that is there for this one
    pass; the model then does with the class token what is done here with all.
    """
    visual = model.visual
    parts = ("transformer", "ln_post", "proj", "positional_embedding")
    if not all(hasattr(visual, name) for name in parts):
        raise TypeError(wrong("model", WITH_TOKENS, type(visual).__name__))
    if getattr(visual, "attn_pool", None) is not None:
        raise TypeError(wrong("model", WITH_TOKENS, f"{type(visual).__name__} with attn_pool"))
    seen: list[Tensor] = []
    hook = visual.transformer.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        features = _pooled(model, images)
    finally:
        hook.remove()
    if not seen:
        expected = "a vision transformer that runs forward hooks"
        remedy = "read tokens from the model before torch.compile or torch.jit"
        raise TypeError(wrong("model", expected, f"{type(visual).__name__} without them", remedy))
    # The sequence comes first in OpenAI's code and in open_clip's before it had this attribute,
    # whose value says what happens inside.
    tokens = seen[-1] if hasattr(visual.transformer, "batch_first") else seen[-1].transpose(0, 1)
    _check_number_of_tokens(tokens, len(visual.positional_embedding))
    tokens = visual.ln_post(tokens)
    return features, tokens if visual.proj is None else tokens @ visual.proj


def transformers_tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and projected tokens of a transformers CLIPModel from one forward pass."""
    vision = model.vision_model
    output = vision(pixel_values=images, return_dict=True)
    # Its last hidden state is from before the norm that the pooled output has had.
    tokens = vision.post_layernorm(output.last_hidden_state)
    _check_number_of_tokens(tokens, vision.embeddings.position_embedding.num_embeddings)
    return model.visual_projection(output.pooler_output), model.visual_projection(tokens)


def _check_number_of_tokens(tokens: Tensor, expected: int) -> None:
    if tokens.shape[1] != expected:
        raise ValueError(
            wrong(
                "model",
                f"{expected} tokens, the class token and all patches",
                tokens.shape[1],
                "patch dropout is for training without tokens: call model.eval() or switch it off",
            )
        )


def _pooled(model: Any, images: Tensor) -> Tensor:
    output = model.encode_image(images)
    return output[0] if isinstance(output, tuple) else output


# transformers


def _transformers_image(model: Any, images: Tensor) -> Tensor:
    return _pooler_output(model.get_image_features(pixel_values=images))


def _transformers_text(model: Any, tokens: Tensor) -> Tensor:
    return _pooler_output(model.get_text_features(input_ids=tokens))


def _pooler_output(output: Any) -> Tensor:
    # A tensor until transformers 4, the whole output of the tower since 5.
    return output if isinstance(output, Tensor) else output.pooler_output


def _transformers_tokens(tokenizer: Any, length: int, prompts: list[str]) -> Tensor:
    # Full length, and no attention mask: SigLIP was trained so, and takes its text feature from the
    # last position; CLIP's is at the end of the text, which never looks at the padding behind it.
    expected = "a processor or tokenizer of transformers, which returns input_ids"
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    try:
        output = tokenizer(prompts, return_tensors="pt", **options)
    except TypeError as error:
        raise TypeError(wrong("processor", expected, type(tokenizer).__name__)) from error
    if not isinstance(output, Mapping):
        raise TypeError(wrong("processor", expected, f"one that returns {type(output).__name__}"))
    return output["input_ids"]


def _processor_settings(processor: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the preprocessing off an image processor, except for settings that are given."""
    settings: dict[str, Any] = {}
    if not {"image_size", "resize_mode"} <= given.keys():
        settings |= _processor_geometry(processor)
    if "interpolation" not in given:
        settings["interpolation"] = INTERPOLATIONS.get(processor.resample)
        if settings["interpolation"] is None:
            expected = "resample 2 (bilinear) or 3 (bicubic)"
            remedy = "pass interpolation="
            raise ValueError(wrong("processor", expected, processor.resample, remedy))
    factor = getattr(processor, "rescale_factor", 1 / 255)
    if not processor.do_rescale or not math.isclose(factor, 1 / 255):
        got = f"do_rescale={processor.do_rescale}, rescale_factor={factor}"
        raise ValueError(wrong("processor", "pixels rescaled to [0, 1]", got))
    normalize = processor.do_normalize
    settings["mean"] = tuple(processor.image_mean) if normalize else (0.0, 0.0, 0.0)
    settings["std"] = tuple(processor.image_std) if normalize else (1.0, 1.0, 1.0)
    return settings


def _processor_geometry(processor: Any) -> dict[str, Any]:
    size = dict(processor.size)
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else None
    if processor.do_resize and size.keys() == {"shortest_edge"} and crop is not None:
        if crop == {"height": size["shortest_edge"], "width": size["shortest_edge"]}:
            return {"image_size": size["shortest_edge"], "resize_mode": "shortest_floor"}
    if processor.do_resize and size.keys() == {"height", "width"} and crop in (None, size):
        return {"image_size": (size["height"], size["width"]), "resize_mode": "squash"}
    raise ValueError(
        wrong(
            "processor",
            "a resize of the shorter side and a centre crop of that size, or a resize to height "
            "and width",
            f"do_resize={processor.do_resize}, size={size}, crop_size={crop}",
            "pass image_size= and resize_mode=",
        )
    )
