"""The plain, verified facts of one cell: one attack on one target under one threat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from besiege.results.interval import wilson

Norm = Literal["l0", "l1", "l2", "linf", "wasserstein", "spatial", "color"]
AccessName = Literal["labels", "scores", "gradients", "weights"]
Interval = tuple[float, float]


class Facts(BaseModel):
    """A frozen model that is JSON both ways. Infinity has no place in it: what is unknown is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def json_text(self) -> str:
        """The facts as indented JSON."""
        return self.model_dump_json(indent=1) + "\n"


class Threat(Facts):
    """The threat model as recorded; without ``eps`` there was no radius, with ``after`` the images were moved first."""

    norm: Norm
    eps: float | None
    access: AccessName
    queries: int | None = None
    seconds: float | None = None
    targeted: bool = False
    target_class: int | None = None
    after: str | None = None

    def __str__(self) -> str:
        return (f"{self.after}, then " if self.after else "") + ball_text(self.norm, self.eps)


class Rows(Facts):
    """What happened to each image, one entry an image in every list.

    ``distance`` is None where nothing verified was found; ``needed`` counts the forward passes up to the
    first success, -1 where there was none.
    """

    index: list[int]
    label: list[int]
    clean_label: list[int]
    adversarial_label: list[int]
    attacked: list[bool]
    success: list[bool]
    success_8bit: list[bool]
    distance: list[float | None]
    forward: list[int]
    backward: list[int]
    needed: list[int]


class Record(Facts):
    """One attack on one target.

    ``success_rate`` is over the ``attacked`` images, those that the clean target gets right (and that do not
    bear the target class already); ``robust_accuracy`` is over all ``n``, and an image that the clean target
    gets wrong is not robust. Intervals are Wilson's at 95 %. Distances are of the verified adversarial
    examples, those beyond eps that a minimum-seeking attack found included. ``noise_success_rate`` is what
    random perturbations of the same size achieve. ``verified`` says that a fresh forward pass confirmed every
    claim of the search. A universal perturbation has a ``fooling_rate``, its success on images that it was not
    fitted on, and what fitting it cost.
    """

    attack: str
    options: dict[str, Any]
    title: str
    family: str
    paper: str
    seeks: Literal["success", "minimum", "optimum"]
    target: str
    fingerprint: str
    data: str
    n: int
    seed: int
    threat: Threat
    clean_accuracy: float
    attacked: int
    success_rate: float | None
    success_interval: Interval
    robust_accuracy: float
    robust_interval: Interval
    median_distance: float | None
    mean_distance: float | None
    success_rate_8bit: float | None
    noise_success_rate: float | None
    forward_per_image: float
    backward_per_image: float
    queries_median: float | None
    setup_forward: int = 0
    setup_backward: int = 0
    setup_seconds: float = 0.0
    fooling_rate: float | None = None
    seconds: float
    cpu_seconds: float
    verified: bool
    notes: list[str] = Field(default_factory=list)
    images: Rows

    @property
    def standing(self) -> dict[int, bool]:
        """By image number: is it right when clean, and did it withstand this attack?"""
        rows = zip(self.images.index, self.images.label, self.images.clean_label, self.images.success, strict=True)
        return {index: label == clean and not fell for index, label, clean, fell in rows}


def figures(rows: Rows, noise: int) -> dict[str, Any]:
    """What a `Record` says of its rows together; random noise of the same size succeeded on ``noise`` of them."""
    n, attacked, fell = len(rows.index), sum(rows.attacked), sum(rows.success)
    right = [label == clean for label, clean in zip(rows.label, rows.clean_label, strict=True)]
    stands = sum(was and not hit for was, hit in zip(right, rows.success, strict=True))
    found = [distance for distance in rows.distance if distance is not None]
    needed = [passes for passes, hit in zip(rows.needed, rows.success, strict=True) if hit]
    return {
        "n": n,
        "clean_accuracy": sum(right) / n,
        "attacked": attacked,
        "success_rate": fell / attacked if attacked else None,
        "success_interval": wilson(fell, attacked),
        "robust_accuracy": stands / n,
        "robust_interval": wilson(stands, n),
        "median_distance": statistics.median(found) if found else None,
        "mean_distance": statistics.fmean(found) if found else None,
        "success_rate_8bit": sum(rows.success_8bit) / attacked if attacked else None,
        "noise_success_rate": noise / attacked if attacked else None,
        "forward_per_image": sum(rows.forward) / max(attacked, 1),
        "backward_per_image": sum(rows.backward) / max(attacked, 1),
        "queries_median": statistics.median(needed) if needed else None,
    }


def joined(parts: Sequence[Record]) -> Record:
    """One record of the shards of one attack, which share no image; its rows are in the order of their numbers."""
    rows = {name: [value for part in parts for value in getattr(part.images, name)] for name in Rows.model_fields}
    order = sorted(range(len(rows["index"])), key=rows["index"].__getitem__)
    images = Rows(**{name: [column[row] for row in order] for name, column in rows.items()})
    noise = sum(round((part.noise_success_rate or 0) * part.attacked) for part in parts)
    return parts[0].model_copy(
        update={
            **figures(images, noise),
            **{
                name: sum(getattr(part, name) for part in parts)
                for name in ("seconds", "cpu_seconds", "setup_forward", "setup_backward", "setup_seconds")
            },
            "verified": all(part.verified for part in parts),
            "notes": list(dict.fromkeys(note for part in parts for note in part.notes)),
            "images": images,
        }
    )


def ball_text(norm: str, eps: float | None) -> str:
    """``linf:8/255``, ``l2:0.5``, ``wasserstein:0.1``; the norm alone where there is no radius."""
    if eps is None:
        return norm
    levels = eps * 255
    if norm == "linf" and abs(levels - round(levels)) < 1e-6 * levels:
        return f"{norm}:{round(levels)}/255"
    return f"{norm}:{eps:.6g}"
