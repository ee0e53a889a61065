"""What to do about what an audit found: only what figures say, of this model or of the measured map of defenses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files

from pydantic import TypeAdapter

from besiege.core.method import GUARDS, of_kind
from besiege.results.audit import Advice, Audit, Worst
from besiege.results.defense import Verdict
from besiege.results.record import Facts, Interval

COPIED = 0.9
"""A thief who comes to this share of the target's accuracy has it."""
POISONED = 0.5
"""Poison that moves this share of the images works."""


class Tried(Facts):
    """A defense against one attack on a network of ours: shares of ``n`` images that fell, as in `Row`."""

    data: str
    defense: str
    attack: str
    threat: str
    norm: str
    n: int
    before: float
    unknowing: float
    knowing: float
    interval: Interval
    verdict: Verdict


@cache
def measured_map() -> tuple[Tried, ...]:
    """What ``python -m benchmarks.defenses`` has measured of the defenses."""
    text = files("besiege.audit").joinpath("map.json").read_text("utf-8")
    return tuple(TypeAdapter(list[Tried]).validate_json(text))


def advised(audit: Audit, known: Sequence[Tried] | None = None) -> list[Advice]:
    """What follows from the figures, and which they are. Nothing is advised that falls to who knows it."""
    known = measured_map() if known is None else known
    return [
        *(advice for worst in audit.worst for advice in _evasion(audit, worst, known)),
        *_masked(audit),
        *_privacy(audit),
        *_theft(audit),
        *_poison(audit),
    ]


def _evasion(audit: Audit, worst: Worst, known: Sequence[Tried]) -> Iterator[Advice]:
    """A defense that stood here; else, of those that were not tried, the ones that no figure of ours refutes."""
    threat = str(worst)
    if worst.robust_interval[1] >= audit.clean_interval[0]:
        return
    fell = f"Within {threat} {worst.robust_accuracy:.1%} of the images stay right, else {audit.clean_accuracy:.1%}"
    helped = [
        (record, row)
        for record in audit.defenses
        for row in record.worst
        if row.threat == threat and row.verdict == "not refuted"
    ]
    for record, row in helped:
        yield Advice(
            text=(
                f"{fell}. {record.title} helps: of {row.n} images {row.before:.1%} fell before it, and "
                f"{row.knowing:.1%} ({row.interval[0]:.1%}–{row.interval[1]:.1%}) to the worst of who knows it; "
                f"clean accuracy goes from {record.clean_accuracy:.1%} to {record.clean_accuracy_defended:.1%}. No "
                "attack here has refuted it, which does not prove that none will."
            ),
            figures=[threat, f"defense {record.defense}"],
        )
    if helped:
        return
    left = [name for name in of_kind(*GUARDS) if name not in {record.defense for record in audit.defenses}]
    open_ = [(name, best) for name in left if (best := _open(name, worst, known)) is not None]
    for name, best in open_:
        yield Advice(
            text=(
                f"{fell}. Try {name}: on {best.data} {best.before:.0%} fell to {best.attack} in {best.threat} before "
                f"it and {best.knowing:.0%} ({best.interval[0]:.0%}–{best.interval[1]:.0%}, n = {best.n}) to who knows "
                f"it. Whether it helps this model `besiege audit --defend {name}` measures."
            ),
            figures=[threat],
        )
    if not open_:
        yield Advice(
            text=f"{fell}. No defense in our map stands in this norm against who knows it: do not rely on the answers "
            "where somebody may change the images.",
            figures=[threat],
        )


def _open(name: str, worst: Worst, known: Sequence[Tried]) -> Tried | None:
    """The worst figure of a defense in this norm on our map, if none of its figures there refutes it."""
    mine = [tried for tried in known if tried.defense == name and tried.norm == worst.norm]
    if not mine or any(tried.verdict != "not refuted" for tried in mine):
        return None
    return max(mine, key=lambda tried: tried.knowing)


def _masked(audit: Audit) -> Iterator[Advice]:
    """Defenses that only look as if they helped."""
    for record in audit.defenses:
        if record.verdict == "not refuted" or not record.worst:
            continue
        row = max(record.worst, key=lambda row: row.knowing - row.unknowing)
        said = {"fallen": "cannot be shown to stop who knows it", "weakened": "stops fewer of those who know it"}[
            record.verdict
        ]
        yield Advice(
            text=(
                f"Do not rely on {record.title}: it {said}. Within {row.threat} {row.before:.1%} fall without it, "
                f"{row.unknowing:.1%} to someone who does not know it and {row.knowing:.1%} to someone who does."
            ),
            figures=[f"defense {record.defense}"],
        )


def _privacy(audit: Audit) -> Iterator[Advice]:
    for found in audit.memberships:
        low, high = found.auc_interval
        if low <= 0.5:
            continue
        yield Advice(
            text=(
                f"Its answers tell members of the training set from others (AUC {found.auc:.3f}, "
                f"{low:.3f}–{high:.3f}). "
                f"It gets {found.member_accuracy:.1%} of members right and {found.nonmember_accuracy:.1%} of others: "
                "train it so that this gap closes (fewer epochs, augmentation, weight decay), or with differential "
                "privacy, and measure again."
            ),
            figures=[found.attack],
        )
    for shown in audit.inversions:
        if 2 * shown.recognized > shown.n:
            yield Advice(
                text=(
                    f"{shown.recognized} of {shown.n} classes can be pictured from the model alone: where a class is a "
                    "person, treat the weights and the full scores as personal data."
                ),
                figures=[shown.attack],
            )


def _theft(audit: Audit) -> Iterator[Advice]:
    for theft in audit.thefts:
        share = theft.accuracy_ratio
        if share is None or share < COPIED:
            continue
        alarm = "raised no alarm" if theft.first_alarm is None else f"raised its first alarm at {theft.first_alarm:,}"
        yield Advice(
            text=(
                f"{theft.queries:,} queries about {theft.asked_of} bought a copy with {share:.1%} of its accuracy; a "
                f"monitor of the queries {alarm}. Allow a client far fewer queries than that; fewer digits in the "
                "scores are no help where the label alone was used."
            ),
            figures=[theft.attack],
        )


def _poison(audit: Audit) -> Iterator[Advice]:
    for record in audit.poisonings:
        if record.attack_success < POISONED:
            continue
        yield Advice(
            text=(
                f"{record.poison_count:g} poisoned images of {record.n_train} ({record.poison_rate:.2%}) give "
                f"{record.title} {record.attack_success:.1%} success ({record.attack_success_twin:.1%} without them), "
                f"at a clean accuracy of {record.clean_accuracy:.1%} after {record.clean_accuracy_twin:.1%}: look at "
                "the training images with `besiege scan` before training, and take them only from whom you trust."
            ),
            figures=[record.attack],
        )
