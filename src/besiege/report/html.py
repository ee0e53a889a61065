"""One self-contained page of an audit: no script, no network, one file."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from besiege.report import atlas
from besiege.report.pictures import data_uri
from besiege.results.audit import Audit
from besiege.results.record import Record

NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0", "wasserstein": "Wasserstein"}
BEYOND = (
    "Attacks that transfer from another model, and attacks adapted to a defense of this model.",
    "Changes that are small to the eye but not in a norm: rotations, colours, shadows, stickers, universal patches.",
    "Poisoned training data, backdoors, theft of the model, and what it gives away of its training data.",
)


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
    return _template().render(
        audit=audit,
        groups=groups,
        shown=shown,
        beyond=BEYOND,
        small=max(audit.shape[1:]) < 100,
        passes=sum(_passes(record, "forward") + _passes(record, "backward") for record in audit.records),
        techniques=_techniques(audit.records),
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
        gain=lambda value: f"{value:.3g}" if value < 10 else f"{value:.0f}",
        count=_count,
        duration=_duration,
        options=_options,
    )
    return environment.get_template("page.html.j2")


def _techniques(records: list[Record]) -> list[tuple[str, str, list[str]]]:
    """Each technique's id and name, and the attacks that exercise it."""
    found: dict[str, list[str]] = {}
    for record in records:
        entry = atlas.entry(record.family)
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
