"""The encoder passes of a training step in finetune.py: those that the loss requires, each once.

A loss names its inputs ``<kind>_<view>``. The kind is logits, features or attention. The view says
which model saw which image: ``adv`` and ``clean`` the trained one, ``ref`` and ``adv_ref`` the
frozen one. One pass serves all kinds of a view.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibclip import ZeroShotClassifier, attention, pgd

# What an encoder pass has to return for each kind of input.
SOURCES = {"logits": "features", "features": "features", "attention": "grids"}

Kinds = frozenset[str]


def required(loss: Any, view: str) -> Kinds:
    """Return the kinds of input that a loss requires of a view."""
    parts = (name.split("_", 1) for name in loss.requires)
    return frozenset(kind for kind, its_view in parts if its_view == view)


def describe(
    loss: Any,
    attack_steps: int,
    keeps_references: bool,
    *,
    parts: int = 1,
    checkpointing: str | None = None,
) -> str:
    trained, frozen = (
        [view for view in views if required(loss, view)]
        for views in (("adv", "clean"), ("ref", "adv_ref"))
    )
    forward = attack_steps + len(trained) + len(frozen)
    kept = f" ({forward - 1} once the references are in memory)" if keeps_references else ""
    again = " (blocks run again)"
    in_attack, in_training = again * (checkpointing == "all"), again * (checkpointing is not None)
    each = f", for each of {parts} parts" if parts > 1 else ""
    return (
        f"{forward} forward{kept}, {attack_steps} backward to the pixels{in_attack}, "
        f"{len(trained)} to the weights{in_training}, 0 of the text encoder{each}"
    )


@dataclass(frozen=True)
class Encoder:
    """One pass of a classifier's image encoder, and the inputs of the loss made from it.

    Attributes:
        precision: Of autocast; ``None`` is full precision.
        negative_text: Text features ``(K, D)`` of Comp-TGA's negative prompts; ``None`` is TGA's
            attention.
    """

    precision: torch.dtype | None
    negative_text: Tensor | None

    def autocast(self, images: Tensor) -> torch.autocast:
        enabled = self.precision is not None
        return torch.autocast(images.device.type, self.precision, enabled)

    def encode(
        self, classifier: ZeroShotClassifier, images: Tensor, target: Tensor, kinds: Kinds
    ) -> dict[str, Tensor]:
        """Return features ``(B, D)`` and, for attention, grids ``(B, prompts, h, w)``."""
        with self.autocast(images):
            if "attention" not in kinds:
                return {"features": classifier.embed(images)}
            features, tokens = classifier.embed_with_tokens(images)
        texts = [classifier.text_features]
        if self.negative_text is not None:
            texts.append(self.negative_text)
        grids = [
            attention.text_guided_attention(tokens, text[target], image_size=None) for text in texts
        ]
        return {"features": features, "grids": torch.stack(grids, dim=1)}

    def inputs(
        self, classifier: ZeroShotClassifier, encoded: dict[str, Tensor], view: str, kinds: Kinds
    ) -> dict[str, Tensor]:
        inputs = {}
        if "features" in kinds:
            inputs[f"features_{view}"] = encoded["features"]
        if "logits" in kinds:
            inputs[f"logits_{view}"] = classifier.classify(encoded["features"])
        if "attention" in kinds:
            inputs[f"attention_{view}"] = self._enlarge(encoded["grids"], classifier.image_size)
        return inputs

    def _enlarge(self, grids: Tensor, image_size: Any) -> Tensor:
        maps = [attention.upsample_attention(grid, image_size) for grid in grids.unbind(1)]
        # The product of calibclip.attention.complementary_attention, after the enlargement.
        return maps[0] if len(maps) == 1 else maps[0] * (1 - maps[1])


@contextmanager
def checkpointed(visual: Any | None) -> Iterator[None]:
    """Let the passes in here keep of each block its input alone; ``None`` changes nothing.

    A backward pass may come later: it repeats what its forward pass was.
    """
    if visual is None:
        yield
        return
    visual.set_grad_checkpointing(True)
    try:
        yield
    finally:
        visual.set_grad_checkpointing(False)


class TrainedPasses(nn.Module):
    """The passes of the model that trains, and the loss: what DistributedDataParallel wraps."""

    loss: Any

    def __init__(
        self,
        classifier: ZeroShotClassifier,
        encoder: Encoder,
        loss: nn.Module,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.classifier, self.encoder, self.loss = classifier, encoder, loss
        self.visual = classifier.model.get_submodule("visual") if checkpointing else None
        self.takes_target = "target" in inspect.signature(loss.forward).parameters

    def forward(
        self, images_adv: Tensor, images: Tensor, target: Tensor, references: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the terms of the loss, of which ``total`` trains."""
        inputs = dict(references)
        with checkpointed(self.visual):
            for view, batch in (("adv", images_adv), ("clean", images)):
                if kinds := required(self.loss, view):
                    encoded = self.encoder.encode(self.classifier, batch, target, kinds)
                    inputs |= self.encoder.inputs(self.classifier, encoded, view, kinds)
        if self.takes_target:
            inputs["target"] = target
        return self.loss.terms(**inputs)._asdict()


class References:
    """The frozen model's inputs of the loss; on clean images each is computed once and kept.

    Args:
        frozen: The original classifier.
        encoder: As for the trained one.
        loss: Says what is required.
        keep: The number of images in the data, to keep what belongs to the clean ones in the
            memory of the CPU; ``None`` keeps nothing, as where an image differs from epoch to
            epoch.
        gather: Collects one object from each process, so that each keeps what all have computed.
    """

    def __init__(
        self,
        frozen: ZeroShotClassifier,
        encoder: Encoder,
        loss: nn.Module,
        *,
        keep: int | None,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.frozen, self.encoder, self.gather = frozen, encoder, gather
        self.clean_kinds, self.adv_kinds = required(loss, "ref"), required(loss, "adv_ref")
        self.known = None if keep is None else torch.zeros(keep, dtype=torch.bool)
        self.complete = False
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_clean(self, index: Tensor, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the inputs on clean images, whose positions in the data are ``index`` (CPU)."""
        if not self.clean_kinds:
            return {}
        if self.known is None:
            encoded = self.encoder.encode(self.frozen, images, target, self.clean_kinds)
        else:
            if not self.complete:
                self._compute_missing(self.known, index, images, target)
            encoded = {name: rows[index].to(images.device) for name, rows in self.kept.items()}
        return self.encoder.inputs(self.frozen, encoded, "ref", self.clean_kinds)

    @torch.no_grad()
    def on_attacked(self, images_adv: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not self.adv_kinds:
            return {}
        encoded = self.encoder.encode(self.frozen, images_adv, target, self.adv_kinds)
        return self.encoder.inputs(self.frozen, encoded, "adv_ref", self.adv_kinds)

    @torch.no_grad()
    def memory(self, image: Tensor) -> int:
        """Return the bytes that all kept references take, judged by one image."""
        if self.known is None or not self.clean_kinds:
            return 0
        target = torch.zeros(1, dtype=torch.int64, device=image.device)
        return len(self.known) * sum(
            rows.nbytes for rows in self._rows(image[None], target).values()
        )

    def _rows(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what is kept of images."""
        encoded = self.encoder.encode(self.frozen, images, target, self.clean_kinds)
        return {name: encoded[name].cpu() for name in {SOURCES[kind] for kind in self.clean_kinds}}

    def _compute_missing(
        self, known: Tensor, index: Tensor, images: Tensor, target: Tensor
    ) -> None:
        missing = ~known[index]
        computed = {}
        if missing.any():
            chosen = missing.to(images.device)
            computed = self._rows(images[chosen], target[chosen])
        # `known` is the same in all processes, so that all stop gathering in the same step.
        for their_index, their_rows in self.gather((index[missing], computed)):
            for name, rows in their_rows.items():
                if name not in self.kept:
                    self.kept[name] = rows.new_empty(len(known), *rows.shape[1:])
                self.kept[name][their_index] = rows
            known[their_index] = True
        self.complete = bool(known.all())


class Embeddings(nn.Module):
    """A classifier up to its embeddings, as a module that an attack can borrow."""

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.embed(images)


def craft(
    classifier: ZeroShotClassifier,
    encoder: Encoder,
    images: Tensor,
    target: Tensor,
    references: dict[str, Tensor],
    **options: Any,
) -> Tensor:
    """Attack the prediction or, where the loss holds embeddings (FARE), the embedding."""
    with encoder.autocast(images):
        if "features_ref" not in references:
            return pgd(classifier, images, target, **options)
        options |= {"objective": "embedding-l2", "reference": references["features_ref"]}
        return pgd(Embeddings(classifier), images, None, **options)
