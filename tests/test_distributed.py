"""Losses, attacks and metrics under DistributedDataParallel and FSDP2: two gloo ranks are one."""

import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import distributed_worker
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock  # which torch depends on
from test_examples_in_loops import check_diff, docstring

from calibclip import DirichletAlignLoss

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
WRAPPERS = ("ddp", "fsdp")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def run_python(*arguments):
    """Return what a process of its own prints; it must end well."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Run the worker's two ranks, once for all workers of xdist."""
    path = tmp_path_factory.getbasetemp()
    path = (path.parent if "PYTEST_XDIST_WORKER" in os.environ else path) / "ranks"
    path.mkdir(exist_ok=True)
    found = [path / f"{rank}.json" for rank in range(2)]
    with FileLock(path / "lock"):
        if not all(file.exists() for file in found):
            run_python(distributed_worker.__file__, path)
    return [json.loads(file.read_text()) for file in found]


@pytest.fixture
def gradients(ranks, wrapper):
    return [found["check_gradients"][wrapper] for found in ranks]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "loss",
    ["paper's weight", "weight", "tecoa", "pmg_aft", "fare", "relative_weight by hand"],
)
def test_gradients_are_those_of_the_joined_batch(gradients, loss):
    assert all(found[loss]["joined"] < TOLERANCE for found in gradients)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_relative_weight_divides_by_the_local_mean(gradients):
    for found in gradients:
        # Each rank minimises its own loss, and the gradient is the mean of theirs.
        assert found["relative_weight"]["mean of ranks"] < TOLERANCE
        assert found["relative_weight"]["joined"] > 1e-2


@pytest.mark.parametrize("wrapper", ["ddp", "ddp, attacked through", "fsdp", "fsdp, gathered once"])
def test_attacked_training_ends_at_the_parameters_of_one_process(ranks, wrapper):
    for found in ranks:
        training = found["check_training"]
        assert training["moved"] > 1e-3
        assert training[wrapper]["images"] == 0
        assert training[wrapper]["parameters"] < TOLERANCE * training["moved"]


def test_a_step_of_micro_batches_can_gather_the_weights_once(ranks):
    assert all(found["check_training"]["gathers"] == 1 for found in ranks)


def test_an_attack_leaves_no_trace_on_a_sharded_model(ranks):
    for found in ranks:
        assert all(found["check_attack_leaves_no_trace"].values())


@pytest.mark.parametrize("case", ["fsdp, judged", "static graph, attacked through"])
def test_training_goes_on_after_an_attack(ranks, case):
    assert all(found["check_training_after"][case] < TOLERANCE for found in ranks)


@pytest.mark.parametrize("attack", ["pgd", "apgd", "rivals", "stop_when_fooled"])
def test_only_attacks_that_stop_early_differ_in_their_passes(ranks, attack):
    one, other = (found["check_passes"][attack] for found in ranks)
    assert (one == other) == (attack != "stop_when_fooled")


def test_a_plain_copy_of_a_sharded_model_can_be_attacked_on_each_rank_alone(ranks):
    for found in ranks:
        assert found["check_plain_copy"]["apart"] < TOLERANCE
        assert 0 <= found["check_plain_copy"]["robust"] <= 1


def test_metrics_of_uneven_ranks_are_those_of_one_process(ranks):
    every = [update for updates in distributed_worker.UPDATES for update in updates]
    expected = distributed_worker.metric_values(every)
    for found in ranks:
        assert found["check_metrics"] == pytest.approx(expected, abs=1e-12)


def test_dtensors_are_refused_and_their_local_rows_are_not(ranks):
    for found in ranks:
        outcomes = found["check_dtensors"]
        assert outcomes.pop("local") == 0
        for name, outcome in outcomes.items():
            assert re.search(
                r"^TypeError: .* got a DTensor; .* call \w+\.to_local\(\)$", outcome
            ), (name, outcome)


def rows(printed):
    """Return the numbers of the example's table by their row."""
    cells = r"\| (before|after) \| (clean|attacked) \| (\S+) \| (\S+) \| (\S+) \|"
    found = {
        f"{when} {kind}": [*map(float, rest)] for when, kind, *rest in re.findall(cells, printed)
    }
    assert len(found) == 4
    return found


def test_the_example_does_the_same_under_either_wrapper(ranks):
    first, second = (found["check_example"] for found in ranks)
    assert set(second.values()) == {""}
    assert "FSDP2, 2 processes" in first[""]
    assert "DDP, 2 processes" in first["--ddp"]
    fsdp, ddp = rows(first[""]), rows(first["--ddp"])
    assert fsdp["after clean"] != pytest.approx(fsdp["before clean"], abs=0.05)
    for row, numbers in fsdp.items():
        assert ddp[row] == pytest.approx(numbers, abs=0.011)  # one image of a hundred


def test_torchrun_starts_the_example_and_it_makes_its_model_robust():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    printed = run_python(*torchrun, ROOT / "examples" / "in_fsdp.py", "--quick")
    assert printed.startswith("FSDP2, 2 processes")
    found = rows(printed)
    assert found["after attacked"][0] > found["before attacked"][0] + 0.15
    assert found["after clean"][0] > 0.5


def test_the_diff_in_the_docstring_is_in_the_code():
    check_diff(docstring("in_fsdp"), "in_fsdp")


def test_without_torchrun_the_example_is_a_group_of_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("in_fsdp")
    with patch.dict(os.environ):
        os.environ.pop("RANK", None)
        assert example.start() == (0, 1)
    dist.destroy_process_group()


@functools.cache
def scale():
    """Return what benchmarks/scale.py prints."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        printed = io.StringIO()
        with redirect_stdout(printed):
            importlib.import_module("scale").main()
    return printed.getvalue()


def test_the_tables_of_the_page_are_what_the_script_prints():
    page = (ROOT / "docs" / "scale.md").read_text()
    tables = [block for block in scale().split("\n\n") if block.startswith("|")]
    assert len(tables) >= 5
    for table in tables:
        assert table.strip() in page
    in_page = [block for block in page.split("\n\n") if block.startswith("|")]
    assert len(in_page) == len(tables)


def test_the_matrices_kept_are_those_of_the_loss():
    """The page's rows against the library itself, not the script."""
    saved = {}
    adv, ref = (torch.rand(64, 1000) + 20 for _ in range(2))
    adv.requires_grad_()
    target = torch.zeros(64, dtype=torch.int64)

    def pack(tensor):
        if tensor.numel() >= adv.numel():
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = DirichletAlignLoss()(adv, ref, target)
    assert loss.requires_grad
    assert f"| DirichletAlignLoss, with its logits | {len(saved)} |" in scale()
