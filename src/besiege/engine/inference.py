"""Runs one inference method on one target, and measures what it learned against the truth."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.oracle import Oracle
from besiege.core.reference import Reference
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal
from besiege.engine import roc
from besiege.engine.evasion import Lensing
from besiege.results.inference import Inversion, Inverted, Membership, Reconstruction, Unseen
from besiege.results.interval import wilson
from besiege.results.record import AccessName

RATES = (0.001, 0.01)
"""The shares of false alarms at which members are counted."""

FEWEST = 10
"""So many members must there be, and so many others, that telling them apart says anything."""


@dataclass(frozen=True)
class Through:
    """A lens by its name, and what it needs of the target."""

    name: str
    lens: Lensing
    access: Access


def infer_membership(
    attack: Attack,
    target: Target,
    members: Images,
    others: Images,
    knows: Reference,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Membership]:
    """Score ``members`` and ``others`` (n, in that order) and measure how well that tells them apart.

    With ``knows.fit`` the attack also meets a model that has learned from half of the ``others`` alone, and is
    measured on the members and the other half, of which that model saw none.

    Raises:
        BadInput: the attack does not fit the target, or the images do not.
    """
    images = _both(members, others)
    _fits(attack, target, images, None)
    if knows.images is not None:
        _fits(attack, target, knows.images, None)
    with ExitStack() as stack:
        if knows.folder is None:
            knows = replace(knows, folder=Path(stack.enter_context(tempfile.TemporaryDirectory())))
        scores, spent = _asked(attack, target, images, Goal(images.y), images, knows, seed, None, progress)
        unseen = _unseen(attack, target, members, others, images, knows, seed) if knows.fit is not None else None
    false, true = roc.curve(scores[: len(members)], scores[len(members) :])
    area, interval = roc.auc(scores[: len(members)], scores[len(members) :])
    shares = {f"{rate:g}": roc.at(false, true, rate) for rate in RATES}
    right = (target.labels(images.x) == images.y).double()
    notes = []
    if len(others) < 1 / min(RATES):
        notes.append(
            f"{len(others)} non-members: a false positive rate of {min(RATES):g} means that not one of them is taken in"
        )
    return scores, Membership(
        **_facts(attack, target, images, seed, None),
        **spent,
        notes=notes,
        members=len(members),
        nonmembers=len(others),
        member_accuracy=float(right[: len(members)].mean()),
        nonmember_accuracy=float(right[len(members) :].mean()),
        auc=area,
        auc_interval=interval,
        balanced_accuracy=roc.balanced_accuracy(false, true),
        tpr_at_fpr=shares,
        tpr_at_fpr_interval={rate: wilson(round(share * len(members)), len(members)) for rate, share in shares.items()},
        roc=roc.thinned(false, true),
        unseen=unseen,
    )


def _unseen(
    attack: Attack, target: Target, members: Images, others: Images, images: Images, knows: Reference, seed: int
) -> Unseen:
    """The same attack, its shadow models too, on a model trained on half of the others."""
    assert knows.fit is not None
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).to(images.x.device)
    learned, rest = order[: len(others) // 2], order[len(others) // 2 :]
    twin = knows.fit(
        others[learned],
        seed + 1,
        classes=target.classes,
        checkpoint=knows.kept(others[learned], seed + 1),
        progress=knows.progress,
    )
    scores, _ = _asked(attack, twin, images, Goal(images.y), images, replace(knows, progress=None), seed, None, None)
    area, interval = roc.auc(scores[: len(members)], scores[len(members) :][rest])
    return Unseen(members=len(members), nonmembers=len(rest), auc=area, auc_interval=interval)


def invert(
    attack: Attack,
    target: Target,
    classes: Tensor,
    evaluator: Target,
    judged: Images,
    training: Images | None,
    *,
    seed: int = 0,
    lens: Through | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Inversion]:
    """Make a picture (k, c, h, w) for each of ``classes`` (k,) and let ``evaluator`` say what it shows.

    The evaluator was trained apart from the target; ``judged`` are images that it did not learn from. Distances are
    to the ``training`` images of the class.

    Raises:
        BadInput: the attack does not fit the target.
    """
    blank = torch.zeros(len(classes), *target.shape, device=classes.device)
    images = Images(blank, classes, classes, judged.name if training is None else training.name, judged.names)
    _fits(attack, target, images, lens)
    knows = Reference(target.shape)
    meters: list[Meter] = []
    made, spent = _asked(
        attack, target, images, Goal(classes, True), classes, knows, seed, lens, progress, meters.append
    )
    confidence = target.scores(made).softmax(1).gather(1, classes[:, None])[:, 0]
    told = evaluator.scores(made).softmax(1)
    surest, said = told.max(1)
    rows = []
    for k, label in enumerate(classes.tolist()):
        own = None if training is None else training.x[training.y == label]
        near = None if own is None or not len(own) else (own - made[k]).flatten(1).norm(dim=1).amin()
        mean = None if own is None or not len(own) else (own.mean(0) - made[k]).norm()
        rows.append(
            Inverted(
                label=label,
                confidence=float(confidence[k]),
                distance_to_mean=None if mean is None else float(mean),
                distance_to_nearest=None if near is None else float(near),
                recognized=bool(said[k] == label),
                recognized_as=int(said[k]),
                evaluator_confidence=float(surest[k]),
                queries=int(meters[0].forward[k]),
            )
        )
    recognized = sum(row.recognized for row in rows)
    return made, Inversion(
        **_facts(attack, target, images, seed, lens),
        **spent,
        classes=rows,
        confidence=float(confidence.mean()),
        distance_to_mean=_mean([row.distance_to_mean for row in rows]),
        distance_to_nearest=_mean([row.distance_to_nearest for row in rows]),
        recognized=recognized,
        recognition_rate=recognized / len(rows),
        recognition_interval=wilson(recognized, len(rows)),
        evaluator=evaluator.name,
        evaluator_accuracy=float((evaluator.labels(judged.x) == judged.y).double().mean()),
    )


def reconstruct(
    attack: Attack,
    target: Target,
    images: Images,
    knows: Reference,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Images, Reconstruction]:
    """Rebuild ``images`` from what ``target`` says of them, and compare.

    Without ``knows.images`` they are the training images of the target, and each is rebuilt by an adversary who has
    all the others and no answer.

    Raises:
        BadInput: the attack does not fit the target, or the images do not.
    """
    _fits(attack, target, images, None)
    if knows.images is not None:
        seen = target.scores(images.x)
        found, spent = _asked(attack, target, knows.images, Goal(knows.images.y), seen, knows, seed, None, progress)
        guesses = [_guesses(knows.images, label) for label in images.y.tolist()]
        return found, _compared(attack, target, images, found, guesses, seed, attack.card.access, spent)
    precise, every = replace(images, x=images.x.to(target.dtype)), torch.arange(len(images), device=images.x.device)
    parts, costs, guesses = [], [], []
    for row, label in enumerate(images.y.tolist()):
        rest = precise[every != row]
        nothing, knows = precise.x.new_zeros(1, 0), replace(knows, images=rest)
        part, cost = _asked(attack, target, rest, Goal(rest.y), nothing, knows, seed, None, progress)
        parts.append(part)
        costs.append(cost)
        guesses.append(_guesses(rest, label))
    found = Images(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]), images.index)
    spent = {key: sum(cost[key] for cost in costs) for key in costs[0]}
    return found, _compared(attack, target, images, found, guesses, seed, Access.GRADIENTS, spent)


def _guesses(images: Images, label: int) -> tuple[Tensor, Tensor]:
    """What one would say without the attack: the mean image of the class, and of all."""
    own = images.x[images.y == label]
    return (own if len(own) else images.x).mean(0), images.x.mean(0)


def _compared(
    attack: Attack,
    target: Target,
    images: Images,
    found: Images,
    guesses: list[tuple[Tensor, Tensor]],
    seed: int,
    access: Access,
    spent: dict[str, Any],
) -> Reconstruction:
    """What was found beside what was there, and beside what one would have guessed."""
    true = images.x.double()
    off = (found.x.double() - true).square().flatten(1)
    relative = off.sum(1).sqrt() / true.flatten(1).norm(dim=1).clamp_min(1e-12)
    of_class, of_all = (torch.stack(part).double() for part in zip(*guesses, strict=True))
    mse, baseline = float(off.mean()), float((of_class - true).square().mean())
    return Reconstruction(
        **_facts(attack, target, images, seed, None, access),
        **spent,
        mse=mse,
        mse_baseline=baseline,
        mse_mean_image=float((of_all - true).square().mean()),
        ratio=mse / max(baseline, 1e-300),
        psnr=float((-10 * off.mean(1).clamp_min(1e-12).log10()).mean()),
        label_accuracy=float((found.y == images.y).double().mean()),
        relative_error_median=float(relative.median()),
        relative_error_max=float(relative.max()),
    )


def _asked(
    attack: Attack,
    target: Target,
    images: Images,
    goal: Goal,
    second: Images | Tensor,
    knows: Reference,
    seed: int,
    lens: Through | None,
    progress: Callable[[int], None] | None,
    keep: Callable[[Meter], None] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """What the method gives, and what it spent; it asks about ``images``, and ``second`` is its second argument."""
    began, cpu = time.monotonic(), time.process_time()
    access = target.access if lens is None else min(lens.access, target.access)
    meter = Meter(target, images.x, goal, Ball(INF, INF), seeks="optimum", access=access, progress=progress)
    oracle: Oracle = meter
    if lens is not None:
        oracle = lens.lens(meter, meter.x, Rng.of(seed, images.index, attack.name + "/lens"))
    with target.ready():
        given = attack.bound()(oracle, second, knows, Rng.of(seed, images.index, attack.name))
    if keep is not None:
        keep(meter)
    return given, {
        "queries": int(meter.forward.sum()),
        "backward": int(meter.backward.sum()),
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def _facts(
    attack: Attack, target: Target, images: Images, seed: int, lens: Through | None, access: Access | None = None
) -> dict[str, Any]:
    access = access or (attack.card.access if lens is None else lens.access)
    return {
        "attack": attack.name,
        "options": attack.recorded(),
        "title": attack.card.title if lens is None else f"{attack.card.title} through {lens.name}",
        "family": attack.card.family,
        "paper": attack.card.paper,
        "gives": attack.card.gives,
        "target": target.name,
        "fingerprint": target.fingerprint,
        "data": images.name,
        "n": len(images),
        "seed": seed,
        "access": cast(AccessName, access.name.lower()),
        "lens": None if lens is None else lens.name,
    }


def _fits(attack: Attack, target: Target, images: Images, lens: Through | None) -> None:
    needs = attack.card.access if lens is None else lens.access
    if target.access < needs:
        raise BadInput(
            f"{attack.name} needs {needs.name.lower()}, but {target.name} grants {target.access.name.lower()}"
        )
    target.takes(images)


def _both(members: Images, others: Images) -> Images:
    """Members first, numbered through."""
    if members.shape != others.shape:
        raise BadInput(f"members are {members.shape} (c, h, w), but non-members {others.shape}")
    if min(len(members), len(others)) < FEWEST:
        raise BadInput(
            f"{len(members)} members and {len(others)} non-members are too few to be told apart; give {FEWEST} of each"
        )
    both = others.shared(members)
    if both:
        raise BadInput(
            f"{both} of the {len(others)} non-members are members too; give images that the target never learned from"
        )
    x, y = torch.cat([members.x, others.x]), torch.cat([members.y, others.y])
    name = members.name if members.name == others.name else f"{members.name}, {others.name}"
    return Images(x, y, torch.arange(len(x), device=x.device), name, members.names)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
