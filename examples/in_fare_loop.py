"""calibclip in FARE's loop: an image encoder alone, without labels and without text.

The attack drives the embedding away from that of the frozen encoder on the clean image, and the
training brings it back. Two lines of such a loop change::

    - images_adv = attack_embedding(encoder, images, features_ref)
    + images_adv = attack(encoder, images, reference=features_ref)
    - loss = (encoder(images_adv) - features_ref).square().sum(1).mean()
    + loss = fare(encoder(images_adv), features_ref)

``attack`` is ``partial(pgd, target=None, objective="embedding-l2", eps=..., generator=...)``.
``encoder`` can be any callable, such as ``classifier.embed`` of a ``ZeroShotClassifier``. It takes
pixels in [0, 1], so the normalisation belongs in it. ``SimCLIPLoss`` in the last line is Sim-CLIP.

    python examples/in_fare_loop.py                            half a minute on one core
    python examples/in_fare_loop.py --model ViT-B-32-quickgelu --pretrained openai
"""

from __future__ import annotations

import copy
from argparse import Namespace
from functools import partial

import _digits
import open_clip
import torch
from _digits import DEVICE, EPS, STEP_SIZE, STEPS, Digits
from torch import nn
from torchvision.transforms import Normalize

from calibclip import FARELoss, pgd


def load_encoder(arguments: Namespace) -> tuple[nn.Module, tuple[int, int]]:
    """Return an encoder of images in [0, 1], and the size of its input."""
    if arguments.model is None:
        model, _ = _digits.tiny_clip(arguments.quick)
    else:
        model = open_clip.create_model(arguments.model, arguments.pretrained, device=DEVICE)
    config = open_clip.get_model_preprocess_cfg(model)
    normalize = Normalize(
        config.get("mean", open_clip.OPENAI_DATASET_MEAN),
        config.get("std", open_clip.OPENAI_DATASET_STD),
    )
    return nn.Sequential(normalize, model.get_submodule("visual")).eval(), config["size"]


@torch.no_grad()
def print_drift(when: str, encoder: nn.Module, reference: nn.Module, digits: Digits) -> None:
    """Print how far the embeddings move, and how many stay with the mean of their class."""
    images, labels, features_ref = digits.test_images, digits.test_labels, reference(digits.images)
    means = torch.stack([features_ref[digits.labels == digit].mean(0) for digit in range(10)])
    features_ref = reference(images)
    drift_attack = partial(pgd, objective="embedding-l2", reference=features_ref)
    attacked = drift_attack(encoder, images, None, EPS, None, 10)
    drifts, accuracies = [], []
    for features in encoder(images), encoder(attacked):
        drift = (features - features_ref).square().sum(1) / features_ref.square().sum(1)
        hits = torch.cdist(features, means).argmin(1) == labels
        drifts.append(drift.mean())
        accuracies.append(hits.float().mean())
    print(
        f"{when}: drift {drifts[0]:.3f} clean, {drifts[1]:.3f} attacked; "
        f"accuracy {accuracies[0]:.1%} clean, {accuracies[1]:.1%} attacked"
    )


def main() -> None:
    arguments = _digits.parse_arguments(__doc__, model="a model of open_clip", pretrained="its tag")
    encoder, size = load_encoder(arguments)
    digits = _digits.load(size, arguments.quick)

    reference = copy.deepcopy(encoder).requires_grad_(False)
    fare = FARELoss()
    print("drift: squared distance from the original clean embedding, by its squared length")
    print_drift("before", encoder, reference, digits)
    passes = _digits.Passes(image=encoder, reference=reference)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5 if arguments.model else 1e-3)
    generator = torch.Generator().manual_seed(0)
    attack = partial(
        pgd,
        target=None,
        objective="embedding-l2",
        eps=EPS,
        step_size=STEP_SIZE,
        steps=STEPS,
        generator=generator,
    )
    losses = []
    for images, _ in _digits.batches(digits, epochs=2 if arguments.quick else 8):
        features_ref = reference(images)
        # was: images_adv = attack_embedding(encoder, images, features_ref)
        images_adv = attack(encoder, images, reference=features_ref)
        # was: loss = (encoder(images_adv) - features_ref).square().sum(1).mean()
        loss = fare(encoder(images_adv), features_ref)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    _digits.print_losses(losses)
    passes.print(len(losses))
    print_drift("after", encoder, reference, digits)
    _digits.print_time()


if __name__ == "__main__":
    main()
