"""WorstCase against its definition: sample by sample, the attacks run alone and judged anew."""

import copy
import math
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from attack_models import SHAPE, RowWise, assert_unchanged, busy_model, snapshot
from attack_oracles import own_class, some_images

from calibclip.attacks import (
    APGD,
    PGD,
    AttackResult,
    AttackWarning,
    Foreign,
    Square,
    WorstCase,
    transfer_matrix,
)

# Random labels and tiny models: other tests look at these warnings.
pytestmark = pytest.mark.filterwarnings("ignore:the attack was probably blind")


@dataclass(frozen=True)
class Shift:
    """Moves all pixels by an amount; ``claim`` is what it says of its success."""

    amount: float
    claim: bool | None = None

    def __call__(self, model, images, target):
        moved = (images + self.amount).clamp(0, 1)
        if self.claim is None:
            return moved
        said = torch.full((len(images),), self.claim)
        return AttackResult(moved, said, said.double(), said.long(), n_forward=3, n_backward=2)


def brightness(images):
    """Predict class 1 if the mean pixel exceeds 1/2, class 0 otherwise."""
    lead = images.flatten(1).mean(1) - 0.5
    return torch.stack([-lead, lead], 1)


def grey(*levels):
    return torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, *SHAPE)


def wrong(model, images, target):
    return model(images).argmax(1) != target


def test_definition_sample_by_sample():
    model, images = RowWise(3), some_images(12, seed=3)
    target = own_class(model, images)
    target[:3] = (target[:3] + 1) % 4
    attacks = {
        "weak": PGD(0.05, 2, random_start=False),
        "apgd": APGD(0.08, 7, stop_when_fooled=True),
        "margin": PGD(0.12, 4, objective="margin", restarts=2),
    }
    alone = torch.stack(
        [
            torch.cat(
                [
                    wrong(model, attack(model, image[None], label[None]).images, label[None])
                    for image, label in zip(images, target, strict=True)
                ]
            )
            for attack in attacks.values()
        ]
    )
    clean = wrong(model, images, target)
    assert 0 < int(alone[2].sum()) < 12  # or the test says little
    result = WorstCase(attacks)(model, images, target)
    for i in range(12):
        breakers = [k for k in range(3) if alone[k, i]]
        expected = -2 if clean[i] else breakers[0] if breakers else -1
        assert int(result.broken_by[i]) == expected
        assert bool(result.success[i]) == (expected != -1)
    assert result.clean_accuracy == 1 - float(clean.double().mean())
    standing = ~clean
    for k, name in enumerate(attacks):
        standing &= ~alone[k]
        assert result.joint_accuracy[name] == float(standing.double().mean())
    assert result.robust_accuracy == float(standing.double().mean())
    assert torch.equal(wrong(model, result.images, target), result.success)
    assert result.accuracy is None

    full = WorstCase(attacks, individual=True)(model, images, target)
    assert torch.equal(full.broken_by, result.broken_by)
    for k, name in enumerate(attacks):
        assert full.accuracy[name] == float((~clean & ~alone[k]).double().mean())
        assert full.robust_accuracy <= full.accuracy[name]


def test_order_and_batches_do_not_change_the_accuracy():
    model, images = RowWise(1), some_images(11, seed=1)
    target = own_class(model, images)
    attacks = {"a": PGD(0.1, 3), "b": APGD(0.1, 6), "c": PGD(0.1, 3, norm="l2"), "d": Shift(0.2)}
    expected = WorstCase(attacks)(model, images, target)
    assert 0 < expected.robust_accuracy < 1
    backwards = WorstCase(dict(reversed(attacks.items())))(model, images, target)
    assert torch.equal(backwards.success, expected.success)
    for size in (1, 3, 20):
        result = WorstCase(attacks)(model, images, target, batch_size=size)
        assert torch.equal(result.images, expected.images)
        assert torch.equal(result.broken_by, expected.broken_by)


def test_what_an_attack_claims_does_not_count():
    images, target = grey(0.4, 0.7), torch.tensor([0, 1])
    # The first goes nowhere and says it succeeded, the second succeeds and says it did not.
    result = WorstCase({"liar": Shift(0.0, True), "modest": Shift(0.2, False)})(
        brightness, images, target
    )
    assert result.broken_by.tolist() == [1, -1]
    assert result.joint_accuracy == {"liar": 1.0, "modest": 0.5}
    assert (result.n_forward, result.n_backward) == (6, 4)


def test_images_that_come_back():
    images = grey(0.45, 0.45, 0.1, 0.6)
    target = torch.tensor([0, 0, 0, 0])
    result = WorstCase([Shift(0.02), Shift(0.04), Shift(0.03), Shift(0.1)])(
        brightness, images, target
    )
    assert result.names == ("shift", "shift 2", "shift 3", "shift 4")
    # The first that breaks it; for a robust sample the one of largest lead, never the clean image;
    # for one that is wrong without an attack the clean image.
    levels = result.images.flatten(1)[:, 0].tolist()
    assert levels == pytest.approx([0.55, 0.55, 0.2, 0.6])
    assert result.broken_by.tolist() == [3, 3, -1, -2]
    assert result.margin.tolist() == pytest.approx([0.1, 0.1, -0.6, 0.2])
    # An attack that makes things worse is still better than to report the clean image.
    result = WorstCase([Shift(-0.05)])(brightness, images[2:3], target[:1])
    assert float(result.images[0, 0, 0, 0]) == pytest.approx(0.05)


def test_a_foreign_attack_gets_its_own_images_and_targets():
    images, target = grey(0.1, 0.9, 0.2, 0.8, 0.3), torch.tensor([0, 1, 0, 1, 0])
    seen = []

    def attack(model, images, target):
        seen.append((images[:, 0, 0, 0].tolist(), target.tolist()))
        return images

    WorstCase([attack])(brightness, images, target, batch_size=2)
    assert seen == [([0.1, 0.9], [0, 1]), ([0.2, 0.8], [0, 1]), ([0.3], [0])]


def test_nothing_left_to_attack_and_nothing_at_all():
    images, target = grey(0.45, 0.2), torch.tensor([0, 0])
    result = WorstCase([Shift(0.4), PGD(0.1)])(brightness, images, target)
    assert result.robust_accuracy == 0.0
    assert result.results["pgd"] is None
    assert result.joint_accuracy["pgd"] == 0.0
    empty = WorstCase([Shift(0.4), PGD(0.1)])(brightness, images[:0], target[:0])
    assert math.isnan(empty.robust_accuracy)
    assert empty.images.shape == images[:0].shape
    assert "0 images" in repr(empty)


def test_a_model_that_breaks_down_is_no_success():
    def model(images):
        logits = brightness(images)
        return torch.where(images.flatten(1)[:, :1] > 0.5, torch.nan, logits)

    result = WorstCase([Shift(0.2), Shift(0.01)])(model, grey(0.4), torch.tensor([0]))
    assert result.broken_by.tolist() == [-1]
    assert float(result.images[0, 0, 0, 0]) == pytest.approx(0.41)


def test_masked_gradients_are_noticed():
    def masked(images):
        # The logits of an honest model, with a gradient that is zero everywhere.
        return brightness(images.detach()) + 0 * images.flatten(1)[:, :2]

    images, target = grey(0.49, 0.45, 0.48), torch.tensor([0, 0, 0])
    attacks = {"pgd": PGD(0.1, 3, random_start=False), "square": Square(0.1, queries=50)}
    with pytest.warns(AttackWarning, match="square broke 3 of 3 samples .* masks its gradients"):
        result = WorstCase(attacks)(masked, images, target)
    assert result.robust_accuracy == 0.0
    # With honest gradients PGD leaves nothing for Square, and alone it proves nothing.
    WorstCase(attacks)(brightness, images, target)
    WorstCase({"square": attacks["square"]})(masked, images, target)


@pytest.mark.parametrize("eps", [1 / 255, 4 / 255])
def test_presets(eps):
    paper, reliable = WorstCase.paper(eps), WorstCase.reliable(eps, square=True)
    assert paper.attacks == {
        "pgd-last": PGD(eps, 100, 1 / 255, select="last"),
        "pgd-worst": PGD(eps, 100, 1 / 255, stop_when_fooled=True),
    }
    assert reliable.attacks == {
        "apgd-ce": APGD(eps, 100, stop_when_fooled=True),
        "apgd-t": APGD(eps, 100, objective="dlr-targeted", stop_when_fooled=True),
        "square": Square(eps),
    }
    assert list(WorstCase.reliable(eps).attacks) == ["apgd-ce", "apgd-t"]
    assert WorstCase.train(eps).attacks == {"pgd": PGD(eps, 2, 1 / 255, select="last")}
    caa, a3 = WorstCase.composite(eps, seed=3).attacks.values()
    assert caa == PGD(eps, 100, caa.step_size, stop_when_fooled=True, seed=3)
    assert caa.step_size == pytest.approx(0.1 / 255)
    assert WorstCase.composite(eps, steps=50).attacks["caa-linf"].step_size == pytest.approx(
        0.2 / 255
    )
    assert a3 == PGD(
        eps, 100, eps, objective="margin", schedule="cosine", stop_when_fooled=True, seed=3
    )
    other = WorstCase.reliable(
        eps, norm="l2", steps=7, seed=5, stop_when_fooled=False
    ).attacks.values()
    assert list(other) == [
        APGD(eps, 7, "l2", objective=name, seed=5) for name in ("ce", "dlr-targeted")
    ]
    assert [a.seed for a in WorstCase.reliable(eps, seed=5, square=True).attacks.values()] == [
        5
    ] * 3
    assert [attack.seed for attack in WorstCase.paper(eps, seed=5).attacks.values()] == [5, 5]
    assert WorstCase.train(eps, steps=10, step_size=0.3).attacks == {
        "pgd": PGD(eps, 10, 0.3, select="last")
    }
    with pytest.raises(ValueError, match="square: expected False with norm='l2', got True"):
        WorstCase.reliable(eps, norm="l2", square=True)
    for worst in (paper, reliable):
        assert pickle.loads(pickle.dumps(worst)) == worst
        assert str(100) in repr(worst)


def test_reliable_is_no_weaker_than_its_members_and_pgd():
    model, images = RowWise(5), some_images(16, seed=5)
    target = own_class(model, images)
    worst = WorstCase.reliable(0.06, steps=30)
    joint = worst(model, images, target)
    for attack in worst.attacks.values():
        assert joint.robust_accuracy <= 1 - float(
            attack(model, images, target).success.double().mean()
        )
    pgd = PGD(0.06, 30)(model, images, target)
    assert joint.robust_accuracy <= 1 - float(pgd.success.double().mean())
    assert 0 < joint.robust_accuracy < 1


def test_the_model_is_left_alone():
    model = busy_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(module.training,) for module in model.modules()]
    images = some_images(3, dtype=torch.float32)
    # Right without an attack, so that there is something to attack.
    target = own_class(copy.deepcopy(model).eval(), images)
    WorstCase([PGD(0.1, 2), Shift(0.1)])(model, images, target)
    model.fail_at = len(model.modes) + 3
    with pytest.raises(RuntimeError, match="the model failed"):
        WorstCase([PGD(0.1, 2), Shift(0.1)])(model, images, target)
    assert [(module.training,) for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.conv.bias.requires_grad
    assert model.conv.weight.requires_grad


@pytest.mark.parametrize(
    ("attacks", "error", "message"),
    [
        ([], ValueError, "attacks: expected at least one attack, got none"),
        ("apgd", TypeError, "attacks: expected a mapping .* or a sequence of attacks, got str"),
        ([3], TypeError, "attacks: expected .*, got int 3"),
        ({1: PGD(0.1)}, TypeError, "attacks: expected a mapping from names"),
    ],
)
def test_bad_attacks(attacks, error, message):
    with pytest.raises(error, match=message):
        WorstCase(attacks)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (
            None,
            TypeError,
            r"attack: expected images of shape \(2, 2, 3, 3\), or a result .*, got NoneType",
        ),
        (torch.zeros(1, *SHAPE), ValueError, r"attack: .*, got float32 tensor of shape \(1, 2, 3"),
        (torch.zeros(2, *SHAPE).byte(), TypeError, r"attack: .*, got uint8 tensor of shape"),
        (
            torch.full((2, *SHAPE), torch.inf),
            ValueError,
            "attack: expected finite images, got NaN or infinity among them; Foreign",
        ),
    ],
)
def test_attacks_that_return_something_else(found, error, message):
    with pytest.raises(error, match=message):
        WorstCase([lambda model, images, target: found])(
            brightness, grey(0.4, 0.4), torch.tensor([0, 0])
        )


def test_bad_targets():
    worst = WorstCase([PGD(0.1)])
    with pytest.raises(ValueError, match=r"target: expected class indices in \[0, 1\], got 2"):
        worst(brightness, grey(0.4), torch.tensor([2]))
    with pytest.raises(TypeError, match="target: expected a tensor of int64"):
        worst(brightness, grey(0.4), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        worst(brightness, grey(0.4), torch.tensor([0]), batch_size=0)
    with pytest.raises(TypeError, match="progress: expected True or False, got int 1"):
        worst(brightness, grey(0.4), torch.tensor([0]), progress=1)
    with pytest.raises(
        TypeError, match=r"generator: expected a torch\.Generator or None, got int 3"
    ):
        worst(brightness, grey(0.4), torch.tensor([0]), generator=3)
    with pytest.raises(TypeError, match="model: expected a callable from images to logits"):
        worst(None, grey(0.4)[:0], torch.tensor([0])[:0])


def test_no_attack_is_lost_to_its_name():
    names = list(
        WorstCase([Foreign(Shift(k / 10), 0.4, name="my attack") for k in range(4)]).attacks
    )
    assert names == ["my attack", "my attack 2", "my attack 3", "my attack 4"]
    mixed = [Foreign(Shift(0.1), 0.1, name="pgd 2"), PGD(0.1), PGD(0.2), PGD(0.3)]
    assert list(WorstCase(mixed).attacks) == ["pgd 2", "pgd", "pgd 3", "pgd 4"]


def test_the_generator_reaches_every_attack():
    model, images = RowWise(2), some_images(9, seed=2)
    target = own_class(model, images)

    def noise(model, images, target):
        return images + 0.02 * torch.randn_like(images)

    attacks = [PGD(0.02, 2), Square(0.02, queries=9), Foreign(noise, 0.02)]
    for attack in attacks:
        found = {}
        for seed, size in ((0, None), (0, 4), (1, None)):
            generator = torch.Generator().manual_seed(seed)
            before = generator.get_state()
            found[seed, size] = WorstCase([attack])(
                model, images, target, batch_size=size, generator=generator
            ).images
            assert not torch.equal(generator.get_state(), before)
        assert not torch.equal(found[0, None], found[1, None])
        if not isinstance(attack, Foreign):
            assert torch.equal(found[0, None], found[0, 4])


def test_clean_images_on_which_the_model_breaks_down_are_not_right():
    result = WorstCase([Shift(0.2)])(
        lambda images: brightness(images) * torch.nan, grey(0.4, 0.7), torch.tensor([0, 1])
    )
    assert result.clean_accuracy == result.robust_accuracy == 0.0
    assert result.broken_by.tolist() == [-2, -2]


def test_attacks_towards_the_target_are_refused():
    for attack in (PGD(0.1, targeted=True), Square(0.1, targeted=True)):
        with pytest.raises(ValueError, match="attacks: expected none with targeted=True, got"):
            WorstCase({"fine": PGD(0.1), "not": attack})


@pytest.mark.parametrize(
    "weaker", [PGD(1e-4, 3), PGD(0.3, 0, random_start=False), APGD(3.0, 2, "l2")]
)
def test_square_proves_nothing_beside_a_smaller_ball(weaker):
    result = WorstCase([weaker, Square(0.3, queries=50)], individual=True)(
        brightness,
        grey(0.35, 0.4),
        torch.tensor([0, 0]),
    )
    assert int((result.broken_by == 1).sum()) == (0 if weaker.norm == "l2" else 2)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_masking_is_suspected_from_two_of_a_thousand(broken):
    count = 1000 // 2
    images = grey(*[0.2] * (count - broken), *[0.45] * broken)

    def masked(images):
        return brightness(images.detach()) + 0 * images.flatten(1)[:, :2]

    worst = WorstCase([PGD(0.1, 1, random_start=False), Square(0.1, queries=40)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = worst(masked, images, torch.zeros(count).long())
    assert int(result.success.sum()) == broken
    assert sum("masks its gradients" in str(warning.message) for warning in caught) == (broken == 2)


def test_judgement_is_in_full_precision_under_autocast_too():
    weight = torch.tensor([[1.0, 1.0], [1.0001, 1.0001]])

    def model(images):
        return torch.nn.functional.linear(images, weight)

    images, target = torch.full((1, 2), 0.5), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).argmax(1) == 0
        result = WorstCase([Shift(0.0)])(model, images, target)
        foreign = Foreign(Shift(0.0), 0.1)(model, images, target)
        matrix = transfer_matrix({"m": model}, Shift(0.0), images, target)
    assert result.clean_accuracy == result.robust_accuracy == matrix.clean == matrix.accuracy == 1
    assert not foreign.success.any()


def test_what_is_reported_of_a_bare_callable():
    images, target = grey(0.4, 0.3, 0.1), torch.tensor([0, 0, 0])
    result = WorstCase([Shift(0.15)])(brightness, images, target)
    found = result.results["shift"]
    assert found.success.tolist() == [True, False, False]
    assert found.loss.tolist() == pytest.approx([0.1, -0.1, -0.5])
    counted = WorstCase([Shift(0.15, True)])(brightness, images, target, batch_size=1)
    assert (counted.n_forward, counted.n_backward) == (9, 6)


def test_a_bare_callable_borrows_the_model_too():
    model = busy_model()
    images = some_images(3, dtype=torch.float32)
    target = own_class(copy.deepcopy(model).eval(), images)

    def fgsm(model, images, target):
        images.requires_grad_()
        torch.nn.functional.cross_entropy(model(images), target).backward()
        return (images + 0.1 * images.grad.sign()).double()

    before = snapshot(model)
    for use in (
        lambda: WorstCase([fgsm])(model, images, target),
        lambda: transfer_matrix({"m": model}, fgsm, images, target),
    ):
        with torch.no_grad():
            found = use().images
        assert_unchanged(model, before)
        found = found if isinstance(found, torch.Tensor) else found["m"]
        assert found.dtype == torch.float32
