"""What all metrics have in common: a state that grows, merges and is shared between processes.

A state consists of sums, which add up over batches and processes, and of columns, which keep one
number a sample for the metrics that must rank them. `compute` turns a state into a value. A
function of ``calibclip.metrics`` is its class, used once: the two cannot drift apart.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calibclip._checks import check_choice, describe, warn, wrong
from calibclip.metrics._predictions import (
    NAN_POLICIES,
    NO_CLASS,
    NO_DISTRIBUTION,
    REMEDY,
    ArrayLike,
    Faults,
    Predictions,
    read_predictions,
)

Value = TypeVar("Value")


class MetricWarning(UserWarning):
    """A value was computed, but not of all that was given."""


class Metric(ABC, Generic[Value]):
    """Base of the streaming metrics.

    ``update`` takes a batch, ``compute`` returns the value so far and changes nothing. Without
    samples the value is NaN. On an accelerator ``update`` does not wait for the device: what is
    wrong with the values of a batch is counted, and ``compute`` raises.

    Attributes:
        options: The options of the constructor.
    """

    options: dict[str, Any]

    # What messages call the values of an update, and what they say of faults found late.
    _SCORES = "probs, logits"
    _INFINITY_IS_LEGAL = False
    _IMPROPER = NO_DISTRIBUTION
    _MISLABELLED = NO_CLASS

    def __init__(self, **options: Any) -> None:
        check_choice("nan", options["nan"], NAN_POLICIES)
        self.options = options
        self._sums: dict[str, Tensor] = {}
        self._columns: dict[str, Column] = {}
        self.reset()

    @abstractmethod
    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        """Return the sums and columns of no sample: on the CPU, of their final shape and dtype."""

    @abstractmethod
    def _value(self) -> Value:
        """Return the value of the present state; NaN of an empty one."""

    def compute(self, sync: bool | dist.ProcessGroup | None = None) -> Value:
        """Return the value of all samples so far.

        Args:
            sync: Take in the states of all processes. None: if ``torch.distributed`` is
                initialised. All processes must call then, also those without a sample. A process
                group: of its members.

        Returns:
            The value. The state stays that of this process.

        Raises:
            ValueError: A batch on an accelerator had values that are no predictions, or ones that
                are not finite with ``nan="raise"``.

        Warns:
            MetricWarning: Rows were left out (``nan="omit"``).
        """
        return self._synced(sync)._checked_value()

    def _checked_value(self) -> Value:
        faults = Faults(*(self._sums[f"n_{name}"] for name in Faults._fields))
        faults.check(self._IMPROPER, self._MISLABELLED)
        count = int(faults.nonfinite)
        if count and self.options["nan"] == "raise":
            expected = "values that are no NaN" if self._INFINITY_IS_LEGAL else "finite values"
            raise ValueError(wrong(self._SCORES, expected, f"{self._faulty(count)}", REMEDY))
        if count and self.options["nan"] == "propagate":
            return type(self)(**self.options)._value()
        if count:
            warn(f"{type(self).__name__}: {self._faulty(count)} were left out", MetricWarning)
        return self._value()

    def _faulty(self, count: int) -> str:
        return f"{count} rows with NaN" + ("" if self._INFINITY_IS_LEGAL else " or infinity")

    @property
    def n_faulty(self) -> int:
        """Rows so far that were not finite, or of a ranking NaN."""
        return int(self._sums["n_nonfinite"])

    def reset(self) -> Metric[Value]:
        """Forget all samples.

        Returns:
            The metric itself.
        """
        self._sums, self._columns = self._begin()
        for name, zero in zip(Faults._fields, Faults.none(), strict=True):
            self._sums[f"n_{name}"] = zero
        return self

    def merge(self, *others: Metric[Value]) -> Metric[Value]:
        """Take in the samples of others, which stay as they are.

        Args:
            others: Metrics of the same type with the same options.

        Returns:
            The metric itself.

        Raises:
            TypeError: Another type.
            ValueError: Other options, or states that do not fit.
        """
        self._check_mergeable(others)
        for other in others:
            self._accept(other)
        for other in others:
            self._add(**other._sums)
            for name, column in other._columns.items():
                self._columns[name].append(column.values)
        return self

    def _check_mergeable(self, others: Iterable[Metric[Value]]) -> None:
        for other in others:
            if type(other) is not type(self):
                raise TypeError(wrong("others", f"a {type(self).__name__}", describe(other)))
            if not _same_options(other.options, self.options):
                raise ValueError(wrong("others", f"options {self.options}", other.options))

    def _accept(self, other: Metric[Value]) -> None:
        """Make ready for the sums of another; raises if they do not fit."""
        for name, total in self._sums.items():
            if total.shape != other._sums[name].shape:
                got = f"{name} of shape {tuple(other._sums[name].shape)}"
                expected = f"{name} of shape {tuple(total.shape)}"
                raise ValueError(wrong("others", expected, got))

    def state_dict(self) -> dict[str, Any]:
        """Return the options and copies of all tensors: what `load_state_dict` takes.

        Returns:
            A dict of plain values and tensors that ``torch.save`` and ``torch.load`` take.
        """
        return {
            "metric": type(self).__name__,
            "options": dict(self.options),
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "columns": {name: column.values.clone() for name, column in self._columns.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Metric[Value]:
        """Replace the state by that of a `state_dict`.

        Args:
            state: From a metric of the same type with the same options.

        Returns:
            The metric itself.

        Raises:
            ValueError: The state is of another metric, or of other options.
        """
        self._check_state(state)
        self.reset()
        self._sums = {name: state["sums"][name].clone() for name in self._sums}
        for name, column in self._columns.items():
            column.append(state["columns"][name])
        return self

    def _check_state(self, state: Mapping[str, Any]) -> None:
        name, options = state.get("metric"), state.get("options")
        if name != type(self).__name__:
            raise ValueError(wrong("state", f"metric {type(self).__name__}", name))
        if not isinstance(options, Mapping) or not _same_options(options, self.options):
            raise ValueError(wrong("state", f"options {self.options}", options))
        sums, columns = state.get("sums", {}), state.get("columns", {})
        if set(sums) != set(self._sums) or set(columns) != set(self._columns):
            expected = f"{sorted([*self._sums, *self._columns])}"
            raise ValueError(wrong("state", expected, sorted([*sums, *columns])))
        for name, empty in self._begin()[0].items():
            # A first size of 0 is one that the data decide.
            if len(empty.shape) != len(sums[name].shape) or (
                empty.numel() and empty.shape != sums[name].shape
            ):
                expected = f"{name} of shape {tuple(empty.shape)}"
                raise ValueError(wrong("state", expected, tuple(sums[name].shape)))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"

    def count_faults(self, faults: Faults) -> None:
        """Count rows that are no predictions; `compute` decides what follows."""
        self._add(**{f"n_{name}": count for name, count in faults._asdict().items()})

    def _add(self, **sums: Tensor) -> None:
        """Add to the sums, which move to the device of what is added."""
        for name, term in sums.items():
            total = self._sums[name]
            # Towards an accelerator only: on the way back the numbers would come too late.
            moved = total.to(term.device, non_blocking=term.device.type != "cpu")
            self._sums[name] = moved + term.to(total.dtype)

    def _append(self, **columns: Tensor) -> None:
        """Append one number a sample to each column."""
        for name, values in columns.items():
            self._columns[name].append(values)

    def _synced(self, sync: bool | dist.ProcessGroup | None) -> Metric[Value]:
        return synced([self], sync)[0]


class PredictionMetric(Metric[Value]):
    """Base of the metrics of class predictions."""

    def update(
        self,
        probs: ArrayLike | None = None,
        logits: ArrayLike | None = None,
        target: ArrayLike | None = None,
    ) -> PredictionMetric[Value]:
        """Take in a batch.

        Args:
            probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
            logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
            target: True classes, shape ``(N,)``, any integer dtype. Required.

        Returns:
            The metric itself.

        Raises:
            TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing,
                or a dtype is wrong.
            ValueError: A shape or a class index is wrong, or a row of scores is invalid.
        """
        with torch.no_grad():
            predictions = read_predictions(probs, logits, target, self.options["nan"])
            self.prepare(predictions)
            self.take(predictions)
        return self

    def prepare(self, predictions: Predictions) -> None:
        """Refuse predictions that do not go with those before."""

    def take(self, predictions: Predictions) -> None:
        """Take in predictions that have been read; several metrics may share them."""
        self.count_faults(predictions.faults)
        self._take(predictions)

    @abstractmethod
    def _take(self, predictions: Predictions) -> None: ...


class PerClass(Metric[Value]):
    """Base of metrics with sums for each class, which may learn their number from the data."""

    # Names of those sums, whose first dimension is the number of classes, 0 while it is not known.
    _PER_CLASS: tuple[str, ...] = ()

    def merge(self, *others: Metric[Value]) -> Metric[Value]:
        """Take in the samples of others, see `Metric.merge`; those without a sample are passed."""
        return super().merge(*(other for other in others if self._knows_something(other)))

    def _knows_something(self, other: Metric[Value]) -> bool:
        same = type(other) is type(self) and _same_options(other.options, self.options)
        return not same or bool(len(other._sums[self._PER_CLASS[0]]))

    def _accept(self, other: Metric[Value]) -> None:
        self._grow(len(other._sums[self._PER_CLASS[0]]), "others")

    def _grow(self, n_classes: int, argument: str) -> None:
        """Allocate the sums once the number of classes is known."""
        known = len(self._sums[self._PER_CLASS[0]])
        if known == 0:
            for name in self._PER_CLASS:
                total = self._sums[name]
                self._sums[name] = total.new_zeros(n_classes, *total.shape[1:])
        elif known != n_classes:
            raise ValueError(wrong(argument, f"{known} classes, as before", n_classes))


class Column:
    """Numbers, one a sample, in one tensor that grows by doubling."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._data, self._length = torch.empty(0, dtype=dtype), 0

    @property
    def values(self) -> Tensor:
        return self._data[: self._length]

    def append(self, values: Tensor) -> None:
        end = self._length + len(values)
        if end > len(self._data) or values.device != self._data.device:
            # A tensor made in inference mode could not grow outside of it.
            with torch.inference_mode(False):
                data = self._data.new_empty(max(2 * self._length, end), device=values.device)
            data[: self._length] = self.values
            self._data = data
        self._data[self._length : end] = values
        self._length = end


def _same_options(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Compare options; an option of NaN, which equals nothing, is the same as another."""
    return some.keys() == others.keys() and all(
        value == others[name] or (value != value and others[name] != others[name])
        for name, value in some.items()
    )


def synced(metrics: list[Any], sync: bool | dist.ProcessGroup | None = None) -> list[Any]:
    """Return metrics with the states of all processes, in one all-reduce of all sums.

    The number of samples in each column of each process travels with the sums, then the columns are
    gathered one by one.
    """
    if sync is None:
        sync = dist.is_available() and dist.is_initialized()
    if sync is False:
        return metrics
    group = None if sync is True else sync
    device = torch.device("cpu")
    if dist.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for metric in metrics:
        if size > 1 and isinstance(metric, PerClass) and metric.options["n_classes"] is None:
            # A process without a sample has a state of another size: the exchange would hang.
            got = f"{type(metric).__name__} on {size} processes"
            raise ValueError(wrong("n_classes", "the number of classes", f"None in {got}"))
    metrics = [copy.copy(metric) for metric in metrics]
    columns = [column for metric in metrics for column in metric._columns.values()]
    lengths = torch.zeros(len(columns), size, dtype=torch.float64)
    for column, row in zip(columns, lengths, strict=True):
        row[rank] = len(column.values)
    # Counts are exact in float64 up to 2^53.
    sums = [total for metric in metrics for total in metric._sums.values()]
    flat = [total.double().flatten().to(device) for total in (*sums, lengths)]
    vector = torch.cat(flat)
    dist.all_reduce(vector, group=group)
    *reduced, lengths = (
        part.view(total.shape).to(total.dtype)
        for part, total in zip(
            vector.split([len(part) for part in flat]), (*sums, lengths), strict=True
        )
    )
    gathered = iter(
        _gather(column, row.long().tolist(), device, group)
        for column, row in zip(columns, lengths.cpu(), strict=True)
    )
    reduced = iter(reduced)
    for metric in metrics:
        metric._sums = {name: next(reduced) for name in metric._sums}
        metric._columns = {name: next(gathered) for name in metric._columns}
    return metrics


def _gather(
    column: Column, lengths: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> Column:
    values = column.values
    padded = values.new_zeros(max(lengths), device=device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    whole = Column(values.dtype)
    for part, length in zip(parts, lengths, strict=True):
        whole.append(part[:length])
    return whole
