"""The search: rows of a batch climb until they are done, and waiting rows take their places.

A row is one attempt at one sample; restarts, and the classes a targeted objective aims at, are
further rows of the same sample. What happens to a row depends on nothing but the row, so a result
does not depend on which rows share a batch. In evaluation (``stop``) rows leave at their first
success, the others close ranks, and rows from the queue fill the batch up again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from calibclip.attacks._model import AttackedModel, Iterate, Labels
from calibclip.attacks.threat import FeasibleSet, from_host, per_sample, stream_seed

# Rows that are done wait until they are an eighth of the batch: closing ranks copies images.
_SLACK = 8

# What is counted for each row, and added up for each sample.
COUNTS = ("zero_gradients", "nonfinite", "steps", "judged")


class Rule(Protocol):
    """How a row gets from one point to the next."""

    @property
    def repeats(self) -> bool:
        """Whether a step depends on nothing but the present point."""
        ...

    def begin(self, feasible: FeasibleSet, points: Tensor) -> Any:
        """Return what the rule remembers of each row: a tensor, a named tuple of them, or None."""
        ...

    def advance(
        self,
        memory: Any,
        feasible: FeasibleSet,
        iterate: Iterate,
        gradient: Tensor,
        ages: np.ndarray,
    ) -> tuple[Tensor, Any]:
        """Return the next points and the memory; ``ages``: the steps each row has taken."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is to be searched, for all samples, and how.

    Attempt ``a`` is restart ``a // n_rivals``. Where ``aims`` is set, the reference has shape
    ``(B, n_rivals)``, and the attempt is at column ``a % n_rivals``.
    """

    feasible: FeasibleSet
    labels: Labels
    steps: int
    select: str
    stop: bool
    restarts: int
    aims: bool
    n_rivals: int
    start: Callable[[FeasibleSet, list[int]], Tensor] | None
    first_start: Tensor | None
    keys: list[int]
    seed: int
    batch_size: int
    fixed_width: bool

    @property
    def attempts(self) -> int:
        return self.restarts * self.n_rivals

    def starts_at_clean(self, attempts: np.ndarray) -> np.ndarray:
        given = attempts < (0 if self.first_start is None else self.n_rivals)
        return ~given & (self.start is None)


@dataclass(frozen=True)
class Findings:
    """What is known of each sample, over all its attempts; updated in place."""

    best: Iterate
    attempt: Tensor  # that ``best`` is from; -1: none has ended
    steps_to_success: Tensor
    success_attempt: Tensor  # the first that succeeded; -1: none
    zero_gradients: Tensor
    nonfinite: Tensor
    steps: Tensor
    judged: Tensor

    @staticmethod
    def nothing(images: Tensor, loss_dtype: torch.dtype) -> Findings:
        batch, device = len(images), images.device
        loss = torch.full((batch,), torch.nan, dtype=loss_dtype, device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        best = Iterate(images.clone(), loss, count.bool(), loss.clone())
        never, counts = count - 1, [count.clone() for _ in range(4)]
        return Findings(best, never, never.clone(), never.clone(), *counts)

    def merge(self, rows: _Rows, attempt: int, samples: Tensor, first: bool) -> None:
        """Take in rows that have ended, all of one attempt. The order of the calls is of no effect.

        A success beats a failure; among equals the higher rank wins or, with ``first``, of two
        successes the earlier attempt's.
        """
        new, old = rows.best, Iterate(*(field[samples] for field in self.best))
        incumbent = self.attempt[samples]
        earlier = attempt < incumbent
        stronger = (new.rank > old.rank) | ((new.rank == old.rank) & earlier)
        if first:
            stronger = torch.where(new.fooled, earlier, stronger)
        better = (incumbent < 0) | (new.fooled & ~old.fooled)
        better |= (new.fooled == old.fooled) & stronger
        for field, mine, theirs in zip(self.best, old, new, strict=True):
            field[samples] = torch.where(per_sample(better, theirs), theirs, mine)
        self.attempt[samples] = incumbent.masked_fill(better, attempt)

        winner = self.success_attempt[samples]
        faster = (rows.first >= 0) & ((winner < 0) | (attempt < winner))
        self.success_attempt[samples] = winner.masked_fill(faster, attempt)
        known = self.steps_to_success[samples]
        self.steps_to_success[samples] = torch.where(faster, rows.first, known)
        for name in COUNTS:
            getattr(self, name)[samples] += getattr(rows, name)


@dataclass
class _Rows:
    """The rows in the batch. The first two fields are on the host: which they are, how far."""

    ids: np.ndarray  # attempt * B + sample; -1 for a row that only keeps the width of the batch
    ages: np.ndarray  # steps taken
    feasible: FeasibleSet
    labels: Labels
    points: Tensor
    previous: Tensor | None  # points a step ago, if that is looked at
    kept: Iterate | None  # None: nothing has been judged
    first: Tensor  # step of the first success, or -1
    repeating: Tensor
    zero_gradients: Tensor
    nonfinite: Tensor
    steps: Tensor
    judged: Tensor
    memory: Any

    @property
    def best(self) -> Iterate:
        if self.kept is None:
            raise RuntimeError("no row has been judged yet")
        return self.kept

    def pick(self, index: np.ndarray) -> _Rows:
        rows = from_host(index, self.points)
        return self._map(lambda tensor: tensor[rows], self.ids[index], self.ages[index])

    def join(self, other: _Rows) -> _Rows:
        ids = np.concatenate([self.ids, other.ids])
        ages = np.concatenate([self.ages, other.ages])
        return self._map(lambda *tensors: torch.cat(tensors), ids, ages, other)

    def _map(
        self, function: Callable[..., Tensor], ids: np.ndarray, ages: np.ndarray, *others: _Rows
    ) -> _Rows:
        fields = {
            name: _each(function, value, *(getattr(rows, name) for rows in others))
            for name, value in vars(self).items()
            if name not in ("ids", "ages")
        }
        return _Rows(ids=ids, ages=ages, **fields)


def _each(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Apply a function to corresponding tensors of nested named tuples."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(first, *others)
    if isinstance(first, FeasibleSet):
        return first.with_rows(function, *others)
    return type(first)(*(_each(function, *parts) for parts in zip(first, *others, strict=True)))


def search(
    attacked: AttackedModel, plan: Plan, rule: Rule, ended: Callable[[int], object]
) -> Findings:
    """Run every row of the plan to its end; ``ended`` is told how many have just ended."""
    return _Search(attacked, plan, rule, ended).run()


class _Search:
    def __init__(
        self, attacked: AttackedModel, plan: Plan, rule: Rule, ended: Callable[[int], object]
    ) -> None:
        self.attacked, self.plan, self.rule, self.ended = attacked, plan, rule, ended
        self.batch = len(plan.feasible.images)
        self.queue = deque(range(self.batch * plan.attempts))
        # The first attempt at each sample that has succeeded: later ones need not run.
        self.winner = np.full(self.batch, plan.attempts)
        self.watch_repeats = plan.stop and rule.repeats and plan.select != "last"
        self.glance = _Glance()

    def run(self) -> Findings:
        rows = self._begin(self._next(self.plan.batch_size), None)
        findings = None
        while True:
            self._step(rows)
            done = self._done(rows)
            if not self._close_ranks(done, rows):
                continue
            if findings is None:
                # Only now is it known in which dtype the losses are.
                loss_dtype = rows.best.loss.dtype
                findings = Findings.nothing(self.plan.feasible.images, loss_dtype)
            self._harvest(findings, rows, done)
            refilled = self._refill(rows, done)
            if refilled is None:
                return findings
            rows = refilled

    def _next(self, count: int) -> np.ndarray:
        """Take the next rows from the queue that are still worth running."""
        ids = []
        while self.queue and len(ids) < count:
            row = self.queue.popleft()
            if row // self.batch <= self.winner[row % self.batch]:
                ids.append(row)
            else:
                self.ended(1)
        return np.array(ids, dtype=np.int64)

    def _overtaken(self, ids: np.ndarray) -> np.ndarray:
        return ids // self.batch > self.winner[ids % self.batch]

    def _begin(self, ids: np.ndarray, like: Iterate | None) -> _Rows:
        plan, samples, attempts = self.plan, ids % self.batch, ids // self.batch
        clean = plan.feasible.images
        index = from_host(samples, clean)
        feasible = plan.feasible.with_rows(lambda tensor: tensor[index])
        points = feasible.images
        if plan.start is not None:
            seeds = [
                stream_seed(plan.seed, plan.keys[sample], attempt)
                for sample, attempt in zip(samples.tolist(), attempts.tolist(), strict=True)
            ]
            points = plan.start(feasible, seeds)
        if plan.first_start is not None:
            given = from_host(attempts < plan.n_rivals, clean)
            points = torch.where(per_sample(given, points), plan.first_start[index], points)
        target, reference = plan.labels
        if target is not None:
            target = target[index]
        if reference is not None:
            reference = reference[index]
            if plan.aims:
                rivals = from_host(attempts % plan.n_rivals, clean)
                reference = reference.gather(1, rivals.unsqueeze(1)).squeeze(1)
        count = torch.zeros(len(ids), dtype=torch.int64, device=clean.device)
        kept = None
        if like is not None:
            loss = torch.full_like(count, torch.nan, dtype=like.loss.dtype)
            kept = Iterate(points, loss, count.bool(), torch.full_like(loss, -torch.inf))
        return _Rows(
            ids=ids,
            ages=np.zeros(len(ids), dtype=np.int64),
            feasible=feasible,
            labels=Labels(target, reference),
            points=points,
            previous=torch.full_like(points, torch.nan) if self.watch_repeats else None,
            kept=kept,
            first=count - 1,
            repeating=count.bool(),
            **{name: count.clone() for name in COUNTS},
            memory=self.rule.begin(feasible, points),
        )

    def _step(self, rows: _Rows) -> None:
        """Judge the points of all rows, and move on those that have steps to take."""
        padding = rows.ids < 0
        at_end = bool((padding | (rows.ages >= self.plan.steps)).all())
        with torch.set_grad_enabled(not at_end):
            iterate = self.attacked.judge(rows.points, rows.labels)
        self._record(rows, iterate)
        if self.plan.stop and self.glance.is_free(rows.points):
            at_end |= bool((padding | rows.best.fooled.numpy()).all())
        if not at_end:
            self.attacked.observe(rows.labels)
            gradient = self.attacked.gradient()
            self._count_blind_steps(rows, iterate, gradient)
            moved, rows.memory = self.rule.advance(
                rows.memory, rows.feasible, iterate, gradient, rows.ages
            )
            if rows.previous is not None:
                # Back at the point before: it will go to and fro between two that are both judged.
                rows.repeating |= (moved == rows.previous).flatten(1).all(1)
                rows.previous = rows.points
            rows.points = moved
        rows.ages = rows.ages + 1

    def _record(self, rows: _Rows, iterate: Iterate) -> None:
        """Keep the iterate that is selected so far, and the step of the first success."""
        plan, ages = self.plan, rows.ages
        # The clean image ranks last, also when a climb from it comes back to it: a report on
        # attacked images must not contain it.
        from_clean = plan.starts_at_clean(rows.ids // self.batch)
        if from_clean.any():
            back = (iterate.images == rows.feasible.images).flatten(1).all(1)
            back &= from_host(from_clean, back)
            iterate = iterate._replace(rank=iterate.rank.masked_fill(back, -torch.inf))
        active = self._active(rows)
        rows.judged = rows.judged + active
        hit = iterate.fooled & (rows.first < 0) & active
        rows.first = torch.where(hit, _numbers(ages, hit), rows.first)

        kept = rows.kept
        if kept is None or (plan.select == "last" and not plan.stop):
            rows.kept = iterate
            return
        if plan.select == "last":
            better = torch.ones_like(hit)
        else:
            stronger = (iterate.fooled == kept.fooled) & (iterate.rank > kept.rank)
            if plan.select == "first_success":
                stronger &= ~kept.fooled
            better = (iterate.fooled & ~kept.fooled) | stronger
        better &= active
        if (ages == 0).any():
            better |= from_host(ages == 0, better)
        rows.kept = Iterate(
            *(
                torch.where(per_sample(better, new), new, old)
                for new, old in zip(iterate, kept, strict=True)
            )
        )

    def _count_blind_steps(self, rows: _Rows, iterate: Iterate, gradient: Tensor) -> None:
        """Count the steps of each row, and those without a direction."""
        self.attacked.count_zeros(gradient.flatten(1))
        # Where an image may not change, a gradient is no direction.
        flat = rows.feasible.movable(gradient).flatten(1)
        active = self._active(rows)
        if (rows.ages == self.plan.steps).any():
            active &= from_host(rows.ages < self.plan.steps, active)
        broken = ~flat.isfinite().all(1) | ~iterate.loss.isfinite()
        rows.steps = rows.steps + active
        rows.nonfinite = rows.nonfinite + (active & broken)
        rows.zero_gradients = rows.zero_gradients + (active & (rows.first < 0) & ~flat.any(1))

    def _active(self, rows: _Rows) -> Tensor:
        """Which rows are not just waiting to leave the batch."""
        active = torch.ones_like(rows.repeating)
        if (rows.ages > self.plan.steps).any():
            active &= from_host(rows.ages <= self.plan.steps, active)
        if self.plan.stop and rows.kept is not None:
            active &= ~(rows.kept.fooled | rows.repeating)
        return active

    def _done(self, rows: _Rows) -> np.ndarray:
        """Which rows have come to their end, as far as the host knows."""
        padding = rows.ids < 0
        done = padding | (rows.ages > self.plan.steps) | (~padding & self._overtaken(rows.ids))
        if self.plan.stop:
            seen = self.glance(rows.best.fooled | rows.repeating)
            if seen is not None:
                done |= seen
        return done

    def _close_ranks(self, done: np.ndarray, rows: _Rows) -> bool:
        if done.all():
            return True
        if self.plan.fixed_width and not self.queue:
            return 2 * int((~done).sum()) <= len(rows.ids)
        waiting = done & (rows.ids >= 0)
        return _SLACK * int(waiting.sum()) >= len(rows.ids)

    def _harvest(self, findings: Findings, rows: _Rows, done: np.ndarray) -> None:
        """Take down what the rows that are done have found."""
        ended = np.flatnonzero(done & (rows.ids >= 0))
        first = self.plan.stop or self.plan.select == "first_success"
        for attempt in np.unique(rows.ids[ended] // self.batch).tolist():
            index = ended[rows.ids[ended] // self.batch == attempt]
            samples = rows.ids[index] % self.batch
            part = rows.pick(index) if len(index) < len(rows.ids) else rows
            findings.merge(part, attempt, from_host(samples, rows.points), first)
            if self.plan.stop and self.plan.attempts > 1:
                won = samples[part.best.fooled.cpu().numpy()]
                self.winner[won] = np.minimum(self.winner[won], attempt)
        self.ended(len(ended))

    def _refill(self, rows: _Rows, done: np.ndarray) -> _Rows | None:
        """Return the rows of the next batch; None if there are none."""
        self.glance.forget()
        staying = np.flatnonzero(~done)
        ids = self._next(self.plan.batch_size - len(staying))
        live = len(staying) + len(ids)
        if live == 0:
            return None
        if self.plan.fixed_width:
            width = len(rows.ids)
            while width >= 2 * live:
                width //= 2
            padding = np.flatnonzero(done)[: max(width - live, 0)]
            rows.ids = np.where(done, -1, rows.ids)
            staying = np.concatenate([staying, padding])
        if len(staying) == 0:
            return self._begin(ids, None)
        rows = rows.pick(staying)
        return rows.join(self._begin(ids, rows.kept)) if len(ids) else rows


class _Glance:
    """Reads flags from a CUDA device one call late, so that the host never waits for the device."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    @staticmethod
    def is_free(tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def __call__(self, flags: Tensor) -> np.ndarray | None:
        if flags.device.type != "cuda":
            return flags.cpu().numpy()
        arrived, self._pending = (
            self._pending,
            (
                torch.empty(flags.shape, dtype=torch.bool, pin_memory=True),
                torch.cuda.Event(),
            ),
        )
        copied, event = self._pending
        copied.copy_(flags, non_blocking=True)
        event.record(torch.cuda.current_stream(flags.device))
        if arrived is None:
            return None
        arrived[1].synchronize()
        return arrived[0].numpy()

    def forget(self) -> None:
        """The rows have changed places."""
        self._pending = None


def _numbers(ages: np.ndarray, like: Tensor) -> Tensor:
    """Ages on the device; where all rows are equally old a scalar, which needs no transfer."""
    if (ages == ages[0]).all():
        return torch.full((), int(ages[0]), dtype=torch.int64, device=like.device)
    return from_host(ages, like)
