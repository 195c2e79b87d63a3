"""The losses, option by option, and how each is held against its oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import loss_oracles
import numpy as np
import torch

import calibclip

F32, F64 = torch.float32, torch.float64
BOUNDS = {F32: 1e-5, F64: 1e-10}


@dataclass(frozen=True)
class Loss:
    """A loss: its names, tensor arguments in order, whether labels are taken, terms' fields."""

    name: str
    module_name: str
    inputs: tuple[str, ...]
    fields: tuple[str, ...]
    labelled: bool = True
    target_optional: bool = False
    call_options: tuple[str, ...] = ()  # of the function and of forward, not of the constructor
    function_name: str = ""

    @property
    def function(self) -> Callable:
        return getattr(calibclip, self.function_name or f"{self.name}_loss")

    @property
    def module(self) -> type[torch.nn.Module]:
        return getattr(calibclip, self.module_name)


ATTENTION = ("attention_adv", "attention_ref", "attention_clean")
LOSSES = {
    loss.name: loss
    for loss in (
        Loss("tecoa", "TeCoALoss", ("logits_adv",), ("total", "cross_entropy")),
        Loss(
            "pmg_aft",
            "PMGAFTLoss",
            ("logits_adv", "logits_adv_ref", "logits_clean"),
            ("total", "cross_entropy", "kl_ref", "kl_clean"),
        ),
        Loss(
            "fare",
            "FARELoss",
            ("features_adv", "features_ref"),
            ("total", "adv", "clean"),
            labelled=False,
        ),
        Loss(
            "tga",
            "TGALoss",
            ("logits_adv", *ATTENTION),
            ("total", "cross_entropy", "attention_adv", "attention_clean"),
        ),
        Loss(
            "comp_tga",
            "CompTGALoss",
            ("logits_adv", *ATTENTION),
            ("total", "cross_entropy", "attention_adv", "attention_clean"),
        ),
        Loss(
            "trades", "TRADESLoss", ("logits_adv", "logits_clean"), ("total", "cross_entropy", "kl")
        ),
        Loss(
            "fap",
            "FAPLoss",
            ("logits_adv", "features_adv", "logits_clean", "features_clean"),
            ("total", "cross_entropy", "kl"),
        ),
        Loss(
            "simclip",
            "SimCLIPLoss",
            ("features_adv", "features_clean"),
            ("total", "adv", "other"),
            labelled=False,
        ),
        Loss("edl", "EDLLoss", ("log_alpha_adv",), ("total", "fit", "kl"), call_options=("epoch",)),
        Loss(
            "prior_network",
            "PriorNetworkLoss",
            ("log_alpha_adv",),
            ("total", "shape", "evidence"),
            target_optional=True,
        ),
        Loss(
            "distillation",
            "DistillationLoss",
            ("logits_adv", "logits_ref"),
            ("total", "cross_entropy", "kl", "effective_weight"),
            target_optional=True,
        ),
    )
}


@dataclass(frozen=True, eq=False)
class Case:
    """A loss with options; ``inputs`` where they differ from the loss's usual ones.

    ``forward``: what the function takes as an option and the module only in forward;
    ``constructor``: the module's options where the function has no such options; ``summed``: the
    terms added up over the batch under any reduction.
    """

    loss_name: str
    options: dict = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    labelled: bool | None = None
    reductions: tuple[str, ...] = ("none", "mean", "sum")
    forward: dict = field(default_factory=dict)
    constructor: dict | None = None
    summed: tuple[str, ...] = ()

    @property
    def loss(self) -> Loss:
        return LOSSES[self.loss_name]

    @property
    def names(self) -> tuple[str, ...]:
        return self.inputs or self.loss.inputs

    @property
    def takes_target(self) -> bool:
        return self.loss.labelled if self.labelled is None else self.labelled

    def __str__(self) -> str:
        options = {**self.options, **self.forward}
        shown = [f"{key}={value}" for key, value in options.items()]
        if self.inputs:
            shown.append("+".join(self.inputs))
        if self.takes_target != self.loss.labelled:
            shown.append("no target")
        return f"{self.loss_name}({', '.join(shown)})"

    def labels(self, target) -> dict:
        """The keyword of the labels: ``None`` where the case goes without."""
        given = target if self.takes_target else None
        return {"target": given} if self.loss.labelled else {}

    def call(self, tensors, target=None, *, reduction="mean", **more):
        """The function."""
        labels = self.labels(target)
        options = {**self.options, **self.forward, **more}
        return self.loss.function(**tensors, **labels, **options, reduction=reduction)

    def build(self, reduction="mean", **more):
        """The module."""
        options = self.options if self.constructor is None else self.constructor
        return self.loss.module(**{**options, **more}, reduction=reduction)

    def through(self, call, tensors, target=None):
        """Call a module or its ``terms``, every argument by its name."""
        return call(**tensors, **self.labels(target), **self.forward)

    def terms(self, inputs, target):
        """The oracle's terms."""
        oracle = getattr(loss_oracles, self.loss_name)
        labels = target if self.takes_target else None
        return oracle(inputs, labels, **self.options, **self.forward)


def single(array: np.ndarray) -> np.ndarray:
    """Round to float32 numbers, so that one oracle serves both dtypes exactly."""
    return np.asarray(array, dtype=np.float32).astype(np.float64)


def make_inputs(names, batch=4, classes=10, width=16, grid=(7, 7), seed=0):
    """CLIP-like inputs by name, float64 arrays of float32 numbers, and labels.

    Logits are 100 cosines, features have length 10 or so, maps lie in [0, 1], and ln alpha runs
    from -1 to 12. Adversarial and frozen inputs differ from the clean ones by a fair amount.
    """
    rng = np.random.default_rng(seed)
    kinds = {
        "logits": 100 * rng.normal(0.2, 0.05, (batch, classes)),
        "features": rng.normal(0, 10 / np.sqrt(width), (batch, width)),
        "attention": rng.uniform(0, 1, (batch, *grid)),
        "log_alpha": rng.uniform(-1, 12, (batch, classes)),
    }
    noise = {"logits": 2.0, "features": 4 / np.sqrt(width), "attention": 0.3, "log_alpha": 0.0}
    inputs = {}
    for name in names:
        kind = next(k for k in kinds if name.startswith(k))
        moved = kinds[kind] + noise[kind] * rng.normal(size=kinds[kind].shape)
        inputs[name] = single(np.clip(moved, 0, 1) if kind == "attention" else moved)
    return inputs, rng.integers(classes, size=batch)


def tensors_of(inputs, dtype=F32, grad=()):
    """Fresh leaves."""
    return {
        name: torch.from_numpy(array.copy()).to(dtype).requires_grad_(name in grad)
        for name, array in inputs.items()
    }


def subsets(names):
    """Every non-empty subset."""
    return [set(some) for n in range(1, len(names) + 1) for some in combinations(names, n)]


def error(got, want):
    """Largest distance of a row from what it should be, relative to the row's length.

    A row far shorter than the longest is measured against a hundredth of that one.
    """
    got, want = (np.asarray(x, dtype=np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    if want.size == 0:
        return 0.0
    rows = (1, -1) if want.ndim == 0 else (len(want), -1)
    distance = np.linalg.norm((got - want).reshape(rows), axis=1)
    length = np.linalg.norm(want.reshape(rows), axis=1)
    scale = np.maximum(length, max(0.01 * length.max(), 1e-300))
    worst = (distance / scale).max()
    return float(worst) if np.isfinite(worst) else np.inf


@cache
def prepared(case, **shape):
    """Inputs, labels and the oracle's terms; made once and not to be written to."""
    inputs, target = make_inputs(case.names, **shape)
    return inputs, target, case.terms(inputs, target)


def check_against_oracle(case, inputs, target, terms, dtype):
    """Value and gradients for each reduction and each subset of inputs that require them."""
    rng = np.random.default_rng(7)
    labels, bound = torch.from_numpy(target), BOUNDS[dtype]
    for reduction in case.reductions:
        upstream = single(rng.normal(size=len(target) if reduction == "none" else ()))
        value_want, grads_want = loss_oracles.combine(terms, reduction, upstream, case.summed)
        for live in subsets(case.names):
            where = f"{case}, {reduction}, gradients of {sorted(live)}"
            tensors = tensors_of(inputs, dtype, live)
            value = case.call(tensors, labels, reduction=reduction)
            assert value.dtype == dtype, where
            found = error(value.detach(), value_want)
            assert found <= bound, f"value of {where}: {found:.1e}"
            wanted = live & set(grads_want)
            assert value.requires_grad == bool(wanted), where
            if wanted:
                value.backward(torch.as_tensor(upstream).to(dtype))
            for name, tensor in tensors.items():
                if name not in wanted:
                    assert tensor.grad is None, f"{name} of {where}"
                    continue
                found = error(tensor.grad, grads_want[name])
                assert found <= bound, f"gradient in {name} of {where}: {found:.1e}"


def check_terms(case, inputs, target, terms, dtype):
    """The module's terms, unweighted and reduced like the loss, against the oracle's."""
    labels = torch.from_numpy(target)
    for reduction in case.reductions:
        found = case.through(case.build(reduction).terms, tensors_of(inputs, dtype), labels)
        assert found._fields == case.loss.fields
        total, _ = loss_oracles.combine(terms, reduction, 1.0, case.summed)
        assert error(found.total, total) <= BOUNDS[dtype], f"total, {reduction}"
        for name in set(terms) & set(found._fields):
            how = "sum" if name in case.summed else reduction
            want = loss_oracles.reduced(terms[name].values, how)
            got = error(getattr(found, name), want)
            assert got <= BOUNDS[dtype], f"{name}, {reduction}: {got:.1e}"


def forward_names(function):
    """Positional parameters, and keyword-only ones with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    keyword = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    return [name for name in positional if name != "self"], keyword


# Every option of every loss, away from its default at least once.

CASES = {
    "tecoa": [Case("tecoa"), Case("tecoa", {"label_smoothing": 0.1})],
    "pmg_aft": [
        Case("pmg_aft"),
        Case(
            "pmg_aft",
            {"temperature": 2.5, "ref_weight": 0.3, "clean_weight": 1.7, "detach_clean": True},
        ),
        Case("pmg_aft", {"ref_weight": 2.0, "detach_ref": False}),
        Case(
            "pmg_aft",
            {"kl_reduction": "sum", "temperature": 3.0, "ref_weight": 0.7, "detach_ref": False},
            reductions=("mean",),
            summed=("kl_ref", "kl_clean"),
        ),
        Case("pmg_aft", {"kl_reduction": "mean"}, reductions=("mean",)),
    ],
    "fare": [
        Case("fare"),
        Case("fare", {"detach_ref": False, "normalize": True}),
        Case("fare", {"metric": "cosine", "detach_ref": False}),
        Case(
            "fare",
            {"clean_weight": 0.3},
            inputs=("features_adv", "features_ref", "features_clean"),
        ),
        Case(
            "fare",
            {"clean_weight": 0.7, "normalize": True, "detach_ref": False},
            inputs=("features_adv", "features_ref", "features_clean"),
        ),
        Case(
            "fare",
            {"clean_weight": 0.6, "metric": "cosine"},
            inputs=("features_adv", "features_ref", "features_clean"),
        ),
    ],
    "tga": [
        Case("tga"),
        Case("tga", {"adv_weight": 3.0, "clean_weight": 0.4, "detach_ref": False}),
        Case("tga", {"distance": "l1", "adv_weight": 8.0, "detach_ref": False}),
        Case("tga", {"distance": "cosine", "clean_weight": 5.0, "detach_ref": False}),
    ],
    "comp_tga": [
        Case("comp_tga"),
        Case("comp_tga", {"distance": "l1", "clean_weight": 2.0, "detach_ref": False}),
        Case("comp_tga", {"distance": "cosine", "adv_weight": 2.0}),
    ],
    "trades": [
        Case("trades"),
        Case("trades", {"weight": 2.5, "detach_clean": True}),
    ],
    "fap": [Case("fap"), Case("fap", {"weight": 3.5})],
    "simclip": [
        Case("simclip", constructor={"frozen_reference": False}),
        Case(
            "simclip",
            inputs=("features_adv", "features_ref"),
            constructor={"frozen_reference": True},
        ),
    ],
    "edl": [
        Case("edl"),
        Case("edl", {"kind": "log"}),
        Case("edl", {"kind": "digamma"}),
        Case("edl", {"annealing_epochs": 5}, forward={"epoch": 3}),
        Case("edl", {"kind": "log"}, forward={"epoch": 0}),
        Case("edl", {"kind": "digamma"}, forward={"epoch": 7}),
        Case("edl", {"annealing_epochs": 4}, forward={"epoch": 9}),
    ],
    "prior_network": [
        Case("prior_network"),
        Case("prior_network", {"direction": "forward"}),
        Case("prior_network", {"target_concentration": 20.0}),
        Case("prior_network", {"direction": "forward", "target_concentration": 0.5}),
        Case("prior_network", labelled=False),
        Case("prior_network", {"direction": "forward"}, labelled=False),
    ],
    "distillation": [
        Case("distillation"),
        Case("distillation", {"direction": "reverse", "detach_ref": False}),
        Case("distillation", {"weight": 3.0, "temperature": 0.02, "detach_ref": False}),
        Case("distillation", {"logit_scale": 30.0, "temperature": 0.5, "direction": "reverse"}),
        Case("distillation", {"temperature": 0.1, "detach_ref": False}, labelled=False),
        Case("distillation", {"weight": 0.5, "direction": "reverse"}, labelled=False),
    ],
}
EVERY = [case for cases in CASES.values() for case in cases]


# C = 2, 10, 200; D = 16, 512.
SHAPES = {
    "two classes": {"batch": 5, "classes": 2, "width": 16, "grid": (49,)},
    "ten classes": {"batch": 4, "classes": 10, "width": 512, "grid": (7, 7)},
    "many classes": {"batch": 3, "classes": 200, "width": 24, "grid": (2, 5, 4)},
}

# The signatures: arguments in order, options with their defaults.

FORWARD = {
    "tecoa": "logits_adv target",
    "pmg_aft": "logits_adv target logits_adv_ref logits_clean",
    "fare": "features_adv features_ref features_clean",
    "tga": "logits_adv target attention_adv attention_ref attention_clean",
    "comp_tga": "logits_adv target attention_adv attention_ref attention_clean",
    "trades": "logits_adv target logits_clean",
    "fap": "logits_adv target features_adv logits_clean features_clean",
    "simclip": "features_adv features_ref features_clean",
    "edl": "log_alpha_adv target",
    "prior_network": "log_alpha_adv target",
    "distillation": "logits_adv target logits_ref",
}
OPTIONS = {
    "tecoa": {"label_smoothing": 0.0},
    "pmg_aft": {
        "temperature": 1.0,
        "ref_weight": 1.0,
        "clean_weight": 1.0,
        "kl_reduction": None,
        "detach_ref": True,
        "detach_clean": False,
    },
    "fare": {"clean_weight": 0.0, "metric": "l2", "normalize": False, "detach_ref": True},
    "tga": {"adv_weight": 0.08, "clean_weight": 0.05, "distance": "l2", "detach_ref": True},
    "comp_tga": {"adv_weight": 0.10, "clean_weight": 0.07, "distance": "l2", "detach_ref": True},
    "trades": {"weight": 6.0, "detach_clean": False},
    "fap": {"weight": 1.0},
    "simclip": {},
    "edl": {"kind": "mse", "epoch": None, "annealing_epochs": 10},
    "prior_network": {"target_concentration": 1000.0, "direction": "reverse"},
    "distillation": {
        "logit_scale": 100.0,
        "temperature": 0.07,
        "weight": None,
        "direction": "forward",
        "detach_ref": True,
    },
}
MAY_BE_NONE = {
    ("DirichletAlignLoss", "weight"),
    ("DirichletAlignLoss", "relative_weight"),
    ("PMGAFTLoss", "kl_reduction"),
    ("DistillationLoss", "weight"),
}
