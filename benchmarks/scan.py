"""The review's Table 6, rebuilt: what finds poison, in which data, planted by whom.

``python -m benchmarks.scan > docs/table6.md`` trains on poison, searches, removes, trains again and prints the page;
stderr tells how far it is. Each cell stays in benchmarks/records, so that an interrupted run goes on, and the page is
made of all that are there. ``--timing`` measures what a search of 50,000 images takes once the features are known.
Needs the shared data; about three hours on one core.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import RECORDS
from benchmarks.poisoning import read
from benchmarks.prepare import tiny
from besiege.core.features import all_features
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Attack, configured, method
from besiege.core.poisoned import eight_bits
from besiege.core.rng import Rng
from besiege.core.suspicion import Probe, Suspicion
from besiege.core.target import Target
from besiege.embedded.recipes import recipe
from besiege.engine import roc
from besiege.engine.poisoning import Ground, Sample, Twins, poison
from besiege.engine.scan import attack_success, suspicion

PAGE = """# The review's Table 6, rebuilt

Each data set is poisoned, a network learns from it, and each detector says what is suspect; a clean twin (the same
images before the poison, a network trained alike) says how often it cries wolf. Poison is a tenth of the target class
(a fifth on GTSRB and Tiny ImageNet, half of its images for label-consistent, which changes no label; adap-blend, which
gets nowhere with so little, has 3 % of all images, but on Tiny ImageNet, and as many that hide them). The data
detectors search the training images, and with what they suspect removed a network is trained again. STRIP and SentiNet
stand before the network: they are calibrated on clean test images and judged on {judged} others, with the trigger and
without, in bfloat16 like the training. Activation patterns name training images, prune neurons by the entropy of their
inputs (deviations=2) and train on for two epochs with what they do not name; that network is the one after removal. TPR
is at the detector's own threshold, which never sees the truth, with the false positives beside it; then by the score
alone at 1 % and 5 %. The discriminator is no detector: a small network that was told which images of one half of the
target class are poisoned, by their features, tells those of the other half, so that what it cannot tell no search of
features finds. Means over the seeds; ASR is the attack's success before, and after removal. The review's figures stand
with the cells that it names: a detection rate, without its false positives.

SVHN and Tiny ImageNet at 64 pixels are not to be had here; Tiny ImageNet is at 32, its first 30 classes of 100 training
images each, with a patch of 4 pixels in place of 3. In one process a set, on one thread, trained in bfloat16:
`{command}`.

| data | attack | ASR | detector | TPR | FPR | FPR, twin | AUC | F1 | at 1 % | at 5 % | accuracy, then after \
| ASR after | seeds | review |
|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|"""

TIMING = """
## What a search takes

Once the features of the images are known: `{command} --timing`. GiB is the most that the process has taken by then.

| detector | images | features | seconds | GiB |
|---|---:|---:|---:|---:|"""

REVIEW = {
    ("spectral-signatures", "cifar10"): "> 90 %",
    ("activation-patterns", "gtsrb32"): "~ 85 %",
    ("activation-patterns", "tinyimagenet32"): "~ 85 %",
    ("activation-clustering, dbscan", "gtsrb32"): "82–87 %",
    ("sentinet", ""): "~ 88 %",
    ("strip", "mnist"): "> 90 %",
    ("strip", "cifar10"): "> 90 %",
}


@dataclass(frozen=True)
class Field:
    """A set: how many training images, who learns from them, which class the attacker wants, and its share of poison.

    ``adaptive`` is the share of all images that adap-blend poisons, which gets nowhere with a tenth of a class; 0:
    as the others. ``side`` is that of a patch, in pixels: one of 3 gets nowhere with 25 images of Tiny ImageNet.
    The recipes move images less than elsewhere, so that a trigger in a corner stays in the picture.
    """

    images: int
    fit: Fit
    target_class: int = 0
    share: float = 0.1
    adaptive: float = 0.03
    side: int = 3


FIELDS = {
    "mnist": Field(8000, replace(recipe("cnn"), epochs=6, bfloat16=True)),
    "gtsrb32": Field(7842, replace(recipe("resnet9"), epochs=6, flip=False, shift=0, bfloat16=True), 2, 0.2),
    "cifar10": Field(10_000, replace(recipe("resnet9"), epochs=8, shift=1, bfloat16=True)),
    "tinyimagenet32": Field(3000, replace(recipe("resnet9"), epochs=20, shift=1, bfloat16=True), 0, 0.2, 0.0, 4),
}
ATTACKS: dict[str, dict[str, Any]] = {
    "badnets": {},
    "blended": {},
    "label-consistent": {},
    "adversarial-embedding": {},
    "adap-blend": {},
}
DETECTORS: dict[str, Attack] = {
    "spectral-signatures": configured(method("spectral-signatures")),
    "activation-clustering": configured(method("activation-clustering")),
    "activation-clustering, dbscan": configured(method("activation-clustering"), method="dbscan"),
    "activation-patterns": configured(method("activation-patterns"), deviations=2.0, epochs=2),
    "strip": configured(method("strip")),
    "sentinet": configured(method("sentinet"), rate=0.07),
}
BEFORE = ("strip", "sentinet")
"""What stands before a network."""
TOLD = "discriminator"
"""What a network finds that knows the truth of other images."""
CALIBRATION, JUDGED = 1000, 400


def opened(name: str, field: Field) -> tuple[Images, Images]:
    """Training images, and test images to calibrate and judge by, in no order: the first digits of MNIST are neater."""
    if name != "tinyimagenet32":
        train, test = read(name, field.images, CALIBRATION + JUDGED + 600)
    else:
        train, test = (
            Images.of(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y), name=f"tiny {part}")
            for part, (x, y) in ((part, tiny(part, field.images // 100)) for part in ("train100", "val"))
        )
        test = test.sample(CALIBRATION + JUDGED + 600)
    return train, test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]


def planted(name: str, field: Field, attack: str, training: Images, test: Images, seed: int, twins: Twins) -> Sample:
    """A poisoned set, the network that learned from it, and its clean twin."""
    own = int((training.y == field.target_class).sum())
    card, options = method(attack).card, dict(ATTACKS[attack])
    count = own / 2 if attack == "label-consistent" else own * field.share / (1 - field.share)
    if "side" in card.options:
        options["side"] = field.side
    if attack == "adap-blend" and field.adaptive:
        options["rate"] = field.adaptive
    elif "rate" in card.options:
        options.setdefault("rate", count / len(training))
    classes = int(max(training.y.max(), test.y.max())) + 1
    ground = Ground(training, test, field.fit, classes, field.target_class, seed=seed, probes=0, twins=twins)
    return poison(configured(method(attack), **options), ground)[1]


def cell(detector: str, sample: Sample, field: Field, test: Images, seed: int) -> dict[str, Any]:
    """What one detector makes of one poisoned set."""
    fit = field.fit
    clean, judged = test[:CALIBRATION], test[CALIBRATION:]
    classes = sample.target.classes
    asr = attack_success(sample.target, sample.poisoned, judged, classes)
    row: dict[str, Any] = {"asr": asr, "accuracy": accuracy(sample.target, judged)}
    began = time.monotonic()
    if detector == TOLD:
        return row | discriminated(sample, field.target_class, seed) | {"seconds": time.monotonic() - began}
    chosen = DETECTORS[detector]
    if detector in BEFORE:
        return row | before(chosen, sample, clean, judged[:JUDGED], seed) | {"seconds": time.monotonic() - began}
    probes = [Probe(target, fit, seed) for target in (sample.target, sample.twin)]
    said = suspicion(chosen, probes[0], sample.poisoned.images, clean, seed)
    row["seconds"] = time.monotonic() - began
    row |= told(said, sample.poisoned.truth)
    row["fpr_twin"] = float(suspicion(chosen, probes[1], sample.clean, clean, seed).suspect.float().mean())
    if chosen.card.kind == "data":
        after = fit(sample.poisoned.images[~said.suspect], seed, classes=classes)
    else:
        after = chosen.bound()(sample.target, sample.poisoned.images, Rng.of(seed, clean.index, detector))
    row |= {"accuracy_after": accuracy(after, judged)}
    return row | {"asr_after": attack_success(after, sample.poisoned, judged, classes)}


def discriminated(sample: Sample, label: int, seed: int) -> dict[str, Any]:
    """How far a fresh discriminator tells the poison of class ``label``: it learns from one half, and judges the other.

    Of one hidden layer of 32, on features of mean 0 and deviation 1, either kind weighing alike.
    """
    made = sample.poisoned
    rows = (made.images.y == label).nonzero().squeeze(1)
    seen, truth = all_features(sample.target, made.images.x[rows]), made.truth[rows].float()
    seen = (seen - seen.mean(0)) / seen.std(0).clamp_min(1e-6)
    draw = torch.Generator().manual_seed(seed)
    half, score = torch.rand(len(rows), generator=draw).argsort() % 2 == 0, torch.zeros(len(rows))
    for learn in (half, ~half):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = nn.Sequential(nn.Linear(seen.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
        weight = (1 - truth[learn]).sum() / truth[learn].sum()
        adam = torch.optim.Adam(fresh.parameters(), 1e-2, weight_decay=1e-3)
        for _ in range(100):
            adam.zero_grad()
            said = fresh(seen[learn]).squeeze(1)
            F.binary_cross_entropy_with_logits(said, truth[learn], pos_weight=weight).backward()
            adam.step()
        with torch.no_grad():
            score[~learn] = fresh(seen[~learn]).squeeze(1)
    return told(Suspicion(score, score > 0), made.truth[rows])


def before(chosen: Attack, sample: Sample, clean: Images, judged: Images, seed: int) -> dict[str, Any]:
    """A detector before the network, on images with the trigger that do what the attacker wants, and without it."""
    made = sample.poisoned
    assert made.trigger is not None
    wanted = made.wanted(judged.y, sample.target.classes)
    stamped = eight_bits(made.trigger(judged.x))
    works = (sample.target.labels(stamped) == wanted) & (judged.y != wanted)
    excess = {}
    for name, target in (("victim", sample.target), ("twin", sample.twin)):
        fast = replace(target.tuned("bfloat16"), batch=64)
        guarded = chosen.bound()(fast, clean, Rng.of(seed, clean.index, chosen.name))
        excess[name] = asked(guarded, judged.x)
        if name == "victim" and bool(works.any()):
            excess["stamped"] = asked(guarded, stamped[works])
    row = {"fpr": float((excess["victim"] > 0).float().mean()), "fpr_twin": float((excess["twin"] > 0).float().mean())}
    if "stamped" not in excess:
        return row
    false, true = roc.curve(excess["stamped"], excess["victim"])
    return row | {
        "tpr": float((excess["stamped"] > 0).float().mean()),
        "auc": roc.auc(excess["stamped"], excess["victim"])[0],
        "at": [roc.at(false, true, rate) for rate in (0.01, 0.05)],
        "asr_after": float(row_share(works, judged.y != wanted, excess["stamped"])),
    }


def row_share(works: Tensor, meant: Tensor, excess: Tensor) -> float:
    """The share of the images meant that still do as the attacker wants and are not rejected."""
    return float(works.sum() - (excess > 0).sum()) / max(1, int(meant.sum()))


def asked(guarded: Target, x: Tensor) -> Tensor:
    """The excess (n,) of each image."""
    with torch.no_grad(), guarded.ready():
        found = [guarded.answer(part).excess for part in torch.split(x, 64)]
    return torch.cat([part for part in found if part is not None])


def told(said: Suspicion, truth: Tensor) -> dict[str, Any]:
    """A search against the truth."""
    caught, count = int((said.suspect & truth).sum()), int(truth.sum())
    wrong = int((said.suspect & ~truth).sum())
    false, true = roc.curve(said.score[truth], said.score[~truth])
    return {
        "poisoned": count,
        "tpr": caught / count,
        "fpr": wrong / int((~truth).sum()),
        "f1": 2 * caught / (count + caught + wrong),
        "auc": roc.auc(said.score[truth], said.score[~truth])[0],
        "at": [roc.at(false, true, rate) for rate in (0.01, 0.05)],
    }


def accuracy(target: Target, images: Images) -> float:
    """The share that it gets right."""
    return float((target.labels(images.x) == images.y).float().mean())


def measure(names: Sequence[str], attacks: Sequence[str], detectors: Sequence[str], seeds: int, keep: Path) -> None:
    """Measure the cells that ``keep`` lacks."""
    for name in names:
        field = FIELDS[name]
        training, test = opened(name, field)
        for seed in range(seeds):
            twins = Twins()
            for attack in attacks:
                paths = {detector: keep / f"{name}-{attack}-{detector}-{seed}.json" for detector in detectors}
                if all(path.is_file() for path in paths.values()):
                    continue
                sample = planted(name, field, attack, training, test, seed, twins)
                for detector, path in paths.items():
                    if not path.is_file():
                        found = cell(detector, sample, field, test, seed)
                        path.write_text(json.dumps(found) + "\n")
                        print(f"{path.stem}: {found}", file=sys.stderr, flush=True)


def lines(keep: Path) -> Iterator[str]:
    """A line for each set, attack and detector that there is."""
    for name in FIELDS:
        for attack in ATTACKS:
            for detector in (*DETECTORS, TOLD):
                seeds = [json.loads(path.read_text()) for path in keep.glob(f"{name}-{attack}-{detector}-?.json")]
                if seeds:
                    yield line(name, attack, detector, seeds)


def missing(keep: Path) -> str:
    """What there is no figure of yet."""
    whole = len(DETECTORS) + 1
    found = {(name, attack): len(list(keep.glob(f"{name}-{attack}-*-0.json"))) for name in FIELDS for attack in ATTACKS}
    gaps = [
        f"{name} with {attack}{'' if not n else f' ({whole - n} of {whole})'}"
        for (name, attack), n in found.items()
        if n < whole
    ]
    return f"\nNot measured yet: {'; '.join(gaps)}." if gaps else ""


def line(name: str, attack: str, detector: str, seeds: list[dict[str, Any]]) -> str:
    """The means over the seeds."""

    def mean(key: str, of: int | None = None) -> str:
        values = [seed[key] if of is None else seed[key][of] for seed in seeds if seed.get(key) is not None]
        return f"{100 * sum(values) / len(values):.1f}" if values else "–"

    review = REVIEW.get((detector, name), REVIEW.get((detector, ""), ""))
    return (
        f"| {name} | {attack} | {mean('asr')} | {detector} | {mean('tpr')} | {mean('fpr')} | {mean('fpr_twin')} "
        f"| {mean('auc')} | {mean('f1')} | {mean('at', 0)} | {mean('at', 1)} "
        f"| {mean('accuracy')} → {mean('accuracy_after')} | {mean('asr_after')} | {len(seeds)} | {review} |"
    )


class Known(nn.Module):
    """A network whose images are their own features."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.flat, self.last = nn.Flatten(), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        answer: Tensor = self.last(self.flat(x))
        return answer


def timing(n: int = 50_000, width: int = 512, classes: int = 10) -> Iterator[str]:
    """Seconds and memory of the data detectors on features that are known."""
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 1, width, generator=draws)
    images = Images.of(x, torch.randint(0, classes, (n,), generator=draws))
    target = Target.of(Known(width, classes), classes=classes, shape=(1, 1, width), name="known", batch=4096)
    for name in list(DETECTORS)[:3]:
        began = time.monotonic()
        suspicion(DETECTORS[name], Probe(target, recipe("softmax")), images, images[:100], 0)
        spent, most = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield f"| {name} | {n:,} | {width} | {spent:.0f} | {most:.1f} |"


def main() -> None:
    """Print the page, or the timing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scan", description=__doc__)
    parser.add_argument("--sets", default=",".join(FIELDS))
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--detectors", action="append", choices=(*DETECTORS, TOLD))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--timing", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep = RECORDS / "scan"
    keep.mkdir(parents=True, exist_ok=True)
    if given.timing:
        (keep / "timing.md").write_text("\n".join(timing()) + "\n")
    else:
        measure(
            given.sets.split(","), given.attacks.split(","), given.detectors or [*DETECTORS, TOLD], given.seeds, keep
        )
    command = "python -m benchmarks.scan"
    print("\n".join([PAGE.format(judged=JUDGED, command=command), *lines(keep)]))
    if gaps := missing(keep):
        print(gaps)
    if (keep / "timing.md").is_file():
        print(TIMING.format(command=command), (keep / "timing.md").read_text().strip(), sep="\n")


if __name__ == "__main__":
    main()
