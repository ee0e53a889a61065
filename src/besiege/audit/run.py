"""Runs the cells of a plan one after another and keeps the facts."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from besiege import __version__
from besiege.audit.pictures import take
from besiege.audit.plan import Cell, Plan, threat_text
from besiege.core.errors import BesiegeError
from besiege.core.images import Images
from besiege.core.target import Execution, Target
from besiege.engine.summary import agree, siege
from besiege.results.audit import Audit, Environment, LeftOut, Picture, worst_cases
from besiege.results.interval import wilson
from besiege.results.record import Record

STARTS = 50
"""So many images of the set may serve a decision-based attack as a starting point."""


@dataclass(frozen=True)
class Began:
    """A cell has begun."""

    cell: Cell
    images: int


@dataclass(frozen=True)
class Passed:
    """So many images went through the target."""

    rows: int


@dataclass(frozen=True)
class Ended:
    """A cell has ended with these facts."""

    cell: Cell
    record: Record


@dataclass(frozen=True)
class Failed:
    """A cell could not be run to its end."""

    cell: Cell
    why: str


Event = Began | Passed | Ended | Failed


def audit(
    target: Target,
    images: Images,
    plan: Plan,
    folder: Path,
    *,
    budget: str = "quick",
    seed: int = 0,
    execution: Execution = "auto",
    command: str = "",
    warnings: Sequence[str] = (),
    tell: Callable[[Event], None] = lambda event: None,
) -> Audit:
    """Send every cell of ``plan`` and keep the books in ``folder``, written anew after each cell.

    Ctrl-C ends the run; what is done is returned, marked as incomplete. A cell that fails is left out with
    its reason, and the others go on.

    Raises:
        BadInput: the target does not take the images, or ``folder`` cannot be written.
    """
    agree(target, images)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    scores = target.scores(images.x)
    clean, confidence = scores.argmax(1), scores.softmax(1).amax(1)
    right, n = int((clean == images.y).sum()), len(images)
    records: list[Record] = []
    pictures: list[Picture] = []
    left_out = [LeftOut(attack=attack, threat=threat, why=why) for attack, threat, why in plan.left_out]
    shown: set[int] = set()

    def books(complete: bool) -> Audit:
        done = Audit(
            name=folder.name,
            target=target.name,
            fingerprint=target.fingerprint,
            data=images.name,
            n=n,
            classes=target.classes,
            shape=target.shape,
            seed=seed,
            budget=budget,
            started=started,
            seconds=time.monotonic() - began,
            command=command,
            environment=environment(target),
            clean_accuracy=right / n,
            clean_interval=wilson(right, n),
            worst=worst_cases(records),
            records=records,
            left_out=left_out,
            pictures=pictures,
            notes=[*target.notes, *images.notes],
            warnings=list(warnings),
            complete=complete,
        )
        done.save(folder)
        return done

    books(False)
    starts = images.sample(STARTS, seed).x
    try:
        for cell in plan.cells:
            rows = sample(n, cell.images, seed).to(images.x.device)
            tell(Began(cell, len(rows)))
            try:
                outcome, verdict, record = siege(
                    cell.attack,
                    target,
                    images[rows],
                    cell.threat,
                    seed=seed,
                    starts=starts,
                    clean=clean[rows],
                    execution=execution,
                    progress=lambda passed: tell(Passed(passed)),
                )
            except BesiegeError as error:
                left_out.append(LeftOut(attack=cell.attack.name, threat=threat_text(cell.threat.ball), why=str(error)))
                tell(Failed(cell, str(error)))
                continue
            records.append(record)
            pictures += take(folder, record, outcome, verdict, images[rows], confidence[rows], shown)
            books(False)
            tell(Ended(cell, record))
    except KeyboardInterrupt:
        missing = plan.cells[len(records) + len(left_out) - len(plan.left_out) :]
        left_out += [
            LeftOut(attack=cell.attack.name, threat=threat_text(cell.threat.ball), why="the run was interrupted")
            for cell in missing
        ]
        return books(False)
    return books(True)


def sample(n: int, limit: int | None, seed: int) -> torch.Tensor:
    """The numbers of ``limit`` of ``n`` images, the same for every attack and in order."""
    if limit is None or limit >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


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
