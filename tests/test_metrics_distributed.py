"""Two processes, one of which sees nothing, agree with one."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from calibclip import metrics

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(101, 6, generator=GENERATOR)
TARGET = torch.randint(6, (101,), generator=GENERATOR)
# Rows of the updates of each process: uneven, one process with nothing at all, or with both.
SPLITS = {
    "one empty": [[(0, 101)], []],
    "uneven": [[(0, 7), (7, 8)], [(8, 90), (90, 90), (90, 101)]],
    "first empty": [[], [(0, 50), (50, 101)]],
    "both empty": [[], []],
}


def group():
    return metrics.MetricGroup(
        {
            "accuracy": metrics.Accuracy(),
            "nll": metrics.NegativeLogLikelihood(),
            "brier": metrics.BrierDecomposition(),
            "ece": metrics.ExpectedCalibrationError(),
            "mass": metrics.ExpectedCalibrationError(binning="mass"),
            "classwise": metrics.ClasswiseCalibrationError(n_classes=6),
            "table": metrics.Reliability(),
        }
    )


def filled(parts):
    filled = group()
    for first, last in parts:
        filled.update(logits=LOGITS[first:last], target=TARGET[first:last])
    return filled


def worker(rank, size, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=size)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *given, **named: (calls.append(1), all_reduce(*given, **named))
    found = {}
    for name, split in SPLITS.items():
        mine = filled(split[rank])
        before = len(calls)
        values = mine.compute()
        reduced = len(calls) - before
        # To share is not to keep: the second time gives the same, alone gives one's own.
        again, alone = mine.compute(), mine.compute(sync=False)
        ece = mine["ece"].compute(), mine["ece"].compute(dist.group.WORLD)
        found[name] = (values, reduced, again, alone, ece)
    try:
        metrics.ClasswiseCalibrationError().compute()
    except ValueError as error:
        found["error"] = str(error)
    shift = metrics.UncertaintyShift(ranks=True)
    if rank == 1:
        for rows in (slice(0, 40), slice(40, 101)):
            shift.update(LOGITS[rows, 0], LOGITS[rows, 1] + 1e6)
    found["shift"] = shift.compute()
    classes = torch.arange(2 + rank)
    kernel = metrics.KernelCalibrationError(block_size=2)
    try:
        kernel.update(torch.eye(2 + rank), target=classes).compute()
    except ValueError as error:
        found["classes"] = str(error)
    torch.save(found, f"{path}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(2, str(path)), nprocs=2)
    return [torch.load(path / str(rank), weights_only=False) for rank in range(2)]


def test_the_number_of_classes_must_be_known(found):
    for rank in range(2):
        assert found[rank]["error"].startswith(
            "n_classes: expected the number of classes, got None"
        )


def test_moments_reach_a_process_without_a_sample(found):
    expected = metrics.uncertainty_shift(LOGITS[:, 0], LOGITS[:, 1] + 1e6)
    for rank in range(2):
        shared = found[rank]["shift"]
        assert shared.count == 101
        for name in ("mean", "median", "standard_deviation", "effect_size"):
            assert getattr(shared, name) == pytest.approx(getattr(expected, name), rel=1e-9)


def test_processes_of_different_numbers_of_classes(found):
    for rank in range(2):
        assert found[rank]["classes"] == "probs, logits: expected 2 classes, as before, got 3"


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_are_one(found, split):
    expected = filled([part for parts in SPLITS[split] for part in parts]).compute()
    for rank in range(2):
        values, reduced, again, alone, ece = found[rank][split]
        assert reduced == 1
        assert str(again) == str(values)
        for name in expected:
            if name == "table":
                assert values[name].count.tolist() == expected[name].count.tolist()
                assert values[name].accuracy.tolist() == pytest.approx(
                    expected[name].accuracy.tolist(), abs=0, nan_ok=True
                )
            else:
                assert values[name] == pytest.approx(expected[name], abs=1e-12, nan_ok=True)
        assert values["accuracy"] == expected["accuracy"] or split == "both empty"
        assert ece[0] == pytest.approx(expected["ece"], abs=1e-12, nan_ok=True)
        assert str(ece[1]) == str(ece[0])
        own = filled(SPLITS[split][rank]).compute()
        assert alone["nll"] == pytest.approx(own["nll"], abs=0, nan_ok=True)
        assert math.isnan(alone["nll"]) == (not SPLITS[split][rank])
