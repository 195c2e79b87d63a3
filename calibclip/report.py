"""The report of an evaluation: every sample's values, what follows from them, tables, figures."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from calibclip._checks import check_choice, wrong
from calibclip._tables import STYLES, Table, number
from calibclip.metrics._table import ReliabilityTable, bin_sums, tabulate
from calibclip.metrics.acceptance import accepted_and_wrong, clean_threshold
from calibclip.metrics.bootstrap import Interval
from calibclip.metrics.calibration_shift import (
    CalibrationShiftSummary,
    OverconfidenceTerms,
    calibration_shift,
    overconfidence_on_errors,
)
from calibclip.metrics.detection import detection_auroc, detection_fpr95
from calibclip.metrics.multilabel import AveragePrecisions, PrecisionRecallF1
from calibclip.metrics.ranking import failure_auroc, failure_fpr95
from calibclip.metrics.selective import augrc, aurc
from calibclip.metrics.shift import ShiftSummary, harmonic_mean_accuracy, uncertainty_shift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Share of clean images that a threshold of uncertainty accepts.
COVERAGE = 0.95

_HEADINGS = {
    "Accuracy and scores": {
        "accuracy": "accuracy",
        "confidence": "mean confidence",
        "nll": "negative log-likelihood",
        "brier": "Brier score (sum)",
    },
    "Calibration of the predicted class": {
        "ece": "ECE",
        "over_confidence": "over-confidence",
        "under_confidence": "under-confidence",
        "rms_ce": "RMS calibration error",
        "smooth_ece": "smooth ECE",
        "classwise_ece": "classwise ECE",
    },
    "Does uncertainty (msp) tell errors?": {
        "failure_auroc": "AUROC, errors positive",
        "failure_fpr95": "FPR at 95 % TPR",
        "aurc": "AURC (mean)",
        "augrc": "AUGRC",
    },
}
_MULTILABEL_NAMES = {
    "mean_average_precision": "mAP",
    "overall_precision": "OP",
    "overall_recall": "OR",
    "overall_f1": "OF1",
    "class_precision": "CP",
    "class_recall": "CR",
    "class_f1": "CF1",
}


@dataclass(frozen=True, eq=False, repr=False)
class Condition:
    """What the classifier says under one condition: arrays with an entry a sample, read-only.

    Attributes:
        predicted: Class of the largest logit, int64.
        correct: Whether it is the true one, bool.
        confidence: Its probability, float32.
        log_odds: Its log-odds, float64.
        nll: Negative log-probability of the true class in nats, float64.
        brier: Squared distance of the probabilities from the one-hot target, float64.
        uncertainties: By name, see ``calibclip.evaluate``.
        classwise_error: Classwise calibration error.
        smooth_error: Smooth calibration error.
        seconds: What attacking and classifying took.
    """

    predicted: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray
    log_odds: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    uncertainties: dict[str, np.ndarray]
    classwise_error: float
    smooth_error: float
    seconds: float

    def __post_init__(self) -> None:
        for column in (*vars(self).values(), *self.uncertainties.values()):
            if isinstance(column, np.ndarray):
                column.setflags(write=False)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.correct)

    def table(self, n_bins: int = 15) -> ReliabilityTable:
        """Return accuracy against confidence in bins of equal width."""
        confidence, correct = (torch.tensor(x) for x in (self.confidence, self.correct))
        return tabulate(bin_sums(confidence, correct, n_bins))

    def measures(self, n_bins: int = 15) -> dict[str, float]:
        """Return the measures of this condition alone, floats by name."""
        table, doubt = self.table(n_bins), self.uncertainties["msp"]
        return {
            "accuracy": float(self.correct.mean()),
            "confidence": float(self.confidence.mean(dtype=np.float64)),
            "nll": float(self.nll.mean()),
            "brier": float(self.brier.mean()),
            "ece": table.ece,
            "over_confidence": table.over_confidence,
            "under_confidence": table.under_confidence,
            "rms_ce": table.error(2),
            "smooth_ece": self.smooth_error,
            "classwise_ece": self.classwise_error,
            "failure_auroc": failure_auroc(doubt, self.correct),
            "failure_fpr95": failure_fpr95(doubt, self.correct),
            "aurc": aurc(doubt, self.correct),
            "augrc": augrc(doubt, self.correct),
        }


@dataclass(frozen=True, eq=False)
class MultilabelCondition:
    """What the classifier says of images with several labels under one condition.

    Attributes:
        count: Number of samples.
        average_precisions: Of each class over the whole set, and their mean.
        top_k: Precision, recall and F1 of the ``k`` highest scores of each image.
        seconds: What attacking and classifying took.
    """

    count: int
    average_precisions: AveragePrecisions
    top_k: PrecisionRecallF1
    seconds: float

    def measures(self, n_bins: int = 15) -> dict[str, float]:
        """Return the measures of this condition, floats by name; there are no bins here."""
        top_k = self.top_k._asdict()
        names = (name for name in _MULTILABEL_NAMES if name in top_k)
        mean = self.average_precisions.mean
        return {"mean_average_precision": mean, **{name: top_k[name] for name in names}}


AnyCondition: TypeAlias = Condition | MultilabelCondition


@dataclass(frozen=True)
class UnderAttack:
    """What an attack does to accuracy, calibration and uncertainty, sample by sample.

    Attributes:
        flipped: Share of samples that are right on the clean image and wrong on the attacked one.
        harmonic_mean_accuracy: Of clean and robust accuracy.
        calibration: ECE and signed gap, clean, attacked and the paired difference, with intervals.
        overconfidence: Of wrong predictions under attack.
        shifts: By uncertainty, how it moves from a clean image to the attacked one.
        detection_auroc: By uncertainty, clean from attacked images.
        detection_fpr95: The same, attacked images positive: the false alarms where 95 % are found.
        accepted_and_wrong: By uncertainty, the share of attacked images that are wrong, and yet no
            more uncertain than the threshold that accepts 95 % of the clean ones.
    """

    flipped: float
    harmonic_mean_accuracy: float
    calibration: CalibrationShiftSummary
    overconfidence: OverconfidenceTerms
    shifts: dict[str, ShiftSummary]
    detection_auroc: dict[str, float]
    detection_fpr95: dict[str, float]
    accepted_and_wrong: dict[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What ``calibclip.evaluate`` found. ``str()`` and notebooks show its tables.

    Attributes:
        conditions: By name, ``"clean"`` first, then the attacks.
        options: Those of the evaluation, and how the attacks print.

    Example:
        >>> from calibclip import evaluate
        >>> classifier = torch.nn.Linear(4, 3)
        >>> report = evaluate(classifier, [(torch.rand(8, 4), torch.arange(8) % 3)], progress=False)
        >>> sorted(report.metrics["clean"])[:3]
        ['accuracy', 'augrc', 'aurc']
    """

    conditions: dict[str, AnyCondition]
    options: dict[str, Any]

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return next(iter(self.conditions.values())).count

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Measures of each condition, floats by name."""
        n_bins = self.options["n_bins"]
        return {name: condition.measures(n_bins) for name, condition in self.conditions.items()}

    @cached_property
    def under_attack(self) -> dict[str, UnderAttack]:
        """What each attack does; empty with several labels an image."""
        clean, *_ = self.conditions.values()
        if not isinstance(clean, Condition):
            return {}
        return {
            name: _compared(clean, attacked, self.options["n_bins"])
            for name, attacked in self.conditions.items()
            if isinstance(attacked, Condition) and attacked is not clean
        }

    def table(self, style: str = "text") -> str:
        """Return the tables.

        Args:
            style: ``"text"``, ``"markdown"`` or ``"latex"`` (with the package booktabs).

        Returns:
            A string of several lines.

        Raises:
            ValueError: ``style`` is another.
        """
        check_choice("style", style, STYLES)
        return "\n\n".join(table.render(style) for table in self._tables())

    def to_dict(self) -> dict[str, Any]:
        """Return options and measures as plain values; without the values of single samples."""
        return {
            "n_samples": self.n_samples,
            "options": self.options,
            "metrics": self.metrics,
            "under_attack": {name: asdict(found) for name, found in self.under_attack.items()},
            "seconds": {name: condition.seconds for name, condition in self.conditions.items()},
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return `to_dict` as JSON, and write it to a file.

        Args:
            path: The file; None: none.

        Returns:
            The JSON, with null in place of NaN and infinity.
        """
        text = json.dumps(_plain(self.to_dict()), indent=2, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_pandas(self) -> Any:
        """Return the measures as a data frame: a row a condition, a column a measure.

        Returns:
            A ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas; pip install pandas") from error
        return pandas.DataFrame.from_dict(self.metrics, orient="index")

    def samples(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the values of single samples by condition and name, as one table each.

        Returns:
            Columns of shape ``(N,)``; none with several labels an image.
        """
        columns = ("predicted", "correct", "confidence", "log_odds", "nll", "brier")
        return {
            name: {
                **{column: getattr(condition, column) for column in columns},
                **condition.uncertainties,
            }
            for name, condition in self.conditions.items()
            if isinstance(condition, Condition)
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw reliability, uncertainty and risk under every condition; needs matplotlib.

        Args:
            path: Of an image file to write, PNG, PDF or SVG; None: none.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: There is nothing to draw, with several labels an image.
        """
        from calibclip.plots import report_figure

        conditions = {
            name: condition
            for name, condition in self.conditions.items()
            if isinstance(condition, Condition)
        }
        if not conditions:
            raise ValueError(wrong("report", "one label an image", "several", "see .table()"))
        figure = report_figure(conditions, self.options["n_bins"])
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        key = "mean_average_precision" if self.options["multilabel"] else "accuracy"
        values = ", ".join(f"{name} {found[key]:.1%}" for name, found in self.metrics.items())
        return f"Report({self.n_samples} images, {key.replace('_', ' ')}: {values})"

    def _repr_html_(self) -> str:
        attacks = "".join(
            f"<li><b>{html.escape(name)}</b>: <code>{html.escape(text)}</code></li>"
            for name, text in self.options["attacks"].items()
        )
        tables = "".join(table.html() for table in self._tables())
        return f"<div>{tables}<details><summary>Attacks</summary><ul>{attacks}</ul></details></div>"

    def _tables(self) -> list[Table]:
        if self.options["multilabel"]:
            return [self._multilabel_table()]
        tables = [self._condition_table()]
        return [*tables, self._attack_table(), self._shift_table()] if self.under_attack else tables

    def _condition_table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for heading, names in _HEADINGS.items():
            rows.append((heading,))
            for key, name in names.items():
                rows.append((name, *(number(found[key]) for found in self.metrics.values())))
        rows += [("Cost",), ("seconds", *(f"{c.seconds:.1f}" for c in self.conditions.values()))]
        return Table(f"{self.n_samples} images", ("", *self.conditions), tuple(rows))

    def _multilabel_table(self) -> Table:
        names = {
            key: f"{name} @ {self.options['top_k']}" if key != "mean_average_precision" else name
            for key, name in _MULTILABEL_NAMES.items()
        }
        rows = [
            (name, *(number(found[key]) for found in self.metrics.values()))
            for key, name in names.items()
        ]
        return Table(f"{self.n_samples} images", ("", *self.conditions), tuple(rows))

    def _attack_table(self) -> Table:
        found = self.under_attack.values()
        rows = [
            ("flipped by the attack", *(number(x.flipped) for x in found)),
            ("harmonic mean of accuracies", *(number(x.harmonic_mean_accuracy) for x in found)),
            ("ECE minus clean ECE", *(_interval(x.calibration.ece_difference) for x in found)),
            ("wrong and above 0.9", *(number(x.overconfidence.rate[0.9]) for x in found)),
            (
                "mean confidence of the wrong",
                *(number(x.overconfidence.mean_confidence) for x in found),
            ),
        ]
        return Table("Under attack", ("", *self.under_attack), tuple(rows))

    def _shift_table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for name, found in self.under_attack.items():
            rows.append((name,))
            for key, shift in found.shifts.items():
                numbers = (shift.rise, shift.tie, shift.effect_size, found.detection_auroc[key])
                rows.append((key, *map(number, numbers), number(found.accepted_and_wrong[key])))
        columns = ("", "rises", "ties", "effect", "AUROC", "accepted and wrong")
        title = "Does uncertainty rise under attack? Share, paired effect size, clean from attacked"
        return Table(title, columns, tuple(rows))


def _compared(clean: Condition, attacked: Condition, n_bins: int) -> UnderAttack:
    shifts, aurocs, false_alarms, accepted = {}, {}, {}, {}
    for name, before in clean.uncertainties.items():
        after = attacked.uncertainties[name]
        # A class that is certain beyond all numbers has no mean: the row is NaN, not the report.
        shifts[name] = uncertainty_shift(
            before, after, clean.correct, attacked.correct, nan="propagate"
        )
        aurocs[name] = detection_auroc(before, after)
        false_alarms[name] = detection_fpr95(before, after)
        threshold = clean_threshold(before, coverage=COVERAGE)
        accepted[name] = accepted_and_wrong(after, attacked.correct, threshold)
    return UnderAttack(
        flipped=float((clean.correct & ~attacked.correct).mean()),
        harmonic_mean_accuracy=harmonic_mean_accuracy(
            float(clean.correct.mean()), float(attacked.correct.mean())
        ),
        calibration=calibration_shift(
            clean.confidence, attacked.confidence, clean.correct, attacked.correct, n_bins
        ),
        overconfidence=overconfidence_on_errors(attacked.confidence, attacked.correct),
        shifts=shifts,
        detection_auroc=aurocs,
        detection_fpr95=false_alarms,
        accepted_and_wrong=accepted,
    )


def _interval(found: Interval) -> str:
    if math.isnan(found.estimate):
        return "-"
    return f"{found.estimate:+.4f} [{found.lower:+.4f}, {found.upper:+.4f}]"


def _plain(value: Any) -> Any:
    """Replace what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.floating, float)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
