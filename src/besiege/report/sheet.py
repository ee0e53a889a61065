"""One self-contained page of one measurement: figures, pictures and drawings; one file, no network, no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

WIDTH, HEIGHT, MARGIN = 460, 180, 34
"""Of a drawing, in its own units."""


@dataclass(frozen=True)
class Section:
    """A title, pairs of what and how much, PNG files with what they show, and drawings of ours with their captions."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    pictures: Sequence[tuple[bytes, str]] = ()
    drawings: Sequence[tuple[Markup, str]] = ()


def page(title: str, lead: str, sections: Sequence[Section], *, command: str = "") -> str:
    """The page as text."""
    shown = [
        (
            section,
            [("data:image/png;base64," + b64encode(file).decode(), caption) for file, caption in section.pictures],
        )
        for section in sections
    ]
    return _template().render(title=title, lead=lead, sections=shown, command=command)


def histogram(groups: Sequence[tuple[str, Sequence[int]]], low: float, high: float, mark: float | None) -> Markup:
    """Bars from ``low`` to ``high``, a row of counts a group, each to its own height; ``mark`` is a threshold."""
    if not groups or not high > low:
        return Markup()
    bars = []
    for k, (_, counts) in enumerate(groups):
        wide, most = WIDTH / len(counts), max(1, *counts)
        for place, count in enumerate(counts):
            tall = HEIGHT * count / most
            bars.append(
                f'<rect class="g{k}" x="{MARGIN + place * wide:.1f}" y="{MARGIN + HEIGHT - tall:.1f}" '
                f'width="{wide:.1f}" height="{tall:.1f}"/>'
            )
    line = ""
    if mark is not None and low <= mark <= high:
        at = MARGIN + WIDTH * (mark - low) / (high - low)
        line = f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{MARGIN}" y2="{MARGIN + HEIGHT}"/>'
    ends = (
        f'<text x="{MARGIN}" y="{HEIGHT + MARGIN + 16}">{low:.4g}</text>'
        f'<text x="{MARGIN + WIDTH}" y="{HEIGHT + MARGIN + 16}">{high:.4g}</text>'
    )
    return _drawn("".join(bars) + line + ends)


def scatter(groups: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Markup:
    """Points in the plane, a colour a group."""
    every = [point for _, points in groups for point in points]
    if not every:
        return Markup()
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    dots = []
    for k, (_, points) in enumerate(groups):
        for x, y in points:
            across = MARGIN + WIDTH * (x - left) / max(right - left, 1e-12)
            up = MARGIN + HEIGHT * (1 - (y - low) / max(high - low, 1e-12))
            dots.append(f'<circle class="g{k}" cx="{across:.1f}" cy="{up:.1f}" r="2"/>')
    return _drawn("".join(dots))


def _drawn(inside: str) -> Markup:
    box = f"0 0 {WIDTH + 2 * MARGIN} {HEIGHT + 2 * MARGIN}"
    return Markup(f'<svg class="drawing" viewBox="{box}" role="img">{inside}</svg>')


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("besiege.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sheet.html.j2")
