"""Metrics of this package inside torchmetrics' collections. Nothing else needs torchmetrics."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric as _TorchMetric

from calibclip._checks import check_choice, describe, wrong
from calibclip.metrics._streaming import Column, Metric, PredictionMetric

_SCORES = ("probs", "logits")


class TorchMetric(_TorchMetric):
    """A metric of this package as one of torchmetrics, such as a ``MetricCollection`` takes.

    torchmetrics keeps, resets, moves and shares the state then: sums by one all-reduce each,
    columns by gathering.

    Args:
        metric: To be adapted; its own samples are not taken over. A `ClasswiseCalibrationError`
            must know its ``n_classes``.
        scores: What ``preds`` is, ``"probs"`` or ``"logits"``; for metrics of predictions.
        **options: Of ``torchmetrics.Metric``.

    Raises:
        TypeError: ``metric`` is no metric of this package.
        ValueError: ``scores`` is another, or the shape of the state is not known yet.

    Example:
        >>> from torchmetrics import MetricCollection
        >>> from calibclip import metrics
        >>> ece = TorchMetric(metrics.ExpectedCalibrationError(), scores="probs")
        >>> collection = MetricCollection({"ece": ece})
        >>> collection.update(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        >>> collection.compute()
        {'ece': tensor(0.2500, dtype=torch.float64)}
    """

    full_state_update = False

    def __init__(self, metric: Metric[Any], scores: str = "probs", **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(metric, Metric):
            raise TypeError(wrong("metric", "a metric of calibclip", describe(metric)))
        check_choice("scores", scores, _SCORES)
        self.scores = scores
        self.empty = copy.deepcopy(metric).reset()
        for name, total in self.empty._sums.items():
            if total.numel() == 0:
                remedy = "pass n_classes to its constructor"
                raise ValueError(wrong("metric", "a state of known shape", repr(metric), remedy))
            self.add_state(f"sum_{name}", total, dist_reduce_fx="sum")
        for name in self.empty._columns:
            self.add_state(f"column_{name}", [], dist_reduce_fx="cat")

    def update(self, preds: Any = None, target: Any = None, *rest: Any) -> None:
        """Take in a batch.

        Args:
            preds: Scores of a metric of predictions; else the first of what its own update takes.
            target: True classes; else the second.
            *rest: What else its own update takes.
        """
        part = copy.deepcopy(self.empty)
        if isinstance(part, PredictionMetric):
            part.update(**{self.scores: preds}, target=target)
        else:
            part.update(preds, target, *rest)  # pyright: ignore[reportAttributeAccessIssue]
        for name, term in part._sums.items():
            setattr(self, f"sum_{name}", getattr(self, f"sum_{name}") + term)
        for name, column in part._columns.items():
            getattr(self, f"column_{name}").append(column.values)

    def compute(self) -> Any:
        """Return the value: a float64 tensor, or for a record a dict of tensors."""
        whole = copy.deepcopy(self.empty)
        whole._sums = {name: getattr(self, f"sum_{name}") for name in whole._sums}
        for name, column in whole._columns.items():
            parts = getattr(self, f"column_{name}")
            _extend(column, [parts] if isinstance(parts, Tensor) else parts)
        value = whole.compute(sync=False)
        if isinstance(value, float):
            return torch.tensor(value, dtype=torch.float64)
        if isinstance(value, tuple):
            names: tuple[str, ...] = getattr(value, "_fields", ())
            pairs = zip(names, value, strict=True)
            return {name: torch.tensor(term, dtype=torch.float64) for name, term in pairs}
        if is_dataclass(value):
            columns = {field.name: getattr(value, field.name) for field in fields(value)}
            # What is nested stays with the metric's own compute.
            return {
                name: torch.tensor(column)
                for name, column in columns.items()
                if not isinstance(column, Mapping)
            }
        return value


def _extend(column: Column, parts: list[Tensor]) -> None:
    for part in parts:
        column.append(part)
