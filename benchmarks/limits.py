"""One curve for each limitation that the review's Table 6 names: ``python -m benchmarks.limits > docs/limits.md``.

Tells on stderr how far it is. Needs the shared data; about half an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.scan import CALIBRATION, DETECTORS, FIELDS, JUDGED, Known, accuracy, before, opened, planted, told
from besiege.attacks.poisoning.badnets import corner
from besiege.core.images import Images
from besiege.core.method import configured, method
from besiege.core.poisoned import Poisoned, eight_bits
from besiege.core.rng import Rng
from besiege.core.suspicion import Probe
from besiege.core.target import Target
from besiege.core.trigger import Stamp
from besiege.engine.poisoning import Sample, Twins
from besiege.engine.scan import attack_success, suspicion

PAGE = """# Where the detectors of Table 6 stop

MNIST, {images:,} training images, the recipe `{fit}` for {epochs} epochs, seed 0. The trigger is a patch of 3 pixels in
a corner and poison a tenth of the target class, unless a row says otherwise. What stands before the network is
calibrated on {calibration:,} clean test images and judged on {judged} others; activation patterns prune, and train on
for two epochs, as in [table6.md](table6.md); ASR is the attack's success before, and after. In one process on one
thread: `python -m benchmarks.limits`."""

FIELD = FIELDS["mnist"]
Row = dict[str, Any]


class Ground:
    """The images, and what was learned from them so far."""

    def __init__(self) -> None:
        self.training, self.test = opened("mnist", FIELD)
        self.twins: Twins = {}

    def sample(self, trigger: Stamp, *, noise: float = 0.0, flipped: float = 0.0) -> Sample:
        """Poison with ``trigger``, and both networks; all images bear ``noise``, a share of labels is ``flipped``."""
        draw = torch.Generator().manual_seed(0)
        x, y = self.training.x, self.training.y.clone()
        if noise:
            x = eight_bits((x + noise * torch.randn(x.shape, generator=draw)).clamp(0, 1))
        wrong = torch.randperm(len(y), generator=draw)[: round(flipped * len(y))]
        y[wrong] = (y[wrong] + torch.randint(1, 10, y[wrong].shape, generator=draw)) % 10
        clean = replace(self.training, x=x, y=y)
        others = (y != FIELD.target_class).nonzero().squeeze(1)
        count = round(int((y == FIELD.target_class).sum()) * FIELD.share / (1 - FIELD.share))
        rows = others[torch.randperm(len(others), generator=draw)[:count]].sort().values
        made = Poisoned.at(
            clean,
            rows,
            x=eight_bits(trigger(x[rows])),
            y=FIELD.target_class,
            trigger=trigger,
            target_class=FIELD.target_class,
        )
        target = FIELD.fit(made.images, 0, classes=10)
        key = (str(noise), str(flipped), 0, "")
        if key not in self.twins:
            self.twins[key] = FIELD.fit(clean, 0, classes=10)
        return Sample(clean, made, target, self.twins[key])

    @property
    def clean(self) -> Images:
        """What a detector is calibrated on."""
        return self.test[:CALIBRATION]

    @property
    def judged(self) -> Images:
        """What it is judged on."""
        return self.test[CALIBRATION:]


def patch(side: int, place: str = "corner") -> Stamp:
    """A patch of ``side`` pixels in the corner, at an edge, or in the middle of the image."""
    stamp = corner((1, 28, 28), side)
    middle = (27 - side) - (28 - side) // 2
    shifts = {"corner": (0, 0), "edge": (0, -middle), "middle": (-middle, -middle)}[place]
    return Stamp(stamp.pattern.roll(shifts, (1, 2)), stamp.mask.roll(shifts, (1, 2)))


def standing(ground: Ground, detector: str, sample: Sample) -> Row:
    """What a detector before the network makes of a sample."""
    asr = attack_success(sample.target, sample.poisoned, ground.judged, 10)
    return {"asr": asr} | before(DETECTORS[detector], sample, ground.clean, ground.judged[:JUDGED], 0)


def by_patch(ground: Ground) -> Iterator[tuple[str, Row]]:
    """SentiNet against the size and the place of the trigger."""
    for side in (2, 3, 5, 8, 12):
        yield f"{side} pixels, corner", standing(ground, "sentinet", ground.sample(patch(side)))
    for place in ("edge", "middle"):
        yield f"5 pixels, {place}", standing(ground, "sentinet", ground.sample(patch(5, place)))


def by_flips(ground: Ground) -> Iterator[tuple[str, Row]]:
    """STRIP against wrong labels."""
    for flipped in (0.0, 0.1, 0.2, 0.4):
        yield f"{flipped:.0%} of the labels", standing(ground, "strip", ground.sample(patch(3), flipped=flipped))


def by_noise(ground: Ground) -> Iterator[tuple[str, Row]]:
    """Activation patterns against noise on all training images."""
    for noise in (0.0, 0.1, 0.2, 0.4):
        yield f"deviation {noise}", patterns(ground, ground.sample(patch(3), noise=noise))


def by_images(ground: Ground) -> Iterator[tuple[str, Row]]:
    """What activation patterns cost, against the number of images that they look at."""
    sample = ground.sample(patch(3))
    for n in (1000, 2000, 4000, 8000):
        made = sample.poisoned
        some = replace(made, images=made.images[:n], truth=made.truth[:n])
        yield f"{n:,}", patterns(ground, replace(sample, poisoned=some))


def patterns(ground: Ground, sample: Sample) -> Row:
    """What activation patterns make of a sample."""
    chosen, made = DETECTORS["activation-patterns"], sample.poisoned
    row: Row = {"asr": attack_success(sample.target, made, ground.judged, 10)}
    began = time.process_time()
    said = suspicion(chosen, Probe(sample.target, FIELD.fit, 0), made.images, ground.clean, 0)
    pruned = chosen.bound()(sample.target, made.images, Rng.of(0, ground.clean.index, "activation-patterns"))
    row["seconds"] = time.process_time() - began
    row |= told(said, made.truth) | {"asr_after": attack_success(pruned, made, ground.judged, 10)}
    return row | {"accuracy": accuracy(sample.target, ground.judged), "accuracy_after": accuracy(pruned, ground.judged)}


def by_layer(ground: Ground) -> Iterator[tuple[str, Row]]:
    """DBSCAN on what each layer computes, of poison that is one heap and of poison that is made to be none."""
    for name in ("badnets", "blended", "adversarial-embedding"):
        sample = planted("mnist", FIELD, name, ground.training, ground.test, 0, {})
        for layer, seen in layers(sample.target, sample.poisoned.images.x):
            images = replace(sample.poisoned.images, x=seen[:, None, None])
            known = Target.of(
                Known(seen.shape[1], 10), classes=10, shape=(1, 1, seen.shape[1]), name="known", batch=4096
            )
            chosen = configured(method("activation-clustering"), method="dbscan")
            said = suspicion(chosen, Probe(known, FIELD.fit), images, images[:100], 0)
            asr = attack_success(sample.target, sample.poisoned, ground.judged, 10)
            yield f"{name}, {layer}", {"asr": asr} | told(said, sample.poisoned.truth)


def layers(target: Target, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What follows each convolution (its mean over the places) and enters each dense layer, all images at once."""
    caught: dict[str, list[Tensor]] = {}
    assert target.module is not None
    handles = []
    for name, module in target.module.named_modules():
        if isinstance(module, nn.Conv2d):

            def after(own: nn.Module, given: Any, answer: Tensor, name: str = name) -> None:
                caught.setdefault(f"after convolution {name}", []).append(answer.relu().mean((2, 3)))

            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.Linear):

            def into(own: nn.Module, given: Any, name: str = name) -> None:
                caught.setdefault(f"before dense layer {name}", []).append(given[0].flatten(1))

            handles.append(module.register_forward_pre_hook(into))
    with torch.no_grad(), target.ready():
        for part in torch.split(x, 500):
            target.answer(part)
    for handle in handles:
        handle.remove()
    yield from ((name, torch.cat(parts)) for name, parts in caught.items())


CURVES = (
    (
        "Activation patterns: what they cost",
        "images searched",
        by_images,
        ("seconds", "tpr", "fpr", "auc", "asr_after"),
    ),
    (
        "Activation patterns: noisy data",
        "noise on all images",
        by_noise,
        ("asr", "tpr", "fpr", "auc", "accuracy", "accuracy_after", "asr_after"),
    ),
    ("DBSCAN: poison spread over layers", "attack, layer", by_layer, ("asr", "tpr", "fpr", "auc", "f1")),
    ("SentiNet: the trigger's size and position", "trigger", by_patch, ("asr", "tpr", "fpr", "auc", "asr_after")),
    ("STRIP: flipped labels", "wrong", by_flips, ("asr", "tpr", "fpr", "auc", "asr_after")),
)


HEADS = {"tpr": "TPR", "fpr": "FPR", "auc": "AUC", "f1": "F1", "asr": "ASR", "asr_after": "ASR after"}


def main() -> None:
    """Print the page."""
    argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__).parse_args()
    torch.set_num_threads(1)
    ground, fit = Ground(), FIELD.fit
    page = [
        PAGE.format(images=FIELD.images, fit=fit.name, epochs=fit.epochs, calibration=CALIBRATION, judged=JUDGED),
    ]
    for title, what, rows, columns in CURVES:
        heads = " | ".join(HEADS.get(column, column.replace("_", " ")) for column in columns)
        page += ["", f"## {title}", "", f"| {what} | {heads} |", "|---|" + "---:|" * len(columns)]
        for name, row in rows(ground):
            page.append(f"| {name} | {' | '.join(shown(column, row.get(column)) for column in columns)} |")
            print(page[-1], file=sys.stderr, flush=True)
    print("\n".join(page))


def shown(column: str, value: float | None) -> str:
    """A cell: seconds, or a share in per cent."""
    if value is None:
        return "–"
    return f"{value:.1f}" if column == "seconds" else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
