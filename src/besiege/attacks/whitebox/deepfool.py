"""DeepFool: step to the nearest boundary of the linearized classifier until the class changes."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Answer, Ball, rowwise


@evasion("DeepFool", paper="arXiv:1511.04599", norms=(2, INF), seeks="minimum", targeted=False)
def deepfool(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
    rivals: int = 2,
) -> None:
    """Linearize the ``classes`` most likely classes, then follow the ``rivals`` nearest for ``steps`` steps.

    Each step goes ``overshoot`` beyond the boundary (Moosavi-Dezfooli et al. 2016).

    Departs from the paper: after the first step only the classes whose boundaries were nearest then are linearized
    anew, which saves most backward passes (``rivals=9`` is the authors' code); the points are brought into [0, 1].

    Raises:
        BadInput: ``classes`` below 2 or no ``rivals``.
    """
    if classes < 2 or rivals < 1:
        raise BadInput(f"deepfool needs at least 2 classes and 1 rival, not {classes} and {rivals}")
    followed(oracle, x, torch.arange(len(x), device=x.device), ball, steps, overshoot, classes, rivals)


def followed(
    oracle: Oracle,
    adv: Tensor,
    rows: Tensor,
    ball: Ball,
    steps: int = 10,
    overshoot: float = 0.02,
    classes: int = 10,
    rivals: int = 9,
) -> tuple[Tensor, Tensor]:
    """Where ``adv``, which stand for the images ``rows``, end once they have left their class, and which have."""
    label, end, at = oracle.goal.labels[rows], adv.clone(), torch.arange(len(rows), device=adv.device)
    fell = torch.zeros_like(at, dtype=torch.bool)
    others = oracle.scores(adv, rows).scatter(1, label[:, None], -INF).topk(min(classes, oracle.classes) - 1).indices
    for _ in range(steps):
        scores, slopes = oracle.jacobian(adv, torch.cat([label[at, None], others], 1), rows[at])
        standing = ~oracle.goal[rows[at]].reached(Answer(scores))
        end[at], fell[at] = adv, ~standing
        at, adv, others, scores, slopes = (part[standing] for part in (at, adv, others, scores, slopes))
        if not len(at):
            break
        gap = (scores.gather(1, label[at, None]) - scores.gather(1, others)).abs()
        slope = slopes[:, 1:] - slopes[:, :1]
        flat = slope.flatten(2)
        size = (flat.norm(dim=2) if ball.norm == 2 else flat.abs().sum(2)).clamp_min(1e-6)
        distance = gap / size + 1e-4
        near = distance.argsort(1)[:, :rivals]
        here, best = torch.arange(len(at), device=adv.device), near[:, 0]
        direction = slope[here, best]
        unit = direction / rowwise(size[here, best], adv) if ball.norm == 2 else direction.sign()
        adv = (adv + (1 + overshoot) * rowwise(distance[here, best], adv) * unit).clamp(0, 1)
        others = others.gather(1, near)
    return end, fell
