"""What the records say about how far they can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from besiege.results.audit import Audit
from besiege.results.record import Record

SINGLE_STEP = ("fgsm",)
SLACK = 0.02


class Note(NamedTuple):
    """One observation: ``warn`` where a figure should not be taken as it stands."""

    level: Literal["pass", "warn"]
    title: str
    text: str


def notes(audit: Audit) -> list[Note]:
    """Every check that the records at hand allow, in reading order."""
    checks = (_verified, _sample, _noise, _single_step, _blackbox, _rounding)
    return [note for check in checks for note in check(audit)]


def _verified(audit: Audit) -> Iterator[Note]:
    bad = [record.attack for record in audit.records if not record.verified]
    if bad:
        yield Note(
            "warn",
            "Claims not confirmed",
            f"A fresh forward pass did not confirm every success of {_and(bad)}; those images count as standing.",
        )
    elif audit.records:
        yield Note(
            "pass",
            "Every success confirmed",
            "Each adversarial example was looked at again by a fresh forward pass: finite, in [0, 1], "
            "within its distance, and classified as claimed.",
        )


def _sample(audit: Audit) -> Iterator[Note]:
    low, high = audit.clean_interval
    if high - low > 0.1:
        yield Note(
            "warn",
            "Few images",
            f"{audit.n} images leave the clean accuracy uncertain by {100 * (high - low):.0f} points; "
            "raise --limit before comparing models.",
        )


def _noise(audit: Audit) -> Iterator[Note]:
    loud = [r for r in audit.records if (r.noise_success_rate or 0) > 0.1]
    if loud:
        worst = max(loud, key=lambda r: r.noise_success_rate or 0)
        yield Note(
            "warn",
            "Noise alone succeeds",
            f"Random perturbations as large as those of {worst.attack} ({worst.threat}) change "
            f"{100 * (worst.noise_success_rate or 0):.0f} % of the answers: the radius is wide for this "
            "classifier, or the classifier is brittle.",
        )
    elif audit.records:
        yield Note("pass", "Noise does not", "Random perturbations of the same size change at most one answer in ten.")


def _single_step(audit: Audit) -> Iterator[Note]:
    for threat, cells in _by_threat(audit).items():
        single = [r for r in cells if r.attack in SINGLE_STEP]
        multi = [r for r in cells if r.attack not in SINGLE_STEP and r.family == "whitebox" and r.seeks == "success"]
        if not single or not multi:
            continue
        if min(r.robust_accuracy for r in multi) > min(r.robust_accuracy for r in single) + SLACK:
            yield Note(
                "warn",
                "One step beats many",
                f"Under {threat} a single step takes more images than iterated attacks do: gradients are probably "
                "masked, and the true robust accuracy is lower.",
            )
        else:
            yield Note("pass", "Many steps beat one", f"Under {threat} iterated attacks are at least as strong.")


def _blackbox(audit: Audit) -> Iterator[Note]:
    for threat, cells in _by_threat(audit).items():
        white = [r for r in cells if r.family == "whitebox"]
        black = [r for r in cells if r.family == "blackbox"]
        if not white or not black:
            continue
        seen, fell = set[int](), set[int]()
        for record in white:
            seen |= set(record.images.index)
            fell |= _fallen(record)
        only = {index for record in black for index in _fallen(record) if index in seen} - fell
        if len(only) > SLACK * audit.n:
            yield Note(
                "warn",
                "Queries beat gradients",
                f"Under {threat} {len(only)} images fell to a black-box attack alone: gradients are probably "
                "masked, and the white-box figures are too high.",
            )
        else:
            yield Note("pass", "Gradients beat queries", f"Under {threat} the white-box attacks miss next to nothing.")


def _rounding(audit: Audit) -> Iterator[Note]:
    for record in audit.records:
        if (
            record.seeks == "success"
            and record.success_rate
            and (record.success_rate_8bit or 0) < 0.8 * record.success_rate
        ):
            yield Note(
                "warn",
                "Lost in rounding",
                f"{record.attack} ({record.threat}) succeeds on {100 * record.success_rate:.0f} % of the images, but "
                f"on {100 * (record.success_rate_8bit or 0):.0f} % once its images are stored in 8 bits.",
            )


def _fallen(record: Record) -> set[int]:
    return {index for index, fell in zip(record.images.index, record.images.success, strict=True) if fell}


def _by_threat(audit: Audit) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in audit.records:
        if record.threat.eps is not None:
            groups.setdefault(str(record.threat), []).append(record)
    return groups


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
