"""What is measured, on which network, and what it has to reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from besiege.bench.measure import Failure, Figures
from besiege.core.errors import BadInput
from besiege.core.method import Attack, make
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.regions import parse

OURS = "besiege"
PAPER = "besiege, as in the paper"


@dataclass(frozen=True)
class Case:
    """An attack on a network of `benchmarks.networks`, with the ``options`` that ours and the peers get.

    ``peers`` are options for them alone: ours finds as near an image by other means, or in fewer steps; ``paper``
    are those that make ours the method as published, which is raced too. ``laps`` and ``images`` bound what the
    command line asks for where a peer takes minutes. ``alone`` leaves the peers out: only the overhead is of interest.
    ``judged`` is the region that the images are looked for in where it is not the threat's.
    """

    name: str
    network: str
    threat: str
    options: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    queries: int | None = None
    seeds: tuple[int, ...] = (0,)
    laps: int | None = None
    images: int | None = None
    alone: bool = False
    judged: str = ""

    @property
    def ball(self) -> Ball:
        """Where the adversarial images have to lie."""
        return parse(self.judged or self.threat)

    @property
    def key(self) -> str:
        """The attack and the norm."""
        return " ".join([self.name, self.threat.partition(":")[0]])

    @property
    def place(self) -> str:
        """The attack and the network."""
        return f"{self.name} on {self.network}"

    @property
    def attack(self) -> Attack:
        """Ours."""
        return make(self.name, **self.options)

    @property
    def published(self) -> Attack | None:
        """Ours, as in the paper; None where that is what ours is anyway."""
        return make(self.name, **{**self.options, **self.paper}) if self.paper else None

    @property
    def model(self) -> ThreatModel:
        """What ours may see and spend."""
        return ThreatModel(Access.GRADIENTS, parse(self.threat), self.queries)

    @property
    def shared(self) -> dict[str, Any]:
        """What a peer's function can ask for."""
        ball = parse(self.threat)
        radius = {} if ball.eps == INF else {"eps": ball.eps}
        return {"norm": ball.norm, **radius, "queries": self.queries, **self.options, **self.peers}

    def __str__(self) -> str:
        norm, _, eps = self.threat.partition(":")
        where = f"nearest in {norm}" if eps == "inf" else self.threat
        given = {**self.options, **({} if self.queries is None else {"queries": self.queries})}
        others = [f"{who}: {_listed(what)}" for who, what in (("peers", self.peers), (PAPER, self.paper)) if what]
        title = f"{self.name}{' alone' if self.alone else ''} on {self.network}, {where}"
        return "; ".join([title, *([_listed(given)] if given else []), *others])


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in options.items()
    )


CASES = (
    Case("fgsm", "A", "linf:0.1"),
    Case("bim", "A", "linf:0.1", {"steps": 30, "stride": 1 / 255}),
    Case("pgd", "B", "linf:8/255", {"steps": 40}),
    Case("apgd", "A", "linf:0.1", {"steps": 100}),
    Case("deepfool", "A", "l2:inf"),
    Case(
        "cw-l2",
        "A",
        "l2:inf",
        peers={"steps": 1000, "searches": 6},
        paper={"opening": 0, "decay": 1.0, "steps": 10000, "searches": 9},
        laps=1,
        images=50,
    ),
    Case(
        "cw-linf",
        "A",
        "linf:inf",
        paper={"opening": 0, "steps": 1000, "lr": 0.005, "doublings": 21, "precision": 1.0, "least": 1 / 256},
        laps=1,
        images=10,
    ),
    Case(
        "cw-l0",
        "A",
        "l0:inf",
        paper={"share": 0.3, "opening": 0, "steps": 1000, "lr": 0.01, "doublings": 31},
        laps=1,
        images=2,
    ),
    Case(
        "lbfgs",
        "A",
        "l2:inf",
        paper={"opening": 0, "steps": 1000, "searches": 5},
        laps=1,
        images=50,
    ),
    *(
        Case(
            "ead",
            "A",
            f"l{norm}:inf",
            peers={"steps": 1000, "searches": 9, "beta": beta},
            paper={"steps": 1000, "searches": 9, "beta": beta, "stride": 0.01},
            laps=1,
            images=20,
        )
        for norm, beta in ((1, 1e-2), (2, 1e-3))
    ),
    *(
        Case(
            "brendel-bethge",
            "A",
            f"{norm}:inf",
            {"steps": 100},
            paper={"steps": 1000, "opening": 0.0, "depth": 0.0, "region": 1e-3, "halvings": 20, "momentum": 0.8},
            laps=1,
            images=20,
        )
        for norm in ("l0", "l1", "l2", "linf")
    ),
    Case("fmn", "A", "l2:inf", {"steps": 100}, images=50),
    Case("ddn", "A", "l2:inf", {"steps": 100}),
    Case("newtonfool", "A", "l2:inf", {"steps": 100}),
    Case("jsma", "A", "l0:inf", {"gamma": 0.145}, laps=1, images=50),
    Case("jsma", "B", "l0:inf", {"gamma": 0.145}, laps=1, images=10),
    *(
        Case(
            "wasserstein",
            network,
            f"wasserstein:{eps}",
            paper={
                "strength": strength,
                "direction": "linf",
                "stride": 0.1,
                "steps": 400,
                "sweeps": 50,
                "warm": False,
                "growth": 1.1,
            },
            laps=1,
            images=10,
        )
        for network, eps, strength in (("A", 1.0, 4.0), ("B", 0.1, 0.3))
    ),
    Case("square", "R", "linf:0.15", {"iterations": 1000}, queries=1000, images=50),
    # On R ours has 3,500 queries, the peers 5,000. 16 rounds are what these pay for: the t-th spends 100 sqrt(t) on its
    # gradient and about 30 on the rest. Of foolbox's steps every tenth asks twice.
    Case("hopskipjump", "R", "l2:inf", peers={"rounds": 16}, queries=3500, laps=1, images=20),
    Case("hopskipjump", "A", "l2:inf", peers={"rounds": 16}, queries=5000, seeds=(0, 1, 2), images=50),
    Case("boundary", "R", "l2:inf", peers={"steps": 4400}, queries=3500, laps=1, images=20),
    Case("boundary", "A", "l2:inf", peers={"steps": 4400}, queries=5000, seeds=(0, 1, 2), images=50),
    # No radius decides: the steps are the peer's too, and what they lead to lies within it.
    Case("simba", "A", "l2:8", {"step": 0.2, "basis": "pixel"}, queries=2000, laps=1, images=50),
    Case("simba", "B", "l2:8", {"step": 0.2, "basis": "dct"}, queries=2000, laps=1, images=20),
    # 2,000 queries are the peers' 400 members and four generations of them.
    Case("one-pixel", "B", "l0:1", {"population": 30, "patience": 700}, queries=2000, laps=1, images=20),
    Case("one-pixel", "B", "l0:3", {"population": 30, "patience": 700}, queries=2000, laps=1, images=20),
    Case("few-pixel", "B", "l0:5", {"patience": 700}, queries=2000, laps=1, images=20),
    # 2,300 and 2,800 queries are the peer's 100 generations, its default.
    Case("threshold", "A", "linf:32/255", queries=2300, laps=1, images=20),
    Case("threshold", "B", "linf:4/255", queries=2800, laps=1, images=10),
    # The peers shift before they turn, and ART draws with cubic splines, which no pose of ours does: what they return
    # keeps to the same limits by its making, and only its label is looked at.
    Case(
        "spatial",
        "A",
        "spatial:1",
        {"shifts": 5, "turns": 31},
        peers={"shift": 0.1, "turn": 30.0},
        laps=1,
        images=50,
        judged="linf:1",
    ),
    # 500 queries are a tenth of what ART spends here; left alone, ours spends 2,855.
    Case(
        "zoo",
        "A",
        "l2:inf",
        peers={"iterations": 100, "searches": 1, "first_c": 1.0},
        queries=500,
        laps=1,
        images=20,
    ),
    Case("autoattack", "R", "linf:0.1", laps=1),
    *(
        Case(name, network, threat, options, queries=queries, alone=True)
        for name, network, threat, options, queries in (
            ("pgd", "A", "linf:0.1", {}, None),
            ("fmn", "A", "l2:inf", {}, None),
            ("cw-l2", "A", "l2:inf", {}, None),
            ("hopskipjump", "A", "l2:inf", {}, 5000),
            ("boundary", "A", "l2:inf", {}, 5000),
            ("square", "R", "linf:0.15", {"iterations": 1000}, 1000),
            ("fgsm", "B", "linf:8/255", {}, None),
            ("bim", "B", "linf:8/255", {"steps": 30}, None),
            ("apgd", "B", "linf:8/255", {}, None),
            ("deepfool", "B", "l2:inf", {}, None),
            ("cw-l2", "B", "l2:inf", {}, None),
            ("fmn", "B", "l2:inf", {}, None),
            ("ddn", "B", "l2:inf", {}, None),
            ("square", "B", "linf:8/255", {"iterations": 1000}, 1000),
            ("hopskipjump", "B", "l2:inf", {}, 500),
            ("boundary", "B", "l2:inf", {}, 500),
            ("autoattack", "B", "linf:8/255", {}, None),
        )
    ),
    *(
        Case(name, network, threat, laps=laps, images=images, alone=True)
        for network, laps, images in (("A", 3, 100), ("B", 1, 20))
        for name, threat in (
            ("cw-linf", "linf:inf"),
            ("cw-l0", "l0:inf"),
            ("lbfgs", "l2:inf"),
            ("ead", "l1:inf"),
            ("newtonfool", "l2:inf"),
        )
    ),
)


@dataclass(frozen=True)
class Result:
    """What a race found, ours and the peers', and where and with what it was run."""

    case: Case
    figures: Mapping[str, Figures | Failure]
    facts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def ours(self) -> Figures:
        """Our figures.

        Raises:
            BadInput: ours failed.
        """
        return self.of(OURS)

    @cached_property
    def peers(self) -> list[Figures]:
        """Those of the peers that ran."""
        return [found for name, found in self.figures.items() if name != OURS and isinstance(found, Figures)]

    def of(self, name: str) -> Figures:
        """One contender's figures.

        Raises:
            BadInput: it was not there, or failed.
        """
        found = self.figures.get(name)
        if not isinstance(found, Figures):
            raise BadInput(f"{name} has no figures for {self.case}" + (f": {found.why}" if found else ""))
        return found

    def best(self, read: Callable[[Figures], float | None]) -> float:
        """The lowest figure of a peer that makes at least as many images fall as any other."""
        if not self.peers:
            raise BadInput(f"no peer has figures for {self.case}")
        least = min(peer.robust_accuracy for peer in self.peers)
        read_all = (read(peer) for peer in self.peers if peer.robust_accuracy <= least)
        return min(value for value in read_all if value is not None)


@dataclass(frozen=True)
class Claim:
    """A figure of one race, of the case with that name, key or place, that must not exceed a bar."""

    name: str
    what: str
    figure: Callable[[Result], float | None]
    bar: Callable[[Result], float]


def _cpu(figures: Figures) -> float:
    return figures.cpu_ms


def _passes(figures: Figures) -> float:
    return figures.forward + figures.backward


def _robust(figures: Figures) -> float:
    return figures.robust_accuracy


def _median(figures: Figures) -> float:
    return INF if figures.median_distance is None else figures.median_distance


def _mean(figures: Figures) -> float:
    return INF if figures.mean_distance is None else figures.mean_distance


CLAIMS = (
    Claim("pgd", "CPU ms an image", lambda r: r.ours.cpu_ms, lambda r: 15.0),
    Claim("pgd", "robust accuracy, against the best peer's", lambda r: _robust(r.ours), lambda r: r.best(_robust)),
    Claim("apgd", "CPU time over the fastest peer's", lambda r: r.ours.cpu_ms / min(map(_cpu, r.peers)), lambda r: 0.3),
    Claim("apgd", "robust accuracy, against the best peer's", lambda r: _robust(r.ours), lambda r: r.best(_robust)),
    Claim("cw-l2", "median norm over the best peer's", lambda r: _median(r.ours) / r.best(_median), lambda r: 1.02),
    Claim("cw-l2", "CPU time over adv-lib's", lambda r: r.ours.cpu_ms / r.of("adv-lib").cpu_ms, lambda r: 0.35),
    Claim("cw-l2", "median norm over the paper's", lambda r: _median(r.ours) / _median(r.of(PAPER)), lambda r: 1.02),
    Claim("lbfgs", "median norm over the paper's", lambda r: _median(r.ours) / _median(r.of(PAPER)), lambda r: 1.0),
    Claim("lbfgs", "passes over the paper's", lambda r: _passes(r.ours) / _passes(r.of(PAPER)), lambda r: 1.0),
    Claim("cw-l2", "passes over the paper's", lambda r: _passes(r.ours) / _passes(r.of(PAPER)), lambda r: 0.1),
    *(
        Claim(name, what, figure, bar)
        for name in ("cw-linf", "cw-l0", "ead l1", "ead l2")
        for what, figure, bar in (
            ("median norm over the paper's", lambda r: _median(r.ours) / _median(r.of(PAPER)), lambda r: 1.02),
            ("passes over the paper's", lambda r: _passes(r.ours) / _passes(r.of(PAPER)), lambda r: 0.1),
            ("median norm over the best peer's", lambda r: _median(r.ours) / r.best(_median), lambda r: 1.0),
        )
    ),
    *(
        Claim(f"brendel-bethge {norm}", what, figure, bar)
        for norm in ("l0", "l1", "l2", "linf")
        for what, figure, bar in (
            ("median norm over foolbox'", lambda r: _median(r.ours) / _median(r.of("foolbox")), lambda r: 1.0),
            ("passes over foolbox'", lambda r: _passes(r.ours) / _passes(r.of("foolbox")), lambda r: 1.0),
        )
    ),
    Claim("deepfool", "mean norm over adv-lib's", lambda r: _mean(r.ours) / _mean(r.of("adv-lib")), lambda r: 1.0),
    Claim("deepfool", "CPU time over adv-lib's", lambda r: r.ours.cpu_ms / r.of("adv-lib").cpu_ms, lambda r: 0.9),
    Claim("deepfool", "share that did not fall", lambda r: _robust(r.ours), lambda r: 0.0),
    Claim("fmn", "median norm", lambda r: _median(r.ours), lambda r: 1.22),
    Claim("newtonfool", "median norm", lambda r: _median(r.ours), lambda r: 1.3),
    Claim("newtonfool", "share that did not fall", lambda r: _robust(r.ours), lambda r: 0.05),
    *(
        Claim(f"jsma on {network}", what, figure, bar)
        for network in "AB"
        for what, figure, bar in (
            ("robust accuracy, against the best peer's", lambda r: _robust(r.ours), lambda r: r.best(_robust)),
            ("median pixels over the best peer's", lambda r: _median(r.ours) / r.best(_median), lambda r: 1.0),
            ("CPU time over torchattacks'", lambda r: r.ours.cpu_ms / r.of("torchattacks").cpu_ms, lambda r: 0.2),
        )
    ),
    *(
        Claim(f"wasserstein on {network}", what, figure, bar)
        for network in "AB"
        for what, figure, bar in (
            ("robust accuracy", lambda r: _robust(r.ours), lambda r: 0.15),
            ("robust accuracy, against the paper's", lambda r: _robust(r.ours), lambda r: _robust(r.of(PAPER))),
            ("CPU time over the paper's", lambda r: r.ours.cpu_ms / r.of(PAPER).cpu_ms, lambda r: 0.1),
        )
    ),
    Claim("square", "robust accuracy", lambda r: _robust(r.ours), lambda r: 0.22),
    Claim(
        "square", "CPU time over torchattacks'", lambda r: r.ours.cpu_ms / r.of("torchattacks").cpu_ms, lambda r: 0.7
    ),
    Claim("square", "queries, against torchattacks'", lambda r: r.ours.forward, lambda r: r.of("torchattacks").forward),
    *(
        Claim(name, what, lambda r: _median(r.ours) / r.best(_median), lambda r: 1.0)
        for each in ("hopskipjump", "boundary")
        for name, what in (
            (each, "median norm over the best peer's"),
            (f"{each} on R", "median norm of 3,500 queries over that of the best peer's 5,000"),
        )
    ),
    Claim(
        "hopskipjump", "CPU time over cleverhans'", lambda r: r.ours.cpu_ms / r.of("cleverhans").cpu_ms, lambda r: 1.0
    ),
    *(
        Claim(name, what, figure, bar)
        for name in (
            "simba on A",
            "simba on B",
            "one-pixel",
            "few-pixel",
            "threshold on A",
            "threshold on B",
            "spatial",
        )
        for what, figure, bar in (
            ("robust accuracy, against the best peer's", lambda r: _robust(r.ours), lambda r: r.best(_robust)),
            ("CPU time over ART's", lambda r: r.ours.cpu_ms / r.of("ART").cpu_ms, lambda r: 0.45),
        )
    ),
    Claim("zoo", "queries over ART's", lambda r: r.ours.forward / r.of("ART").forward, lambda r: 0.1),
    Claim("zoo", "robust accuracy, against ART's", lambda r: _robust(r.ours), lambda r: _robust(r.of("ART"))),
    Claim("zoo", "median norm over ART's", lambda r: _median(r.ours) / _median(r.of("ART")), lambda r: 1.0),
    Claim("zoo", "CPU time over ART's", lambda r: r.ours.cpu_ms / r.of("ART").cpu_ms, lambda r: 0.45),
    Claim(
        "autoattack",
        "robust accuracy, against auto-attack's",
        lambda r: _robust(r.ours),
        lambda r: _robust(r.of("auto-attack")),
    ),
    Claim(
        "autoattack",
        "CPU time over auto-attack's",
        lambda r: r.ours.cpu_ms / r.of("auto-attack").cpu_ms,
        lambda r: 0.65,
    ),
)


MODEL_BOUND = ("fgsm", "bim", "pgd", "apgd", "deepfool", "cw-l2", "fmn", "ddn", "square", "hopskipjump", "autoattack")
"""The attacks of which it is asked that nearly all of their time is the model's: 1.10 times that at most."""

WHITE_BOX = ("cw-linf", "cw-l0", "lbfgs", "ead", "ddn", "jsma", "newtonfool")
"""Those of which 1.15 times is asked."""


QUERY_BASED = {"hopskipjump": 1.2, "boundary": 1.2, "square": 1.3}
"""Those that ask for answers alone, and how many times the time of the model, as given, is asked of each."""


def overhead(
    results: Sequence[Result], networks: str, names: Sequence[str] = MODEL_BOUND, *, given: bool = False
) -> float:
    """Our CPU time over the floor on ``networks``, the median over the attacks ``names``.

    Where an attack was raced twice, the race with more images counts. With ``given`` the floor is that of the network
    as it was given.

    Raises:
        BadInput: none of them ran.
    """
    ran = [r for r in results if r.case.name in names and r.case.network in networks]
    if given:
        ran = [r for r in ran if r.ours.given_ms is not None]
    found = {
        r.case.name: r.ours.cpu_ms / r.ours.given_ms if given and r.ours.given_ms else r.ours.overhead
        for r in sorted(ran, key=lambda r: r.ours.images)
    }
    if not found:
        raise BadInput("none of the attacks of which it is asked was run")
    return statistics.median(found.values())
