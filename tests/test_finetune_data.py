"""examples/finetune.py: its data, class names and options, and what it says of wrong ones."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from finetune_tools import LOSSES, arguments, first_batch, prepare, steps
from PIL import Image

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


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("n02\tday, daytime\nn01\tnight\nn03\tdusk\n")
    return path


@pytest.fixture
def arguments_of_folder(data_module, folder, words):
    model = ["--model", data_module.register_tiny_clip(), "--pretrained", ""]
    data = ["--data", str(folder), "--val-data", str(folder), "--class-names", str(words)]
    sizes = "--batch-size 4 --epochs 1 --warmup 1 --val-steps 1 --log-every 1 --workers 0".split()
    return [*model, *data, *sizes]


def test_a_folder_of_images_with_class_names_trains(finetune, arguments_of_folder, tmp_path):
    finetune.main([*arguments_of_folder, "--out", str(tmp_path / "out")])
    assert [line["step"] for line in steps(tmp_path / "out")] == [1, 2, 3]
    options = finetune.read_options(arguments_of_folder)
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
        ("words.txt", "n02\tday, daytime\nn01\tnight\nn03\tdusk\n\n"),
        ("mapping.txt", "n02 day, daytime\nn01 night\n"),
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
        classes = (("crane",), ("crane", "Grus grus"))

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
    part = data_module.labelled(images, names=None, limit=4, seed=1)
    assert part.class_names == tuple(open_clip.IMAGENET_CLASSNAMES)
    chosen = [part.images[i][0] for i in range(len(part))]
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
    train = data_module.labelled(Fake(), names=names, **options)
    same = data_module.labelled(Fake(), names=None, same_as=train, **options)
    assert same.class_names == ("first", "second")
    other = Fake()
    other.classes = ("c", "d", "e")
    val = data_module.labelled(other, names=None, same_as=train, **options)
    assert val.class_names == ("c", "d", "e")


class Listed:
    """A data set of which only the classes matter."""

    def __init__(self, *classes):
        self.classes = classes

    def __len__(self):
        return len(self.classes)


@pytest.mark.parametrize("separator", ["\t", " "])
def test_names_by_folder_serve_validation_folders_that_they_cover(data_module, words, separator):
    words.write_text(words.read_text().replace("\t", separator))
    options = {"limit": None, "seed": 0}
    train = data_module.labelled(Listed("n01", "n02"), names=words, **options)
    val = data_module.labelled(Listed("n02", "n03"), names=None, same_as=train, **options)
    assert val.class_names == ("day", "dusk")
    val = data_module.labelled(Listed("n02", "n04"), names=None, same_as=train, **options)
    assert val.class_names == ("n02", "n04")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat",), "expected at least two classes, got cat"),
        (("n01443537", "n02795169"), "n01443537 is an id of WordNet.*--class-names"),
    ],
)
def test_classes_that_make_no_prompts_stop_the_run(data_module, classes, message):
    with pytest.raises(SystemExit, match=message):
        data_module.labelled(Listed(*classes), names=None, limit=None, seed=0)


def test_the_plan_shows_prompts_and_classes_of_one_name(
    finetune, arguments_of_folder, words, tmp_path, capsys
):
    words.write_text("n02\tCrane\nn01\tcrane, Grus grus\n")
    finetune.main([*arguments_of_folder, "--out", str(tmp_path / "out")])
    prompts = "2 classes: 'This is a photo of a crane', 'This is a photo of a crane'"
    assert capsys.readouterr().out.count(f"{prompts}; of one name: crane") == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_all_workers_and_processes_augment_an_image_alike_and_every_epoch_anew(data_module):
    def augmented(image):
        return torchvision.transforms.functional.to_tensor(image) + torch.rand(1)

    data = data_module.labelled(data_module.Digits(train=True), names=None, limit=16, seed=0)
    data = dataclasses.replace(data, transform=augmented)

    def epochs(*which, rank=0, world_size=1, **options):
        loader, sampler = data_module.training_loader(
            data, 8, rank=rank, world_size=world_size, seed=3, **options
        )
        for epoch in which:
            sampler.set_epoch(epoch)
            items = {int(i): image for batch in loader for i, image in zip(*batch[:2], strict=True)}
            yield items

    first, second = epochs(0, 1)
    # Persistent workers that go on to the second epoch, and those of a run resumed there.
    workers = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}
    _, continued = epochs(0, 1, **workers)
    (resumed,) = epochs(1, **workers)
    shares = [next(epochs(1, rank=rank, world_size=2)) for rank in range(2)]
    shared = shares[0] | shares[1]
    for index, image in second.items():
        assert not torch.equal(image, first[index])
        for other in (continued, resumed, shared):
            assert torch.equal(image, other[index])


def test_augmentation_leaves_the_global_random_state(data_module):
    data = data_module.labelled(data_module.Digits(train=True), names=None, limit=4, seed=0)
    data = dataclasses.replace(data, transform=lambda _: torch.rand(1))
    before = torch.get_rng_state()
    data_module.Seeded(data, 0)[0, 1]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_do_not_share_shuffles(data_module):
    data = data_module.labelled(data_module.Digits(train=True), names=None, limit=16, seed=0)
    place = {"rank": 0, "world_size": 1}
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        _, sampler = data_module.training_loader(data, 8, seed=seed, **place)
        sampler.set_epoch(epoch)
        orders[seed, epoch] = [index for _, index in sampler]
    assert orders[0, 1] != orders[1, 0] != orders[0, 0]


# Options


def test_unset_options_are_those_of_the_paper(finetune):
    options = finetune.read_options(["--data", "CIFAR10", "--loss", "fare", "--lr", "3e-6"])
    assert (options.optimizer, options.lr, options.weight_decay) == ("adamw", 3e-6, 1e-4)
    assert (options.batch_size, options.attack_steps, options.eps) == (128, 10, 2 / 255)
    options = finetune.read_options(["--data", "CIFAR10", "--eps", "4/255"])
    assert (options.optimizer, options.lr, options.weight_decay) == ("sgd", 1e-4, 0)
    assert (options.batch_size, options.attack_steps, options.eps) == (256, 2, 4 / 255)
    assert (options.epochs, options.val_eps) == (10, 4 / 255)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n_images", [1020, 7390, 50_000, 1_281_167])
def test_the_papers_schedule_fits_every_data_set(finetune, options_module, loss, n_images):
    options = finetune.read_options(["--data", "DTD", "--loss", loss])
    options_module.fit_schedule(options, n_images, 1)
    steps = options.epochs * (n_images // options.batch_size)
    paper = options_module.METHODS[loss].warmup
    assert options.warmup == (paper if paper < steps else steps // 10) < steps
    if loss == "fare":
        assert 20_000 <= steps < 20_000 + n_images // 128
    else:
        assert options.epochs == 10


def test_a_schedule_that_was_asked_for_is_not_fitted(finetune, options_module):
    asked = "--data DTD --loss fare --epochs 2 --warmup 3".split()
    options = finetune.read_options(asked)
    options_module.fit_schedule(options, 1280, 1)
    assert (options.epochs, options.warmup) == (2, 3)
    with pytest.raises(SystemExit, match="--warmup 20: expected fewer than the 20 steps"):
        options_module.fit_schedule(finetune.read_options([*asked[:-1], "20"]), 1280, 1)


def test_the_shortest_smoke_test_needs_no_warmup(finetune, tmp_path, capsys):
    short = "--synthetic --loss fare --epochs 1 --images 128 --val-images 2 --val-steps 1".split()
    finetune.main([*short, "--out", str(tmp_path)])
    assert "1 epochs of 2 steps, batch 64; adamw, lr 1e-05, warm-up 0" in capsys.readouterr().out


@pytest.mark.parametrize(("tag", "expected"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_weights_get_the_activation_they_were_trained_with(
    finetune, preparation_module, tag, expected
):
    options = finetune.read_options(["--data", "CIFAR10", "--pretrained", tag])
    assert preparation_module.model_arguments(options) == {
        "model_name": "ViT-B-32",
        "pretrained": tag,
        "force_quick_gelu": expected,
    }


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
    assert "published for ViT-L/14; the momentum of its attack changes no" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "CIFAR10"], "either --data or --synthetic"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs --device cuda"),
        (["--batch-size", "0"], "expected a number >= 1"),
        (["--eps", "one"], "invalid length value"),
        (["--eps", "1"], r"got 1; did you mean 1/255\?"),
        (["--step-size", "4"], r"got 4; did you mean 4/255\?"),
        (["--val-eps", "0"], "expected more than 0 and less than 0.5"),
        (["--eps=-1/255"], "expected more than 0 and less than 0.5"),
        (["--eps", "1/0"], "expected a number, got 1/0"),
        (["--model", "ViT-B-32"], "leave out --model and --pretrained"),
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "no-such-folder"], "no-such-folder: expected a folder"),
        (["--batch-size", "100"], "expected no more than the 12 images"),
        (["--warmup", "3"], "expected fewer than the 3 steps"),
        (["--model", "ViT-B-33"], "--model ViT-B-33: expected one of open_clip.list_models"),
        (
            ["--model", "ViT-B-32", "--pretrained", "opneai"],
            r"--pretrained opneai: expected a file or a tag of ViT-B-32 \(.*openai",
        ),
    ],
)
def test_what_is_wrong_shows_before_the_model_is_loaded(
    finetune, monkeypatch, arguments_of_folder, more, message
):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", None)
    options = finetune.read_options([*arguments_of_folder, *more])
    with pytest.raises(SystemExit, match=message):
        finetune.prepare(options, finetune.World(0, 1, torch.device("cpu")))


def test_a_missing_gpu_and_foreign_launchers_are_named(finetune, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        finetune.read_options(["--synthetic", "--device", "cuda"])
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match="start with torchrun"), finetune.join_world("cpu"):
        pass


def test_class_names_must_match_the_classes(data_module, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(SystemExit, match=r"expected 3 names, .* got 2"):
        data_module.read_class_names(path, ["a", "b", "c"])
    path.write_text("a\tone\nb\ttwo\n")
    with pytest.raises(SystemExit, match="no name for c"):
        data_module.read_class_names(path, ["a", "b", "c"])


def test_a_batch_must_divide_among_the_processes(finetune, options_module, tmp_path):
    options = finetune.read_options(arguments("ucat", tmp_path, "--batch-size", "15"))
    with pytest.raises(SystemExit, match="expected a multiple of the 2 processes"):
        options_module.fit_schedule(options, n_images=64, n_processes=2)


def test_a_finished_run_is_not_overwritten_nor_continued_as_another(finetune, tmp_path):
    finetune.main(arguments("tecoa", tmp_path))
    with pytest.raises(SystemExit, match="exists: pass --resume"):
        finetune.main(arguments("tecoa", tmp_path))
    with pytest.raises(SystemExit, match=r"--lr \(was 0.05, is 0.1\)"):
        finetune.main(arguments("tecoa", tmp_path, "--resume", "--lr", "0.1"))


def test_a_run_goes_on_with_moved_data_and_not_with_other_data(
    finetune, arguments_of_folder, folder, tmp_path
):
    out = ["--out", str(tmp_path / "out")]
    finetune.main([*arguments_of_folder, *out])
    moved = folder.rename(tmp_path / "moved")
    resumed = [*arguments_of_folder, "--data", str(moved), "--val-data", str(moved), *out]
    finetune.main([*resumed, "--resume", "--val-eps", "2/255"])
    (moved / "n01" / "0.png").unlink()
    with pytest.raises(SystemExit, match="as many images of the same classes"):
        finetune.main([*resumed, "--resume"])


def test_a_loss_that_is_not_finite_stops_the_run(finetune, tmp_path):
    run = prepare(finetune, "tecoa", tmp_path)
    with pytest.raises(SystemExit, match="the loss is nan"):
        finetune.average(run, {"total": torch.tensor(math.nan), "kl": torch.tensor(1.0)})
