"""Adversarially fine-tune the image encoder of an open_clip model by a published method.

    python examples/finetune.py --loss ucat --data CIFAR100 --val-data CIFAR100 --download
    torchrun --nproc-per-node 8 examples/finetune.py --loss tga --data tiny-imagenet/train \\
        --class-names tiny-imagenet/words.txt --precision bf16 --workers 8
    python examples/finetune.py --loss fare --synthetic      the same on a tiny CLIP, in seconds

A step runs the image encoder once for each image and model that the loss requires, besides the
attack, and never the text encoder. What the frozen model makes of the clean images is kept in
memory. The processes of torchrun together take the same steps as a single one.

The result, DIR/last.pt, goes back into open_clip's model with

    model.visual.load_state_dict(torch.load("DIR/last.pt")["visual"])
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from _finetune_data import (
    Digits,
    Labelled,
    evaluation_loader,
    labelled,
    open_images,
    register_tiny_clip,
    training_loader,
)
from _finetune_options import PRECISIONS, build_loss, check_same_run, lasting_options, read_options
from _finetune_passes import Encoder, References, TrainedPasses, craft, describe, required
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import Compose, Normalize
from tqdm import tqdm

from calibclip import PGD, ZeroShotClassifier, metrics

NEGATIVE_TEMPLATE = "This is not a photo of a {}"  # Comp-TGA's


@dataclass(frozen=True)
class World:
    """The processes that train together, and the place of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def place(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.size}

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let one process download, and the others find it done."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()


@contextmanager
def join_world(kind: str) -> Iterator[World]:
    """Join the processes of torchrun; without it, be the only one."""
    device = torch.device(kind)
    if not dist.is_torchelastic_launched():
        yield World(0, 1, device)
        return
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Run:
    """All that a training run consists of."""

    options: argparse.Namespace
    world: World
    classifier: ZeroShotClassifier
    val_classifier: ZeroShotClassifier
    loss: Any
    encoder: Encoder
    references: References
    trained: nn.Module  # TrainedPasses, behind DistributedDataParallel under torchrun
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
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
    torch.manual_seed(options.seed)
    model, transform, tokenizer = build_model(options, world)
    with world.main_process_first():
        train_data, val_data = open_data(options, transform)
    check_sizes(options, world, len(train_data))

    build = partial(ZeroShotClassifier.from_open_clip, model, tokenizer)
    classifier = build(train_data.class_names, (options.template,))
    # A sigmoid-trained model's: no softmax sees it, and UCAT reads cosines from the logits.
    classifier.logit_bias = 0.0
    val_classifier = classifier
    if val_data is not None and val_data.class_names != train_data.class_names:
        val_classifier = build(val_data.class_names, (options.template,))
    model.requires_grad_(False)
    frozen = copy.deepcopy(classifier)
    weights = list(model.get_submodule("visual").requires_grad_().parameters())

    loss = build_loss(options, classifier.logit_scale, world.size)
    negative = None
    if options.loss == "comp-tga":
        negative = build(train_data.class_names, (NEGATIVE_TEMPLATE,)).text_features
    encoder = Encoder(PRECISIONS[options.precision], negative)
    trained: nn.Module = TrainedPasses(classifier, encoder, loss)
    if dist.is_initialized():
        trained = DistributedDataParallel(trained)
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            weights, options.lr, momentum=0.9, weight_decay=options.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(weights, options.lr, weight_decay=options.weight_decay)
    steps = options.epochs * (len(train_data) // options.batch_size)
    return Run(
        options=options,
        world=world,
        classifier=classifier,
        val_classifier=val_classifier,
        loss=loss,
        encoder=encoder,
        references=References(
            frozen,
            encoder,
            loss,
            keep=None if options.augment else len(train_data),
            gather=world.gather,
        ),
        trained=trained,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(warmup_then_cosine, warmup=options.warmup, total=steps)
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16"),
        generator=torch.Generator().manual_seed(options.seed),
        train_data=train_data,
        val_data=val_data,
    )


def build_model(
    options: argparse.Namespace, world: World
) -> tuple[nn.Module, tuple[Compose, Compose], Any]:
    """Return open_clip's model, its training and evaluation transforms, and its tokenizer."""
    name, weights = options.model, options.pretrained
    if options.synthetic:
        name, weights = register_tiny_clip(), None
    # OpenAI's weights want QuickGELU, which the plain names of the models do not imply.
    quick_gelu = open_clip.get_pretrained_cfg(name, weights or "").get("quick_gelu", False)
    with world.main_process_first():
        try:
            model, *transforms = open_clip.create_model_and_transforms(
                name, weights, device=world.device, force_quick_gelu=quick_gelu
            )
        except RuntimeError as error:
            raise SystemExit(f"--model {name}, --pretrained {weights}: {error}") from None
        tokenizer = open_clip.get_tokenizer(name)
    # calibclip normalises inside the classifier, so that attacks see pixels in [0, 1].
    train, evaluation = map(without_normalize, transforms)
    return model.eval(), (train, evaluation), tokenizer


def without_normalize(transform: Any) -> Compose:
    return Compose([step for step in transform.transforms if not isinstance(step, Normalize)])


def open_data(
    options: argparse.Namespace, transforms: tuple[Compose, Compose]
) -> tuple[Labelled, Labelled | None]:
    """Return the training data and, if there is any, the data for the evaluation."""
    augmented, plain = transforms
    torchvision = {"root": options.data_root, "download": options.download}
    train = labelled(
        Digits(train=True)
        if options.synthetic
        else open_images(options.data, train=True, **torchvision),
        augmented if options.augment else plain,
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
        plain,
        names=options.val_class_names,
        same_as=train,
        limit=options.val_images,
        seed=options.seed,
    )
    return train, val


def check_sizes(options: argparse.Namespace, world: World, n_images: int) -> None:
    batch, steps = options.batch_size, options.epochs * (n_images // options.batch_size)
    if batch % world.size:
        raise SystemExit(f"--batch-size {batch}: expected a multiple of the {world.size} processes")
    if n_images < batch:
        raise SystemExit(f"--batch-size {batch}: expected no more than the {n_images} images")
    if not 0 <= options.warmup < steps:
        raise SystemExit(f"--warmup {options.warmup}: expected fewer than the {steps} steps in all")


def warmup_then_cosine(step: int, warmup: int, total: int) -> float:
    """Return the share of the learning rate in a step, the first being 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


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
    last = options.epochs * run.steps_per_epoch
    step = first_epoch * run.steps_per_epoch
    with tqdm(total=last, initial=step, unit="step", disable=world.rank > 0) as bar:
        for epoch in range(first_epoch, options.epochs):
            sampler.set_epoch(epoch)
            # Only augmentation draws from it, in each process and epoch differently.
            torch.manual_seed(options.seed + epoch * world.size + world.rank)
            for index, images, target in loader:
                lr = run.optimizer.param_groups[0]["lr"]
                terms = training_step(run, index, images, target)
                step += 1
                bar.update()
                if step % options.log_every == 0 or step == last:
                    values = average(run, terms)
                    log(run, epoch=epoch, step=step, lr=lr, **values)
                    bar.set_postfix(loss=f"{values['loss']:.4g}")
            save_checkpoint(run, epoch + 1)


def training_step(run: Run, index: Tensor, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Take one step on images at the given positions of the data; return the loss's terms."""
    options, device = run.options, run.world.device
    images, target = (batch.to(device, non_blocking=True) for batch in (images, target))
    references = run.references.on_clean(index, images, target)
    images_adv = craft(
        run.classifier,
        run.encoder,
        images,
        target,
        references,
        eps=options.eps,
        step_size=options.step_size,
        steps=options.attack_steps,
        generator=run.generator,
    )
    references |= run.references.on_attacked(images_adv, target)
    terms = run.trained(images_adv, images, target, references)
    run.optimizer.zero_grad()
    run.scaler.scale(terms["total"]).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    return terms


def average(run: Run, terms: dict[str, Tensor]) -> dict[str, float]:
    """Return the terms' means over the processes; the one place that waits for the device."""
    stacked = torch.stack([term.detach().double() for term in terms.values()])
    values = dict(zip(terms, run.world.mean(stacked).tolist(), strict=True))
    loss = values.pop("total")
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss}; its terms: {values}. Try a lower --lr, or bf16")
    return {"loss": loss, **values}


def log(run: Run, **values: Any) -> None:
    if run.world.rank == 0:
        with (run.options.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


def save_checkpoint(run: Run, epoch: int) -> None:
    """Write DIR/last.pt, at no time leaving half a file."""
    if run.world.rank > 0:
        return
    path = run.options.out / "last.pt"
    state = {
        "visual": run.visual.state_dict(),
        "epoch": epoch,
        "generator": run.generator.get_state(),
        "options": lasting_options(run.options),
        **{name: getattr(run, name).state_dict() for name in ("optimizer", "scheduler", "scaler")},
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


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
    run.visual.load_state_dict(state["visual"])
    run.generator.set_state(state["generator"])
    for name in ("optimizer", "scheduler", "scaler"):
        getattr(run, name).load_state_dict(state[name])
    return state["epoch"]


def start_log(run: Run, epoch: int) -> None:
    """Keep what was logged before this epoch; an interrupted one is logged anew."""
    if run.world.rank == 0:
        run.options.out.mkdir(parents=True, exist_ok=True)
        path = run.options.out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if epoch > 0 else []
        path.write_text("".join(line for line in lines if json.loads(line)["epoch"] < epoch))


def evaluate(run: Run) -> dict[str, Any]:
    """Measure accuracy and calibration, clean and under PGD, in full precision."""
    options, world, classifier, data = run.options, run.world, run.val_classifier, run.val_data
    if data is None:
        return {}
    attack = PGD(options.eps, options.val_steps, options.step_size, seed=options.seed)
    loader = evaluation_loader(data, options.batch_size, num_workers=options.workers, **world.place)
    outputs = []
    for _, images, target in tqdm(loader, desc="evaluation", disable=world.rank > 0):
        images, target = images.to(world.device), target.to(world.device)
        attacked = attack(classifier, images, target).images
        with torch.no_grad():
            logits = (classifier(images), classifier(attacked))
        outputs.append((*(batch.cpu() for batch in logits), target.cpu()))
    batches = (batch for share in world.gather(outputs) for batch in share)
    clean, pgd, target = (torch.cat(part) for part in zip(*batches, strict=True))
    results = {
        f"{name}_{metric.__name__}": metric(logits=logits, target=target)
        for name, logits in (("clean", clean), ("pgd", pgd))
        for metric in (metrics.accuracy, metrics.expected_calibration_error)
    }
    return {"val_images": len(target), "pgd_steps": options.val_steps, **results}


def print_plan(run: Run) -> None:
    options, world = run.options, run.world
    model = f"{options.model} ({options.pretrained or 'untrained'})"
    model = "tiny CLIP (untrained)" if options.synthetic else model
    keeps = not options.augment and bool(required(run.loss, "ref"))
    print(
        f"method     {options.loss}, {run.loss}\n"
        f"model      {model}, {len(run.train_data.class_names)} classes; {options.precision} on "
        f"{world.size} x {world.device.type}\n"
        f"training   {len(run.train_data)} images, {options.epochs} epochs of "
        f"{run.steps_per_epoch} steps, batch {options.batch_size}; {options.optimizer}, "
        f"lr {options.lr:g}, warm-up {options.warmup}\n"
        f"attack     eps {255 * options.eps:.3g}/255, {options.attack_steps} steps of "
        f"{255 * options.step_size:.3g}/255\n"
        f"a step     encoder passes: {describe(run.loss, options.attack_steps, keeps)}\n"
        f"output     {options.out}"
    )


def print_results(run: Run, results: dict[str, Any]) -> None:
    if results:
        print(f"\n{results['val_images']:6d} images  accuracy      ECE")
        for name, title in (("clean", "clean"), ("pgd", f"PGD-{results['pgd_steps']}")):
            accuracy = results[f"{name}_accuracy"]
            error = results[f"{name}_expected_calibration_error"]
            print(f"{title:13s}{accuracy:10.1%}  {error:7.3f}")


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
