"""Robust accuracy and speed of the attacks beside plain loops and torchattacks, as Markdown.

    python benchmarks/attacks.py [--quick]

Trains the models of examples/finetune_digits.py first (two minutes on two cores). Timings are
ratios within this run: providers take turns, and the median comes with the quartiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import torchattacks
from _report import machine, table
from torch import Tensor

from calibclip import APGD, PGD, DirichletAlignLoss, WorstCase, ZeroShotClassifier, pgd
from calibclip.attacks.objectives import OBJECTIVES
from calibclip.attacks.threat import FeasibleSet, sample_keys, stream_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune_digits

THREADS = 2
EPS = 8 / 255


@dataclass(frozen=True)
class Setup:
    """The classifiers by name, and the images they are attacked on."""

    classifiers: dict[str, ZeroShotClassifier]
    images: Tensor
    labels: Tensor
    repeats: int


def train(settings: finetune_digits.Settings, repeats: int) -> Setup:
    torch.manual_seed(settings.seed)
    data = finetune_digits.load_data(settings)
    model = finetune_digits.build_clip()
    finetune_digits.pretrain(model, data, settings)
    tokenizer = open_clip.SimpleTokenizer(context_length=finetune_digits.CONTEXT_LENGTH)
    original = ZeroShotClassifier.from_open_clip(
        model, tokenizer, finetune_digits.DIGITS, (finetune_digits.TEMPLATE,)
    )
    align = DirichletAlignLoss(original.logit_scale, relative_weight=settings.relative_weight)
    classifiers = {
        "undefended": original,
        "TeCoA": finetune_digits.finetune(original, data, settings, None),
        "Dirichlet alignment": finetune_digits.finetune(original, data, settings, align),
    }
    return Setup(classifiers, data.test_images, data.test_labels, repeats)


# Timing


Times = dict[str, list[float]]


def take_turns(
    providers: dict[str, Callable[[], Any]], repeats: int
) -> tuple[Times, dict[str, Any]]:
    """Time the providers in turn, so that whatever slows the machine slows them alike.

    Return the seconds of each, and what each returned last.
    """
    times: Times = {name: [] for name in providers}
    returned: dict[str, Any] = {}
    for _ in range(repeats):
        for name, provider in providers.items():
            begin = time.perf_counter()
            returned[name] = provider()
            times[name].append(time.perf_counter() - begin)
    return times, returned


def ratio(times: Times, name: str, baseline: str) -> str:
    """Return the median ratio of two providers' times in the same turn, with its range."""
    ratios = sorted(a / b for a, b in zip(times[name], times[baseline], strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


# PGD-100


def starts(images: Tensor) -> Tensor:
    """Return the random starts that calibclip's own attacks would draw."""
    seeds = [stream_seed(0, key, 0) for key in sample_keys(images)]
    return FeasibleSet(images, EPS, "linf", (0.0, 1.0)).random_points(seeds)


def plain_pgd(
    classifier: ZeroShotClassifier, images: Tensor, labels: Tensor, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Take all samples through all steps, as published loops do; return who was ever fooled.

    The text features are cached all the same: what is compared is the attack.
    """
    points, step_size = start.clone(), EPS / 4
    ever = fooled = torch.zeros(len(images), dtype=torch.bool)
    for step in range(steps + 1):
        points = points.detach().requires_grad_(True)
        logits = classifier(points)
        fooled = logits.argmax(1) != labels
        ever = ever | fooled
        if step == steps:
            break
        F.cross_entropy(logits, labels).backward()
        assert points.grad is not None
        with torch.no_grad():
            points = points + step_size * points.grad.sign()
            points = torch.clamp(points, images - EPS, images + EPS).clamp(0, 1)
    for parameter in classifier.parameters():
        parameter.grad = None
    return ever, fooled


def pgd_section(setup: Setup, steps: int) -> None:
    print(f"## PGD-{steps}, L-infinity 8/255, digits\n")
    print(
        f"{len(setup.labels)} images at once, step eps/4, the same random starts. The plain loop "
        "takes all samples through all steps, with cached text features, and back-propagates into "
        "the parameters. Passes: images through the model, forward, as a share of the plain "
        "loop's.\n"
    )
    images, labels, start = setup.images, setup.labels, starts(setup.images)
    rows = []
    for name in ("undefended", "TeCoA"):
        classifier = setup.classifiers[name]
        attack = PGD(EPS, steps, stop_when_fooled=True)
        providers = {
            "plain": partial(plain_pgd, classifier, images, labels, start, steps),
            "ours": partial(attack, classifier, images, labels),
        }
        times, returned = take_turns(providers, setup.repeats)
        (ever, last), result = returned["plain"], returned["ours"]
        differ = int((ever != result.success).sum())
        rows.append(
            [
                name,
                f"{1 - float(ever.double().mean()):.2%}",
                f"{1 - float(last.double().mean()):.2%}",
                f"{1 - float(result.success.double().mean()):.2%}",
                str(differ),
                f"{result.forward_images / (len(labels) * (steps + 1)):.3f}",
                ratio(times, "ours", "plain"),
            ]
        )
    table(
        ["model", "plain: never fooled", "plain: right at the end", "calibclip: robust",
         "samples that differ", "passes", "time, of the plain loop's"],
        rows,
    )  # fmt: skip


# One step on ViT-B/32


def step_section(repeats: int, batch: int = 16) -> None:
    print(f"## One attack step on ViT-B/32, {batch} images, 13 prompts\n")
    print(
        "Random weights, float32. The plain step encodes the prompts again and back-propagates "
        "into all parameters, as the published loops do; beside it one with the text encoder "
        "frozen.\n"
    )
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    names = [f"class number {index}" for index in range(13)]
    classifier = ZeroShotClassifier.from_open_clip(
        copy.deepcopy(model), tokenizer, names, ("This is a photo of a {}",)
    )
    tokens = tokenizer([f"This is a photo of a {name}" for name in names])
    images, labels = torch.rand(batch, 3, 224, 224), torch.arange(batch) % 13
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    def forward(points: Tensor) -> Tensor:
        image_features, text_features, logit_scale = model((points - mean) / deviation, tokens)
        return logit_scale * image_features @ text_features.T

    def plain(text_frozen: bool = False) -> Tensor:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("visual") or not text_frozen)
        points = images.clone().requires_grad_(True)
        F.cross_entropy(forward(points), labels).backward()
        assert points.grad is not None
        moved = (images + points.grad.sign() / 255).clamp(0, 1)
        model.zero_grad()
        return moved

    attack = PGD(1 / 255, 1, 1 / 255, select="last", random_start=False)

    def full() -> Tensor:
        return attack(classifier, images, labels).images

    def step() -> Tensor:
        return pgd(classifier, images, labels, steps=1, random_start=False)

    same = float((plain() == step()).double().mean())
    providers = {
        "plain": plain,
        "frozen": partial(plain, text_frozen=True),
        "step": step,
        "judged": full,
    }
    times, _ = take_turns(providers, repeats)
    rows = {"pgd, one step": "step", "PGD, one step and the judgement of its result": "judged"}
    table(
        ["", "time, of the plain step's", "of the one with frozen text"],
        [
            [label, ratio(times, name, "plain"), ratio(times, name, "frozen")]
            for label, name in rows.items()
        ],
    )
    print(f"Pixels equal to the plain step's: {same:.4%}.\n")


# APGD


def torchattacks_start(images: Tensor, norm: str) -> Tensor:
    """Return the start that torchattacks draws with seed 0 for these images."""
    torch.manual_seed(0)
    if norm == "linf":
        noise = 2 * torch.rand(images.shape) - 1
        noise = noise / noise.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        eps = EPS
    else:
        noise = torch.randn(images.shape)
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        eps = 1.0
    return (images + eps * noise).clamp(0, 1)


def apgd_section(setup: Setup, steps: int, n_images: int) -> None:
    print(f"## APGD-{steps} beside torchattacks: what it finds\n")
    print(
        f"The first {n_images} test images that the model gets right, the same starts; L-infinity "
        "8/255 and L2 1.0. Loss: the best of the run per sample; the same: within 1e-4 of "
        "max(1, |loss|). compat reproduces the official code's first window and its textbook "
        "cross-entropy.\n"
    )
    rows = []
    for name in ("undefended", "TeCoA"):
        classifier, images, labels = right_ones(setup, name, n_images)
        for norm, eps in (("linf", EPS), ("l2", 1.0)):
            for loss in ("ce", "dlr"):
                case = (name, norm, eps, loss)
                rows += apgd_rows(case, classifier, images, labels, steps)
    table(
        ["model", "norm", "loss", "calibclip", "torchattacks: robust", "calibclip: robust",
         "samples that differ", "loss the same", "higher", "lower"],
        rows,
    )  # fmt: skip


def right_ones(setup: Setup, name: str, n_images: int) -> tuple[ZeroShotClassifier, Tensor, Tensor]:
    """Return a classifier and the first images that it gets right."""
    classifier = setup.classifiers[name]
    with torch.no_grad():
        right = classifier(setup.images).argmax(1) == setup.labels
    return classifier, setup.images[right][:n_images], setup.labels[right][:n_images]


class Recorder:
    """An objective that remembers the highest loss of each sample of a batch run in lockstep."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss, self.best = loss, torch.tensor(-torch.inf)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        value = self.loss(logits, target)
        self.best = torch.maximum(self.best, value.detach())
        return value


def textbook(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def single_run(attack: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Run torchattacks' APGD once, from the start that its seed draws."""
    torch.manual_seed(0)
    return attack.attack_single_run(images, labels)


def perturbed_by(attack: Any, classifier: ZeroShotClassifier, images: Tensor, labels: Tensor):
    """Return which samples a torchattacks attack breaks."""
    found = attack(images, labels)
    with torch.no_grad():
        return classifier(found).argmax(1) != labels


def apgd_rows(
    case: tuple[str, str, float, str],
    classifier: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    steps: int,
) -> list[list[str]]:
    """Compare one loss on one model, with and without the official quirks."""
    name, norm, eps, loss = case
    rows = []
    start = torchattacks_start(images, norm)
    theirs = torchattacks.APGD(
        classifier, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=steps, loss=loss
    )
    _, still_right, best, _ = single_run(theirs, images, labels)
    fooled_by_theirs = ~still_right.bool()
    for compat in (True, False):
        function = textbook if compat and loss == "ce" else OBJECTIVES[loss].loss
        recorder = Recorder(function)
        attack = APGD(eps, steps, norm, recorder, compat=compat)
        result = attack(classifier, images, labels, start=start)
        gain = (recorder.best - best) / best.abs().clamp(min=1)
        rows.append(
            [
                name,
                norm,
                loss,
                "compat" if compat else "native",
                f"{1 - float(fooled_by_theirs.double().mean()):.2%}",
                f"{1 - float(result.success.double().mean()):.2%}",
                str(int((fooled_by_theirs != result.success).sum())),
                str(int((gain.abs() <= 1e-4).sum())),
                str(int((gain > 1e-4).sum())),
                str(int((gain < -1e-4).sum())),
            ]
        )
    return rows


def apgd_time_section(setup: Setup, steps: int, n_images: int) -> None:
    print(f"## APGD-{steps} beside torchattacks: time\n")
    print(f"L-infinity, {n_images} images that the model gets right; of torchattacks' time.\n")
    rows = []
    for name in ("undefended", "TeCoA"):
        classifier, images, labels = right_ones(setup, name, n_images)
        for loss in ("ce", "dlr"):
            theirs = torchattacks.APGD(classifier, eps=EPS, steps=steps, loss=loss)
            ours = APGD(EPS, steps, objective=loss)
            stopping = replace(ours, stop_when_fooled=True)
            times, _ = take_turns(
                {
                    "theirs": partial(theirs, images, labels),
                    "ours": partial(ours, classifier, images, labels),
                    "stopping": partial(stopping, classifier, images, labels),
                },
                setup.repeats,
            )
            rows.append([name, loss, *(ratio(times, x, "theirs") for x in ("ours", "stopping"))])
    table(["model", "loss", "all steps", "stop_when_fooled"], rows)


def apgd_t_section(setup: Setup, steps: int, n_images: int) -> None:
    print(f"## APGD-T-{steps} beside torchattacks\n")
    print(
        "All nine other classes as targets, each library with its own starts, on the same images. "
        "Both stop a sample at its first success, torchattacks between targets, calibclip at once."
        "\n"
    )
    rows = []
    for name in ("undefended", "TeCoA"):
        classifier, images, labels = right_ones(setup, name, n_images)
        theirs = torchattacks.APGDT(classifier, eps=EPS, steps=steps, n_classes=10)
        attack = APGD(EPS, steps, objective="dlr-targeted", stop_when_fooled=True)
        times, returned = take_turns(
            {
                "ours": partial(attack, classifier, images, labels),
                "theirs": partial(perturbed_by, theirs, classifier, images, labels),
            },
            1,
        )
        ours, other = returned["ours"].success, returned["theirs"]
        rows.append(
            [
                name,
                f"{1 - float(other.double().mean()):.2%}",
                f"{1 - float(ours.double().mean()):.2%}",
                str(int((other & ~ours).sum())),
                str(int((ours & ~other).sum())),
                ratio(times, "ours", "theirs"),
            ]
        )
    table(
        ["model", "torchattacks: robust", "calibclip: robust", "broken by torchattacks only",
         "by calibclip only", "time ratio"],
        rows,
    )  # fmt: skip


# The worst case


def worst_case_section(setup: Setup, steps: int, n_images: int) -> None:
    print(f"## WorstCase.reliable with {steps} steps\n")
    print(
        f"The first {n_images} test images; accuracy. PGD: {steps} steps, worst iterate. Each "
        "attack ran on all samples, for its accuracy alone.\n"
    )
    images, labels = setup.images[:n_images], setup.labels[:n_images]
    rows = []
    for name, classifier in setup.classifiers.items():
        worst = replace(WorstCase.reliable(EPS, steps=steps), individual=True)
        joint = worst(classifier, images, labels)
        alone = joint.accuracy or {}
        pgd_result = PGD(EPS, steps, stop_when_fooled=True)(classifier, images, labels)
        stands = (~joint.success & pgd_result.success).sum()
        rows.append(
            [
                name,
                f"{joint.clean_accuracy:.2%}",
                f"{1 - float(pgd_result.success.double().mean()):.2%}",
                *(f"{accuracy:.2%}" for accuracy in alone.values()),
                f"{joint.robust_accuracy:.2%}",
                str(int(stands)),
                f"{joint.robust_accuracy <= min(alone.values())}",
            ]
        )
    table(
        ["model", "clean", f"PGD-{steps}", "APGD-CE alone", "APGD-T alone", "worst case",
         "broken by PGD only", "<= each member"],
        rows,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare calibclip's attacks with others.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: weak models, few steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", module="torchattacks")
    print(f"# Attacks\n\n{machine()}\n")
    settings = finetune_digits.QUICK if quick else finetune_digits.Settings()
    setup = train(settings, repeats=1 if quick else 3)
    steps, some = (10, 20) if quick else (100, 50)
    pgd_section(setup, steps)
    step_section(repeats=2 if quick else 15)
    apgd_section(setup, steps, some)
    apgd_time_section(setup, steps, some)
    apgd_t_section(setup, steps, some)
    worst_case_section(setup, steps, some * 2)


if __name__ == "__main__":
    main()
