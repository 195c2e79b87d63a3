"""examples/finetune.py: its passes, its equivalences (memory, resume, processes) and its errors."""

import importlib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from calibclip import attention

EXAMPLES = Path(__file__).parents[1] / "examples"
LOSSES = ("ucat", "tecoa", "pmg", "fare", "tga", "comp-tga")

# Rates at which eight steps change every loss visibly, so that equal losses mean equal gradients.
RATES = {"fare": "1e-4", "ucat": "3e-4"}
SMALL = (
    "--synthetic --images 64 --batch-size 16 --warmup 2 --attack-steps 2 "
    "--val-images 15 --val-steps 2"
).split()


@pytest.fixture(scope="module", autouse=True)
def finetune():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("finetune")


@pytest.fixture(scope="module")
def options_module(finetune):
    return importlib.import_module("_finetune_options")


@pytest.fixture(scope="module")
def data_module(finetune):
    return importlib.import_module("_finetune_data")


@pytest.fixture(scope="module")
def passes_module(finetune):
    return importlib.import_module("_finetune_passes")


def arguments(loss, out, *more):
    return [*SMALL, "--loss", loss, "--lr", RATES.get(loss, "0.05"), "--out", str(out), *more]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return torch.tensor([line["loss"] for line in read_log(out)[:-1]], dtype=torch.float64)


def weights(out):
    visual = torch.load(out / "last.pt", weights_only=True)["visual"]
    return torch.cat([weight.flatten() for weight in visual.values()])


def prepare(finetune, loss, out, *more):
    options = finetune.read_options(arguments(loss, out, *more))
    return finetune.prepare(options, finetune.World(0, 1, torch.device("cpu")))


def first_batch(run, size=16):
    index, images, target = zip(*(run.train_data[i] for i in range(size)), strict=True)
    return torch.tensor(index), torch.stack(images), torch.tensor(target)


# What a run does


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_method_runs_and_reports(finetune, tmp_path, capsys, loss, official):
    finetune.main(arguments(loss, tmp_path, "--log-every", "3", *["--official"] * official))
    *steps, last = read_log(tmp_path)
    assert [line["step"] for line in steps] == [3, 6, 8]
    assert [line["epoch"] for line in steps] == [0, 1, 1]
    for line in steps:
        assert all(math.isfinite(value) for value in line.values())
    for name in ("clean", "pgd"):
        assert 0 <= last[f"{name}_accuracy"] <= 1
        assert 0 <= last[f"{name}_expected_calibration_error"] <= 1
    printed = capsys.readouterr().out
    assert "passes" in printed
    assert "PGD-2" in printed


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_image_encoder_trains(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    before = {name: weight.clone() for name, weight in run.classifier.model.state_dict().items()}
    finetune.training_step(run, *first_batch(run))
    for name, weight in run.classifier.model.state_dict().items():
        changed = not torch.equal(weight, before[name])
        assert changed == name.startswith("visual."), name
    for name, weight in run.references.frozen.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_each_epoch_has_its_own_order(finetune, tmp_path, monkeypatch):
    seen = []
    step = finetune.training_step
    monkeypatch.setattr(
        finetune, "training_step", lambda run, *batch: seen.append(batch[0]) or step(run, *batch)
    )
    finetune.main(arguments("tecoa", tmp_path))
    first, second = (torch.cat(seen[start : start + 4]).tolist() for start in (0, 4))
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second


def test_the_learning_rate_warms_up_and_falls_to_zero(finetune, tmp_path):
    finetune.main(arguments("tecoa", tmp_path, "--log-every", "1"))
    rates = [line["lr"] / 0.05 for line in read_log(tmp_path)[:-1]]
    falling = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx([0.5, 1, *falling])


@pytest.mark.parametrize("loss", ["tecoa", "comp-tga"])
def test_bf16_trains_float32_weights_less_precisely(finetune, tmp_path, loss):
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        finetune.main(arguments(loss, out, "--log-every", "1", "--precision", precision))
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert weights(tmp_path / "bf16").dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)


def test_the_file_runs_as_a_script(monkeypatch, tmp_path):
    script = str(EXAMPLES / "finetune.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments("tecoa", tmp_path)])
    runpy.run_path(script, run_name="__main__")
    assert read_log(tmp_path)[-1]["pgd_steps"] == 2


# Passes


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


# Beyond the k of the attack: forward, of these with the frozen model, and backward to the weights.
# With the references in memory; the columns "minimum" of the table of costs.
MINIMUM = {
    "tecoa": {"first": (1, 0, 1), "later": (1, 0, 1)},
    "pmg": {"first": (3, 1, 2), "later": (3, 1, 2)},
    "fare": {"first": (2, 1, 1), "later": (1, 0, 1)},
    "tga": {"first": (3, 1, 2), "later": (2, 0, 2)},
    "comp-tga": {"first": (3, 1, 2), "later": (2, 0, 2)},
    "ucat": {"first": (2, 1, 1), "later": (1, 0, 1)},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_runs_no_more_passes_than_the_method_needs(finetune, tmp_path, loss, steps):
    run = prepare(finetune, loss, tmp_path, "--attack-steps", str(steps))
    passes = Passes().watch(run.classifier).watch(run.references.frozen)
    text = []
    for classifier in (run.classifier, run.references.frozen):
        classifier.model.token_embedding.register_forward_hook(lambda *_: text.append(1))
    batch = first_batch(run)
    for when in ("first", "later", "later"):
        finetune.training_step(run, *batch)
        forward, no_grad, full = MINIMUM[loss][when]
        assert passes.take() == (steps + forward, no_grad, steps, full), when
    assert not text


@pytest.mark.parametrize("loss", LOSSES)
def test_the_printed_passes_are_those_of_the_step(finetune, passes_module, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    keeps = bool(passes_module.required(run.loss, "ref"))
    described = passes_module.describe(run.loss, 2, keeps)
    first, later = (MINIMUM[loss][when][0] + 2 for when in ("first", "later"))
    assert described.startswith(f"{first} forward")
    assert (f"({later} once" in described) == (later < first)
    assert f"2 backward to the pixels, {MINIMUM[loss]['first'][2]} to the weights" in described


@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_computes_no_gradient_of_a_weight(finetune, passes_module, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    index, images, target = first_batch(run)
    computed = []
    for weight in run.visual.parameters():
        weight.register_hook(lambda _: computed.append(1))
    references = run.references.on_clean(index, images, target)
    images_adv = passes_module.craft(
        run.classifier, run.encoder, images, target, references, eps=0.1, step_size=0.1, steps=2
    )
    assert not computed
    assert all(weight.grad is None for weight in run.trained.parameters())
    assert all(weight.requires_grad for weight in run.visual.parameters())
    assert 0 < (images_adv - images).abs().max() <= 0.1 + 1e-7


def test_fare_attacks_the_embedding_not_the_prediction(finetune, passes_module, tmp_path):
    gains = {}
    for loss in ("fare", "tecoa"):
        run = prepare(finetune, loss, tmp_path)
        index, images, target = first_batch(run)
        references = run.references.on_clean(index, images, target)
        images_adv = passes_module.craft(
            run.classifier,
            run.encoder,
            images,
            target,
            references,
            eps=0.1,
            step_size=0.05,
            steps=4,
        )
        with torch.no_grad():
            embeddings = [run.classifier.embed(batch) for batch in (images_adv, images)]
            logits = run.classifier(images_adv)
        gains[loss] = (
            float((embeddings[0] - embeddings[1]).square().sum(1).mean()),
            float(torch.nn.functional.cross_entropy(logits, target)),
        )
    assert gains["fare"][0] > 1.5 * gains["tecoa"][0]
    assert gains["tecoa"][1] > gains["fare"][1]


# References in memory


@pytest.mark.parametrize("loss", ["ucat", "fare", "tga", "comp-tga"])
def test_the_second_epoch_runs_no_reference_pass(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path, "--log-every", "100")
    frozen = Passes().watch(run.references.frozen)
    tmp_path.mkdir(exist_ok=True)
    finetune.train(run, 0)
    assert frozen.take()[0] == 64 / 16


@pytest.mark.parametrize("loss", ["ucat", "fare", "tga", "comp-tga"])
def test_references_from_memory_equal_computed_ones(finetune, passes_module, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    kept = run.references
    computed = passes_module.References(
        kept.frozen, run.encoder, run.loss, keep=None, gather=lambda value: [value]
    )
    index, images, target = first_batch(run)
    some = torch.tensor([0, 3, 4])
    kept.on_clean(index[some], images[some], target[some])
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    batch = (index[shuffled], images[shuffled], target[shuffled])
    for _ in range(2):
        from_memory, anew = kept.on_clean(*batch), computed.on_clean(*batch)
        assert from_memory.keys() == anew.keys() == {n for n in run.loss.requires if "_ref" in n}
        for name, values in anew.items():
            torch.testing.assert_close(from_memory[name], values, rtol=1e-5, atol=1e-5)


def test_a_partly_known_batch_computes_the_missing_images_only(finetune, tmp_path):
    run = prepare(finetune, "ucat", tmp_path)
    sizes = []
    layer = run.references.frozen.model.visual.conv1
    layer.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    index, images, target = first_batch(run)
    for some in (slice(0, 6), slice(4, 16), slice(0, 16)):
        run.references.on_clean(index[some], images[some], target[some])
    assert sizes == [6, 10]


def test_pmg_keeps_no_reference_and_augmented_images_have_none_to_keep(finetune, tmp_path):
    run = prepare(finetune, "ucat", tmp_path, "--augment")
    frozen = Passes().watch(run.references.frozen)
    batch = first_batch(run)
    for _ in range(2):
        finetune.training_step(run, *batch)
        assert frozen.take()[0] == 1
    assert not run.references.kept
    run = prepare(finetune, "pmg", tmp_path)
    finetune.training_step(run, *batch)
    assert not run.references.kept


@pytest.mark.parametrize("loss", ["tga", "comp-tga"])
def test_the_maps_are_those_of_calibclip_attention(finetune, tmp_path, loss):
    run = prepare(finetune, loss, tmp_path)
    index, images, target = first_batch(run)
    maps = run.references.on_clean(index, images, target)["attention_ref"]
    with torch.no_grad():
        _, tokens = run.classifier.embed_with_tokens(images)
    texts = [run.classifier.text_features[target]]
    if loss == "comp-tga":
        texts.append(run.encoder.negative_text[target])
        assert not torch.equal(*texts)
        expected = attention.complementary_attention(tokens, *texts, image_size=32)
    else:
        expected = attention.text_guided_attention(tokens, *texts, image_size=32)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)


# Resume


@pytest.mark.parametrize("loss", ["ucat", "fare", "comp-tga"])
def test_a_resumed_run_goes_on_as_if_never_interrupted(finetune, tmp_path, monkeypatch, loss):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("--epochs", "3", "--log-every", "1")
    finetune.main(arguments(loss, whole, *more))

    taken = []

    def interrupted(run, *batch):
        taken.append(1)
        if len(taken) == 7:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return step(run, *batch)

    step = finetune.training_step
    monkeypatch.setattr(finetune, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(arguments(loss, broken, *more))
    monkeypatch.undo()
    finetune.main(arguments(loss, broken, *more, "--resume"))

    assert [line["step"] for line in read_log(broken)[:-1]] == list(range(1, 13))
    # Which images a frozen pass sees together differs after a resume, hence its last bits.
    torch.testing.assert_close(losses(broken), losses(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(broken), weights(whole), rtol=1e-4, atol=1e-5)
    assert not list(broken.glob("*.tmp"))


def test_a_checkpoint_is_replaced_only_by_a_whole_one(finetune, tmp_path, monkeypatch):
    run = prepare(finetune, "tecoa", tmp_path)
    finetune.save_checkpoint(run, 1)

    def full_disk(_, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        finetune.save_checkpoint(run, 2)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


# Processes

# AdamW turns the rounding of a gradient that is zero (of the keys' biases) into full steps; FARE's
# own optimizer would therefore compare noise.
METHODS_OF_TWO = {
    "ucat": (),
    "tecoa": (),
    "pmg": (),
    "pmg --official": ("--lr", "0.5"),
    "fare": ("--optimizer", "sgd", "--lr", "1e-3"),
    "tga": (),
    "comp-tga": (),
}

SEVERAL_RUNS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import finetune
with finetune.join_world("cpu") as world:
    for arguments in json.loads(sys.argv[2]):
        finetune.execute(finetune.read_options(arguments), world)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The output folders of all methods, run under torchrun by two processes that start once."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "several_runs.py"
    script.write_text(SEVERAL_RUNS)
    outs = {name: folder / name.replace(" ", "") for name in METHODS_OF_TWO}
    runs = [arguments_of_two(name, out) for name, out in outs.items()]
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    run = subprocess.run(
        [sys.executable, *launcher, str(script), str(EXAMPLES), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("2 x cpu") == len(METHODS_OF_TWO)
    return outs


def arguments_of_two(name, out):
    # 75 images: the last of an epoch are left out, and are others in the next one.
    loss, *flags = name.split()
    return arguments(loss, out, *flags, "--images", "75", "--log-every", "1", *METHODS_OF_TWO[name])


@pytest.mark.parametrize("name", METHODS_OF_TWO)
def test_two_processes_take_the_steps_of_one(finetune, tmp_path, two_processes, name):
    finetune.main(arguments_of_two(name, tmp_path))
    out = two_processes[name]
    torch.testing.assert_close(losses(out), losses(tmp_path), rtol=1e-5, atol=1e-5)

    run = prepare(finetune, name.split()[0], tmp_path)
    untrained = torch.cat([weight.flatten() for weight in run.visual.state_dict().values()])
    moved = float((weights(tmp_path) - untrained).abs().max())
    assert moved > 1e-4
    torch.testing.assert_close(weights(out), weights(tmp_path), rtol=0, atol=1e-3 * moved)

    results = [read_log(folder)[-1] for folder in (out, tmp_path)]
    for result in results:
        result.pop("seconds")
    assert results[0] == pytest.approx(results[1], abs=1e-4)


def test_all_processes_together_see_each_batch_of_one(finetune, data_module):
    images = data_module.labelled(
        data_module.Digits(train=True), lambda _: 0, names=None, limit=71, seed=0
    )

    def epoch(world_size):
        ranks = []
        for rank in range(world_size):
            loader, sampler = data_module.training_loader(
                images, 24, rank=rank, world_size=world_size, seed=3
            )
            sampler.set_epoch(1)
            ranks.append([index.tolist() for index, _, _ in loader])
        return [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]

    # The last 23 images are no batch, also where a share could be filled up to one.
    assert len(epoch(1)) == 2
    assert epoch(1) == epoch(2) == epoch(3)


def test_references_computed_by_other_processes_are_kept(finetune, passes_module, tmp_path):
    run = prepare(finetune, "tga", tmp_path)
    index, images, target = first_batch(run)
    options = {"frozen": run.references.frozen, "encoder": run.encoder, "loss": run.loss}
    gathered = []

    def gather(value):
        gathered.append(value)
        return [value]

    theirs = passes_module.References(**options, keep=16, gather=gather)
    theirs.on_clean(index[8:], images[8:], target[8:])
    mine = passes_module.References(**options, keep=16, gather=lambda mine: [mine, *gathered])
    mine.on_clean(index[:8], images[:8], target[:8])
    assert mine.complete
    passes = Passes().watch(mine.frozen)
    (maps,) = mine.on_clean(index[8:], images[8:], target[8:]).values()
    assert passes.take()[0] == 0
    (expected,) = theirs.on_clean(index[8:], images[8:], target[8:]).values()
    assert torch.equal(maps, expected)


# Data


@pytest.fixture
def folder(tmp_path):
    """Six noisy images in each of two folders with WordNet ids, 40 × 50 pixels."""
    rng = np.random.default_rng(0)
    for wnid, mean in (("n01", 60), ("n02", 190)):
        (tmp_path / "images" / wnid).mkdir(parents=True)
        for number in range(6):
            noise = rng.integers(mean - 60, mean + 60, (40, 50, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / wnid / f"{number}.png")
    return tmp_path / "images"


def test_a_folder_of_images_with_class_names_trains(finetune, data_module, folder, tmp_path):
    names = tmp_path / "words.txt"
    names.write_text("n02\tday\nn01\tnight\nn03\tdusk\n")
    model = ["--model", data_module.register_tiny_clip(), "--pretrained", ""]
    data = ["--data", str(folder), "--val-data", str(folder), "--class-names", str(names)]
    sizes = "--batch-size 4 --epochs 1 --warmup 1 --val-steps 1 --log-every 1".split()
    finetune.main([*model, *data, *sizes, "--out", str(tmp_path / "out")])
    assert [line.get("step") for line in read_log(tmp_path / "out")] == [1, 2, 3, None]
    options = finetune.read_options([*model, *data, *sizes])
    run = finetune.prepare(options, finetune.World(0, 1, torch.device("cpu")))
    assert run.classifier.class_names == run.val_classifier.class_names == ("night", "day")
    _, image, target = run.train_data[0]
    assert image.shape == (3, 32, 32)
    assert 0 <= image.min() < image.max() <= 1
    assert target == 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "night\nday\n"),
        ("names.txt", "n02\tday\nn01\tnight\n"),
        ("names.json", '["night", "day"]'),
        ("names.json", '{"n02": "day", "n01": "night"}'),
    ],
)
def test_class_names_are_read_by_label_or_by_folder(data_module, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert data_module.read_class_names(tmp_path / file, ["n01", "n02"]) == ("night", "day")


def test_the_listed_data_sets_of_torchvision_have_the_listed_splits(data_module):
    for name, splits in data_module.SPLITS.items():
        signature = inspect.signature(getattr(torchvision.datasets, name))
        (argument,) = splits
        assert argument in signature.parameters, name


def test_torchvisions_own_names_and_a_random_part_are_used(finetune, data_module, monkeypatch):
    opened = []

    class Fake:
        classes = (("tench", "Tinca tinca"), ("goldfish",))

        def __init__(self, root, split="train", download=False):
            opened.append((root, split, download))

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return index, index % 2

    monkeypatch.setattr(torchvision.datasets, "ImageNet", Fake)
    for train in (True, False):
        images = data_module.open_images("ImageNet", train=train, root=Path("d"), download=True)
    assert opened == [(Path("d"), "train", True), (Path("d"), "val", True)]
    part = data_module.labelled(images, lambda image: image, names=None, limit=4, seed=1)
    assert part.class_names == ("tench", "goldfish")
    chosen = [part[i][1] for i in range(len(part))]
    assert len(set(chosen)) == 4
    assert chosen != sorted(chosen)


def test_other_validation_classes_get_their_own_names(data_module, tmp_path):
    class Fake:
        classes = ("a", "b")

        def __len__(self):
            return 2

    (tmp_path / "names.txt").write_text("first\nsecond\n")
    options = {"limit": None, "seed": 0}
    names = tmp_path / "names.txt"
    train = data_module.labelled(Fake(), None, names=names, **options)
    same = data_module.labelled(Fake(), None, names=None, same_as=train, **options)
    assert same.class_names == ("first", "second")
    other = Fake()
    other.classes = ("c", "d", "e")
    val = data_module.labelled(other, None, names=None, same_as=train, **options)
    assert val.class_names == ("c", "d", "e")


# Options


def test_unset_options_are_those_of_the_paper(finetune):
    options = finetune.read_options(["--data", "CIFAR10", "--loss", "fare", "--lr", "3e-6"])
    assert (options.optimizer, options.lr, options.weight_decay) == ("adamw", 3e-6, 1e-4)
    assert (options.batch_size, options.attack_steps, options.eps) == (128, 10, 2 / 255)
    options = finetune.read_options(["--data", "CIFAR10", "--eps", "4/255"])
    assert (options.optimizer, options.lr, options.weight_decay) == ("sgd", 1e-4, 0)
    assert (options.batch_size, options.attack_steps, options.eps) == (256, 2, 4 / 255)
    assert (options.epochs, options.warmup) == (10, 1000)


@pytest.mark.parametrize(("tag", "expected"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_weights_get_the_activation_they_were_trained_with(
    finetune, monkeypatch, tmp_path, tag, expected
):
    asked = {}

    def create(name, pretrained, **more):
        asked.update(more, name=name, pretrained=pretrained)
        raise RuntimeError("no network")

    monkeypatch.setattr(finetune.open_clip, "create_model_and_transforms", create)
    options = ["--data", "CIFAR10", "--pretrained", tag, "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"--model ViT-B-32, --pretrained {tag}: no network"):
        finetune.main(options)
    assert asked["force_quick_gelu"] is expected


def test_official_losses_use_the_models_scale(finetune, options_module, tmp_path):
    run = prepare(finetune, "pmg", tmp_path, "--official")
    assert run.loss.temperature == run.classifier.logit_scale
    assert run.loss.kl_reduction == "sum"
    run = prepare(finetune, "ucat", tmp_path)
    assert run.loss.logit_scale == run.classifier.logit_scale


def test_a_logit_bias_is_left_out(finetune, data_module, monkeypatch, tmp_path):
    monkeypatch.setitem(data_module.TINY_CLIP, "init_logit_bias", -10.0)
    run = prepare(finetune, "ucat", tmp_path)
    assert run.classifier.model.logit_bias == -10
    _, images, _ = first_batch(run)
    cosines = run.classifier(images) / run.classifier.logit_scale
    torch.testing.assert_close(cosines, run.classifier.cosines(images))
    assert run.references.frozen.logit_bias == 0


def test_help_lists_the_methods(finetune, capsys):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "comp-tga sgd, lr 0.0001" in printed
    assert "torchrun" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "CIFAR10"], "either --data or --synthetic"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs --device cuda"),
        (["--batch-size", "0"], "expected a number >= 1"),
        (["--eps", "one"], "invalid pixels value"),
        (["--batch-size", "65"], "expected no more than the 64 images"),
        (["--warmup", "8"], "expected fewer than the 8 steps"),
        (["--resume"], "expected a checkpoint .*last.pt; start without --resume"),
        (["--class-names", "missing.txt"], "class names missing.txt: .*No such file"),
        (["--val-data", "CIFAR99"], "CIFAR99: expected a folder .*CIFAR100"),
        (["--val-data", "MNIST", "--data-root", "no-such"], "MNIST: .*--data-root no-such"),
    ],
)
def test_bad_arguments_stop_with_a_reason(finetune, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(arguments("ucat", tmp_path, *more))
    said = str(stopped.value) + capsys.readouterr().err
    assert re.search(message, said), said


def test_class_names_must_match_the_classes(data_module, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(SystemExit, match=r"expected 3 names, .* got 2"):
        data_module.read_class_names(path, ["a", "b", "c"])
    path.write_text("a\tone\nb\ttwo\n")
    with pytest.raises(SystemExit, match="no name for c"):
        data_module.read_class_names(path, ["a", "b", "c"])


def test_a_batch_must_divide_among_the_processes(finetune, tmp_path):
    options = finetune.read_options(arguments("ucat", tmp_path, "--batch-size", "15"))
    with pytest.raises(SystemExit, match="expected a multiple of the 2 processes"):
        finetune.check_sizes(options, finetune.World(0, 2, torch.device("cpu")), 64)


def test_a_finished_run_is_not_overwritten_nor_continued_as_another(finetune, tmp_path):
    finetune.main(arguments("tecoa", tmp_path))
    with pytest.raises(SystemExit, match="exists: pass --resume"):
        finetune.main(arguments("tecoa", tmp_path))
    with pytest.raises(SystemExit, match=r"--lr \(was 0.05, is 0.1\)"):
        finetune.main(arguments("tecoa", tmp_path, "--resume", "--lr", "0.1"))


def test_a_loss_that_is_not_finite_stops_the_run(finetune, tmp_path):
    run = prepare(finetune, "tecoa", tmp_path)
    with pytest.raises(SystemExit, match="the loss is nan"):
        finetune.average(run, {"total": torch.tensor(math.nan), "kl": torch.tensor(1.0)})
