"""Which attacks an audit sends, under which threat and at what cost. A pure function of cards and budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from besiege.core.errors import BadInput
from besiege.core.method import Attack, Card, Method
from besiege.core.threat import INF, NORM_NAMES, Access, Ball, Norm, ThreatModel
from besiege.regions import within
from besiege.results.audit import cell_name
from besiege.results.record import ball_text

Budget = Literal["quick", "standard", "thorough"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
IMAGES: Mapping[str, int | None] = {"quick": 100, "standard": 1000, "thorough": None}
"""How many images an audit takes where --limit does not say."""

FEWEST = 10
"""Fewer images than this say nothing about an attack."""
RADII: Mapping[Norm, tuple[float, float, float]] = {
    INF: (0.1, 8 / 255, 4 / 255),
    2.0: (1.5, 0.5, 3.0),
    1.0: (15.0, 12.0, 255.0),
    0.0: (15.0, 24.0, 200.0),
    "wasserstein": (1.0, 0.1, 0.1),
    "spatial": (1.0, 1.0, 1.0),
    "color": (1.0, 1.0, 1.0),
}
"""Customary radii by norm: grey images of digits' size, small colour images, large ones."""
LOOPS = ("steps", "restarts", "searches", "samples", "targets", "iterations", "epochs")
"""The options that multiply what an attack costs."""
QUERIES: Mapping[str, int | None] = {"quick": 1000, "standard": 5000, "thorough": None}


@dataclass(frozen=True)
class Share:
    """What an attack gets under one budget: options, at most ``images``, ``queries`` an image."""

    images: int | None = None
    queries: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


SIEGE: Mapping[str, Mapping[str, Share]] = {
    "fgsm": {"quick": Share(), "standard": Share(), "thorough": Share()},
    "pgd": {
        "quick": Share(),
        "standard": Share(),
        "thorough": Share(options={"steps": 100, "restarts": 5}),
    },
    "apgd": {"quick": Share(), "standard": Share(), "thorough": Share(options={"restarts": 5})},
    "deepfool": {"quick": Share(), "standard": Share(), "thorough": Share()},
    "fmn": {"quick": Share(images=50, options={"steps": 50}), "standard": Share(), "thorough": Share()},
    "cw-l2": {"quick": Share(images=20), "standard": Share(images=100), "thorough": Share(images=1000)},
    "autoattack": {
        "quick": Share(images=50, options={"steps": 50, "targets": 3, "queries": 500}),
        "standard": Share(),
        "thorough": Share(),
    },
    **{
        name: {"thorough": Share(images=1000)}
        for name in (
            "bim",
            "lbfgs",
            "ddn",
            "cw-linf",
            "cw-l0",
            "ead",
            "brendel-bethge",
            "jsma",
            "newtonfool",
            "wasserstein",
            "shadow",
            "uap",
            "targeted-uap",
            "houdini",
            "upset",
            "angri",
            "substitute",
        )
    },
    "spatial": {"quick": Share(queries=1000), "standard": Share(queries=1000), "thorough": Share(queries=1000)},
    "colorfool": {"quick": Share(queries=1000), "standard": Share(queries=1000), "thorough": Share(queries=1000)},
    "square": {
        "quick": Share(images=50, queries=500),
        "standard": Share(queries=1000),
        "thorough": Share(queries=5000),
    },
    "hopskipjump": {
        "quick": Share(images=10, queries=1000),
        "standard": Share(images=100, queries=5000),
        "thorough": Share(images=500, queries=20000),
    },
    **{
        name: {"thorough": Share(images=100, queries=5000)}
        for name in ("boundary", "simba", "zoo", "threshold", "one-pixel", "few-pixel")
    },
}
"""The attacks of an audit in the order they are sent, and each one's share of the budgets that it is part of."""


@dataclass(frozen=True)
class Cell:
    """One attack under one threat, on at most ``images`` images."""

    attack: Attack
    threat: ThreatModel
    images: int | None = None

    def __str__(self) -> str:
        return cell_name(self.attack.name, threat_text(self.threat.ball))

    def count(self, n: int) -> int:
        """How many of ``n`` images it meets."""
        return n if self.images is None else min(n, self.images)

    def passes(self, n: int) -> int:
        """At most this many forward passes over ``n`` images, as far as the options tell."""
        return self.count(n) * (self.threat.queries or passes(self.attack))

    def seconds(self, n: int, speed: Speed) -> float:
        """At most so long over ``n`` images: every one stands to the end, which it rarely does."""
        return self.passes(n) * speed.of(self.threat.access)

    def facts(self) -> dict[str, Any]:
        """What it sends, as a manifest states it."""
        return {"options": dict(self.attack.arguments), "images": self.images, "queries": self.threat.queries}


@dataclass(frozen=True)
class Speed:
    """Seconds an image of a forward pass, and of one with the pass back; not a number where there is none."""

    forward: float
    both: float

    def of(self, access: Access) -> float:
        """What one step costs an attack of that access."""
        return self.both if access >= Access.GRADIENTS and math.isfinite(self.both) else self.forward


@dataclass(frozen=True)
class Plan:
    """The cells in order, and those left out: attack, threat, and why."""

    cells: tuple[Cell, ...]
    left_out: tuple[tuple[str, str, str], ...] = ()
    budget: Budget = "quick"

    def seconds(self, n: int, speed: Speed) -> float:
        """What all cells take over ``n`` images at most."""
        return sum(cell.seconds(n, speed) for cell in self.cells)


def allot(pending: Sequence[tuple[int, float]], seconds: float) -> list[int]:
    """How many images each cell gets of the time that is left, from how many it still has and what one costs.

    Cells share the time alike; what a cheap one does not need goes to the dear ones. While one would not come to
    `FEWEST` images, the dearest gets none, and the others its share.
    """
    chosen = sorted(range(len(pending)), key=lambda k: pending[k][0] * pending[k][1])
    while chosen:
        given, left = [0] * len(pending), max(seconds, 0.0)
        for place, k in enumerate(chosen):
            count, cost = pending[k]
            given[k] = count if cost <= 0 else min(count, int(left / (len(chosen) - place) / cost))
            left -= given[k] * cost
        if all(given[k] >= min(FEWEST, pending[k][0]) for k in chosen):
            return given
        chosen.remove(max(chosen, key=lambda k: min(FEWEST, pending[k][0]) * pending[k][1]))
    return [0] * len(pending)


def plan(
    methods: Mapping[str, Method[Any]],
    access: Access,
    threats: Sequence[Ball],
    budget: Budget = "quick",
    only: Sequence[str] = (),
    channels: int | None = None,
) -> Plan:
    """The cells of an audit against a target that grants ``access`` and takes images of ``channels`` (None: of any).

    ``only`` names the attacks to send in place of the usual ones, with their usual share where they have one.

    Raises:
        BadInput: nothing is left to run.
    """
    cells: list[Cell] = []
    left_out: list[tuple[str, str, str]] = []
    for name in dict.fromkeys(only) or [name for name in SIEGE if name in methods and budget in SIEGE[name]]:
        card, part = methods[name].card, share(methods[name].card, budget)
        for ball in threats:
            why = unfit(card, access, ball, channels)
            if why:
                left_out.append((name, threat_text(ball), why))
                continue
            attack = methods[name](**paced(card, part.options, part.queries))
            cells.append(Cell(attack, ThreatModel(card.access, ball, part.queries), part.images))
    if not cells:
        raise BadInput(f"no attack of the plan applies: {'; '.join(sorted({why for _, _, why in left_out}))}")
    return Plan(tuple(cells), tuple(left_out), budget)


def paced(card: Card, options: Mapping[str, Any], queries: int | None) -> dict[str, Any]:
    """``options``, with a method's ``iterations`` set to the queries it has, so that its schedule ends in time."""
    pace = {"iterations": queries} if queries and "iterations" in card.options else {}
    return {**pace, **options}


def unfit(card: Card, access: Access, ball: Ball, channels: int | None = None) -> str | None:
    """Why an attack cannot be sent against such a target under such a threat; None where it can."""
    if card.access > access:
        return f"{card.name} needs {card.access.name.lower()}, the target grants {access.name.lower()}"
    if ball.norm not in card.norms:
        return f"{card.name} works in {', '.join(NORM_NAMES[norm] for norm in card.norms)}"
    if channels and card.channels not in (None, channels):
        return f"{card.name} takes images of {card.channels} channels, the target of {channels}"
    return None


def radius(norm: Norm, shape: tuple[int, int, int]) -> float:
    """The radius that papers use in that norm for images (c, h, w) of that kind."""
    c, h, w = shape
    kind = 2 if max(h, w) > 100 else 0 if c == 1 else 1
    return RADII[norm][kind]


def customary(shape: tuple[int, int, int], budget: Budget = "quick") -> tuple[Ball, ...]:
    """The threats of an audit where the user names none: L∞ and L2; if thorough, the other norms and regions too."""
    norms = [norm for norm in RADII if norm != "color" or shape[0] == 3] if budget == "thorough" else [INF, 2.0]
    return tuple(within(norm, radius(norm, shape)) for norm in norms)


def share(card: Card, budget: Budget) -> Share:
    """What a method gets under a budget; one that the audit does not send is only kept from asking forever."""
    if card.name in SIEGE and budget in SIEGE[card.name]:
        return SIEGE[card.name][budget]
    return Share() if card.access >= Access.GRADIENTS else Share(queries=QUERIES[budget])


def threat_text(ball: Ball) -> str:
    """``linf:8/255``, as records write it."""
    eps = float(ball.eps)
    return ball_text(NORM_NAMES[ball.norm], None if math.isinf(eps) else eps)


def passes(attack: Attack) -> int:
    """At most this many forward passes an image, as far as the attack's options tell; a guide for progress."""
    if attack.card.kind in ("ensemble", "chain"):
        return sum(passes(part) for part in attack.bound()())
    return math.prod(int(attack.arguments.get(key) or 1) for key in LOOPS)
