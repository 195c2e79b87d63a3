"""Square attack: random search over square patches, without a gradient."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calibclip._checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_target,
    wrong,
)
from calibclip.attacks._arguments import check_bounds, check_eps, check_images, draw_seed
from calibclip.attacks._model import (
    AttackedModel,
    Iterate,
    Labels,
    attacked_by_margin,
    undisturbed,
)
from calibclip.attacks.result import AttackResult, nothing_to_attack
from calibclip.attacks.threat import FeasibleSet, per_sample, sample_keys, stream_seed

# Queries, of 10 000, after which the share of the image that a patch covers is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries for which a sample's random numbers are drawn at once.
_BLOCK = 128


@dataclass(frozen=True)
class Square:
    r"""Square attack: a score-based search that no masking of gradients can mislead.

    It starts at vertical stripes of :math:`\pm\varepsilon`. Each query sets a square patch, at a
    random place and with a random sign in each channel, to :math:`x \pm \varepsilon`, and keeps it
    if the lead of the best wrong class grows. The patch covers a share ``p_init`` of the image at
    first, which is halved at fixed shares of the queries. A sample ends at its first success.

    Weaker than an attack that follows the gradient: what it is for is to show that gradients are
    masked, when it breaks what they could not. A sample's random numbers depend on ``seed`` and
    its own pixels only; each image is within ``eps`` and ``bounds`` exactly.

    Args:
        eps: Radius of the ball, >= 0, in the units of the images.
        queries: Forward passes per sample at most, >= 1, the start included.
        norm: ``"linf"``; the attack for "l2" is another algorithm, which is not here.
        p_init: Share of the image that the first patches cover, in (0, 1].
        bounds: Lowest and highest pixel value.
        targeted: Move towards ``target`` instead of away from it, still by the margin. (The
            published targeted attack goes by cross-entropy.)
        seed: Seed of the search, >= 0, unless a generator is passed.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> attack = Square(eps=0.1, queries=50)
        >>> result = attack(lambda x: x @ weight, torch.tensor([[0.5, 0.4]]), torch.tensor([1]))
        >>> result.images
        tensor([[0.4000, 0.5000]])

    References:
        Andriushchenko et al. (2020), Square attack: a query-efficient black-box adversarial attack
        via random search, algorithms 1 and 2, https://arxiv.org/abs/1912.00049
    """

    eps: float
    queries: int = 5000
    norm: str = "linf"
    p_init: float = 0.8
    bounds: tuple[float, float] = (0.0, 1.0)
    targeted: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf",))
        bounds = check_bounds(self.bounds)
        checked = {
            "eps": check_eps(self.eps, self.norm, bounds),
            "queries": check_count("queries", self.queries, at_least=1),
            "p_init": check_number("p_init", self.p_init, above=0),
            "bounds": bounds,
            "seed": check_count("seed", self.seed, at_least=0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.p_init > 1:
            raise ValueError(wrong("p_init", "a number > 0 and <= 1", self.p_init))
        check_flag("targeted", self.targeted)

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: Callable from images to logits ``(B, K)``. No gradient is taken.
            images: Clean images, shape ``(B, C, H, W)``, or ``(B, D)`` as rows of one pixel's
                height. Not modified.
            target: Shape ``(B,)``, int64: true classes, or with ``targeted`` the wanted ones.
            generator: Source of this call's seed; it advances, so that calls differ.

        Returns:
            The images of largest lead, the first success where there is one. ``loss`` is the
            margin, ``steps_to_success`` the number of queries before the successful one, or -1.

        Raises:
            TypeError: An argument, or what the model returned, has the wrong type.
            ValueError: Images outside ``bounds``, classes out of range, or a wrong shape.
        """
        clean = check_images(images, self.bounds)
        target = check_target(target, len(clean), None, clean.device).clone()
        attacked = attacked_by_margin(model, target, targeted=self.targeted)
        if clean.ndim not in (2, 4):
            expected = "shape (B, C, H, W) or (B, D)"
            raise ValueError(wrong("images", expected, f"shape {tuple(clean.shape)}"))
        seed = draw_seed(generator, self.seed)
        if len(clean) == 0:
            return nothing_to_attack(clean)
        feasible = FeasibleSet(clean, self.eps, self.norm, self.bounds)
        with undisturbed(model), torch.no_grad():
            found = self._search(attacked, feasible, target, seed)
        return AttackResult(
            images=found.best.images,
            success=found.best.fooled,
            loss=found.best.loss,
            steps_to_success=found.queries.masked_fill(~found.best.fooled, -1),
            n_forward=attacked.n_forward,
            n_backward=0,
            forward_images=attacked.forward_images,
        )

    def _search(
        self, attacked: AttackedModel, feasible: FeasibleSet, target: Tensor, seed: int
    ) -> _Samples:
        keys = torch.tensor(sample_keys(feasible.images))
        live = _Samples.start(attacked, feasible, keys, target, seed)
        index = torch.arange(len(target), device=target.device)
        found = live
        noise = None
        for query in range(1, self.queries):
            # Samples leave once an eighth of the batch is broken: closing ranks copies images.
            broken = int(live.best.fooled.sum())
            if broken == len(index):
                break
            if 8 * broken >= len(index):
                found = found.replace_rows(index, live)
                rows = (~live.best.fooled).nonzero().flatten()
                index, live = index[rows], live.rows(rows)
                noise = None if noise is None else _Noise(*(part[rows] for part in noise))
            block, place = divmod(query - 1, _BLOCK)
            if noise is None or place == 0:
                noise = _Noise.draw(seed, live.keys, block, live.feasible.images)
            side = patch_side(query, self, live.feasible.images)
            live = live.query(attacked, noise, place, side, query)
        return found.replace_rows(index, live)


def patch_side(query: int, attack: Square, images: Tensor) -> int:
    """Return the side of the patch of a query, in pixels.

    Args:
        query: Its number, >= 1.
        attack: For its ``queries`` and ``p_init``.
        images: Shape ``(B, C, H, W)`` or ``(B, D)``; only the size is used.

    Returns:
        A number >= 1. A patch is cut to the size of the image.

    Example:
        >>> attack, images = Square(0.1, queries=10000), torch.zeros(1, 3, 32, 32)
        >>> [patch_side(query, attack, images) for query in (1, 9999)]
        [29, 1]
    """
    elapsed = int(query / attack.queries * 10_000)
    share = attack.p_init / 2 ** bisect_left(_HALVINGS, elapsed)
    return max(round((share * images.shape[-1] * _height(images)) ** 0.5), 1)


class _Noise(NamedTuple):
    """Random numbers for a block of queries, a row per sample: places (0 to 1) and signs."""

    places: Tensor  # (B, _BLOCK, 2)
    rises: Tensor  # (B, _BLOCK, C), bool

    @staticmethod
    def draw(seed: int, keys: Tensor, block: int, images: Tensor) -> _Noise:
        channels = images.shape[1] if images.ndim == 4 else 1
        drawn = _uniform(seed, keys, block + 1, (_BLOCK, 2 + channels), images.device)
        return _Noise(drawn[..., :2], drawn[..., 2:] < 0.5)


class _Samples(NamedTuple):
    """The samples of a batch: what is searched, and the best so far."""

    feasible: FeasibleSet
    keys: Tensor  # on the host
    target: Tensor
    best: Iterate
    queries: Tensor  # before the best was found

    @staticmethod
    def start(
        attacked: AttackedModel, feasible: FeasibleSet, keys: Tensor, target: Tensor, seed: int
    ) -> _Samples:
        """Begin at vertical stripes."""
        clean = feasible.images
        shape = (clean.shape[1], 1, clean.shape[3]) if clean.ndim == 4 else (clean.shape[1],)
        rises = _uniform(seed, keys, 0, shape, clean.device) < 0.5
        points = torch.where(rises, _bound(feasible.upper), _bound(feasible.lower))
        best = attacked.judge(points, Labels(target, None))
        return _Samples(feasible, keys, target, best, torch.zeros_like(target))

    def query(
        self, attacked: AttackedModel, noise: _Noise, place: int, side: int, query: int
    ) -> _Samples:
        """Try a patch on every sample that is not broken, and keep it where it helps."""
        points = self.best.images
        shape = points.shape if points.ndim == 4 else (len(points), 1, 1, points.shape[1])
        inside = _patch(noise.places[:, place], side, shape)
        rises = noise.rises[:, place].view(*shape[:2], 1, 1)
        lower, upper = (
            _bound(bound).view(shape) for bound in (self.feasible.lower, self.feasible.upper)
        )
        patched = torch.where(inside, torch.where(rises, upper, lower), points.view(shape))
        tried = attacked.judge(patched.view(points.shape), Labels(self.target, None))
        better = (tried.rank > self.best.rank) & ~self.best.fooled
        best = Iterate(
            *(
                torch.where(per_sample(better, new), new, old)
                for new, old in zip(tried, self.best, strict=True)
            )
        )
        return self._replace(best=best, queries=self.queries.masked_fill(better, query))

    def rows(self, index: Tensor) -> _Samples:
        return _Samples(
            self.feasible.with_rows(lambda tensor: tensor[index]),
            self.keys[index.cpu()],
            self.target[index],
            Iterate(*(field[index] for field in self.best)),
            self.queries[index],
        )

    def replace_rows(self, index: Tensor, others: _Samples) -> _Samples:
        """Put the best of others in the place of some rows."""
        pairs = zip(self.best, others.best, strict=True)
        best = Iterate(*(mine.index_copy(0, index, theirs) for mine, theirs in pairs))
        return self._replace(best=best, queries=self.queries.index_copy(0, index, others.queries))


def _uniform(
    seed: int, keys: Tensor, block: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draw numbers in [0, 1) for each sample from a stream of its own."""
    drawn = torch.empty(len(keys), *shape, device=device)
    generator = torch.Generator(device=device)
    for row, key in zip(drawn, keys.tolist(), strict=True):
        generator.manual_seed(stream_seed(seed, key, block))
        row.uniform_(generator=generator)
    return drawn


def _patch(places: Tensor, side: int, shape: tuple[int, ...]) -> Tensor:
    """Return where the patches are, shape ``(B, 1, H, W)``, bool."""
    inside = []
    for axis, size in enumerate(shape[2:]):
        length = min(side, size)
        first = (places[:, axis : axis + 1] * (size - length + 1)).long().clamp(max=size - length)
        offset = torch.arange(size, device=places.device) - first
        inside.append((offset >= 0) & (offset < length))
    rows, columns = inside
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def _bound(bound: Tensor | None) -> Tensor:
    if bound is None:
        raise TypeError("the set has no bounds")
    return bound


def _height(images: Tensor) -> int:
    return images.shape[2] if images.ndim == 4 else 1
