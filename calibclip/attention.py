r"""Text-guided attention: where in an image the patch tokens point along a class's text feature.

TGA-ZSR and Comp-TGA compare such maps between models and between clean and attacked images. The
tokens are those of :meth:`calibclip.ZeroShotClassifier.embed_with_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from calibclip._checks import (
    check_choice,
    check_floating,
    check_same_device,
    check_same_shape,
    check_size,
    describe,
    wrong,
)

NormAxis = Literal["token", "channel"]

__all__ = ["complementary_attention", "text_guided_attention", "upsample_attention"]


def text_guided_attention(
    tokens: Tensor,
    text_features: Tensor,
    *,
    image_size: int | Sequence[int] | None = 224,
    norm_axis: NormAxis = "token",
    grid_size: Sequence[int] | None = None,
) -> Tensor:
    r"""Map of how well each patch of an image matches the text of one class, in [0, 1].

    .. math::
        s_n = \sum_d \frac{z_{nd}}{\lVert z \rVert}\,t_d, \qquad
        A_n = \frac{s_n - \min_m s_m}{\max_m s_m - \min_m s_m}, \qquad n, m = 1 \dots N

    with tokens ``z``, of which number 0 is the class token, and the text feature ``t``, whose
    length does not matter. The ``N`` values are laid out on the grid of patches, row by row, and
    enlarged to the image. The published norm runs along the *tokens*, the class token included:
    :math:`\lVert z \rVert = (\sum_{m=0}^N z_{md}^2)^{1/2}`, one for each channel. So channels are
    brought to one scale, and not tokens to one length; ``norm_axis="channel"`` does the latter and
    makes ``s`` a cosine up to the length of ``t``. The two give different maps.

    Nothing is detached: minimum, maximum and norm are differentiated as well. A map without any
    contrast, 0/0 in the published formula, is 0 here and has gradient 0; so has a zero norm.

    Args:
        tokens: Projected into the joint space, class token first, shape ``(B, 1 + N, D)``.
        text_features: That of each image's class, shape ``(B, D)``, for example
            ``classifier.text_features[target]``.
        image_size: Height and width of the map, or one number for both. ``None``: the map stays on
            the grid, for :func:`upsample_attention` later.
        norm_axis: ``"token"`` (published) or ``"channel"``.
        grid_size: Rows and columns of patches. ``None``: ``N`` is a square number.

    Returns:
        Shape ``(B, *image_size)``, float32 (float64 if one input is), also under autocast.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Tokens that are not 3-D or have no patches, text features of another shape or
            device than the images need, ``N`` that does not fit the grid, or an unknown norm axis.

    Example:
        >>> tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 0.0]]])
        >>> text_guided_attention(tokens, torch.tensor([[1.0, 0.5]]), image_size=None)
        tensor([[[0.3333, 0.1667],
                 [1.0000, 0.0000]]])

    References:
        Yu et al. (2024), "Text-Guided Attention is All You Need for Zero-Shot Robustness in
        Vision-Language Models", https://arxiv.org/abs/2410.21802; the norm, the minimum and the
        maximum are those of its code, https://github.com/zhyblue424/TGA-ZSR.
    """
    check_floating("tokens", tokens, shape="(B, 1 + N, D)", ndim=3)
    check_floating("text_features", text_features, shape="(B, D)", ndim=2)
    check_choice("norm_axis", norm_axis, ("token", "channel"))
    if text_features.shape != (tokens.shape[0], tokens.shape[2]):
        expected = f"one row for each image, shape ({tokens.shape[0]}, {tokens.shape[2]})"
        remedy = "take that of each image's class, text_features[target]"
        raise ValueError(wrong("text_features", expected, describe(text_features), remedy))
    check_same_device("text_features", text_features, "tokens", tokens)
    rows, columns = _grid(tokens, grid_size)
    dtype = torch.promote_types(tokens.dtype, text_features.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    tokens, text = tokens.to(dtype), text_features.to(dtype)
    # A division of the text or of the sums, not of the tokens: no second tensor of their size is
    # kept. Products and sums, because autocast would lower a matrix product.
    if norm_axis == "token":
        text = _ratio(text, torch.linalg.vector_norm(tokens, dim=1))
    scores = (tokens[:, 1:] * text.unsqueeze(1)).sum(-1)
    if norm_axis == "channel":
        scores = _ratio(scores, torch.linalg.vector_norm(tokens[:, 1:], dim=2))
    lowest = scores.amin(dim=1, keepdim=True)
    highest = scores.amax(dim=1, keepdim=True)
    maps = _ratio(scores - lowest, highest - lowest).view(-1, rows, columns)
    return maps if image_size is None else upsample_attention(maps, image_size)


def complementary_attention(
    tokens: Tensor,
    text_features: Tensor,
    negative_text_features: Tensor,
    *,
    image_size: int | Sequence[int] | None = 224,
    norm_axis: NormAxis = "token",
    grid_size: Sequence[int] | None = None,
) -> Tensor:
    r"""Attention to a class where there is none to its negation.

    .. math:: A = A^+ \odot (1 - A^-)

    with the :func:`text_guided_attention` of both texts, multiplied after the enlargement. In the
    published code the texts are "This is a photo of a {}" and "This is not a photo of a {}".

    Args:
        tokens: Projected into the joint space, class token first, shape ``(B, 1 + N, D)``.
        text_features: That of each image's class, shape ``(B, D)``.
        negative_text_features: That of the negated prompt of the same class, shape ``(B, D)``; for
            example the ``text_features[target]`` of a second classifier, built with the template
            ``"This is not a photo of a {}"``.
        image_size: As for :func:`text_guided_attention`. With ``None`` the product is taken on the
            grid: enlarged afterwards it is close to, but not, the published map.
        norm_axis: As for :func:`text_guided_attention`.
        grid_size: As for :func:`text_guided_attention`.

    Returns:
        Shape ``(B, *image_size)``, in [0, 1], float32 (float64 if an input is).

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: As for :func:`text_guided_attention`, or two text features that differ in shape
            or device.

    Example:
        >>> tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 0.0]]])
        >>> positive, negative = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, 1.0]])
        >>> complementary_attention(tokens, positive, negative, image_size=None)
        tensor([[[0.3333, 0.0833],
                 [0.0000, 0.0000]]])

    References:
        Yu et al., "Complementary Text-Guided Attention for Zero-Shot Adversarial Robustness", IEEE
        TPAMI 2026; code at https://github.com/zhyblue424/TGA-ZSR.
    """
    check_floating("text_features", text_features, shape="(B, D)", ndim=2)
    check_floating("negative_text_features", negative_text_features, shape="(B, D)", ndim=2)
    check_same_shape(
        "negative_text_features", negative_text_features, "text_features", text_features
    )
    positive, negative = (
        text_guided_attention(
            tokens, text, image_size=image_size, norm_axis=norm_axis, grid_size=grid_size
        )
        for text in (text_features, negative_text_features)
    )
    return positive * (1 - negative)


def upsample_attention(maps: Tensor, image_size: int | Sequence[int]) -> Tensor:
    """Enlarge maps from the grid of patches to the image, bilinearly.

    The last step of :func:`text_guided_attention`, on its own so that the much smaller maps of a
    frozen reference can be kept. Pixel centres are aligned, not corners (``align_corners=False``).

    Args:
        maps: Shape ``(B, h, w)``.
        image_size: Height and width of the result, or one number for both.

    Returns:
        Shape ``(B, *image_size)``, float32 (float64 for float64 maps).

    Raises:
        TypeError: ``maps`` is not a floating-point tensor, or a size is not an integer.
        ValueError: ``maps`` is not 3-D, or a size is below 1.

    Example:
        >>> upsample_attention(torch.tensor([[[0.0, 1.0]]]), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])

    References:
        https://github.com/zhyblue424/TGA-ZSR. Comp-TGA's antialiased resize is the same where maps
        are enlarged.
    """
    check_floating("maps", maps, shape="(B, h, w)", ndim=3)
    size = check_size("image_size", image_size)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32)).unsqueeze(1)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).squeeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # x / inf is 0 and passes no gradient on, where 0 / 0 would be NaN in both.
    return numerator / denominator.masked_fill(denominator == 0, math.inf)


def _grid(tokens: Tensor, grid_size: Sequence[int] | None) -> tuple[int, int]:
    n_patches = tokens.shape[1] - 1
    if n_patches < 1:
        expected = "a class token and at least one patch, shape (B, 1 + N, D)"
        raise ValueError(wrong("tokens", expected, describe(tokens)))
    if grid_size is None:
        side = math.isqrt(n_patches)
        if side * side != n_patches:
            expected = "1 + N tokens with N a square number"
            remedy = "keep the class token, or pass grid_size=(rows, columns)"
            raise ValueError(wrong("tokens", expected, describe(tokens), remedy))
        return side, side
    rows, columns = check_size("grid_size", grid_size)
    if rows * columns != n_patches:
        expected = f"rows and columns of {n_patches} patches"
        raise ValueError(wrong("grid_size", expected, (rows, columns)))
    return rows, columns
