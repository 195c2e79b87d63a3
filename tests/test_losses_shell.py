"""What the modules and functions of all losses are built on."""

import pytest
import torch

from calibclip import DirichletAlignLoss, DistillationLoss, TRADESLoss
from calibclip.losses._shell import cross_entropies


def test_no_label_is_skipped_where_labels_are_not_looked_at():
    """PyTorch would leave a label of -100 out; on an accelerator nobody else would notice."""
    with pytest.raises(IndexError, match="-100"):
        cross_entropies(torch.zeros(2, 3), torch.tensor([-100, 0]))


def test_an_option_is_checked_whenever_it_is_set():
    loss = TRADESLoss()
    loss.weight = 3
    assert loss.options["weight"] == 3.0
    for name, value in (("weight", -1.0), ("weight", None), ("reduction", "avg")):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            setattr(loss, name, value)
    assert loss.options["weight"] == 3.0


def test_labels_in_the_place_of_logits_are_recognised():
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    for call in (
        lambda: DirichletAlignLoss()(logits, target, logits),
        lambda: DistillationLoss()(logits, logits, target),
    ):
        with pytest.raises(TypeError, match=r"^logits_ref: .*; labels go in target$"):
            call()
