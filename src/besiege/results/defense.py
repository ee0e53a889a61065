"""What one defense is worth: every attack before it, against it, and by someone who knows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from besiege.results.interval import wilson
from besiege.results.record import Facts, Interval, Record

Verdict = Literal["fallen", "weakened", "not refuted"]


class Detection(Facts):
    """How well a detector tells attacked images from clean ones.

    ``tpr`` is the share of the ``n`` misleading images that it rejects, ``auc`` the area under its curve against the
    clean images.
    """

    n: int
    tpr: float
    tpr_interval: Interval
    auc: float


class Row(Facts):
    """One attack: on the undefended target, on the defended one by an attacker who does not know, and by one who does.

    The second attacker makes images on the network inside and shows them to the defended target, or, where a defense of
    the training stands before nothing or hides gradients, runs the plain attack; the third is ``adaptive_attack``.
    ``l2_ratio`` compares the median distances of the third and the first.
    """

    undefended: Record
    defended: Record
    adaptive: Record
    adaptive_attack: str
    l2_ratio: float | None
    detected: Detection | None
    detected_adaptive: Detection | None
    verdict: Verdict

    @property
    def masked(self) -> bool:
        """Does more fall to who knows the defense than to who does not, beyond the latter's interval?"""
        return (self.adaptive.success_rate or 0) > self.defended.success_interval[1]


class Worst(Facts):
    """The shares of the attacked images that fell to any attack of one threat; ``interval`` is of the last share."""

    threat: str
    n: int
    before: float
    unknowing: float
    knowing: float
    interval: Interval
    verdict: Verdict


class Defense(Facts):
    """A defense, what it costs and what each attack makes of it.

    ``clean_accuracy_defended`` counts a rejected clean image as lost; ``fpr`` is the share of the clean images that is
    rejected. ``latency_ratio`` is the time of an answer over that of the undefended target. ``calibrated`` and
    ``judged`` are the numbers of images that it was trained or calibrated on, and attacked on; no image is in both.
    """

    defense: str
    title: str
    paper: str
    kind: str
    options: dict[str, Any]
    target: str
    data: str
    calibrated: int
    judged: int
    seed: int
    clean_accuracy: float
    clean_accuracy_defended: float
    clean_interval: Interval
    fpr: float | None
    latency_ratio: float
    setup_seconds: float
    rows: list[Row]
    notes: list[str] = Field(default_factory=list)

    @property
    def worst(self) -> list[Worst]:
        """All attacks of each threat together."""
        return worst_of(self.rows)

    @property
    def verdict(self) -> Verdict:
        """The worst of all attacks, and of all together."""
        said = [row.verdict for row in self.rows] + [worst.verdict for worst in self.worst]
        return "fallen" if "fallen" in said else "weakened" if "weakened" in said else "not refuted"


def verdict(undefended: Record, defended: Record, adaptive: Record) -> Verdict:
    """What the attack by someone who knows the defense has shown of it.

    Fallen: at no more than twice the distance, nine tenths as many images fall as before, or it cannot be shown (by the
    exact test of McNemar, one-sided at 5 %) that fewer of the same images do. Weakened: more fall than to an attacker
    who does not know it, beyond that one's interval. Where neither shows, it is not refuted.
    """
    before, after = undefended.median_distance, adaptive.median_distance
    farther = adaptive.threat.eps is None and before is not None and after is not None and after > 2 * before
    return _shown(_fell(undefended), _fell(defended), _fell(adaptive), farther)


def worst_of(rows: Sequence[Row]) -> list[Worst]:
    """All attacks of a threat together, image by image; those without a radius do not count."""
    found = []
    for threat in dict.fromkeys(str(row.undefended.threat) for row in rows if row.undefended.threat.eps is not None):
        mine = [row for row in rows if str(row.undefended.threat) == threat]
        before = _any(row.undefended for row in mine)
        unknowing = _any(row.defended for row in mine)
        knowing = _any(part for row in mine for part in (row.defended, row.adaptive))
        if before and unknowing and knowing:
            shares = [sum(fell.values()) / len(fell) for fell in (before, unknowing, knowing)]
            found.append(
                Worst(
                    threat=threat,
                    n=len(knowing),
                    before=shares[0],
                    unknowing=shares[1],
                    knowing=shares[2],
                    interval=wilson(sum(knowing.values()), len(knowing)),
                    verdict=_shown(before, unknowing, knowing),
                )
            )
    return found


def _shown(
    before: Mapping[int, bool], unknowing: Mapping[int, bool], knowing: Mapping[int, bool], farther: bool = False
) -> Verdict:
    """The verdict on which of the attacked images fell; where none fell to who knows, nothing is refuted."""
    if not any(knowing.values()):
        return "not refuted"
    most = _share(knowing) >= 0.9 * _share(before)
    if not farther and (most or not _fewer(before, knowing)):
        return "fallen"
    if unknowing and _share(knowing) > wilson(sum(unknowing.values()), len(unknowing))[1]:
        return "weakened"
    return "not refuted"


def _fell(record: Record) -> dict[int, bool]:
    """Whether an image fell, by its number, of those that were attacked."""
    rows = record.images
    return {i: hit for i, attacked, hit in zip(rows.index, rows.attacked, rows.success, strict=True) if attacked}


def _any(records: Iterable[Record]) -> dict[int, bool]:
    found: dict[int, bool] = {}
    for record in records:
        for index, hit in _fell(record).items():
            found[index] = found.get(index, False) or hit
    return found


def _share(fell: Mapping[int, bool]) -> float:
    return sum(fell.values()) / len(fell) if fell else 0.0


def _fewer(before: Mapping[int, bool], knowing: Mapping[int, bool]) -> bool:
    """Whether fewer of the images that both were attacked on fell to the second, beyond chance."""
    pairs = [before[i] for i in before.keys() & knowing.keys() if before[i] != knowing[i]]
    saved, count = sum(pairs), len(pairs)
    chance = sum(math.comb(count, k) for k in range(saved, count + 1)) / 2.0**count
    return bool(chance <= 0.05)
