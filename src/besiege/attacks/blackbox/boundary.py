"""Boundary attack: a random walk along the decision boundary toward the image, by labels alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from besiege.attacks.blackbox.hopskipjump import Found, bisect, nearest
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng, Stream
from besiege.core.threat import Access, Ball

TRIALS = 20
"""The steps' lengths follow how many of this many last tries succeeded."""

DRAWN = 1 << 26
"""At most so many random numbers are drawn at once, for at most as many steps as there are TRIALS."""


@evasion("Boundary attack", paper="arXiv:1712.04248", norms=(2,), access=Access.LABELS, seeks="minimum", start=True)
def boundary(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    start: Tensor,
    starts: int = 20,
    moves: int = 25_000,
    spherical: float = 0.01,
    source: float = 0.01,
    least: float = 1e-7,
    memory: float = 0.5,
) -> None:
    """Try ``moves`` random moves around ``x`` and, where one stays adversarial, a move toward it.

    Both are shares of the distance: ``spherical`` grows where more than half of its moves succeed, ``source`` where
    more than a quarter do, and they shrink where fewer do; the walk ends when ``source`` falls below ``least``
    (Brendel et al. 2018).

    Departs from the paper, whose method is ``starts=0, memory=0``: it begins on the boundary, at the nearest of the
    image that the engine found and ``starts`` noise images, and each move is drawn toward the mean of the last that
    succeeded, with the weight ``memory``.
    """
    streams = [rng.stream(i) for i in range(len(x))]
    opened = _together(oracle, [_opened(*each, starts) for each in zip(x, start, streams, strict=True)])
    away = (torch.stack(opened) - x).flatten(1)
    n, d, drawn = *away.shape, max(1, min(TRIALS, DRAWN // x.numel()))
    far, ids, noise = away.norm(dim=1), torch.arange(n, device=x.device), x.new_zeros(n, drawn, d)
    base, path = away.clone(), torch.zeros_like(away)
    # Each image is about to move around x or, where that has just succeeded, toward it; `base` is where it moves from.
    # Its counts are: moves around in all, those that won of the last TRIALS, moves toward x of the last TRIALS, those
    # that won.
    toward, counts = torch.zeros_like(far, dtype=torch.bool), torch.zeros(n, 4, dtype=torch.int64, device=x.device)
    around, ahead = torch.full_like(far, spherical), torch.full_like(far, source)
    while True:
        x, away, far, ids, noise, base, path, toward, counts, around, ahead = oracle.live(
            x, away, far, ids, noise, base, path, toward, counts, around, ahead
        )
        made = counts[:, 0]
        for i in ((made % drawn == 0) & ~toward).nonzero().squeeze(1).tolist():
            noise[i] = streams[ids[i]].randn(drawn, d)
        drawing = torch.arange(len(x), device=x.device) * drawn + made % drawn
        way = noise.view(-1, d).index_select(0, drawing)
        if memory:
            way.addcmul_(path, memory * way.norm(dim=1, keepdim=True))
        # What of the way is across `away` is added to it at the length `around`, and both are brought back to `far`.
        along = torch.linalg.vecdot(way, away) / far.square()
        across = (way.norm(dim=1).square() - (along * far).square()).clamp_min(1e-30).sqrt()
        turn, level = around * far / across, (1 + around.square()).rsqrt()
        kept, added = torch.where(toward, 1 - ahead, level * (1 - turn * along)), (level * turn).masked_fill_(toward, 0)
        moved = (base * kept[:, None]).addcmul_(way, added[:, None])
        tried = (x + moved.view_as(x)).clamp_(0, 1)
        walking = (far > 0) & (ahead >= least) & (toward | (made < moves))
        if bool(walking.all()):
            won = oracle.is_adversarial(tried)
        elif bool(walking.any()):
            rows = walking.nonzero().squeeze(1)
            won = torch.zeros_like(walking).index_copy_(0, rows, oracle.is_adversarial(tried[rows], rows))
        else:
            return
        rows = (won & toward).nonzero().squeeze(1)
        left = (tried.index_select(0, rows) - x.index_select(0, rows)).flatten(1)
        length = left.norm(dim=1)
        closer = length < far[rows]
        rows = rows[closer]
        if memory:
            aside, before = moved.index_select(0, rows), away.index_select(0, rows)
            share = torch.linalg.vecdot(aside, before) / far[rows].square()
            aside = aside - share[:, None] * before
            path[rows] = 0.9 * path[rows] + 0.1 * aside / aside.norm(dim=1, keepdim=True).clamp_min(1e-30)
        away[rows], far[rows] = left[closer], length[closer]
        base = torch.lerp(away, moved, (won & ~toward).to(away)[:, None])
        counts += torch.stack([~toward, won & ~toward, toward, won & toward], 1)
        full = ~toward & (counts[:, 0] % TRIALS == 0)
        around = torch.where(full, _followed(around, counts[:, 1], 0.5, 0.2).clamp_max(1), around)
        counts[:, 1].masked_fill_(full, 0)
        full = toward & (counts[:, 2] == TRIALS)
        ahead = torch.where(full, _followed(ahead, counts[:, 3], 0.25, 0.1).clamp_max(0.5), ahead)
        counts[:, 2:].masked_fill_(full[:, None], 0)
        toward = won & ~toward


def _opened(x: Tensor, start: Tensor, stream: Stream, starts: int) -> Found:
    """Where the walk begins."""
    if not starts:
        return start
    return (yield from bisect(x, (yield from nearest(x, start, starts, stream, False)), 1e-3, False))


def _together(oracle: Oracle, searches: Sequence[Found]) -> list[Tensor]:
    """What the searches return, one an image, each of them asked for its next question after every answer."""
    found: dict[int, Tensor] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(searches)))
    while answers:
        asked = {}
        for i, answer in answers.items():
            try:
                asked[i] = next(searches[i]) if answer is None else searches[i].send(answer)
            except StopIteration as end:
                found[i] = end.value
        if not asked:
            break
        sizes = [len(question) for question in asked.values()]
        rows = torch.tensor(list(asked)).repeat_interleave(torch.tensor(sizes))
        every = torch.cat(list(asked.values()))
        answers = dict(zip(asked, torch.split(oracle.is_adversarial(every, rows.to(every.device)), sizes), strict=True))
    return [found[i] for i in range(len(searches))]


def _followed(length: Tensor, won: Tensor, high: float, low: float) -> Tensor:
    """``length`` (n,), half as long again where more than the share ``high`` of TRIALS won, shorter below ``low``."""
    share = won / TRIALS
    return torch.where(share > high, length * 1.5, torch.where(share < low, length / 1.5, length))
