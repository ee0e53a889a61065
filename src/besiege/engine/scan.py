"""Looks for poison in training images with several detectors, and measures them where the truth is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.poisoned import Knowledge, Poisoned, eight_bits
from besiege.core.rng import Rng
from besiege.core.suspicion import Probe, Suspicion
from besiege.core.target import Target
from besiege.engine import roc
from besiege.results.interval import wilson
from besiege.results.scan import Scan, Suspects

MOST = 1000
"""So many suspects are named in a record."""

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Suspected:
    """Training images under suspicion, with what is known of them.

    ``held`` are clean images that nothing was trained on: they calibrate and judge, see `halves`. ``truth`` (n,) says
    what is poisoned; ``poisoned`` how, and ``clean`` what the images were before.
    """

    images: Images
    held: Images
    classes: int
    truth: Tensor | None = None
    poisoned: Poisoned | None = None
    clean: Images | None = None


def halves(held: Images, seed: int) -> tuple[Images, Images]:
    """Those of the images that calibrate and those that judge, drawn by the seed: files are sorted by class often."""
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed)).to(held.x.device)
    half = len(held) // 2
    return held[order[:half].sort().values], held[order[half:].sort().values]


def planted(attack: Attack, images: Images, held: Images, classes: int, target_class: int, seed: int) -> Suspected:
    """Images that we poison ourselves, so that the truth is known.

    Raises:
        BadInput: the method needs more than the images.
    """
    card = attack.card
    if card.needs or card.changes == "training":
        raise BadInput(
            f"{attack.name} needs more than training images; poison with `besiege poison` and scan its --out"
        )
    made = attack.bound()(images, Knowledge(classes, target_class, seed=seed), Rng.of(seed, images.index, attack.name))
    x = made.images.x.clone()
    x[made.truth] = eight_bits(x[made.truth])
    made = replace(made, images=replace(made.images, x=x))
    return Suspected(made.images, held, classes, made.truth, made, images)


def at_the_door(
    attack: Attack | None, target: Target, held: Images, classes: int, target_class: int, seed: int
) -> Suspected:
    """The half of the clean images ``held`` that judges as a trained network meets it, beside copies with the trigger.

    They have the labels that it gives them. Without an ``attack`` every one that is suspected is a false alarm.

    Raises:
        BadInput: the attack has no trigger, or as `planted`.
    """
    images, made = halves(held, seed)[1], None
    truth = torch.zeros(len(images), dtype=torch.bool, device=images.x.device)
    x = images.x
    if attack is not None:
        made = planted(attack, images, held, classes, target_class, seed).poisoned
        if made is None or made.trigger is None:
            raise BadInput(f"{attack.name} plants no trigger; a trained network is searched for badnets or blended")
        rows = (made.wanted(images.y, classes) != images.y).nonzero().squeeze(1)
        x = torch.cat([x, eight_bits(made.trigger(x[rows]))])
        truth = torch.cat([truth, torch.ones_like(rows, dtype=torch.bool)])
    seen = replace(Images.of(x, target.labels(x), name=images.name, names=images.names), notes=images.notes)
    return Suspected(seen, held, classes, truth, made)


def scan(
    detectors: Sequence[Attack],
    suspected: Suspected,
    fit: Fit,
    *,
    model: Target | None = None,
    seed: int = 0,
    retrain: bool = False,
    progress: Progress | None = None,
) -> tuple[Scan, list[Suspicion]]:
    """Run each of ``detectors`` on the images and on a network that was trained on them: ``model``, or by ``fit``.

    Where the images before the poison are known, each also runs on them and on a network trained on them alike.

    Raises:
        BadInput: a detector does not fit the network or the images.
    """
    images = suspected.images
    calibration, judged = halves(suspected.held, seed)
    target = model or fit(images, seed, classes=suspected.classes, progress=progress)
    probe = Probe(target, fit, seed, progress)
    twin = None
    if suspected.clean is not None:
        twin = Probe(fit(suspected.clean, seed, classes=suspected.classes, progress=progress), fit, seed, progress)
    found, records = [], []
    for detector in detectors:
        began = time.monotonic()
        said = suspicion(detector, probe, images, calibration, seed)
        spent = time.monotonic() - began
        record = _record(detector, said, suspected)
        if twin is not None and suspected.clean is not None:
            clean = suspicion(detector, twin, suspected.clean, calibration, seed)
            record = record.model_copy(update={"fpr_clean": float(clean.suspect.float().mean())})
        if retrain:
            after = fit(images[~said.suspect], seed, classes=suspected.classes, progress=progress)
            right = float((after.labels(judged.x) == judged.y).float().mean())
            still = attack_success(after, suspected.poisoned, judged, suspected.classes)
            record = record.model_copy(update={"clean_accuracy_after": right, "attack_success_after": still})
        if detector.card.kind == "model":
            record = record.model_copy(update=_pruned(detector, target, suspected, calibration, judged, seed))
        records.append(record.model_copy(update={"seconds": spent}))
        found.append(said)
    return (
        Scan(
            data=images.name,
            model=target.name,
            fit=None if model is not None else fit.name,
            n=len(images),
            seed=seed,
            poison=None,
            poison_count=None if suspected.truth is None else int(suspected.truth.sum()),
            clean_accuracy=float((target.labels(judged.x) == judged.y).float().mean()),
            attack_success=attack_success(target, suspected.poisoned, judged, suspected.classes),
            detectors=records,
            notes=list(images.notes),
        ),
        found,
    )


def suspicion(detector: Attack, probe: Probe, images: Images, clean: Images, seed: int) -> Suspicion:
    """What one detector says of each image; one that stands before a model is calibrated on ``clean`` ones first."""
    if detector.card.kind == "data":
        said: Suspicion = detector.bound()(images, probe, Rng.of(seed, images.index, detector.name))
        return said
    if detector.card.suspects is not None:
        return detector.card.suspects(probe.target, images)
    guarded = detector.bound()(probe.target, clean, Rng.of(seed, clean.index, detector.name))
    with torch.no_grad(), guarded.ready():
        answers = [guarded.answer(part).excess for part in torch.split(images.x, 64)]
    excess = torch.cat([answer for answer in answers if answer is not None])
    if len(excess) != len(images):
        raise BadInput(f"{detector.name} rejects no images, so it finds no poison")
    return Suspicion(excess, excess > 0)


def _pruned(
    detector: Attack, target: Target, suspected: Suspected, clean: Images, judged: Images, seed: int
) -> dict[str, float | None]:
    """What becomes of a network when the neurons that a detector names are pruned."""
    seen = clean if detector.arguments.get("mode") == "fine-pruning" else suspected.images
    after = detector.bound()(target, seen, Rng.of(seed, seen.index, detector.name))
    return {
        "clean_accuracy_pruned": float((after.labels(judged.x) == judged.y).float().mean()),
        "attack_success_pruned": attack_success(after, suspected.poisoned, judged, suspected.classes),
    }


def attack_success(target: Target, made: Poisoned | None, test: Images, classes: int) -> float | None:
    """The share of triggered test images of other classes that get what the attacker wants; None without a trigger."""
    if made is None or made.trigger is None:
        return None
    wanted = made.wanted(test.y, classes)
    rows = (wanted != test.y).nonzero().squeeze(1)
    if not len(rows):
        return None
    return float((target.labels(eight_bits(made.trigger(test.x[rows]))) == wanted[rows]).float().mean())


def _record(detector: Attack, said: Suspicion, suspected: Suspected) -> Suspects:
    images, truth = suspected.images, suspected.truth
    order = said.score.argsort(descending=True, stable=True)
    record = Suspects(
        detector=detector.name,
        title=detector.card.title,
        options=detector.recorded(),
        n=len(images),
        suspected=int(said.suspect.sum()),
        by_class=torch.bincount(images.y[said.suspect], minlength=suspected.classes).tolist(),
        suspects=images.index[order[said.suspect[order]]][:MOST].tolist(),
    )
    if truth is not None and not bool(truth.any()):
        return record.model_copy(update={"fpr_clean": float(said.suspect.float().mean())})
    if truth is None or bool(truth.all()):
        return record
    caught, count = int((said.suspect & truth).sum()), int(truth.sum())
    wrong = int((said.suspect & ~truth).sum())
    false, true = roc.curve(said.score[truth].cpu(), said.score[~truth].cpu())
    return record.model_copy(
        update={
            "tpr": caught / count,
            "tpr_interval": wilson(caught, count),
            "fpr": wrong / int((~truth).sum()),
            "auc": roc.auc(said.score[truth].cpu(), said.score[~truth].cpu())[0],
            "f1": 2 * caught / (count + caught + wrong),
            "tpr_at": {f"{rate:g}": roc.at(false, true, rate) for rate in (0.01, 0.05)},
        }
    )
