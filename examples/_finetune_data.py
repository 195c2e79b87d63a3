"""Images, class names and loaders for finetune.py: folders, torchvision's data sets, and digits."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from torchvision.transforms.functional import to_tensor

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
        pixels, target = map(np.asarray, load_digits(return_X_y=True))
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
    class_names: tuple[str, ...]
    names_file: Path | None = None
    transform: Transform = to_tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        image, target = self.images[index]
        return index, self.transform(image), target


def labelled(
    images: Any,
    *,
    names: Path | None,
    same_as: Labelled | None = None,
    limit: int | None,
    seed: int,
) -> Labelled:
    """Give a data set its class names, and take ``limit`` of its images at random.

    Without ``names`` those of the data set ``same_as`` hold, if they are of the same classes.
    """
    own = _own_names(images)
    if names is None and same_as is not None:
        class_names = _shared_names(own, same_as)
    else:
        class_names = own if names is None else read_class_names(names, own)
    if len(class_names) < 2:
        raise SystemExit(f"expected at least two classes, got {', '.join(class_names) or 'none'}")
    ids = [name for name in class_names if re.fullmatch(r"n\d{8}", name)]
    if ids:
        remedy = "pass --class-names or --val-class-names"
        raise SystemExit(f"{ids[0]} is an id of WordNet, not a name for a prompt: {remedy}")
    if limit is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images = Subset(images, order[:limit].tolist())
    return Labelled(images, class_names, names)


def _own_names(images: Any) -> tuple[str, ...]:
    images = images.dataset if isinstance(images, Subset) else images
    if isinstance(images, torchvision.datasets.ImageNet):
        # The first synonyms make two classes "crane", and others ambiguous.
        return tuple(open_clip.IMAGENET_CLASSNAMES)
    # Imagenette lists synonyms.
    return tuple(name if isinstance(name, str) else name[0] for name in images.classes)


def _shared_names(own: tuple[str, ...], other: Labelled) -> tuple[str, ...]:
    if own == _own_names(other.images):
        return other.class_names
    if other.names_file is not None:
        names = _read_names(other.names_file, own)
        if isinstance(names, dict) and names.keys() >= set(own):
            return tuple(names[folder] for folder in own)
    return own


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
        path: JSON: a list of names, or an object from folder to name. Text: one name a line; or
            the folder, a tab or space, and synonyms, of which the first counts, as in Tiny
            ImageNet's words.txt.
        folders: The names that the data has of its own.
    """
    names = _read_names(path, folders)
    if isinstance(names, dict):
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise SystemExit(f"class names {path}: no name for {', '.join(missing[:5])}")
        names = [names[folder] for folder in folders]
    if len(names) != len(folders):
        expected = f"{len(folders)} names, one for each class of the data"
        raise SystemExit(f"class names {path}: expected {expected}, got {len(names)}")
    return tuple(names)


def _read_names(path: Path, folders: Sequence[str]) -> list[str] | dict[str, str]:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(text)
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"class names {path}: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    tabs = all("\t" in line for line in lines)
    pairs = [line.split("\t" if tabs else None, 1) for line in lines]
    # A space is in names as well: it ends a folder only if some folder is found so.
    if tabs or (all(len(pair) == 2 for pair in pairs) and {pair[0] for pair in pairs} & {*folders}):
        return {folder: synonyms.partition(",")[0] for folder, synonyms in pairs}
    return lines


def register_tiny_clip() -> str:
    """Add a tiny CLIP to open_clip's models, and return its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibclip-tiny.json"
        path.write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(path)
    return path.stem


class EpochSampler(DistributedSampler):
    """Positions with the epoch, which ``set_epoch`` chooses."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


@dataclass(frozen=True)
class Seeded(Dataset):
    """Items by epoch and position: augmented alike whichever process or worker does it."""

    data: Labelled
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor, int]:
        epoch, index = key
        (state,) = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(state))
            return self.data[index]


def training_loader(
    data: Labelled, batch_size: int, *, rank: int, world_size: int, seed: int, **options: Any
) -> tuple[DataLoader, EpochSampler]:
    """Shuffled batches; those of all ranks together are the batches of one process.

    ``sampler.set_epoch`` chooses the order.
    """
    # The sampler adds the epoch: without the factor, seed 1 would begin with seed 0's second epoch.
    sampler = EpochSampler(data, world_size, rank, seed=1_000_003 * seed, drop_last=True)
    local = batch_size // world_size
    return DataLoader(
        Seeded(data, seed), local, sampler=sampler, drop_last=True, **options
    ), sampler


def evaluation_loader(
    data: Labelled, batch_size: int, *, rank: int, world_size: int, **options: Any
) -> DataLoader:
    """This rank's share, every image once."""
    share = Subset(data, range(rank, len(data), world_size))
    return DataLoader(share, max(1, batch_size // world_size), **options)
