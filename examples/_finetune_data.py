"""Images, class names and loaders for finetune.py: folders, torchvision's data sets, and digits."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder

# The data sets of torchvision that list their class names, and what each calls its two splits.
SPLITS: dict[str, dict[str, tuple[Any, Any]]] = {
    "CIFAR10": {"train": (True, False)},
    "CIFAR100": {"train": (True, False)},
    "Country211": {"split": ("train", "test")},
    "DTD": {"split": ("train", "test")},
    "FGVCAircraft": {"split": ("trainval", "test")},
    "FashionMNIST": {"train": (True, False)},
    "Flowers102": {"split": ("train", "test")},
    "Food101": {"split": ("train", "test")},
    "ImageNet": {"split": ("train", "val")},
    "Imagenette": {"split": ("train", "val")},
    "MNIST": {"train": (True, False)},
    "OxfordIIITPet": {"split": ("trainval", "test")},
    "RenderedSST2": {"split": ("train", "test")},
    "STL10": {"split": ("train", "test")},
    "StanfordCars": {"split": ("train", "test")},
}

# 16 patches, as 224 pixels have 49: every part of a real CLIP, and a step in milliseconds.
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

Transform = Callable[[Image.Image], Tensor]


class Digits(Dataset):
    """scikit-learn's handwritten digits as PIL images; the last 397 are held out."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, train: bool) -> None:
        part = slice(1400) if train else slice(1400, None)
        pixels, target = load_digits(return_X_y=True)
        self.images = (pixels[part].reshape(-1, 8, 8) * 15.9375).astype(np.uint8)
        self.target = target[part]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.target[index])


@dataclass(frozen=True)
class Labelled(Dataset):
    """Items ``(position, image tensor, class index)`` of a data set of PIL images."""

    images: Any
    transform: Transform
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        image, target = self.images[index]
        return index, self.transform(image), target


def labelled(
    images: Any,
    transform: Transform,
    *,
    names: Path | None,
    same_as: Labelled | None = None,
    limit: int | None,
    seed: int,
) -> Labelled:
    """Give a data set its class names and transform, and take ``limit`` of its images at random."""
    own = _class_names(images)
    if names is not None:
        class_names = read_class_names(names, own)
    elif same_as is not None and own == _class_names(same_as.images):
        class_names = same_as.class_names
    else:
        class_names = own
    if limit is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images = Subset(images, order[:limit].tolist())
    return Labelled(images, transform, class_names)


def _class_names(images: Any) -> tuple[str, ...]:
    images = images.dataset if isinstance(images, Subset) else images
    # ImageNet and Imagenette list synonyms.
    return tuple(name if isinstance(name, str) else name[0] for name in images.classes)


def open_images(name: str, *, train: bool, root: Path, download: bool) -> Any:
    """Open a folder with one folder a class, or one split of a data set of torchvision."""
    try:
        if name in SPLITS:
            kind = getattr(torchvision.datasets, name)
            options = {key: splits[0 if train else 1] for key, splits in SPLITS[name].items()}
            if "download" in inspect.signature(kind).parameters:
                options["download"] = download
            return kind(root, **options)
        if Path(name).is_dir():
            return ImageFolder(name)
    except (RuntimeError, FileNotFoundError) as error:
        hint = f" (--data-root {root}; see --download)" if name in SPLITS else ""
        raise SystemExit(f"{name}: {error}{hint}") from None
    raise SystemExit(
        f"{name}: expected a folder with one folder a class, or a data set of torchvision with "
        f"class names ({', '.join(SPLITS)})"
    )


def read_class_names(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Read names in the order of the labels, or by folder, from .json or from lines of text.

    Args:
        path: JSON: a list of names, or an object from folder to name. Text: one name a line, or
            the folder, a tab and the name, as in Tiny ImageNet's words.txt.
        folders: The names that the data has of its own.
    """
    try:
        text = path.read_text()
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"class names {path}: {error}") from None
    if isinstance(names, list) and all("\t" in name for name in names):
        names = dict(name.split("\t", 1) for name in names)
    if isinstance(names, dict):
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise SystemExit(f"class names {path}: no name for {', '.join(missing[:5])}")
        names = [names[folder] for folder in folders]
    if len(names) != len(folders):
        expected = f"{len(folders)} names, one for each class of the data"
        raise SystemExit(f"class names {path}: expected {expected}, got {len(names)}")
    return tuple(names)


def register_tiny_clip() -> str:
    """Add a tiny CLIP to open_clip's models, and return its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibclip-tiny.json"
        path.write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(path)
    return path.stem


def training_loader(
    data: Labelled, batch_size: int, *, rank: int, world_size: int, seed: int, **options: Any
) -> tuple[DataLoader, DistributedSampler]:
    """Shuffled batches; those of all ranks together are the batches of one process.

    ``sampler.set_epoch`` chooses the order.
    """
    sampler = DistributedSampler(data, world_size, rank, seed=seed, drop_last=True)
    local = batch_size // world_size
    return DataLoader(data, local, sampler=sampler, drop_last=True, **options), sampler


def evaluation_loader(
    data: Labelled, batch_size: int, *, rank: int, world_size: int, **options: Any
) -> DataLoader:
    """This rank's share, every image once."""
    share = Subset(data, range(rank, len(data), world_size))
    return DataLoader(share, max(1, batch_size // world_size), **options)
