"""Figures. They need the extra ``calibclip[plots]``; matplotlib is loaded when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibclip._checks import check_count, describe, wrong
from calibclip.metrics import ReliabilityTable, RiskCoverageCurve, risk_coverage_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
_BLUE, _SKY, _VERMILION = "#0072B2", "#56B4E9", "#D55E00"
_SERIES = (_BLUE, _VERMILION, "#009E73", "#CC79A7", "#E69F00", _SKY, "black")
_GREY = "0.55"

# The strip of counts lies below accuracy 0 in the same axes, so that any layout keeps it in place.
_STRIP_TOP, _STRIP_BOTTOM = -0.09, -0.27


def reliability_diagram(
    table: ReliabilityTable,
    ax: Axes | None = None,
    *,
    title: str | None = None,
    label: str | None = None,
) -> Axes:
    """Draw accuracy against confidence, with the counts below.

    A point lies at the mean confidence and the accuracy of a bin, its bar is the 95 % Wilson
    interval of the accuracy. The shading spans the gap between the two over the width of the bin:
    vermilion where the model is over-confident, blue where it is under-confident, and the stronger
    the more samples it concerns. The grey strip is the number of samples per bin on a linear scale.

    Several diagrams in one figure want ``layout="constrained"``, as any axes with labels do.

    Args:
        table: From :func:`calibclip.metrics.reliability_table`.
        ax: Axes to draw into; by default those of a new pyplot figure.
        title: Title of the axes.
        label: Name of the model or the attack, written above the numbers and given to the points
            for ``ax.legend()``.

    Returns:
        The axes drawn into.

    Raises:
        TypeError: ``table`` is no :class:`~calibclip.metrics.ReliabilityTable`.
        ImportError: matplotlib is missing.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from calibclip import metrics, plots
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
        >>> table = metrics.reliability_table(probs, target=torch.tensor([0, 1, 1]))
        >>> ax = plots.reliability_diagram(table, Figure().subplots(), title="clean")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('confidence', 'accuracy')
    """
    if not isinstance(table, ReliabilityTable):
        remedy = "make one with calibclip.metrics.reliability_table"
        raise TypeError(wrong("table", "a ReliabilityTable", describe(table), remedy))
    if ax is None:
        ax = _new_axes()

    _draw_frame(ax, table)
    if table.total > 0:
        filled = table.count > 0
        _draw_counts(ax, table, filled)
        _draw_gaps(ax, table, filled)
        _draw_points(ax, table, filled, label)
    _write_numbers(ax, table, label)
    if title is not None:
        ax.set_title(title)
    return ax


def _new_axes() -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'reliability_diagram needs matplotlib; run pip install "calibclip[plots]"'
        ) from error
    return plt.subplots(figsize=(4.4, 5.0), layout="constrained")[1]


def _own_figure(width: float, height: float) -> Figure:
    """Make a figure that pyplot does not know, and that a notebook shows all the same."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'a figure needs matplotlib; run pip install "calibclip[plots]"'
        ) from error

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            image = io.BytesIO()
            self.savefig(image, format="png", dpi=80)
            return image.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


def _draw_frame(ax: Axes, table: ReliabilityTable) -> None:
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    ax.set(xlim=(0, 1), ylim=(_STRIP_BOTTOM, 1), xticks=ticks, yticks=ticks, aspect="equal")
    ax.set_xlabel("confidence")
    # Beside the accuracies, not beside the strip.
    ax.set_ylabel("accuracy", y=(0.5 - _STRIP_BOTTOM) / (1 - _STRIP_BOTTOM))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    samples = f"samples (at most {table.count.max():,} per bin)"
    ax.text(0.02, -0.015, samples, color="0.4", fontsize="x-small", va="top")


def _draw_counts(ax: Axes, table: ReliabilityTable, filled: np.ndarray) -> None:
    heights = (_STRIP_TOP - _STRIP_BOTTOM) * table.count / table.count.max()
    ax.bar(
        table.lower[filled],
        heights[filled],
        width=(table.upper - table.lower)[filled],
        bottom=_STRIP_BOTTOM,
        align="edge",
        color="0.8",
        edgecolor="white",
        linewidth=0.5,
    )


def _draw_gaps(ax: Axes, table: ReliabilityTable, filled: np.ndarray) -> None:
    # ECE weighs a gap by its samples. The square root keeps small bins visible.
    weight = np.sqrt(table.count / table.count.max())
    for b in np.flatnonzero(filled):
        ax.bar(
            table.lower[b],
            table.gap[b],
            width=table.upper[b] - table.lower[b],
            bottom=table.accuracy[b],
            align="edge",
            color=_VERMILION if table.gap[b] > 0 else _SKY,
            alpha=0.1 + 0.5 * weight[b],
            linewidth=0,
        )


def _draw_points(ax: Axes, table: ReliabilityTable, filled: np.ndarray, label: str | None) -> None:
    accuracy = table.accuracy[filled]
    ax.errorbar(
        table.confidence[filled],
        accuracy,
        yerr=[accuracy - table.ci_lower[filled], table.ci_upper[filled] - accuracy],
        fmt="o",
        markersize=4.5,
        color=_BLUE,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.2,
        clip_on=False,  # whole points at confidence or accuracy 0 and 1
        zorder=3,
        label=label,
    )


def _write_numbers(ax: Axes, table: ReliabilityTable, label: str | None) -> None:
    lines = [] if label is None else [label]
    if table.total > 0:
        lines += [
            f"ECE {table.ece:.3f}",
            f"accuracy {table.mean_accuracy:.3f}",
            f"confidence {table.mean_confidence:.3f}",
        ]
    else:
        lines += ["no samples"]
    # Away from the points, which lie above the diagonal only for an under-confident model.
    above = table.mean_accuracy - table.mean_confidence > 0.05
    ax.text(
        0.97 if above else 0.03,
        0.03 if above else 0.97,
        "\n".join(lines),
        ha="right" if above else "left",
        va="bottom" if above else "top",
        fontsize="small",
        linespacing=1.3,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2},
        zorder=2,  # over the shading but under the points and intervals, which it must not hide
    )


def uncertainty_histogram(
    uncertainties: Mapping[str, np.ndarray],
    ax: Axes | None = None,
    *,
    n_bins: int = 40,
    title: str | None = None,
) -> Axes:
    """Draw how an uncertainty is distributed under several conditions, as outlines.

    All conditions share their bins, which span all but the 1 % of values at either end; those are
    counted at the ends. If the values are positive and span three orders of magnitude the axis is
    logarithmic.

    Args:
        uncertainties: By condition, values of shape ``(N,)``.
        ax: Axes to draw into; by default those of a new pyplot figure.
        n_bins: Number of bins.
        title: Title of the axes.

    Returns:
        The axes drawn into.

    Raises:
        TypeError: ``uncertainties`` is no mapping, or ``n_bins`` no integer.
        ValueError: There is no finite value.
        ImportError: matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from calibclip import plots
        >>> found = {"clean": np.array([0.1, 0.2, 0.2]), "pgd": np.array([0.2, 0.4, 0.3])}
        >>> plots.uncertainty_histogram(found, Figure().subplots(), title="AU").get_title()
        'AU'
    """
    if not isinstance(uncertainties, Mapping):
        expected = "a mapping from conditions to values"
        raise TypeError(wrong("uncertainties", expected, describe(uncertainties)))
    n_bins = check_count("n_bins", n_bins, at_least=1)
    if ax is None:
        ax = _new_axes()
    series = {name: np.asarray(values, dtype=np.float64) for name, values in uncertainties.items()}
    everything = np.concatenate([*series.values(), np.zeros(0)])
    finite = everything[np.isfinite(everything)]
    if len(finite) == 0:
        raise ValueError(wrong("uncertainties", "at least one finite value", "none"))
    low, high = np.quantile(finite, [0.01, 0.99])
    if low == high:
        low, high = low - 0.5, high + 0.5
    logarithmic = low > 0 and high > 1000 * low
    edges = (
        np.geomspace(low, high, n_bins + 1) if logarithmic else np.linspace(low, high, n_bins + 1)
    )
    for (name, values), color in zip(series.items(), _SERIES * len(series), strict=False):
        values = values[~np.isnan(values)]
        heights, _ = np.histogram(np.clip(values, low, high), edges)
        share = heights / max(len(values), 1)
        ax.stairs(share, edges, color=color, label=name, linewidth=1.4)
        ax.stairs(share, edges, color=color, alpha=0.15, fill=True)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_ylabel("share of samples")
    ax.set_ylim(bottom=0)
    if title is not None:
        ax.set_title(title)
    return ax


def risk_coverage(
    curves: Mapping[str, RiskCoverageCurve], ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """Draw the error rate among the accepted samples against the share that is accepted.

    Args:
        curves: By condition, from ``calibclip.metrics.risk_coverage_curve``.
        ax: Axes to draw into; by default those of a new pyplot figure.
        title: Title of the axes.

    Returns:
        The axes drawn into.

    Raises:
        TypeError: ``curves`` is no mapping to curves.
        ImportError: matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from calibclip import metrics, plots
        >>> curve = metrics.risk_coverage_curve(np.array([0.1, 0.4, 0.2]), np.array([1, 0, 1]))
        >>> plots.risk_coverage({"clean": curve}, Figure().subplots()).get_ylabel()
        'error rate of the accepted'
    """
    expected = "a mapping from conditions to risk-coverage curves"
    if not isinstance(curves, Mapping):
        raise TypeError(wrong("curves", expected, describe(curves)))
    for name, curve in curves.items():
        if not isinstance(curve, RiskCoverageCurve):
            raise TypeError(wrong("curves", expected, f"{name!r}: {type(curve).__name__}"))
    if ax is None:
        ax = _new_axes()
    for (name, curve), color in zip(curves.items(), _SERIES * len(curves), strict=False):
        ax.step(curve.coverage, curve.risk, where="post", color=color, label=name, linewidth=1.4)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="share accepted", ylabel="error rate of the accepted")
    if title is not None:
        ax.set_title(title)
    return ax


def report_figure(conditions: Mapping[str, Any], n_bins: int = 15) -> Figure:
    """Draw reliability, uncertainties and risk under several conditions; see ``Report.plot``.

    Args:
        conditions: By name, those of a report.
        n_bins: Of the reliability diagrams.

    Returns:
        A figure of its own, not pyplot's.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> import torch
        >>> from calibclip import evaluate
        >>> classifier = torch.nn.Linear(4, 3)
        >>> report = evaluate(classifier, [(torch.rand(8, 4), torch.arange(8) % 3)], progress=False)
        >>> len(report_figure(report.conditions).axes)  # one diagram, two uncertainties, the risk
        4
    """
    names = list(next(iter(conditions.values())).uncertainties)
    columns = max(len(conditions), min(len(names) + 1, 4))
    rows = math.ceil((len(names) + 1) / columns)
    figure = _own_figure(3.4 * columns, 4.2 + 2.8 * rows)
    grid = figure.add_gridspec(2, 1, height_ratios=[4.2, 2.8 * rows])
    above, below = (figure.add_subfigure(place) for place in grid)
    for (name, condition), ax in zip(
        conditions.items(), np.atleast_1d(above.subplots(1, len(conditions))), strict=True
    ):
        reliability_diagram(condition.table(n_bins), ax, title=name)
    panels = below.subplots(rows, columns, squeeze=False).flatten()
    for key, ax in zip(names, panels, strict=False):
        values = {name: condition.uncertainties[key] for name, condition in conditions.items()}
        uncertainty_histogram(values, ax, title=key)
    curves = {
        name: risk_coverage_curve(condition.uncertainties["msp"], condition.correct)
        for name, condition in conditions.items()
    }
    risk_coverage(curves, panels[len(names)], title="accepted by msp")
    panels[0].legend(fontsize="small", frameon=False)
    for ax in panels[len(names) + 1 :]:
        ax.remove()
    return figure
