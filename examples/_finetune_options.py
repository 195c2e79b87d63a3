"""The methods of finetune.py, with the settings of their papers, and its command line."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from _finetune_data import SPLITS
from torch import nn

from calibclip import (
    CompTGALoss,
    DirichletAlignLoss,
    FARELoss,
    PMGAFTLoss,
    TeCoALoss,
    TGALoss,
)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Method:
    """A loss, and the training settings of its paper; radius and step for pixels in [0, 1]."""

    loss: type[Any]
    optimizer: str = "sgd"
    lr: float = 1e-4
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 10
    warmup: int = 1000
    eps: float = 1 / 255
    step_size: float = 1 / 255
    attack_steps: int = 2

    def __str__(self) -> str:
        return (
            f"{self.optimizer}, lr {self.lr:g}, weight decay {self.weight_decay:g}, "
            f"batch {self.batch_size}, {self.epochs} epochs, warm-up {self.warmup},\n"
            f"{'':11s}eps {255 * self.eps:g}/255, {self.attack_steps} steps of "
            f"{255 * self.step_size:g}/255"
        )


METHODS = {
    "ucat": Method(DirichletAlignLoss),
    "tecoa": Method(TeCoALoss, lr=1e-5),
    "pmg": Method(PMGAFTLoss, lr=5e-5),
    # 20 000 steps on ImageNet.
    "fare": Method(
        FARELoss,
        optimizer="adamw",
        lr=1e-5,
        weight_decay=1e-4,
        batch_size=128,
        epochs=2,
        warmup=1400,
        eps=2 / 255,
        attack_steps=10,
    ),
    "tga": Method(TGALoss, batch_size=128),
    "comp-tga": Method(CompTGALoss, batch_size=128),
}
SYNTHETIC = {"batch_size": 64, "epochs": 2, "warmup": 4, "images": 512, "val_images": 128}

# What a continued run may change without becoming another run.
FREE_OPTIONS = frozenset(
    {"out", "resume", "log_every", "workers", "device", "download", "data_root"}
    | {"val_data", "val_class_names", "val_images", "val_steps"}
)


def build_loss(options: argparse.Namespace, logit_scale: float, world_size: int) -> nn.Module:
    """Build the loss for logits of this scale, and batches shared by so many processes."""
    kind, scale = METHODS[options.loss].loss, {"logit_scale": logit_scale}
    if not options.official:
        return kind(**(scale if kind is DirichletAlignLoss else {}))
    loss = kind.official(**(scale if kind in (DirichletAlignLoss, PMGAFTLoss) else {}))
    if kind is PMGAFTLoss:
        # Its KLs are summed over the batch, while the processes' gradients are averaged.
        loss.ref_weight *= world_size
        loss.clean_weight *= world_size
    return loss


def read_options(arguments: list[str] | None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="What the methods use unless told otherwise:\n"
        + "\n".join(f"  {name:9s}{method}" for name, method in METHODS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=METHODS, default="ucat", help="default: ucat")
    add("--official", action="store_true", help="the constants and quirks of the published code")
    add("--eps", type=pixels, help="radius of the attack for pixels in [0, 1], such as 1/255")
    add("--step-size", type=pixels, help="of the attack")
    add("--attack-steps", type=positive, help="of the attack")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="ViT-B-32", help="see open_clip.list_models(); default: ViT-B-32")
    add("--pretrained", default="openai", help="a tag of open_clip or a file; default: openai")
    add("--template", default="This is a photo of a {}", help="prompt, {} for the class")
    add("--data", help=f"a folder with one folder a class, or one of {', '.join(SPLITS)}")
    add("--class-names", type=Path, help=".json or .txt: names by label, or by folder")
    add("--images", type=positive, help="train on so many images, chosen by the seed")
    add("--val-data", help="like --data; evaluated at the end")
    add("--val-class-names", type=Path, help="default: as --data, if the classes are the same")
    add("--val-images", type=positive, help="evaluate on so many images, chosen by the seed")
    add("--val-steps", type=positive, default=100, help="of the attack at the end; default: 100")
    add("--data-root", type=Path, default=Path("data"), help="of torchvision; default: data")
    add("--download", action="store_true", help="let torchvision download")
    add("--augment", action="store_true", help="open_clip's training transform; keeps no reference")
    add("--synthetic", action="store_true", help="a tiny untrained CLIP and scikit-learn's digits")

    add = parser.add_argument_group("training").add_argument
    add("--optimizer", choices=("sgd", "adamw"))
    add("--lr", type=float)
    add("--weight-decay", type=float)
    add("--batch-size", type=positive, help="of all processes together")
    add("--epochs", type=positive)
    add("--warmup", type=int, help="steps")
    add("--precision", choices=PRECISIONS, default="fp32", help="of autocast; default: fp32")
    add("--device", choices=("cuda", "cpu"), default=device, help=f"default here: {device}")
    add("--workers", type=int, default=0, help="loader processes of each process")
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="DIR", help="default: runs/finetune/LOSS")
    add("--resume", action="store_true", help="continue from DIR/last.pt")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="to DIR/log.jsonl")

    options = parser.parse_args(arguments)
    if options.synthetic == (options.data is not None):
        parser.error("expected either --data or --synthetic")
    if options.precision == "fp16" and options.device == "cpu":
        parser.error("--precision fp16 needs --device cuda; use bf16")
    usual = asdict(METHODS[options.loss]) | (SYNTHETIC if options.synthetic else {})
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out = options.out or Path("runs/finetune", options.loss)
    return options


def pixels(text: str) -> float:
    return float(Fraction(text))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {value}")
    return value


def lasting_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a continued run has to share, in plain types."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in FREE_OPTIONS
    }


def check_same_run(saved: dict[str, Any], options: dict[str, Any]) -> None:
    different = [
        f"--{name.replace('_', '-')} (was {saved.get(name)}, is {value})"
        for name, value in options.items()
        if value != saved.get(name)
    ]
    if different:
        raise SystemExit(f"--resume: expected the options of the run, got {', '.join(different)}")
