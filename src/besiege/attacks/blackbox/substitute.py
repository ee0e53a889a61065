"""Substitute: a network learns the target's labels, and what fools it is tried on the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.method import universal
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access, Ball, rowwise
from besiege.core.trigger import Trigger, moved


@universal("Substitute", paper="arXiv:1602.02697", norms=(2, INF), access=Access.LABELS, targeted=True, transfers=True)
def substitute(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    search: Literal["momentum", "fgsm"] = "momentum",
    own: int = 150,
    rounds: int = 6,
    epochs: int = 10,
    batch: int = 128,
    lr: float = 1e-3,
    stride: float = 0.1,
    flip: int = 3,
    steps: int = 10,
    copies: int = 12,
) -> Trigger:
    """Learn the target's labels of ``own`` images and of what they grow into in ``rounds`` (Papernot et al. 2017).

    A round trains the network for ``epochs`` on all images so far, then doubles them: each gets a twin that lies
    ``stride`` along the sign of the slope of the class that the target gave it, forward for ``flip`` rounds, then as
    many backward. The target is asked once about each, which is ``own`` times 2 to the power of ``rounds - 1`` labels.

    ``search="fgsm"`` is the paper's single step on the substitute. Departs from it by default: ``search="momentum"``
    takes ``steps`` of the momentum iterative method (Dong et al. 2018, arXiv:1710.06081) along the mean slope at
    ``copies`` of the image under noise twice as large as the ball (Wu et al. 2018, arXiv:1802.09707). What the
    substitute alone would fall for counts less, and more of it transfers.
    """
    rows = rng.rand().argsort()[:own]
    images = x[rows]
    labels = oracle.labels(images, rows)
    seed = int(rng.below(1 << 31)[0])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _network(x.shape[1:], oracle.classes).to(x.device)
        optimizer = torch.optim.Adam(network.parameters(), lr)
        for k in range(rounds):
            for part in (part for _ in range(epochs) for part in torch.randperm(len(images)).split(batch)):
                optimizer.zero_grad()
                F.cross_entropy(network(images[part].float()), labels[part]).backward()
                optimizer.step()
            if k < rounds - 1:
                way = -stride if k // max(flip, 1) % 2 else stride
                twins = (images + way * _slope(network, images.float(), labels).sign().to(images)).clamp(0, 1)
                images, rows = torch.cat([images, twins]), rows.repeat(2)
                labels = torch.cat([labels, oracle.labels(twins, rows[len(twins) :])])
    goal = int(oracle.goal.labels[0]) if oracle.goal.targeted else None
    network.double().requires_grad_(False)
    if search == "fgsm":
        return Transferred(network, ball, goal, 1, torch.zeros_like(x[:1]).double())
    noise = 2 * rng.stream(0).rand(max(copies, 1), *x.shape[1:]).to(x).double() - 1
    return Transferred(network, ball, goal, steps, noise * rowwise(2 * ball.eps / ball.size(noise), noise))


@dataclass(frozen=True, eq=False)
class Transferred:
    """Moves images (n, c, h, w) within ``ball`` out of the class that ``network`` sees, or into ``goal``.

    A slope is the mean over ``noise`` (m, c, h, w) added to the image.
    """

    network: nn.Module
    ball: Ball
    goal: int | None
    steps: int
    noise: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The images after ``steps`` steps of equal length that end on the edge of the ball."""
        origin, adv = x.double(), x.double()
        labels = self.network(origin).argmax(1) if self.goal is None else origin.new_full((len(x),), self.goal).long()
        away, momentum = 1.0 if self.goal is None else -1.0, torch.zeros_like(adv)
        for _ in range(self.steps):
            slope = away * torch.stack([_loss_slope(self.network, adv + part, labels) for part in self.noise]).mean(0)
            momentum += slope / rowwise(slope.abs().flatten(1).sum(1).clamp_min(1e-300), slope)
            adv = self.ball.project(adv + self.ball.eps / self.steps * self.ball.steepest(momentum), origin)
        return moved(x, adv - origin)


def _network(shape: torch.Size, classes: int) -> nn.Sequential:
    c, h, w = shape
    return nn.Sequential(
        *(nn.Conv2d(c, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * -(-h // 4) * -(-w // 4), 100), nn.ReLU(), nn.Linear(100, classes)),
    )


def _slope(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the score of each image's class."""
    leaf = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(network(leaf).gather(1, labels[:, None]).sum(), leaf)
    return slope


def _loss_slope(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(leaf), labels, reduction="sum"), leaf)
    return slope
