"""calibclip on several processes: each attacks, aligns and measures its own share of the images.

Nothing of calibclip's is wrapped. The image encoder is, by FSDP2 or DistributedDataParallel, and
the gradients are averaged where they always are, in the backward pass::

    - images_adv = attack(model, images, labels)
    + images_adv = pgd(classifier, images, labels, EPS, STEP_SIZE, STEPS, generator=generator)
    - loss = F.cross_entropy(model(images_adv), labels)
    + loss = align(trained(images_adv), reference(images), labels)

``docs/scale.md`` says what to mind, and what it costs at 64 GPUs.

    torchrun --nproc-per-node 2 examples/in_fsdp.py          FSDP2, 75 s on two cores
    torchrun --nproc-per-node 2 examples/in_fsdp.py --ddp
    python examples/in_fsdp.py                               one process
"""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any

import _digits
import torch
import torch.distributed as dist
from _digits import DEVICE, EPS, NAMES, STEP_SIZE, STEPS, TEMPLATE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from calibclip import DirichletAlignLoss, ZeroShotClassifier, metrics, pgd


def start() -> tuple[int, int]:
    """Join the other processes of torchrun, or be alone; return the rank and how many there are."""
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update({} if "RANK" in os.environ else alone)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def distribute(classifier: ZeroShotClassifier, visual: nn.Module, ddp: bool) -> nn.Module:
    """Return what the training pass calls. The attack calls the classifier itself in both cases."""
    if ddp:
        return DistributedDataParallel(classifier)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for block in visual.get_submodule("transformer.resblocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(visual, mesh=mesh)
    return classifier


def measure(when: str, classifier: ZeroShotClassifier, digits: _digits.Digits) -> list[str]:
    """Return the rows of the table; the images are shared out, each to one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels = digits.test_images[rank::size], digits.test_labels[rank::size]
    attacked = pgd(classifier, images, labels, EPS, steps=10)
    rows = []
    for kind, inputs in (("clean", images), ("attacked", attacked)):
        group = metrics.MetricGroup(
            {
                "accuracy": metrics.Accuracy(),
                "ece": metrics.ExpectedCalibrationError(),
                "brier": metrics.BrierScore(),
            }
        )
        with torch.no_grad():
            group.update(logits=classifier(inputs), target=labels)
        values = group.compute()  # the one all-reduce
        cells = " | ".join(f"{value:.3f}" for value in values.values())
        rows.append(f"| {when} | {kind} | {cells} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ddp", action="store_true", help="copies of the model, no shards")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a test")
    arguments = parser.parse_args()
    rank, size = start()
    trained_once: list[Any] = [_digits.tiny_clip(arguments.quick) if rank == 0 else None]
    dist.broadcast_object_list(trained_once)
    model, tokenizer = trained_once[0]
    model.to(DEVICE)  # from the first process's accelerator
    digits = _digits.load(_digits.SIZE, arguments.quick)
    classifier = ZeroShotClassifier.from_open_clip(model, tokenizer, NAMES, (TEMPLATE,))
    reference = copy.deepcopy(classifier).requires_grad_(False)  # before: shards are not copied
    classifier.requires_grad_(False)
    visual = model.visual.requires_grad_(True)

    trained = distribute(classifier, visual, arguments.ddp)
    # The mean of alpha_0 that relative_weight divides by is the local batch's; weight= knows none.
    align = DirichletAlignLoss(classifier.logit_scale, relative_weight=1.0)
    optimizer = torch.optim.AdamW(visual.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    table = measure("before", classifier, digits)
    epochs = 1 if arguments.quick else 16
    for images, labels in _digits.batches(digits, epochs, size=32 * size):
        # Equal shares: a mean over ranks of means is the mean over images only then.
        mine = slice(rank, len(images) - len(images) % size, size)
        images, labels = images[mine], labels[mine]
        # was: images_adv = attack(model, images, labels)
        images_adv = pgd(classifier, images, labels, EPS, STEP_SIZE, STEPS, generator=generator)
        # was: loss = F.cross_entropy(model(images_adv), labels)
        loss = align(trained(images_adv), reference(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    table += measure("after", classifier, digits)

    if rank == 0:
        print(f"{'DDP' if arguments.ddp else 'FSDP2'}, {size} processes")
        print("| model | images | accuracy | ECE | Brier |\n|---|---|---|---|---|")
        print("\n".join(table))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
