"""How far the figures can be trusted: lines of self-diagnosis, and those that the records alone allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from besiege.results.record import Interval, Record


@dataclass(frozen=True)
class Check:
    """What was measured (``evidence``), whether it is as it should be, and what to do where it is not."""

    name: str
    passed: bool
    evidence: str
    advice: str = ""


def of_records(records: Sequence[Record], clean: Interval) -> list[Check]:
    """The checks that need no model: claims confirmed, enough images, noise, rounding to 8 bits.

    ``clean`` is the interval of the clean accuracy.
    """
    low, high = clean
    wide = high - low
    checks = [
        Check(
            "enough images",
            wide <= 0.1,
            f"the clean accuracy is known to within {100 * wide:.0f} points",
            "" if wide <= 0.1 else "few images: raise --limit before comparing models",
        )
    ]
    return [*checks, _verified(records), _noise(records), _rounding(records)] if records else checks


def _verified(records: Sequence[Record]) -> Check:
    bad = [f"{record.attack} ({record.threat})" for record in records if not record.verified]
    if bad:
        return Check(
            "claims confirmed",
            False,
            f"a fresh forward pass did not confirm every success of {', '.join(bad)}",
            "those images count as standing: the classifier may be random, or near a boundary in its precision",
        )
    return Check(
        "claims confirmed",
        True,
        "a fresh forward pass saw every adversarial example finite, in [0, 1], within its distance and misclassified",
    )


def _noise(records: Sequence[Record]) -> Check:
    worst = max(records, key=lambda record: record.noise_success_rate or 0)
    share = worst.noise_success_rate or 0
    return Check(
        "noise fails",
        share <= 0.1,
        f"random perturbations as large as those of {worst.attack} ({worst.threat}) change {share:.0%} of the answers, "
        "and no others change more",
        "" if share <= 0.1 else "the radius is wide for this classifier, or the classifier is brittle",
    )


def _rounding(records: Sequence[Record]) -> Check:
    lost = [
        f"{record.attack} ({record.threat}) from {record.success_rate:.0%} to {record.success_rate_8bit or 0:.0%}"
        for record in records
        if record.seeks == "success"
        and record.success_rate
        and (record.success_rate_8bit or 0) < 0.8 * record.success_rate
    ]
    return Check(
        "rounding spares attacks",
        not lost,
        f"stored in 8 bits, {', '.join(lost)} of the images"
        if lost
        else "attacks keep four fifths of their success in 8 bits",
        "what such attacks find would not survive as an image file" if lost else "",
    )
