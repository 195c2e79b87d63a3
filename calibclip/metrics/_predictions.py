"""What a metric of predictions reads: one of ``probs=`` and ``logits=``, and ``target=``."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_choice, check_floating, check_target, describe, wrong

ArrayLike: TypeAlias = Tensor | np.ndarray

NAN_POLICIES = ("raise", "omit", "propagate")

REMEDY = "nan='omit' leaves such rows out, nan='propagate' returns NaN"

# Of faults that are found late: the argument, what was expected of it and what to do.
Fault: TypeAlias = tuple[str, str, str]
NO_DISTRIBUTION: Fault = (
    "probs",
    "rows of probabilities in [0, 1] that sum to 1",
    "if these are logits pass logits=",
)
NO_CLASS: Fault = ("target", "class indices below K", "")

# Entries of a block of rows that is worked on at once: 1 MB of float32.
_BLOCK = 2**18


class Faults(NamedTuple):
    """Rows of an update that are no predictions, each 0-d, int64; see `Metric` for what follows."""

    nonfinite: Tensor
    """Rows with NaN or infinity (of logits: NaN, +inf, or -inf only)."""
    improper: Tensor
    """Rows of ``probs`` that are no distribution, or confidences that are none."""
    mislabelled: Tensor
    """Targets that are no class, or labels that are none."""

    @staticmethod
    def none() -> Faults:
        return Faults(*(torch.zeros((), dtype=torch.int64) for _ in range(3)))

    def check(self, improper: Fault = NO_DISTRIBUTION, mislabelled: Fault = NO_CLASS) -> None:
        """Raise for what could not be looked at during an update on an accelerator."""
        for count, fault in ((self.improper, improper), (self.mislabelled, mislabelled)):
            if int(count):
                argument, expected, remedy = fault
                got = f"{int(count)} that do not fit"
                raise ValueError(wrong(argument, expected, got, remedy))


class Predictions:
    """Checked predictions of ``N`` samples over ``K`` classes, cut from any autograd graph.

    What a metric needs of them is computed when it is first asked for, and kept for the next.

    Attributes:
        scores: Probabilities or logits, shape ``(N, K)``, float64 if given so, else float32.
        are_logits: What ``scores`` holds.
        target: True classes, shape ``(N,)``, int64, on the device of ``scores``.
        faults: Rows that are no predictions.
    """

    def __init__(
        self, scores: Tensor, are_logits: bool, target: Tensor, faults: Faults | None = None
    ) -> None:
        self.scores, self.are_logits, self.target = scores, are_logits, target
        self.faults = Faults.none() if faults is None else faults

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def n_classes(self) -> int:
        return self.scores.shape[1]

    @cached_property
    def predicted(self) -> Tensor:
        """Class of the largest score, shape ``(N,)``; of equal scores the lowest index.

        Logits are compared as they are: softmax rounds close logits to equal probabilities.
        """
        if self.scores.device.type == "cpu":
            # Several times as fast as torch's, and the lowest index is promised.
            return torch.from_numpy(self.scores.numpy().argmax(axis=1))
        return self.scores.argmax(dim=1)

    @cached_property
    def correct(self) -> Tensor:
        """Whether the predicted class is the true one, shape ``(N,)``, bool."""
        return self.predicted == self.target

    @cached_property
    def probs(self) -> Tensor:
        """Class probabilities, shape ``(N, K)``, in the dtype of the scores."""
        return self.scores.softmax(dim=1) if self.are_logits else self.scores

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of the predicted class, shape ``(N,)``, in the dtype of the scores."""
        return _entries(self.probs, self.predicted).clamp(max=1.0)

    @cached_property
    def log_odds(self) -> Tensor:
        r"""Log-odds :math:`\ln p/(1-p)` of the predicted class, shape ``(N,)``, float64.

        It ranks as the confidence does, and still tells apart what rounds to a confidence of 1.
        """
        log_others = self._others.log()
        if self.are_logits and not (_on_cpu(self.scores) and bool((self._others > 1e-30).all())):
            # What is too small a share for float32 still has a logarithm.
            tiny = self._others < 1e-30
            log_others = torch.where(tiny, self._log_tiny_others(), log_others)
        return self.confidence.double().log() - log_others

    @cached_property
    def nll(self) -> Tensor:
        """Negative log-probability of the true class, shape ``(N,)``, float64."""
        true = _entries(self.scores, self.target).double()
        if not self.are_logits:
            return -true.log()
        gap = _entries(self.scores, self.predicted).double() - true
        return (self._others / self.confidence.double()).log1p() + gap

    @cached_property
    def brier(self) -> Tensor:
        """Squared distance from the one-hot target, shape ``(N,)``, float64."""
        if not _on_cpu(self.probs):
            return self._exact_brier(self.probs, self.target)
        # A product of rows, not a norm: its root would round what is exact.
        with torch.autocast("cpu", enabled=False):
            squares = torch.linalg.vecdot(self.probs, self.probs).double()
        score = squares - 2 * _entries(self.probs, self.target).double() + 1
        # Where little is left of the 1, rounding is as well.
        small = (score < 0.1).nonzero().squeeze(1)
        exact = self._exact_brier(self.probs[small], self.target[small])
        return score.index_copy_(0, small, exact)

    def _exact_brier(self, probs: Tensor, target: Tensor) -> Tensor:
        # p - onehot(y), without a matrix of ones.
        totals = []
        for block, true in self._blocks(probs, target):
            residual = block.scatter_add(1, true, block.new_full(true.shape, -1.0))
            totals.append(residual.square_().sum(1))
        return torch.cat(totals).double()

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy of the probabilities in nats, shape ``(N,)``, float64."""
        # The predicted class apart: its -p ln p is as small as its distance from 1.
        log_confidence = -(-self.log_odds).exp().log1p()
        terms = [
            -torch.xlogy(probs, probs).scatter_(1, predicted, 0.0).sum(1)
            for probs, predicted in self._blocks(self.probs, self.predicted)
        ]
        return torch.cat(terms).double() - self.confidence.double() * log_confidence

    @cached_property
    def _others(self) -> Tensor:
        """Probability of all classes but the predicted one, shape ``(N,)``, float64.

        Summed without that one, next to which, where it is near 1, the others would vanish.
        """
        blocks = self._blocks(self.probs, self.predicted)
        sums = [probs.scatter(1, predicted, 0.0).sum(1) for probs, predicted in blocks]
        return torch.cat(sums).double()

    def _log_tiny_others(self) -> Tensor:
        """Its logarithm where the predicted class has a probability of all but 1."""
        parts = []
        for scores, predicted in self._blocks(self.scores, self.predicted):
            gaps = scores - scores.gather(1, predicted)
            parts.append(gaps.scatter_(1, predicted, -torch.inf).logsumexp(1))
        return torch.cat(parts).double()

    def _blocks(self, matrix: Tensor, column: Tensor) -> zip[tuple[Tensor, Tensor]]:
        """Yield blocks of rows with a column ``(n, 1)``: so few that they stay in the cache."""
        rows = max(_BLOCK // self.n_classes, 1)
        if matrix.device.type != "cpu":
            rows *= 64  # few launches instead
        return zip(matrix.split(rows), column.unsqueeze(1).split(rows), strict=True)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _entries(matrix: Tensor, column: Tensor) -> Tensor:
    return matrix.gather(1, column[:, None]).squeeze(1)


def read_predictions(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    nan: str = "raise",
) -> Predictions:
    """Check the arguments that all metrics of predictions share.

    On the CPU every fault raises at once. On an accelerator a look at the values would stall the
    device, and they are counted in `Faults` instead; only ``nan="omit"`` looks.

    Args:
        probs: Probabilities, shape ``(N, K)``.
        logits: Logits, shape ``(N, K)``.
        target: True classes, shape ``(N,)``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``: what rows that are not finite do.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a dtype is not floating (``probs``, ``logits``) or integer (``target``).
        ValueError: A shape is wrong, a probability row is not a distribution, a row of logits
            holds NaN or +inf or only -inf, or a class index lies outside ``[0, K)``.
    """
    check_choice("nan", nan, NAN_POLICIES)
    if (probs is None) == (logits is None):
        got = "neither" if probs is None else "both"
        remedy = "name the arguments: probs= or logits=, and target="
        raise TypeError(wrong("probs, logits", "exactly one of the two", got, remedy))
    are_logits = probs is None
    argument, given = ("logits", logits) if are_logits else ("probs", probs)

    given = check_floating(argument, as_tensor(given), shape="(N, K)", ndim=2)
    if given.shape[1] < 2:
        remedy = "for a two-class score s pass torch.stack([1 - s, s], dim=1)"
        raise ValueError(wrong(argument, "shape (N, K) with K >= 2", describe(given), remedy))
    scores = widened(given).contiguous()  # with strides softmax rounds otherwise
    target, mislabelled = _read_target(target, scores)
    if are_logits:
        nonfinite, improper = _faulty_logits(scores, nan), None
    else:
        nonfinite, improper = _faulty_probabilities(scores, _slack(given), nan)
    none = torch.zeros((), dtype=torch.int64, device=scores.device)
    faults = Faults(*(none if f is None else f.sum() for f in (nonfinite, improper, mislabelled)))
    if nan == "omit" and nonfinite is not None and bool(nonfinite.any()):
        scores, target = scores[~nonfinite], target[~nonfinite]
    return Predictions(scores, are_logits, target, faults)


def read_binary(
    probs: ArrayLike, target: ArrayLike, nan: str = "raise"
) -> tuple[Tensor, Tensor, Faults]:
    """Check probabilities of a positive class and whether it is true; see `read_predictions`.

    Returns:
        The probabilities, shape ``(N,)``, the truth, shape ``(N,)``, bool, and the faults.
    """
    check_choice("nan", nan, NAN_POLICIES)
    scores, _ = read_confidence("probs", probs, "probabilities in [0, 1]", "apply a sigmoid")
    # The probabilities are looked at here: so may the flags be.
    truth = read_flags("target", target, scores, look=True)
    bad = ~scores.isfinite()
    raise_nonfinite("probs", bad, nan, look=True)
    faults = Faults.none()._replace(nonfinite=bad.sum())
    return (scores, truth, faults) if nan != "omit" else (scores[~bad], truth[~bad], faults)


def read_confidence(
    argument: str,
    value: object,
    expected: str = "confidences in [0, 1]",
    remedy: str = "",
    *,
    look: bool = True,
) -> tuple[Tensor, Tensor]:
    """Check probabilities, one a sample; those that are not finite pass.

    Args:
        argument: Name for messages.
        value: Shape ``(N,)``, floating, a tensor or an array.
        expected: What they should be, for messages.
        remedy: What to do if they are not.
        look: Raise for values outside [0, 1] on an accelerator, too, which stalls it.

    Returns:
        The probabilities, those above 1 by rounding set to 1, and which are outside.
    """
    given = check_floating(argument, as_tensor(value), shape="(N,)", ndim=1, empty=True)
    scores, bound = widened(given), 1 + _slack(given)
    outside = ((scores < 0) | (scores > bound)) & scores.isfinite()
    if (look or scores.device.type == "cpu") and bool(outside.any()):
        raise ValueError(wrong(argument, expected, f"{_rows(outside)} outside", remedy))
    return scores.masked_fill((scores > 1) & (scores <= bound), 1.0), outside


def raise_nonfinite(argument: str, bad: Tensor, nan: str, *, look: bool = False) -> None:
    """Raise for rows with NaN or infinity, on an accelerator only if ``look``: it would stall it.

    Args:
        argument: Name for messages.
        bad: Which rows are not finite, shape ``(N,)``, bool.
        nan: The policy; only ``"raise"`` raises.
        look: Whether to look on any device.

    Raises:
        ValueError: The policy is to raise, and a row is not finite.
    """
    if nan == "raise" and (look or bad.device.type == "cpu") and bool(bad.any()):
        got = f"{_rows(bad)} with NaN or infinity"
        raise ValueError(wrong(argument, "finite values", got, REMEDY))


def widened(given: Tensor) -> Tensor:
    """Return float64 as it is and any other float in float32, cut from any autograd graph."""
    given = given.detach()
    if given.device.type == "mps":
        given = given.cpu()  # MPS has no float64, in which all sums are kept
    return given if given.dtype == torch.float64 else given.float()


def _slack(given: Tensor) -> float:
    """Return how far above 1 rounding may take a probability, or the sum of a row of them."""
    # Rounding every entry moves a sum by up to eps / 2; 1e-4 covers sums of many classes.
    return max(1e-4, torch.finfo(given.dtype).eps)


def read_flags(argument: str, value: object, like: Tensor, *, look: bool = False) -> Tensor:
    """Check one bool, or 0 or 1, per entry of another tensor; return it as bool on its device.

    On an accelerator numbers are looked at only if ``look``: it would stall the device. There
    everything but 1 counts as False.
    """
    flags = as_tensor(value)
    expected = f"bool, or 0 and 1, of shape {tuple(like.shape)}"
    if not isinstance(flags, Tensor):
        raise TypeError(wrong(argument, expected, describe(value)))
    if flags.shape != like.shape:
        raise ValueError(wrong(argument, expected, describe(flags)))
    if flags.dtype != torch.bool:
        looked_at = look or flags.device.type == "cpu"
        if flags.is_complex() or (looked_at and ((flags != 0) & (flags != 1)).any()):
            raise ValueError(wrong(argument, expected, "other values"))
        flags = flags == 1
    return flags.detach().to(like.device)


def as_tensor(value: object) -> object:
    """View a numeric array as a tensor and leave anything else to the caller's checks."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    # torch reads neither long double nor a foreign byte order, and no negative strides.
    dtype = np.float64 if value.dtype.itemsize > 8 else value.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(value, dtype, ["C_CONTIGUOUS", "WRITEABLE"]))


def _read_target(target: object, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the target, and which entries are no class where that is not raised at once."""
    batch, n_classes = scores.shape
    expected = f"integer class indices of shape ({batch},)"
    if target is None:
        raise TypeError(wrong("target", expected, "nothing", "pass target="))
    indices = as_tensor(target)
    if not isinstance(indices, Tensor):
        raise TypeError(wrong("target", expected, describe(target)))
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(wrong("target", expected, describe(target), "convert it to int64"))
    # On the CPU the range is checked too.
    indices = check_target(indices.detach().long(), batch, n_classes, indices.device)
    if indices.device.type == "cpu":
        return indices.to(scores.device), None
    # On an accelerator a bad index would end the process.
    outside = (indices < 0) | (indices >= n_classes)
    return indices.clamp(0, n_classes - 1).to(scores.device), outside.to(scores.device)


def _faulty_logits(logits: Tensor, nan: str) -> Tensor | None:
    largest = logits.amax(dim=1)  # NaN if the row holds one
    bad = ~largest.isfinite()
    if nan == "raise" and logits.device.type == "cpu" and bad.any():
        masked = largest == -torch.inf
        if masked.any():
            expected = "at least one class above -inf in every row"
            raise ValueError(wrong("logits", expected, f"{_rows(masked)} of -inf only"))
        expected = "finite logits, or -inf for a masked class"
        raise ValueError(wrong("logits", expected, f"{_rows(bad)} with NaN or +inf", REMEDY))
    return bad


def _faulty_probabilities(
    probs: Tensor, tolerance: float, nan: str
) -> tuple[Tensor | None, Tensor | None]:
    lowest, total = probs.amin(dim=1), probs.sum(dim=1)
    nonfinite = ~total.isfinite()
    improper = ((lowest < 0) | ((total - 1).abs() > tolerance)) & ~nonfinite
    if probs.device.type != "cpu":
        return nonfinite, improper
    raise_nonfinite("probs", nonfinite, nan)
    if improper.any():
        first = int(improper.nonzero()[0])
        expected = f"rows of probabilities in [0, 1] that sum to 1 within {tolerance:.2g}"
        got = (
            f"{_rows(improper)} that do not fit, first row {first} "
            f"with minimum {lowest[first]:.4g} and sum {total[first]:.4g}"
        )
        raise ValueError(wrong("probs", expected, got, "if these are logits pass logits="))
    return nonfinite, None


def _rows(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {len(bad)} rows"
