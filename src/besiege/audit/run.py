"""Runs the cells of a plan, shard by shard, into the store of a run folder."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from besiege import __version__
from besiege.attacks.whitebox.pgd import pgd
from besiege.audit.checks import blackbox_is_weaker, check_target, larger_eps_is_stronger
from besiege.audit.fronts import Beyond, Front, Material, Scene, fight
from besiege.audit.pictures import take
from besiege.audit.plan import FEWEST, Cell, Plan, Speed, allot, customary, threat_text
from besiege.audit.recommend import advised
from besiege.core.errors import BesiegeError
from besiege.core.images import Images
from besiege.core.target import Execution, Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import Outcome, evade
from besiege.engine.judge import Verdict
from besiege.engine.summary import siege
from besiege.results.audit import FILE, FRONT, Audit, Environment, LeftOut, derived, shard_key, shard_span
from besiege.results.checks import Check
from besiege.results.defense import Row
from besiege.results.record import Facts, Record
from besiege.results.store import Store
from besiege.targets.check import throughput

STARTS = 50
"""So many images of the set may serve a decision-based attack as a starting point."""
TRAINING = 200
"""A universal perturbation is fitted on so many images apart from those it is judged on."""

SHARD = 100
"""A cell is committed in shards of at most this many images: what a kill can undo."""
CHECKED = 20
"""The target is checked on this many images that it gets right."""
CHECKS = 400
"""About so many passes an image take the checks."""
NO_TIME = "no time was left for "
"""How the reason begins why the clock left a cell out."""


@dataclass(frozen=True)
class Began:
    """A shard of a cell has begun."""

    cell: Cell
    images: int


@dataclass(frozen=True)
class Passed:
    """So many images went through the target."""

    rows: int


@dataclass(frozen=True)
class Ended:
    """A shard of a cell is stored with these facts."""

    cell: Cell
    record: Record


@dataclass(frozen=True)
class Failed:
    """A cell could not be run to its end."""

    cell: Cell
    why: str


@dataclass(frozen=True)
class Opened:
    """A front has been opened."""

    front: Front


@dataclass(frozen=True)
class Fought:
    """A front is done; these are its facts."""

    front: Front
    facts: Facts


Event = Began | Passed | Ended | Failed | Opened | Fought


class _Over(Exception):
    """The time is up in the middle of a front."""


def manifest(
    target: Target,
    images: Images,
    plan: Plan,
    *,
    budget: str = "quick",
    seed: int = 0,
    beyond: Beyond | None = None,
) -> dict[str, Any]:
    """What makes a run that run and no other; a folder that holds another is refused by its `Store`."""
    return {
        "target": target.name,
        "fingerprint": target.fingerprint,
        "data": images.name,
        "n": len(images),
        "digest": images.digest,
        "budget": budget,
        "seed": seed,
        "threats": list(dict.fromkeys(threat_text(cell.threat.ball) for cell in plan.cells)),
        "attacks": list(dict.fromkeys(cell.attack.name for cell in plan.cells)),
        "cells": {str(cell): cell.facts() for cell in plan.cells},
        **({} if beyond is None else beyond.facts()),
        "classes": target.classes,
        "shape": target.shape,
        "besiege": __version__,
    }


def audit(
    target: Target,
    images: Images,
    plan: Plan,
    store: Store,
    *,
    seed: int = 0,
    seconds: float | None = None,
    speed: Speed | None = None,
    execution: Execution = "auto",
    command: str = "",
    warnings: Sequence[str] = (),
    beyond: Beyond | None = None,
    tell: Callable[[Event], None] = lambda event: None,
) -> Audit:
    """Run what ``store`` lacks of ``plan`` and write audit.json beside it; the store is one of this `manifest`.

    Shards are sent in rounds, so that a run that is cut short has met all attacks. ``seconds`` bound the whole:
    cells get what `allot` gives them, by the ``speed`` of the target (measured if not given) and then by what
    they took. What lies ``beyond`` evasion comes after them. A shard that the clock cuts counts until a later run
    has done it in full. Ctrl-C ends the run; either way what is done is returned, marked as incomplete. A cell that
    fails is left out with its reason.

    Raises:
        BadInput: the target does not take the images, or the folder cannot be written.
    """
    target.takes(images)
    began = time.monotonic()
    deadline = INF if seconds is None else began + seconds
    if seconds is not None and speed is None:
        speed = measured(target, images, seconds)
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "git": git_state(),
        "environment": environment(target).model_dump(),
    }
    known = store.manifest
    scores = target.scores(images.x)
    clean = scores.argmax(1)
    clean = torch.tensor(known["clean_label"]).to(clean) if "clean_label" in known else clean
    (store.folder / FILE).unlink(missing_ok=True)
    store.note(
        sessions=[*known.get("sessions", []), session],
        label=images.y.tolist(),
        clean_label=clean.tolist(),
        opening=known.get("opening", time.monotonic() - began),
        crossed=[],
        notes=[*target.notes, *images.notes],
        warnings=list(warnings),
        left_out=[],
        complete=False,
    )
    run = _Run(target, images, plan, store, seed, execution, clean, scores.softmax(1).amax(1), deadline, speed, tell)
    why = NO_TIME + "{} of {} images"
    try:
        run.check()
        run.cells()
        if beyond is not None:
            for front in beyond.fronts:
                run.front(front, beyond.material)
    except KeyboardInterrupt:
        why = "the run was interrupted before {} of {} images"
    left_out = [LeftOut(attack=attack, threat=threat, why=reason) for attack, threat, reason in plan.left_out]
    for cell in plan.cells:
        count = cell.count(len(images))
        missing = count - run.done[str(cell)]
        if missing:
            reason = run.failed.get(str(cell), why.format(missing, count))
            left_out.append(LeftOut(attack=cell.attack.name, threat=threat_text(cell.threat.ball), why=reason))
    for front in () if beyond is None else beyond.fronts:
        name = FRONT + str(front)
        if name not in store.manifest:
            reason = run.failed.get(name, why.replace("{} of {} images", "it"))
            left_out.append(LeftOut(attack=str(front), threat="", why=reason))
    complete = len(run.failed) == len(left_out) - len(plan.left_out)
    left_out += () if beyond is None else beyond.lacking
    store.note(crossed=[asdict(check) for check in crossed(derived(store).records)])
    store.note(left_out=[one.model_dump() for one in left_out], complete=complete)
    store.note(advice=[one.model_dump() for one in advised(derived(store))])
    found = derived(store)
    found.save(store.folder)
    return found


@dataclass
class _Run:
    """One session on a run folder: what it works on, how far each cell is, which failed."""

    target: Target
    images: Images
    plan: Plan
    store: Store
    seed: int
    execution: Execution
    clean: Tensor
    confidence: Tensor
    deadline: float
    speed: Speed | None
    tell: Callable[[Event], None]

    def __post_init__(self) -> None:
        self.order = drawn(len(self.images), self.seed)
        self.starts = self.images.sample(STARTS, self.seed).x
        self.failed: dict[str, str] = {}
        self.done = {str(cell): 0 for cell in self.plan.cells}
        for key in self.store.keys():
            name, _, last, cut = shard_span(key)
            self.done[name] = self.done[name] if cut else max(last, self.done[name])
        self.costs = {}
        if self.speed is not None:
            self.costs = {str(cell): cell.seconds(1, self.speed) for cell in self.plan.cells}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def check(self) -> None:
        """The checks that need no attack's result, once a run, on fewer images where time is short."""
        right = [row for row in self.order.tolist() if int(self.clean[row]) == int(self.images.y[row])][:CHECKED]
        if self.speed is not None and self.deadline < INF:
            right = right[: int(self.left / 10 / CHECKS / self.speed.of(self.target.access))]
        if right and "checks" not in self.store.manifest:
            began = time.monotonic()
            few = self.images[torch.tensor(sorted(right), device=self.images.x.device)]
            checks = checked(self.target, few, self.plan, self.seed)
            spent = self.store.manifest["opening"] + time.monotonic() - began
            self.store.note(checks=[asdict(check) for check in checks], opening=spent)

    def cells(self) -> None:
        """Send shard after shard, always of the cell that has met the fewest images, while there is time.

        Where time is short the first shard of a cell is a small one, to see what it takes.
        """
        over: set[str] = set()
        while True:
            waiting = [cell for cell in self.plan.cells if str(cell) not in over and self._lacks(cell)]
            lots = self._lots(waiting)
            if not any(lots):
                return
            cell, lot = min(
                ((cell, lot) for cell, lot in zip(waiting, lots, strict=True) if lot),
                key=lambda pair: self.done[str(pair[0])],
            )
            size = FEWEST if self.deadline < INF and not self.done[str(cell)] else SHARD
            if not self._shard(cell, min(lot, size), self.left / len(waiting)):
                over.add(str(cell))

    def _lacks(self, cell: Cell) -> int:
        return cell.count(len(self.images)) - self.done[str(cell)]

    def _lots(self, waiting: Sequence[Cell]) -> list[int]:
        lacks = [self._lacks(cell) for cell in waiting]
        if self.deadline == INF:
            return lacks
        return allot([(left, self.costs[str(cell)]) for left, cell in zip(lacks, waiting, strict=True)], self.left)

    def _shard(self, cell: Cell, count: int, share: float) -> bool:
        """Run and store the next ``count`` images of a cell; say whether it may go on."""
        name, began = str(cell), time.monotonic()
        first, universal = self.done[name], cell.attack.card.kind == "universal"
        if universal:
            count = min(count, -(-len(self.images) // 2))
        rows = self.order[first : first + count].sort().values.to(self.images.x.device)
        bound = min(self.left, max(share, 4 * self.costs[name] * count)) if self.deadline < INF else None
        self.tell(Began(cell, len(rows)))
        try:
            outcome, verdict, record = siege(
                cell.attack,
                self.target,
                self.images[rows],
                replace(cell.threat, seconds=bound),
                seed=self.seed,
                starts=self.starts,
                training=self._others(rows) if universal else None,
                clean=self.clean[rows],
                execution=self.execution,
                progress=lambda passed: self.tell(Passed(passed)),
            )
        except BesiegeError as error:
            self.failed[name] = str(error)
            self.tell(Failed(cell, str(error)))
            return False
        cut = bound is not None and outcome.seconds >= bound
        notes = [*record.notes, *(["time cut it short: the true figure is lower"] if cut else [])]
        record = record.model_copy(
            update={"threat": record.threat.model_copy(update={"seconds": None}), "notes": notes}
        )
        key = shard_key(name, first, first + count, cut)
        if self.store.record(key) is None:
            self._commit(key, first, outcome, verdict, record, rows, began)
        if cut:
            return False
        self.done[name] += count
        self.costs[name] = (time.monotonic() - began) / count
        self.tell(Ended(cell, record))
        return True

    def front(self, front: Front, material: Material) -> None:
        """Fight on a front, unless it has been; its rows are kept as they are done."""
        name, began = FRONT + str(front), time.monotonic()
        if name in self.store.manifest:
            return
        if self.left <= 0:
            return
        self.tell(Opened(front))
        rows = f"rows of {front}"
        known = self.store.manifest.get(rows, {})

        def keep(key: str, row: Row) -> None:
            known[key] = row.model_dump(mode="json")
            self.store.note(**{rows: known})

        def passed(_: int) -> None:
            if self.left <= 0:
                raise _Over

        scene = Scene(self.target, self.images, self.plan, material, self.store.folder, self.seed, passed)
        try:
            facts, exhibits = fight(front, scene, {key: Row(**row) for key, row in known.items()}, keep)
        except _Over:
            return
        except BesiegeError as error:
            self.failed[name] = str(error)
            return
        noted = {
            "kind": type(facts).__name__,
            "facts": facts.model_dump(mode="json"),
            "exhibits": [one.model_dump() for one in exhibits],
            "wall": time.monotonic() - began,
        }
        self.store.note(**{name: noted})
        self.tell(Fought(front, facts))

    def _others(self, rows: Tensor) -> Images:
        """What a universal perturbation is fitted on that is judged on ``rows``."""
        apart = self.order[~torch.isin(self.order, rows.cpu())][:TRAINING]
        return self.images[apart.sort().values.to(self.images.x.device)]

    def _commit(
        self, key: str, first: int, outcome: Outcome, verdict: Verdict, record: Record, rows: Tensor, began: float
    ) -> None:
        """The cell's facts, its outcomes, a picture of its first shard and the images that were verified."""
        pictures = []
        if not first:
            held = (self.store.record(other) or {} for other in self.store.keys())
            shown = {picture["index"] for cell in held for picture in cell["pictures"]}
            here = self.images[rows]
            pictures = take(self.store.folder, record, outcome, verdict, here, self.confidence[rows], shown)
        facts = {
            "record": record.model_dump(mode="json", exclude={"images"}),
            "pictures": [picture.model_dump() for picture in pictures],
            "wall": time.monotonic() - began,
        }
        images = record.images.model_dump()
        index = images.pop("index")
        won = verdict.success
        tensors: Mapping[str, NDArray[Any]] = {
            "adv": outcome.adv[won].cpu().numpy(),
            "index": outcome.index[won].cpu().numpy(),
        }
        self.store.commit(key, facts, index, images, tensors)


def checked(target: Target, few: Images, plan: Plan, seed: int) -> list[Check]:
    """The checks of a target on a few images that it gets right, under the first threat that PGD knows."""
    balls = [cell.threat.ball for cell in plan.cells if cell.threat.ball.norm in pgd.card.norms]
    ball = (balls or customary(target.shape))[0]
    checks = check_target(target, few, ball, seed)
    if target.access >= Access.GRADIENTS:
        radii = [float(ball.eps) * times for times in (0.5, 1, 2, 4)]
        broken = [_broken(target, few, ball.sized(eps), seed) for eps in radii]
        checks.append(larger_eps_is_stronger(radii, broken))
    return checks


def _broken(target: Target, few: Images, ball: Ball, seed: int) -> float:
    """The share of images that a short PGD takes."""
    outcome = evade(pgd(steps=20), target, few, ThreatModel(Access.GRADIENTS, ball), seed=seed)
    return float(outcome.success.double().mean())


def crossed(records: Sequence[Record]) -> list[Check]:
    """Under each threat that both met: do queries break what gradients leave standing?"""
    checks = []
    for threat in dict.fromkeys(str(record.threat) for record in records):
        fell: dict[str, dict[int, bool]] = {"whitebox": {}, "blackbox": {}}
        for record in records:
            if str(record.threat) == threat and record.family in fell:
                held = fell[record.family]
                for index, hit in zip(record.images.index, record.images.success, strict=True):
                    held[index] = held.get(index, False) or hit
        both = sorted(fell["whitebox"].keys() & fell["blackbox"].keys())
        if both:
            white, black = (torch.tensor([held[index] for index in both]) for held in fell.values())
            check = blackbox_is_weaker(white, black)
            checks.append(replace(check, evidence=f"within {threat}, on {len(both)} images, {check.evidence}"))
    return checks


def drawn(n: int, seed: int) -> Tensor:
    """The numbers of n images in the order in which every attack meets them."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def sample(n: int, limit: int | None, seed: int) -> Tensor:
    """The numbers of the first ``limit`` drawn of n images (None: all), sorted."""
    return drawn(n, seed)[:limit].sort().values


def measured(target: Target, images: Images, seconds: float | None = None) -> Speed:
    """How fast the target is, by a probe of about two seconds, or a twentieth of ``seconds`` where that is less."""
    found = throughput(target, images, 2.0 if seconds is None else min(2.0, seconds / 20))
    return Speed(found.forward / 1000, found.both / 1000)


def git_state() -> str:
    """The commit of the folder that this runs in, and whether files differ from it; nothing outside of git."""
    try:
        commit, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}, changed" if changed else commit


def environment(target: Target) -> Environment:
    """What this process runs on."""
    return Environment(
        besiege=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=str(target.device),
        threads=torch.get_num_threads(),
    )
