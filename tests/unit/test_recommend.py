"""What an audit advises, and that it advises nothing which its own figures refute."""

from __future__ import annotations

from typing import Any

import pytest
from test_results import audit, record

from besiege.audit.recommend import Tried, advised, measured_map
from besiege.core.method import GUARDS, method
from besiege.results.audit import Audit
from besiege.results.defense import Defense, Row, verdict, worst_of
from besiege.results.extraction import Theft
from besiege.results.inference import Membership
from besiege.results.interval import wilson
from besiege.results.record import Threat

MANY = tuple(range(40))


def row(before: tuple[int, ...], unknowing: tuple[int, ...], knowing: tuple[int, ...], **other: Any) -> Row:
    parts = [record(fell=fell, index=MANY, **other) for fell in (before, unknowing, knowing)]
    return Row(
        undefended=parts[0],
        defended=parts[1],
        adaptive=parts[2],
        adaptive_attack="pgd() through the defense",
        l2_ratio=None,
        detected=None,
        detected_adaptive=None,
        verdict=verdict(*parts),
    )


def defense(*rows: Row, name: str = "magnet") -> Defense:
    return Defense(
        defense=name,
        title=name.title(),
        paper="",
        kind="input",
        options={},
        target="net",
        data="digits",
        calibrated=100,
        judged=40,
        seed=0,
        clean_accuracy=1.0,
        clean_accuracy_defended=0.95,
        clean_interval=wilson(38, 40),
        fpr=None,
        latency_ratio=1.5,
        setup_seconds=2.0,
        rows=list(rows),
    )


def fallen(*defenses: Defense) -> Audit:
    return audit(record(fell=MANY[:38], index=MANY), defenses=list(defenses))


def tried(name: str, said: str, norm: str = "linf") -> Tried:
    return Tried.model_validate(
        {
            "data": "MNIST",
            "defense": name,
            "attack": "pgd",
            "threat": "linf:0.3",
            "norm": norm,
            "n": 100,
            "before": 1.0,
            "unknowing": 0.1,
            "knowing": 0.12,
            "interval": wilson(12, 100),
            "verdict": said,
        }
    )


def test_together_attacks_take_what_any_of_them_takes() -> None:
    first = row(MANY[:20], MANY[:2], MANY[:10])
    second = row(MANY[10:38], MANY[20:22], MANY[30:36])
    far = row(MANY, MANY, MANY, threat=Threat(norm="l2", eps=None, access="gradients"))
    (worst,) = worst_of([first, second, far])
    assert (worst.threat, worst.n) == ("linf:8/255", 40)
    assert worst.before == 38 / 40
    assert worst.unknowing == 4 / 40
    assert worst.knowing == (10 + 6 + 2) / 40
    assert worst.interval == wilson(18, 40)
    assert worst.verdict == "weakened"


def test_two_attacks_that_each_leave_a_defense_standing_may_fell_it_together() -> None:
    halves = [row(MANY, (), MANY[:20]), row(MANY, (), MANY[20:])]
    assert [part.verdict for part in halves] == ["weakened", "weakened"]
    assert defense(*halves).verdict == "fallen"


def test_what_falls_to_who_knows_it_is_never_advised() -> None:
    said = advised(fallen(defense(row(MANY, MANY[:2], MANY))), [tried("magnet", "not refuted")])
    assert not any("helps" in one.text or "Try magnet" in one.text for one in said)
    assert any(one.text.startswith("Do not rely on Magnet") and one.figures == ["defense magnet"] for one in said)


def test_what_stood_here_is_advised_with_its_figures() -> None:
    said = advised(fallen(defense(row(MANY, MANY[:4], MANY[:5]))), [tried("trades", "not refuted")])
    (one,) = said
    assert "Magnet helps" in one.text and "10.0%" not in one.text and "12.5%" in one.text
    assert one.figures == ["linf:8/255", "defense magnet"]


@pytest.mark.parametrize("verdicts", [["fallen"], ["not refuted", "weakened"], []])
def test_the_map_s_fallen_and_weakened_are_not_advised(verdicts: list[str]) -> None:
    said = advised(fallen(), [tried("trades", text) for text in verdicts])
    assert len(said) == 1 and "No defense in our map" in said[0].text


def test_the_map_advises_in_its_own_norm_alone() -> None:
    assert "Try trades" in advised(fallen(), [tried("trades", "not refuted")])[0].text
    assert "No defense" in advised(fallen(), [tried("trades", "not refuted", norm="l2")])[0].text


def test_where_nothing_fell_nothing_is_advised() -> None:
    assert advised(audit(record(index=MANY)), [tried("trades", "not refuted")]) == []


def test_the_map_names_defenses_that_there_are() -> None:
    known = measured_map()
    assert {method(one.defense, GUARDS).card.name for one in known} == {one.defense for one in known}
    for one in known:
        assert one.interval == pytest.approx(wilson(round(one.knowing * one.n), one.n))


def membership(low: float) -> Membership:
    return Membership.model_validate(
        {
            "attack": "membership-inference",
            "options": {},
            "title": "Membership inference",
            "family": "inference",
            "paper": "",
            "gives": "membership",
            "target": "net",
            "fingerprint": "",
            "data": "digits",
            "n": 20,
            "seed": 0,
            "access": "scores",
            "queries": 20,
            "backward": 0,
            "seconds": 1.0,
            "cpu_seconds": 1.0,
            "members": 10,
            "nonmembers": 10,
            "member_accuracy": 1.0,
            "nonmember_accuracy": 0.8,
            "auc": 0.7,
            "auc_interval": (low, 0.9),
            "balanced_accuracy": 0.7,
            "tpr_at_fpr": {"0.01": 0.1},
            "tpr_at_fpr_interval": {"0.01": (0.0, 0.4)},
            "roc": [(0.0, 0.0), (1.0, 1.0)],
        }
    )


def test_a_leak_is_one_only_where_chance_does_not_explain_it() -> None:
    assert not advised(audit(record(), memberships=[membership(0.49)]), [])
    (one,) = advised(audit(record(), memberships=[membership(0.55)]), [])
    assert "AUC 0.700" in one.text and one.figures == ["membership-inference"]


@pytest.mark.parametrize(("ratio", "count"), [(0.85, 0), (0.95, 1), (None, 0)])
def test_a_copy_is_one_only_near_the_target(ratio: float | None, count: int) -> None:
    theft = Theft(
        attack="copycat",
        options={},
        title="Copycat",
        family="extraction",
        paper="",
        target="net",
        fingerprint="",
        asked_of="pool",
        data="digits",
        n=20,
        seed=0,
        fit="mlp",
        layers=None,
        queries=1000,
        accuracy=0.9,
        accuracy_interval=(0.8, 1.0),
        target_accuracy=0.95,
        accuracy_ratio=ratio,
        agreement=0.9,
        agreement_interval=(0.8, 1.0),
        max_difference=None,
        transfer_success=None,
        transfer_interval=None,
        transfer_noise=None,
        transfer_eps=None,
        watched=0,
        alarm_rate=None,
        first_alarm=120,
        alarm_rate_benign=None,
        seconds=1.0,
    )
    said = advised(audit(record(), thefts=[theft]), [])
    assert len(said) == count
    if said:
        assert "1,000 queries" in said[0].text and "first alarm at 120" in said[0].text
