"""The main job, end to end, in its quick form."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
