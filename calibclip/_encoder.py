"""The image half of a classifier: pixels in [0, 1] to features, in float32 at the least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibclip._checks import (
    check_choice,
    check_floating,
    check_number,
    check_size,
    describe,
    wrong,
)
from calibclip._libraries import WITH_TOKENS
from calibclip._resize import RESIZE_MODES, resize

if TYPE_CHECKING:
    from typing_extensions import Self

# What a resize with overshoot may leave outside [0, 1] before anybody has forgotten to divide.
VALUE_TOLERANCE = 0.1


class ImageEncoder(nn.Module):
    """Preprocessing and image encoder of ``ZeroShotClassifier``, which documents the arguments.

    ``like`` has the dtype, the device and the dimension, its last, that the features are to have.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        encode_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        *,
        image_size: int | Sequence[int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        resize_mode: str,
        like: Tensor,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(wrong("model", "a torch.nn.Module", describe(model)))
        if not callable(encode_image):
            raise TypeError(
                wrong("encode_image", "a callable from images to features", describe(encode_image))
            )
        if encode_tokens is not None and not callable(encode_tokens):
            expected = "a callable from images to (features, tokens), or None"
            raise TypeError(wrong("encode_tokens", expected, describe(encode_tokens)))
        check_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        self.model = model
        # Past nn.Module's registration: a module given here belongs to `model` already, and a
        # second entry would double its names in state_dict().
        self.__dict__["encode_image"] = encode_image
        self.__dict__["encode_tokens"] = encode_tokens
        self.image_size = None if image_size is None else check_size("image_size", image_size)
        self.interpolation = interpolation
        self.resize_mode = resize_mode
        self.training = model.training
        self._dimension = like.shape[-1]
        # A tensor made in inference mode could not be saved for the backward pass to the images.
        with torch.inference_mode(False):
            mean_, std_ = _channels("mean", mean).to(like), _channels("std", std, above=0).to(like)
        self.register_buffer("mean", mean_, persistent=False)
        self.register_buffer("std", std_, persistent=False)

    def embed(self, images: Tensor) -> Tensor:
        """Return the image features as the encoder gives them, not normalised.

        Args:
            images: Floating point, shape ``(B, 3, H, W)``, values in [0, 1], any ``H`` and ``W``.
                The value range is looked at on a CPU only: it would stall an accelerator.

        Returns:
            Shape ``(B, D)``, float32 (float64 for a float64 classifier). For the logits and more of
            one pass: ``classifier.classify(features)``.

        Raises:
            TypeError: Images, or features of the encoder, that are not a floating-point tensor.
            ValueError: Images of another shape or on another device than the classifier, values
                outside [0, 1], or features that are not ``(B, D)`` or do not fit the text features.
        """
        images = self.preprocess(images)
        if len(images) == 0:  # which not every encoder takes
            return self.mean.new_zeros((0, self._dimension))
        return self._checked(self.encode_image(images), len(images))

    def embed_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of :meth:`embed` and the tokens behind them, from one encoder pass.

        The tokens have had what makes features of the class token: the last norm and the projection
        into the joint space. So ``tokens[:, 0]`` is the feature of a model that pools by its class
        token, and :mod:`calibclip.attention` compares the others with texts. Both results carry
        gradients, to the images and to the weights.

        Where open_clip and OpenAI's ``clip`` keep the patches to themselves, a forward hook on the
        vision transformer picks them up; it is gone when this returns or raises. A model that
        ``torch.compile`` or ``torch.jit`` has taken over may not run it, and is refused.

        Args:
            images: As for :meth:`embed`.

        Returns:
            Features ``(B, D)`` and tokens ``(B, 1 + N, D)``, class token first and then the ``N``
            patches row by row; float32 (float64 for a float64 classifier).

        Raises:
            TypeError: As for :meth:`embed`; and a model without patch tokens in the joint space:
                a ResNet, a timm tower, attentional pooling (CoCa, SigLIP), or an encoder of your
                own without ``encode_tokens``.
            ValueError: As for :meth:`embed`; and a number of tokens other than the model's, which
                is what active patch dropout leaves.
        """
        images = self.preprocess(images)
        if self.encode_tokens is None:
            got = f"{type(self.model).__name__} without encode_tokens"
            remedy = "for an encoder of your own, pass encode_tokens="
            raise TypeError(wrong("model", WITH_TOKENS, got, remedy))
        # Not every encoder takes an empty batch, and only the encoder knows the number of tokens.
        batch = images if len(images) > 0 else images.new_zeros((1, *images.shape[1:]))
        output = self.encode_tokens(batch)
        if not isinstance(output, tuple) or len(output) != 2:
            expected = "a tuple of features (B, D) and tokens (B, 1 + N, D)"
            raise TypeError(wrong("encode_tokens", expected, describe(output)))
        features = self._checked(output[0], len(batch))
        tokens = check_floating("encode_tokens", output[1], shape="(B, 1 + N, D)", ndim=3)
        if (tokens.shape[0], tokens.shape[2]) != features.shape:
            expected = f"tokens of the features' shape {tuple(features.shape)}"
            raise ValueError(wrong("encode_tokens", expected, describe(tokens)))
        return features[: len(images)], tokens[: len(images)].to(self.mean.dtype)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and normalise images in [0, 1] into the model's input; differentiable.

        Images that have the model's size already are only normalised. On CUDA the gradient of a
        resize is summed in no fixed order: ``torch.use_deterministic_algorithms`` rejects it.

        Args:
            images: As for :meth:`embed`.

        Returns:
            Shape ``(B, 3, *image_size)``, in the dtype of the model's weights.
        """
        self._check_images(images)
        images = images.to(self.mean.dtype)
        if self.image_size is not None:
            images = resize(images, self.image_size, self.interpolation, self.resize_mode)
        return ((images - self.mean) / self.std).to(self._weight_dtype())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for name in ("encode_image", "encode_tokens"):
            encode = getattr(self, name)
            if isinstance(encode, FunctionType):
                raise TypeError(
                    wrong(
                        name,
                        "a bound method, a module or a functools.partial of one, so that the copy "
                        "uses its own weights",
                        f"function {encode.__qualname__}",
                        "build the classifier with one of these",
                    )
                )
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # copy.deepcopy through `memo` points the copied encoders at the copied model.
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # half() and bfloat16() end up here; rounded text features would round every cosine.
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device))
        return self

    def _checked(self, features: Tensor, batch: int) -> Tensor:
        check_floating("encode_image", features, shape="(N, D)", ndim=2)
        if len(features) != batch:
            expected = f"one row for each of {batch} images"
            raise ValueError(wrong("encode_image", expected, describe(features)))
        if features.shape[1] != self._dimension:
            raise ValueError(
                wrong(
                    "encode_image",
                    f"features of the text features' dimension {self._dimension}",
                    features.shape[1],
                    "take both encoders from one model, after its projections",
                )
            )
        return features.to(self.mean.dtype)

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
        # What a compiler is tracing with has no values.
        traced = torch.compiler.is_compiling() or type(images) is not Tensor
        if images.device.type == "cpu" and not traced and images.numel() > 0:
            lowest, highest = (float(bound) for bound in torch.aminmax(images.detach()))
            if lowest < -VALUE_TOLERANCE or highest > 1 + VALUE_TOLERANCE:
                remedy = "pass pixels / 255 and leave the normalisation to the classifier"
                got = f"values in [{lowest:.4g}, {highest:.4g}]"
                raise ValueError(wrong("images", "values in [0, 1]", got, remedy))


def _channels(argument: str, values: Sequence[float], above: float | None = None) -> Tensor:
    expected = "a tuple or list of three numbers, one a channel"
    if not isinstance(values, (tuple, list)):
        raise TypeError(wrong(argument, expected, describe(values)))
    if len(values) != 3:
        raise ValueError(wrong(argument, expected, describe(values)))
    numbers = [check_number(argument, value, above=above) for value in values]
    return torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1)
