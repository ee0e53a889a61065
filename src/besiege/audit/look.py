"""The look before hours are spent: what a target is, and what a siege of it would cost."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from besiege.audit.checks import check_passes
from besiege.audit.plan import BUDGETS, IMAGES, Budget, customary, plan
from besiege.core.images import Images
from besiege.core.method import EVASIVE, of_kind
from besiege.core.target import Target
from besiege.core.threat import Access
from besiege.results.checks import Check
from besiege.results.interval import wilson
from besiege.results.record import Facts, Interval
from besiege.targets.check import feeding_warning, throughput

FEW = 16
"""So many images are asked for gradients."""


UNCOUNTED = 1000
"""For so many images the cost of a budget is told that takes all there are."""


class Look(Facts):
    """What five seconds tell. Times are milliseconds an image; ``costs`` seconds at most, by budget.

    A budget without a number of images of its own is told for 1,000.
    ``backward_ms`` is None where there are no gradients.
    """

    target: str
    fingerprint: str
    kind: str
    parameters: int | None
    shape: tuple[int, int, int]
    classes: int
    access: str
    device: str
    answers: Literal["logits", "probabilities", "log-probabilities"]
    deterministic: bool
    data: str
    n: int
    clean_accuracy: float
    clean_interval: Interval
    forward_ms: float
    backward_ms: float | None
    batch: int
    costs: dict[str, float]
    checks: list[Check]
    notes: list[str]
    warnings: list[str]


def look(target: Target, images: Images) -> Look:
    """Ask ``target`` about ``images`` and the clock.

    Raises:
        BadInput: the target does not take the images.
    """
    target.takes(images)
    scores = target.scores(images.x)
    right, n = int((scores.argmax(1) == images.y).sum()), len(images)
    again = target.scores(images.x[: target.batch])
    few = images[(scores.argmax(1) == images.y).nonzero().squeeze(1)[:FEW]]
    forward, both, batch = throughput(target, images)
    warning = feeding_warning(target, images)
    return Look(
        target=target.name,
        fingerprint=target.fingerprint,
        kind=type(target.call if target.module is None else target.module).__name__,
        parameters=None if target.module is None else sum(p.numel() for p in target.module.parameters()),
        shape=target.shape,
        classes=target.classes,
        access=target.access.name.lower(),
        device=str(target.device),
        answers=_answers(scores),
        deterministic=not target.stochastic and torch.allclose(again, scores[: target.batch], atol=1e-4),
        data=images.name,
        n=n,
        clean_accuracy=right / n,
        clean_interval=wilson(right, n),
        forward_ms=forward,
        backward_ms=both - forward if math.isfinite(both) else None,
        batch=batch,
        costs={budget: _cost(target, budget, forward, both) for budget in BUDGETS},
        checks=check_passes(target, few, customary(target.shape)[0]) if len(few) else [],
        notes=[*target.notes, *images.notes],
        warnings=[warning] if warning else [],
    )


def _answers(scores: Tensor) -> Literal["logits", "probabilities", "log-probabilities"]:
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), torch.ones(len(scores)).to(scores), atol=1e-3):
        return "probabilities"
    if torch.allclose(scores.logsumexp(1), torch.zeros(len(scores)).to(scores), atol=1e-3):
        return "log-probabilities"
    return "logits"


def _cost(target: Target, budget: Budget, forward: float, both: float) -> float:
    """Seconds at most: every image stands to the end, which it rarely does."""
    cells = plan(
        of_kind(*EVASIVE), target.access, customary(target.shape, budget), budget, channels=target.shape[0]
    ).cells
    n = IMAGES[budget] or UNCOUNTED
    return sum(cell.passes(n) * (both if cell.threat.access >= Access.GRADIENTS else forward) / 1000 for cell in cells)
