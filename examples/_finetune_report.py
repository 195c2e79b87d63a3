"""What finetune.py reports: the plan of a run, and the evaluation at its end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from _finetune_data import evaluation_loader
from _finetune_passes import describe
from _finetune_setup import Run
from torch import Tensor
from tqdm import tqdm

from calibclip import PGD, ZeroShotClassifier, metrics

METRICS = (metrics.accuracy, metrics.expected_calibration_error)
# The columns of what is gathered: which model's logits, and on which images.
OUTPUTS = [(model, view) for model in ("original", "finetuned") for view in ("clean", "pgd")]


def print_plan(run: Run) -> None:
    options, world, loss = run.options, run.world, run.loss
    model = f"{options.model} ({options.pretrained or 'untrained'})"
    image = run.train_data[0][1].to(world.device)
    height, width = image.shape[1:]
    kept = run.references.memory(image)
    passes = describe(
        loss,
        options.attack_steps,
        kept > 0,
        parts=options.accumulate,
        checkpointing=options.checkpointing,
    )
    print(
        f"method     {options.loss}, {loss}\n"
        f"model      {model}; {options.precision} on {world.size} x {world.device.type}"
        f"{', compiled' if options.compile else ''}\n"
        f"training   {len(run.train_data)} images, {options.epochs} epochs of "
        f"{run.steps_per_epoch} steps, batch {options.batch_size}; {options.optimizer}, "
        f"lr {options.lr:g}, warm-up {options.warmup}\n"
        f"classes    {describe_prompts(run.classifier)}"
    )
    if run.val_data is not None:
        print(f"evaluation {len(run.val_data)} images, {describe_prompts(run.val_classifier)}")
    print(
        f"attack     eps {255 * options.eps:.3g}/255, {options.attack_steps} steps of "
        f"{255 * options.step_size:.3g}/255, on {height} x {width} pixels\n"
        f"a step     encoder passes: {passes}"
    )
    if kept:
        print(f"memory     {kept / 2**20:.3g} MiB of references (--no-keep: none)")
    print(f"output     {options.out}")


def describe_prompts(classifier: ZeroShotClassifier) -> str:
    """Return how many classes there are and the first prompts; wrong names show here."""
    names = classifier.class_names
    first = ", ".join(repr(prompts[0]) for prompts in classifier.prompts[:3])
    twice = [name for name, count in Counter(names).items() if count > 1]
    equal = f"; of one name: {', '.join(twice)}" if twice else ""
    return f"{len(names)} classes: {first}{', ...' if len(names) > 3 else ''}{equal}"


def evaluate(run: Run) -> dict[str, Any]:
    """Measure both models' accuracy and calibration, clean and under PGD, in full precision."""
    options, world, data = run.options, run.world, run.val_data
    if data is None:
        return {}
    attack = PGD(options.val_eps, options.val_steps, options.step_size, seed=options.seed)
    loader = evaluation_loader(data, options.batch_size, num_workers=options.workers, **world.place)
    outputs = []
    for _, images, target in tqdm(loader, desc="evaluation", disable=world.rank > 0):
        batch = (images.to(world.device), target.to(world.device))
        logits = [
            view.cpu()
            for classifier in (run.original, run.val_classifier)
            for view in clean_and_attacked(attack, classifier, *batch)
        ]
        outputs.append((target, *logits))
    batches = (batch for share in world.gather(outputs) for batch in share)
    target, *logits = (torch.cat(part) for part in zip(*batches, strict=True))
    results = {
        f"{model}_{view}_{metric.__name__}": metric(logits=values, target=target)
        for (model, view), values in zip(OUTPUTS, logits, strict=True)
        for metric in METRICS
    }
    return {
        "val_images": len(target),
        "pgd_steps": options.val_steps,
        "pgd_eps": options.val_eps,
        **results,
    }


def clean_and_attacked(
    attack: PGD, classifier: ZeroShotClassifier, images: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits on clean images, and on the worst iterates of the attack."""
    attacked = attack(classifier, images, target).images
    with torch.no_grad():
        return classifier(images), classifier(attacked)


def print_results(run: Run, results: dict[str, Any]) -> None:
    if not results:
        return
    pgd, radius = f"PGD-{results['pgd_steps']}", f"{255 * results['pgd_eps']:.3g}/255"
    print(
        f"\n{results['val_images']} images; {pgd}: eps {radius}, the worst iterate\n"
        f"{'':10s}  {'accuracy':>10s}{pgd:>10s}  {'ECE':>10s}{pgd:>10s}"
    )
    for model, title in (("original", "original"), ("finetuned", "fine-tuned")):
        accuracy, error = (
            [results[f"{model}_{view}_{metric.__name__}"] for view in ("clean", "pgd")]
            for metric in METRICS
        )
        print(
            f"{title:10s}  {accuracy[0]:10.1%}{accuracy[1]:10.1%}  {error[0]:10.3f}{error[1]:10.3f}"
        )
    if run.options.synthetic:
        print("A smoke test: the numbers of an untrained model mean nothing.")
