"""The transfer matrix against plain loops, and its table."""

import numpy as np
import pytest
import torch
from torch import nn

from calibclip.attacks import PGD, WorstCase
from calibclip.attacks.result import AttackResult
from calibclip.attacks.transfer import TransferMatrix, transfer_matrix


class Linear(nn.Module):
    """A linear classifier with dropout, which remembers how it was called."""

    def __init__(self, seed, n_classes=4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(n_classes, 12, generator=generator).double())
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        return self.dropout(images.flatten(1) - 0.5) @ self.weight.T


def some_images(batch=11):
    return torch.from_numpy(np.random.default_rng(0).uniform(size=(batch, 3, 2, 2)))


def plain_accuracy(model, images, target):
    hits = 0
    for image, label in zip(images, target, strict=True):
        logits = [float(row @ (image.flatten() - 0.5)) for row in model.weight.detach()]
        hits += logits.index(max(logits)) == int(label)
    return hits / len(images)


def three_models():
    models = {name: Linear(seed).train() for seed, name in enumerate(("a", "second", "c"))}
    target = models["a"].eval()(some_images()).argmax(1)
    models["c"].eval()
    for model in models.values():
        model.calls.clear()
    return models, target


def test_rows_are_sources_and_columns_victims():
    models, target = three_models()
    images = some_images()
    attacked = []

    def attack(model, images, target):
        attacked.append(model)
        return PGD(0.2, steps=3, random_start=False)(model, images, target)

    matrix = transfer_matrix(models, attack, images, target)
    assert attacked == list(models.values())
    assert matrix.names == ("a", "second", "c")
    assert matrix.accuracy.shape == (3, 3)
    assert matrix.accuracy.dtype == matrix.clean.dtype == torch.float64
    for i, (source, model) in enumerate(models.items()):
        found = PGD(0.2, steps=3, random_start=False)(model, images, target)
        assert torch.equal(matrix.images[source], found.images)
        assert matrix.accuracy[i, i] == pytest.approx(1 - float(found.success.double().mean()))
        for j, victim in enumerate(models.values()):
            expected = plain_accuracy(victim, matrix.images[source], target)
            assert float(matrix.accuracy[i, j]) == pytest.approx(expected, abs=1e-15)
        expected = plain_accuracy(model, images, target)
        assert float(matrix.clean[i]) == pytest.approx(expected, abs=1e-15)
    assert matrix.clean[0] == 1
    # The numbers can tell a row from a column.
    assert not torch.equal(matrix.accuracy, matrix.accuracy.T)


@pytest.mark.parametrize("batch_size", [None, 1, 4, 11, 100])
def test_batches_do_not_matter_and_modules_are_borrowed(batch_size):
    models, target = three_models()
    images = some_images()

    def darken(model, images, target):
        return images * 0.6

    expected = transfer_matrix(three_models()[0], darken, images, target)
    flags = [[part.training for part in model.modules()] for model in models.values()]
    kept = images.clone()
    matrix = transfer_matrix(models, darken, images, target, batch_size=batch_size)
    assert torch.equal(matrix.accuracy, expected.accuracy)
    assert torch.equal(matrix.clean, expected.clean)
    assert [[part.training for part in model.modules()] for model in models.values()] == flags
    sizes = {None: [11], 1: [1] * 11, 4: [4, 4, 3], 11: [11], 100: [11]}[batch_size]
    for model in models.values():
        assert model.calls == [(size, False, False) for size in 4 * sizes]
        assert model.weight.requires_grad
        assert model.weight.grad is None
    assert torch.equal(images, kept)


def test_results_tensors_and_plain_functions():
    images, target = some_images(), torch.zeros(11).long()
    weight = Linear(0).weight

    def model(x):
        return x.flatten(1) @ weight.T

    def as_tensor(model, images, target):
        return (0.5 * images).requires_grad_()

    def as_result(model, images, target):
        none = torch.zeros(len(images))
        return AttackResult(0.5 * images, none.bool(), none, none.long(), 0, 0)

    first, second = (
        transfer_matrix({"f": model}, a, images, target) for a in (as_tensor, as_result)
    )
    assert torch.equal(first.accuracy, second.accuracy)
    assert torch.equal(first.images["f"], 0.5 * images)
    assert not first.images["f"].requires_grad


def test_a_worst_case_and_a_model_that_breaks_down():
    models, target = three_models()
    images = some_images()
    worst = WorstCase([PGD(0.2, 3)])
    matrix = transfer_matrix(models, worst, images, target)
    for source, model in models.items():
        assert torch.equal(matrix.images[source], worst(model, images, target).images)
    broken = transfer_matrix({"nan": lambda x: x.flatten(1)[:, :4] * torch.nan}, lambda m, x, y: x,
                             images, target)  # fmt: skip
    assert broken.clean == broken.accuracy == 0


def test_an_attack_that_writes_into_its_arguments():
    models, target = three_models()

    def attack(model, images, target):
        target.add_(1)
        return images.mul_(0.5)

    images = some_images()
    kept, labels = images.clone(), target.clone()
    matrix = transfer_matrix(models, attack, images, target)
    assert torch.equal(images, kept)
    assert torch.equal(target, labels)
    assert matrix.clean[0] == 1
    assert all(torch.equal(found, 0.5 * kept) for found in matrix.images.values())


def test_the_table():
    matrix = TransferMatrix(
        names=("clip", "a longer name"),
        accuracy=torch.tensor([[0.0, 0.5], [2 / 3, 1.0]], dtype=torch.float64),
        clean=torch.tensor([0.125, 1.0], dtype=torch.float64),
        images={},
    )
    expected = [
        "source \\ victim  clip  a longer name",
        "clip              0.0           50.0",
        "a longer name    66.7          100.0",
        "clean            12.5          100.0",
    ]
    assert str(matrix).splitlines() == expected
    assert repr(matrix) == str(matrix)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"models": [Linear(0)]}, TypeError, r"^models: expected a mapping from names to models"),
        ({"models": {}}, ValueError, r"^models: expected at least one model, got none"),
        ({"models": {"a": 3}}, TypeError, r"^models: expected .*, got 'a': int"),
        ({"models": {3: Linear(0)}}, TypeError, r"^models: expected .*, got 3: Linear"),
        ({"attack": "pgd"}, TypeError, r"^attack: expected a callable \(model, images, target\)"),
        ({"images": some_images(0)}, ValueError, r"^images: expected at least one image"),
        ({"target": torch.zeros(3).long()}, ValueError, r"^target: .* of shape \(11,\)"),
        ({"target": torch.full((11,), 4)}, ValueError, r"^target: .* in \[0, 3\], got 4"),
        ({"batch_size": 0}, ValueError, r"^batch_size: expected an integer >= 1"),
        ({"attack": lambda *call: None}, TypeError, r"^attack: expected images .* got NoneType"),
        ({"attack": lambda m, x, y: x / 0}, ValueError, r"^attack: expected finite images"),
        ({"attack": lambda m, x, y: x[:3]}, ValueError, r"^attack: .*, got float64 tensor"),
        ({"models": {"a": lambda x: (x, x)}}, TypeError, r"^model: expected logits"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    arguments = {
        "models": {"a": Linear(0)},
        "attack": lambda model, images, target: images,
        "images": some_images(),
        "target": torch.zeros(11).long(),
    }
    with pytest.raises(error, match=message):
        transfer_matrix(**{**arguments, **changes})
