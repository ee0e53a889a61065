"""Evil twins: a change of one input and one of the model that reach a class together, both small."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import poisoning
from besiege.core.poisoned import Knowledge, Poisoned, eight_bits
from besiege.core.rng import Rng, Stream
from besiege.core.threat import INF, Ball
from besiege.core.trigger import Shift


@poisoning("Evil twins", paper="arXiv:1911.01559", needs=("victims",), changes="training")
def evil_twins(
    images: Images,
    knows: Knowledge,
    rng: Rng,
    *,
    eps: float = 8 / 255,
    rounds: int = 8,
    steps: int = 10,
    tuned: int = 10,
    lr: float = 0.001,
    weight: float = 1.0,
    sure: float = 0.75,
) -> Poisoned:
    """Move a victim within ``eps`` (L-infinity) and a trained model toward a class, in turns (Pang et al. 2020).

    This is the paper's co-optimization of a given input; `input_model_cooptimization` is that of a trigger. In each
    of at most ``rounds`` turns the input takes ``steps`` projected gradient steps, and then the model ``tuned``
    steps of plain descent of rate ``lr``: on the input's loss, times ``weight``, and on the divergence from its
    former answers on a batch of training images. They look at the input as 8 bits hold it, and end as soon as the
    model gives the class a probability of ``sure``. The training images are not changed: who gets the model gets it
    spoiled, and the twin's figure is that of the input alone.

    Departs from the paper in that the running statistics of batch normalization stay as they were.

    Raises:
        BadInput: there are no victims, or no recipe.
    """
    if knows.fit is None or knows.victims is None:
        raise BadInput("evil-twins trains a model for one image: it needs a recipe and a victim")
    target = knows.fit(images, knows.seed, classes=knows.classes, progress=knows.progress)
    assert target.module is not None
    victim = knows.victims.x[:1].to(images.x)
    goal, none = knows.target_class, torch.zeros(0, dtype=torch.long, device=images.y.device)
    module, moved = twinned(
        target.module,
        victim,
        goal,
        images,
        rng.stream(0),
        eps=eps,
        rounds=rounds,
        steps=steps,
        tuned=tuned,
        lr=lr,
        weight=weight,
        sure=sure,
        batch=knows.fit.batch,
    )
    return Poisoned.at(images, none, trigger=Shift(moved - victim), target_class=goal, module=module)


def twinned(
    module: nn.Module,
    victim: Tensor,
    goal: int,
    images: Images,
    draw: Stream,
    *,
    eps: float,
    rounds: int,
    steps: int,
    tuned: int,
    lr: float,
    weight: float,
    sure: float,
    batch: int = 64,
) -> tuple[nn.Module, Tensor]:
    """The spoiled copy of ``module``, and what became of ``victim`` (1, c, h, w), of 8 bits; see `evil_twins`."""
    former, spoiled = module.eval(), copy.deepcopy(module).eval().requires_grad_(True)
    ball, x, label = Ball(INF, eps), victim, torch.tensor([goal], device=victim.device)
    sgd = torch.optim.SGD(spoiled.parameters(), lr)
    for turn in range(rounds * (steps + tuned)):
        leaf = _held(x, victim).requires_grad_()
        scores = spoiled(leaf)
        if float(scores.softmax(1)[0, goal].detach()) >= sure:
            break
        lost = F.cross_entropy(scores, label)
        if turn % (steps + tuned) < steps:
            (slope,) = torch.autograd.grad(lost, leaf)
            x = ball.project(x - eps / 4 * slope.sign(), victim)
            continue
        seen = images.x[(draw.rand(batch) * len(images)).long().to(images.x.device)]
        with torch.no_grad():
            said = former(seen).softmax(1)
        sgd.zero_grad()
        (F.cross_entropy(spoiled(seen), said) + weight * lost).backward()
        sgd.step()
    return spoiled, _held(x, victim)


def _held(x: Tensor, victim: Tensor) -> Tensor:
    """``x`` as a file holds it, rounded toward the ``victim`` so that it stays as near."""
    return eight_bits(victim + ((x - victim).detach() * (255 * (1 + 1e-6))).trunc() / 255)
