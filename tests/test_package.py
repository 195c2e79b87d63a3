import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import calibclip

PACKAGE = Path(calibclip.__file__).parent
ROOT = PACKAGE.parent
HEAVY = (
    "matplotlib",
    "open_clip",
    "pandas",
    "scipy.optimize",
    "scipy.special",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
    "triton",
)


# Imports


def heavy_modules(name):
    """Return what importing ``name`` loads on top of ``import torch``, in a fresh process."""
    code = (
        f"import sys, torch; before = set(sys.modules); import {name}; "
        f"print(*((set(sys.modules) - before) & set({HEAVY!r})))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_import_is_light():
    assert heavy_modules("calibclip") == []


def test_the_probe_for_heavy_modules_can_fail():
    assert "matplotlib" in heavy_modules("matplotlib")


# What a part may import of the package, besides itself.
MAY_IMPORT = {
    "_checks": set(),
    "_modules": set(),
    "_resize": set(),
    "_libraries": {"_checks"},
    "_encoder": {"_checks", "_resize", "_libraries"},
    "_prompts": {"_checks", "_modules"},
    "_kernels": {"_checks"},
    "dirichlet": {"_checks", "_kernels"},
    "uncertainty": {"_checks", "_kernels", "dirichlet"},
    "losses": {"_checks", "_kernels", "dirichlet"},
    "_progress": {"_checks"},
    "attacks": {"_checks", "_modules", "_progress", "_kernels", "dirichlet", "uncertainty"},
    "attention": {"_checks"},
    "metrics": {"_checks", "_tables"},
    "_tables": {"_checks"},
    "recalibration": {"_checks", "metrics"},
    "plots": {"_checks", "metrics"},
    # report loads plots when a figure is drawn.
    "report": {"_checks", "_tables", "metrics", "plots"},
    "evaluation": {
        "_checks",
        "_modules",
        "_progress",
        "attacks",
        "dirichlet",
        "metrics",
        "report",
        "uncertainty",
    },
    "zero_shot": {"_checks", "_encoder", "_prompts", "_libraries", "dirichlet"},
}


def imported_parts(source):
    """Yield what a module imports of calibclip: ``"losses"``, or ``""`` for the root itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("", "calibclip"):
                yield name.partition(".")[2].split(".")[0]


def modules():
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_point_one_way(module):
    if module == Path("__init__.py"):
        return
    part = module.parts[0].removesuffix(".py")
    found = set(imported_parts((PACKAGE / module).read_text()))
    assert "" not in found, "imports from the root package"
    assert found - {part} <= MAY_IMPORT[part]


def test_the_import_parser_sees_every_form():
    source = """
import torch.nn, calibclip.metrics.scores
from calibclip import metrics
def later():
    from calibclip._kernels.special import Pairs
    import calibclip as root
    from . import losses
"""
    assert list(imported_parts(source)) == ["metrics", "", "_kernels", "", ""]


# The public surface

# Returned or raised, not called: no example; and all *Terms.
RESULTS = {
    "AttackResult",
    "AttackWarning",
    "AveragePrecisions",
    "CalibrationShiftSummary",
    "Diagnostics",
    "FailureScores",
    "Interval",
    "MetricWarning",
    "PrecisionRecallF1",
    "RecalibrationWarning",
    "ReliabilityTable",
    "RiskCoverageCurve",
    "ShiftSummary",
    "TransferMatrix",
    "WorstCaseResult",
}
PUBLIC = [
    (module, name)
    for module in (
        calibclip,
        calibclip.attacks,
        calibclip.attention,
        calibclip.losses,
        calibclip.metrics,
        calibclip.recalibration,
        calibclip.uncertainty,
    )
    for name in sorted(module.__all__)
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_names_are_documented(module, name):
    value = getattr(module, name)
    text = inspect.getdoc(value)
    assert text
    if inspect.ismodule(value):
        return
    if name not in RESULTS and not name.endswith("Terms"):
        assert "Example:\n" in text
        assert ">>> " in text
    if inspect.isfunction(value):
        assert "Returns:\n" in text


def test_names_are_sorted_and_complete():
    for module in (calibclip, calibclip.metrics):
        assert len(set(module.__all__)) == len(module.__all__)
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "").startswith("calibclip")
        }
        assert public <= set(module.__all__)


def test_version_and_type_marker():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", calibclip.__version__)
    assert (PACKAGE / "py.typed").is_file()


# The README


def test_readme_example_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
