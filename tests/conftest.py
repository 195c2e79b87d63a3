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


def part_of_finetune(name):
    @pytest.fixture(scope="session")
    def module(finetune):
        return importlib.import_module(name)

    return module


data_module = part_of_finetune("_finetune_data")
options_module = part_of_finetune("_finetune_options")
passes_module = part_of_finetune("_finetune_passes")
report_module = part_of_finetune("_finetune_report")
preparation_module = part_of_finetune("_finetune_setup")
