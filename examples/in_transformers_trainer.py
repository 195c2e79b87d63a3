"""calibclip in a ``Trainer`` of transformers, a subclass that overrides ``compute_loss``.

Such an override attacks the batch, encodes it together with the prompts, and ends in a
cross-entropy. Two lines of it change::

    - logits_adv = model(pixel_values=images_adv, **self.prompts).logits_per_image
    + logits_adv = model(images_adv)
    - loss = F.cross_entropy(logits_adv, labels)
    + loss = self.align(logits_adv, self.reference(images), labels)

``self.attack`` becomes a ``partial`` of ``pgd``. ``model`` is now a ``ZeroShotClassifier``, as an
``nn.Module`` like any other to the ``Trainer``. It has the prompts encoded once and normalises the
images itself, so ``pixel_values`` are in [0, 1]; ``model.model`` is the CLIPModel, for
``save_pretrained``. ``reference`` is its frozen copy.

    python examples/in_transformers_trainer.py                        half a minute on one core
    python examples/in_transformers_trainer.py --weights openai/clip-vit-base-patch32
"""

from __future__ import annotations

import copy
import string
import tempfile
from functools import partial
from typing import Any

import _digits
import torch
from _digits import DEVICE, EPS, NAMES, STEP_SIZE, STEPS, TEMPLATE
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from calibclip import DirichletAlignLoss, ZeroShotClassifier, pgd


class AlignTrainer(Trainer):
    """Train a classifier under attack; the prediction stays aligned with the reference's."""

    def __init__(self, *, relative_weight: float | None, **options: Any) -> None:
        super().__init__(**options)
        classifier = options["model"]
        self.reference = copy.deepcopy(classifier).requires_grad_(False)
        self.align = DirichletAlignLoss(classifier.logit_scale, relative_weight=relative_weight)
        generator = torch.Generator().manual_seed(0)
        self.attack = partial(pgd, eps=EPS, step_size=STEP_SIZE, steps=STEPS, generator=generator)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        images, labels = inputs["pixel_values"], inputs["labels"]
        images_adv = self.attack(model, images, labels)
        # was: logits_adv = model(pixel_values=images_adv, **self.prompts).logits_per_image
        logits_adv = model(images_adv)
        # was: loss = F.cross_entropy(logits_adv, labels)
        loss = self.align(logits_adv, self.reference(images), labels)
        return (loss, {"logits": logits_adv}) if return_outputs else loss


def tiny_model(quick: bool) -> tuple[CLIPModel, CLIPTokenizer]:
    """Build a tiny CLIPModel and a tokenizer that spells, and train the model on the digits."""
    torch.manual_seed(0)
    letters = string.ascii_lowercase
    symbols = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer({symbol: index for index, symbol in enumerate(symbols)}, [])
    width: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    image = {"image_size": _digits.SIZE, "patch_size": 4, "num_hidden_layers": 2}
    text = {"max_position_embeddings": 32, "vocab_size": len(symbols), "num_hidden_layers": 1}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device(DEVICE):
        model = CLIPModel(
            CLIPConfig(text_config=width | text, vision_config=width | image, projection_dim=64)
        )
    prompts = tokenizer(_digits.PROMPTS, padding=True, return_tensors="pt").to(DEVICE)

    def logits_of(images: Tensor) -> Tensor:
        return model(pixel_values=_digits.normalize(images), **prompts).logits_per_image

    _digits.train_clean(logits_of, model, quick)
    return model.eval(), tokenizer


def main() -> None:
    arguments = _digits.parse_arguments(__doc__, weights="a name or a folder for from_pretrained")
    tiny = arguments.weights is None
    if tiny:
        model, processor = tiny_model(arguments.quick)
    else:
        model = CLIPModel.from_pretrained(arguments.weights, device_map=DEVICE)
        processor = AutoProcessor.from_pretrained(arguments.weights)
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    model.visual_projection.requires_grad_(True)
    classifier = ZeroShotClassifier.from_transformers(model, processor, NAMES, (TEMPLATE,))
    digits = _digits.load(classifier.image_size, arguments.quick)
    _digits.print_accuracy("before", classifier, digits)

    pairs = zip(digits.images.cpu(), digits.labels.cpu(), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AlignTrainer(
            # None is the paper's weight, for OpenAI's range of cosines; see docs/closed-form.md.
            relative_weight=1.0 if tiny else None,
            model=classifier,
            train_dataset=[{"pixel_values": image, "labels": label} for image, label in pairs],
            args=TrainingArguments(
                folder,
                use_cpu=DEVICE == "cpu",
                num_train_epochs=2 if arguments.quick else 8,
                per_device_train_batch_size=32,
                learning_rate=1e-3 if tiny else 1e-5,
                remove_unused_columns=False,  # the classifier's own argument is called images
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        passes = _digits.Passes(
            image=model.vision_model,
            reference=trainer.reference.model.get_submodule("vision_model"),
            text=model.text_model,
        )
        trainer.train()
    _digits.print_losses([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    passes.print(trainer.state.global_step)
    _digits.print_accuracy("after", classifier, digits)
    _digits.print_time()


if __name__ == "__main__":
    main()
