"""What the tests of examples/finetune.py share: small runs, what they wrote, and pass counts."""

import json
from dataclasses import dataclass, field

import torch

LOSSES = ("ucat", "tecoa", "pmg", "fare", "tga", "comp-tga")

# Rates at which eight steps change every loss visibly, so that equal losses mean equal gradients.
RATES = {"fare": "1e-4", "ucat": "3e-4"}
SMALL = (
    "--synthetic --images 64 --batch-size 16 --warmup 2 --attack-steps 2 "
    "--val-images 15 --val-steps 2"
).split()


def arguments(loss, out, *more):
    return [*SMALL, "--loss", loss, "--lr", RATES.get(loss, "0.05"), "--out", str(out), *more]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps(out):
    return [line for line in read_log(out) if "step" in line]


def losses(out):
    return torch.tensor([line["loss"] for line in steps(out)], dtype=torch.float64)


def weights(out):
    visual = torch.load(out / "last.pt", weights_only=True)["visual"]
    return torch.cat([weight.flatten() for weight in visual.values()])


def prepare(finetune, loss, out, *more):
    options = finetune.read_options(arguments(loss, out, *more))
    return finetune.prepare(options, finetune.World(0, 1, torch.device("cpu")))


def first_batch(run, size=16):
    index, images, target = zip(*(run.train_data[i] for i in range(size)), strict=True)
    return torch.tensor(index), torch.stack(images), torch.tensor(target)


@dataclass
class Passes:
    """Counts at the first layer of an image encoder, where every pass begins and ends."""

    forward: int = 0
    to_pixels: int = 0
    to_weights: int = 0
    in_no_grad: int = 0
    handles: list = field(default_factory=list)

    def watch(self, classifier):
        layer = classifier.model.visual.conv1
        self.handles.append(layer.register_forward_hook(self._count))
        return self

    def _count(self, layer, _, output):
        self.forward += 1
        if not output.requires_grad:
            self.in_no_grad += 1
        elif layer.weight.requires_grad:
            output.register_hook(lambda _: self._add("to_weights"))
        else:
            output.register_hook(lambda _: self._add("to_pixels"))

    def _add(self, name):
        setattr(self, name, getattr(self, name) + 1)

    def take(self):
        counts = (self.forward, self.in_no_grad, self.to_pixels, self.to_weights)
        self.forward = self.in_no_grad = self.to_pixels = self.to_weights = 0
        return counts
