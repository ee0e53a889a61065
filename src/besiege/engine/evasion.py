"""Runs one evasion attack on one target: the search, then the judge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.oracle import Finished, Oracle
from besiege.core.pool import pool
from besiege.core.rng import Rng
from besiege.core.target import Execution, Target
from besiege.core.threat import INF, NORM_NAMES, Access, Ball, Goal, ThreatModel, rowwise
from besiege.core.trigger import Shift, Trigger
from besiege.engine.chain import Lowest

SHARD_PIXELS = 1 << 26
"""A shard holds at most this many numbers, so that a method's state fits in memory."""

PUSHES = (0.0, 1e-5, 1e-4, 1e-3)
"""How far, relative to its size, a perturbation is stretched until the clean target confirms it."""

DRAWS = 20
"""A random target has fallen when most of this many draws say so."""

Lensing = Callable[[Meter, Tensor, Rng], Oracle]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one attack claims of n images, tensors with one row an image; nothing in it is believed yet.

    ``attacked`` (n,) leaves out what the clean target gets wrong (and, if targeted, what bears the target
    class already). ``adv`` is the original where ``success`` is not. ``distance`` is that of ``adv``, inf
    where there is none; ``needed`` the forward passes up to the first success, -1 where there was none. A chain
    has been ``via`` these images (n, c, h, w), from which distances are measured.
    """

    attack: str
    threat: ThreatModel
    seed: int
    index: Tensor
    label: Tensor
    goal: Tensor
    clean: Tensor
    attacked: Tensor
    adv: Tensor
    success: Tensor
    distance: Tensor
    forward: Tensor
    backward: Tensor
    needed: Tensor
    seconds: float
    cpu_seconds: float
    sent: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    via: Tensor | None = None
    setup_forward: int = 0
    setup_backward: int = 0
    setup_seconds: float = 0.0


def evade(
    attack: Attack,
    target: Target,
    images: Images,
    threat: ThreatModel,
    *,
    seed: int = 0,
    target_class: int | None = None,
    lens: Lensing | None = None,
    starts: Tensor | None = None,
    training: Images | None = None,
    clean: Tensor | None = None,
    execution: Execution = "auto",
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Attack ``images`` on ``target``; `besiege.engine.judge.judge` verifies what comes back.

    ``starts`` (m, c, h, w) are images that a decision-based attack may start from where noise does not
    succeed; ``training`` those that a universal perturbation is fitted on; ``clean`` (n,) the clean predictions,
    if they are known already. ``execution`` is how the search runs the model (`Target.tuned`); what it finds is
    confirmed on ``target`` as it is. Results do not depend on how many images there are, nor on their order.

    Raises:
        BadInput: the attack does not fit the threat model or the target.
    """
    if attack.card.kind == "chain":
        return _chained(
            attack,
            target,
            images,
            threat,
            target.labels(images.x) if clean is None else clean,
            seed=seed,
            target_class=target_class,
            lens=lens,
            starts=starts,
            execution=execution,
            progress=progress,
        )
    _fits(attack, target, images, threat, target_class, lens)
    clean = target.labels(images.x) if clean is None else clean
    fast = target.tuned(execution)
    goal = images.y.clone() if target_class is None else torch.full_like(images.y, target_class)
    attacked = clean == images.y
    if target_class is not None:
        attacked &= images.y != target_class
    chosen = attacked.nonzero().squeeze(1)
    out = _Books(images)
    size = max(target.batch, SHARD_PIXELS // images.x[0].numel())
    began, cpu = time.monotonic(), time.process_time()
    deadline = None if threat.seconds is None else began + threat.seconds
    notes: list[str] = []
    spare = len(PUSHES) * (DRAWS if target.stochastic else 1)
    queries = threat.queries if threat.queries is None or threat.queries < 10 * spare else threat.queries - spare
    trigger, setup = None, Setup()
    if attack.card.kind == "universal":
        trigger, setup = fit_universal(attack, fast, training, threat, seed, target_class, lens)
        if setup.cut:
            notes.append("time ran out before the perturbation was fitted: it is empty")
        began, cpu = time.monotonic(), time.process_time()
    for rows in torch.split(chosen, size) if len(chosen) else ():
        meter = Meter(
            fast,
            images.x[rows],
            Goal(goal[rows], target_class is not None),
            threat.ball,
            seeks=attack.card.seeks,
            access=threat.access,
            queries=queries,
            deadline=deadline,
            progress=progress,
        )
        with fast.ready(), target.ready():
            if trigger is None:
                _run(attack, meter, images[rows], seed, lens, starts, notes)
            else:
                with suppress(Finished):
                    moved = torch.cat([trigger(part) for part in meter.x.split(target.batch)])
                    meter.is_adversarial(meter.ball.project(moved, meter.x))
            if queries is None or queries != threat.queries:
                _settle(meter, target)
        out.take(rows, meter)
    within = out.distance <= threat.ball.reach
    success = out.found & within
    return Outcome(
        attack=str(attack),
        threat=threat,
        seed=seed,
        index=images.index,
        label=images.y,
        goal=goal,
        clean=clean,
        attacked=attacked,
        adv=out.adv,
        success=success,
        distance=torch.where(out.found, out.distance, INF),
        forward=out.forward,
        backward=out.backward,
        needed=out.needed,
        seconds=time.monotonic() - began,
        cpu_seconds=time.process_time() - cpu,
        sent=tuple(out.sent),
        notes=tuple(notes),
        setup_forward=setup.forward,
        setup_backward=setup.backward,
        setup_seconds=setup.seconds,
    )


def _chained(
    attack: Attack,
    target: Target,
    images: Images,
    threat: ThreatModel,
    clean: Tensor,
    lens: Lensing | None,
    **others: Any,
) -> Outcome:
    """The first attack in its region, the second from the image of lowest margin that the first has asked about.

    Each has half of the queries; a lens is the second's. Where the target shows labels alone, what has not fallen
    stays where it was.
    """
    first, second = attack.bound()()
    if threat.after is None:
        raise BadInput(f"{attack.name} is a chain: the threat model must say in `after` how far {first.name} may go")
    half = None if threat.queries is None else max(1, threat.queries // 2)
    rest = None if threat.queries is None else max(1, threat.queries - (half or 0))
    memory: list[Lowest] = []

    def remember(meter: Meter, x: Tensor, rng: Rng) -> Oracle:
        memory.append(Lowest(meter, x))
        return memory[-1]

    sees = min(threat.access, target.access) >= Access.SCORES
    opened = replace(threat, ball=threat.after, after=None, queries=half)
    led = evade(first, target, images, opened, clean=clean, lens=remember if sees else None, **others)
    moved, standing = led.adv.clone(), led.attacked & ~led.success
    if memory:
        every = torch.cat([kept.x for kept in memory])
        moved[led.attacked] = torch.where(rowwise(standing[led.attacked], every), every, moved[led.attacked])
    left = torch.where(standing, clean, (images.y + 1) % target.classes)
    closing = replace(threat, after=None, queries=rest)
    found = evade(second, target, replace(images, x=moved), closing, clean=left, lens=lens, **others)
    first_pass = torch.where(led.needed >= 0, led.needed, led.forward + found.needed)
    return replace(
        found,
        attack=str(attack),
        threat=threat,
        clean=clean,
        attacked=led.attacked,
        via=moved,
        adv=torch.where(rowwise(found.success, moved), found.adv, led.adv),
        success=led.success | found.success,
        distance=torch.where(led.success, 0, found.distance),
        forward=led.forward + found.forward,
        backward=led.backward + found.backward,
        needed=torch.where(led.success | found.success, first_pass, -1),
        seconds=led.seconds + found.seconds,
        cpu_seconds=led.cpu_seconds + found.cpu_seconds,
        sent=led.sent + found.sent,
        notes=led.notes + found.notes,
    )


@dataclass(frozen=True)
class Setup:
    """What fitting a universal perturbation cost, all training images together, and whether time cut it short."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    cut: bool = False


def fit_universal(
    attack: Attack,
    target: Target,
    training: Images | None,
    threat: ThreatModel,
    seed: int,
    target_class: int | None,
    lens: Lensing | None = None,
) -> tuple[Trigger, Setup]:
    """Fit the one perturbation on ``training``; the labels to leave are the target's own there.

    Raises:
        BadInput: there are no training images.
    """
    if training is None or not len(training):
        raise BadInput(f"{attack.name} fits its perturbation on images apart from those it is judged on; give some")
    began = time.monotonic()
    labels = target.labels(training.x) if target_class is None else torch.full_like(training.y, target_class)
    meter = Meter(
        target,
        training.x,
        Goal(labels, target_class is not None),
        threat.ball,
        seeks="optimum",
        access=threat.access,
        deadline=None if threat.seconds is None else began + threat.seconds,
    )
    rng = Rng.of(seed, training.index, attack.name + "/lens")
    oracle: Oracle = meter if lens is None else lens(meter, meter.x, rng)
    trigger: Trigger = Shift(torch.zeros_like(training.x[:1]))
    cut = True
    with target.ready(), suppress(Finished):
        trigger = attack.bound()(oracle, meter.x, meter.ball, Rng.of(seed, training.index, attack.name))
        cut = False
    labelled = len(training) if target_class is None else 0
    forward, backward = int(meter.forward.sum()) + labelled, int(meter.backward.sum())
    return trigger, Setup(forward, backward, time.monotonic() - began, cut)


def threat_eps(ball: Ball) -> float:
    """The radius as a number."""
    return float(ball.eps)


class _Books:
    """Collects the shards' books into tensors over all images."""

    def __init__(self, images: Images) -> None:
        n, device = len(images), images.x.device
        self.adv = images.x.clone()
        self.found = torch.zeros(n, dtype=torch.bool, device=device)
        self.distance = torch.full((n,), INF, dtype=images.x.dtype, device=device)
        self.forward = torch.zeros(n, dtype=torch.int64, device=device)
        self.backward = torch.zeros(n, dtype=torch.int64, device=device)
        self.needed = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.sent: list[tuple[int, int]] = []

    def take(self, rows: Tensor, meter: Meter) -> None:
        self.adv[rows] = meter.best
        self.sent += meter.sent
        for name in ("found", "distance", "forward", "backward", "needed"):
            getattr(self, name)[rows] = getattr(meter, name)


def _fits(
    attack: Attack,
    target: Target,
    images: Images,
    threat: ThreatModel,
    target_class: int | None,
    lens: Lensing | None,
) -> None:
    card = attack.card
    if threat.ball.norm not in card.norms:
        works = ", ".join(NORM_NAMES[n] for n in card.norms)
        raise BadInput(f"{card.name} works in {works}, not in {NORM_NAMES[threat.ball.norm]}")
    if lens is None and min(threat.access, target.access) < card.access:
        raise BadInput(
            f"{card.name} needs {card.access.name.lower()}, but {target.name} grants "
            f"{min(threat.access, target.access).name.lower()}"
        )
    if target_class is not None and not card.targeted:
        raise BadInput(f"{card.name} is untargeted; leave the target class out")
    if target_class is not None and not 0 <= target_class < target.classes:
        raise BadInput(f"target class {target_class} is not among the {target.classes} classes from 0")
    target.takes(images)
    if card.channels not in (None, images.shape[0]):
        raise BadInput(f"{card.name} takes images of {card.channels} channels, but these have {images.shape[0]}")
    if attack.card.seeks == "success" and math.isinf(threat_eps(threat.ball)):
        raise BadInput(f"{card.name} needs a radius; give eps")


def _run(
    attack: Attack,
    meter: Meter,
    images: Images,
    seed: int,
    lens: Lensing | None,
    starts: Tensor | None,
    notes: list[str],
) -> None:
    """One method, or the parts of an ensemble one after another on the same books."""
    if attack.card.kind == "ensemble":
        for part in attack.bound()():
            meter.all_rows()
            _run(part, meter, images, seed, lens, starts, notes)
        return
    rng = Rng.of(seed, images.index, attack.name)
    if attack.card.kind == "search":
        _search(attack, meter, rng, starts, notes)
        return
    oracle: Oracle = meter if lens is None else lens(meter, meter.x, Rng.of(seed, images.index, attack.name + "/lens"))
    try:
        supplied = {"start": find_starts(meter, _aside(rng), starts)[0]} if attack.card.start else {}
        if attack.card.maps and images.maps is not None:
            supplied["maps"] = images.maps
        last = attack.bound()(oracle, meter.x, meter.ball, rng, **supplied)
        if last is not None:
            oracle.is_adversarial(last)
    except Finished:
        pass


def _search(attack: Attack, meter: Meter, rng: Rng, starts: Tensor | None, notes: list[str]) -> None:
    function, asks = attack.bound(), attack.card.asks or "margin"
    if not attack.card.start:
        pool(meter, lambda i: function(meter.x[i], meter.ball, rng.stream(i)), asks, _open(meter))
        return
    begun, lost = find_starts(meter, _aside(rng), starts)
    if len(lost):
        notes.append(f"{len(lost)} images have no starting point")
        meter.retire(lost)
    pool(
        meter,
        lambda i: function(meter.x[i], meter.ball, rng.stream(i), start=begun[i]),
        asks,
        _open(meter),
    )


def _aside(rng: Rng) -> Rng:
    """The same streams, beyond any number that a method draws."""
    return Rng(rng.keys, draws=1 << 20)


def _open(meter: Meter) -> list[int]:
    return (~meter.done).nonzero().squeeze(1).tolist()


def find_starts(meter: Meter, rng: Rng, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """An adversarial image for each row, and the rows that have none: uniform noise first, then ``starts``.

    Where an earlier part of a union has found one, that is where the next begins.
    Every try counts; noise takes a hundred tries at most, and a tenth of the budget. A network often takes all
    fine noise for the same class, so the noise comes in blocks of 1, 2, 4 and 8 pixels in turn.
    """
    tries = 100 if meter.queries is None else min(100, 1 + meter.queries // 10)
    begun, shown = meter.best.clone(), meter.x[:0] if starts is None else starts.to(meter.x)
    waiting = ~meter.done & ~meter.found
    for k in range(tries + len(shown)):
        rows = waiting.nonzero().squeeze(1)
        if not len(rows):
            break
        if k < tries:
            tried = _blocks(Rng(rng.keys[rows], rng.draws + k), meter.x.shape[1:], 1 << k % 4).to(meter.x)
        else:
            tried = shown[k - tries].expand_as(meter.x[rows])
        try:
            won = meter.is_adversarial(tried, rows) & ~meter.done[rows]
        except Finished:
            break
        begun[rows[won]] = tried[won]
        waiting[rows[won]] = False
    return begun, (waiting & ~meter.done).nonzero().squeeze(1)


def _blocks(rng: Rng, shape: torch.Size, side: int) -> Tensor:
    """(n, c, h, w) squares of ``side`` pixels, each of one uniform colour."""
    c, h, w = shape
    drawn = rng.rand(c, -(-h // side), -(-w // side))
    return drawn.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :h, :w]


def _settle(meter: Meter, target: Target) -> None:
    """Confirm what was found by a pass of its own; where rounding undoes it, step outward a little.

    A point on the decision boundary can change sides with the batch or the layout it is computed in. The extra
    passes count, and a budget of queries sets them aside beforehand (where it is too small for that, nothing is
    confirmed here).
    """
    shaky, draws = meter.found.nonzero().squeeze(1), DRAWS if target.stochastic else 1
    for push in PUSHES:
        rows = shaky
        if not len(rows):
            return
        origin, tried = meter.x[rows], meter.best[rows]
        if push:
            tried = (origin + (tried - origin) * (1 + push)).clamp(0, 1)
            tried = tried if meter.seeks == "minimum" else meter.ball.project(tried, origin)
        hit = sum(_reached(meter, target, tried, rows).float() for _ in range(draws)) * 2 > draws
        meter.forward[rows] += draws
        good = rows[hit]
        if push:
            meter.best[good] = tried[hit]
            meter.distance[good] = meter.ball.distance(tried[hit], origin[hit])
        shaky = rows[~hit]
    meter.found[shaky] = False
    meter.distance[shaky] = INF
    meter.best[shaky] = meter.x[shaky]


def _reached(meter: Meter, target: Target, tried: Tensor, rows: Tensor) -> Tensor:
    parts = zip(torch.split(tried, target.batch), torch.split(rows, target.batch), strict=True)
    with torch.no_grad():
        return torch.cat([meter.outer[ids].reached(target.answer(part)) for part, ids in parts])
