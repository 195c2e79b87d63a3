"""Evaluate an open_clip model on clean and attacked images: one report, its tables and figure.

    python examples/evaluate_open_clip.py --model ViT-B-32 --pretrained openai \\
        --data CIFAR100 --download --eps 1/255 --attacks pgd reliable
    python examples/evaluate_open_clip.py --synthetic      the same on a tiny CLIP, in seconds

Writes report.json, report.md, report.png and state.pt to --out. A run that was cut off goes on from
state.pt when it is started again. ``--pretrained`` also takes the last.pt of finetune.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from _finetune_data import (
    SPLITS,
    Digits,
    Labelled,
    evaluation_loader,
    labelled,
    open_images,
    register_tiny_clip,
)
from _finetune_setup import check_model, model_arguments, without_normalize
from torch import Tensor
from torch.utils.data import DataLoader

from calibclip import PGD, WorstCase, ZeroShotClassifier, evaluate
from calibclip.attacks import Square

NAMES = "names of the classes: .json or lines of text, by folder or in the order of the labels"


class Pairs:
    """The batches ``(images, target)`` of a loader of ``(position, images, target)``."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, images, target in self.loader:
            yield images, target


def attacks_by_name(eps: float, steps: int) -> dict[str, Any]:
    """Return the attacks that ``--attacks`` chooses from."""
    return {
        "pgd": PGD(eps, steps, 1 / 255, select="last"),
        "worst": PGD(eps, steps, stop_when_fooled=False),
        "reliable": WorstCase.reliable(eps, steps=steps),
        "square": Square(eps, queries=50 * steps),
    }


def length(text: str) -> float:
    """Read a number or a fraction such as 1/255."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="ViT-B-32", help="see open_clip.list_models()")
    add(
        "--pretrained",
        default="openai",
        help="a tag of open_clip, a file, or finetune.py's last.pt",
    )
    add("--data", help=f"a folder with one folder a class, or one of {', '.join(SPLITS)}")
    add("--class-names", type=Path, help=NAMES)
    add("--images", type=int, help="evaluate on so many, chosen by the seed")
    add("--data-root", type=Path, default=Path("data"), help="of torchvision")
    add("--download", action="store_true", help="let torchvision download")
    add("--template", default="This is a photo of a {}", help="prompt, {} for the class")
    add("--attacks", nargs="*", default=["pgd"], choices=list(attacks_by_name(0.0, 1)))
    add("--eps", type=length, default=1 / 255, help="radius for pixels in [0, 1], such as 1/255")
    add("--steps", type=int, default=100, help="of the attacks")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0, help="processes that load images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/evaluate"), metavar="DIR")
    add("--synthetic", action="store_true", help="a tiny untrained CLIP, scikit-learn's digits")
    options = parser.parse_args(arguments)
    if options.synthetic == (options.data is not None):
        parser.error("expected either --data or --synthetic")
    return options


def load_model(options: argparse.Namespace) -> tuple[Any, str]:
    """Build the model with its weights; return it and the name of its configuration."""
    if options.synthetic:
        torch.manual_seed(options.seed)
        name = register_tiny_clip()
        return open_clip.create_model(name, device=options.device), name
    path = Path(options.pretrained)
    if path.name == "last.pt" and path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)
        model: Any = open_clip.create_model(**state["model"], device=options.device)
        model.visual.load_state_dict(state["visual"])
        return model, state["model"]["model_name"]
    check_model(options.model, options.pretrained)
    return open_clip.create_model(**model_arguments(options), device=options.device), options.model


def load_data(options: argparse.Namespace, model: Any) -> Labelled:
    """Open the held-out images, resized for the model but not normalised."""
    images = (
        Digits(train=False)
        if options.synthetic
        else open_images(
            options.data, train=False, root=options.data_root, download=options.download
        )
    )
    data = labelled(images, names=options.class_names, limit=options.images, seed=options.seed)
    # The classifier normalises itself: the attacks see pixels in [0, 1].
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    return Labelled(data.images, data.class_names, data.names_file, without_normalize(transform))


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    model, name = load_model(options)
    data = load_data(options, model)
    classifier = ZeroShotClassifier.from_open_clip(
        model, open_clip.get_tokenizer(name), data.class_names, templates=(options.template,)
    )
    loader = evaluation_loader(
        data, options.batch_size, rank=0, world_size=1, num_workers=options.workers
    )
    chosen = attacks_by_name(options.eps, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    report = evaluate(
        classifier,
        Pairs(loader),
        attacks={attack: chosen[attack] for attack in options.attacks},
        checkpoint=options.out / "state.pt",
    )
    print(report)
    report.to_json(options.out / "report.json")
    (options.out / "report.md").write_text(report.table("markdown") + "\n", encoding="utf-8")
    report.plot(options.out / "report.png")
    print(f"\nWrote report.json, report.md and report.png to {options.out}.")


if __name__ == "__main__":
    main()
