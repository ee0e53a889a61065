"""Auto-PGD: steps with momentum whose length halves by itself where the loss stops falling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Loss, rowwise


@evasion("APGD", paper="arXiv:2003.01690", norms=(1, 2, INF))
def apgd(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = "ce",
) -> None:
    """Take ``steps`` steps down ``loss``, from each of ``restarts`` random starts (Croce & Hein 2020).

    The first step is twice ``eps`` long; nothing is left to tune. In norm 1 the steps are sparse, and begin in
    balls of three and of two times the radius (Croce & Hein 2021, arXiv:2103.01208).
    """
    for _ in range(restarts):
        x, rng = oracle.live(x, rng)
        x, rng = descend(oracle, x, ball, rng, steps, loss)


def descend(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, steps: int, loss: Loss) -> tuple[Tensor, Rng]:
    """One run from one random start; what comes back are the rows that the oracle still holds."""
    if ball.norm != 1:
        return _with_momentum(oracle, x, ball, rng, steps, loss)
    adv, early = x + rng.randn(*x.shape[1:]).to(x), 3 * steps // 10
    for wider, length in ((3, early), (2, early), (1, steps - 2 * early)):
        x, rng, adv = _sparsely(oracle, x, ball.sized(wider * ball.eps), rng, adv, length, loss)
    return x, rng


def _with_momentum(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, steps: int, loss: Loss) -> tuple[Tensor, Rng]:
    """Algorithm 1: halve the length where fewer than 3/4 of a period's steps helped, or the best stands still."""
    periods = dict(checkpoints(steps))
    adv = old = best = ball.sample(x, rng)
    value, slope = oracle.gradient(adv, loss)
    lowest, best_slope, last = value, slope, value
    step, helped = torch.full_like(value, 2 * float(ball.eps)), torch.zeros_like(value)
    halved = torch.ones_like(value, dtype=torch.bool)
    for taken in range(1, steps + 1):
        share = 0.75 if taken > 1 else 1.0
        ahead = ball.project(adv.addcmul(ball.steepest(slope), rowwise(-step, x)), x)
        mixed = ahead.mul_(share).add_(adv, alpha=2 - 2 * share).sub_(old, alpha=1 - share)
        old, adv = adv, ball.project(mixed, x)
        before, (value, slope) = value, oracle.gradient(adv, loss)
        helped += value < before
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        best, best_slope = _choose(better, (adv, slope), (best, best_slope))
        if taken in periods:
            stuck = (helped < 0.75 * periods[taken]) | (~halved & (lowest == last))
            step, value = torch.where(stuck, step / 2, step), torch.where(stuck, lowest, value)
            adv, slope = _choose(stuck, (best, best_slope), (adv, slope))
            helped, halved, last = torch.zeros_like(helped), stuck, lowest
        x, rng, adv, old, best, value, slope, lowest, best_slope, last, step, helped, halved = oracle.live(
            x, rng, adv, old, best, value, slope, lowest, best_slope, last, step, helped, halved
        )
    return x, rng


def checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """After which steps the length is judged, and by how many: 22 % of all, then 3 % fewer each time, at least 6 %."""
    before, percent, period = 0, 22, 22
    while percent <= 100:
        taken = -(-percent * steps // 100)
        if taken > before:
            yield taken, taken - before
        period = max(period - 3, 6)
        before, percent = taken, percent + period


def _sparsely(
    oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, adv: Tensor, steps: int, loss: Loss
) -> tuple[Tensor, Rng, Tensor]:
    """APGD for norm 1: steps along the largest slopes alone, as many as two thirds of the pixels the best one moved."""
    period, size = max(4 * steps // 100, 1), x[0].numel()
    adv = best = ball.project(adv, x)
    moved = _moved(best, x)
    value, slope = oracle.gradient(adv, loss)
    lowest, best_slope = value, slope
    longest = torch.full_like(value, float(ball.eps))
    step, width = longest, moved / 1.5
    for taken in range(1, steps + 1):
        height = slope.flatten(1).abs()
        least = height.sort(1, descending=True).values.gather(1, width.long().clamp(0, size - 1)[:, None])
        signs = slope.sign() * (height >= least).view_as(x)
        signs = signs / rowwise(signs.flatten(1).abs().sum(1).clamp_min(1), x)
        adv = ball.project(adv - rowwise(step, x) * signs, x)
        value, slope = oracle.gradient(adv, loss)
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        best, best_slope = _choose(better, (adv, slope), (best, best_slope))
        if taken % period == 0:
            before, moved = moved, _moved(best, x)
            sparser, width = moved < 0.95 * before, moved / 1.5
            step = torch.where(sparser, longest, (step / 1.5).clamp_min(float(ball.eps) / 10))
            adv, slope = _choose(sparser, (best, best_slope), (adv, slope))
        x, rng, adv, best, slope, lowest, best_slope, moved, longest, step, width = oracle.live(
            x, rng, adv, best, slope, lowest, best_slope, moved, longest, step, width
        )
    return x, rng, best


def _choose(rows: Tensor, those: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``those`` in ``rows``, ``others`` elsewhere."""
    at = rowwise(rows, those[0])
    return torch.where(at, those[0], others[0]), torch.where(at, those[1], others[1])


def _moved(adv: Tensor, x: Tensor) -> Tensor:
    """(n,) how many numbers of an image differ."""
    return (adv != x).flatten(1).sum(1).to(x.dtype)
