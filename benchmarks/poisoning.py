"""Poisoning methods beside clean twins: accuracy, success and its floor, at several rates and seeds.

``python -m benchmarks.poisoning > docs/poisoning.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data. ``--sets``, ``--fit``, ``--images``, ``--epochs``, ``--seeds``, ``--grid`` and ``--methods`` say
how much; a row that benchmarks/records holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace

import torch

from benchmarks import RECORDS
from benchmarks.networks import folder
from benchmarks.prepare import mosaics
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import configured, method
from besiege.data import open_images
from besiege.embedded.recipes import recipe
from besiege.engine.poisoning import Ground, Twins, poison
from besiege.results.poisoning import Cell, PoisonRecord

PAGE = """# Poisoning

Each poisoned model is trained beside a clean twin: the same recipe, first weights, order of images and draws, on images
that differ in the poisoned rows alone (a digest of all other rows, taken of both sets, is in every record, and a
difference is an error). Success is the share of test images of other classes that, with the trigger, get the target
class (0); the twin's is the floor. Without a trigger see the method. In brackets are Wilson's intervals at 95 %, each
test image counted once; figures are means over seeds {seeds}. All images are of 8 bits.

{images} training images (drawn by seed 0) and {judged} test images of each set, {epochs} epochs of the recipe that is
named; {seconds:.0f} CPU seconds on one thread: `{command}`.

The sets are small, so a rate is few images: what is learned from 0.1 % of 50,000 images is not learned from two. Of
MNIST, Fashion-MNIST, GTSRB and CIFAR-10 (`--sets`) and of the recipes (`--fit`) this covers those in the table alone.
The images that hide the others (adap-blend, adap-patch) count as poisoned.

| data, recipe | method | poisoned | clean accuracy | of the twin | success | of the twin |
|---|---|---:|---:|---:|---:|---:|"""

GRID = (("badnets", {}), ("blended", {}))
RATES = (0.001, 0.005, 0.01, 0.05)
ONCE: tuple[tuple[str, dict[str, object]], ...] = (
    ("badnets", {"mode": "all-to-all", "rate": 0.1}),
    ("blended", {"mode": "accessory", "rate": 0.01}),
    ("label-flip", {"rate": 0.2}),
    ("label-flip", {"mode": "targeted", "source": 1, "rate": 0.05}),
    ("label-consistent", {"rate": 0.05}),
    ("label-consistent", {"rate": 0.05, "eps": 0.0}),
    ("adap-blend", {"rate": 0.03}),
    ("adap-patch", {"rate": 0.03}),
    ("badnets", {"rate": 0.005}),
    ("input-model-cooptimization", {"rate": 0.005}),
    ("input-model-cooptimization", {"rate": 0.005, "every": 1}),
    ("adversarial-embedding", {"rate": 0.05}),
)
RECIPES = {"mnist": "cnn", "fashion_mnist": "cnn", "gtsrb32": "cnn", "cifar10": "resnet9"}


def read(name: str, images: int, judged: int) -> tuple[Images, Images]:
    """So many training and test images of a set, drawn by seed 0."""
    if name.endswith("mnist"):
        at = folder() / name
        files = {part: next(at.glob(f"{start}*images*")) for part, start in (("train", "train"), ("test", "t10k"))}
        return open_images(f"idx:{files['train']}", limit=images), open_images(f"idx:{files['test']}", limit=judged)
    drawn = []
    for part, n in (("train", images), ("test", judged)):
        x, y = mosaics(name, part)
        every = Images.of(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, torch.from_numpy(y), name=f"{name} {part}")
        drawn.append(every.sample(n))
    return drawn[0], drawn[1]


def row(name: str, fit: Fit, record: PoisonRecord, part: Cell) -> str:
    """One line of the table."""
    told = ("mode", "source", "eps", "every")
    own = ", ".join(f"{key}={value}" for key, value in record.options.items() if key in told and value is not None)

    def figure(share: float, interval: tuple[float, float]) -> str:
        return f"{100 * share:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

    return (
        f"| {name}, {fit.name} | {record.attack}{f' ({own})' if own else ''} "
        f"| {part.poison_count:g} ({100 * part.poison_rate:.2g} %) "
        f"| {figure(part.clean_accuracy, part.clean_interval)} "
        f"| {figure(part.clean_accuracy_twin, part.clean_interval_twin)} "
        f"| {figure(part.attack_success, part.success_interval)} "
        f"| {figure(part.attack_success_twin, part.success_interval_twin)} |"
    )


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poisoning", description=__doc__)
    parser.add_argument("--sets", default="mnist", help="of mnist, fashion_mnist, gtsrb32, cifar10")
    parser.add_argument("-n", "--images", type=int, default=2000, help="training images of each set")
    parser.add_argument("--judged", type=int, default=1000, help="test images of each set")
    parser.add_argument("--fit", help="a recipe in place of the set's own")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid", action="store_true", help="the grid of rates alone")
    parser.add_argument("--methods", help="of those in the table, these alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, spent = [], 0.0
    keep = RECORDS / "poisoning"
    keep.mkdir(parents=True, exist_ok=True)
    for name in asked.sets.split(","):
        training, judged = read(name, asked.images, asked.judged)
        fit = replace(recipe(asked.fit or RECIPES[name]), epochs=asked.epochs)
        classes, twins = int(max(training.y.max(), judged.y.max())) + 1, Twins()
        ground = Ground(training, judged, fit, classes, seeds=asked.seeds, probes=0, twins=twins)
        for attack, options in (*GRID, *(() if asked.grid else ONCE)):
            if asked.methods is not None and attack not in asked.methods.split(","):
                continue
            own = [f"{key}-{value}" for key, value in options.items()]
            name_of = "-".join([name, fit.name, attack, *own, *map(str, (len(training), fit.epochs, asked.seeds))])
            kept = keep / f"{name_of}.json"
            if kept.is_file():
                found = json.loads(kept.read_text())
            else:
                rates, began = () if options else RATES, time.process_time()
                record, _ = poison(configured(method(attack), **options), replace(ground, rates=rates))
                found = {"rows": [row(name, fit, record, part) for part in record.cells]}
                found["seconds"] = time.process_time() - began
                kept.write_text(json.dumps(found) + "\n")
            rows += found["rows"]
            spent += found["seconds"]
            print("\n".join(found["rows"]), file=sys.stderr, flush=True)
    told = PAGE.format(
        seeds=f"0 to {asked.seeds - 1}",
        images=asked.images,
        judged=asked.judged,
        epochs=asked.epochs,
        seconds=spent,
        command=" ".join(["python -m benchmarks.poisoning", *sys.argv[1:]]),
    )
    print("\n".join([told, *rows]))


if __name__ == "__main__":
    main()
