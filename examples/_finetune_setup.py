"""From the options of finetune.py to all that a run consists of: data, model, loss, optimizer."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from _finetune_data import Digits, Labelled, labelled, open_images
from _finetune_options import PRECISIONS, build_loss, fit_schedule
from _finetune_passes import Encoder, References, TrainedPasses
from _finetune_world import World
from open_clip_train.scheduler import cosine_lr
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import Compose, Normalize

from calibclip import ZeroShotClassifier

NEGATIVE_TEMPLATE = "This is not a photo of a {}"  # Comp-TGA's


@dataclass(frozen=True)
class Run:
    """All that a training run consists of."""

    options: argparse.Namespace
    world: World
    classifier: ZeroShotClassifier
    val_classifier: ZeroShotClassifier
    original: ZeroShotClassifier  # the frozen copy of val_classifier
    loss: Any
    encoder: Encoder
    references: References
    trained: nn.Module  # TrainedPasses, behind DistributedDataParallel under torchrun
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]  # sets the learning rate of a step, the first being 0
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of the attack's starts; the same in all processes
    train_data: Labelled
    val_data: Labelled | None

    @property
    def visual(self) -> nn.Module:
        return self.classifier.model.get_submodule("visual")

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_data) // self.options.batch_size


def prepare(options: argparse.Namespace, world: World) -> Run:
    """Prepare a run; what can be wrong with options and data shows before the model is loaded."""
    torch.manual_seed(options.seed)
    check_model(options.model, options.pretrained)
    with world.one_process_first():
        train_data, val_data = open_data(options)
    fit_schedule(options, len(train_data), world.size)
    with world.one_process_first():
        model, augmented, plain = build_model(options, world.device)
        tokenizer = open_clip.get_tokenizer(options.model)
    if options.checkpointing:
        check_checkpointing(model.get_submodule("visual"))
    train_data = replace(train_data, transform=augmented if options.augment else plain)
    val_data = val_data and replace(val_data, transform=plain)

    # open_clip's own names of ImageNet hold two pairs of equals; print_plan names such classes.
    build = partial(ZeroShotClassifier.from_open_clip, model, tokenizer, allow_duplicates=True)
    classifier = build(train_data.class_names, (options.template,))
    # A sigmoid-trained model's: no softmax sees it, and UCAT reads cosines from the logits.
    classifier.logit_bias = 0.0
    val_classifier = classifier
    if val_data is not None and val_data.class_names != train_data.class_names:
        val_classifier = build(val_data.class_names, (options.template,))
    model.requires_grad_(False)
    frozen, original = copy.deepcopy((classifier, val_classifier))  # with one model
    weights = list(model.get_submodule("visual").requires_grad_().parameters())

    loss = build_loss(options, classifier.logit_scale, world.size * options.accumulate)
    negative = None
    if options.loss == "comp-tga":
        negative = build(train_data.class_names, (NEGATIVE_TEMPLATE,)).text_features
    encoder = Encoder(PRECISIONS[options.precision], negative)
    if options.compile:
        # In place, so that the weights keep their names; after the copy, which runs too seldom or
        # on too many sizes of batches to be worth it.
        model.get_submodule("visual").compile(dynamic=False)
    trained: nn.Module = TrainedPasses(
        classifier, encoder, loss, checkpointing=options.checkpointing is not None
    )
    if dist.is_initialized():
        # The buffers are the same everywhere: the model trains in evaluation mode.
        trained = DistributedDataParallel(trained, broadcast_buffers=False)
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            weights, options.lr, momentum=0.9, weight_decay=options.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(weights, options.lr, weight_decay=options.weight_decay)
    steps = options.epochs * (len(train_data) // options.batch_size)
    keep = None if options.augment or options.no_keep else len(train_data)
    return Run(
        options=options,
        world=world,
        classifier=classifier,
        val_classifier=val_classifier,
        original=original,
        loss=loss,
        encoder=encoder,
        references=References(frozen, encoder, loss, keep=keep, gather=world.gather),
        trained=trained,
        optimizer=optimizer,
        schedule=cosine_lr(optimizer, options.lr, options.warmup, steps),
        scaler=torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16"),
        generator=torch.Generator().manual_seed(options.seed),
        train_data=train_data,
        val_data=val_data,
    )


def check_model(name: str, weights: str) -> None:
    if ":" in name:  # hf-hub:NAME or local-dir:PATH, which open_clip looks up itself
        return
    if open_clip.get_model_config(name) is None:
        raise SystemExit(f"--model {name}: expected one of open_clip.list_models()")
    if weights and not open_clip.get_pretrained_cfg(name, weights) and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise SystemExit(f"--pretrained {weights}: expected a file or a tag of {name} ({tags})")


def check_checkpointing(visual: nn.Module) -> None:
    # open_clip's ResNets take the setting and ignore it.
    if not hasattr(getattr(visual, "transformer", None), "grad_checkpointing"):
        expected = "a vision transformer of open_clip's own"
        raise SystemExit(f"--checkpointing: expected {expected}, got {type(visual).__name__}")


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `open_clip.create_model` that build the model."""
    # OpenAI's weights want QuickGELU, which the plain names of the models do not imply.
    cfg = open_clip.get_pretrained_cfg(options.model, options.pretrained)
    return {
        "model_name": options.model,
        "pretrained": options.pretrained,
        "force_quick_gelu": cfg.get("quick_gelu", False),
    }


def build_model(
    options: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Compose, Compose]:
    """Return open_clip's model, and its transforms for training and evaluation."""
    model, *transforms = open_clip.create_model_and_transforms(
        **model_arguments(options), device=device
    )
    # calibclip normalises inside the classifier, so that attacks see pixels in [0, 1].
    train, evaluation = map(without_normalize, transforms)
    return model.eval(), train, evaluation


def without_normalize(transform: Any) -> Compose:
    return Compose([step for step in transform.transforms if not isinstance(step, Normalize)])


def open_data(options: argparse.Namespace) -> tuple[Labelled, Labelled | None]:
    """Return the training data and, if there is any, the data for the evaluation."""
    torchvision = {"root": options.data_root, "download": options.download}
    train = labelled(
        Digits(train=True)
        if options.synthetic
        else open_images(options.data, train=True, **torchvision),
        names=options.class_names,
        limit=options.images,
        seed=options.seed,
    )
    if not options.synthetic and options.val_data is None:
        return train, None
    val = labelled(
        Digits(train=False)
        if options.val_data is None
        else open_images(options.val_data, train=False, **torchvision),
        names=options.val_class_names,
        same_as=train,
        limit=options.val_images,
        seed=options.seed,
    )
    return train, val
