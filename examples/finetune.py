"""Adversarially fine-tune the image encoder of an open_clip model by a published method.

    python examples/finetune.py --loss ucat --data CIFAR100 --val-data CIFAR100 --download
    torchrun --nproc-per-node 8 examples/finetune.py --loss tga --data tiny-imagenet/train \\
        --class-names tiny-imagenet/words.txt --precision bf16
    python examples/finetune.py --loss fare --synthetic      the same on a tiny CLIP, in seconds

A step runs the image encoder once for each image and model that the loss requires, besides the
attack, and never the text encoder. What the frozen model makes of the clean images is kept in
memory. The processes of torchrun together take the same steps as a single one, and so does a batch
taken in parts (--accumulate). docs/training-step.md says what a step costs and which option pays.

The result, DIR/last.pt, goes back into open_clip's model with

    state = torch.load("DIR/last.pt", map_location="cpu")
    model = open_clip.create_model(**state["model"])
    model.visual.load_state_dict(state["visual"])
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from _finetune_data import training_loader
from _finetune_options import check_same_run, lasting_options, plain_options, read_options
from _finetune_passes import checkpointed, craft
from _finetune_report import evaluate, print_plan, print_results
from _finetune_setup import Run, model_arguments, prepare
from _finetune_world import World, join_world
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


def train(run: Run, first_epoch: int) -> None:
    options, world = run.options, run.world
    loader, sampler = training_loader(
        run.train_data,
        options.batch_size,
        seed=options.seed,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=world.device.type == "cuda",
        **world.place,
    )
    step = first_epoch * run.steps_per_epoch
    total = options.epochs * run.steps_per_epoch
    with tqdm(total=total, initial=step, unit="step", disable=world.rank > 0) as bar:
        for epoch in range(first_epoch, options.epochs):
            sampler.set_epoch(epoch)
            for index, images, target in loader:
                # By the step, whether or not the scaler leaves out an update.
                lr = run.schedule(step)
                terms = training_step(run, index, images, target)
                step += 1
                bar.update()
                if step % options.log_every == 0 or step % run.steps_per_epoch == 0:
                    values = average(run, terms)
                    log(run, epoch=epoch, step=step, lr=lr, **values)
                    bar.set_postfix(loss=f"{values['loss']:.4g}")
            save_checkpoint(run, epoch + 1)


def training_step(run: Run, index: Tensor, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Take one step on images at the given positions of the data; return the loss's terms."""
    device, n_parts = run.world.device, run.options.accumulate
    images, target = (batch.to(device, non_blocking=True) for batch in (images, target))
    run.optimizer.zero_grad()  # first, so that the attack has the gradients' memory
    # One for all parts: an image's start depends on it and on the image, not on the part.
    seed = int(torch.randint(2**63 - 1, (), generator=run.generator))
    parts = zip(*(batch.chunk(n_parts) for batch in (index, images, target)), strict=True)
    terms = {}
    for number, part in enumerate(parts, start=1):
        with gradients_kept_here(run.trained) if number < n_parts else nullcontext():
            for name, term in backward(run, *part, seed=seed).items():
                terms[name] = terms.get(name, 0) + term.detach() / n_parts
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return terms


def gradients_kept_here(trained: nn.Module) -> AbstractContextManager[None]:
    """Leave the exchange between processes to the last part of a batch."""
    return trained.no_sync() if isinstance(trained, DistributedDataParallel) else nullcontext()


def backward(
    run: Run, index: Tensor, images: Tensor, target: Tensor, seed: int
) -> dict[str, Tensor]:
    """Attack a part of a batch, and add its share to the gradients; return the loss's terms."""
    options = run.options
    references = run.references.on_clean(index, images, target)
    with checkpointed(run.visual if options.checkpointing == "all" else None):
        images_adv = craft(
            run.classifier,
            run.encoder,
            images,
            target,
            references,
            eps=options.eps,
            step_size=options.step_size,
            steps=options.attack_steps,
            seed=seed,
        )
    references |= run.references.on_attacked(images_adv, target)
    terms = run.trained(images_adv, images, target, references)
    run.scaler.scale(terms["total"] / options.accumulate).backward()
    return terms


def average(run: Run, terms: dict[str, Tensor]) -> dict[str, float]:
    """Return the terms' means over the processes, and stop a run whose loss is not finite.

    Within an epoch only this waits for the device.
    """
    stacked = torch.stack([term.double() for term in terms.values()])
    values = dict(zip(terms, run.world.mean(stacked).tolist(), strict=True))
    loss = values.pop("total")
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss}; its terms: {values}. Try a lower --lr, or bf16")
    return {"loss": loss, **values}


def log(run: Run, **values: Any) -> None:
    if run.world.rank == 0:
        with (run.options.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


def start_log(run: Run, epoch: int) -> None:
    """Keep what was logged before this epoch, and log anew the interrupted one."""
    if run.world.rank > 0:
        return
    run.options.out.mkdir(parents=True, exist_ok=True)
    path = run.options.out / "log.jsonl"
    lines = path.read_text().splitlines() if epoch > 0 and path.exists() else []
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(line + "\n" for line in lines if epoch_of(line) < epoch))
    partial.replace(path)
    names = ("calibclip", "torch", "open_clip_torch")
    log(
        run,
        epoch=epoch,
        options=plain_options(run.options),
        processes=run.world.size,
        versions={name: version(name) for name in names},
    )


def epoch_of(line: str) -> float:
    """Return the epoch of a line of the log; a half-written one belongs to none."""
    try:
        return json.loads(line)["epoch"]
    except json.JSONDecodeError:
        return math.inf


def save_checkpoint(run: Run, epoch: int) -> None:
    """Write DIR/last.pt, at no time leaving half a file, nor weights that are not finite."""
    if not all(bool(weight.isfinite().all()) for weight in run.visual.parameters()):
        raise SystemExit("a weight is not finite: the last checkpoint stays. Try a lower --lr")
    if run.world.rank > 0:
        return
    path = run.options.out / "last.pt"
    state = {
        "model": model_arguments(run.options),
        "visual": run.visual.state_dict(),
        "epoch": epoch,
        "generator": run.generator.get_state(),
        "options": lasting_options(run.options),
        "data": describe_data(run),
        **{name: getattr(run, name).state_dict() for name in ("optimizer", "scaler")},
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def describe_data(run: Run) -> dict[str, Any]:
    return {"images": len(run.train_data), "classes": run.train_data.class_names}


def check_output(options: argparse.Namespace) -> None:
    path = options.out / "last.pt"
    if options.resume and not path.exists():
        raise SystemExit(f"--resume: expected a checkpoint {path}; start without --resume")
    if path.exists() and not options.resume:
        raise SystemExit(f"{path} exists: pass --resume, or another --out")


def resume(run: Run) -> int:
    """Load the checkpoint, and return the epoch to go on with."""
    state = torch.load(run.options.out / "last.pt", map_location="cpu", weights_only=True)
    check_same_run(state["options"], lasting_options(run.options))
    if state["data"] != describe_data(run):
        raise SystemExit("--resume: expected the run's data: as many images of the same classes")
    run.visual.load_state_dict(state["visual"])
    run.generator.set_state(state["generator"])
    for name in ("optimizer", "scaler"):
        getattr(run, name).load_state_dict(state[name])
    return state["epoch"]


def execute(options: argparse.Namespace, world: World) -> None:
    """Train, evaluate and report."""
    started = time.perf_counter()
    run = prepare(options, world)
    first_epoch = resume(run) if options.resume else 0
    start_log(run, first_epoch)
    if world.rank == 0:
        print_plan(run)
    train(run, first_epoch)
    results = evaluate(run)
    seconds = time.perf_counter() - started
    log(run, epoch=options.epochs, **results, seconds=seconds)
    if world.rank == 0:
        print_results(run, results)
        print(f"\nWrote last.pt and log.jsonl to {options.out}; {seconds:.0f} s in all.")


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments, __doc__)
    check_output(options)
    with join_world(options.device) as world:
        execute(options, world)


if __name__ == "__main__":
    main()
