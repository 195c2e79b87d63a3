"""CLIP as a classifier that attacks can differentiate: images in [0, 1] in, logits out.

The class prompts are encoded once, at construction. Resizing and normalisation are part of the
classifier, so that a perturbation and its budget are stated in pixel values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibclip._checks import check_floating, check_number, check_same_device, describe, wrong
from calibclip._encoder import ImageEncoder
from calibclip._libraries import (
    Options,
    Parts,
    given_settings,
    open_clip_parts,
    openai_parts,
    transformers_parts,
)
from calibclip._prompts import (
    check_strings,
    check_templates,
    check_text_features,
    distinct_names,
    encode_classes,
    fill,
    unit_features,
)
from calibclip.dirichlet import float32_product

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ZeroShotClassifier(ImageEncoder):
    r"""Logits :math:`z_k = s \cos(f(x), t_k) + b` of images against fixed class text features.

    ``s`` is ``logit_scale``, ``b`` is ``logit_bias``, ``f`` is ``encode_image`` after preprocessing
    and ``t_k`` is row ``k`` of ``text_features``. Use :meth:`from_open_clip`,
    :meth:`from_openai_clip` or :meth:`from_transformers` for a model of these libraries; this
    constructor is the common core, for any pair of image encoder and text features.

    **SigLIP.** Only models trained with sigmoids have a bias. It is one number for all classes, so
    softmax and argmax are the same without it; their own probabilities are
    ``torch.sigmoid(logits)``, each class for itself, and do need it. What reads logits as cosines
    would be shifted by it: give the Dirichlet functions and losses ``classifier.cosines(images)``
    and ``logit_scale=1``.

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
    encoders that can be copied: bound methods, modules, or ``functools.partial`` of one. A plain
    function or lambda would keep using the original's weights, so the copy raises.

    **Training.** ``text_features``, ``logit_scale`` and ``logit_bias`` are constants read once. If
    the logit scale trains, use ``model.logit_scale.exp() * classifier.cosines(images)``, or assign
    its value to ``classifier.logit_scale``, as a float, after a step; if the text tower trains,
    build a new classifier.

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
            ``"shortest_floor"`` is the same with the crop's offset rounded down, as in
            transformers, and not to the nearest; ``"squash"`` ignores the aspect ratio.
        templates: The templates behind ``text_features``, for :attr:`prompts` and the repr only.
        logit_bias: Added to the logits.
        encode_tokens: Maps what ``encode_image`` takes to features and projected tokens,
            ``(B, D)`` and ``(B, 1 + N, D)``, for :meth:`embed_with_tokens`. ``None``: it raises.

    Attributes:
        model, encode_image, encode_tokens: As given.
        text_features: Normalised class features, shape ``(K, D)``.
        logit_scale, logit_bias: Floats.
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

    text_features: Tensor

    # Named again because pdoc leaves out what a private base class documents.
    embed = ImageEncoder.embed
    embed_with_tokens = ImageEncoder.embed_with_tokens
    preprocess = ImageEncoder.preprocess

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
        logit_bias: float = 0.0,
        encode_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        names = check_strings("class_names", class_names)
        text_features = check_text_features(text_features, names)
        super().__init__(
            model,
            encode_image,
            encode_tokens,
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            resize_mode=resize_mode,
            like=text_features,
        )
        self.register_buffer("text_features", text_features, persistent=False)
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.class_names = names
        if templates:
            check_templates(templates)
        self.templates = tuple(templates)

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
            The classifier, on the model's device, with ``logit_scale = exp(model.logit_scale)``
            and the model's ``logit_bias``, if it has one.

        Raises:
            TypeError: A model without open_clip's interface, class names or templates that are not
                a sequence of strings, or tokens that are not an integer tensor.
            ValueError: No or duplicate class names, a template without exactly one ``{}``, or
                tokens of the wrong shape.

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
        return cls._from_library(
            open_clip_parts,
            model,
            tokenizer,
            class_names,
            templates,
            clean_class_names=clean_class_names,
            allow_duplicates=allow_duplicates,
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            resize_mode=resize_mode,
        )

    @classmethod
    def from_openai_clip(
        cls,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        templates: Sequence[str] = ("This is a photo of a {}",),
        **options: Unpack[Options],
    ) -> ZeroShotClassifier:
        """Build the classifier from a model of OpenAI's ``clip``, encoding the class prompts once.

        Preprocessing is that of ``clip.load``: the shorter side resized to
        ``model.visual.input_resolution``, bicubic, and the centre cropped. Half-precision models,
        which ``clip.load`` gives on a GPU, are taken as they are.

        Args:
            model: For example ``clip.load("ViT-B/32", jit=False)[0]``.
            tokenizer: ``clip.tokenize``.
            class_names: ``K`` names; the position is the label.
            templates: Prompts with one ``{}`` each, where the class name goes.
            **options: The keyword options of :meth:`from_open_clip`.

        Returns:
            The classifier, on the model's device.

        Raises:
            TypeError: As for :meth:`from_open_clip`, or a model without ``clip``'s interface.
            ValueError: As for :meth:`from_open_clip`.

        Example:
            >>> import clip  # doctest: +SKIP
            >>> model, _ = clip.load("ViT-B/32", device="cpu", jit=False)  # doctest: +SKIP
            >>> ZeroShotClassifier.from_openai_clip(model, clip.tokenize, names)  # doctest: +SKIP
        """
        return cls._from_library(openai_parts, model, tokenizer, class_names, templates, **options)

    @classmethod
    def from_transformers(
        cls,
        model: nn.Module,
        processor: Callable[..., object],
        class_names: Sequence[str],
        templates: Sequence[str] = ("This is a photo of a {}",),
        **options: Unpack[Options],
    ) -> ZeroShotClassifier:
        """Build the classifier from a CLIPModel or SiglipModel of Hugging Face's ``transformers``.

        Prompts are padded, or cut, to ``config.text_config.max_position_embeddings`` and given
        without an attention mask: SigLIP was trained so, and to CLIP it makes no difference. A
        SigLIP's ``logit_bias`` is read too; what it means for probabilities is said above.

        Args:
            model: For example ``CLIPModel.from_pretrained("openai/clip-vit-base-patch32")``.
            processor: The model's CLIPProcessor or SiglipProcessor, whose preprocessing is
                reproduced up to its rounding to 8 bits; or its tokenizer alone, with the
                preprocessing that OpenAI's and Google's weights have.
            class_names: ``K`` names; the position is the label.
            templates: Prompts with one ``{}`` each, where the class name goes.
            **options: The keyword options of :meth:`from_open_clip`.

        Returns:
            The classifier, on the model's device.

        Raises:
            TypeError: As for :meth:`from_open_clip`, or a model without the interface of these.
            ValueError: As for :meth:`from_open_clip`, or a processor whose steps this classifier
                does not have, or whose images are not of the model's size.

        Example:
            >>> from transformers import CLIPConfig, CLIPModel
            >>> tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            >>> model = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower))
            >>> def processor(prompts, **options):  # for CLIPProcessor.from_pretrained(name)
            ...     return {"input_ids": torch.tensor([[len(prompt), 2] for prompt in prompts])}
            >>> classifier = ZeroShotClassifier.from_transformers(model, processor, ["cat", "dog"])
            >>> classifier(torch.rand(3, 3, 40, 60)).shape
            torch.Size([3, 2])
        """
        return cls._from_library(
            transformers_parts, model, processor, class_names, templates, **options
        )

    @classmethod
    def from_encoders(
        cls,
        model: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        templates: Sequence[str] = ("This is a photo of a {}",),
        *,
        logit_scale: float,
        logit_bias: float = 0.0,
        encode_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        **options: Unpack[Options],
    ) -> ZeroShotClassifier:
        """Build the classifier from any pair of encoders, encoding the class prompts once.

        Args:
            model: The module that holds the weights of both; on its device the prompts are encoded.
            encode_image: As for the constructor.
            encode_text: Maps tokens ``(N, L)`` to features ``(N, D)``.
            tokenizer: Maps a list of ``N`` prompts to integer tokens ``(N, L)``.
            class_names: ``K`` names; the position is the label.
            templates: Prompts with one ``{}`` each, where the class name goes.
            logit_scale: As for the constructor.
            logit_bias: As for the constructor.
            encode_tokens: As for the constructor.
            **options: The keyword options of :meth:`from_open_clip`, of which ``mean`` and ``std``
                are required. Without ``image_size`` images are not resized.

        Returns:
            The classifier, on the model's device.

        Raises:
            TypeError: As for the constructor and :meth:`from_open_clip`.
            ValueError: As for the constructor and :meth:`from_open_clip`.

        Example:
            >>> towers = nn.ModuleDict({"x": nn.Flatten(), "t": nn.Embedding(9, 12)})
            >>> classifier = ZeroShotClassifier.from_encoders(
            ...     towers, towers["x"], lambda tokens: towers["t"](tokens).mean(1),
            ...     lambda prompts: torch.tensor([[len(p) % 9] for p in prompts]), ["cat", "mouse"],
            ...     logit_scale=100.0, image_size=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
            ... )
            >>> classifier(torch.rand(3, 3, 8, 8)).shape
            torch.Size([3, 2])
        """

        def parts(_: object, tokenizer: Any, given: dict[str, Any]) -> Parts:
            for name in ("mean", "std"):
                if name not in given:
                    raise TypeError(wrong(name, "three numbers, one a channel", "none"))
            settings = {"image_size": None, **given}
            encoders = (encode_image, encode_text, tokenizer)
            return Parts(*encoders, logit_scale, logit_bias, settings, encode_tokens)

        return cls._from_library(parts, model, tokenizer, class_names, templates, **options)

    @classmethod
    def _from_library(
        cls,
        take_apart: Callable[..., Parts],
        model: nn.Module,
        tokenizer: Callable[..., object],
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        clean_class_names: bool = True,
        allow_duplicates: bool = False,
        **preprocessing: Any,
    ) -> ZeroShotClassifier:
        parts = take_apart(model, tokenizer, given_settings(preprocessing))
        names = distinct_names(class_names, clean_class_names, allow_duplicates)
        check_templates(templates)
        return cls(
            model,
            parts.encode_image,
            encode_classes(model, parts.encode_text, parts.tokenizer, names, templates),
            logit_scale=parts.logit_scale,
            logit_bias=parts.logit_bias,
            encode_tokens=parts.encode_tokens,
            class_names=names,
            templates=templates,
            **parts.preprocessing,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``logit_scale`` times the cosines plus ``logit_bias``.

        Args:
            images: As for :meth:`embed`.

        Returns:
            Shape ``(B, K)``, float32 (float64 for a float64 classifier).

        Raises:
            TypeError: As for :meth:`embed`.
            ValueError: As for :meth:`embed`.
        """
        return self.classify(self.embed(images))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of features, so that one encoder pass serves them and more.

        Args:
            features: As :meth:`embed` and :meth:`embed_with_tokens` return them, or of any other
                length, shape ``(B, D)``.

        Returns:
            Shape ``(B, K)``, float32 (float64 if the features or the classifier are).

        Raises:
            TypeError: ``features`` is not a floating-point tensor.
            ValueError: ``features`` is not 2-D, or of another size or device than the text
                features.
        """
        return self.logit_scale * self._cosines(features) + self.logit_bias

    def cosines(self, images: Tensor) -> Tensor:
        """Return the cosines of the images with the classes, shape ``(B, K)``; see forward."""
        return self._cosines(self.embed(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the L2-normalised image features, shape ``(B, D)``; see :meth:`embed`."""
        return F.normalize(self.embed(images), dim=-1)

    def _cosines(self, features: Tensor) -> Tensor:
        check_floating("features", features, shape="(B, D)", ndim=2)
        if features.shape[1] != self.text_features.shape[1]:
            expected = f"features of the text features' dimension {self.text_features.shape[1]}"
            raise ValueError(wrong("features", expected, describe(features)))
        check_same_device("features", features, "text_features", self.text_features)
        dtype = torch.promote_types(features.dtype, self.text_features.dtype)
        return float32_product(unit_features("features", features, dtype), self.text_features)

    @property
    def logit_scale(self) -> float:
        """The factor from cosines to logits."""
        return self._logit_scale

    @logit_scale.setter
    def logit_scale(self, value: float) -> None:
        self._logit_scale = check_number("logit_scale", value, above=0)

    @property
    def logit_bias(self) -> float:
        """What is added to the logits; 0 for a model trained with a softmax."""
        return self._logit_bias

    @logit_bias.setter
    def logit_bias(self, value: float) -> None:
        self._logit_bias = check_number("logit_bias", value)

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each class, one per template."""
        return tuple(fill(self.templates, name) for name in self.class_names)

    def extra_repr(self) -> str:
        """Summarise the classifier in one line of the module's repr."""
        classes, templates = len(self.class_names), len(self.templates)
        parts = [f"{classes} class{'' if classes == 1 else 'es'}"]
        if templates:
            parts.append(f"{templates} template{'' if templates == 1 else 's'}")
        parts += [f"logit_scale={round(self.logit_scale, 2)}", f"image_size={self.image_size}"]
        return ", ".join(parts)
