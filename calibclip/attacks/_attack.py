"""What the gradient attacks have in common: options, the arguments of a call, its course."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from calibclip._checks import (
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_same_shape,
    describe,
    wrong,
)
from calibclip._progress import progress_bar
from calibclip.attacks._arguments import (
    check_bounds,
    check_eps,
    check_images,
    check_mask,
    check_radii,
    check_reference,
    draw_seed,
)
from calibclip.attacks._model import (
    FULL,
    PRECISIONS,
    AttackedModel,
    Labels,
    check_labels,
    undisturbed,
)
from calibclip.attacks._rows import COUNTS, Findings, Plan, Rule, search
from calibclip.attacks.objectives import Objective, at_least_float32, resolve_objective
from calibclip.attacks.result import (
    AttackResult,
    Diagnostics,
    nothing_to_attack,
    warn_if_doubtful,
)
from calibclip.attacks.threat import NORMS, FeasibleSet, sample_keys

SELECTIONS = ("worst", "last", "first_success")


@dataclass(frozen=True)
class Call:
    """The checked arguments of one call."""

    model: Callable[[Tensor], Tensor]
    feasible: FeasibleSet
    labels: Labels
    start: Tensor | None
    objective: Objective
    seed: int

    @property
    def images(self) -> Tensor:
        return self.feasible.images

    def rows(self, index: Tensor) -> Call:
        """Return the call for some of its images."""
        return replace(
            self,
            feasible=self.feasible.with_rows(lambda tensor: tensor[index]),
            labels=Labels(*(None if field is None else field[index] for field in self.labels)),
            start=None if self.start is None else self.start[index],
        )


class GradientAttack(ABC):
    """Base of the gradient attacks: frozen dataclasses with these options as fields."""

    eps: float
    steps: int
    norm: str
    objective: str | Objective | Callable[..., Tensor]
    restarts: int
    bounds: tuple[float, float]
    select: str
    seed: int
    stop_when_fooled: bool
    n_rivals: int
    precision: str | None
    compile: bool
    # Options that not every attack has.
    random_start: bool = True
    targeted: bool = False

    @abstractmethod
    def _rule(self) -> Rule:
        """Return how a point moves."""

    def _random_points(self, feasible: FeasibleSet, seeds: list[int]) -> Tensor:
        return feasible.random_points(seeds)

    def _resolved(self) -> Objective:
        return resolve_objective(self.objective)

    def _check_options(self) -> None:
        check_choice("norm", self.norm, NORMS)
        bounds = check_bounds(self.bounds)
        # NumPy scalars become Python's: they would take over the arithmetic with tensors.
        checked = {
            "eps": check_eps(self.eps, self.norm, bounds),
            "steps": check_count("steps", self.steps, at_least=0),
            "restarts": check_count("restarts", self.restarts, at_least=1),
            "bounds": bounds,
            "seed": check_count("seed", self.seed, at_least=0),
            "n_rivals": check_count("n_rivals", self.n_rivals, at_least=1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_choice("select", self.select, SELECTIONS)
        for flag in ("random_start", "stop_when_fooled", "targeted", "compile"):
            check_flag(flag, getattr(self, flag))
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        objective = resolve_objective(self.objective)
        if self.targeted and not objective.targeted:
            expected = f"False with objective {self.objective!r}, which moves towards no class"
            raise ValueError(wrong("targeted", expected, True, "use 'ce', 'margin' or 'dlr'"))

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor | None = None,
        *,
        reference: Tensor | None = None,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        start: Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: Callable from images to logits ``(B, K)``.
            images: Clean images, shape ``(B, ...)``, floating, inside ``bounds``. Not modified.
            target: Shape ``(B,)``, int64: true classes, or with ``targeted`` the wanted ones. For
                the multi-label objectives 0 or 1 per class, shape ``(B, K)``. None for
                "embedding-l2", and for a callable that does not look at it.
            reference: What the objectives "kl", "dirichlet-kl", "embedding-l2" and
                "underconfidence" compare with, one row per image, such as a frozen model's outputs;
                None: the attacked model's own on the clean images. A callable objective gets it as
                a third argument, and other objectives take none.
            eps: A radius for each image, shape ``(B,)``, in place of the attack's own.
            mask: Where an image may change, bool, broadcast to the shape of the images.
            start: Where the first restart begins, shape of the images; projected if need be.
            batch_size: Images in one pass; None: as many as there are. The others wait, and take
                the places of those that are done. With ``restarts * B`` restarts run side by side.
            generator: Source of this call's seed; it advances, so that calls differ.
            progress: Show a bar (needs tqdm).

        Returns:
            The chosen images with their success and loss, the number of passes, and diagnostics.

        Raises:
            TypeError: An argument, or what the model returned, has the wrong type.
            ValueError: Images outside ``bounds``, classes out of range (on an accelerator that is
                PyTorch's own error), a wrong shape, or logits that do not depend on the images.

        Warns:
            AttackWarning: The model seems to return probabilities, a target is predicted from the
                start, or the attack had no gradient to follow for samples that it did not break.
        """
        with undisturbed(model):
            call = self._check_call(model, images, target, reference, eps, mask, start, generator)
            if batch_size is None:
                batch_size = max(len(call.images), 1)
            batch_size = check_count("batch_size", batch_size, at_least=1)
            if len(call.images) == 0:
                return nothing_to_attack(call.images)
            run = self._run(call, batch_size, progress)
            result = run.result() if self.precision is None else self._confirm(run, batch_size)
        warn_if_doubtful(
            result,
            targeted=self.targeted,
            looks_like_probabilities=run.attacked.saw_probabilities(),
        )
        return result

    def _check_call(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor | None,
        reference: Tensor | None = None,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Call:
        """Check the arguments of a call, as far as that can be done before the model has run."""
        if not callable(model):
            raise TypeError(wrong("model", "a callable from images to logits", describe(model)))
        clean = check_images(images, self.bounds)
        objective = self._resolved()
        target = check_labels(target, objective, len(clean), clean.device)
        # A tensor made in inference mode could not be saved for the backward pass.
        target = None if target is None else target.detach().clone()
        radius = self.eps if eps is None else check_radii(eps, clean, self.norm, self.bounds)
        feasible = FeasibleSet(clean, radius, self.norm, self.bounds, check_mask(mask, clean))
        if reference is not None:
            reference = check_reference(reference, clean)
            if callable(self.objective) and objective.target == "any":
                objective = replace(objective, reference="given")
            elif objective.reference not in ("clean", "given"):
                expected = f"None with objective {self.objective!r}, which compares with nothing"
                remedy = "remove it, or use 'kl', 'dirichlet-kl' or 'embedding-l2'"
                raise ValueError(wrong("reference", expected, describe(reference), remedy))
        if start is not None:
            start = check_floating("start", start, shape="of the images")
            check_same_shape("start", start, "images", clean)
            if not bool(start.isfinite().all()):
                raise ValueError(wrong("start", "finite values", "NaN or infinity among them"))
            start = feasible.project(start.detach())
        seed = draw_seed(generator, self.seed)
        return Call(model, feasible, Labels(target, reference), start, objective, seed)

    def _attacked(self, call: Call) -> AttackedModel:
        batch, device, target = len(call.images), call.images.device, call.labels.target
        return AttackedModel(
            call.model,
            call.objective,
            partial(check_labels, target, call.objective, batch, device),
            targeted=self.targeted,
            precision=self.precision,
            compiled=self.compile,
        )

    def _run(self, call: Call, batch_size: int, progress: bool) -> _Run:
        asked, attacked = call, self._attacked(call)
        call = self._with_reference(attacked, call, batch_size)
        plan = self._plan(call, batch_size)
        rows = len(call.images) * plan.attempts
        with progress_bar(progress, rows, type(self).__name__, "image") as ended:
            return _Run(asked, call, attacked, search(attacked, plan, self._rule(), ended))

    def _with_reference(self, attacked: AttackedModel, call: Call, batch_size: int) -> Call:
        """Add what the objective compares with, where the model itself has to tell."""
        kind, (target, reference) = call.objective.reference, call.labels
        if kind == "rival":
            logits = self._clean_outputs(attacked, call, batch_size)
            # Even with one class the row must have a column; its class is its own rival then.
            count = min(self.n_rivals, max(logits.shape[1] - 1, 1))
            own = torch.zeros_like(logits[:, :1], dtype=torch.int64) if target is None else target
            others = logits.scatter(1, own.view(-1, 1), -torch.inf)
            reference = others.topk(count, dim=1).indices
        elif kind == "clean" and reference is None:
            if not self.random_start and (call.start is None or self.restarts > 1):
                # At the clean image the distance is smallest, and has no gradient.
                expected = (
                    f"True with objective {self.objective!r}, unless reference is set, or start "
                    "with restarts=1"
                )
                raise ValueError(wrong("random_start", expected, False))
            reference = self._clean_outputs(attacked, call, batch_size)
        return replace(call, labels=Labels(target, reference))

    def _clean_outputs(self, attacked: AttackedModel, call: Call, batch_size: int) -> Tensor:
        with torch.no_grad():
            parts = [attacked.outputs(part) for part in call.images.split(batch_size)]
        return at_least_float32(torch.cat(parts))

    def _plan(self, call: Call, batch_size: int) -> Plan:
        aims = call.objective.reference == "rival"
        reference = call.labels.reference
        return Plan(
            feasible=call.feasible,
            labels=call.labels,
            steps=self.steps,
            select=self.select,
            stop=self.stop_when_fooled,
            restarts=self.restarts,
            aims=aims,
            n_rivals=reference.shape[1] if aims and reference is not None else 1,
            start=self._random_points if self.random_start else None,
            first_start=call.start,
            keys=sample_keys(call.images) if self.random_start else [0] * len(call.images),
            seed=call.seed,
            batch_size=batch_size,
            fixed_width=self.compile,
        )

    def _confirm(self, run: _Run, batch_size: int) -> AttackResult:
        """Judge the images again in full precision; attack anew where a success was not one."""
        result, labels = run.result(), run.call.labels
        exact = copy(self)
        object.__setattr__(exact, "precision", FULL)
        attacked, judged = exact._attacked(run.asked), []
        if run.call.objective.reference == "rival" and labels.reference is not None:
            aim = (run.findings.attempt % labels.reference.shape[1]).unsqueeze(1)
            labels = Labels(labels.target, labels.reference.gather(1, aim).squeeze(1))
        else:
            labels = exact._with_reference(attacked, run.asked, batch_size).labels
        with torch.no_grad():
            for index in torch.arange(len(result.images)).split(batch_size):
                part = slice(int(index[0]), int(index[-1]) + 1)
                rows = Labels(*(None if field is None else field[part] for field in labels))
                judged.append(attacked.judge(result.images[part], rows))
        _, loss, fooled, _ = (torch.cat(fields) for fields in zip(*judged, strict=True))
        # Of a success that only full precision sees, the last step is known.
        steps, refuted = result.steps_to_success, result.success & ~fooled
        steps = steps.masked_fill(fooled & (steps < 0), self.steps)
        refuted = refuted.nonzero().flatten()
        passes = [attacked]
        result = replace(result, success=fooled, loss=loss, steps_to_success=steps)
        if len(refuted):
            repeated = exact._run(run.asked.rows(refuted), batch_size, False)
            passes.append(repeated.attacked)
            redone = repeated.result()
            for name in ("images", "success", "loss", "steps_to_success"):
                getattr(result, name)[refuted] = getattr(redone, name)
            for name in COUNTS:
                getattr(run.findings, name)[refuted] += getattr(repeated.findings, name)
        return replace(
            result,
            **{
                count: getattr(result, count) + sum(getattr(model, count) for model in passes)
                for count in ("n_forward", "n_backward", "forward_images", "backward_images")
            },
        )


@dataclass(frozen=True)
class _Run:
    """One search that has ended, and what it ran on."""

    asked: Call
    call: Call  # with what the objective compares with
    attacked: AttackedModel
    findings: Findings

    def result(self) -> AttackResult:
        attacked, findings = self.attacked, self.findings
        return AttackResult(
            images=findings.best.images,
            success=findings.best.fooled,
            loss=findings.best.loss,
            steps_to_success=findings.steps_to_success,
            n_forward=attacked.n_forward,
            n_backward=attacked.n_backward,
            forward_images=attacked.forward_images,
            backward_images=attacked.backward_images,
            diagnostics=Diagnostics(
                judged=findings.judged,
                steps=findings.steps,
                zero_gradients=findings.zero_gradients,
                nonfinite=findings.nonfinite,
                saturated=attacked.saturated_share(),
                zero_entries=attacked.zero_share(),
            ),
        )
