from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from besiege.core.errors import BadInput
from besiege.results import files
from besiege.results.audit import Audit, Environment, LeftOut, curves, load, nearest, slug, worst_cases
from besiege.results.checks import of_records
from besiege.results.interval import wilson
from besiege.results.record import Record, Rows, Threat, ball_text, joined


def record(
    attack: str = "pgd",
    fell: tuple[int, ...] = (),
    index: tuple[int, ...] = (0, 1, 2, 3),
    wrong: int | None = None,
    **other: Any,
) -> Record:
    """Four images of label 0; ``fell`` are the numbers of those that fell, ``wrong`` one that clean gets wrong."""
    success = [i in fell for i in index]
    clean = [1 if i == wrong else 0 for i in index]
    attacked = [i != wrong for i in index]
    stands, n, met = sum(a and not s for a, s in zip(attacked, success, strict=True)), len(index), sum(attacked)
    given: dict[str, Any] = {
        "attack": attack,
        "options": {"steps": 40},
        "title": attack.upper(),
        "family": "whitebox",
        "paper": "arXiv:1706.06083",
        "seeks": "success",
        "target": "net",
        "fingerprint": "abc",
        "data": "digits",
        "n": n,
        "seed": 0,
        "threat": Threat(norm="linf", eps=8 / 255, access="gradients"),
        "clean_accuracy": met / n,
        "attacked": met,
        "success_rate": len(fell) / met,
        "success_interval": wilson(len(fell), met),
        "robust_accuracy": stands / n,
        "robust_interval": wilson(stands, n),
        "median_distance": 0.03 if fell else None,
        "mean_distance": 0.03 if fell else None,
        "success_rate_8bit": len(fell) / met,
        "noise_success_rate": 0.0,
        "forward_per_image": 40.0,
        "backward_per_image": 40.0,
        "queries_median": 3.0 if fell else None,
        "seconds": 1.5,
        "cpu_seconds": 1.5,
        "verified": True,
        "images": Rows(
            index=list(index),
            label=[0] * n,
            clean_label=clean,
            adversarial_label=[1 if s else c for s, c in zip(success, clean, strict=True)],
            attacked=attacked,
            success=success,
            success_8bit=success,
            distance=[0.03 if s else None for s in success],
            forward=[40] * n,
            backward=[40] * n,
            needed=[3 if s else -1 for s in success],
        ),
    }
    return Record(**{**given, **other})


def audit(*records: Record, **other: Any) -> Audit:
    n = len(records[0].images.index) if records else 4
    given: dict[str, Any] = {
        "name": "run",
        "target": "net",
        "fingerprint": "abc",
        "data": "digits",
        "n": n,
        "classes": 10,
        "shape": (1, 28, 28),
        "seed": 0,
        "budget": "quick",
        "started": "2026-11-23T00:00:00+00:00",
        "seconds": 3.0,
        "command": "besiege audit",
        "environment": Environment(
            besiege="0.1.0", torch="2.13.0", python="3.11", platform="Linux x86_64", device="cpu", threads=1
        ),
        "clean_accuracy": 1.0,
        "clean_interval": wilson(n, n),
        "worst": worst_cases(records),
        "records": list(records),
    }
    return Audit(**{**given, **other})


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Brown, Cai and DasGupta 2001
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_published_intervals(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_is_where_the_normal_score_is_z() -> None:
    for bound in wilson(7, 40):
        assert abs(7 / 40 - bound) / math.sqrt(bound * (1 - bound) / 40) == pytest.approx(1.959963984540054)


def test_wilson_knows_nothing_without_observations() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_record_survives_json() -> None:
    before = record(fell=(1, 3))
    after = Record.model_validate_json(before.json_text())
    assert after == before and after.standing == {0: True, 1: False, 2: True, 3: False}


def test_infinity_never_reaches_json() -> None:
    with pytest.raises(ValidationError):
        record(median_distance=math.inf)
    assert json.loads(record().json_text(), parse_constant=pytest.fail)["images"]["distance"] == [None] * 4


def test_a_clean_error_does_not_stand() -> None:
    assert record(fell=(1,), wrong=2).standing == {0: True, 1: False, 2: False, 3: True}


def test_the_worst_case_is_taken_image_by_image() -> None:
    one, two = record(fell=(0,)), record("square", fell=(1,))
    (worst,) = worst_cases([one, two])
    assert (worst.robust_accuracy, worst.attacks) == (0.5, ["pgd", "square"])
    assert one.robust_accuracy == two.robust_accuracy == 0.75


def test_an_attack_on_few_images_speaks_for_those_alone() -> None:
    (worst,) = worst_cases([record(fell=(0,)), record("hopskipjump", fell=(3,), index=(2, 3))])
    assert worst.robust_accuracy == 0.5


def test_threats_are_kept_apart_and_targeted_attacks_out() -> None:
    l2 = Threat(norm="l2", eps=0.5, access="gradients")
    aimed = Threat(norm="l2", eps=0.5, access="gradients", targeted=True, target_class=3)
    found = worst_cases([record(fell=(0,)), record(threat=l2), record(fell=(0, 1, 2), threat=aimed)])
    assert [(str(worst), worst.robust_accuracy) for worst in found] == [("linf:8/255", 0.75), ("l2:0.5", 1.0)]


def test_radii_read_as_people_write_them() -> None:
    assert [ball_text("linf", 8 / 255), ball_text("linf", 0.3), ball_text("l2", 0.5), ball_text("l2", None)] == [
        "linf:8/255",
        "linf:0.3",
        "l2:0.5",
        "l2",
    ]


def test_an_audit_survives_its_folder(tmp_path: Path) -> None:
    left = LeftOut(attack="square", threat="linf:8/255", why="square needs scores")
    before = audit(record(fell=(2,)), left_out=[left])
    before.save(tmp_path / "run")
    assert load(tmp_path / "run") == before == load(tmp_path / "run" / "audit.json")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["audit.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 3}', '{"surprise": 1}', "\x00\xff"])
def test_a_spoilt_audit_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and "audit.json" in str(error.value)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.json"
    files.write(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device"):
        files.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_run_is_named_by_harmless_characters() -> None:
    assert slug("pkg.net:make", "../digits", "quick") == "pkg.net-make-digits-quick"
    assert slug("//", "") == "run"


def test_checks_warn_of_noise_rounding_and_refused_claims() -> None:
    odd = record(fell=(0, 1), noise_success_rate=0.5, success_rate_8bit=0.1, verified=False)
    fine = record(fell=(0, 1), noise_success_rate=0.1)
    for cell, passed in ((odd, False), (fine, True)):
        checks = of_records([fine, cell], (0.8, 0.9 if passed else 1.0))
        assert [check.passed for check in checks] == [passed] * 4
        assert all(bool(check.advice) != check.passed for check in checks)
    assert "pgd (linf:8/255) from 50% to 10%" in of_records([odd], (0.9, 1.0))[-1].evidence
    assert [check.name for check in of_records([], (0.9, 1.0))] == ["enough images"]


def test_shards_join_to_the_record_of_them_all() -> None:
    passes = {"forward_per_image": 160 / 3, "backward_per_image": 160 / 3}
    both = record(fell=(1, 2), wrong=3, noise_success_rate=1 / 3, **passes)
    parts = [
        record(fell=(2,), index=(2, 3), wrong=3, noise_success_rate=1.0, seconds=0.5),
        record(fell=(1,), index=(0, 1), noise_success_rate=0.0, seconds=1.0, cpu_seconds=0.0),
    ]
    assert joined(parts) == both
    assert joined([parts[0], parts[1].model_copy(update={"verified": False})]).verified is False


def test_a_curve_falls_where_the_nearest_examples_lie() -> None:
    rows = record(fell=(0, 1, 2), wrong=3).images.model_copy(update={"distance": [0.005, 8 / 255, 0.1, None]})
    (curve,) = curves([record("fmn", fell=(0, 1, 2), wrong=3, seeks="minimum", images=rows)])
    left = dict(zip(curve.eps, curve.accuracy, strict=True))
    assert left[0.0] == 0.75 and left[8 / 255] == 0.25 and left[curve.eps[14]] == 0.5
    assert curve.accuracy == sorted(curve.accuracy, reverse=True) and (curve.accuracy[-2:]) == [0.25, 0.0]
    assert (curve.low[0], curve.high[0]) == wilson(3, 4) and curve.eps[-2] < 0.1 <= curve.eps[-1]


def test_the_worst_curve_takes_the_nearest_of_all_attacks() -> None:
    far = record().images.model_copy(update={"distance": [0.03, 0.03, None, None]})
    near = record().images.model_copy(update={"distance": [0.01, None, 0.01, None]})
    found = curves([record("fmn", seeks="minimum", images=far), record("pgd", images=near)])
    assert [curve.attack for curve in found] == ["fmn", "worst case"]
    at = [curve.accuracy[curve.eps.index(8 / 255)] for curve in found]
    assert at == [0.5, 0.25]
    assert curves([record()]) == []


def test_results_and_report_load_no_torch() -> None:
    code = (
        "import sys; import besiege.results.compare, besiege.report.markdown, besiege.report.junit, "
        "besiege.report.html, besiege.report.pictures; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_attack_that_needed_the_least_for_each_image() -> None:
    first = record().images.model_copy(update={"distance": [0.03, 0.02, None, None]})
    second = record().images.model_copy(update={"distance": [0.01, 0.02, 0.04, None]})
    other = record(threat=Threat(norm="l2", eps=0.5, access="gradients"))
    (found,) = nearest([record("pgd", images=first), record("fmn", images=second), other])
    assert (found.norm, found.index) == ("linf", [0, 1, 2])
    assert found.attack == ["fmn", "pgd", "fmn"]
    assert found.distance == [0.01, 0.02, 0.04]
