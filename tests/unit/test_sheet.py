"""The page of one measurement, and its drawings."""

from __future__ import annotations

import re

import numpy as np
from test_report import EVIL, Page

from besiege.report.pictures import png
from besiege.report.sheet import HEIGHT, MARGIN, WIDTH, Section, histogram, page, scatter


def test_a_sheet_shows_what_it_is_given_and_escapes_it() -> None:
    file = png(np.zeros((4, 4, 1), dtype=np.uint8))
    section = Section(EVIL, [(EVIL, EVIL)], [(file, EVIL)], [(scatter([(EVIL, [(0, 0), (1, 1)])]), EVIL)])
    seen = Page(page(EVIL, EVIL, [section], command=EVIL))
    assert "script" not in {tag for tag, _ in seen.tags} and seen.text.count("alert(1)") == 9
    sources = [dict(given)["src"] or "" for tag, given in seen.tags if tag == "img"]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    policy = next(given["content"] for tag, given in seen.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"(src|href)=\"(?!data:)", page("t", "l", [section]))


def test_a_histogram_is_as_high_as_its_counts() -> None:
    drawn = str(histogram([("clean", [1, 4, 0]), ("poisoned", [0, 0, 2])], 0.0, 3.0, 1.5))
    bars = re.findall(r'<rect class="g(\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', drawn)
    assert [float(tall) for _, _, _, tall in bars] == [HEIGHT / 4, HEIGHT, 0, 0, 0, HEIGHT]
    assert float(bars[1][1]) == MARGIN + round(WIDTH / 3, 1)
    assert f'x1="{MARGIN + WIDTH / 2:.1f}"' in drawn
    assert "mark" not in str(histogram([("clean", [1])], 0.0, 3.0, 9.0))
    assert str(histogram([("clean", [1])], 1.0, 1.0, None)) == ""


def test_a_scatter_spans_its_points() -> None:
    drawn = str(scatter([("clean", [(0.0, 0.0), (5.0, 1.0)]), ("poisoned", [(10.0, 2.0)])]))
    dots = re.findall(r'<circle class="g(\d)" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert [(float(x), float(y)) for _, x, y in dots] == [
        (MARGIN, MARGIN + HEIGHT),
        (MARGIN + WIDTH / 2, MARGIN + HEIGHT / 2),
        (MARGIN + WIDTH, MARGIN),
    ]
    assert str(scatter([("clean", [])])) == ""
