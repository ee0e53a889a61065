"""JSMA: changes two pixels at a time, the pair that the saliency map of one class rates highest."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from besiege.attacks.whitebox.apgd_t import rivals
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Answer, Ball, rowwise

Direction = Literal["up", "down", "both"]
Output = Literal["probabilities", "logits"]

PAIRS = 1 << 22
"""At most this many pairs of pixels are rated at once."""


@evasion("JSMA", paper="arXiv:1511.07528", norms=(0,), seeks="minimum")
def jsma(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    theta: float = 1.0,
    gamma: float = 0.5,
    direction: Direction = "both",
    output: Output = "probabilities",
    targets: int = 3,
    restore: bool = True,
) -> None:
    """Move pairs of pixels by ``theta`` in ``direction``, each once, up to the share ``gamma`` of the image.

    The map rates a pair by how much it raises the class in view times how much it lowers all others together, in the
    network's ``output`` (Papernot et al. 2016). The classes in view are the ``targets`` highest others, one after
    another, each given up where it needs as many pixels as one before it; a goal with a class of its own leaves that
    one alone.

    Departs from the paper, whose method is ``direction="up", targets=1, restore=False``: every value goes the way that
    helps and is rated by how far it can go; what was changed is put back, latest first, where the image stays fallen.
    A pixel is all its channels together, and no candidate where it can move by less than a hundredth of ``theta``.
    No whole Jacobian is needed: the others' sum is that of all logits less one, so two backward passes suffice;
    probabilities add up to one, so the best pair of their map are the two steepest pixels, and one pass does.
    """
    least = torch.full((len(x),), INF, device=x.device)
    for target in rivals(oracle, x, targets).unbind(1):
        fallen, when = _walk(oracle, x, target, least, theta, gamma, direction, output)
        if restore:
            _restore(oracle, x, fallen, when)
        least = torch.minimum(least, torch.where((when >= 0).any(1), (when >= 0).sum(1), INF))


def _walk(
    oracle: Oracle,
    x: Tensor,
    target: Tensor,
    least: Tensor,
    theta: float,
    gamma: float,
    direction: Direction,
    output: Output,
) -> tuple[Tensor, Tensor]:
    """Walk toward ``target`` (n,), with fewer pixels than ``least`` (n,).

    Returns the images that fell and (n, pixels) the step at which each of their pixels was changed, -1 where never.
    """
    view, pixels = oracle.toward(target), x[0, 0].numel()
    rows, adv, fallen = torch.arange(len(x), device=x.device), x, x.clone()
    steps = torch.full((len(x), pixels), -1, device=x.device)
    when = steps.clone()
    for step in range(int(gamma * pixels / 2) + 1):
        slope, others, fell = _slopes(oracle, view, adv, target[rows], rows, output)
        fallen[rows[fell]], when[rows[fell]] = adv[fell], steps[fell]
        way = {"up": 1, "down": -1}.get(direction, (slope - others).sign())
        change = (adv + theta * way).clamp(0, 1) - adv
        weight = change if direction == "both" else change.sign()
        shut = (steps >= 0) | (change.abs() < 0.01 * theta).all(1).flatten(1)
        gain, fall = ((part * weight).sum(1).flatten(1).masked_fill(shut, -INF) for part in (slope, -others))
        pair, good = _steepest(gain) if output == "probabilities" else best_pair(gain, fall)
        going = good & ~fell & (2 * step + 2 < least[rows])
        rows, adv, steps, change, pair = (part[going] for part in (rows, adv, steps, change, pair))
        if not len(rows):
            break
        steps = steps.scatter(1, pair, step)
        adv = torch.where((steps == step).view_as(adv[:, :1]), adv + change, adv)
    return fallen, when


def _slopes(
    oracle: Oracle, view: Oracle, adv: Tensor, target: Tensor, rows: Tensor, output: Output
) -> tuple[Tensor, Tensor, Tensor]:
    """How the target's output rises, how the others' do together, and which images (m,) have fallen.

    Probabilities as they rise in proportion: those of an image share one factor, which no rating of pairs minds.
    """
    if output == "logits":
        scores, slopes = oracle.jacobian(adv, torch.stack([target, torch.full_like(target, oracle.classes)], 1), rows)
        return slopes[:, 0], slopes[:, 1] - slopes[:, 0], oracle.goal[rows].reached(Answer(scores))
    loss, grad = view.gradient(adv, "ce", rows)
    fell = torch.zeros_like(rows, dtype=torch.bool)
    near = (loss < math.log(oracle.classes)).nonzero().squeeze(1)
    if len(near):
        fell[near] = oracle.is_adversarial(adv[near], rows[near])
    return -grad, grad, fell


def _steepest(gain: Tensor) -> tuple[Tensor, Tensor]:
    """The two pixels of the highest ``gain`` (m, pixels), and whether they gain together."""
    top = gain.topk(2, dim=1)
    return top.indices, top.values.sum(1) > 0


def best_pair(gain: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels p, q of the highest ``(gain_p + gain_q) * (fall_p + fall_q)`` with both sums above zero.

    (m, 2), and whether there is such a pair. Exact: a pixel that two others match or beat in both can give way to one
    of them in any pair, so that only those are paired of which this is not true. -inf shuts a pixel out.
    """
    ranked, order = gain.sort(1, descending=True)
    falls = passed = before = fall.gather(1, order)
    for _ in range(2):
        before = torch.cat([torch.full_like(falls[:, :1], -INF), passed.cummax(1).values[:, :-1]], 1)
        passed = torch.minimum(passed, before)
    keep = falls > before
    count = max(2, int(keep.sum(1).max()))
    at = keep.byte().topk(count, dim=1).indices
    gains, falls = (part.gather(1, at).masked_fill(~keep.gather(1, at), -INF) for part in (ranked, falls))
    place = torch.arange(count, device=gain.device)
    best, pair = torch.zeros_like(gain[:, 0]), torch.zeros_like(at[:, :2])
    for some in place.split(max(1, PAIRS // (len(gain) * count))):
        up, down = gains[:, some, None] + gains[:, None], falls[:, some, None] + falls[:, None]
        fits = (up > 0) & (down > 0) & (some[:, None] != place)
        top = torch.where(fits, up * down, 0).flatten(1).max(1)
        better = top.values > best
        found = torch.stack([some[0] + top.indices // count, top.indices % count], 1)
        best, pair = torch.where(better, top.values, best), torch.where(better[:, None], found, pair)
    return order.gather(1, at.gather(1, pair)), best > 0


def _restore(oracle: Oracle, x: Tensor, fallen: Tensor, when: Tensor) -> None:
    """Put back what was changed, latest first, where the image stays fallen; ``when`` is then -1 there."""
    rows = (when >= 0).any(1).nonzero().squeeze(1)
    adv, order, count = fallen[rows], when[rows].argsort(1, descending=True), (when[rows] >= 0).sum(1)
    for k in range(when.shape[1]):
        left = count > k
        rows, adv, order, count = (part[left] for part in (rows, adv, order, count))
        if not len(rows):
            return
        back = torch.zeros_like(order).scatter(1, order[:, k : k + 1], 1).view_as(adv[:, :1]) > 0
        tried = torch.where(back, x[rows], adv)
        stays = oracle.is_adversarial(tried, rows)
        adv = torch.where(rowwise(stays, adv), tried, adv)
        when[rows[stays], order[stays, k]] = -1
