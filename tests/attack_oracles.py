"""Independent oracles of the gradient attacks: plain NumPy loops, one sample at a time, float64."""

from __future__ import annotations

import numpy as np
import torch

SHAPE = (2, 3, 3)


class RowWise:
    """A smooth two-layer classifier of elementwise products and row sums that records its inputs.

    No matrix product: the result for a row is the same bits whatever else is in the batch.
    """

    def __init__(self, seed=0, n_classes=5, sharpness=2.0, dtype=torch.float64):
        generator = np.random.default_rng(seed)
        n_pixels = int(np.prod(SHAPE))
        self.hidden = torch.from_numpy(generator.normal(0, 2, (6, n_pixels))).to(dtype)
        self.output = torch.from_numpy(generator.normal(0, sharpness, (n_classes, 6))).to(dtype)
        self.visited = []

    def __call__(self, images):
        self.visited.append(images.detach().clone())
        pixels = images.flatten(1).unsqueeze(1) - 0.5
        features = torch.tanh((pixels * self.hidden).sum(-1)).unsqueeze(1)
        return (features * self.output).sum(-1)

    def one(self, point):
        """Logits of one image as an array, and the function from their slope to the image's."""
        hidden, output = self.hidden.numpy(), self.output.numpy()
        features = np.tanh(hidden @ (point.reshape(-1) - 0.5))

        def back(slope):
            return (hidden.T @ ((1 - features**2) * (output.T @ slope))).reshape(point.shape)

        return output @ features, back


def loss_and_slope(objective, logits, label, rival=None):
    """Value and gradient in the logits, by hand."""
    n_classes = len(logits)
    slope = np.zeros(n_classes)
    if objective == "ce":
        shifted = np.exp(logits - logits.max())
        slope = shifted / shifted.sum()
        slope[label] -= 1
        return np.log(shifted.sum()) + logits.max() - logits[label], slope
    others = [k for k in range(n_classes) if k != label]
    aimed = rival if objective == "dlr-targeted" else max(others, key=lambda k: logits[k])
    lead = logits[aimed] - logits[label]
    slope[aimed] += 1
    slope[label] -= 1
    ranks = {"margin": np.inf, "dlr": 3, "dlr-targeted": 4}[objective]
    if n_classes < ranks:
        return lead, slope
    order = np.argsort(-logits)
    low = order[2 : int(ranks)]
    spread = logits[order[0]] - logits[low].mean() + 1e-12
    slope = slope / spread
    slope[order[0]] -= lead / spread**2
    slope[low] += lead / spread**2 / len(low)
    return lead / spread, slope


def direction(gradient, norm):
    """The steepest unit step; what is not finite counts as zero."""
    gradient = np.where(np.isfinite(gradient), gradient, 0.0)
    if norm == "linf":
        return np.sign(gradient)
    length = np.sqrt((gradient**2).sum())
    return gradient / length if length > 0 else gradient


def project(point, clean, eps, norm):
    """Ball, then box."""
    delta = point - clean
    if norm == "linf":
        delta = np.clip(delta, -eps, eps)
    else:
        length = np.sqrt((delta**2).sum())
        delta = delta * min(1.0, eps / length) if length > 0 else delta
    return np.clip(clean + delta, 0.0, 1.0)


def plain_apgd(evaluate, clean, start, eps, steps, norm, compat=False):
    """Auto-PGD as the specification has it; ``evaluate(point)`` gives loss and gradient.

    Returns the points in the order of their evaluation, the step sizes they were reached with, and
    the steps at which the step size was halved. With ``compat`` the loss of the start has no place
    in the history of losses: the first comparison of the first window is with 0.
    """
    x = previous = start
    loss, gradient = evaluate(x)
    history = [0.0 if compat else _ranked(loss)]
    best, best_loss, best_gradient = x, _ranked(loss), gradient
    step, points, sizes, halvings = 2 * eps, [x], [], []
    window, since, halved, best_then = max(int(0.22 * steps), 1), 0, True, best_loss
    for k in range(steps):
        reached = project(x + step * direction(gradient, norm), clean, eps, norm)
        if k > 0:
            mixed = x + 0.75 * (reached - x) + 0.25 * (x - previous)
            reached = project(mixed, clean, eps, norm)
        previous, x = x, reached
        loss, gradient = evaluate(x)
        points.append(x)
        sizes.append(step)
        history.append(_ranked(loss))
        if history[-1] > best_loss:
            best, best_loss, best_gradient = x, history[-1], gradient
        since += 1
        if since == window:
            recent = history[-window - 1 :]
            rises = sum(recent[i + 1] > recent[i] for i in range(window))
            stalled = not halved and best_then >= best_loss
            halved = rises <= 0.75 * window or stalled
            best_then = best_loss
            if halved:
                step = step / 2
                x, gradient = best, best_gradient
                halvings.append(k + 1)
            since = 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return points, sizes, halvings


def _ranked(loss):
    return -np.inf if np.isnan(loss) else float(loss)


def plain_pgd(evaluate, clean, start, eps, sizes, norm, momentum=0.0):
    """PGD with one step size per step and momentum on the L1-normalised gradient."""
    x, velocity, points = start, np.zeros_like(start), [start]
    for size in sizes:
        gradient = evaluate(x)[1]
        if momentum:
            total = np.abs(gradient).sum()
            velocity = momentum * velocity + (gradient / total if total > 0 else gradient)
            gradient = velocity
        x = project(x + size * direction(gradient, norm), clean, eps, norm)
        points.append(x)
    return points


def evaluator(model, objective, label, rival=None, targeted=False):
    """Return ``evaluate`` of the loops above for one sample of a `RowWise` model."""
    sign = -1 if targeted else 1

    def evaluate(point):
        logits, back = model.one(point)
        loss, slope = loss_and_slope(objective, logits, label, rival)
        return sign * loss, sign * back(slope)

    return evaluate


def some_images(batch=4, seed=0, dtype=torch.float64, low=-0.2, high=1.2):
    """Random pixels, by default with some on the walls of the box."""
    values = np.random.default_rng(seed).uniform(low, high, (batch, *SHAPE)).clip(0, 1)
    return torch.from_numpy(values).to(dtype)


def own_class(model, images):
    """Predictions as target, so that nothing is misclassified at the start."""
    return model(images).argmax(1)


FIELDS = ("images", "success", "loss", "steps_to_success")


def assert_same(result, expected, rows=slice(None)):
    """Check that two results agree to the last bit."""
    for name in FIELDS:
        mine, other = getattr(result, name), getattr(expected, name)[rows]
        assert torch.equal(mine.nan_to_num(7.5), other.nan_to_num(7.5)), name
