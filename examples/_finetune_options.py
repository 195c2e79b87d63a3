"""The methods of finetune.py, with the settings of their papers, and its command line."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from _finetune_data import SPLITS, register_tiny_clip
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
    epochs: int | None = 10
    steps: int = 0  # where the paper counts no epochs
    warmup: int = 1000
    eps: float = 1 / 255
    step_size: float = 1 / 255
    attack_steps: int = 2
    note: str = ""

    def __str__(self) -> str:
        length = f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps"
        note = f";\n{'':11s}{self.note}" if self.note else ""
        return (
            f"{self.optimizer}, lr {self.lr:g}, weight decay {self.weight_decay:g}, "
            f"batch {self.batch_size}, {length}, warm-up {self.warmup},\n"
            f"{'':11s}eps {255 * self.eps:g}/255, {self.attack_steps} steps of "
            f"{255 * self.step_size:g}/255{note}"
        )


METHODS = {
    "ucat": Method(DirichletAlignLoss),
    "tecoa": Method(TeCoALoss, lr=1e-5),
    "pmg": Method(PMGAFTLoss, lr=5e-5),
    "fare": Method(
        FARELoss,
        optimizer="adamw",
        lr=1e-5,
        weight_decay=1e-4,
        batch_size=128,
        epochs=None,
        steps=20_000,
        warmup=1400,
        eps=2 / 255,
        attack_steps=10,
        note="published for ViT-L/14; the momentum of its attack changes no L-infinity step",
    ),
    "tga": Method(TGALoss, batch_size=128),
    "comp-tga": Method(CompTGALoss, batch_size=128),
}
FROM_PAPER = (
    *("optimizer", "lr", "weight_decay", "batch_size", "epochs"),
    *("eps", "step_size", "attack_steps"),
)
SYNTHETIC = {"batch_size": 64, "epochs": 2, "images": 512, "val_images": 128}

NAMES_HELP = (
    ".json or .txt: names by label, or by folder; of synonyms, as in words.txt, the first. "
    "default: the data's own"
)

# What a continued run may change without becoming another run. Folders move; that they hold the
# same classes and as many images is checked by itself.
FREE_OPTIONS = frozenset(
    {"out", "resume", "log_every", "workers", "device", "download", "no_keep"}
    | {"data", "class_names", "data_root"}
    | {"val_data", "val_class_names", "val_images", "val_steps", "val_eps"}
)


def build_loss(options: argparse.Namespace, logit_scale: float, shares: int) -> nn.Module:
    """Build the loss for logits of this scale, and batches taken in so many shares."""
    kind, scale = METHODS[options.loss].loss, {"logit_scale": logit_scale}
    if not options.official:
        return kind(**(scale if kind is DirichletAlignLoss else {}))
    loss = kind.official(**(scale if kind in (DirichletAlignLoss, PMGAFTLoss) else {}))
    if kind is PMGAFTLoss:
        # Its KLs are summed over the batch, while the gradients of the shares (of a process, of a
        # part) are averaged. That makes the total right; the logged kl_ref and kl_clean are sums
        # over one share.
        loss.ref_weight *= shares
        loss.clean_weight *= shares
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
    add("--eps", type=length, help="radius of the attack for pixels in [0, 1], such as 1/255")
    add("--step-size", type=length, help="of the attack")
    add("--attack-steps", type=positive, help="of the attack")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="see open_clip.list_models(); default: ViT-B-32")
    add(
        "--pretrained",
        help="a tag of open_clip or a file; default: openai. A file with OpenAI's activation needs "
        "a --model whose name ends in -quickgelu",
    )
    add("--template", default="This is a photo of a {}", help="prompt, {} for the class")
    add("--data", help=f"a folder with one folder a class, or one of {', '.join(SPLITS)}")
    add("--class-names", type=Path, help=NAMES_HELP)
    add("--images", type=positive, help="train on so many images, chosen by the seed")
    add("--val-data", help="like --data; evaluated at the end")
    add("--val-class-names", type=Path, help="default: --class-names, if they are its classes")
    add("--val-images", type=positive, help="evaluate on so many images, chosen by the seed")
    add("--val-steps", type=positive, default=100, help="of the attack at the end; default: 100")
    add("--val-eps", type=length, help="of the attack at the end; default: --eps")
    add("--data-root", type=Path, default=Path("data"), help="of torchvision; default: data")
    add("--download", action="store_true", help="let torchvision download")
    add("--augment", action="store_true", help="open_clip's training transform; keeps no reference")
    add("--no-keep", action="store_true", help="compute the references in every epoch")
    add(
        "--synthetic",
        action="store_true",
        help="a smoke test: a tiny untrained CLIP and scikit-learn's digits",
    )

    add = parser.add_argument_group("training").add_argument
    add("--optimizer", choices=("sgd", "adamw"))
    add("--lr", type=float)
    add("--weight-decay", type=float)
    add("--batch-size", type=positive, help="of all processes together")
    add("--epochs", type=positive)
    add("--warmup", type=natural, help="steps; where the paper's are too many: a tenth of all")
    add("--precision", choices=PRECISIONS, default="fp32", help="of autocast; default: fp32")
    add(
        "--accumulate",
        type=positive,
        default=1,
        metavar="PARTS",
        help="take a batch in so many parts, one after the other: the same update, less memory",
    )
    add(
        "--checkpointing",
        choices=("training", "all"),
        help="keep each block's input alone and compute the rest again: in the training passes, "
        "which take the most memory, or in the attack's too",
    )
    add("--compile", action="store_true", help="torch.compile the image encoder that trains")
    add("--device", choices=("cuda", "cpu"), default=device, help=f"default here: {device}")
    add("--workers", type=natural, help="loader processes of each process; default: at most 8")
    add("--seed", type=natural, default=0)
    add("--out", type=Path, metavar="DIR", help="default: runs/finetune/LOSS")
    add("--resume", action="store_true", help="continue from DIR/last.pt")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="to DIR/log.jsonl")

    options = parser.parse_args(arguments)
    if options.synthetic == (options.data is not None):
        parser.error("expected either --data or --synthetic")
    if options.synthetic and (options.model or options.pretrained is not None):
        parser.error("--synthetic has its own model: leave out --model and --pretrained")
    if options.device == "cuda" and device == "cpu":
        parser.error("--device cuda: PyTorch finds no GPU here")
    if options.precision == "fp16" and options.device == "cpu":
        parser.error("--precision fp16 needs --device cuda; use bf16")
    if options.compile and METHODS[options.loss].loss in (TGALoss, CompTGALoss):
        parser.error(f"--compile: {options.loss} reads patch tokens by a hook, which none survives")
    fill_in(options)
    return options


def fill_in(options: argparse.Namespace) -> None:
    """Set what the command line left open, except what `fit_schedule` takes from the data."""
    model, pretrained = "ViT-B-32", "openai"
    usual = {name: getattr(METHODS[options.loss], name) for name in FROM_PAPER}
    usual["workers"] = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if options.synthetic:
        model, pretrained = register_tiny_clip(), ""
        usual |= SYNTHETIC | {"workers": 0}
    usual |= {"model": model, "pretrained": pretrained, "out": Path("runs/finetune", options.loss)}
    usual["val_eps"] = options.eps or usual["eps"]
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def fit_schedule(options: argparse.Namespace, n_images: int, n_processes: int) -> None:
    """Check batch and warm-up against the data; set epochs and warm-up where they are open."""
    batch, method = options.batch_size, METHODS[options.loss]
    if batch % n_processes:
        raise SystemExit(
            f"--batch-size {batch}: expected a multiple of the {n_processes} processes"
        )
    if batch % (n_processes * options.accumulate):
        share = batch // n_processes
        raise SystemExit(
            f"--accumulate {options.accumulate}: expected a divisor of the {share} images of a "
            "process and a step"
        )
    if n_images < batch:
        raise SystemExit(f"--batch-size {batch}: expected no more than the {n_images} images")
    if options.epochs is None:
        options.epochs = math.ceil(method.steps / (n_images // batch))
    steps = options.epochs * (n_images // batch)
    if options.warmup is None:
        options.warmup = method.warmup if method.warmup < steps else steps // 10
    if options.warmup >= steps:
        raise SystemExit(f"--warmup {options.warmup}: expected fewer than the {steps} steps in all")


def length(text: str) -> float:
    try:
        value = Fraction(text)
    except ZeroDivisionError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text}") from None
    if not 0 < value < 0.5:
        hint = f"; did you mean {text.partition('/')[0]}/255?" if value > 0 else ""
        expected = "more than 0 and less than 0.5, for pixels in [0, 1]"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}{hint}")
    return float(value)


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {value}")
    return value


def plain_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options in types that JSON and `torch.load` know."""
    values = vars(options).items()
    return {name: str(value) if isinstance(value, Path) else value for name, value in values}


def lasting_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a continued run has to share."""
    plain = plain_options(options)
    return {name: value for name, value in plain.items() if name not in FREE_OPTIONS}


def check_same_run(saved: dict[str, Any], options: dict[str, Any]) -> None:
    different = [
        f"--{name.replace('_', '-')} (was {saved.get(name)}, is {value})"
        for name, value in options.items()
        if value != saved.get(name)
    ]
    if different:
        raise SystemExit(f"--resume: expected the options of the run, got {', '.join(different)}")
