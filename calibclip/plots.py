"""Figures. They need the extra ``calibclip[plots]``; matplotlib is loaded when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from calibclip._checks import describe, wrong
from calibclip.metrics import ReliabilityTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
_BLUE, _SKY, _VERMILION = "#0072B2", "#56B4E9", "#D55E00"
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
