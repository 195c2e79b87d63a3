"""Metrics of images with several true classes each, over the whole set rather than by batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_count, check_floating, check_number, describe, wrong
from calibclip.metrics._predictions import ArrayLike, Faults, as_tensor, raise_nonfinite, widened
from calibclip.metrics._ranking_state import in_float64
from calibclip.metrics._streaming import Column, PerClass, Value

_IGNORED = -1
_LABELS = "1, 0 and -1"


@dataclass(frozen=True, eq=False)
class AveragePrecisions:
    """Average precision of each class and their mean, as `mean_average_precision` finds them."""

    mean: float
    """Mean over the classes that have a positive; NaN if none has."""
    per_class: np.ndarray
    """By class, shape ``(K,)``, float64, read-only; NaN where there is no positive."""
    n_left_out: int
    """Number of classes without a positive."""

    def __post_init__(self) -> None:
        values = np.array(self.per_class, dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, "per_class", values)

    def __repr__(self) -> str:
        return (
            f"AveragePrecisions(mean={self.mean:.4f}, n_classes={len(self.per_class)}, "
            f"n_left_out={self.n_left_out})"
        )


class PrecisionRecallF1(NamedTuple):
    """Precision, recall and F1, as `multilabel_precision_recall_f1` finds them."""

    overall_precision: float
    """OP: share of the predicted labels that are true; 0 if none is predicted."""
    overall_recall: float
    """OR: share of the true labels that are predicted."""
    overall_f1: float
    """OF1: harmonic mean of OP and OR."""
    class_precision: float
    """CP: mean over classes of their precision, 0 for a class that is never predicted."""
    class_recall: float
    """CR: mean over classes of their recall."""
    class_f1: float
    """CF1: harmonic mean of CP and CR, which is not the mean of the classes' F1."""
    n_left_out: int
    """Number of classes without a positive, which CP and CR leave out."""


def mean_average_precision(
    scores: ArrayLike, target: ArrayLike, *, nan: str = "raise"
) -> AveragePrecisions:
    r"""Mean average precision (mAP) of multi-label predictions.

    .. math::
        \mathrm{AP}_k = \sum_j (R_j - R_{j-1}) P_j, \qquad
        \mathrm{mAP} = \frac{1}{|\{k : n_k > 0\}|} \sum_{k : n_k > 0} \mathrm{AP}_k

    where :math:`P_j` and :math:`R_j` are precision and recall of class k over all images when the
    j largest distinct scores of the class are accepted, and :math:`n_k` is its number of positives.
    Equal scores are accepted together, so that the order of the images does not matter, and nothing
    is interpolated.

    Args:
        scores: Shape ``(N, K)``, floating point, larger is more likely present: logits, cosines or
            probabilities. They are compared in the dtype given; the class rounds them to float32.
        target: Shape ``(N, K)``, bool or 1 (present), 0 (absent) and -1 (unknown: the score of
            this image does not count for this class).
        nan: What images with a score that is not finite do: ``"raise"``, ``"omit"`` (a warning
            tells how many) or ``"propagate"`` (the result is NaN).

    Returns:
        The mean, the values by class, and the number of classes left out as they have no positive.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape, a label or an option is wrong.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.2], [0.3, 0.2, 0.6]])
        >>> target = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 0]])
        >>> result = mean_average_precision(scores, target)  # (1/2 + 2/3) / 2 and 1
        >>> result
        AveragePrecisions(mean=0.7917, n_classes=3, n_left_out=1)
    """
    metric = in_float64(MeanAveragePrecision(nan=nan), "scores")
    return metric.update(scores, target).compute(sync=False)


def multilabel_precision_recall_f1(
    scores: ArrayLike,
    target: ArrayLike,
    k: int | None = 3,
    *,
    threshold: float | None = None,
    nan: str = "raise",
) -> PrecisionRecallF1:
    r"""Overall and per-class precision, recall and F1 of multi-label predictions.

    With :math:`h_c` hits, :math:`m_c` predictions and :math:`n_c` positives of class c,

    .. math::
        \mathrm{OP} = \frac{\sum_c h_c}{\sum_c m_c}, \quad
        \mathrm{OR} = \frac{\sum_c h_c}{\sum_c n_c}, \quad
        \mathrm{CP} = \frac1C \sum_c \frac{h_c}{m_c}, \quad
        \mathrm{CR} = \frac1C \sum_c \frac{h_c}{n_c}

    the latter two over the C classes with a positive, and F1 the harmonic mean of each pair. The
    counts are of the whole set: a mean over batches is another number.

    Args:
        scores: Shape ``(N, K)``, floating point, larger is more likely present.
        target: Shape ``(N, K)``, bool or 1 (present), 0 (absent) and -1 (unknown: whether predicted
            or not, it counts neither way).
        k: Predict the k classes with the largest scores of each image, of equal scores those with
            the lowest index; all if ``K <= k``. None: do not limit the number.
        threshold: Predict only classes whose score is above it, in the dtype of the scores,
            float64 or else float32. None: any.
        nan: What images with a score that is not finite do: ``"raise"``, ``"omit"`` (a warning
            tells how many) or ``"propagate"`` (the result is NaN).

    Returns:
        Floats in [0, 1]. Without a positive all are NaN but OP, which is so only if nothing is
        predicted either.

    Raises:
        TypeError: A type is wrong, or neither ``k`` nor ``threshold`` is given.
        ValueError: A shape, a label or an option is wrong.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.2]])
        >>> target = torch.tensor([[1, 0, 0], [1, 1, 0]])
        >>> result = multilabel_precision_recall_f1(scores, target, k=1)
        >>> result.overall_precision, round(result.overall_recall, 4)
        (1.0, 0.6667)
        >>> result.class_precision, result.class_recall, result.class_f1
        (0.5, 0.5, 0.5)
    """
    metric = MultilabelPrecisionRecallF1(k, threshold=threshold, nan=nan)
    return metric.update(scores, target).compute(sync=False)


class _Multilabel(PerClass[Value]):
    """Base: sums of shape ``(K,)``, empty until K is known."""

    _SCORES = "scores"
    _MISLABELLED = ("target", f"bool, or {_LABELS}", "")

    def __init__(self, **options: Any) -> None:
        if options["n_classes"] is not None:
            options["n_classes"] = check_count("n_classes", options["n_classes"], at_least=1)
        super().__init__(**options)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        zeros = torch.zeros(self.options["n_classes"] or 0, dtype=torch.int64)
        return {name: zeros.clone() for name in self._PER_CLASS}, {}

    @torch.no_grad()
    def update(self, scores: ArrayLike, target: ArrayLike) -> _Multilabel[Value]:
        """Take in a batch.

        Args:
            scores: Shape ``(N, K)``, floating point, larger is more likely present.
            target: Shape ``(N, K)``, bool or 1 (present), 0 (absent) and -1 (unknown).

        Returns:
            The metric itself.

        Raises:
            TypeError: A type is wrong.
            ValueError: A shape or a label is wrong.
        """
        values, labels, faults = _read(scores, target, self.options["nan"])
        self._grow(values.shape[1], "scores")
        self.count_faults(faults)
        self._take(values, labels)
        return self

    @abstractmethod
    def _take(self, scores: Tensor, labels: Tensor) -> None: ...


class MeanAveragePrecision(_Multilabel[AveragePrecisions]):
    """`mean_average_precision` of a stream; 5 bytes an image and class, of scores in float32.

    Args:
        n_classes: K, if known. Processes that may see no sample must be told, as their state has
            the same shape then.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = MeanAveragePrecision()
        >>> for score, label in ((0.9, 0), (0.8, 1)):
        ...     _ = metric.update(torch.tensor([[score]]), torch.tensor([[label]]))
        >>> metric.compute().mean
        0.5
    """

    _PER_CLASS = ("n_positive",)

    def __init__(self, *, n_classes: int | None = None, nan: str = "raise") -> None:
        super().__init__(n_classes=n_classes, nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        columns = {"scores": Column(torch.float32), "labels": Column(torch.int8)}
        return super()._begin()[0], columns

    def _take(self, scores: Tensor, labels: Tensor) -> None:
        self._add(n_positive=(labels == 1).sum(0))
        # Row by row, so that rows of several batches and processes follow one another.
        self._append(scores=scores.flatten(), labels=labels.flatten())

    def _value(self) -> AveragePrecisions:
        n_positive = self._sums["n_positive"].cpu().numpy()
        n_classes = len(n_positive)
        per_class = np.full(n_classes, math.nan)
        scores, labels = (self._columns[name].values for name in ("scores", "labels"))
        for index in np.flatnonzero(n_positive):
            one_class = slice(int(index), None, n_classes)
            per_class[index] = _average_precision(scores[one_class], labels[one_class])
        found = per_class[n_positive > 0]
        mean = float(found.mean()) if len(found) else math.nan
        return AveragePrecisions(mean, per_class, n_classes - len(found))


class MultilabelPrecisionRecallF1(_Multilabel[PrecisionRecallF1]):
    """`multilabel_precision_recall_f1` of a stream; three sums for each class.

    Args:
        k: Predict the k classes with the largest scores. None: do not limit the number.
        n_classes: K, if known. Processes that may see no sample must be told, as their state has
            the same shape then.
        threshold: Predict only classes whose score is above it. None: any.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type, or neither ``k`` nor ``threshold`` is given.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = MultilabelPrecisionRecallF1(k=1)
        >>> for target in ([[1, 0]], [[1, 1]]):
        ...     _ = metric.update(torch.tensor([[0.75, 0.25]]), torch.tensor(target))
        >>> round(metric.compute().overall_f1, 4)
        0.8
    """

    _PER_CLASS = ("n_hits", "n_predicted", "n_positive")

    def __init__(
        self,
        k: int | None = 3,
        *,
        n_classes: int | None = None,
        threshold: float | None = None,
        nan: str = "raise",
    ) -> None:
        if k is None and threshold is None:
            raise TypeError(wrong("k, threshold", "at least one of the two", "neither"))
        if k is not None:
            k = check_count("k", k, at_least=1)
        if threshold is not None:
            threshold = check_number("threshold", threshold)
        super().__init__(k=k, n_classes=n_classes, threshold=threshold, nan=nan)

    def _take(self, scores: Tensor, labels: Tensor) -> None:
        k, threshold = self.options["k"], self.options["threshold"]
        predicted = labels != _IGNORED
        if k is not None and k < scores.shape[1]:
            # A stable sort, as topk takes any of equal scores.
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
            predicted &= torch.zeros_like(predicted).scatter_(1, order, True)
        if threshold is not None:
            bound = torch.tensor(threshold, dtype=torch.float64).to(scores.dtype)
            predicted &= scores > bound.to(scores.device)
        positive = labels == 1
        self._add(
            n_hits=(predicted & positive).sum(0),
            n_predicted=predicted.sum(0),
            n_positive=positive.sum(0),
        )

    def _value(self) -> PrecisionRecallF1:
        hits, predicted, positive = (self._sums[name].cpu().double() for name in self._PER_CLASS)
        known = positive > 0
        precisions = hits[known] / predicted[known].clamp(min=1)
        recalls = hits[known] / positive[known]
        n_predicted, n_positive = predicted.sum(), positive.sum()
        # Nothing predicted is a precision of 0, unless there was nothing to be found.
        precision = float(hits.sum() / (n_predicted if n_predicted > 0 else n_positive))
        recall = float(hits.sum() / n_positive)
        by_class = float(precisions.mean()), float(recalls.mean())
        return PrecisionRecallF1(
            overall_precision=precision,
            overall_recall=recall,
            overall_f1=_f1(precision, recall),
            class_precision=by_class[0],
            class_recall=by_class[1],
            class_f1=_f1(*by_class),
            n_left_out=int((~known).sum()),
        )


def _average_precision(scores: Tensor, labels: Tensor) -> float:
    """Return the average precision of one class that has a positive.

    Args:
        scores: Shape ``(N,)``.
        labels: 1, 0 or -1 for unknown, shape ``(N,)``.
    """
    known = labels != _IGNORED
    ranked, order = scores[known].sort(descending=True)
    n_hits = (labels[known][order] == 1).cumsum(0)
    # The last of each run of equal scores.
    ends = torch.cat([ranked[1:] != ranked[:-1], known.new_ones(1)]).nonzero().squeeze(1)
    hits = n_hits[ends].cpu().double()
    accepted = ends.cpu().double() + 1
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / accepted).sum() / hits[-1])


def _f1(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _read(scores: object, target: object, nan: str) -> tuple[Tensor, Tensor, Faults]:
    """Check scores and labels; return both without faulty rows, labels int8, and the faults.

    On an accelerator a look at the values would stall the device: there rows that are faulty become
    unknown.
    """
    values = widened(check_floating("scores", as_tensor(scores), shape="(N, K)", ndim=2))
    labels, outside = _read_labels(target, values)
    bad = ~values.isfinite().all(dim=1)
    raise_nonfinite("scores", bad, nan)
    faults = Faults.none()._replace(nonfinite=bad.sum(), mislabelled=outside.sum())
    return values.nan_to_num(0.0), labels.masked_fill(bad[:, None], _IGNORED), faults


def _read_labels(target: object, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels as int8 on the device of the scores, and which are none of -1, 0 and 1."""
    labels = as_tensor(target)
    expected = f"bool, or {_LABELS}, of shape {tuple(like.shape)}"
    if not isinstance(labels, Tensor):
        raise TypeError(wrong("target", expected, describe(target)))
    if labels.shape != like.shape or labels.is_complex():
        raise ValueError(wrong("target", expected, describe(labels)))
    outside = torch.zeros_like(labels, dtype=torch.bool)
    if labels.dtype != torch.bool:
        outside = (labels != 0) & (labels != 1) & (labels != -1)
    if labels.device.type == "cpu" and bool(outside.any()):
        raise ValueError(wrong("target", expected, f"{int(outside.sum())} other values"))
    labels = labels.detach().masked_fill(outside, 0).to(like.device, torch.int8)
    return labels, outside.to(like.device)
