import importlib
import importlib.util
import sys
import types

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
