"""What an attack does to uncertainty, image by image.

Row i of the clean and of the adversarial results belongs to the same image. How well an uncertainty
tells adversarial images from clean ones is a matter of ranking, see ``detection.py``; what happens
to confidence and calibration is in ``calibration_shift.py``.
"""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_flag, check_floating, check_number, check_same_shape, wrong
from calibclip._tables import number
from calibclip.metrics._predictions import ArrayLike, as_tensor, raise_nonfinite, read_flags
from calibclip.metrics._streaming import Column, Metric

# Twice whether the clean prediction is correct, plus whether the adversarial one is.
_SUBSETS = {"flipped": 2, "survived": 3, "always wrong": 0, "repaired": 1}
_UNKNOWN, _FAULTY, _N_GROUPS = 4, 5, 6

# Count, mean and sum of squared distances from the mean.
_N_MOMENTS = 3

# A standard deviation below this share of the mean may be what rounding leaves of none.
_NO_DEVIATION = 1e-13


class Shown(ABC):
    """Base of the records that are shown as a table."""

    @abstractmethod
    def _lines(self) -> list[list[str]]:
        """Return the lines of the table, the first its head."""

    def __str__(self) -> str:
        lines = self._lines()
        first, *rest = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(
            "  ".join([label.ljust(first), *map(str.rjust, cells, rest)]) for label, *cells in lines
        )

    def _repr_html_(self) -> str:
        """Table for notebooks."""
        head, *body = self._lines()
        rows = "".join(f"<tr>{_html_cells('td', line)}</tr>" for line in body)
        return (
            f'<table style="text-align: right"><thead><tr>{_html_cells("th", head)}</tr></thead>'
            f"<tbody>{rows}</tbody></table>"
        )


@dataclass(frozen=True, repr=False)
class ShiftSummary(Shown):
    """How uncertainty changes from clean to adversarial images, as `uncertainty_shift` finds it.

    With ``count`` 0 all other numbers are NaN.
    """

    count: int
    """Number of pairs."""
    rise: float
    """Share of pairs whose uncertainty rises by more than the tolerance."""
    tie: float
    """Share whose uncertainty changes by no more than the tolerance."""
    non_drop: float
    """Share whose uncertainty does not drop by more than the tolerance: rise plus tie."""
    mean_clean: float
    """Mean uncertainty of the clean images."""
    mean: float
    """Mean difference, adversarial minus clean."""
    median: float
    """Median difference; NaN unless ranks are kept."""
    relative_mean: float
    """Mean difference over the absolute value of the clean mean; NaN if that is 0."""
    standard_deviation: float
    """Of the differences, with divisor n - 1; NaN of a single pair."""
    effect_size: float
    """Mean difference over standard deviation, Cohen's d_z; NaN if that is NaN or both are 0."""
    rank_biserial: float
    """Matched-pairs rank-biserial correlation, in [-1, 1]; NaN if all pairs are ties, or unless
    ranks are kept."""
    subsets: Mapping[str, ShiftSummary] = field(default_factory=dict)
    """The same of ``"all"`` and, where correctness is known, of ``"flipped"`` (correct, then
    wrong), ``"survived"`` (correct both times), ``"always wrong"`` and ``"repaired"``."""

    def __repr__(self) -> str:
        return (
            f"ShiftSummary(count={self.count}, rise={self.rise:.4f}, tie={self.tie:.4f}, "
            f"non_drop={self.non_drop:.4f}, mean={self.mean:.4g}, "
            f"effect_size={self.effect_size:.4f}, subsets={list(self.subsets)})"
        )

    def _lines(self) -> list[list[str]]:
        names = [column.name for column in fields(self) if column.name != "subsets"]
        styles = {
            "mean": "+.4g",
            "median": "+.4g",
            "mean_clean": ".4g",
            "standard_deviation": ".4g",
        }
        styles |= dict.fromkeys(["relative_mean", "effect_size", "rank_biserial"], "+.4f")
        lines = [["subset", *(name.replace("_", " ") for name in names)]]
        for subset, row in (self.subsets or {"all": self}).items():
            numbers = [number(getattr(row, name), styles.get(name, ".4f")) for name in names[1:]]
            lines.append([subset, str(row.count), *numbers])
        return lines


def uncertainty_shift(
    uncertainty_clean: ArrayLike,
    uncertainty_adv: ArrayLike,
    correct_clean: ArrayLike | None = None,
    correct_adv: ArrayLike | None = None,
    *,
    tolerance: float = 0.0,
    nan: str = "raise",
) -> ShiftSummary:
    r"""Whether uncertainty rises when the images are attacked.

    With :math:`d_i = u_i^{\mathrm{adv}} - u_i^{\mathrm{clean}}` and tolerance t, the shares of
    pairs with :math:`d_i > t` (rise), :math:`|d_i| \le t` (tie) and :math:`d_i \ge -t` (non-drop).
    How strong the shift is, against its own scatter and by ranks:

    .. math::
        d_z = \frac{\bar d}{\sqrt{\sum_i (d_i - \bar d)^2 / (n - 1)}}, \qquad
        r = \frac{\sum_{d_i > t} R_i - \sum_{d_i < -t} R_i}{\sum_{|d_i| > t} R_i}

    where :math:`R_i` is the rank of :math:`|d_i|` among the pairs that are no ties, the mean rank
    where several are equal. All of it also by what the attack did to the predictions: the
    uncertainty of an image that stays correct need not rise, that of one that flips should.

    Many saturated predictions give exact ties, which neither rise nor drop: read rise and tie
    together.

    Args:
        uncertainty_clean: Uncertainty of the clean images, shape ``(N,)``, floating point, on any
            scale that is finite; larger is less certain.
        uncertainty_adv: The same of their adversarial versions, shape ``(N,)``.
        correct_clean: Whether the prediction of the clean image is correct, shape ``(N,)``, bool or
            0 and 1. Give both or neither.
        correct_adv: The same of the adversarial image, shape ``(N,)``.
        tolerance: Differences up to this size are ties, at least 0.
        nan: What pairs with a value that is not finite do: ``"raise"``, ``"omit"`` (a warning tells
            how many) or ``"propagate"`` (the result is NaN).

    Returns:
        The numbers of all pairs, and in ``subsets`` those of each subset; NaN with count 0 if it
        is empty. It prints as a table. Differences and sums are float64. A standard deviation is
        accurate to about 1e-15 of the mean difference; one below 1e-13 of it counts as 0, and makes
        the effect size infinite.

    Raises:
        TypeError: A type is wrong, or only one of the two flags is given.
        ValueError: A shape, a value or an option is wrong.

    Example:
        >>> import torch
        >>> clean, adv = torch.tensor([0.25, 0.5, 0.5, 1.0]), torch.tensor([0.5, 0.5, 1.5, 0.5])
        >>> right = torch.tensor([True, True, True, False])
        >>> shift = uncertainty_shift(clean, adv, right, torch.tensor([True, True, False, False]))
        >>> shift.rise, shift.tie, shift.non_drop, shift.mean
        (0.5, 0.25, 0.75, 0.1875)
        >>> shift.subsets["flipped"].mean, shift.subsets["always wrong"].rise
        (1.0, 0.0)

    References:
        Cohen (1988), Statistical Power Analysis for the Behavioral Sciences, section 2.3 (d_z).
        Kerby (2014), The Simple Difference Formula, https://doi.org/10.2466/11.IT.3.1 (r).
    """
    metric = UncertaintyShift(tolerance=tolerance, ranks=True, nan=nan)
    metric.update(uncertainty_clean, uncertainty_adv, correct_clean, correct_adv)
    return metric.compute(sync=False)


class UncertaintyShift(Metric[ShiftSummary]):
    """`uncertainty_shift` of a stream.

    Args:
        tolerance: Differences up to this size are ties.
        ranks: Keep 9 bytes a pair, for the median and the rank-biserial correlation, which are NaN
            otherwise. The rest needs six numbers of each subset.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = UncertaintyShift()
        >>> for clean, adv in ((0.5, 1.0), (0.25, 0.75), (0.5, 0.0), (0.5, 0.75)):
        ...     _ = metric.update(torch.tensor([clean]), torch.tensor([adv]))
        >>> metric.compute().rise
        0.75
    """

    _SCORES = "uncertainty_clean, uncertainty_adv"

    def __init__(self, *, tolerance: float = 0.0, ranks: bool = False, nan: str = "raise") -> None:
        tolerance = check_number("tolerance", tolerance, at_least=0)
        check_flag("ranks", ranks)
        super().__init__(tolerance=tolerance, ranks=ranks, nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        zeros = torch.zeros(_N_GROUPS, dtype=torch.int64)
        sums = {"n_rise": zeros, "n_drop": zeros.clone(), "clean": zeros.double()}
        # Sums of squares would lose a small scatter next to a large mean.
        columns: dict[str, Column] = {"moments": _Moments(torch.float64)}
        if self.options["ranks"]:
            columns |= {"difference": Column(torch.float64), "group": Column(torch.uint8)}
        return sums, columns

    @torch.no_grad()
    def update(
        self,
        uncertainty_clean: ArrayLike,
        uncertainty_adv: ArrayLike,
        correct_clean: ArrayLike | None = None,
        correct_adv: ArrayLike | None = None,
    ) -> UncertaintyShift:
        """Take in a batch.

        Args:
            uncertainty_clean: Uncertainty of the clean images, shape ``(N,)``, floating point.
            uncertainty_adv: The same of their adversarial versions, shape ``(N,)``.
            correct_clean: Whether the clean prediction is correct, shape ``(N,)``, bool or 0 and 1.
                Give both or neither; pairs without count in ``"all"`` only.
            correct_adv: The same of the adversarial image, shape ``(N,)``.

        Returns:
            The metric itself.

        Raises:
            TypeError: A type is wrong, or only one of the two flags is given.
            ValueError: A shape or a value is wrong.
        """
        if (correct_clean is None) != (correct_adv is None):
            got = "correct_clean" if correct_adv is None else "correct_adv"
            raise TypeError(wrong("correct_clean, correct_adv", "both or neither", f"only {got}"))
        clean = _read_uncertainty("uncertainty_clean", uncertainty_clean)
        adv = _read_uncertainty("uncertainty_adv", uncertainty_adv)
        check_same_shape("uncertainty_adv", adv, "uncertainty_clean", clean)
        difference = adv - clean
        group = torch.full_like(difference, _UNKNOWN, dtype=torch.int64)
        if correct_clean is not None:
            group = 2 * read_flags("correct_clean", correct_clean, clean).long()
            group += read_flags("correct_adv", correct_adv, clean)
        bad = ~difference.isfinite()
        raise_nonfinite(self._SCORES, bad, self.options["nan"])
        group, difference = group.masked_fill(bad, _FAULTY), difference.masked_fill(bad, 0.0)
        member = group == torch.arange(_N_GROUPS, device=group.device)[:, None]
        self._add(
            n_nonfinite=bad.sum(),
            n_rise=(member & (difference > self.options["tolerance"])).sum(1),
            n_drop=(member & (difference < -self.options["tolerance"])).sum(1),
            clean=torch.where(member, clean.masked_fill(bad, 0.0), 0.0).sum(1),
        )
        self._append(moments=_moments(difference, member).flatten())
        if self.options["ranks"]:
            self._append(difference=difference, group=group)
        return self

    def _value(self) -> ShiftSummary:
        # Those of other processes are rows of their own.
        moments = _pooled(self._columns["moments"].values.cpu().view(-1, _N_MOMENTS, _N_GROUPS))
        count = moments[0]
        subsets = {"all": self._summary([*_SUBSETS.values(), _UNKNOWN], moments)}
        if int(count[_UNKNOWN]) == 0 or int(count[:_UNKNOWN].sum()) > 0:
            subsets |= {name: self._summary([group], moments) for name, group in _SUBSETS.items()}
        return replace(subsets["all"], subsets=subsets)

    def _summary(self, groups: list[int], moments: Tensor) -> ShiftSummary:
        """Return the numbers of the pairs of some groups, from the moments of all."""
        total = {name: self._sums[name].cpu()[groups].sum().item() for name in self._begin()[0]}
        n_pairs, mean, squares = _pooled(moments[:, groups].T.unsqueeze(2)).flatten().tolist()
        count = int(n_pairs)
        if count == 0:
            return ShiftSummary(0, *[math.nan] * 10, subsets={})
        mean_clean, deviation = total["clean"] / count, math.nan
        if count > 1:
            deviation = math.sqrt(squares / (count - 1))
            if deviation <= _NO_DEVIATION * abs(mean):
                deviation = 0.0
        median, rank_biserial = self._by_rank(groups)
        return ShiftSummary(
            count=count,
            rise=total["n_rise"] / count,
            tie=(count - total["n_rise"] - total["n_drop"]) / count,
            non_drop=(count - total["n_drop"]) / count,
            mean_clean=mean_clean,
            mean=mean,
            median=median,
            relative_mean=mean / abs(mean_clean) if mean_clean else math.nan,
            standard_deviation=deviation,
            effect_size=over(mean, deviation),
            rank_biserial=rank_biserial,
        )

    def _by_rank(self, groups: list[int]) -> tuple[float, float]:
        """Return the median and the rank-biserial correlation, NaN without ranks."""
        if not self.options["ranks"]:
            return math.nan, math.nan
        group = self._columns["group"].values.cpu().numpy()
        difference = self._columns["difference"].values.cpu().numpy()[np.isin(group, groups)]
        signed = difference[np.abs(difference) > self.options["tolerance"]]
        _, place, counts = np.unique(np.abs(signed), return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
        correlation = ranks @ np.sign(signed) / ranks.sum() if len(signed) else math.nan
        return float(np.median(difference)), float(correlation)


def harmonic_mean_accuracy(clean_accuracy: float, robust_accuracy: float) -> float:
    r"""Harmonic mean of clean and robust accuracy.

    .. math::
        H = \frac{2 A_{\mathrm{clean}} A_{\mathrm{robust}}}
        {A_{\mathrm{clean}} + A_{\mathrm{robust}}}

    It is at most twice the smaller one: accuracy that is bought with all robustness counts nothing.

    Args:
        clean_accuracy: At least 0.
        robust_accuracy: At least 0, in the same unit: both shares, or both per cent.

    Returns:
        A float in the unit given; 0 if both are 0, NaN if one is NaN.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is negative or infinite.

    Example:
        >>> harmonic_mean_accuracy(0.75, 0.25)
        0.375
    """
    pair = []
    for name, value in (("clean_accuracy", clean_accuracy), ("robust_accuracy", robust_accuracy)):
        unknown = isinstance(value, float) and math.isnan(value)
        pair.append(math.nan if unknown else check_number(name, value, at_least=0))
    clean, robust = pair
    return 2 * clean * robust / (clean + robust) if clean + robust else 0.0


def _read_uncertainty(name: str, value: object) -> Tensor:
    """Check uncertainties; return them in float64, in which differences are taken."""
    given = check_floating(name, as_tensor(value), shape="(N,)", ndim=1, empty=True)
    # MPS has no float64.
    return (given.cpu() if given.device.type == "mps" else given).double()


class _Moments(Column):
    """Column of one row of moments, into which those that are appended are pooled."""

    def append(self, values: Tensor) -> None:
        # Towards an accelerator only: on the way back the numbers would come too late.
        own = self.values.to(values.device, non_blocking=values.device.type != "cpu")
        self._data = _pooled(torch.cat([own, values]).view(-1, _N_MOMENTS, _N_GROUPS)).flatten()
        self._length = len(self._data)


def _moments(difference: Tensor, member: Tensor) -> Tensor:
    """Return the moments of each group, shape ``(3, G)``.

    Args:
        difference: Shape ``(N,)``, float64.
        member: Which of them are of each group, shape ``(G, N)``, bool.
    """
    count = member.sum(1).double()
    mean = torch.where(member, difference, 0.0).sum(1) / count.clamp(min=1)
    residual = torch.where(member, difference - mean[:, None], 0.0)
    return torch.stack([count, mean, residual.square().sum(1)])


def _pooled(moments: Tensor) -> Tensor:
    """Return the moments of several parts taken together: ``(R, 3, G)`` to ``(3, G)``.

    No term is larger than what it is to give, so that rounding takes a share of the mean from the
    standard deviation and not from its square.
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum(0)
    center = (count * mean).sum(0) / total.clamp(min=1)
    # Of equal means it is that mean, to the last digit.
    center = center + (count * (mean - center)).sum(0) / total.clamp(min=1)
    between = torch.where(count > 0, count * (mean - center).square(), 0.0)
    return torch.stack([total, center, (squares + between).sum(0)])


def over(numerator: float, denominator: float) -> float:
    """Divide floats as IEEE 754 does, where Python raises.

    Args:
        numerator: Any float.
        denominator: Any float.

    Returns:
        The quotient; infinite where something is divided by 0, NaN for 0 over 0.
    """
    if denominator == 0:
        return math.copysign(math.inf, numerator) if numerator else math.nan
    return numerator / denominator


def _html_cells(tag: str, line: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line)
