"""Adversarial training: learns from images attacked beforehand, or anew in every batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.fit import Fit, Objective
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Ball, rowwise

Mode = Literal["fast", "pgd", "fgsm", "static"]
WATCHED = 16
"""So many images of each batch tell whether one step still stands for many."""

GROWN = 0.2
"""The attack has its whole radius once a network knows this share of what chance leaves of a batch."""


@defense(
    "Adversarial training",
    paper="arXiv:1706.06083",
    kind="training",
    counters=("fgsm", "bim", "pgd", "apgd", "deepfool", "cw-linf", "square", "hopskipjump", "uap", "substitute"),
    adaptive="autoattack",
)
def adversarial_training(
    fit: Fit,
    *,
    mode: Mode = "fast",
    eps: float = 8 / 255,
    norm: Literal["inf", "2"] = "inf",
    steps: int = 7,
    share: float = 0.5,
) -> Fit:
    """Train on images that are attacked within ``eps`` of ``norm``, pixel units of [0, 1].

    ``pgd`` attacks each batch by ``steps`` steps from a random start (Madry et al. 2018). ``fast`` takes one step of
    1.25 ``eps`` from a random start (Wong et al. 2020, arXiv:2001.03994); where a few images of the batch show that
    the network has learned to hide from one step (catastrophic overfitting), that batch is attacked by ``steps``.
    ``fgsm`` adds ``share`` of the loss on images of one step without a random start, away from the predicted class
    (Goodfellow et al. 2015, arXiv:1412.6572; Kurakin et al. 2017, arXiv:1611.01236). ``static`` attacks an
    undefended network once, and trains on its images and those together: the brute force of the review.

    Departs from the papers at the start: while a network knows little more of a batch than chance does, ``pgd`` and
    ``fast`` attack within a part of ``eps``. At a large radius it would else never learn but to say the same always.
    """
    ball = Ball(INF if norm == "inf" else 2.0, eps)
    if mode == "static":
        return Static(**vars(fit), ball=ball, steps=steps)
    return replace(fit, loss=_LOSSES[mode](ball, steps, share), name=f"{fit.name}, {mode}")


def _pgd(ball: Ball, steps: int, share: float) -> Objective:
    def loss(module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        near = _grown(ball, module, x, y)
        return F.cross_entropy(module(climbed(module, x, wrong(y), near, near.sample(x, rng), steps)), y)

    return loss


def _fast(ball: Ball, steps: int, share: float) -> Objective:
    def loss(module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        near = _grown(ball, module, x, y)
        start = near.sample(x, rng)
        adv = climbed(module, x, wrong(y), near, start, 1, stride=1.25)
        few = slice(0, WATCHED)
        many = climbed(module, x[few], wrong(y[few]), near, start[few], 5)
        if _right(module, many, y[few]) < 0.5 * _right(module, adv[few], y[few]):
            adv = climbed(module, x, wrong(y), near, start, steps)
        return F.cross_entropy(module(adv), y)

    return loss


def _fgsm(ball: Ball, steps: int, share: float) -> Objective:
    def loss(module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        with torch.no_grad():
            said = module(x).argmax(1)
        adv = climbed(module, x, wrong(said), ball, x, 1, stride=1.0)
        return (1 - share) * F.cross_entropy(module(x), y) + share * F.cross_entropy(module(adv), y)

    return loss


_LOSSES = {"pgd": _pgd, "fast": _fast, "fgsm": _fgsm}


@dataclass(frozen=True)
class Static(Fit):
    """Trains a network, attacks it on all images, and trains another on both."""

    ball: Ball = field(default_factory=lambda: Ball(INF, 8 / 255))
    steps: int = 7

    def __call__(
        self,
        images: Images,
        seed: int = 0,
        *,
        classes: int,
        start: nn.Module | None = None,
        checkpoint: Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Target:
        """See `Fit`; twice the work of the recipe itself, and the attack."""
        plain = Fit(**{key: value for key, value in vars(self).items() if key not in ("ball", "steps")})
        first = None if checkpoint is None else checkpoint.with_name(f"first-{checkpoint.name}")
        target = plain(images, seed, classes=classes, checkpoint=first, progress=progress)
        assert target.module is not None
        attacked = []
        for part in torch.split(torch.arange(len(images), device=images.x.device), target.batch):
            x, rng = images.x[part], Rng.of(seed, images.index[part], "static")
            adv = climbed(target.module, x, wrong(images.y[part]), self.ball, self.ball.sample(x, rng), self.steps)
            attacked.append(adv)
        both = replace(
            images,
            x=torch.cat([images.x, *attacked]),
            y=images.y.repeat(2),
            index=torch.cat([images.index, images.index + (1 << 38)]),
        )
        return replace(plain, name=f"{self.name}, static")(
            both, seed, classes=classes, start=start, checkpoint=checkpoint, progress=progress
        )


def wrong(y: Tensor) -> Callable[[Tensor], Tensor]:
    """What an attacker climbs: the cross-entropy of the labels ``y`` (n,), summed over the batch."""
    return lambda scores: F.cross_entropy(scores, y, reduction="sum")


def climbed(
    module: nn.Module,
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    ball: Ball,
    start: Tensor,
    steps: int,
    stride: float = 2.5,
) -> Tensor:
    """``start`` after ``steps`` steps of ``stride * eps / steps`` up ``objective`` of the scores, in the ball around x.

    Batch normalization is as it will be deployed meanwhile.
    """
    trains, adv = module.training, start
    module.eval()
    for _ in range(steps):
        leaf = adv.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(objective(module(leaf)), leaf)
        step = ball.steepest(grad) * rowwise(torch.full_like(x[:, 0, 0, 0], stride * float(ball.eps) / steps), x)
        adv = ball.project(adv + step, x)
    module.train(trains)
    return adv.detach()


def _grown(ball: Ball, module: nn.Module, x: Tensor, y: Tensor) -> Ball:
    """The part of ``ball`` that a network may be attacked in that knows so much of the images: a tenth at least."""
    scores = _scores(module, x)
    chance = 1 / scores.shape[1]
    known = (float((scores.argmax(1) == y).float().mean()) - chance) / (1 - chance)
    return ball.sized(float(ball.eps) * min(1.0, max(0.1, known / GROWN)))


def _right(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """The accuracy as deployed."""
    return float((_scores(module, x).argmax(1) == y).float().mean())


def _scores(module: nn.Module, x: Tensor) -> Tensor:
    """The scores as deployed."""
    trains = module.training
    module.eval()
    with torch.no_grad():
        scores: Tensor = module(x)
    module.train(trains)
    return scores
