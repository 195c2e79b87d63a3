"""CLIP as a classifier that attacks can differentiate: images in [0, 1] in, logits out.

The class prompts are encoded once, at construction. Resizing and normalisation are part of the
classifier, so that a perturbation and its budget are stated in pixel values in [0, 1].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from calibclip._checks import (
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_number,
    describe,
    wrong,
)
from calibclip._prompts import (
    check_distinct,
    check_strings,
    check_templates,
    clean_class_name,
    encode_classes,
    fill,
    unit_rows,
)
from calibclip._resize import resize
from calibclip.dirichlet import float32_product

# What open_clip assumes for a model that carries no statistics of its own.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# What a resize with overshoot may leave outside [0, 1] before anybody has forgotten to divide.
VALUE_TOLERANCE = 0.1


class ZeroShotClassifier(nn.Module):
    r"""Logits :math:`z_k = s \cos(f(x), t_k)` of images against fixed class text features.

    ``s`` is ``logit_scale``, ``f`` is ``encode_image`` after preprocessing and ``t_k`` is row ``k``
    of ``text_features``. Use :meth:`from_open_clip` for an open_clip model; this constructor is the
    common core, for any model that maps images to features.

    **Threat model.** A perturbation lives at the resolution of the tensor that is passed in. An
    attack on 32 × 32 CIFAR images, which are enlarged in here, and one on the same images enlarged
    beforehand to 224 × 224 have the same ``eps`` but not the same freedom: robust accuracies from
    the two are not comparable. Say which one was run.

    **Precision.** Preprocessing, normalisation of the features and the cosines are float32 also
    under autocast and for a half-precision model, because the Dirichlet losses are sensitive to
    rounded cosines; only ``encode_image`` runs in the low precision. ``half()`` and ``bfloat16()``
    therefore change ``model`` and leave the classifier's own buffers alone. With float64
    ``text_features`` all of it is float64.

    **Frozen reference.** ``copy.deepcopy(classifier)`` is independent of the original. It needs
    an ``encode_image`` that can be copied: a bound method, a module, or a ``functools.partial`` of
    one. A plain function or lambda would keep using the original's weights, so the copy raises.

    **Training.** ``text_features`` and ``logit_scale`` are constants read once. If the logit scale
    trains, use ``model.logit_scale.exp() * classifier.cosines(images)``, or assign its value to
    ``classifier.logit_scale``, as a float, after a step; if the text tower trains, build a new
    classifier.

    Args:
        model: The module that holds the weights ``encode_image`` uses. Registered, so that
            ``parameters()``, ``to()``, ``eval()`` and ``state_dict()`` reach it.
        encode_image: Maps normalised images ``(B, 3, H, W)``, in the dtype of the model's weights,
            to features ``(B, D)``.
        text_features: One row per class, shape ``(K, D)``, of any length > 0. Kept detached and
            L2-normalised, in float32 (float64 if given as float64), outside ``state_dict()``.
        logit_scale: Multiplicative, already exponentiated; about 100 for OpenAI's CLIP.
        class_names: ``K`` names.
        image_size: Height and width of the model's input, or one number for both. ``None``: images
            are not resized.
        mean: Three channel means, subtracted after resizing.
        std: Three channel standard deviations > 0.
        interpolation: ``"bicubic"`` or ``"bilinear"``; always antialiased, like Pillow's.
        resize_mode: ``"shortest"`` resizes the shorter side to fit and crops the centre;
            ``"squash"`` resizes both sides and ignores the aspect ratio.
        templates: The templates behind ``text_features``, for :attr:`prompts` and the repr only.

    Attributes:
        model: As given.
        encode_image: As given.
        text_features: Normalised class features, shape ``(K, D)``.
        logit_scale: Float.
        class_names: Tuple of ``K`` names; the position is the label.
        templates: Tuple of templates.
        image_size: ``(height, width)`` or ``None``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No classes, a number of names other than ``K``, a text feature that is zero or
            not finite, or a number out of range.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
        >>> classifier = ZeroShotClassifier(
        ...     encoder, encoder, torch.eye(2), logit_scale=100.0, class_names=["cat", "dog"],
        ...     image_size=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        ... )
        >>> classifier(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 2])
        >>> classifier.extra_repr()
        '2 classes, logit_scale=100.0, image_size=(2, 2)'

    References:
        Radford et al. (2021), "Learning Transferable Visual Models From Natural Language
        Supervision", section 3.1, https://arxiv.org/abs/2103.00020.
    """

    encode_image: Callable[[Tensor], Tensor]
    text_features: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        text_features: Tensor,
        *,
        logit_scale: float,
        class_names: Sequence[str],
        image_size: int | Sequence[int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        templates: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(wrong("model", "a torch.nn.Module", describe(model)))
        if not callable(encode_image):
            raise TypeError(
                wrong("encode_image", "a callable from images to features", describe(encode_image))
            )
        check_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        check_choice("resize_mode", resize_mode, ("shortest", "squash"))
        self.model = model
        # Past nn.Module's registration: a module given here belongs to `model` already, and a
        # second entry would double its names in state_dict().
        self.__dict__["encode_image"] = encode_image
        self.logit_scale = logit_scale
        self.class_names = check_strings("class_names", class_names)
        if templates:
            check_templates(templates)
        self.templates = tuple(templates)
        self.image_size = None if image_size is None else _check_image_size(image_size)
        self.interpolation = interpolation
        self.resize_mode = resize_mode
        self.training = model.training

        check_floating("text_features", text_features, shape="(K, D)", ndim=2)
        if len(text_features) != len(self.class_names):
            raise ValueError(
                wrong(
                    "text_features",
                    f"one row for each of {len(self.class_names)} class names",
                    describe(text_features),
                )
            )
        lengths = text_features.detach().norm(dim=-1)
        if not bool((lengths.isfinite() & (lengths > 0)).all()):
            raise ValueError(
                wrong(
                    "text_features",
                    "finite rows of length > 0",
                    "a row that is zero or not finite",
                    "check the text encoder's weights and precision",
                )
            )
        dtype = torch.promote_types(text_features.dtype, torch.float32)
        # A tensor made in inference mode could not be saved for the backward pass to the images.
        with torch.inference_mode(False), torch.no_grad():
            buffers = {
                "text_features": unit_rows("text_features", text_features, dtype),
                "mean": _check_channels("mean", mean).to(dtype).to(text_features.device),
                "std": _check_channels("std", std, above=0).to(dtype).to(text_features.device),
            }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def from_open_clip(
        cls,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        templates: Sequence[str] = ("This is a photo of a {}",),
        *,
        clean_class_names: bool = True,
        allow_duplicates: bool = False,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
    ) -> ZeroShotClassifier:
        """Build the classifier from an open_clip model, encoding the class prompts once.

        With several templates a class is represented by the normalised mean of its normalised
        prompt features. The prompts run in evaluation mode, without gradient and without autocast;
        the training flags and ``requires_grad`` of ``model`` are left as they were.

        Preprocessing follows ``model.visual``, as ``open_clip.create_model`` recorded it there, and
        reproduces open_clip's evaluation transform up to its rounding to 8 bits. The last five
        arguments override single settings.

        Args:
            model: For example ``open_clip.create_model("ViT-B-32-quickgelu", pretrained="openai")``
            tokenizer: Maps a list of ``N`` prompts to integer tokens ``(N, L)``, for example
                ``open_clip.get_tokenizer("ViT-B-32-quickgelu")``.
            class_names: ``K`` names; the position is the label.
            templates: Prompts with one ``{}`` each, where the class name goes.
            clean_class_names: Apply :func:`clean_class_name` first.
            allow_duplicates: Accept a name that occurs twice. Its classes get equal logits, and
                ``argmax`` never returns the later ones. open_clip's own list of ImageNet names has
                two such pairs ("missile", "sunglasses"): published accuracies include them.
            image_size: Overrides the input size of the model.
            mean: Overrides the channel means.
            std: Overrides the channel standard deviations.
            interpolation: Overrides the interpolation.
            resize_mode: Overrides the resize mode. open_clip's ``"longest"``, which pads, is not
                offered; no weights in its list use it.

        Returns:
            The classifier, on the model's device, with ``logit_scale = exp(model.logit_scale)``.

        Raises:
            TypeError: A model without open_clip's interface, class names or templates that are not
                a sequence of strings, or tokens that are not an integer tensor.
            ValueError: No or duplicate class names, a template without exactly one ``{}``, tokens
                of the wrong shape, or a model with a logit bias.

        Example:
            >>> import open_clip
            >>> vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
            >>> text = {"context_length": 16, "width": 64, "heads": 1, "layers": 1}
            >>> classifier = ZeroShotClassifier.from_open_clip(
            ...     open_clip.CLIP(8, vision, text),
            ...     open_clip.SimpleTokenizer(context_length=16),
            ...     ["Tabby_cat", "dog"],
            ... )
            >>> classifier.prompts
            (('This is a photo of a tabby cat',), ('This is a photo of a dog',))
            >>> classifier(torch.rand(3, 3, 40, 60)).shape
            torch.Size([3, 2])
        """
        for name in ("encode_image", "encode_text", "logit_scale", "visual"):
            if not hasattr(model, name):
                raise TypeError(
                    wrong(
                        "model",
                        "an open_clip model with encode_image, encode_text, logit_scale and visual",
                        f"{type(model).__name__} without {name}",
                    )
                )
        clip: Any = model
        # A sigmoid-trained model: its probabilities are not this softmax, and a bias in the logits
        # would break `logits / logit_scale = cosine`, on which the Dirichlet losses rely.
        if getattr(clip, "logit_bias", None) is not None:
            raise ValueError(
                wrong(
                    "model",
                    "a model trained with a softmax, without logit_bias",
                    f"logit_bias = {clip.logit_bias.item():.4g}",
                    "to leave the bias out, set model.logit_bias = None",
                )
            )
        check_flag("clean_class_names", clean_class_names)
        check_flag("allow_duplicates", allow_duplicates)
        names = check_strings("class_names", class_names)
        if clean_class_names:
            names = tuple(clean_class_name(name) for name in names)
        check_distinct(names, allow_duplicates)
        check_templates(templates)

        visual = clip.visual
        recorded = getattr(visual, "preprocess_cfg", None) or {}
        # "random" is a training augmentation; open_clip evaluates such a model with bicubic.
        recorded_interpolation = recorded.get("interpolation", "bicubic")
        preprocessing: dict[str, Any] = {
            "image_size": recorded.get("size") or getattr(visual, "image_size", None),
            "mean": recorded.get("mean") or getattr(visual, "image_mean", None) or OPENAI_MEAN,
            "std": recorded.get("std") or getattr(visual, "image_std", None) or OPENAI_STD,
            "interpolation": recorded_interpolation.replace("random", "bicubic"),
            "resize_mode": recorded.get("resize_mode", "shortest"),
        }
        overrides = {
            "image_size": image_size,
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "resize_mode": resize_mode,
        }
        preprocessing |= {key: value for key, value in overrides.items() if value is not None}
        if preprocessing["image_size"] is None:
            raise TypeError(
                wrong(
                    "model",
                    "an open_clip model, whose visual tower records its image_size",
                    f"{type(visual).__name__} without one",
                    "pass image_size=224, or what the model takes",
                )
            )
        return cls(
            model,
            clip.encode_image,
            encode_classes(model, clip.encode_text, tokenizer, names, templates),
            logit_scale=math.exp(clip.logit_scale.item()),
            class_names=names,
            templates=templates,
            **preprocessing,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``logit_scale`` times the cosines.

        Args:
            images: Floating point, shape ``(B, 3, H, W)``, values in [0, 1], any ``H`` and ``W``.
                The value range is looked at on a CPU only: it would stall an accelerator.

        Returns:
            Shape ``(B, K)``, float32 (float64 for a float64 classifier).

        Raises:
            TypeError: Images that are not a floating-point tensor.
            ValueError: Images of another shape or on another device than the classifier, values
                outside [0, 1], or features that do not fit the text features.
        """
        return self.logit_scale * self.cosines(images)

    def cosines(self, images: Tensor) -> Tensor:
        """Return the cosines of the images with the classes, shape ``(B, K)``; see forward."""
        features = self.features(images)
        if features.shape[1] != self.text_features.shape[1]:
            raise ValueError(
                wrong(
                    "encode_image",
                    f"features of the text features' dimension {self.text_features.shape[1]}",
                    features.shape[1],
                    "take both encoders from one model, after its projections",
                )
            )
        return float32_product(features, self.text_features)

    def features(self, images: Tensor) -> Tensor:
        """Return the L2-normalised image features, shape ``(B, D)``; see forward.

        Features as the model gives them are ``encode_image(preprocess(images))``.
        """
        images = self.preprocess(images)
        if len(images) == 0:  # which not every encoder takes
            return self.text_features.new_zeros((0, self.text_features.shape[1]))
        features = self.encode_image(images)
        return unit_rows("encode_image", features, self.text_features.dtype)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and normalise images in [0, 1] into the model's input; differentiable.

        Images that have the model's size already are only normalised. On CUDA the gradient of a
        resize is summed in no fixed order: ``torch.use_deterministic_algorithms`` rejects it.

        Args:
            images: See :meth:`forward`.

        Returns:
            Shape ``(B, 3, *image_size)``, in the dtype of the model's weights.
        """
        self._check_images(images)
        images = images.to(self.mean.dtype)
        if self.image_size is not None:
            images = resize(images, self.image_size, self.interpolation, self.resize_mode)
        return ((images - self.mean) / self.std).to(self._weight_dtype())

    @property
    def logit_scale(self) -> float:
        """The factor from cosines to logits."""
        return self._logit_scale

    @logit_scale.setter
    def logit_scale(self, value: float) -> None:
        self._logit_scale = check_number("logit_scale", value, above=0)

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each class, one per template."""
        return tuple(fill(self.templates, name) for name in self.class_names)

    def extra_repr(self) -> str:
        """Summarise the classifier in one line of the module's repr."""
        parts = [_plural(len(self.class_names), "class", "classes")]
        if self.templates:
            parts.append(_plural(len(self.templates), "template", "templates"))
        parts += [f"logit_scale={round(self.logit_scale, 2)}", f"image_size={self.image_size}"]
        return ", ".join(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroShotClassifier:
        if isinstance(self.encode_image, FunctionType):
            raise TypeError(
                wrong(
                    "encode_image",
                    "a bound method, a module or a functools.partial of one, so that the copy uses "
                    "its own weights",
                    f"function {self.encode_image.__qualname__}",
                    "build the classifier with one of these",
                )
            )
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # copy.deepcopy through `memo` points the copied encode_image at the copied model.
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZeroShotClassifier:
        # half() and bfloat16() end up here; rounded text features would round every cosine.
        exact = {name: getattr(self, name) for name in ("text_features", "mean", "std")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device))
        return self

    def _weight_dtype(self) -> torch.dtype:
        # Mixed-precision models keep norms and embeddings in float32: the dtype that counts is
        # that of the first layer to meet the images, a convolution wherever there is one.
        convolutions = (p.dtype for p in self.model.parameters() if p.ndim == 4)
        weights = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(convolutions, next(weights, self.mean.dtype))

    def _check_images(self, images: Tensor) -> None:
        expected = "a floating-point tensor of shape (B, 3, H, W) with values in [0, 1]"
        if not isinstance(images, Tensor):
            raise TypeError(wrong("images", expected, describe(images)))
        if not images.is_floating_point():
            remedy = "for 8-bit images pass images.float() / 255"
            raise TypeError(wrong("images", expected, describe(images), remedy))
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(wrong("images", expected, describe(images)))
        if images.device != self.mean.device:
            raise ValueError(
                wrong(
                    "images",
                    f"a tensor on the classifier's device {self.mean.device}",
                    f"one on {images.device}",
                    "move one of the two",
                )
            )
        # Plain tensors only: one that a compiler is tracing with has no values.
        if images.device.type == "cpu" and type(images) is Tensor and images.numel() > 0:
            lowest, highest = (float(bound) for bound in torch.aminmax(images.detach()))
            if lowest < -VALUE_TOLERANCE or highest > 1 + VALUE_TOLERANCE:
                remedy = "pass pixels / 255 and leave the normalisation to the classifier"
                got = f"values in [{lowest:.4g}, {highest:.4g}]"
                raise ValueError(wrong("images", "values in [0, 1]", got, remedy))


def _check_image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(
            wrong("image_size", "(height, width) or one number for both", describe(image_size))
        )
    height, width = (check_count("image_size", side, at_least=1) for side in sides)
    return height, width


def _check_channels(argument: str, values: Sequence[float], above: float | None = None) -> Tensor:
    expected = "a tuple or list of three numbers, one a channel"
    if not isinstance(values, (tuple, list)):
        raise TypeError(wrong(argument, expected, describe(values)))
    if len(values) != 3:
        raise ValueError(wrong(argument, expected, describe(values)))
    numbers = [check_number(argument, value, above=above) for value in values]
    return torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1)


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
