"""calibclip in open_clip's own training: its options, its ``train_one_epoch``, its loss.

open_clip distils: with ``args.distill`` its loop runs a second model on every batch, and hands both
outputs to the loss. That is the place of the frozen reference. Two lines change, and
``train_one_epoch(model, data, loss, ..., dist_model, args)`` stays::

    - dist_model = create_model(args.distill_model, args.distill_pretrained)
    + model, dist_model = AttackedClip(classifier), AttackedClip(copy.deepcopy(classifier))
    - loss = create_loss(args)
    + loss = AlignedClipLoss(align, args)

``AttackedClip`` attacks the images in training mode, with the captions of the batch as the classes;
in evaluation mode, in which the loop runs ``dist_model``, it does not. It also normalises: leave
that out of the data. The text tower and the logit scale are locked, as usual under attack. The
script is for a single process, and without ``--accum-freq``, with which open_clip does not distil.
There are ten captions, so that a batch repeats some, which the contrastive loss takes for different
ones: real captions differ.

    python examples/in_open_clip_training.py                  half a minute on one core
    python examples/in_open_clip_training.py --model ViT-B-32-quickgelu --pretrained openai \
        --precision amp_bf16 --lr 1e-5                        any options of open_clip's training
"""

from __future__ import annotations

import argparse
import copy
import sys
from types import SimpleNamespace
from typing import Any

import _digits
import open_clip
import torch
from _digits import DEVICE, EPS, NAMES, STEP_SIZE, STEPS, TEMPLATE
from open_clip.loss import DistillClipLoss
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calibclip import DirichletAlignLoss, ZeroShotClassifier, pgd

DEFAULTS = f"--model tiny --device {DEVICE} --precision fp32 --batch-size 32 --lr 1e-3 --warmup 20"


class Captioned(nn.Module):
    """The captions of a batch as classes: a module, so that the attack leaves no trace on it."""

    def __init__(
        self, classifier: ZeroShotClassifier, text_features: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.classifier, self.text_features, self.scale = classifier, text_features, scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.classifier.features(images) @ self.text_features.T


class AttackedClip(nn.Module):
    """What open_clip's loop calls as its model: pixels in [0, 1] and captions in, features out."""

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.generator = torch.Generator().manual_seed(0)

    @property
    def module(self) -> Any:
        """The model, under the name by which open_clip sees through a wrapper."""
        return self.classifier.model

    def forward(self, images: Tensor, captions: Tensor) -> dict[str, Tensor]:
        text_features = self.module.encode_text(captions, normalize=True).float()
        scale = self.module.logit_scale.exp()
        if self.training:
            attacked = Captioned(self.classifier, text_features, scale)
            own = torch.arange(len(images), device=images.device)
            images = pgd(attacked, images, own, EPS, STEP_SIZE, STEPS, generator=self.generator)
        return {
            "image_features": self.classifier.features(images),
            "text_features": text_features,
            "logit_scale": scale,
        }


class AlignedClipLoss(DistillClipLoss):
    """open_clip's contrastive loss, with the alignment in the place of its distillation."""

    def __init__(self, align: DirichletAlignLoss, args: argparse.Namespace) -> None:
        super().__init__(args.local_loss, args.gather_with_grad, False, args.rank, args.world_size)
        self.align = align

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):  # pyright: ignore[reportMissingParameterType]
        with torch.autocast(image_features.device.type, enabled=False):  # cosines in float32
            features = image_features.float(), text_features.float()
            return super().get_logits(*features, logit_scale, logit_bias)

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return self.align(student_logits, teacher_logits)


def training_data(digits: _digits.Digits, captions: Tensor, batch_size: int) -> SimpleNamespace:
    """Return what the loop needs of its data."""
    pairs = TensorDataset(digits.images.cpu(), captions[digits.labels.cpu()])
    loader = DataLoader(pairs, batch_size, shuffle=True, drop_last=True)
    vars(loader).update(num_batches=len(loader), num_samples=len(pairs))
    return SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)


def load_model(args: argparse.Namespace, quick: bool) -> tuple[Any, Any]:
    """Return the model, of which only the image tower trains, and its tokenizer."""
    model: Any
    if args.model == "tiny":
        model, tokenizer = _digits.tiny_clip(quick)
    else:
        model = open_clip.create_model(args.model, args.pretrained, precision=args.precision)
        tokenizer = open_clip.get_tokenizer(args.model)
    model.lock_text_tower()
    model.logit_scale.requires_grad_(False)
    return model.to(args.device), tokenizer


def main() -> None:
    quick = "--quick" in sys.argv
    options = [option for option in sys.argv[1:] if option != "--quick"]
    args = parse_args([*DEFAULTS.split(), "--epochs", "2" if quick else "8", *options])
    args.distill, args.wandb = True, False
    init_distributed_device(args)
    model, tokenizer = load_model(args, quick)
    classifier = ZeroShotClassifier.from_open_clip(model, tokenizer, NAMES, (TEMPLATE,))
    digits = _digits.load(classifier.image_size, quick)
    data = {"train": training_data(digits, tokenizer(_digits.PROMPTS), args.batch_size)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, args.lr, (args.beta1, args.beta2), args.eps, args.wd)
    steps = data["train"].dataloader.num_batches * args.epochs
    scheduler = cosine_lr(optimizer, args.lr, args.warmup, steps)
    scaler = torch.amp.GradScaler(args.device) if args.precision == "amp" else None

    _digits.print_accuracy("before", classifier, digits)
    # None is the paper's weight, for OpenAI's range of cosines; docs/closed-form.md says more.
    relative_weight = 1.0 if args.model == "tiny" else None
    align = DirichletAlignLoss(classifier.logit_scale, relative_weight=relative_weight)
    # was: dist_model = create_model(args.distill_model, args.distill_pretrained)
    model, dist_model = AttackedClip(classifier), AttackedClip(copy.deepcopy(classifier))
    # was: loss = create_loss(args)
    loss = AlignedClipLoss(align, args)
    losses: list[float] = []
    loss.register_forward_hook(lambda *call: losses.append(sum(x.item() for x in call[2].values())))
    passes = _digits.Passes(image=model.module.visual, reference=dist_model.module.visual)
    for epoch in range(args.epochs):
        train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args)
    _digits.print_losses(losses)
    passes.print(len(losses))
    _digits.print_accuracy("after", classifier, digits)
    _digits.print_time()


if __name__ == "__main__":
    main()
