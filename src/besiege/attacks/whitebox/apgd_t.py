"""APGD toward one class after another, most likely first."""

from __future__ import annotations

from torch import Tensor

from besiege.attacks.whitebox.apgd import descend
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball


@evasion("APGD-T", paper="arXiv:2003.01690", norms=(1, 2, INF))
def apgd_t(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, *, steps: int = 100, targets: int = 9) -> None:
    """Run APGD on the targeted DLR loss toward each of the ``targets`` highest other classes (Croce & Hein 2020).

    A goal with a class of its own leaves that one alone.
    """
    ranked = rivals(oracle, x, targets)
    for k in range(ranked.shape[1]):
        x, rng, ranked = oracle.live(x, rng, ranked)
        descend(oracle.toward(ranked[:, k]), x, ball, rng, steps, "dlr")


def rivals(oracle: Oracle, x: Tensor, count: int) -> Tensor:
    """(n, k) the ``count`` highest classes that each image could be taken for; if targeted, the goal's."""
    own = oracle.goal.labels[:, None]
    if oracle.goal.targeted:
        return own
    return oracle.scores(x).scatter(1, own, -INF).topk(min(count, oracle.classes - 1), dim=1).indices
