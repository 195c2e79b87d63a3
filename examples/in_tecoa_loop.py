"""calibclip in a loop for OpenAI's ``clip`` package, as TeCoA and the methods after it write it.

Such a loop has a PGD of its own, encodes the prompts again in every forward pass, and ends in a
cross-entropy. Two lines replace three::

    - images_adv = attack(model, images, labels, prompts)
    + images_adv = pgd(classifier, images, labels, EPS, STEP_SIZE, STEPS, generator=generator)
    - logits_adv, _ = model(normalize(images_adv), prompts)
    - loss = F.cross_entropy(logits_adv, labels)
    + loss = align(classifier(images_adv), reference(images), labels)

``classifier`` has the prompts encoded once and normalises the images; ``reference`` is its frozen
copy. ``TeCoALoss()(classifier(images_adv), labels)`` is the loss as it was.

    python examples/in_tecoa_loop.py                       half a minute on one core
    python examples/in_tecoa_loop.py --weights ViT-B/32    OpenAI's, which clip.load downloads

On PyPI ``clip`` is clip-anytorch; its version 2.6 needs setuptools < 81.
"""

from __future__ import annotations

import copy

import _digits
import torch
from _digits import DEVICE, EPS, NAMES, STEP_SIZE, STEPS, TEMPLATE

from calibclip import DirichletAlignLoss, ZeroShotClassifier, pgd


def load_classifier(weights: str | None, quick: bool) -> ZeroShotClassifier:
    """Load OpenAI's model, or train a tiny one of the same interface."""
    if weights is None:
        model, tokenizer = _digits.tiny_clip(quick)
        return ZeroShotClassifier.from_open_clip(model, tokenizer, NAMES, (TEMPLATE,))
    import clip

    model, _ = clip.load(weights, device=DEVICE)
    model.float()  # on a GPU clip loads float16 weights, which AdamW cannot train
    return ZeroShotClassifier.from_openai_clip(model, clip.tokenize, NAMES, (TEMPLATE,))


def main() -> None:
    arguments = _digits.parse_arguments(__doc__, weights="a name or a file for clip.load")
    tiny = arguments.weights is None
    classifier = load_classifier(arguments.weights, arguments.quick)
    digits = _digits.load(classifier.image_size, arguments.quick)
    _digits.print_accuracy("before", classifier, digits)

    reference = copy.deepcopy(classifier).requires_grad_(False)
    # None is the paper's weight, for OpenAI's range of cosines; docs/closed-form.md says more.
    align = DirichletAlignLoss(classifier.logit_scale, relative_weight=1.0 if tiny else None)
    model = classifier.model
    visual, text = model.get_submodule("visual"), model.get_submodule("transformer")
    passes = _digits.Passes(
        image=visual, reference=reference.model.get_submodule("visual"), text=text
    )
    optimizer = torch.optim.AdamW(visual.parameters(), lr=1e-3 if tiny else 1e-5)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for images, labels in _digits.batches(digits, epochs=2 if arguments.quick else 8):
        # was: images_adv = attack(model, images, labels, prompts)
        images_adv = pgd(classifier, images, labels, EPS, STEP_SIZE, STEPS, generator=generator)
        # was: logits_adv, _ = model(normalize(images_adv), prompts)
        # was: loss = F.cross_entropy(logits_adv, labels)
        loss = align(classifier(images_adv), reference(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    _digits.print_losses(losses)
    passes.print(len(losses))
    _digits.print_accuracy("after", classifier, digits)
    _digits.print_time()


if __name__ == "__main__":
    main()
