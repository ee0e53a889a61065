"""The facts of one audit: its cells, what follows from them together, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, ValidationError

from besiege.core.errors import BadInput
from besiege.results import files
from besiege.results.interval import wilson
from besiege.results.record import Facts, Interval, Norm, Record, ball_text

FILE = "audit.json"


class Worst(Facts):
    """The worst case over all attacks of one threat, image by image."""

    norm: Norm
    eps: float
    robust_accuracy: float
    robust_interval: Interval
    attacks: list[str]

    def __str__(self) -> str:
        return ball_text(self.norm, self.eps)


class LeftOut(Facts):
    """A cell that was not run, and why."""

    attack: str
    threat: str
    why: str


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


class Environment(Facts):
    """What it ran on."""

    besiege: str
    torch: str
    python: str
    platform: str
    device: str
    threads: int


class Audit(Facts):
    """Everything that a report needs. ``complete`` is False where the run was cut short."""

    name: str
    target: str
    fingerprint: str
    data: str
    n: int
    classes: int
    shape: tuple[int, int, int]
    seed: int
    budget: str
    started: str
    seconds: float
    command: str
    environment: Environment
    clean_accuracy: float
    clean_interval: Interval
    worst: list[Worst] = Field(default_factory=list)
    records: list[Record] = Field(default_factory=list)
    left_out: list[LeftOut] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    complete: bool = True

    def save(self, folder: Path) -> Path:
        """Write the audit into its folder, in one step."""
        files.write(folder / FILE, self.json_text())
        return folder / FILE


def load(run: Path) -> Audit:
    """The audit in a run folder, or in a JSON file.

    Raises:
        BadInput: there is none, or it is none of ours.
    """
    path = run / FILE if run.is_dir() else run
    if not path.exists():
        raise BadInput(f"there is no audit at {path}; `besiege audit --out {run}` makes one")
    try:
        return Audit.model_validate_json(files.read(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(f"{path} is no audit of besiege: {where}: {first['msg']}") from None


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


def slug(*parts: str) -> str:
    """A folder name made of ``parts``: letters, digits, dots and dashes."""
    return "-".join(filter(None, (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts))) or "run"
