from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_results import audit, record

from besiege.cli import run
from besiege.core.errors import BadInput
from besiege.results.compare import compare, mcnemar, newcombe


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 2, 12, 0), 0.0569, 0.3404),  # Newcombe 1998 (paired), table II, method 10
        ((36, 12, 2, 0), -0.3404, -0.0569),
        ((29, 0, 0, 1), -0.1225, 0.1225),  # by hand: 29 of 30 twice, phi = (29 - 15) / 29
    ],
)
def test_paired_intervals_are_the_published_ones(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert newcombe(*table) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_nineteen_of_twenty_paired_intervals_hold_the_truth() -> None:
    tables = np.random.default_rng(0).multinomial(80, [0.5, 0.05, 0.15, 0.3], size=2000)
    bounds = [newcombe(*map(int, table)) for table in tables]
    assert 0.93 <= np.mean([low <= 0.1 <= high for low, high in bounds]) <= 0.98


def test_the_chance_of_an_uneven_split_is_exact() -> None:
    assert mcnemar(0, 5) == 2 / 32 and mcnemar(3, 3) == 1 and mcnemar(0, 0) == 1
    assert mcnemar(2, 12) == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert 0 < mcnemar(4000, 4200) < 0.05


def test_runs_are_compared_image_by_image() -> None:
    before = audit(record(fell=(0, 1)), record("square", fell=(2,)), name="before", digest="d")
    after = audit(record(fell=(1,), wrong=3), name="after", digest="d", seed=1)
    found = compare(before, after)
    by = {pair.attack: pair for pair in found.pairs}
    assert [*by] == ["clean", "worst case", "pgd"]
    assert (by["clean"].first, by["clean"].second, by["clean"].only_first) == (1, 0.75, 1)
    assert (by["pgd"].first, by["pgd"].second, by["pgd"].only_first, by["pgd"].only_second) == (0.5, 0.5, 1, 1)
    assert (by["worst case"].difference, by["worst case"].only_first, by["worst case"].only_second) == (0.25, 1, 2)
    assert found.notes == ["seed 0 against 1", "in one run alone, and in its worst case: square linf:8/255"]


def test_only_the_images_that_both_met_count() -> None:
    before = audit(record(fell=(0,)), digest="d", n=4)
    after = audit(record(fell=(2,), index=(2, 3)), digest="d", n=4)
    pair = compare(before, after).pairs[-1]
    assert (pair.n, pair.first, pair.second) == (2, 1.0, 0.5)


def test_other_images_are_refused() -> None:
    with pytest.raises(BadInput, match="not of the same images"):
        compare(audit(record(), digest="d"), audit(record(), digest="e"))
    with pytest.raises(BadInput, match="no attack in common"):
        compare(audit(digest="d"), audit(record(), digest="d"))


def test_the_command_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fell in (("before", (0, 1, 2)), ("after", (1,))):
        audit(record(fell=fell), name=name, digest="d").save(tmp_path / name)
    runs = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert run(["compare", *runs, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pairs"][-1]["difference"] == 0.5 and said["first"] == "before (net)"
    assert run(["compare", *runs]) == 0
    assert "+50.0" in capsys.readouterr().out
