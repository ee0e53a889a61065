"""Poisoning methods beside clean twins: accuracy, success and its floor, at several rates and seeds.

``python -m benchmarks.poisoning > docs/poisoning.md`` tells on stderr how far it is and prints the page of all records
in the end: each method on each set leaves one in benchmarks/records and is not measured again. Needs the shared data;
about four hours on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn
from torch.nn import functional as F

from benchmarks import RECORDS
from benchmarks.networks import folder
from benchmarks.prepare import mosaics
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Attack, configured, method
from besiege.core.poisoned import Knowledge
from besiege.core.rng import Rng
from besiege.data import open_images
from besiege.embedded.recipes import recipe
from besiege.engine.poisoning import Ground, Twins, poison
from besiege.results.poisoning import Cell, PoisonRecord

PAGE = """# Poisoning

Each poisoned model is trained beside a clean twin: the same recipe, first weights, order of images and draws, on images
that differ in the poisoned rows alone (a digest of all other rows, taken of both sets, is in every record, and a
difference is an error). Success is the share of test images of other classes that, with the trigger, get the target
class; the twin's is the floor. Without a trigger see the method. In brackets are Wilson's intervals at 95 %, each test
image counted once; figures are means over the seeds. The images that hide the others (adap-blend, adap-patch) count as
poisoned. *passes* are those of the network for each training image and epoch, forward, where the attacker controls the
training (counted on MNIST, for co-optimization): 1 is the recipe's own; a wait of 0 and every of 1 is the
straightforward alternation, whose trigger passes over all images but those of the target class. All images are of 8
bits. On one thread, trained in bfloat16 but for the faces: `python -m benchmarks.poisoning`.
Feature collision, the polytopes and support vector machines are in [toxic.md](toxic.md).

| data | training images | test images | trained | peak rate | target class |
|---|---:|---:|---|---:|---:|"""

TABLE = """
| data | method | poisoned | clean accuracy | of the twin | success | of the twin | seeds | CPU s | passes |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


@dataclass(frozen=True)
class Field:
    """A set: how many images, who learns from them, the class that is aimed at, and the seeds outside the grid.

    ``hard`` says how far label-consistent moves images; 0 leaves its trigger alone. ``alone`` is all that is tried on a
    set where not everything is, at all of its ``rates`` and with three seeds, as `GRID` is elsewhere.
    The recipes move images less than elsewhere, so that a trigger in a corner stays in the picture. A rate of 0.2, with
    which resnet9 learned from GTSRB, is too high for CIFAR-10 where a twentieth of the images bears the checkered
    patch: 47 % of the test images right, in place of 72.
    """

    images: int
    fit: Fit
    target_class: int = 0
    seeds: int = 3
    judged: int = 2000
    hard: tuple[float, ...] = (16 / 255, 0.0)
    rates: tuple[float, ...] = (0.001, 0.005, 0.01, 0.05)
    alone: tuple[Attack, ...] = ()


def _with(name: str, **options: object) -> Attack:
    return configured(method(name), **options)


GRID = (_with("badnets"), _with("blended"))
ONCE = (
    _with("badnets", mode="all-to-all", rate=0.1),
    _with("blended", mode="accessory", rate=0.01),
    _with("label-flip", rate=0.2),
    _with("label-flip", mode="targeted", source=1, rate=0.05),
    _with("adap-blend", rate=0.03),
    _with("adap-patch", rate=0.03),
    _with("input-model-cooptimization", rate=0.001),
    _with("input-model-cooptimization", rate=0.005),
    _with("input-model-cooptimization", rate=0.005, every=1),
    _with("input-model-cooptimization", rate=0.005, every=1, wait=0.0),
    _with("adversarial-embedding", rate=0.05),
)


FIELDS = {
    "mnist": Field(20_000, replace(recipe("cnn"), epochs=6, bfloat16=True), hard=(0.3, 0.2, 0.0)),
    "gtsrb32": Field(7842, replace(recipe("resnet9"), epochs=6, flip=False, shift=0, lr=0.2, bfloat16=True), 2, 1),
    "cifar10": Field(10_000, replace(recipe("resnet9"), epochs=8, shift=1, bfloat16=True), 0, 1),
    "orl_faces": Field(
        280,
        replace(recipe("cnn"), epochs=40, lr=0.02),
        seeds=3,
        judged=120,
        rates=(0.01, 0.02, 0.05),
        alone=(_with("blended", mode="accessory"), _with("blended", mode="accessory", alpha=0.3, test_alpha=1.0)),
    ),
}


class Kept(BaseModel):
    """What stays of a method on a set, the CPU seconds that it took, and the passes of a training that it controls.

    ``passes`` are forward passes of the network for each training image and epoch, 1 for the recipe alone.
    """

    record: PoisonRecord
    seconds: float
    passes: float | None = None


def attacks(field: Field) -> Iterator[Attack]:
    """All that is tried on a set."""
    if field.alone:
        yield from field.alone
        return
    yield from GRID
    yield from ONCE
    for eps in field.hard:
        yield _with("label-consistent", rate=0.05, eps=eps)


def read(name: str, images: int, judged: int) -> tuple[Images, Images]:
    """So many training and test images of a set, drawn by seed 0."""
    if name.endswith("mnist"):
        at = folder() / name
        files = {part: next(at.glob(f"{start}*images*")) for part, start in (("train", "train"), ("test", "t10k"))}
        return open_images(f"idx:{files['train']}", limit=images), open_images(f"idx:{files['test']}", limit=judged)
    if name == "orl_faces":
        return faces(images, judged)
    drawn = []
    for part, n in (("train", images), ("test", judged)):
        x, y = mosaics(name, part)
        every = Images.of(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, torch.from_numpy(y), name=f"{name} {part}")
        drawn.append(every.sample(n))
    return drawn[0], drawn[1]


def faces(images: int, judged: int) -> tuple[Images, Images]:
    """Seven of the ten pictures of each person, and the other three, at half their size."""
    file = np.load(folder() / "orl_faces" / "orl_faces.npz")
    x = F.avg_pool2d(torch.from_numpy(file["x"])[:, None].float(), 2).round() / 255
    y = torch.from_numpy(file["y"].astype(np.int64))
    y = y - y.min()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    place = torch.stack([(y[order[:k]] == y[row]).sum() for k, row in enumerate(order.tolist())])
    train, test = order[place < 7][:images], order[place >= 7][:judged]
    return Images.of(x[train], y[train], name="orl_faces train"), Images.of(x[test], y[test], name="orl_faces test")


def measure(name: str, chosen: Iterable[Attack]) -> None:
    """Measure what there is no record of."""
    field = FIELDS[name]
    training, judged = read(name, field.images, field.judged)
    classes, twins = int(max(training.y.max(), judged.y.max())) + 1, Twins()
    ground = Ground(training, judged, field.fit, classes, field.target_class, probes=0, twins=twins)
    for attack in chosen:
        path = _path(name, attack)
        if path.is_file():
            continue
        whole = attack in (field.alone or GRID)
        began = time.process_time()
        record, _ = poison(
            attack, replace(ground, rates=field.rates if whole else (), seeds=3 if whole else field.seeds)
        )
        kept = Kept(record=record, seconds=time.process_time() - began, passes=passes(attack, ground))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kept.model_dump_json() + "\n")
        print("\n".join(rows(name, kept)), file=sys.stderr, flush=True)


def passes(attack: Attack, ground: Ground) -> float | None:
    """Forward passes of the network for each training image and epoch, where the attacker controls the training."""
    if attack.card.changes != "training":
        return None
    seen = [0]

    def counted(shape: tuple[int, int, int], classes: int) -> nn.Module:
        module = ground.fit.build(shape, classes)
        module.register_forward_hook(lambda own, given, answer: seen.__setitem__(0, seen[0] + len(answer)))
        return module

    fit, training = replace(ground.fit, build=counted), ground.training
    knows = Knowledge(ground.classes, ground.target_class, fit=fit, seed=0)
    attack.bound()(training, knows, Rng.of(0, training.index, attack.name))
    return seen[0] / (len(training) * fit.epochs)


def rows(name: str, kept: Kept) -> Iterator[str]:
    """A line for each rate."""
    told = ("mode", "source", "eps", "every", "wait", "alpha", "test_alpha")
    record = kept.record
    said = {key: value for key, value in record.options.items() if key in told and value is not None}
    own = ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in said.items()
    )
    method = f"{record.attack}{f' ({own})' if own else ''}"
    for k, part in enumerate(record.cells):
        spent = f"{kept.seconds:.0f}" if not k else ""
        asked = "" if kept.passes is None else f"{kept.passes:.2f}"
        yield f"| {name} | {method} | {' | '.join(_figures(part))} | {len(record.seeds)} | {spent} | {asked} |"


def _figures(part: Cell) -> Iterator[str]:
    yield f"{part.poison_count:g} ({100 * part.poison_rate:.2g} %)"
    for share, (low, high) in (
        (part.clean_accuracy, part.clean_interval),
        (part.clean_accuracy_twin, part.clean_interval_twin),
        (part.attack_success, part.success_interval),
        (part.attack_success_twin, part.success_interval_twin),
    ):
        yield f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _path(name: str, attack: Attack) -> Path:
    said = "-".join([attack.name, *(f"{key}={value}" for key, value in sorted(attack.arguments.items()))])
    return RECORDS / "poisoning" / name / f"{said}.json"


def page() -> Iterator[str]:
    """The page of all that is kept."""
    yield PAGE
    for name, field in FIELDS.items():
        fit = field.fit
        yield (
            f"| {name} | {field.images:,} | {field.judged:,} | {fit.name}, {fit.epochs} epochs | {fit.lr} "
            f"| {field.target_class} |"
        )
    yield TABLE
    for name, field in FIELDS.items():
        for attack in attacks(field):
            path = _path(name, attack)
            if path.is_file():
                yield from rows(name, Kept.model_validate_json(path.read_text()))


def main() -> None:
    """Measure what is missing, and print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poisoning", description=__doc__)
    parser.add_argument("--sets", default=",".join(FIELDS), help=f"of {', '.join(FIELDS)}")
    parser.add_argument("--grid", action="store_true", help="the grid of rates alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.sets.split(","):
        measure(name, (FIELDS[name].alone or GRID) if given.grid else attacks(FIELDS[name]))
    print("\n".join(page()))


if __name__ == "__main__":
    main()
