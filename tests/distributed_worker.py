"""Two gloo ranks: each runs all checks and writes what came out as JSON.

Every check computes the same thing twice, on this rank's rows through DistributedDataParallel or
FSDP2 and on all rows in one process, and returns how far the two are apart.
"""

import copy
import importlib
import io
import json
import os
import runpy
import sys
import warnings
from contextlib import redirect_stdout
from datetime import timedelta
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from test_zero_shot import from_clip, tiny_clip
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from calibclip import (
    APGD,
    PGD,
    DirichletAlignLoss,
    FARELoss,
    PMGAFTLoss,
    TeCoALoss,
    WorstCase,
    dirichlet_kl,
    linear_dirichlet_align,
    log_concentration,
    metrics,
    pgd,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
_digits = importlib.import_module("_digits")  # which the example needs: once, before the fork

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(8, 3, 32, 32, generator=GENERATOR)
IMAGES_ADV = (IMAGES + 0.1 * torch.randn(IMAGES.shape, generator=GENERATOR)).clamp(0, 1)
TARGET = torch.tensor([0, 1, 2, 3, 3, 1, 0, 0])
ALL, HALVES = slice(0, 8), (slice(0, 4), slice(4, 8))
RELATIVE_WEIGHT = 20.0


class Embed(nn.Module):
    """What is wrapped: the features, from which logits follow without a parameter."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier.embed(images)


def classifier(seed=0, dtype=torch.float32):
    classifier = from_clip(tiny_clip(seed).to(dtype))
    classifier.requires_grad_(False)
    classifier.model.visual.requires_grad_(True)
    return classifier


def visual(classifier):
    return list(classifier.model.visual.parameters())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(classifier):
    """Return the gradients of the image tower, zeros where there is none."""
    return [
        torch.zeros(parameter.shape) if parameter.grad is None else whole(parameter.grad).clone()
        for parameter in visual(classifier)
    ]


def distance(found, expected):
    """Return the largest difference in units of the largest entry."""
    apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return apart / max(float(b.abs().max()) for b in expected)


def shard(classifier):
    for block in classifier.model.visual.transformer.resblocks:
        fully_shard(block, mesh=MESH)
    fully_shard(classifier.model.visual, mesh=MESH)
    return classifier


# ---------------------------------------------------------------- losses


def mean_strength(reference, rows):
    """Return the mean over all ranks of the reference's total concentration."""
    logits = reference(IMAGES[rows])
    log_alpha = log_concentration(logits.double() / reference.logit_scale)
    mean = log_alpha.logsumexp(1).exp().mean()
    if rows != ALL:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return float(mean)


def losses(reference):
    """Return losses by name: of a classifier, its features by a call, and rows."""
    scale = reference.logit_scale

    def align(**options):
        def loss(model, embed, rows):
            given = options | (
                {"weight": RELATIVE_WEIGHT / mean_strength(reference, rows)}
                if options.get("weight") == "global"
                else {}
            )
            logits = model.classify(embed(IMAGES_ADV[rows]))
            align = DirichletAlignLoss(scale, **given)
            return align(logits, reference(IMAGES[rows]), TARGET[rows])

        return loss

    def tecoa(model, embed, rows):
        return TeCoALoss()(model.classify(embed(IMAGES_ADV[rows])), TARGET[rows])

    def pmg_aft(model, embed, rows):
        adv, clean = (model.classify(embed(x[rows])) for x in (IMAGES_ADV, IMAGES))
        return PMGAFTLoss()(adv, TARGET[rows], reference(IMAGES_ADV[rows]), clean)

    def fare(model, embed, rows):
        return FARELoss()(embed(IMAGES_ADV[rows]), reference.embed(IMAGES[rows]))

    return {
        "paper's weight": align(),
        "weight": align(weight=3e-11),
        "relative_weight": align(relative_weight=RELATIVE_WEIGHT),
        "relative_weight by hand": align(weight="global"),
        "tecoa": tecoa,
        "pmg_aft": pmg_aft,
        "fare": fare,
    }


def gradients_of(loss, model, embed, *shares):
    model.zero_grad()
    for rows in shares:
        (loss(model, embed, rows) / len(shares)).backward()
    return gradients(model)


def check_gradients():
    reference, alone = classifier(seed=1).requires_grad_(False), classifier()
    replica, sharded = classifier(), shard(classifier())
    wrapped = {
        "ddp": (replica, DistributedDataParallel(Embed(replica))),
        "fsdp": (sharded, sharded.embed),
    }
    found = {wrapper: {} for wrapper in wrapped}
    for name, loss in losses(reference).items():
        expected = {"joined": gradients_of(loss, alone, alone.embed, ALL)}
        if name != "relative_weight by hand":  # in which the ranks must meet
            expected["mean of ranks"] = gradients_of(loss, alone, alone.embed, *HALVES)
        for wrapper, (model, embed) in wrapped.items():
            mine = gradients_of(loss, model, embed, MINE)
            found[wrapper][name] = {of: distance(mine, apart) for of, apart in expected.items()}
    return found


# ---------------------------------------------------------------- a step under attack


def attack(model, rows, images=IMAGES):
    generator = torch.Generator().manual_seed(1)
    return pgd(model, images[rows], TARGET[rows], 8 / 255, 3 / 255, 2, generator=generator)


def step(model, attacked, train, reference, rows):
    """Attack, align, and descend twice; return the attacked images."""
    align = DirichletAlignLoss(model.logit_scale)
    optimizer = torch.optim.SGD(visual(model), lr=1e-3, momentum=0.9)
    images = IMAGES.double()
    for _ in range(2):
        images_adv = attack(attacked, rows, images)
        loss = align(train(images_adv), reference(images[rows]), TARGET[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return images_adv


class Gathers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def accumulate(model, reference, rows):
    """Do what ``step`` does in two parts, FSDP2's weights gathered and gradients exchanged once.

    Return the attacked images, and how often a step gathers a weight.
    """
    align = DirichletAlignLoss(model.logit_scale)
    optimizer = torch.optim.SGD(visual(model), lr=1e-3, momentum=0.9)
    images, tower, middle = IMAGES.double(), model.model.visual, (rows.start + rows.stop) // 2
    parts = slice(rows.start, middle), slice(middle, rows.stop)
    tower.set_reshard_after_forward(False)
    with Gathers() as gathers:
        for _ in range(2):
            optimizer.zero_grad()
            tower.set_reshard_after_backward(False)
            tower.set_requires_gradient_sync(False)
            images_adv = []
            for part in parts:
                images_adv.append(attack(model, part, images))
                loss = align(model(images_adv[-1]), reference(images[part]), TARGET[part])
                if part is parts[-1]:
                    tower.set_reshard_after_backward(True)
                    tower.set_requires_gradient_sync(True)
                (loss / len(parts)).backward()
            optimizer.step()
    groups = sum(isinstance(module, FSDPModule) for module in tower.modules())
    return torch.cat(images_adv), gathers.count / (2 * groups)


def check_training():
    reference = classifier(seed=1, dtype=torch.float64).requires_grad_(False)
    start = classifier(dtype=torch.float64)
    alone = copy.deepcopy(start)
    images_adv = step(alone, alone, alone, reference, ALL)
    expected, before = (
        [parameter.detach().clone() for parameter in visual(m)] for m in (alone, start)
    )
    found = {"moved": distance(expected, before)}
    for name in ("ddp", "ddp, attacked through", "fsdp", "fsdp, gathered once"):
        model = copy.deepcopy(start)
        train = DistributedDataParallel(model) if name.startswith("ddp") else shard(model)
        if name == "fsdp, gathered once":
            mine, found["gathers"] = accumulate(model, reference, MINE)
        else:
            attacked = train if name == "ddp, attacked through" else model
            mine = step(model, attacked, train, reference, MINE)
        after = [whole(parameter.detach()) for parameter in visual(model)]
        found[name] = {
            "parameters": distance(after, expected),
            "images": float((mine - images_adv[MINE]).abs().max()),
        }
    return found


def check_attack_leaves_no_trace():
    """Attack an FSDP2 model that has gradients: they, flags and modes stay."""
    model = shard(classifier()).train()
    model(IMAGES[MINE]).square().mean().backward()
    before = [parameter.grad for parameter in visual(model)]
    values = gradients(model)
    attack(model, MINE)
    return {
        "same tensors": all(p.grad is g for p, g in zip(visual(model), before, strict=True)),
        "same values": distance(gradients(model), values) == 0,
        "trainable": all(parameter.requires_grad for parameter in visual(model)),
        "training": all(module.training for module in model.modules()),
        "sharded": all(isinstance(parameter, DTensor) for parameter in visual(model)),
    }


def train_after(attack, attacked, train, model):
    """Return how far gradients of a training pass after an attack are from one process's."""
    attack(attacked, MINE)
    nn.functional.cross_entropy(train(IMAGES[MINE]), TARGET[MINE]).backward()
    alone = classifier()
    nn.functional.cross_entropy(alone(IMAGES), TARGET).backward()
    return distance(gradients(model), gradients(alone))


def check_training_after():
    """Train after an attack whose last pass has no backward, and after one through a wrapper."""

    def judged(model, rows):
        return PGD(eps=8 / 255, steps=2)(model, IMAGES[rows], TARGET[rows])

    model, other = shard(classifier()), classifier()
    ddp = DistributedDataParallel(other, static_graph=True)
    return {
        "fsdp, judged": train_after(judged, model, model, model),
        "static graph, attacked through": train_after(attack, ddp, ddp, other),
    }


def check_passes():
    """Count the passes on ranks whose images are not equally hard to break."""
    model, options = classifier(), {"eps": 8 / 255, "steps": 4}
    attacks = {
        "pgd": PGD(**options),
        "apgd": APGD(**options),
        "rivals": PGD(**options, objective="dlr-targeted", n_rivals=2),
        "stop_when_fooled": PGD(**options, stop_when_fooled=True),
    }
    # The first rank's labels are wrong already; the second rank's are what the model says.
    labels = model(IMAGES).argmax(1)
    labels[HALVES[0]] = (labels[HALVES[0]] + 1) % 4
    return {
        name: attack(model, IMAGES[MINE], labels[MINE]).n_forward
        for name, attack in attacks.items()
    }


def check_plain_copy():
    """Load what FSDP2 has trained into a classifier of each rank's own, and attack that."""
    model, plain = shard(classifier()), classifier()
    for parameter in visual(plain):
        parameter.data.zero_()
    state = model.model.visual.state_dict()
    plain.model.visual.load_state_dict({name: whole(value) for name, value in state.items()})
    with torch.no_grad():
        apart = float((plain(IMAGES) - model(IMAGES)).abs().max())
    # The two ranks take different numbers of passes here, and need not wait for each other.
    worst = WorstCase.composite(8 / 255, steps=10)(plain, IMAGES[MINE], TARGET[MINE])
    return {"apart": apart, "robust": worst.robust_accuracy}


# ---------------------------------------------------------------- metrics and DTensors

LOGITS = 3 * torch.randn(101, 6, generator=GENERATOR)
LABELS = torch.randint(6, (101,), generator=GENERATOR)
UPDATES = [[(0, 7), (7, 30)], [(30, 101)]]


def metric_values(updates):
    group = metrics.MetricGroup(
        {
            "ece": metrics.ExpectedCalibrationError(),
            "brier": metrics.BrierScore(),
            "accuracy": metrics.Accuracy(),
        }
    )
    ranking = metrics.FailureAUROC()
    for first, last in updates:
        logits, target = LOGITS[first:last], LABELS[first:last]
        group.update(logits=logits, target=target)
        ranking.update(-logits.softmax(1).amax(1), logits.argmax(1) == target)
    return group.compute() | {"auroc": ranking.compute()}


def check_metrics():
    return metric_values(UPDATES[dist.get_rank()])


def check_dtensors():
    """Hand DTensors to losses and metrics, for their errors; of local rows the difference."""
    align, tecoa, target = DirichletAlignLoss(), TeCoALoss(), LABELS[:8]
    plain = LOGITS[:8] + 20, LOGITS[8:16] + 20
    adv, ref = (distribute_tensor(logits, MESH, [Shard(0)]) for logits in plain)
    calls = {
        "align": lambda: align(adv, ref, target),
        "reference alone": lambda: align(plain[0], ref, target),
        "a parameter": lambda: align(nn.Parameter(plain[0]), ref, target),
        "tecoa": lambda: tecoa(adv, target),
        "kl": lambda: dirichlet_kl(adv, ref),
        "features": lambda: linear_dirichlet_align(adv, ref, plain[0]),
        "metric": lambda: metrics.Accuracy().update(logits=adv, target=target),
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = f"no error: {call()}"
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    local = align(adv.to_local(), ref.to_local(), target[MINE])
    found["local"] = float(local - align(plain[0][MINE], plain[1][MINE], target[MINE]))
    return found


def check_example():
    """Run examples/in_fsdp.py in this group, a few untrained steps; return what it prints."""
    script, batches = EXAMPLES / "in_fsdp.py", _digits.batches
    printed = {}
    for options in ((), ("--ddp",)):
        stream = io.StringIO()
        with (
            patch.object(sys, "argv", [str(script), "--quick", *options]),
            patch.object(_digits, "train_clean"),
            patch.object(
                _digits, "batches", lambda *args, **size: islice(batches(*args, **size), 4)
            ),
            # A second group would find the addresses of the first in the store.
            patch.object(dist, "init_process_group"),
            patch.object(dist, "destroy_process_group"),
            patch.dict(os.environ, RANK=str(dist.get_rank())),
            redirect_stdout(stream),
        ):
            runpy.run_path(str(script), run_name="__main__")
        printed[" ".join(options)] = stream.getvalue()
    return printed


CHECKS = (
    check_gradients,
    check_training,
    check_attack_leaves_no_trace,
    check_training_after,
    check_passes,
    check_plain_copy,
    check_metrics,
    check_dtensors,
    check_example,
)


def main(rank, path):
    global MINE, MESH
    torch.set_num_threads(1)
    # DDP warns of what it would like; the ranks' own warnings are no part of the checks.
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", f"file://{path}/store", timedelta(seconds=60), world_size=2, rank=rank
    )
    MINE, MESH = HALVES[rank], init_device_mesh("cpu", (2,))
    results = {check.__name__: check() for check in CHECKS}
    dist.destroy_process_group()
    Path(path, f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    # Forked, so that what takes longest, the imports, happens once.
    start_processes(main, (sys.argv[1],), nprocs=2, start_method="fork")
