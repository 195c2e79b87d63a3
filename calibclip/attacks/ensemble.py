"""The worst case over several attacks: a sample is robust only if none of them breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calibclip._checks import check_count, check_flag, check_target, describe, wrong
from calibclip.attacks._arguments import check_found, check_generator, check_images, draw_seed
from calibclip.attacks._attack import GradientAttack
from calibclip.attacks._model import attacked_by_margin, borrowed
from calibclip.attacks.apgd import APGD
from calibclip.attacks.foreign import Foreign
from calibclip.attacks.pgd import PGD
from calibclip.attacks.result import AttackResult, warn
from calibclip.attacks.square import Square
from calibclip.attacks.threat import per_sample

Attack = Callable[..., Any]
_OWN = (GradientAttack, Square, Foreign)

# Share of samples that only Square breaks from which AutoAttack suspects masked gradients.
_MASKING = 0.002


@dataclass(frozen=True, eq=False, repr=False)
class WorstCaseResult:
    """What a sequence of attacks leaves standing, one entry per sample.

    Attributes:
        names: Names of the attacks, in the order they ran.
        images: The image that broke a sample; for a robust one, of all attacks' images the one of
            the largest margin. For a sample that is wrong without an attack, the clean image.
        success: Whether the sample is misclassified, with or without an attack, shape ``(B,)``.
        margin: Lead of the best wrong class at ``images``, shape ``(B,)``.
        broken_by: Index into ``names`` of the attack that broke a sample; -1 for a robust sample,
            -2 for one that is wrong without an attack. Shape ``(B,)``, int64.
        clean_accuracy: Share of samples that are right without an attack.
        joint_accuracy: Share of samples still right after each attack and those before it.
        accuracy: Share of samples right after each attack alone; None unless all attacks ran on
            all samples (``individual``).
        results: What each attack returned for the samples it ran on, in their order; None for
            one that had nothing left to attack. Of another's attack, ``success`` and ``loss`` are
            this judgement and the margin, and passes count only if it returned a result.
    """

    names: tuple[str, ...]
    images: Tensor
    success: Tensor
    margin: Tensor
    broken_by: Tensor
    clean_accuracy: float
    joint_accuracy: dict[str, float]
    accuracy: dict[str, float] | None
    results: dict[str, AttackResult | None]

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that are right under every attack; NaN without samples."""
        return _share(~self.success)

    @property
    def n_forward(self) -> int:
        """Forward passes of all attacks, each over a batch."""
        return sum(result.n_forward for result in self.results.values() if result is not None)

    @property
    def n_backward(self) -> int:
        """Backward passes of all attacks, each over a batch."""
        return sum(result.n_backward for result in self.results.values() if result is not None)

    def __repr__(self) -> str:
        lines = [f"WorstCaseResult({len(self.success)} images)"]
        width = max(len(name) for name in ("clean", *self.names))
        lines.append(f"  {'clean':{width}s}  {self.clean_accuracy:6.1%}")
        for index, name in enumerate(self.names):
            alone = "" if self.accuracy is None else f", alone {self.accuracy[name]:.1%}"
            broken = int((self.broken_by == index).sum())
            lines.append(
                f"  {name:{width}s}  {self.joint_accuracy[name]:6.1%}  broke {broken}{alone}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class WorstCase:
    r"""Run attacks one after the other, each on the samples that are still right.

    .. math:: \text{robust accuracy} = \frac1B \sum_i \min_A
        \mathbb 1[\operatorname{argmax} z(x_i^A) = y_i]

    the pointwise worst case: not the mean over attacks, nor the lowest accuracy of one. Whether an
    attack has broken a sample is not taken from the attack: its images are put to the model again,
    in evaluation mode and without autocast. A sample that is wrong on the clean image counts as
    broken, and is not attacked. Ranks of FSDP would make different numbers of passes and wait for
    each other forever: each attacks a plain copy instead (``docs/scale.md``).

    Args:
        attacks: Attacks by name, or a sequence of them, which are then named after their types.
            An attack is a callable ``(model, images, target)`` that returns an `AttackResult` or
            the images alone: any of this package, or a foreign one through ``Foreign``.
        individual: Run every attack on all samples that are right on the clean image, for the
            accuracy under each of them alone.

    Raises:
        TypeError: ``attacks`` is no mapping or sequence of callables.
        ValueError: There are none, or one has ``targeted=True``.

    Example:
        >>> weight = torch.eye(3).repeat(2, 1)
        >>> images, target = torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
        >>> worst = WorstCase([PGD(eps=0.3), APGD(eps=0.3, steps=10)])
        >>> result = worst(lambda x: x @ weight, images, target)
        >>> result.robust_accuracy <= result.clean_accuracy
        True

    References:
        Croce and Hein (2020), Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks, section 5, https://arxiv.org/abs/2003.01690
    """

    attacks: Mapping[str, Attack] | Sequence[Attack]
    _: KW_ONLY
    individual: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", _named(self.attacks))
        check_flag("individual", self.individual)

    @classmethod
    def paper(cls, eps: float, *, seed: int = 0) -> WorstCase:
        """PGD-100 as the CLIP papers run it, its last and its worst iterate.

        Step 1/255 and a uniform start. The papers report the last iterate; the accuracy under the
        worst is the lower bound of what that same run found.

        Args:
            eps: Radius of the L-infinity ball; the papers' are 1/255, 2/255 and 4/255.
            seed: Of the starts.

        Returns:
            The attacks ``"pgd-last"`` and ``"pgd-worst"``.

        Example:
            >>> list(WorstCase.paper(eps=1 / 255).attacks)
            ['pgd-last', 'pgd-worst']
        """
        last = PGD(eps, 100, 1 / 255, select="last", seed=seed)
        worst = PGD(eps, 100, 1 / 255, stop_when_fooled=True, seed=seed)
        return cls({"pgd-last": last, "pgd-worst": worst})

    @classmethod
    def reliable(
        cls,
        eps: float,
        *,
        norm: str = "linf",
        steps: int = 100,
        seed: int = 0,
        square: bool = False,
        stop_when_fooled: bool = True,
    ) -> WorstCase:
        """APGD on cross-entropy, then APGD-T: what of AutoAttack decides robust accuracy.

        Args:
            eps: Radius of the ball.
            norm: ``"linf"`` or ``"l2"``.
            steps: Of each run; AutoAttack's are 100.
            seed: Of the starts.
            square: Add `Square`, which needs no gradient and is for "linf" only. If it breaks what
                the others could not, the gradients are probably masked, and the result warns.
            stop_when_fooled: End a sample at its first success. Right for accuracy. Calibration
                on images just across the boundary is another thing than on the worst ones: turn it
                off for those.

        Returns:
            The attacks ``"apgd-ce"`` and ``"apgd-t"``, and ``"square"`` if asked for.

        Raises:
            ValueError: An option is out of range, or ``square`` with ``norm="l2"``.

        Example:
            >>> list(WorstCase.reliable(eps=1 / 255, square=True).attacks)
            ['apgd-ce', 'apgd-t', 'square']
        """
        check_flag("square", square)
        if square and norm != "linf":
            raise ValueError(wrong("square", f"False with norm={norm!r}", square))
        options: dict[str, Any] = {"seed": seed, "stop_when_fooled": stop_when_fooled}
        attacks: dict[str, Attack] = {
            "apgd-ce": APGD(eps, steps, norm, "ce", **options),
            "apgd-t": APGD(eps, steps, norm, "dlr-targeted", **options),
        }
        if square:
            attacks["square"] = Square(eps, norm=norm, seed=seed)
        return cls(attacks)

    @classmethod
    def composite(cls, eps: float, *, steps: int = 100, seed: int = 0) -> WorstCase:
        r"""CAA and A3 as the paper runs them, which is PGD with two other step sizes.

        Of the composite attack CAA only the L-infinity component is switched on: PGD that ends at
        the first success. Its published step is 2.5 times 4/255 over ``steps``, 0.1/255 at 100,
        whatever ``eps``. A3 with a single restart has nothing to adapt between restarts; what is
        left is PGD on the margin with a step that falls from ``eps`` to 0 by a cosine, ending at
        the first success. (A3's own schedule ends at ``eps / 1000``.)

        Args:
            eps: Radius of the L-infinity ball.
            steps: Of each; the paper's are 100.
            seed: Of the starts.

        Returns:
            The attacks ``"caa-linf"`` and ``"a3"``.

        Example:
            >>> list(WorstCase.composite(eps=1 / 255).attacks)
            ['caa-linf', 'a3']

        References:
            Hsiung et al. (2023), Towards compositional adversarial robustness,
            https://arxiv.org/abs/2202.04235; Liu et al. (2022), Practical evaluation of
            adversarial robustness via adaptive auto attack, https://arxiv.org/abs/2203.05154
        """
        steps = check_count("steps", steps, at_least=1)
        caa = PGD(eps, steps, 2.5 * 4 / 255 / steps, stop_when_fooled=True, seed=seed)
        a3 = replace(caa, step_size=eps, objective="margin", schedule="cosine")
        return cls({"caa-linf": caa, "a3": a3})

    @classmethod
    def train(cls, eps: float, *, steps: int = 2, step_size: float = 1 / 255) -> WorstCase:
        """The attack of adversarial fine-tuning, to follow robust accuracy during training.

        Args:
            eps: Radius of the L-infinity ball.
            steps: 2 in TeCoA and its successors, 10 in FARE.
            step_size: Length of a step.

        Returns:
            The attack ``"pgd"``, which returns the last iterate.

        Example:
            >>> list(WorstCase.train(eps=1 / 255).attacks)
            ['pgd']
        """
        return cls({"pgd": PGD(eps, steps, step_size, select="last")})

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> WorstCaseResult:
        """Attack a batch.

        Args:
            model: Callable from images to logits ``(B, K)``.
            images: Clean images, shape ``(B, ...)``, floating. Not modified.
            target: True classes, shape ``(B,)``, int64.
            batch_size: Images in one pass; None: as many as there are. `PGD` and `APGD` fill the
                places of samples that are done; other attacks run batch by batch.
            generator: Source of the attacks' seeds, in place of their own.
            progress: Show a bar for each `PGD` and `APGD` (needs tqdm).

        Returns:
            Robust accuracy, what broke which sample, and the images.

        Raises:
            TypeError: An argument, or what an attack returned, has the wrong type.
            ValueError: A shape is wrong, classes are out of range, or an attack's images are not
                finite. Whether the images of a bare callable are in a ball is not checked.

        Warns:
            AttackWarning: Of the attacks, or `Square` broke samples that attacks with gradients, in
                no smaller a ball, did not.
        """
        clean = check_images(images, None)
        target = check_target(target, len(clean), None, clean.device).clone()
        if batch_size is None:
            batch_size = max(len(clean), 1)
        batch_size = check_count("batch_size", batch_size, at_least=1)
        check_generator(generator)
        check_flag("progress", progress)
        options = {"batch_size": batch_size, "generator": generator, "progress": progress}
        judge = attacked_by_margin(model, target)
        tally = _Tally(clean, *judge.verdict(clean, target, batch_size))
        results: dict[str, AttackResult | None] = {}
        before: list[Attack] = []
        for index, (name, attack) in enumerate(_named(self.attacks).items()):
            chosen = tally.right if self.individual else ~tally.wrong
            chosen = chosen.nonzero().flatten()
            results[name] = None
            if len(chosen):
                labels = target[chosen]
                result = _run(attack, model, clean[chosen], labels, options)
                lead, fooled = judge.verdict(result.images, labels, batch_size)
                broken = tally.take_in(index, chosen, result.images, lead, fooled)
                if isinstance(attack, Square) and any(_could_do(other, attack) for other in before):
                    _warn_if_masked(name, int(broken.sum()), len(clean))
                if not isinstance(attack, _OWN):
                    result = replace(result, success=fooled, loss=lead)
                results[name] = result
            tally.close(name)
            before.append(attack)
        return WorstCaseResult(
            names=tuple(results),
            images=tally.images,
            success=tally.wrong,
            margin=tally.lead,
            broken_by=tally.broken_by,
            clean_accuracy=_share(tally.right),
            joint_accuracy=tally.joint_accuracy,
            accuracy=tally.accuracy if self.individual else None,
            results=results,
        )


class _Tally:
    """What is known of each sample; grows with every attack."""

    def __init__(self, clean: Tensor, lead: Tensor, wrong: Tensor) -> None:
        # A model that breaks down on a clean image is not right about it.
        wrong = wrong | lead.isnan()
        self.right, self.wrong, self.images = ~wrong, wrong, clean.clone()
        # The clean image of a sample that is attacked ranks below any attacked one.
        self.lead = torch.where(wrong, lead, -torch.inf)
        self.broken_by = torch.where(wrong, -2, -1)
        self.joint_accuracy: dict[str, float] = {}
        self.accuracy: dict[str, float] = {}
        self._fooled = wrong

    def take_in(
        self, index: int, chosen: Tensor, images: Tensor, lead: Tensor, fooled: Tensor
    ) -> Tensor:
        """Take in the images of an attack on the chosen samples; return what it newly broke."""
        standing = ~self.wrong[chosen]
        broken = fooled & standing
        # Not so where it breaks down on an attacked one: NaN is no success, and ranks last.
        better = broken | (standing & (lead > self.lead[chosen]))
        wide = per_sample(better, images)
        self.images[chosen] = torch.where(wide, images, self.images[chosen])
        self.lead[chosen] = torch.where(better, lead, self.lead[chosen])
        self.broken_by[chosen] = self.broken_by[chosen].masked_fill(broken, index)
        self.wrong = self.wrong.index_put((chosen,), broken | ~standing)
        self._fooled = (~self.right).index_put((chosen,), fooled)
        return broken

    def close(self, name: str) -> None:
        self.joint_accuracy[name] = _share(~self.wrong)
        self.accuracy[name] = _share(~self._fooled)


def _run(
    attack: Attack,
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    target: Tensor,
    options: dict[str, Any],
) -> AttackResult:
    """Run an attack of this package at once, any other batch by batch."""
    if isinstance(attack, GradientAttack):
        return attack(model, images, target, **options)
    if isinstance(attack, (Square, Foreign)):
        # One draw for all batches, so that Square's images do not depend on their size.
        attack = replace(attack, seed=draw_seed(options["generator"], attack.seed))
    size = options["batch_size"]
    with borrowed(model):
        parts = [
            _as_result(attack(model, *part), part[0])
            for part in zip(images.split(size), target.split(size), strict=True)
        ]
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("images", "success", "loss", "steps_to_success")
    }
    counted = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("n_forward", "n_backward", "forward_images", "backward_images")
    }
    return replace(parts[0], **joined, **counted, diagnostics=None)


def _as_result(found: object, images: Tensor) -> AttackResult:
    """Return what an attack returned as a result, after a check of the images."""
    checked = check_found(found, images).to(images.dtype)
    if isinstance(found, AttackResult):
        return replace(found, images=checked)
    unknown = torch.zeros(len(images), device=images.device)
    return AttackResult(checked, unknown.bool(), unknown, unknown.long() - 1, 0, 0)


def _could_do(attack: Attack, square: Square) -> bool:
    """Whether an attack with gradients had the chance to break what Square breaks."""
    return (
        isinstance(attack, GradientAttack)
        and attack.norm == square.norm
        and attack.eps >= square.eps
        and attack.steps > 0
    )


def _warn_if_masked(name: str, broken: int, batch: int) -> None:
    if broken > _MASKING * batch:
        warn(
            f"{name} broke {broken} of {batch} samples that the attacks before it, which follow "
            "gradients, did not: the model probably masks its gradients, and its robust accuracy "
            "is lower still; see the diagnostics of the results"
        )


def _named(attacks: object) -> dict[str, Attack]:
    """Return the attacks by name; those of a sequence are named after their types."""
    expected = "a mapping from names to attacks, or a sequence of attacks"
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif isinstance(attacks, Iterable) and not isinstance(attacks, str):
        named = {}
        for attack in attacks:
            name = str(getattr(attack, "name", None) or type(attack).__name__).lower()
            numbered = (f"{name} {count}" for count in itertools.count(2))
            names = itertools.chain([name], numbered)
            named[next(free for free in names if free not in named)] = attack
    else:
        raise TypeError(wrong("attacks", expected, describe(attacks)))
    for name, attack in named.items():
        if not isinstance(name, str) or not callable(attack):
            raise TypeError(wrong("attacks", expected, describe(attack)))
        if getattr(attack, "targeted", False):
            remedy = "the worst case is over attacks away from the true class"
            raise ValueError(wrong("attacks", "none with targeted=True", name, remedy))
    if not named:
        raise ValueError(wrong("attacks", "at least one attack", "none"))
    return named


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
