"""The facts of one audit: its cells, what follows from them together, and what was left out."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from besiege.core.errors import BadInput
from besiege.results import files, store
from besiege.results.checks import Check, of_records
from besiege.results.defense import Defense
from besiege.results.extraction import Theft
from besiege.results.inference import Inversion, Membership, Reconstruction
from besiege.results.interval import wilson
from besiege.results.poisoning import PoisonRecord
from besiege.results.record import Facts, Interval, Norm, Record, Rows, ball_text, joined
from besiege.results.store import Store

FILE = "audit.json"
FRONT = "front "
"""How the name begins under which a store notes what a front brought."""


class Worst(Facts):
    """The worst case over all attacks of one threat, image by image."""

    norm: Norm
    eps: float
    robust_accuracy: float
    robust_interval: Interval
    attacks: list[str]

    def __str__(self) -> str:
        return ball_text(self.norm, self.eps)


class Curve(Facts):
    """The accuracy that is left within each radius, from the nearest adversarial example of each image.

    Every list has an entry a radius; ``low`` and ``high`` bound the accuracy at 95 %. ``attack`` is
    ``worst case`` where the nearest is taken over all attacks.
    """

    norm: Norm
    eps: list[float]
    accuracy: list[float]
    low: list[float]
    high: list[float]
    attack: str


class Nearest(Facts):
    """Which attack needed the least for each image in a norm: an entry for every image that one of them took."""

    norm: Norm
    index: list[int]
    attack: list[str]
    distance: list[float]


class Gate(Facts):
    """A threshold on the lower bound of the worst case's interval, and that bound; None where nothing was run."""

    threat: str
    at_least: float
    low: float | None

    @property
    def passed(self) -> bool:
        """Is the bound high enough?"""
        return self.low is not None and self.low >= self.at_least

    def __str__(self) -> str:
        if self.low is None:
            return (
                f"robust accuracy within {self.threat} was not measured, so it is not known to be {self.at_least:.1%}"
            )
        return (
            f"robust accuracy within {self.threat} is at least {self.low:.1%} (95 %), "
            f"{'as' if self.passed else 'below the'} {self.at_least:.1%} asked for"
        )


class LeftOut(Facts):
    """A cell that was not run, and why; a front has no threat."""

    attack: str
    threat: str
    why: str

    def __str__(self) -> str:
        return f"{self.attack} {self.threat}".rstrip()


class Picture(Facts):
    """One image before and after an attack; ``files`` are the clean, the changed and the change itself.

    The change is shown ``gain`` times as large, around mid-grey.
    """

    attack: str
    threat: str
    index: int
    label: str
    clean_label: str
    clean_confidence: float
    adversarial_label: str
    adversarial_confidence: float
    distance: float
    survives_8bit: bool
    gain: float
    files: tuple[str, str, str]


class Exhibit(Facts):
    """A picture that a front left in the run's folder."""

    front: str
    caption: str
    file: str


class Advice(Facts):
    """What to do, and the fronts and threats whose figures say so."""

    text: str
    figures: list[str]


class Environment(Facts):
    """What it ran on."""

    besiege: str
    torch: str
    python: str
    platform: str
    device: str
    threads: int


class Audit(Facts):
    """Everything that a report needs. ``complete`` is False where the run was cut short.

    ``digest`` names the pixels and labels, ``git`` the commit of the folder that it ran in. ``seconds`` counts
    the work that is kept: what a kill undid is not in it.
    """

    name: str
    target: str
    fingerprint: str
    data: str
    digest: str = ""
    n: int
    classes: int
    shape: tuple[int, int, int]
    seed: int
    budget: str
    started: str
    seconds: float
    command: str
    git: str = ""
    environment: Environment
    clean_accuracy: float
    clean_interval: Interval
    worst: list[Worst] = Field(default_factory=list)
    records: list[Record] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    nearest: list[Nearest] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    gates: list[Gate] = Field(default_factory=list)
    defenses: list[Defense] = Field(default_factory=list)
    memberships: list[Membership] = Field(default_factory=list)
    inversions: list[Inversion] = Field(default_factory=list)
    reconstructions: list[Reconstruction] = Field(default_factory=list)
    thefts: list[Theft] = Field(default_factory=list)
    poisonings: list[PoisonRecord] = Field(default_factory=list)
    exhibits: list[Exhibit] = Field(default_factory=list)
    advice: list[Advice] = Field(default_factory=list)
    left_out: list[LeftOut] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    complete: bool = True

    @property
    def fronts(self) -> list[Defense | Membership | Inversion | Reconstruction | Theft | PoisonRecord]:
        """All that was done beyond evasion."""
        return [
            *self.defenses,
            *self.memberships,
            *self.inversions,
            *self.reconstructions,
            *self.thefts,
            *self.poisonings,
        ]

    def save(self, folder: Path) -> Path:
        """Write the audit into its folder, in one step."""
        files.write(folder / FILE, self.json_text())
        return folder / FILE


def load(run: Path) -> Audit:
    """The audit in a run folder, or in a JSON file; of a run that was killed, what its store holds.

    Raises:
        BadInput: there is none, or it is none of ours.
    """
    path = run / FILE if run.is_dir() else run
    if not path.exists() and (run / store.FILE).exists():
        with store.Store(run) as held:
            return derived(held)
    if not path.exists():
        raise BadInput(f"there is no audit at {path}; `besiege audit --out {run}` makes one")
    try:
        return Audit.model_validate_json(files.read(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(f"{path} is no audit of besiege: {where}: {first['msg']}") from None


def derived(store: Store) -> Audit:
    """The audit that follows from what a run folder holds.

    Raises:
        BadInput: it was cut off before anything was measured.
    """
    known = store.manifest
    if "opening" not in known:
        raise BadInput(f"{store.folder} was cut off before its first figure; run the same command again")
    shards = _counted(store)
    cells = {key: store.record(key) or {} for key in store.keys()}
    parts = ([shards[key] for key in shards if shard_span(key)[0] == name] for name in known["cells"])
    records = [joined(part) for part in parts if part]
    right = sum(label == clean for label, clean in zip(known["label"], known["clean_label"], strict=True))
    clean = wilson(right, known["n"])
    fought = [known[name] for name in known if name.startswith(FRONT)]
    return Audit(
        **{name: known[name] for name in Audit.model_fields if name in known and name not in ("checks", "notes")},
        **{name: known["sessions"][0][name] for name in ("started", "command", "git", "environment")},
        name=store.folder.name,
        seconds=known["opening"] + sum(part["wall"] for part in (*cells.values(), *fought)),
        clean_accuracy=right / known["n"],
        clean_interval=clean,
        worst=worst_cases(records),
        records=records,
        curves=curves(records),
        nearest=nearest(records),
        checks=[Check(**check) for check in known.get("checks", []) + known["crossed"]] + of_records(records, clean),
        notes=known["notes"] + _moves(known["sessions"]),
        pictures=[Picture(**picture) for key in cells if key in shards for picture in cells[key]["pictures"]],
        defenses=[Defense(**one["facts"]) for one in fought if one["kind"] == "Defense"],
        memberships=[Membership(**one["facts"]) for one in fought if one["kind"] == "Membership"],
        inversions=[Inversion(**one["facts"]) for one in fought if one["kind"] == "Inversion"],
        reconstructions=[Reconstruction(**one["facts"]) for one in fought if one["kind"] == "Reconstruction"],
        thefts=[Theft(**one["facts"]) for one in fought if one["kind"] == "Theft"],
        poisonings=[PoisonRecord(**one["facts"]) for one in fought if one["kind"] == "PoisonRecord"],
        exhibits=[Exhibit(**shown) for one in fought for shown in one["exhibits"]],
    )


def cell_name(attack: str, threat: str) -> str:
    """How a store names an attack under a threat."""
    return f"{attack} {threat}"


def shard_key(name: str, first: int, last: int, cut: bool = False) -> str:
    """How a store names a shard of a cell: the images drawn ``first`` to ``last``; ``cut`` by the clock."""
    return f"{name}|{first}-{last}{'|cut' if cut else ''}"


def shard_span(key: str) -> tuple[str, int, int, bool]:
    """The cell, the first and last image and whether the clock cut it, from a shard's key."""
    name, span, *cut = key.split("|")
    first, last = map(int, span.split("-"))
    return name, first, last, bool(cut)


def _moves(sessions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a run went on in another environment than it began in."""
    first = sessions[0]["environment"]
    moved = ({key: value for key, value in one["environment"].items() if value != first[key]} for one in sessions)
    said = (", ".join(f"{key} {value}" for key, value in changed.items()) for changed in moved)
    return [
        f"the run went on at {one['started']} with {text}" for one, text in zip(sessions, said, strict=True) if text
    ]


def _counted(store: Store) -> dict[str, Record]:
    """The shards by key. One that the clock cut counts only where no other speaks of its images."""
    met: dict[str, set[int]] = {}
    found: dict[str, Record] = {}
    for key in sorted(store.keys(), key=lambda key: shard_span(key)[3]):
        rows = store.outcome(key)
        index = rows.pop("image")
        seen = met.setdefault(shard_span(key)[0], set())
        if seen.isdisjoint(index):
            seen.update(index)
            found[key] = Record(**(store.record(key) or {})["record"], images=Rows(index=index, **rows))
    return found


def worst_cases(records: Iterable[Record]) -> list[Worst]:
    """One threat at a time: an image stands if no attack that met it took it.

    An attack that met only some of the images speaks for those alone; the denominator is all of them.
    """
    groups: dict[tuple[Norm, float], list[Record]] = {}
    for record in records:
        if record.threat.eps is not None and not record.threat.targeted:
            groups.setdefault((record.threat.norm, record.threat.eps), []).append(record)
    found = []
    for (norm, eps), cells in groups.items():
        standing: dict[int, bool] = {}
        for cell in cells:
            for index, stands in cell.standing.items():
                standing[index] = standing.get(index, True) and stands
        k, n = sum(standing.values()), len(standing)
        names = [cell.attack for cell in cells]
        found.append(Worst(norm=norm, eps=eps, robust_accuracy=k / n, robust_interval=wilson(k, n), attacks=names))
    return found


def curves(records: Sequence[Record]) -> list[Curve]:
    """What each attack that seeks the minimum says of every radius, and all attacks of its norm together."""
    found = []
    for norm in dict.fromkeys(record.threat.norm for record in records):
        cells = [record for record in records if record.threat.norm == norm and not record.threat.targeted]
        seekers = [cell for cell in cells if cell.seeks == "minimum"]
        radii = [cell.threat.eps for cell in cells if cell.threat.eps is not None]
        if not seekers or not radii:
            continue
        for name in dict.fromkeys(cell.attack for cell in seekers):
            found.append(_curve(norm, name, max(radii), [cell for cell in seekers if cell.attack == name]))
        if len(cells) > 1:
            met = {index for cell in seekers for index in cell.images.index}
            found.append(_curve(norm, "worst case", max(radii), cells, met))
    return found


def nearest(records: Sequence[Record]) -> list[Nearest]:
    """By norm, what took each image from the shortest distance; of two that came as near, the one sent first."""
    found = []
    for norm in dict.fromkeys(record.threat.norm for record in records):
        least: dict[int, tuple[float, str]] = {}
        for record in records:
            if record.threat.norm != norm or record.threat.targeted:
                continue
            for index, far in zip(record.images.index, record.images.distance, strict=True):
                if far is not None and far < least.get(index, (math.inf, ""))[0]:
                    least[index] = far, record.attack
        rows = sorted(least)
        attacks, distances = [least[index][1] for index in rows], [least[index][0] for index in rows]
        if rows:
            found.append(Nearest(norm=norm, index=rows, attack=attacks, distance=distances))
    return found


def _curve(norm: Norm, attack: str, eps: float, cells: Sequence[Record], met: Collection[int] | None = None) -> Curve:
    """Radii in fifteenths of ``eps``, up to where nothing stands or four times as far."""
    nearest: dict[int, float] = {}
    for cell in cells:
        rows = cell.images
        for index, label, clean, far in zip(rows.index, rows.label, rows.clean_label, rows.distance, strict=True):
            if met is None or index in met:
                reach = 0.0 if label != clean else math.inf if far is None else far
                nearest[index] = min(reach, nearest.get(index, math.inf))
    n, radii = len(nearest), [eps * k / 15 for k in range(61)]
    reaches = sorted(nearest.values())
    standing = [n - bisect_right(reaches, radius * (1 + 1e-6) + 1e-7 * bool(radius)) for radius in radii]
    ends = next((k + 1 for k, stands in enumerate(standing) if not stands), len(radii))
    bounds = [wilson(stands, n) for stands in standing[:ends]]
    return Curve(
        norm=norm,
        eps=radii[:ends],
        accuracy=[stands / n for stands in standing[:ends]],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
        attack=attack,
    )


def slug(*parts: str) -> str:
    """A folder name made of ``parts``: letters, digits, dots and dashes."""
    return "-".join(filter(None, (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts))) or "run"
