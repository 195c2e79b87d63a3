"""The main job, end to end, in its quick form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_finetune_digits_runs_and_reports(tmp_path):
    script = ROOT / "examples" / "finetune_digits.py"
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        # One thread is as fast on so small a model, and does not slow down when cores are shared.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    for name in ("original", "cross-entropy (TeCoA)", "Dirichlet alignment"):
        assert name in run.stdout
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())["outcomes"]
    # Chance is 0.1: the model learns, the attack breaks it, and either fine-tuning helps.
    original = outcomes.pop("original")
    assert original["clean"]["accuracy"] > 0.35
    assert original["attacked"]["accuracy"] < 0.2
    for tuned in outcomes.values():
        assert tuned["clean"]["accuracy"] > 0.25
        assert tuned["attacked"]["accuracy"] > original["attacked"]["accuracy"] + 0.03
    for pair in (original, *outcomes.values()):
        for outcome in pair.values():
            assert 0 <= outcome["ece"] <= 1
            assert 0 < outcome["aleatoric"] <= 2.3026
            assert 0 < outcome["epistemic"] < 1
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_open_clip_reports(tmp_path):
    script = ROOT / "examples" / "evaluate_open_clip.py"
    options = ["--synthetic", "--steps", "2", "--attacks", "pgd", "--images", "60"]
    command = [sys.executable, str(script), *options, "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
    assert "Does uncertainty rise under attack?" in run.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n_samples"] == 60
    assert set(report["metrics"]) == {"clean", "pgd"}
    assert set(report["under_attack"]["pgd"]["shifts"]) >= {"msp", "AU", "EU"}
    assert (tmp_path / "report.md").read_text().count("| clean |") == 1
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "state.pt").is_file()


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "metrics_tour.ipynb", as_version=4)
    # As stored: run from top to bottom, with what it printed.
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(
        output.output_type == "error"
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}})
    client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    tables = [o for o in outputs if "<table" in o.get("data", {}).get("text/html", "")]
    assert len(images) >= 2
    assert len(tables) >= 3
