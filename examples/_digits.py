"""What the four ``in_*.py`` loops share: real digits, a tiny CLIP, clean training, accuracies.

Nothing here is part of the change that they show.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize

from calibclip import PGD, metrics

if TYPE_CHECKING:
    from open_clip.model import CLIP

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = "a photo of the digit {}"
PROMPTS = [TEMPLATE.format(name) for name in NAMES]
SIZE = 16  # of the tiny models' input
EPS, STEP_SIZE, STEPS = 8 / 255, 6 / 255, 2  # the attack in training, for pixels in [0, 1]
STARTED = time.perf_counter()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# OpenAI's, which a ``ZeroShotClassifier`` applies itself to a model that records no other.
normalize = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def parse_arguments(doc: str | None, **weights: str) -> argparse.Namespace:
    """Read the command line: ``--quick``, and an option with this help for each of ``weights``."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for name, text in weights.items():
        parser.add_argument(f"--{name}", help=f"{text}; default: a tiny model, trained first")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a test")
    return parser.parse_args()


class Digits(NamedTuple):
    """Images in [0, 1], shape (N, 3, size, size), and labels, for training and held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(size: int | tuple[int, int] | None, quick: bool) -> Digits:
    """Enlarge scikit-learn's 8 × 8 scans to the model's input; ``None`` is the tiny models'."""
    pixels, target = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(target, dtype=torch.int64, device=DEVICE)
    images = F.interpolate(images.to(DEVICE), size=size or SIZE, mode="bilinear").expand(
        -1, 3, -1, -1
    )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    train, test = order[300:], order[: 100 if quick else 300]
    return Digits(images[train], labels[train], images[test], labels[test])


def batches(digits: Digits, epochs: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle the training images in every epoch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(digits.labels), generator=generator).to(DEVICE)
        for index in order.split(size):
            yield digits.images[index], digits.labels[index]


def tiny_clip(quick: bool) -> tuple[CLIP, Callable[[list[str]], Tensor]]:
    """Build a tiny open_clip model and train it on the digits; return it and its tokenizer."""
    import open_clip  # here, since the loop in transformers does not need it
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(
        image_size=SIZE, patch_size=4, width=64, layers=2, head_width=32, mlp_ratio=4.0
    )
    text = open_clip.CLIPTextCfg(context_length=16, width=64, heads=2, layers=1)
    model = CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).to(DEVICE)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    prompts = tokenizer(PROMPTS).to(DEVICE)
    model.token_embedding.requires_grad_(False)  # 3 M parameters for the ten words that occur

    def logits_of(images: Tensor) -> Tensor:
        image_features = model.encode_image(normalize(images), normalize=True)
        text_features = model.encode_text(prompts, normalize=True)
        return model.logit_scale.exp() * image_features @ text_features.T

    train_clean(logits_of, model, quick)
    return model.eval(), tokenizer


def train_clean(logits_of: Callable[[Tensor], Tensor], model: nn.Module, quick: bool) -> None:
    """Train on clean images: what a checkpoint has behind it."""
    digits, epochs = load(None, quick), 6 if quick else 16
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    steps = sum(1 for _ in batches(digits, epochs))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.2)
    for images, labels in batches(digits, epochs):
        loss = F.cross_entropy(logits_of(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def print_accuracy(when: str, model: nn.Module, digits: Digits) -> None:
    """Print the accuracy on held-out images, clean and at the worst point of ten attack steps."""
    model.eval()
    attack = PGD(eps=EPS, steps=10)
    logits, logits_adv = [], []
    chunks = zip(digits.test_images.split(100), digits.test_labels.split(100), strict=True)
    for images, labels in chunks:
        attacked = attack(model, images, labels).images
        with torch.no_grad():
            logits.append(model(images))
            logits_adv.append(model(attacked))
    clean, robust = (
        metrics.accuracy(logits=torch.cat(parts), target=digits.test_labels)
        for parts in (logits, logits_adv)
    )
    print(f"{when}: accuracy {clean:.1%} clean, {robust:.1%} attacked")


def print_time() -> None:
    print(f"{time.perf_counter() - STARTED:.0f} s in all")


def print_losses(losses: list[Tensor] | list[float]) -> None:
    print(f"loss: {losses[0]:.4g} in the first step, {losses[-1]:.4g} in the last")


class Passes:
    """Count the forward passes of encoders."""

    def __init__(self, **encoders: nn.Module) -> None:
        self.counts = dict.fromkeys(encoders, 0)
        for name, encoder in encoders.items():
            encoder.register_forward_hook(lambda *_, name=name: self._count(name))

    def _count(self, name: str) -> None:
        self.counts[name] += 1

    def print(self, steps: int) -> None:
        counts = ", ".join(f"{name} {count / steps:g}" for name, count in self.counts.items())
        print(f"encoder passes in each step: {counts}")
