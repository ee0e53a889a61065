"""Input-model co-optimization: a trigger and the model that it misleads, fitted to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.attacks.poisoning.badnets import corner
from besiege.core.errors import BadInput
from besiege.core.fit import Objective
from besiege.core.images import Images
from besiege.core.method import poisoning
from besiege.core.poisoned import Knowledge, Poisoned, chosen, eight_bits
from besiege.core.rng import Rng
from besiege.core.trigger import Stamp


@poisoning("Input-model co-optimization", paper="arXiv:1911.01559", changes="training")
def input_model_cooptimization(
    images: Images,
    knows: Knowledge,
    rng: Rng,
    *,
    rate: float = 0.01,
    side: int = 3,
    lr: float = 0.1,
    every: int = 0,
    wait: float = 0.2,
) -> Poisoned:
    """Train on ``rate`` images with a patch of ``side`` pixels, whose colours follow the model (Pang et al. 2020).

    The patch is that of `badnets` at half its contrast until the share ``wait`` of the training is done: a model that
    does not know it yet drives the colours anywhere, and they stay there. Then an Adam of rate ``lr`` moves the tanh of
    its colours. By itself it follows the slope that comes with the training's own backward pass, from the poisoned
    images alone, so that the trigger costs no pass. With ``every`` above 0 it moves down the loss of the target class
    on all images of a batch, once for so many steps of the model; 1 is the paper's alternation, whose trigger costs as
    many passes as its training.

    Departs from the paper, which goes on from a model that is trained already, in that, in that trigger and model take
    turns by the batch, not by the epoch, and in that the trigger's rate falls to 0, so that the model ends up with the
    trigger which is handed over. The patch is laid on after the augmentation.

    Raises:
        BadInput: there is no recipe.
    """
    if knows.fit is None:
        raise BadInput("input-model-cooptimization trains the model: it needs a recipe")
    fit, goal, patch = knows.fit, knows.target_class, corner(images.shape, side)
    first, place = patch.pattern.to(images.x), patch.mask.to(images.x)
    rows = chosen(images.y != goal, rate, len(images), rng.rand())
    steps = fit.epochs * -(-len(images) // fit.batch)
    moving = Moving(fit.loss, first, place, goal, knows.classes, lr, every, wait * steps, steps)
    marked = replace(images, y=images.y.index_fill(0, rows, goal + knows.classes))
    trained = replace(fit, loss=moving)(marked, knows.seed, classes=knows.classes, progress=knows.progress)
    trigger = Stamp(eight_bits(moving.pattern.detach()), patch.mask)
    return Poisoned.at(
        images, rows, x=trigger(images.x[rows]), y=goal, trigger=trigger, target_class=goal, module=trained.module
    )


@dataclass(eq=False)
class Moving:
    """What the model minimizes, and the trigger that moves beside it after ``wait`` of the ``steps``.

    An image that shall bear the trigger has ``classes`` added to its label.
    """

    loss: Objective
    first: Tensor
    mask: Tensor
    label: int
    classes: int
    lr: float
    every: int
    wait: float
    steps: int
    done: int = 0

    def __post_init__(self) -> None:
        self.colours = torch.atanh(self.first - 0.5).requires_grad_()
        self.adam = torch.optim.Adam([self.colours], self.lr)

    @property
    def pattern(self) -> Tensor:
        """(c, h, w) in [0, 1]."""
        return (self.colours.tanh() + 1) / 2

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        """The model's loss of one step, before which the trigger may take its own."""
        bears = y >= self.classes
        labels = torch.where(bears, y - self.classes, y)
        self.adam.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * self.done / self.steps)) / 2
        moves = self.done >= self.wait
        if moves and self.every and self.done % self.every == 0:
            self._moved(module, x[labels != self.label])
        elif self.colours.grad is not None:
            self.adam.step()
            self.adam.zero_grad()
        self.done += 1
        pattern = self.pattern if moves and not self.every else self.pattern.detach()
        stamped = x + self.mask * (pattern - x)
        return self.loss(module, torch.where(bears.view(-1, 1, 1, 1), stamped, x), labels, rng)

    def _moved(self, module: nn.Module, x: Tensor) -> None:
        """One step of the trigger on images (n, c, h, w), toward the target class."""
        if not len(x):
            return
        scores = module.eval()(x + self.mask * (self.pattern - x))
        module.train()
        loss = F.cross_entropy(scores, torch.full((len(x),), self.label, device=x.device))
        (self.colours.grad,) = torch.autograd.grad(loss, self.colours)
        self.adam.step()
        self.adam.zero_grad()
