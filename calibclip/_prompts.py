"""Class names to text features: cleaning, prompts, one encoding of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibclip._checks import check_flag, check_floating, describe, wrong
from calibclip._modules import evaluation_mode

# Bounds the memory of the text pass: 21k classes with 80 templates are 1.7 million prompts.
PROMPTS_PER_BATCH = 256


def clean_class_name(name: str) -> str:
    """Lower-case a class name, turn ``_``, ``-`` and ``/`` into spaces and collapse white space.

    Args:
        name: A class name as a data set spells it.

    Returns:
        The name as it goes into a prompt.

    Raises:
        TypeError: ``name`` is not a string.

    Example:
        >>> clean_class_name("Egyptian_cat/Sphynx  cat")
        'egyptian cat sphynx cat'
    """
    if not isinstance(name, str):
        raise TypeError(wrong("name", "a string", describe(name)))
    return " ".join(name.lower().translate(str.maketrans("_-/", "   ")).split())


def encode_classes(
    model: nn.Module,
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Return the mean over templates of the normalised prompt features, shape ``(K, D)``."""
    weight = _check_encoders(model, encode_text, tokenizer)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    step = max(1, PROMPTS_PER_BATCH // len(templates))  # whole classes, so that means are local
    means = []
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(class_names), step):
            names = class_names[start : start + step]
            prompts = [prompt for name in names for prompt in fill(templates, name)]
            tokens = _check_tokens(tokenizer(prompts), len(prompts)).to(weight.device)
            with torch.autocast(weight.device.type, enabled=False):
                features = unit_features("encode_text", encode_text(tokens), dtype)
            if len(features) != len(prompts):
                expected = f"features of shape ({len(prompts)}, D) from {len(prompts)} prompts"
                raise ValueError(wrong("encode_text", expected, describe(features)))
            means.append(features.view(len(names), len(templates), -1).mean(dim=1))
    return torch.cat(means)


def _check_encoders(model: object, encode_text: object, tokenizer: object) -> Tensor:
    """Return one of the model's weights, which says where and how the prompts are encoded."""
    if not isinstance(model, nn.Module):
        raise TypeError(wrong("model", "a torch.nn.Module", describe(model)))
    for name, call in (("encode_text", encode_text), ("tokenizer", tokenizer)):
        if not callable(call):
            raise TypeError(wrong(name, "a callable", describe(call)))
    weight = next(model.parameters(), None)
    if weight is None:
        got = f"{type(model).__name__} without any"
        raise ValueError(wrong("model", "the module that holds the encoders' parameters", got))
    return weight


def fill(templates: Sequence[str], name: str) -> tuple[str, ...]:
    # replace, not format: other braces in a template are ordinary characters.
    return tuple(template.replace("{}", name) for template in templates)


def unit_features(argument: str, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Check an encoder's output, shape ``(N, D)``, and L2-normalise its rows in ``dtype``."""
    check_floating(argument, features, shape="(N, D)", ndim=2)
    return F.normalize(features.to(dtype), dim=-1)


def check_strings(argument: str, values: Sequence[str]) -> tuple[str, ...]:
    expected = "a non-empty list or tuple of strings"
    if isinstance(values, str):
        raise TypeError(wrong(argument, expected, describe(values), f"write [{values!r}]"))
    if not isinstance(values, Sequence):
        raise TypeError(wrong(argument, expected, type(values).__name__))
    if len(values) == 0:
        raise ValueError(wrong(argument, expected, "an empty one"))
    for value in values:
        if not isinstance(value, str):
            raise TypeError(wrong(argument, expected, f"{describe(value)} in it"))
    return tuple(values)


def distinct_names(class_names: Sequence[str], clean: bool, duplicates: bool) -> tuple[str, ...]:
    """Check the class names, cleaned if ``clean``, and repeated only if ``duplicates``."""
    check_flag("clean_class_names", clean)
    check_flag("allow_duplicates", duplicates)
    names = check_strings("class_names", class_names)
    if clean:
        names = tuple(clean_class_name(name) for name in names)
    _check_distinct(names, duplicates)
    return names


def check_text_features(text_features: Tensor, class_names: Sequence[str]) -> Tensor:
    """Return text features, shape ``(K, D)``, checked and of unit length, float32 at the least."""
    check_floating("text_features", text_features, shape="(K, D)", ndim=2)
    if len(text_features) != len(class_names):
        expected = f"one row for each of {len(class_names)} class names"
        raise ValueError(wrong("text_features", expected, describe(text_features)))
    lengths = text_features.detach().norm(dim=-1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        expected, got = "finite rows of length > 0", "a row that is zero or not finite"
        remedy = "check the text encoder's weights and precision"
        raise ValueError(wrong("text_features", expected, got, remedy))
    dtype = torch.promote_types(text_features.dtype, torch.float32)
    # A tensor made in inference mode could not be saved for the backward pass to the images.
    with torch.inference_mode(False), torch.no_grad():
        return unit_features("text_features", text_features, dtype)


def _check_distinct(names: Sequence[str], allow_duplicates: bool) -> None:
    if not all(name.strip() for name in names):
        raise ValueError(wrong("class_names", "names with letters or digits", "an empty name"))
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated and not allow_duplicates:
        more = f" and {len(repeated) - 10} others" if len(repeated) > 10 else ""
        raise ValueError(
            wrong(
                "class_names",
                "distinct names after cleaning",
                f"{', '.join(repeated[:10])}{more} more than once",
                "tell the classes apart in their names, or pass allow_duplicates=True",
            )
        )


def check_templates(templates: Sequence[str]) -> None:
    for template in check_strings("templates", templates):
        if template.count("{}") != 1:
            raise ValueError(wrong("templates", "exactly one {} in each template", repr(template)))


def _check_tokens(tokens: object, n_prompts: int) -> Tensor:
    expected = f"an integer tensor of shape ({n_prompts}, L) from {n_prompts} prompts"
    if not isinstance(tokens, Tensor):
        remedy = "wrap the tokenizer so that it returns the token tensor"
        raise TypeError(wrong("tokenizer", expected, type(tokens).__name__, remedy))
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(wrong("tokenizer", expected, describe(tokens)))
    if tokens.ndim != 2 or len(tokens) != n_prompts:
        raise ValueError(wrong("tokenizer", expected, describe(tokens)))
    return tokens
