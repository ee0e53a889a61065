"""One self-contained page of an audit: one file, no network; its only script sorts the table."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from besiege.report import atlas, summary
from besiege.report.pictures import data_uri
from besiege.results.audit import Audit, Curve, Exhibit, Nearest, slug
from besiege.results.defense import Defense
from besiege.results.extraction import Theft
from besiege.results.inference import Inversion, Membership, Reconstruction
from besiege.results.poisoning import PoisonRecord
from besiege.results.record import Record

SORT = """
for (const head of document.querySelectorAll("th")) {
  const button = head.querySelector("button");
  if (!button) continue;
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
    const number = (row) => parseFloat(key(row));
    const rows = [...body.rows], numeric = rows.every((row) => key(row) === "" || !isNaN(number(row)));
    const worth = (row) => (key(row) === "" ? Infinity : number(row));
    rows.sort((a, b) => (numeric ? worth(a) - worth(b) : order(a, b)) * (up ? 1 : -1));
    body.append(...rows);
  });
}
"""
"""Sorts a table by the column whose head is pressed; the page says all that it says without it."""

PLOT = (44, 12, 540, 200)
"""Left, top, width and height of a curve's plot in its drawing of 600 by 250."""

LISTED = 200
"""So many images the page lists one by one; audit.json has them all."""

Besides = Membership | Inversion | Reconstruction | Theft | PoisonRecord
NORMS = {
    "linf": "L∞",
    "l2": "L2",
    "l1": "L1",
    "l0": "L0",
    "wasserstein": "Wasserstein",
    "spatial": "Turns and shifts",
    "color": "Colours",
}
BEYOND = (
    "Attacks that transfer from another model.",
    "Changes outside the threats above: turns, colours and shadows where they are not listed; stickers and patches.",
)
UNSENT = "Poisoned training data, backdoors, theft of the model, and what it gives away of its training data."
ADAPTED = "Attacks adapted to a defense of this model: --defend sends them."


def page(audit: Audit, folder: Path) -> str:
    """The page as text; pictures are read from ``folder``.

    Raises:
        BadInput: a picture is missing.
    """
    shown = [(picture, [data_uri(folder / name) for name in picture.files]) for picture in audit.pictures]
    groups = {
        str(worst): (worst, [record for record in audit.records if str(record.threat) == str(worst)])
        for worst in audit.worst
    }
    besides: list[Besides] = [front for front in audit.fronts if not isinstance(front, Defense)]
    hung: dict[str, list[tuple[Exhibit, str]]] = {front.attack: [] for front in besides}
    for exhibit in audit.exhibits:
        hung[exhibit.front].append((exhibit, data_uri(folder / exhibit.file)))
    return _template().render(
        audit=audit,
        groups=groups,
        shown=shown,
        charts=_charts(audit.curves),
        nearest=[(found.norm, _shares(found), _rows(found), len(found.index)) for found in audit.nearest],
        plot=PLOT,
        sort=Markup(SORT),
        digest=base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode(),
        beyond=_beyond(audit),
        beyond_fronts=[(front, summary.facts(front), front.notes, hung[front.attack]) for front in besides],
        small=max(audit.shape[1:]) < 100,
        passes=sum(_passes(record, "forward") + _passes(record, "backward") for record in audit.records),
        techniques=_techniques([*audit.records, *besides]),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("besiege.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent,
        points=_points,
        span=_span,
        threat=_threat,
        figure=_figure,
        key=lambda value: "" if value is None else repr(value),
        gain=lambda value: f"{value:.3g}" if value < 10 else f"{value:.0f}",
        count=_count,
        duration=_duration,
        options=_options,
        anchor=slug,
    )
    return environment.get_template("page.html.j2")


def _beyond(audit: Audit) -> list[str]:
    """What was not tested, beside what was left out with its reason."""
    asked = len(audit.fronts) > len(audit.defenses) or any(not left.threat for left in audit.left_out)
    return [*BEYOND, *([] if audit.defenses else [ADAPTED]), *([] if asked else [UNSENT])]


def _charts(curves: list[Curve]) -> list[dict[str, Any]]:
    """One drawing a norm: its largest radius, each curve as points, and what lies within the worst one's interval."""
    left, top, width, height = PLOT
    drawn = []
    for norm in dict.fromkeys(curve.norm for curve in curves):
        mine = [curve for curve in curves if curve.norm == norm and curve.eps]
        most = max((curve.eps[-1] for curve in mine), default=0.0)
        if most <= 0:
            continue

        def points(eps: list[float], share: list[float], most: float = most) -> str:
            pairs = zip(eps, share, strict=True)
            return " ".join(f"{left + width * e / most:.1f},{top + height * (1 - a):.1f}" for e, a in pairs)

        lines = [(curve, points(curve.eps, curve.accuracy)) for curve in mine]
        last = mine[-1]
        band = points(last.eps, last.low) + " " + points(last.eps[::-1], last.high[::-1])
        drawn.append({"norm": norm, "most": most, "lines": lines, "band": band})
    return drawn


def _shares(found: Nearest) -> list[tuple[str, int, float]]:
    """Of each attack that came nearest to some image: on how many, and the median of its distances there."""
    by: dict[str, list[float]] = {}
    for attack, distance in zip(found.attack, found.distance, strict=True):
        by.setdefault(attack, []).append(distance)
    shares = [(attack, len(distances), median(distances)) for attack, distances in by.items()]
    return sorted(shares, key=lambda share: -share[1])


def _rows(found: Nearest) -> list[tuple[int, str, float]]:
    return list(zip(found.index, found.attack, found.distance, strict=True))[:LISTED]


def _techniques(records: Sequence[Record | Besides]) -> list[tuple[str, str, list[str]]]:
    """Each technique's id and name, and the attacks that exercise it."""
    found: dict[str, list[str]] = {}
    for record in records:
        entry = atlas.entry("poisoning" if isinstance(record, PoisonRecord) else record.family)
        for key in (*entry.atlas, entry.nist):
            if key and record.attack not in found.setdefault(key, []):
                found[key].append(record.attack)
    return [(key, atlas.TITLES[key], names) for key, names in sorted(found.items())]


def _passes(record: Record, kind: str) -> int:
    return sum(record.images.forward if kind == "forward" else record.images.backward)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _points(value: float) -> str:
    """A share as a coordinate."""
    return f"{100 * value:.2f}%"


def _span(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f} %"


def _threat(text: str) -> str:
    """``linf:8/255`` as people write it."""
    norm, _, eps = text.partition(":")
    return f"{NORMS.get(norm, norm)} {eps}".strip()


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
