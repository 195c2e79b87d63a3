"""Clean and attacked images in one pass over the data, all measures in one report."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibclip._checks import check_count, check_flag, check_number, describe, wrong
from calibclip._modules import evaluation_mode
from calibclip._progress import progress_bar
from calibclip.attacks._arguments import check_found
from calibclip.attacks._model import borrowed
from calibclip.dirichlet import DirichletHead
from calibclip.metrics._predictions import Predictions, read_predictions
from calibclip.metrics.classwise import ClasswiseCalibrationError
from calibclip.metrics.group import MetricGroup
from calibclip.metrics.multilabel import MeanAveragePrecision, MultilabelPrecisionRecallF1
from calibclip.metrics.smooth import SmoothCalibrationError
from calibclip.report import Condition, MultilabelCondition, Report
from calibclip.uncertainty import (
    aleatoric_uncertainty,
    epistemic_uncertainty,
    mutual_information,
    predictive_entropy,
)

Classifier = Callable[[Tensor], Tensor]
CLEAN = "clean"

# What a Dirichlet head adds to the uncertainties.
_DIRICHLET = {
    "AU": aleatoric_uncertainty,
    "EU": epistemic_uncertainty,
    "MI": mutual_information,
    "TU": predictive_entropy,
}


def evaluate(
    classifier: Classifier,
    loader: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Callable[..., Any]] | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
    *,
    n_bins: int = 15,
    device: torch.device | str | None = None,
    multilabel: bool = False,
    top_k: int = 3,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool | None = None,
) -> Report:
    r"""Evaluate a classifier on clean and on attacked images.

    Each batch is classified as it is, then attacked by every attack, and what the attack returned
    is classified again. All of it without autocast around it, and a module in eval mode; a plain
    function runs as it is. Every sample is known under every condition, and what is compared
    is paired.

    **Uncertainties** of each prediction: ``"msp"``, minus the log-odds of the largest softmax
    probability, which ranks as one minus that probability and does not saturate; ``"entropy"`` of
    the softmax; and of the head's Dirichlet ``"AU"``, ``"EU"``, ``"MI"`` and ``"TU"``, aleatoric
    and epistemic uncertainty, mutual information and total uncertainty.

    **Long runs.** With a ``checkpoint`` the results so far are written every half minute, and the
    same call goes on where it was cut off. The loader must yield the same batches in the same order
    (``shuffle=False``): batches that are passed over are compared with what was seen, and the first
    is classified again, to know the classifier.

    Args:
        classifier: Callable from images to logits ``(B, K)``, such as a `ZeroShotClassifier`.
        loader: Iterable of ``(images, target)``: images ``(B, ...)`` in [0, 1], target ``(B,)``,
            int64; with ``multilabel`` ``(B, K)``, 0 or 1.
        attacks: By name, callables ``(classifier, images, target)`` that return images or a result
            that holds them: any of ``calibclip.attacks``, a `WorstCase` too. ``"clean"`` is taken.
        head: Callable from logits ``(B, K)`` to ``log_alpha`` of that shape, such as a
            `DirichletHead`. None: of a classifier whose ``logit_scale`` is a number, the head at
            the paper's T = 0.07; else none.
        n_bins: Of the calibration errors.
        device: Where batches are moved to; None: that of the classifier's first parameter or
            buffer, or as they are.
        multilabel: Images have any number of labels: mean average precision and top-k precision,
            recall and F1 over the whole set instead of the rest.
        top_k: Labels predicted for an image with ``multilabel``.
        checkpoint: File to keep results in.
        checkpoint_seconds: Least time between two writes.
        progress: Show a bar (needs tqdm). None: if tqdm is there.

    Returns:
        The report, with all samples' values, tables and figures.

    Raises:
        TypeError: An argument, or what the classifier, the head or an attack returned, has the
            wrong type.
        ValueError: An option or a shape is wrong, logits are not finite, there is no image, or the
            checkpoint is of another evaluation.

    Example:
        >>> from calibclip import PGD
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> loader = [(torch.rand(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(2)]
        >>> report = evaluate(classifier, loader, {"pgd": PGD(eps=0.1)}, progress=False)
        >>> list(report.conditions), report.n_samples
        (['clean', 'pgd'], 16)
    """
    attacks = _check_attacks(attacks)
    if not callable(classifier):
        expected = "a callable from images to logits"
        raise TypeError(wrong("classifier", expected, describe(classifier)))
    if not isinstance(loader, Iterable):
        raise TypeError(wrong("loader", "an iterable of (images, target)", describe(loader)))
    n_bins = check_count("n_bins", n_bins, at_least=1)
    top_k = check_count("top_k", top_k, at_least=1)
    check_flag("multilabel", multilabel)
    if head is None and not multilabel:
        scale = getattr(classifier, "logit_scale", None)
        if isinstance(scale, Real):
            head = DirichletHead(logit_scale=float(scale))
    elif head is not None and not callable(head):
        raise TypeError(wrong("head", "a callable from logits to log_alpha", describe(head)))
    if progress is None:
        progress = importlib.util.find_spec("tqdm") is not None
    if device is None:
        device = _device_of(classifier)

    names = (CLEAN, *attacks)
    records: dict[str, Any] = {
        name: _MultilabelRecord(top_k) if multilabel else _Record(n_bins, head) for name in names
    }
    options = {
        "attacks": {name: _described(attack) for name, attack in attacks.items()},
        "head": None if head is None or multilabel else _described(head),
        "n_bins": n_bins,
        "multilabel": multilabel,
        "top_k": top_k if multilabel else None,
    }
    seconds = check_number("checkpoint_seconds", checkpoint_seconds, at_least=0)
    memory = _Checkpoint(checkpoint, seconds, options, records)
    with progress_bar(progress, _length(loader), "evaluate", "batch") as moved_on:
        for images, target in loader:
            seen = memory.has_seen(images, target)
            images, target = images.to(device), target.to(device)
            if not seen:
                logits = _evaluate_batch(classifier, attacks, records, images, target)
                memory.keep(logits)
            elif memory.position == 1:
                memory.check_classifier(_judged(classifier, images))
            moved_on(1)
    if memory.n_samples == 0:
        raise ValueError(wrong("loader", "at least one image", "none"))
    memory.end()
    return Report({name: record.condition() for name, record in records.items()}, options)


def _evaluate_batch(
    classifier: Classifier,
    attacks: Mapping[str, Callable[..., Any]],
    records: Mapping[str, Any],
    images: Tensor,
    target: Tensor,
) -> Tensor:
    """Take a batch into the records; return the logits of the clean images."""
    clean = images.new_empty(0)
    for name, record in records.items():
        began = time.perf_counter()
        shown = images
        if name != CLEAN:
            with borrowed(classifier), torch.autocast(images.device.type, enabled=False):
                found = attacks[name](classifier, images, target)
            shown = check_found(found, images).to(images.dtype)
        logits = _judged(classifier, shown)
        bad = int((~logits.amax(1).isfinite()).sum()) if logits.numel() else 0
        if bad:
            got = f"{bad} of {len(logits)} rows with NaN or infinity on {name!r} images"
            raise ValueError(wrong("classifier", "finite logits", got))
        record.take(logits, target.cpu())
        record.seconds += time.perf_counter() - began
        clean = logits if name == CLEAN else clean
    return clean


def _judged(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the logits in eval mode, without gradients or autocast, on the CPU."""
    with (
        evaluation_mode(classifier) if isinstance(classifier, nn.Module) else nullcontext(),
        torch.no_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        logits = classifier(images)
    expected = f"logits of shape (B, K) with B = {len(images)}"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(wrong("classifier", expected, describe(logits)))
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(wrong("classifier", expected, describe(logits)))
    return logits.detach().cpu()


class _Record:
    """What is kept of the predictions under one condition: some numbers a sample."""

    def __init__(self, n_bins: int, head: Callable[[Tensor], Tensor] | None) -> None:
        self.head, self.seconds = head, 0.0
        self.columns: dict[str, list[np.ndarray]] = {}
        self.errors = MetricGroup(
            {"classwise": ClasswiseCalibrationError(n_bins), "smooth": SmoothCalibrationError()}
        )

    def take(self, logits: Tensor, target: Tensor) -> None:
        predictions = read_predictions(logits=logits, target=target)
        for error in self.errors.values():
            error.take(predictions)
        columns = {
            "predicted": predictions.predicted,
            "correct": predictions.correct,
            "confidence": predictions.confidence,
            "log_odds": predictions.log_odds,
            "nll": predictions.nll,
            "brier": predictions.brier,
        }
        for name, uncertainty in self._uncertainties(predictions).items():
            columns[f"uncertainty {name}"] = uncertainty
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.cpu().numpy())

    def _uncertainties(self, predictions: Predictions) -> dict[str, Tensor]:
        found = {"msp": -predictions.log_odds, "entropy": predictions.entropy}
        if self.head is not None:
            log_alpha = self.head(predictions.scores)
            shape = tuple(predictions.scores.shape)
            if not isinstance(log_alpha, Tensor) or tuple(log_alpha.shape) != shape:
                expected = f"log_alpha of the shape of the logits, {shape}"
                raise ValueError(wrong("head", expected, describe(log_alpha)))
            found.update({name: measure(log_alpha) for name, measure in _DIRICHLET.items()})
        return found

    def condition(self) -> Condition:
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        marked = "uncertainty "
        return Condition(
            **{name: column for name, column in columns.items() if not name.startswith(marked)},
            uncertainties={
                name.removeprefix(marked): column
                for name, column in columns.items()
                if name.startswith(marked)
            },
            **{f"{name}_error": value for name, value in self.errors.compute(sync=False).items()},
            seconds=self.seconds,
        )

    def state(self) -> dict[str, Any]:
        columns = {
            name: torch.from_numpy(np.concatenate(parts)) for name, parts in self.columns.items()
        }
        return {"columns": columns, "errors": self.errors.state_dict(), "seconds": self.seconds}

    def load(self, state: Mapping[str, Any]) -> None:
        self.columns = {name: [column.numpy()] for name, column in state["columns"].items()}
        self.errors.load_state_dict(state["errors"])
        self.seconds = state["seconds"]


class _MultilabelRecord:
    def __init__(self, top_k: int) -> None:
        self.seconds, self.n_samples = 0.0, 0
        self.precision = MeanAveragePrecision()
        self.top_k = MultilabelPrecisionRecallF1(k=top_k)

    def take(self, logits: Tensor, target: Tensor) -> None:
        self.precision.update(logits, target)
        self.top_k.update(logits, target)
        self.n_samples += len(logits)

    def condition(self) -> MultilabelCondition:
        return MultilabelCondition(
            count=self.n_samples,
            average_precisions=self.precision.compute(sync=False),
            top_k=self.top_k.compute(sync=False),
            seconds=self.seconds,
        )

    def state(self) -> dict[str, Any]:
        metrics = {"precision": self.precision.state_dict(), "top_k": self.top_k.state_dict()}
        return {**metrics, "seconds": self.seconds, "n_samples": self.n_samples}

    def load(self, state: Mapping[str, Any]) -> None:
        self.precision.load_state_dict(state["precision"])
        self.top_k.load_state_dict(state["top_k"])
        self.seconds, self.n_samples = state["seconds"], state["n_samples"]


class _Checkpoint:
    """Writes the records now and then, and knows which batches they are of."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        seconds: float,
        options: dict[str, Any],
        records: Mapping[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.options, self.records, self.seconds = options, records, seconds
        self.n_samples, self.position = 0, 0
        self.digests: list[str] = []
        self.sample = torch.empty(0)  # the logits of the first batch
        self.written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def has_seen(self, images: Tensor, target: Tensor) -> bool:
        """Whether the next batch is in the records already."""
        if not isinstance(images, Tensor) or not isinstance(target, Tensor):
            got = f"{type(images).__name__} and {type(target).__name__}"
            raise TypeError(wrong("loader", "batches (images, target) of tensors", got))
        self.n_samples += len(images)
        if self.path is None:
            return False
        digest = hashlib.sha256()
        for tensor in (images, target):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(numbers.numpy().tobytes())
        self.position += 1
        if self.position > len(self.digests):
            self.digests.append(digest.hexdigest())
            return False
        if self.digests[self.position - 1] != digest.hexdigest():
            expected = f"batch {self.position} as in the checkpoint {self.path}"
            remedy = "use shuffle=False and no random transforms, or another file"
            raise ValueError(wrong("loader", expected, "another batch", remedy))
        return True

    def check_classifier(self, logits: Tensor) -> None:
        """Compare the logits of the first batch with what they were."""
        if self.sample.shape != logits.shape or not torch.allclose(
            self.sample, logits.float(), rtol=1e-2, atol=1e-3 * float(self.sample.abs().max())
        ):
            expected = f"the classifier of the checkpoint {self.path}"
            remedy = "delete the file or use another"
            raise ValueError(wrong("classifier", expected, "one with other logits", remedy))

    def keep(self, logits: Tensor) -> None:
        if self.position == 1:
            self.sample = logits.float()
        if self.path is not None and time.monotonic() - self.written >= self.seconds:
            self._write(self.path)

    def end(self) -> None:
        if self.path is None:
            return
        if self.position < len(self.digests):
            expected = f"the {len(self.digests)} batches of the checkpoint {self.path}"
            raise ValueError(wrong("loader", expected, f"{self.position}", "use another file"))
        self._write(self.path)

    def _write(self, path: Path) -> None:
        states = {name: record.state() for name, record in self.records.items()}
        stored = {
            "options": self.options,
            "digests": self.digests,
            "sample": self.sample,
            "records": states,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that is cut off while it writes must not lose what it had.
        beside = path.with_name(path.name + ".new")
        with beside.open("wb") as file:
            torch.save(stored, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        self.written = time.monotonic()

    def _load(self, path: Path) -> None:
        expected, remedy = "a file that evaluate wrote", "delete it or use another file"
        try:
            # What torch.save writes is a zip file; others are not even tried.
            stored = torch.load(path, weights_only=True) if zipfile.is_zipfile(path) else None
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(wrong("checkpoint", expected, f"{path}", remedy)) from error
        if not isinstance(stored, dict) or not {"options", "digests", "records"} <= set(stored):
            raise ValueError(wrong("checkpoint", expected, f"{path}", remedy))
        if stored["options"] != self.options:
            changed = [
                name for name in self.options if stored["options"].get(name) != self.options[name]
            ]
            got = f"one with another {', '.join(changed)}"
            raise ValueError(wrong("checkpoint", "one of this evaluation", got, remedy))
        self.digests, self.sample = stored["digests"], stored["sample"]
        for name, record in self.records.items():
            record.load(stored["records"][name])


def _check_attacks(attacks: object) -> dict[str, Callable[..., Any]]:
    expected = "a mapping from names to attacks"
    if attacks is None:
        return {}
    if not isinstance(attacks, Mapping):
        remedy = 'pass {"pgd": attack}'
        raise TypeError(wrong("attacks", expected, describe(attacks), remedy))
    for name, attack in attacks.items():
        if not isinstance(name, str) or not callable(attack):
            raise TypeError(wrong("attacks", expected, f"{name!r}: {type(attack).__name__}"))
        if name == CLEAN:
            raise ValueError(wrong("attacks", "names other than 'clean'", repr(name)))
    return dict(attacks)


def _described(call: object) -> str:
    """Print a callable without the address of its memory, which is another in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(call))


def _length(loader: object) -> int | None:
    """Number of batches, where the loader knows; a DataLoader of a stream does not."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def _device_of(classifier: Classifier) -> torch.device | None:
    if not isinstance(classifier, nn.Module):
        return None
    tensors = (*classifier.parameters(), *classifier.buffers())
    return tensors[0].device if tensors else None
