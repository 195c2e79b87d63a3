"""Models to attack in tests: a toy whose rows never mix, and a module with much to disturb."""

import copy
import random

import numpy as np
import torch
from torch import nn

SHAPE = (2, 3, 3)
N_CLASSES = 4


class RowWise:
    """A smooth two-layer classifier of elementwise products and row sums.

    No matrix product: the result for a row is the same bits whatever else is in the batch. With
    ``torch.sin`` and a large ``gain`` its landscape has hills on the scale of 1/255.
    """

    def __init__(
        self,
        seed=0,
        dtype=torch.float64,
        n_classes=N_CLASSES,
        *,
        shape=SHAPE,
        activation=torch.tanh,
        gain=2.0,
    ):
        generator = torch.Generator().manual_seed(seed)
        n_pixels = int(np.prod(shape))
        self.hidden = gain * torch.randn(6, n_pixels, generator=generator).to(dtype)
        self.output = 2 * torch.randn(n_classes, 6, generator=generator).to(dtype)
        self.activation = activation
        self.visited = []

    def __call__(self, images):
        self.visited.append(images.detach().clone())
        pixels = images.flatten(1).unsqueeze(1) - 0.5
        features = self.activation((pixels * self.hidden).sum(-1)).unsqueeze(1)
        return (features * self.output).sum(-1)


class Busy(nn.Module):
    """A module with everything an attack could disturb."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(SHAPE[0], 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen_norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * SHAPE[1] * SHAPE[2], N_CLASSES)
        self.modes = []
        self.fail_at = None

    def forward(self, images):
        self.modes.append([module.training for module in self.modules()])
        if len(self.modes) == self.fail_at:
            raise RuntimeError("the model failed")
        features = self.frozen_norm(self.norm(self.conv(images)).relu())
        return self.head(self.dropout(features).flatten(1))


def busy_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Busy().train()
        model.frozen_norm.eval()
        model.conv.bias.requires_grad_(False)
        model.conv.weight.grad = torch.randn_like(model.conv.weight)
    return model


def snapshot(model):
    return (
        copy.deepcopy(model.state_dict()),
        [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),  # noqa: NPY002
        random.getstate(),
    )


def assert_unchanged(model, before):
    state, gradients, *flags = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter, (same, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is same
        assert value is None or torch.equal(parameter.grad, value)
    after = snapshot(model)[2:]
    assert after[:2] == tuple(flags[:2])
    assert torch.equal(after[2], flags[2])
    assert np.array_equal(after[3], flags[3])
    assert after[4] == flags[4]
