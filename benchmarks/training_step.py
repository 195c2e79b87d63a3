"""What an adversarial training step costs: as published code takes it, and as calibclip does.

    python benchmarks/training_step.py [--quick] [--compile]
    python benchmarks/training_step.py --device cuda

PGD-2, the Dirichlet alignment loss and an SGD update on open_clip's ViT-B/32 with random weights.
No time is reported unless both take the same step: the same loss, and the same update. On a CPU
the published step with 1000 prompts takes minutes, and more memory than most have: there the recipe
is compared with a part of it. On a GPU all is measured.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from _report import machine, table, warn_if_busy
from _timing import calls, peak, spread
from torch import Tensor, nn

from calibclip import DirichletAlignLoss, ZeroShotClassifier, pgd

THREADS = 2
EPS = STEP_SIZE = 1 / 255
STEPS = 2
TEMPLATE = "This is a photo of a {}"
BOUND = 1e-4
PUBLISHED, RECIPE = "published", "recipe"


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor
    index: Tensor  # positions in the data, for what is kept of it
    start: Tensor  # where both attacks begin when they are compared


def make_batch(size: int, n_classes: int, image_size: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, image_size, image_size, generator=generator)
    noise = EPS * (2 * torch.rand(images.shape, generator=generator) - 1)
    parts = (
        images,
        torch.arange(size) % n_classes,
        torch.arange(size),
        (images + noise).clamp(0, 1),
    )
    return Batch(*(part.to(device) for part in parts))


def load(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(name, pretrained=None, device=device).eval()


def sgd(model: Any) -> torch.optim.SGD:
    # A rate of 1, so that the rounding of the weights does not hide a difference of the updates.
    return torch.optim.SGD(model.visual.parameters(), lr=1.0, momentum=0.9)


def tokens(name: str, class_names: Sequence[str]) -> Tensor:
    return open_clip.get_tokenizer(name)([TEMPLATE.format(each) for each in class_names])


def autocast(images: Tensor, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(images.device.type, precision, precision is not None)


class Published:
    """A step of UCAT's training, and of the TeCoA family's, without what is left for logging.

    Every call of the model encodes the prompts; every backward pass of the attack reaches the
    weights of both encoders; the frozen model sees the same clean images in every epoch. (The
    gradients that the attack leaves are cleared here, as the published update would contain them.)
    """

    compiled = False

    def __init__(
        self,
        model: Any,
        name: str,
        class_names: Sequence[str],
        precision: torch.dtype | None = None,
    ) -> None:
        self.model, self.frozen, self.precision = model, copy.deepcopy(model), precision
        device = model.logit_scale.device
        self.tokens = tokens(name, class_names).to(device)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        self.loss = DirichletAlignLoss(float(model.logit_scale.detach().exp()))
        self.optimizer = sgd(model)

    def logits(self, model: Any, images: Tensor) -> Tensor:
        with autocast(images, self.precision):
            normalized = (images - self.mean) / self.std
            image_features, text_features, scale = model(normalized, self.tokens)
            return (scale * image_features @ text_features.T).float()

    def __call__(self, batch: Batch, start: Tensor | None = None) -> Tensor:
        clean = batch.images
        points = start
        if points is None:
            points = clean + EPS * (2 * torch.rand_like(clean) - 1)
        for _ in range(STEPS):
            points = points.detach().requires_grad_(True)
            F.cross_entropy(self.logits(self.model, points), batch.labels).backward()
            assert points.grad is not None
            moved = points.detach() + STEP_SIZE * points.grad.sign()
            points = torch.clamp(moved, clean - EPS, clean + EPS).clamp(0, 1)
        self.model.zero_grad()
        logits_adv = self.logits(self.model, points)
        with torch.no_grad():
            logits_ref = self.logits(self.frozen, clean)
        loss = self.loss(logits_adv, logits_ref, batch.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Recipe:
    """The same step by docs/training-step.md."""

    def __init__(
        self,
        model: Any,
        name: str,
        class_names: Sequence[str],
        batch: Batch,
        *,
        keep: bool = True,
        precision: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.precision = model.requires_grad_(False), precision
        self.compiled = compiled
        self.classifier = ZeroShotClassifier.from_open_clip(
            model, open_clip.get_tokenizer(name), class_names, (TEMPLATE,)
        )
        self.reference = copy.deepcopy(self.classifier)
        self.frozen = self.reference.model
        model.visual.requires_grad_(True)
        if compiled:
            model.visual.compile(dynamic=False)
        self.loss = DirichletAlignLoss(self.classifier.logit_scale)
        self.optimizer = sgd(model)
        self.generator = torch.Generator().manual_seed(0)
        self.kept = self.embed_clean(batch.images) if keep else None

    @torch.no_grad()
    def embed_clean(self, images: Tensor) -> Tensor:
        with autocast(images, self.precision):
            return self.reference.embed(images)

    def __call__(self, batch: Batch, start: Tensor | None = None) -> Tensor:
        images, labels = batch.images, batch.labels
        self.optimizer.zero_grad()
        with autocast(images, self.precision):
            images_adv = pgd(
                self.classifier, images, labels, EPS, STEP_SIZE, STEPS,
                generator=self.generator, start=start,
            )  # fmt: skip
            logits_adv = self.classifier(images_adv)
        features = self.embed_clean(images) if self.kept is None else self.kept[batch.index]
        loss = self.loss(logits_adv, self.reference.classify(features), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def names(count: int) -> list[str]:
    return [f"class number {number}" for number in range(count)]


# That it is the same step


@contextmanager
def put_back(step: Any) -> Iterator[None]:
    """Undo what steps in here change: weights and momentum."""
    weights = [weight.detach().clone() for weight in step.model.visual.parameters()]
    yield
    with torch.no_grad():
        for weight, before in zip(step.model.visual.parameters(), weights, strict=True):
            weight.copy_(before)
    step.optimizer.state.clear()
    step.model.zero_grad()


# What it does and costs

KINDS = ("image forward", "image to pixels", "image to weights", "text forward", "text to weights")


class Passes:
    """Counts at the first layer of each encoder, where every pass begins and ends."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(KINDS, 0)

    def watch(self, model: Any) -> list[Any]:
        layers = {"image": model.visual.conv1, "text": model.token_embedding}
        return [
            layer.register_forward_hook(self._counter(encoder)) for encoder, layer in layers.items()
        ]

    def _counter(self, encoder: str) -> Callable[..., None]:
        def count(layer: Any, _: Any, output: Tensor) -> None:
            self._add(f"{encoder} forward")
            if output.requires_grad:
                where = "weights" if layer.weight.requires_grad else "pixels"
                output.register_hook(lambda _: self._add(f"{encoder} to {where}"))

        return count

    def _add(self, kind: str) -> None:
        self.counts[kind] += 1


@contextmanager
def counted(*models: Any) -> Iterator[dict[str, int]]:
    passes = Passes()
    handles = [handle for model in models for handle in passes.watch(model)]
    yield passes.counts
    for handle in handles:
        handle.remove()


@dataclass(frozen=True)
class Observed:
    """What one step does. A compiled encoder runs no hooks: neither passes nor peak are known."""

    loss: float
    update: Tensor
    passes: dict[str, int] | None = None
    peak: int | None = None


def observe(step: Any, batch: Batch) -> Observed:
    """Take a step from the batch's start of the attack, and undo it."""
    weights = list(step.model.visual.parameters())
    with put_back(step):
        before = nn.utils.parameters_to_vector(weights).detach()
        if step.compiled:
            loss = float(step(batch, batch.start))
            return Observed(loss, nn.utils.parameters_to_vector(weights).detach() - before)
        with counted(step.model, step.frozen) as passes, peak(batch.images.device.type) as most:
            loss = float(step(batch, batch.start))
        update = nn.utils.parameters_to_vector(weights).detach() - before
    return Observed(loss, update, passes, most.bytes)


def differences(published: Observed, other: Observed) -> tuple[float, float]:
    """Return the relative differences of the loss and of the update (norms)."""
    loss = abs(other.loss - published.loss) / abs(published.loss)
    return loss, float((other.update - published.update).norm() / published.update.norm())


def seconds(steps: dict[str, Any], batch: Batch, samples: int) -> dict[str, np.ndarray]:
    """Time steps taken before, each undone."""
    providers = {name: partial(step, batch) for name, step in steps.items()}
    device = batch.images.device.type
    return calls(providers, device, samples, warm_up=0, around=lambda name: put_back(steps[name]))


# The sections


@dataclass(frozen=True)
class Settings:
    model: str
    batch_size: int
    image_size: int
    device: str
    samples: int
    compiled: bool
    bf16: bool
    quick: bool


def build(settings: Settings, n_prompts: int) -> tuple[dict[str, Any], Batch]:
    """Build the steps by name, each with a model of its own and all from the same weights."""
    torch.compiler.reset()  # the graphs of models that are gone count against a limit
    model = load(settings.model, settings.device)
    batch = make_batch(settings.batch_size, n_prompts, settings.image_size, settings.device)
    setup = (settings.model, names(n_prompts))

    def recipe(**options: Any) -> Recipe:
        return Recipe(copy.deepcopy(model), *setup, batch, **options)

    steps: dict[str, Any] = {
        PUBLISHED: Published(copy.deepcopy(model), *setup),
        RECIPE: recipe(),
    }
    if not settings.quick:
        steps["without kept references"] = recipe(keep=False)
    if settings.bf16:
        steps["published, bf16"] = Published(copy.deepcopy(model), *setup, torch.bfloat16)
        steps["bf16"] = recipe(precision=torch.bfloat16)
    if settings.compiled:
        steps["compiled"] = recipe(compiled=True)
    if settings.compiled and settings.bf16:
        steps["bf16, compiled"] = recipe(precision=torch.bfloat16, compiled=True)
    return steps, batch


def check(observed: dict[str, Observed]) -> bool:
    """Print how far each step is from the published one; return whether float32 keeps the bound."""
    rows, kept = [], True
    for name, other in observed.items():
        if name == PUBLISHED:
            continue
        loss, update = differences(observed[PUBLISHED], other)
        exact = "bf16" not in name
        kept &= not exact or bool(np.max([loss, update]) <= BOUND)  # of a NaN, too
        rows.append([name, f"{loss:.1e}", f"{update:.1e}", f"{BOUND:g}" if exact else "none"])
    print("Relative differences from the published step, from the same start of the attack:\n")
    table(["", "loss", "update (norm)", "bound"], rows)
    return kept


def costs(observed: dict[str, Observed], times: dict[str, np.ndarray]) -> None:
    """Print passes, times and memory."""
    rows = []
    for name, seen in observed.items():
        ratio = times[name] / times[PUBLISHED]
        rows.append(
            [
                name,
                *(str(seen.passes[kind]) if seen.passes else "" for kind in KINDS),
                spread(times[name], 1.0),
                spread(ratio, 1.0),
                "" if seen.peak is None else f"{seen.peak / 2**20:.0f}",
            ]
        )
    table(["", *KINDS, "s (p20-p80)", "of published (p20-p80)", "peak MiB"], rows)


def measured(settings: Settings, n_prompts: int) -> None:
    """Compare all at one number of prompts."""
    steps, batch = build(settings, n_prompts)
    print(f"## Batch {settings.batch_size}, {n_prompts} prompts\n")
    observed = {name: observe(step, batch) for name, step in steps.items()}
    if not check(observed):
        sys.exit("No time is reported for another step than the published one.")
    costs(observed, seconds(steps, batch, settings.samples))


def bounded(settings: Settings, n_prompts: int) -> None:
    """Compare with a part of the published step, where the whole is too much for the machine."""
    batch = make_batch(settings.batch_size, n_prompts, settings.image_size, settings.device)
    model: Any = load(settings.model, settings.device)
    prompts = tokens(settings.model, names(n_prompts)).to(settings.device)
    with torch.no_grad():
        encode = {"prompts": partial(model.encode_text, prompts, normalize=True)}
        encoding = calls(encode, settings.device, samples=2, warm_up=0)["prompts"].min()
    recipe = Recipe(model, settings.model, names(n_prompts), batch)
    observe(recipe, batch)  # to warm up
    times = seconds({RECIPE: recipe}, batch, max(2, settings.samples // 2))[RECIPE]
    encodings = (STEPS + 2) * encoding
    print(f"## Batch {settings.batch_size}, {n_prompts} prompts\n")
    print(
        f"The published step encodes the prompts {STEPS + 2} times, and goes back through them "
        f"{STEPS + 1} times. Only the first is counted here, from one encoding of ready tokens "
        "without a graph, the faster of two; no image pass is. That is less than the published "
        "step takes.\n"
    )
    table(
        ["", "s (p20-p80)"],
        [
            ["encoding the prompts once", f"{encoding:.3g}"],
            [f"{PUBLISHED}, more than", f"{encodings:.3g}"],
            [RECIPE, spread(times, 1.0)],
            [f"{RECIPE}, of {PUBLISHED}: less than", f"{np.median(times) / encodings:.2g}"],
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the fewer prompts, the recipe alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip; random weights")
    parser.add_argument("--compile", action="store_true", help="a compiled recipe, too")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="both in bf16, too; default: on a GPU. A CPU without bf16 units takes minutes",
    )
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = False  # as matrix products are by default
    else:
        torch.set_num_threads(THREADS)
    vision = (open_clip.get_model_config(options.model) or {}).get("vision_cfg", {})
    settings = Settings(
        model=options.model,
        batch_size=256 if on_gpu else 16,
        image_size=vision.get("image_size", 224),
        device=options.device,
        samples=15 if on_gpu else 3,
        compiled=options.compile,
        bf16=on_gpu if options.bf16 is None else options.bf16,
        quick=options.quick,
    )
    print(f"# A training step\n\n{machine(options.device)}\n")
    print(
        f"{options.model}, random weights, float32 (without TF32) unless stated; PGD-{STEPS}, "
        f"Dirichlet alignment, SGD. {settings.samples} interleaved samples after a warm-up; read "
        "the ratio, the median of those between neighbouring samples. Peak: allocated at once "
        "beyond the weights, their gradients and momentum included.\n"
    )
    few = 200 if on_gpu else 13
    measured(settings, few)
    if not options.quick:
        (measured if on_gpu else bounded)(settings, 1000)


if __name__ == "__main__":
    warn_if_busy()
    main()
