"""What a search for poison has found."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from besiege.results.record import Facts, Interval


class Suspects(Facts):
    """What one detector says of a data set.

    ``suspects`` are the numbers of the images that should go, the most suspect first; ``by_class`` counts them.
    ``fpr_clean`` is the share of images that it suspects of the same data without poison, where that is known. Where
    it is known what was poisoned: ``tpr``, ``fpr``, ``auc`` and ``f1`` against that truth, ``tpr_at`` the true
    positives at false positive rates of 1 and 5 %. After removal a network is trained again: its clean accuracy, and
    the share of triggered images that still reach the attacker's class; the same two of the network that a detector
    has pruned.
    """

    detector: str
    title: str
    options: dict[str, Any]
    n: int
    suspected: int
    by_class: list[int]
    suspects: list[int]
    fpr_clean: float | None = None
    tpr: float | None = None
    tpr_interval: Interval | None = None
    fpr: float | None = None
    auc: float | None = None
    f1: float | None = None
    tpr_at: dict[str, float] | None = None
    clean_accuracy_after: float | None = None
    attack_success_after: float | None = None
    clean_accuracy_pruned: float | None = None
    attack_success_pruned: float | None = None
    seconds: float = 0.0


class Scan(Facts):
    """A search for poison with several detectors."""

    data: str
    model: str
    fit: str | None
    n: int
    seed: int
    poison: str | None
    poison_count: int | None
    clean_accuracy: float
    attack_success: float | None
    detectors: list[Suspects]
    notes: list[str] = Field(default_factory=list)
