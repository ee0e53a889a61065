"""Two audits of the same images side by side, image by image."""

from __future__ import annotations

import math
from collections.abc import Mapping

from besiege.core.errors import BadInput
from besiege.results.audit import Audit
from besiege.results.interval import wilson
from besiege.results.record import Facts, Interval


class Pair(Facts):
    """How one attack (or ``clean``, or the worst case) left two runs, on the ``n`` images that both met.

    ``difference`` is the second's accuracy less the first's, with its paired interval at 95 %; ``only_first``
    and ``only_second`` count the images that stand in one alone, and ``p`` is McNemar's exact probability of as
    uneven a split by chance.
    """

    attack: str
    threat: str
    n: int
    first: float
    second: float
    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p: float


class Comparison(Facts):
    """Two runs on the same images; ``notes`` say where they differ in more than the classifier."""

    first: str
    second: str
    data: str
    pairs: list[Pair]
    notes: list[str]


def compare(first: Audit, second: Audit) -> Comparison:
    """Every attack and worst case that both runs hold, by pairs of the same image.

    Raises:
        BadInput: the runs are not of the same images, or have no figure in common.
    """
    if (first.digest, first.n) != (second.digest, second.n):
        raise BadInput(f"{first.name} and {second.name} are not of the same images; audit both with one --data and -n")
    ours, theirs = _cells(first), _cells(second)
    pairs = []
    for attack, threat in (key for key in ours if key in theirs):
        one, two = ours[attack, threat], theirs[attack, threat]
        met = one.keys() & two.keys()
        if met:
            pairs.append(_pair(attack, threat, [(one[index], two[index]) for index in met]))
    if not pairs:
        raise BadInput(f"{first.name} and {second.name} have no attack in common")
    return Comparison(
        first=f"{first.name} ({first.target})",
        second=f"{second.name} ({second.target})",
        data=first.data,
        pairs=pairs,
        notes=_differences(first, second),
    )


def newcombe(both: int, first: int, second: int, neither: int) -> Interval:
    """The interval (95 %) of a difference of paired shares, second less first (Newcombe 1998, method 10).

    ``both`` images stand twice, ``first`` and ``second`` in one alone, ``neither`` never. Wilson's intervals of
    the two shares are joined, shortened by their correlation, which is corrected for continuity.
    """
    n = both + first + second + neither
    one, two = both + first, both + second
    share, other = one / n, two / n
    low, high = wilson(one, n)
    other_low, other_high = wilson(two, n)
    product = one * (n - one) * two * (n - two)
    excess = both * neither - first * second
    phi = 0.0
    if product:
        phi = (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(product)
    gap = other - share
    down = _joined(other - other_low, high - share, phi)
    up = _joined(other_high - other, share - low, phi)
    return gap - down, gap + up


def mcnemar(first: int, second: int) -> float:
    """The chance of so uneven a split or worse among the images that stand in one run alone (exact, two-sided)."""
    n, ways, tail = first + second, 1, 1
    for k in range(min(first, second)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << n))


def _joined(reach: float, other: float, phi: float) -> float:
    return math.sqrt(max(reach * reach - 2 * phi * reach * other + other * other, 0.0))


def _cells(audit: Audit) -> dict[tuple[str, str], dict[int, bool]]:
    """What stands of each image: clean, in the worst case of each threat, and under each attack."""
    clean: dict[int, bool] = {}
    worst: dict[tuple[str, str], dict[int, bool]] = {}
    cells: dict[tuple[str, str], dict[int, bool]] = {}
    for record in audit.records:
        rows = record.images
        clean.update(
            (index, label == said) for index, label, said in zip(rows.index, rows.label, rows.clean_label, strict=True)
        )
        standing = cells[record.attack, str(record.threat)] = record.standing
        together = worst.setdefault(("worst case", str(record.threat)), {})
        for index, stands in standing.items():
            together[index] = together.get(index, True) and stands
    return {("clean", ""): clean, **worst, **cells}


def _pair(attack: str, threat: str, stands: list[tuple[bool, bool]]) -> Pair:
    n = len(stands)
    both, neither = stands.count((True, True)), stands.count((False, False))
    first, second = stands.count((True, False)), stands.count((False, True))
    return Pair(
        attack=attack,
        threat=threat,
        n=n,
        first=(both + first) / n,
        second=(both + second) / n,
        difference=(second - first) / n,
        interval=newcombe(both, first, second, neither),
        only_first=first,
        only_second=second,
        p=mcnemar(first, second),
    )


def _differences(first: Audit, second: Audit) -> list[str]:
    """What else than the classifier could explain a difference."""
    notes = [
        f"{name} {one} against {two}"
        for name, one, two in (
            ("seed", first.seed, second.seed),
            ("budget", first.budget, second.budget),
            ("besiege", first.environment.besiege, second.environment.besiege),
        )
        if one != two
    ]
    theirs: Mapping[tuple[str, str], object] = {(r.attack, str(r.threat)): r.options for r in second.records}
    notes += [
        f"{record.attack} ({record.threat}) ran with other options"
        for record in first.records
        if theirs.get((record.attack, str(record.threat)), record.options) != record.options
    ]
    ours = {(record.attack, str(record.threat)) for record in first.records}
    alone = [" ".join(key) for key in sorted(ours ^ set(theirs))]
    notes += [f"in one run alone, and in its worst case: {', '.join(alone)}"] if alone else []
    notes += [f"{audit.name} was cut short" for audit in (first, second) if not audit.complete]
    return notes
