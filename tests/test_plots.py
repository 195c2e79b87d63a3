import builtins
import io
import runpy

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from calibclip import metrics, plots
from calibclip.metrics import reliability_table
from calibclip.plots import reliability_diagram

VERMILION, SKY = to_rgb("#D55E00"), to_rgb("#56B4E9")


def table_of(confidence, correct, n_bins=4):
    confidence = np.asarray(confidence, dtype=np.float64)
    probs = np.stack([confidence, 1 - confidence], axis=1)
    return reliability_table(probs, target=1 - np.asarray(correct), n_bins=n_bins)


# Bins (.5, .75]: 3 samples, gap .6333 - .6667 < 0; (.75, 1]: 2 samples, gap .9 - 0 > 0.
TABLE = table_of([0.55, 0.65, 0.7, 0.85, 0.95], [1, 1, 0, 0, 0])


def draw(table=TABLE, **kwargs):
    """Axes of a figure that pyplot does not know, drawn once on Agg."""
    ax = reliability_diagram(table, Figure(figsize=(4, 4)).subplots(), **kwargs)
    ax.figure.savefig(io.BytesIO(), format="png")
    return ax


def texts(ax):
    return "\n".join(text.get_text() for text in ax.texts)


def rectangles(ax, colors):
    found = [p for p in ax.patches if isinstance(p, Rectangle)]
    return [p for p in found if p.get_facecolor()[:3] in colors]


def test_points_lie_at_mean_confidence_with_wilson_bars():
    (errorbar,) = [c for c in draw().containers if isinstance(c, ErrorbarContainer)]
    points, _, (bars,) = errorbar
    np.testing.assert_allclose(points.get_xdata(), [1.9 / 3, 0.9])  # midpoints: .625, .875
    np.testing.assert_allclose(points.get_ydata(), [2 / 3, 0], atol=1e-12)
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.stack([TABLE.ci_lower, TABLE.ci_upper], 1)[2:], atol=1e-12)


def test_shading_spans_the_gap_in_the_colour_of_its_sign():
    ax = draw()
    (under,), (over,) = rectangles(ax, [SKY]), rectangles(ax, [VERMILION])
    for patch, b in ((under, 2), (over, 3)):
        assert (patch.get_x(), patch.get_width()) == (TABLE.lower[b], 0.25)
        assert patch.get_y() == pytest.approx(TABLE.accuracy[b])
        assert patch.get_y() + patch.get_height() == pytest.approx(TABLE.confidence[b])
    assert under.get_alpha() > over.get_alpha()  # three samples against two


def test_counts_are_drawn_below_accuracy_zero():
    ax = draw()
    bars = rectangles(ax, [to_rgb("0.8")])
    heights = [bar.get_height() for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(2 / 3)
    bottom = ax.get_ylim()[0]
    assert all(bar.get_y() == bottom and bottom + bar.get_height() < 0 for bar in bars)
    assert "samples (at most 3 per bin)" in texts(ax)


def test_labels_and_numbers():
    ax = draw(title="PGD, eps = 1/255", label="TeCoA")
    assert ax.get_title() == "PGD, eps = 1/255"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")
    assert ax.get_aspect() == 1
    # ECE = (3 * .0333 + 2 * .9) / 5
    assert "TeCoA\nECE 0.380\naccuracy 0.400\nconfidence 0.740" in texts(ax)
    assert ax.get_legend_handles_labels()[1] == ["TeCoA"]
    assert draw().get_title() == ""
    assert draw().get_legend_handles_labels()[1] == []


def test_numbers_stay_clear_of_the_points():
    corners = []
    for correct in ([1, 1, 1, 1], [0, 0, 0, 0]):
        ax = draw(table_of([0.55, 0.6, 0.65, 0.7], correct))
        (numbers,) = [text for text in ax.texts if "ECE" in text.get_text()]
        corners.append((numbers.get_ha(), numbers.get_va()))
    assert corners == [("right", "bottom"), ("left", "top")]


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(n):
    ax = draw(reliability_table(logits=torch.ones(n, 3), target=torch.zeros(n, dtype=torch.long)))
    assert ("no samples" in texts(ax)) == (n == 0)


def test_given_axes_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    current = plt.figure()
    try:
        draw()
        assert plt.get_fignums() == [current.number]
        assert plt.gcf() is current
        assert not current.axes
    finally:
        plt.close(current)
    assert dict(matplotlib.rcParams) == before


def test_without_axes_a_pyplot_figure_is_made():
    import matplotlib.pyplot as plt

    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    ax = reliability_diagram(TABLE)
    try:
        assert plt.gcf() is ax.figure
        ax.figure.savefig(io.BytesIO(), format="png")
    finally:
        plt.close(ax.figure)
        plt.switch_backend(backend)


@pytest.mark.parametrize("shape", [(1, 3, 12, 4.5), (2, 3, 12, 8)])
def test_panels_side_by_side_do_not_overlap(shape):
    rows, columns, width, height = shape
    figure = Figure(figsize=(width, height), layout="constrained")
    for ax in figure.subplots(rows, columns).flat:
        reliability_diagram(TABLE, ax, title="title", label="label")
    figure.savefig(io.BytesIO(), format="png")
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def heights(ax):
    """The outlines of a histogram by label."""
    return {patch.get_label(): patch.get_data() for patch in ax.patches if not patch.get_fill()}


def test_histograms_share_their_bins_and_count_everybody():
    rng = np.random.default_rng(0)
    clean, attacked = rng.normal(size=500), rng.normal(1, 1, size=200)
    attacked[:2] = [np.nan, 50.0]
    ax = plots.uncertainty_histogram(
        {"clean": clean, "pgd": attacked}, Figure().subplots(), n_bins=9, title="AU"
    )
    found = heights(ax)
    assert list(found) == ["clean", "pgd"]
    assert np.array_equal(found["clean"].edges, found["pgd"].edges)
    for outline in found.values():
        assert len(outline.values) == 9
        assert outline.values.sum() == pytest.approx(1)
    everything = np.concatenate([clean, attacked[1:]])
    low, high = np.quantile(everything, [0.01, 0.99])
    assert found["pgd"].edges[[0, -1]] == pytest.approx([low, high])
    assert found["clean"].values[0] == pytest.approx(
        np.mean(clean < found["clean"].edges[1]), abs=1e-12
    )
    assert ax.get_xscale() == "linear"


def test_histograms_of_many_orders_are_logarithmic():
    values = np.geomspace(1e-12, 1.0, 300)
    ax = plots.uncertainty_histogram({"EU": values}, Figure().subplots())
    assert ax.get_xscale() == "log"
    assert heights(ax)["EU"].values.sum() == pytest.approx(1)
    same = plots.uncertainty_histogram({"a": np.full(3, 2.0)}, Figure().subplots(), n_bins=2)
    assert heights(same)["a"].edges.tolist() == [1.5, 2.0, 2.5]


def test_risk_coverage_curves():
    uncertainty, correct = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1, 0, 1, 0])
    curve = metrics.risk_coverage_curve(uncertainty, correct)
    ax = plots.risk_coverage({"clean": curve}, Figure().subplots(), title="risk")
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert line.get_ydata() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert line.get_drawstyle() == "steps-post"
    assert ax.get_title() == "risk"


@pytest.mark.parametrize(
    ("draw", "argument", "error", "message"),
    [
        (plots.uncertainty_histogram, [1.0], TypeError, "uncertainties: expected a mapping from"),
        (plots.uncertainty_histogram, {}, ValueError, "uncertainties: expected at least one fin"),
        (plots.uncertainty_histogram, {"a": np.array([np.nan])}, ValueError, "one finite value"),
        (plots.risk_coverage, [1.0], TypeError, "curves: expected a mapping from conditions"),
        (plots.risk_coverage, {"a": 3}, TypeError, "curves: expected .*, got 'a': int"),
    ],
)
def test_other_figures_refuse(draw, argument, error, message):
    with pytest.raises(error, match=message):
        draw(argument, Figure().subplots())


def test_refuses_other_tables():
    with pytest.raises(
        TypeError,
        match=r"^table: expected a ReliabilityTable, got float 0\.5; make one with calibclip",
    ):
        reliability_diagram(0.5)


def test_matplotlib_is_loaded_late_and_its_absence_explained(monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    runpy.run_path(plots.__file__)  # the module itself does without
    with pytest.raises(ImportError, match=r'pip install "calibclip\[plots\]"'):
        reliability_diagram(TABLE)
