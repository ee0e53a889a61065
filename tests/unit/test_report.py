from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_results import audit, record

from besiege.core.errors import BadInput
from besiege.report import atlas
from besiege.report.html import page
from besiege.report.pictures import png
from besiege.results import files
from besiege.results.audit import LeftOut, Nearest, Picture
from besiege.results.record import Threat

EVIL = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """Collects tags, their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(folder: Path, pixels: np.ndarray, **other: object) -> Picture:
    names = tuple(f"pictures/{part}.png" for part in ("clean", "adversarial", "change"))
    for name in names:
        files.write(folder / name, png(pixels))
    given = {
        "attack": "pgd",
        "threat": "linf:8/255",
        "index": 7,
        "label": "three",
        "clean_label": "three",
        "clean_confidence": 0.987,
        "adversarial_label": "eight",
        "adversarial_confidence": 0.654,
        "distance": 0.03,
        "survives_8bit": True,
        "gain": 15.9,
        "files": names,
    }
    return Picture.model_validate({**given, **other})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_lossless(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))).reshape(5, 7, channels), pixels)


def test_the_page_states_the_figures(tmp_path: Path) -> None:
    l2 = Threat(norm="l2", eps=0.5, access="scores", queries=1000)
    text = page(audit(record(fell=(0, 1, 2)), record("square", fell=(1,), threat=l2)), tmp_path)
    seen = " ".join(Page(text).text.split())
    assert "Under attack within L∞ 8/255 it still gets 25.0 % right. Within L2 0.5 it gets 75.0 % right." in seen
    assert "95 % interval 4.6–69.9 %" in seen and "1,000 queries" in seen


def test_the_page_says_which_attack_came_nearest_and_lists_the_first_images(tmp_path: Path) -> None:
    many = Nearest(norm="l2", index=list(range(250)), attack=["fmn"] * 240 + ["ead"] * 10, distance=[0.5] * 250)
    seen = " ".join(Page(page(audit(record(fell=(0,)), nearest=[many]), tmp_path)).text.split())
    assert "fmn240 images0.5 ead10 images0.5" in seen
    assert "Image by image, the first 200; audit.json has all 250" in seen
    assert "199fmn0.5" in seen and "200fmn0.5" not in seen


def test_pictures_are_in_the_page(tmp_path: Path) -> None:
    pixels = np.arange(49, dtype=np.uint8).reshape(7, 7, 1)
    found = audit(record(fell=(0,)), pictures=[picture(tmp_path, pixels)])
    sources = [attributes["src"] or "" for tag, attributes in Page(page(found, tmp_path)).tags if tag == "img"]
    assert len(sources) == 3
    for source in sources:
        shown = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert np.array_equal(np.asarray(shown)[:, :, None], pixels)


def test_names_are_escaped(tmp_path: Path) -> None:
    shown = picture(tmp_path, np.zeros((3, 3, 1), np.uint8), label=EVIL, clean_label=EVIL, adversarial_label=EVIL)
    cell = record(EVIL, fell=(0,), options={"loss": EVIL}, paper=EVIL, notes=[EVIL])
    left = LeftOut(attack=EVIL, threat=EVIL, why=EVIL)
    other = {"target": EVIL, "data": EVIL, "command": EVIL, "fingerprint": EVIL, "notes": [EVIL], "warnings": [EVIL]}
    text = page(audit(cell, pictures=[shown], left_out=[left], **other), tmp_path)
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert EVIL in parsed.text


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    shown = picture(tmp_path, np.zeros((3, 3, 3), np.uint8))
    text = page(audit(record(fell=(0,)), pictures=[shown]), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace(re.findall(r"base64,[^\"]+", text)[0], ""))
    parsed = Page(text)
    assert not {tag for tag, _ in parsed.tags} & {"link", "iframe", "object", "embed"}
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text)
    for _, attributes in parsed.tags:
        assert (attributes.get("src") or "data:").startswith("data:") and "href" not in attributes


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    text = page(audit(complete=False), tmp_path)
    assert "cut short" in text and "No attack has been run to its end" in text


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    found = audit(record(fell=(0,)), pictures=[picture(tmp_path, np.zeros((3, 3, 1), np.uint8))])
    (tmp_path / "pictures" / "change.png").unlink()
    with pytest.raises(BadInput, match=r"change\.png"):
        page(found, tmp_path)
    (tmp_path / "pictures" / "change.png").write_text("<svg>")
    with pytest.raises(BadInput, match="no PNG"):
        page(found, tmp_path)


def test_every_technique_has_a_name() -> None:
    for entry in atlas.FAMILIES.values():
        assert all(key in atlas.TITLES for key in (*entry.atlas, entry.nist))
    assert atlas.entry("unheard of").atlas == ()
