"""Do adversarial images of one model fool another? Every model against every model's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibclip._checks import check_count, check_target, describe, wrong
from calibclip.attacks._arguments import check_found, check_images
from calibclip.attacks._model import attacked_by_margin, borrowed

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class TransferMatrix:
    """Accuracy of each model on the images that were made against each model.

    ``str()`` is a table in percent: a row per source, a column per victim, and the clean images.

    Attributes:
        names: Names of the ``M`` models.
        accuracy: Share of right predictions, shape ``(M, M)``, float64, on the CPU: row the model
            that was attacked (source), column the model that looked at the images (victim).
        clean: The same on the clean images, shape ``(M,)``.
        images: Adversarial images by source.
    """

    names: tuple[str, ...]
    accuracy: Tensor
    clean: Tensor
    images: dict[str, Tensor]

    def __repr__(self) -> str:
        rows = [
            *zip(self.names, self.accuracy.tolist(), strict=True),
            ("clean", self.clean.tolist()),
        ]
        lines = [["source \\ victim", *self.names]]
        lines += [[name, *(f"{100 * value:.1f}" for value in values)] for name, values in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if position else cell.ljust(width)
                for position, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def transfer_matrix(
    models: Mapping[str, Model],
    attack: Callable[[Model, Tensor, Tensor], Any],
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int | None = None,
) -> TransferMatrix:
    r"""Attack each model once, and evaluate every model on all the images.

    .. math:: A_{sv} = \frac1B \sum_i \mathbb 1[\operatorname{argmax} z_v(x_i^{(s)}) = y_i]

    with ``x^(s)`` the images that ``attack`` made against model ``s``. The diagonal is the
    white-box accuracy. It should be the lowest number of its column: a model that fares worse on
    images made against another one has probably masked its gradients, and its white-box accuracy
    says too much.

    A sample counts where the first of the largest logits is the target's, in full precision. Where
    they are NaN it does not.

    Args:
        models: By name, callables from images to logits ``(B, K)``. Modules are evaluated in eval
            mode, and each submodule has its own mode back afterwards.
        attack: Callable ``(model, images, target)`` that returns a result or the images alone; a
            `WorstCase` will do.
        images: Clean images, shape ``(B, ...)`` with ``B >= 1``, floating. Not modified.
        target: True classes, shape ``(B,)``, int64.
        batch_size: Images in one forward pass of the evaluation; None: all. The attack gets all
            images at once.

    Returns:
        The accuracies, and the images by source.

    Raises:
        TypeError: An argument, or what the attack or a model returned, has the wrong type.
        ValueError: No model, no image, classes out of range, or a wrong shape.

    Example:
        >>> from calibclip.attacks import PGD
        >>> models = {"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 3)}
        >>> matrix = transfer_matrix(models, PGD(eps=0.1), torch.rand(8, 4), torch.arange(8) % 3)
        >>> matrix.accuracy.shape
        torch.Size([2, 2])

    References:
        Papernot, McDaniel and Goodfellow (2016), Transferability in machine learning, figure 3,
        https://arxiv.org/abs/1605.07277; masked gradients: Athalye, Carlini and Wagner (2018),
        Obfuscated gradients give a false sense of security, section 3.1,
        https://arxiv.org/abs/1802.00420
    """
    _check_models(models)
    if not callable(attack):
        raise TypeError(wrong("attack", "a callable (model, images, target)", describe(attack)))
    clean = check_images(images, None)
    if len(clean) == 0:
        raise ValueError(wrong("images", "at least one image", describe(images)))
    target = check_target(target, len(clean), None, clean.device)
    size = check_count("batch_size", len(clean) if batch_size is None else batch_size, at_least=1)
    crafted = {name: _crafted(attack, model, clean, target) for name, model in models.items()}
    sets = [*crafted.values(), clean]
    columns = [_accuracies(model, sets, target, size) for model in models.values()]
    shares = torch.tensor(columns, dtype=torch.float64).T
    return TransferMatrix(tuple(models), shares[:-1], shares[-1], crafted)


def _accuracies(model: Model, sets: list[Tensor], target: Tensor, batch_size: int) -> list[float]:
    """Return the share of right predictions on each set of images."""
    judge, shares = attacked_by_margin(model, target), []
    for images in sets:
        lead, wrong = judge.verdict(images, target, batch_size)
        shares.append(float((~wrong & ~lead.isnan()).double().mean()))
    return shares


def _crafted(attack: Callable[..., Any], model: Model, clean: Tensor, target: Tensor) -> Tensor:
    """Run an attack, which may be anybody's, on copies."""
    with borrowed(model):
        found = attack(model, clean.clone(), target.clone())
    return check_found(found, clean).to(clean.dtype)


def _check_models(models: object) -> None:
    expected = "a mapping from names to models"
    if not isinstance(models, Mapping):
        raise TypeError(wrong("models", expected, describe(models), 'pass {"name": model, ...}'))
    if not models:
        raise ValueError(wrong("models", "at least one model", "none"))
    for name, model in models.items():
        if not isinstance(name, str) or not callable(model):
            raise TypeError(wrong("models", expected, f"{name!r}: {type(model).__name__}"))
