"""Several metrics on the same predictions, read once and shared between processes at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from calibclip._checks import describe, wrong
from calibclip.metrics._predictions import ArrayLike, read_predictions
from calibclip.metrics._streaming import PredictionMetric, synced


class MetricGroup(Mapping[str, PredictionMetric[Any]]):
    """Metrics of class predictions under names, updated together.

    A batch is checked once, and its softmax, confidences and the like are computed once for all.
    ``compute`` shares the sums of all metrics between processes in one all-reduce.

    Args:
        metrics: Metrics by name, all with the same ``nan``.

    Raises:
        TypeError: ``metrics`` is no mapping from names to metrics of predictions.
        ValueError: There is none, or they differ in ``nan``.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> ece, acc = metrics.ExpectedCalibrationError(), metrics.Accuracy()
        >>> group = MetricGroup({"ece": ece, "acc": acc})
        >>> group.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([0])).compute()
        {'ece': 0.25, 'acc': 1.0}
    """

    def __init__(self, metrics: Mapping[str, PredictionMetric[Any]]) -> None:
        expected = "a mapping from names to metrics of class predictions"
        if not isinstance(metrics, Mapping):
            raise TypeError(wrong("metrics", expected, describe(metrics)))
        for name, metric in metrics.items():
            if not isinstance(name, str) or not isinstance(metric, PredictionMetric):
                raise TypeError(wrong("metrics", expected, f"{name!r}: {type(metric).__name__}"))
        if len({id(metric) for metric in metrics.values()}) < len(metrics):
            remedy = "it would take every batch twice"
            raise ValueError(wrong("metrics", "different metrics", "one under two names", remedy))
        policies = {metric.options["nan"] for metric in metrics.values()}
        if len(policies) != 1:
            got = ", ".join(sorted(policies)) or "no metric"
            raise ValueError(wrong("metrics", "metrics with one and the same nan", got))
        (self._nan,) = policies
        self._metrics = dict(metrics)

    def __getitem__(self, name: str) -> PredictionMetric[Any]:
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def update(
        self,
        probs: ArrayLike | None = None,
        logits: ArrayLike | None = None,
        target: ArrayLike | None = None,
    ) -> MetricGroup:
        """Take in a batch; see `PredictionMetric.update`."""
        with torch.no_grad():
            predictions = read_predictions(probs, logits, target, self._nan)
            # All or none: what may refuse does so before any has taken the batch.
            for metric in self._metrics.values():
                metric.prepare(predictions)
            for metric in self._metrics.values():
                metric.take(predictions)
        return self

    def compute(self, sync: bool | dist.ProcessGroup | None = None) -> dict[str, Any]:
        """Return the value of each metric by name; see `Metric.compute`."""
        shared = synced(list(self._metrics.values()), sync)
        values = (metric.compute(sync=False) for metric in shared)
        return dict(zip(self._metrics, values, strict=True))

    def merge(self, *others: MetricGroup) -> MetricGroup:
        """Take in the samples of groups of the same metrics; see `Metric.merge`."""
        for other in others:
            if not isinstance(other, MetricGroup) or list(other) != list(self):
                raise ValueError(wrong("others", f"groups of {list(self)}", describe(other)))
        for name, metric in self._metrics.items():
            metric._check_mergeable(other[name] for other in others)
        for name, metric in self._metrics.items():
            metric.merge(*(other[name] for other in others))
        return self

    def reset(self) -> MetricGroup:
        """Forget all samples."""
        for metric in self._metrics.values():
            metric.reset()
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each metric by name; see `Metric.state_dict`."""
        return {name: metric.state_dict() for name, metric in self._metrics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> MetricGroup:
        """Replace the states by those of a `state_dict`."""
        if set(state) != set(self._metrics):
            raise ValueError(wrong("state", f"states of {list(self)}", sorted(state)))
        for name, metric in self._metrics.items():
            metric._check_state(state[name])
        for name, metric in self._metrics.items():
            metric.load_state_dict(state[name])
        return self

    def __repr__(self) -> str:
        return f"MetricGroup({self._metrics!r})"
