import importlib
import importlib.util
import sys
import types
from pathlib import Path

import packaging.version
import pytest


@pytest.fixture
def clip(monkeypatch):
    """Return OpenAI's package, which asks pkg_resources for ``packaging`` when imported.

    setuptools has dropped pkg_resources in its version 82, and before warns on every import.
    """
    if importlib.util.find_spec("clip") is None:
        pytest.skip("OpenAI's clip is not installed")
    stub = types.ModuleType("pkg_resources")
    stub.packaging = packaging
    monkeypatch.setitem(sys.modules, "pkg_resources", stub)
    return importlib.import_module("clip")


@pytest.fixture(scope="session")
def finetune():
    """Return examples/finetune.py; its parts are modules beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
        return importlib.import_module("finetune")


@pytest.fixture(scope="session")
def data_module(finetune):
    return importlib.import_module("_finetune_data")


@pytest.fixture(scope="session")
def options_module(finetune):
    return importlib.import_module("_finetune_options")


@pytest.fixture(scope="session")
def passes_module(finetune):
    return importlib.import_module("_finetune_passes")


@pytest.fixture(scope="session")
def report_module(finetune):
    return importlib.import_module("_finetune_report")


@pytest.fixture(scope="session")
def preparation_module(finetune):
    return importlib.import_module("_finetune_setup")
