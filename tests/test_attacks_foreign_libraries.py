"""torchattacks and foolbox inside this package, and this package's classifier inside them."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from test_attacks_foreign import (
    N_CLASSES,
    assert_no_trace,
    busy_model,
    predictions,
    random_states,
    some_images,
    traces,
)

from calibclip.attacks import PGD
from calibclip.attacks.foreign import from_foolbox, from_torchattacks

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

# ---------------------------------------------------------------------------- torchattacks


@pytest.mark.parametrize(
    ("cls", "norm", "options"),
    [
        (torchattacks.FGSM, "linf", {}),
        (torchattacks.PGD, "linf", {"alpha": 0.05, "steps": 5}),
        (torchattacks.PGDL2, "l2", {"alpha": 0.1, "steps": 5}),
        (torchattacks.APGD, "linf", {"steps": 5, "loss": "dlr"}),
        (torchattacks.APGD, "l2", {"steps": 5}),
        (torchattacks.APGDT, "linf", {"steps": 5, "n_classes": N_CLASSES}),
        (torchattacks.FAB, "l2", {"steps": 5, "n_classes": N_CLASSES}),
        (torchattacks.Square, "linf", {"n_queries": 20}),
        (torchattacks.CW, "l2", {"steps": 20, "lr": 0.1, "c": 10}),
        (torchattacks.DeepFool, "l2", {"steps": 5}),
        (torchattacks.TPGD, "linf", {"alpha": 0.05, "steps": 5}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("plain", [False, True])
def test_torchattacks_inside(cls, norm, options, plain, capsys):
    model, images, eps = busy_model(torch.float32), some_images(dtype=torch.float32), 0.3
    target = predictions(model, images)
    before, states = traces(model), random_states()
    attack = from_torchattacks(cls, eps, norm, **options)
    callable_model = copy.deepcopy(model).eval().forward if plain else model
    result = attack(callable_model, images, target)
    assert_no_trace(before, traces(model))
    assert states == random_states()
    assert not any(map(any, model.modes))
    distance = (result.images.double() - images.double()).flatten(1)
    length = distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)
    assert bool((length <= eps * (1 + 1e-12)).all())
    assert bool((length > 0).any())
    assert torch.equal(result.success, predictions(model, result.images) != target)
    assert torch.equal(attack(callable_model, images, target).images, result.images)
    assert result.n_forward > 1
    assert (result.n_backward > 0) == (cls is not torchattacks.Square)
    assert capsys.readouterr().out == ""
    assert attack.name == f"torchattacks.{cls.__name__}"


def test_the_counts_are_those_of_the_attack():
    model, images = busy_model(), some_images()
    attack = from_torchattacks(torchattacks.PGD, 0.3, alpha=0.1, steps=7)
    result = attack(model, images, predictions(model, images))
    assert (result.n_forward, result.n_backward) == (8, 7)
    attack = from_foolbox(foolbox.attacks.LinfPGD(steps=7), 0.3)
    result = attack(model, images, predictions(model, images))
    assert result.n_backward == 7
    assert result.n_forward <= 10


def test_options_reach_the_constructor():
    seen = []

    class Recorder(torchattacks.PGD):
        def __init__(self, model, norm="none", **options):
            seen.append({"norm": norm, **options})
            super().__init__(model, **options)

    images, target = some_images(), torch.zeros(6).long()
    for norm in ("linf", "l2"):
        from_torchattacks(Recorder, 0.2, norm, alpha=0.1, steps=1)(busy_model(), images, target)
    assert [options["norm"] for options in seen] == ["Linf", "L2"]
    assert all(options["alpha"] == 0.1 for options in seen)


@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_targeted_attacks_reach_their_target(library, capsys):
    model, images, eps = busy_model(), some_images(), 0.5
    target = (predictions(model, images) + 1) % N_CLASSES
    if library == "torchattacks":
        make = functools.partial(
            from_torchattacks, torchattacks.PGD, eps, alpha=0.1, steps=20, random_start=False
        )
    else:
        pgd = foolbox.attacks.LinfPGD(abs_stepsize=0.1, steps=20, random_start=False)
        make = functools.partial(from_foolbox, pgd, eps)
    result = make(targeted=True)(model, images, target)
    assert torch.equal(result.success, predictions(model, result.images) == target)
    assert int(result.success.sum()) >= 5
    ours = PGD(eps, 20, 0.1, random_start=False, select="last", targeted=True)
    assert (ours(model, images, target).images - result.images).abs().max() < 1e-6
    assert capsys.readouterr().out == ""
    away = make()(model, images, target)
    assert bool((predictions(model, away.images) != target).all())


def test_wrong_attacks_of_the_libraries():
    with pytest.raises(TypeError, match=r"^cls: expected a class of torchattacks"):
        from_torchattacks("PGD", 0.1)
    with pytest.raises(ValueError, match=r"^norm: expected 'l2' for PGDL2, got 'linf'"):
        from_torchattacks(torchattacks.PGDL2, 0.1)
    for cls, norm in (
        (torchattacks.FGSM, "l2"),
        (torchattacks.PGD, "l2"),
        (torchattacks.CW, "linf"),
    ):
        with pytest.raises(
            ValueError, match=rf"^norm: expected '.*' for {cls.__name__}, got '{norm}'"
        ):
            from_torchattacks(cls, 0.1, norm)
    with pytest.raises(
        TypeError, match=r"^cls: expected a class of torchattacks, got PGD; pass the"
    ):
        from_torchattacks(torchattacks.PGD(busy_model()), 0.1)
    with pytest.raises(TypeError, match=r"^options: expected those of PGD, got .*'stepz'"):
        from_torchattacks(torchattacks.PGD, 0.1, stepz=3)
    with pytest.raises(
        TypeError, match=r"^attack: expected an attack of foolbox, .*; pass an inst"
    ):
        from_foolbox(foolbox.attacks.LinfPGD, 0.1)
    with pytest.raises(ValueError, match=r"^norm: expected one of 'linf', 'l2', got 'Linf'"):
        from_torchattacks(torchattacks.PGD, 0.1, "Linf")
    with pytest.raises(TypeError, match=r"^attack: expected an attack of foolbox, got str"):
        from_foolbox("LinfPGD", 0.1)
    for attack in (foolbox.attacks.L1PGD(), foolbox.attacks.EADAttack(), print):
        with pytest.raises(ValueError, match=r"^attack: expected .* L-infinity or L2 distance"):
            from_foolbox(attack, 0.1)


def test_adapters_are_values():
    attack = from_torchattacks(torchattacks.PGD, 0.3, steps=2, alpha=0.1)
    assert attack == from_torchattacks(torchattacks.PGD, 0.3, alpha=0.1, steps=2)
    assert attack != from_torchattacks(torchattacks.PGD, 0.3, alpha=0.2, steps=2)
    assert hash(attack) == hash(pickle.loads(pickle.dumps(attack)))
    attack = from_foolbox(foolbox.attacks.L2PGD(steps=3), 0.5, bounds=(-1.0, 1.0))
    assert (attack.norm, attack.bounds) == ("l2", (-1.0, 1.0))
    again = pickle.loads(pickle.dumps(attack))
    images = 2 * some_images() - 1
    model = busy_model()
    target = predictions(model, images)
    assert torch.equal(again(model, images, target).images, attack(model, images, target).images)


# ---------------------------------------------------------------------------- foolbox


@pytest.mark.parametrize(
    "attack",
    [
        foolbox.attacks.LinfFastGradientAttack(),
        foolbox.attacks.LinfPGD(steps=5),
        foolbox.attacks.L2PGD(steps=5),
        foolbox.attacks.L2DeepFoolAttack(steps=5),
        foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=5),
        foolbox.attacks.LinfAdditiveUniformNoiseAttack(),
    ],
    ids=lambda attack: type(attack).__name__,
)
@pytest.mark.parametrize("plain", [False, True])
def test_foolbox_inside(attack, plain):
    model, images, eps = busy_model(torch.float32), some_images(dtype=torch.float32), 0.3
    target = predictions(model, images)
    before, states = traces(model), random_states()
    foreign = from_foolbox(attack, eps)
    callable_model = copy.deepcopy(model).eval().forward if plain else model
    result = foreign(callable_model, images, target)
    assert_no_trace(before, traces(model))
    assert states == random_states()
    assert not any(map(any, model.modes))
    distance = (result.images.double() - images.double()).flatten(1)
    length = distance.abs().amax(1) if foreign.norm == "linf" else distance.norm(dim=1)
    assert bool((length <= eps * (1 + 1e-12)).all())
    assert bool((length > 0).any())
    assert torch.equal(result.success, predictions(model, result.images) != target)
    assert torch.equal(foreign(callable_model, images, target).images, result.images)
    assert foreign.name == f"foolbox.{type(attack).__name__}"


# ------------------------------------------------------- this classifier inside both libraries


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def zero_shot(request):
    """A tiny CLIP with images that it gets right, and its images' classes."""
    tiny_models = pytest.importorskip("tiny_models")
    model = tiny_models.tiny_hf_clip().to(request.param)
    classifier = tiny_models.from_hf(model, tiny_models.clip_processor()).eval()
    # 40 x 36: enlarged or cut inside the classifier, and the attack goes through that.
    values = np.random.default_rng(0).uniform(-0.2, 1.2, (4, 3, 40, 36)).clip(0, 1)
    images = torch.from_numpy(values).to(request.param)
    return classifier, images, predictions(classifier, images)


def direct(library, norm, classifier, images, target, eps, step_size, steps):
    """Run a library's PGD on the classifier itself, as its own documentation says to."""
    if library == "torchattacks":
        cls = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
        attack = cls(classifier, eps=eps, alpha=step_size, steps=steps, random_start=False)
        return attack(images, target)
    cls = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = cls(abs_stepsize=step_size, steps=steps, random_start=False)
    model = foolbox.PyTorchModel(classifier.eval(), bounds=(0, 1), device="cpu")
    return attack(model, images, target, epsilons=eps)[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_the_classifier_works_inside_and_agrees_with_our_pgd(library, norm, zero_shot):
    classifier, images, target = zero_shot
    eps, step_size, steps = (4 / 255, 1 / 255, 6) if norm == "linf" else (0.5, 0.2, 6)
    theirs = direct(library, norm, classifier, images, target, eps, step_size, steps)
    ours = PGD(eps, steps, step_size, norm, random_start=False, select="last")
    images_adv = ours(classifier, images, target).images
    assert bool((predictions(classifier, theirs) != target).any())
    # A float32 gradient keeps fewer digits than its sign needs.
    tolerance = 1e-6 if norm == "linf" or images.dtype == torch.float64 else 1e-3
    assert (theirs - images_adv).abs().max() <= tolerance
    # Inside Foreign the path is theirs, bit by bit up to the projection.
    if library == "torchattacks":
        cls = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
        options = {"alpha": step_size, "steps": steps, "random_start": False}
        foreign = from_torchattacks(cls, eps, norm, **options)
    else:
        cls = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
        foreign = from_foolbox(cls(abs_stepsize=step_size, steps=steps, random_start=False), eps)
    assert (foreign(classifier, images, target).images - theirs).abs().max() <= 1e-7


def test_the_classifier_works_inside_apgd(zero_shot):
    classifier, images, target = zero_shot
    for loss in ("ce", "dlr"):
        attack = torchattacks.APGD(classifier, eps=8 / 255, steps=10, loss=loss, seed=0)
        images_adv = attack(images, target)
        assert (images_adv - images).abs().max() <= 8 / 255 + 1e-6
        assert bool((predictions(classifier, images_adv) != target).any())
