"""The measured map of the evasion defenses: every attack before, after, and by one who knows the defense.

``python -m benchmarks.defenses mnist cifar10 --keep FOLDER`` trains the networks, defends them and attacks the same
images three times. FOLDER holds the checkpoints from which an interrupted run goes on; what a defense was worth stays
in benchmarks/records, and is not measured again. ``--write`` makes docs/defenses.md of all of it, and the map that
`besiege audit` advises by. Needs the shared data; about an
hour and a half each on one core.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from benchmarks import RECORDS
from benchmarks.networks import mnist
from benchmarks.prepare import mosaics
from besiege.audit import recommend
from besiege.audit.recommend import Tried
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Attack, configured, make, method
from besiege.core.target import Target
from besiege.core.threat import INF, Norm, ThreatModel
from besiege.embedded.recipes import recipe
from besiege.engine.defense import Hardened, measured, trained, wrapped
from besiege.regions import within
from besiege.results.defense import Defense, Row

PAGE = """# Evasion defenses, measured

Test images are attacked three times: on the undefended network, by someone who does not know the defense, and by
someone who does, through the defense (a network that was only trained otherwise: by AutoAttack). A detector's
rejection counts as a stop; clean images that it rejects count as lost. Intervals are Wilson's at 95 %. **Fallen**: at
no more than twice the distance nine tenths as many images fall as before, or no difference shows; weakened: more fall
than to the unknowing; else not refuted, which does not mean that it held. Attacks without a radius are judged at any
distance. In one process on one thread: `{command}`.
Trapdoors and the UAP rectifier against what they are there for are in [shields.md](shields.md)."""

SECTION = """
## {title}

{n} test images. {network}; the input
defenses are calibrated on {calibration:,} test images that are not attacked and stand before the undefended network.

| defense | clean, before → after | FPR | answers take | attack | before | unknowing | knowing | 95 % \
| rejected, then by knowing | AUC, then by knowing | L2, knowing over before | verdict |
|---|---|---:|---:|---|---:|---:|---:|---|---|---|---:|---|"""

DOCS = Path(__file__).parents[1] / "docs" / "defenses.md"
KEPT = RECORDS / "defenses"
MAP = Path(recommend.__file__).with_name("map.json")

Sent = list[tuple[Attack, ThreatModel]]


@dataclass(frozen=True)
class Field:
    """The images, the recipe, what is defended and what is sent.

    ``defenses`` says what differs from the defaults, ``recipes`` how the recipe does for some defenses' two networks.
    """

    title: str
    network: str
    fit: Fit
    images: Callable[[], tuple[Images, Images]]
    calibration: int
    defenses: dict[str, dict[str, Any]]
    attacks: Callable[[], Sent]
    weights: str | None = None
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)


def on_mnist() -> tuple[Images, Images]:
    """All training images, and the test images."""
    return mnist(60_000, "train"), mnist(10_000)


def on_cifar10() -> tuple[Images, Images]:
    """The 20,000 training images that the data holds, and the test images."""
    train, test = (
        Images.of(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y), name="cifar10")
        for x, y in (mosaics("cifar10", part) for part in ("train", "test"))
    )
    return train, test


def mnist_attacks() -> Sent:
    """In each norm, by gradients and by queries, at 0.3 in L∞ as the papers."""
    return [
        _at("fgsm", INF, 0.3),
        _at("pgd", INF, 0.3, steps=40, restarts=5),
        _at("square", INF, 0.3, iterations=1000),
        _at("deepfool", 2.0),
        _at("cw-l2", 2.0),
        _at("ead", 1.0),
        _at("jsma", 0.0),
    ]


def every_attack() -> Sent:
    """All that takes grey images and needs no certificate; those that ask have 1,000 questions an image."""
    return [
        *(_at(name, INF, 0.3) for name in ("fgsm", "bim", "pgd", "apgd", "houdini", "uap", "targeted-uap")),
        *(_at(name, 2.0) for name in ("deepfool", "lbfgs", "cw-l2", "newtonfool", "ddn", "fmn", "brendel-bethge")),
        _at("ead", 1.0),
        _at("cw-linf", INF),
        *(_at(name, 0.0) for name in ("jsma", "cw-l0")),
        _at("wasserstein", "wasserstein", 1.0),
        _at("square", INF, 0.3, queries=1000, iterations=1000),
        *(_at(name, INF, 0.3, queries=1000) for name in ("threshold", "upset", "angri", "substitute")),
        *(_at(name, 2.0, queries=1000) for name in ("boundary", "hopskipjump", "zoo")),
        _at("simba", 2.0, 4.0, queries=1000, iterations=1000),
        _at("one-pixel", 0.0, 1, queries=1000),
        _at("few-pixel", 0.0, 10, queries=1000),
        _at("spatial", "spatial", 1, queries=1000),
    ]


def cifar10_attacks() -> Sent:
    """The eight core attacks, at 8/255 in L∞."""
    return [
        _at("fgsm", INF, 8 / 255),
        _at("pgd", INF, 8 / 255, steps=20),
        _at("apgd", INF, 8 / 255),
        _at("square", INF, 8 / 255, iterations=1000),
        _at("deepfool", 2.0),
        _at("ddn", 2.0),
        _at("cw-l2", 2.0),
        _at("ead", 1.0),
    ]


def _at(
    name: str, norm: Norm, eps: float = INF, *, queries: int | None = None, **options: Any
) -> tuple[Attack, ThreatModel]:
    """An attack and where it may look."""
    attack = make(name, **options)
    return attack, ThreatModel(attack.card.access, within(norm, eps), queries)


FIELDS = {
    "mnist": Field(
        "MNIST",
        "TRADES' SmallCNN, three epochs on the 60,000 training images (for adversarial training eight, before its "
        "radius grew at the start)",
        replace(recipe("small-cnn"), epochs=3),
        on_mnist,
        5000,
        {
            "adversarial-training": {"mode": "pgd", "steps": 3, "eps": 0.3},
            "defensive-distillation": {},
            "feature-squeezing": {},
            "magnet": {"epochs": 30},
            "trapdoor": {},
            "uap-rectifier": {},
        },
        mnist_attacks,
        recipes={"adversarial-training": {"epochs": 8, "bfloat16": True}},
    ),
    "mnist-every": Field(
        "MNIST, every attack",
        "The recipe cnn, six epochs on the 60,000 training images (for adversarial training and TRADES twelve)",
        replace(recipe("cnn"), epochs=6),
        on_mnist,
        5000,
        {
            "adversarial-training": {"mode": "pgd", "steps": 5, "eps": 0.3},
            "trades": {"steps": 5, "eps": 0.3},
            "defensive-distillation": {},
            "feature-squeezing": {},
            "magnet": {"epochs": 30},
            "trapdoor": {},
            "uap-rectifier": {},
        },
        every_attack,
        recipes={"adversarial-training": {"epochs": 12}, "trades": {"epochs": 12}},
    ),
    "cifar10": Field(
        "CIFAR-10",
        "A ResNet-9 of width 24, twelve epochs on 20,000 training images (adversarial training before its radius grew "
        "at the start)",
        replace(recipe("resnet9-24"), epochs=12),
        on_cifar10,
        2000,
        {
            "adversarial-training": {"mode": "fast", "eps": 8 / 255},
            "feature-squeezing": {},
            "magnet": {"epochs": 60},
            "defensive-distillation": {},
            "trapdoor": {},
            "uap-rectifier": {},
        },
        cifar10_attacks,
        "cifar10_fast_at.safetensors",
        recipes={"adversarial-training": {"bfloat16": True}},
    ),
}


def hardened(
    name: str, held: Field, plain: Target | None, training: Images, clean: Images, keep: Path
) -> tuple[Attack, Hardened]:
    """A defended network beside the undefended one."""
    found = method(name)
    defense = configured(found, **held.defenses[name])

    def tell(text: str) -> Callable[[int], None]:
        done = [0]

        def step(rows: int) -> None:
            done[0] += rows
            if done[0] // 5000 != (done[0] - rows) // 5000:
                print(f"{text}: {done[0]:,} images learned from", file=sys.stderr, flush=True)

        return step

    if found.card.kind == "training":
        folder, shared = keep / name, name not in held.recipes
        fit = held.fit if shared else replace(held.fit, **held.recipes[name])
        if shared and (keep / "undefended.ckpt").is_file():
            folder.mkdir(exist_ok=True)
            shutil.copy(keep / "undefended.ckpt", folder)
        both = trained(defense, fit, training, 0, classes=10, folder=folder, progress=tell(name))
        if shared:
            shutil.copy(folder / "undefended.ckpt", keep)
        return defense, both
    target = plain or held.fit(training, 0, classes=10, checkpoint=keep / "undefended.ckpt")
    return defense, wrapped(defense, target, clean, 0)


def lines(record: Defense, chosen: dict[str, Any]) -> Iterator[str]:
    """A line for each attack."""
    said = ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in chosen.items()
    )
    options = f" ({said})" if chosen else ""
    for k, row in enumerate(record.rows):
        clean = f"{record.clean_accuracy:.1%} → {record.clean_accuracy_defended:.1%} | {_share(record.fpr)}"
        lead = f"| {record.defense}{options} | {clean} | {record.latency_ratio:.1f} times |" if not k else "| | | | |"
        ratio = "–" if row.l2_ratio is None or row.adaptive.threat.norm != "l2" else f"{row.l2_ratio:.2f}"
        low, high = row.adaptive.success_interval
        yield (
            f"{lead} {row.undefended.attack} {row.undefended.threat} | {_share(row.undefended.success_rate)} "
            f"| {_share(row.defended.success_rate)} | {_share(row.adaptive.success_rate)} | {low:.0%}–{high:.0%} "
            f"| {_pair(row, 'tpr')} | {_pair(row, 'auc')} | {ratio} | {row.verdict} |"
        )
    for worst in record.worst:
        low, high = worst.interval
        yield (
            f"| | | | | **all of** {worst.threat} | {worst.before:.0%} | {worst.unknowing:.0%} | {worst.knowing:.0%} "
            f"| {low:.0%}–{high:.0%} | – | – | – | {worst.verdict} |"
        )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _pair(row: Row, key: str) -> str:
    both = [getattr(part, key, None) for part in (row.detected, row.detected_adaptive)]
    return " → ".join("–" if value is None else f"{value:.2f}" for value in both) if any(both) else "–"


def measure(field: str, images: int, only: Sequence[str], keep: Path) -> None:
    """Measure the defenses of a field that there is no record of; ``keep`` is for checkpoints."""
    held = FIELDS[field]
    training, test = held.images()
    clean, judged = test[: held.calibration], test[held.calibration : held.calibration + images]
    plain = None
    for name in only or held.defenses:
        path = KEPT / field / f"{name}.json"
        if path.is_file() or name not in held.defenses:
            continue
        defense, made = hardened(name, held, plain, training, clean, keep)
        plain = plain if name in held.recipes else made.undefended
        print(f"{name}: made in {made.seconds:.0f} s", file=sys.stderr, flush=True)
        record = measured(
            defense,
            made,
            judged,
            held.attacks(),
            make("autoattack"),
            calibration=training if method(name).card.kind == "training" else clean,
            starts=clean.x[:100],
            progress=lambda what: print(what, file=sys.stderr, flush=True),
        )
        path.write_text(record.model_dump_json() + "\n")
        if name == "adversarial-training" and held.weights and made.defended.module is not None:
            save_file(made.defended.module.state_dict(), keep / held.weights)
        print("\n".join(lines(record, held.defenses[name])), file=sys.stderr, flush=True)


def records() -> Iterator[tuple[Field, list[Defense]]]:
    """What is kept, field by field."""
    for name, held in FIELDS.items():
        paths = [KEPT / name / f"{defense}.json" for defense in held.defenses]
        found = [Defense.model_validate_json(path.read_text()) for path in paths if path.is_file()]
        if found:
            yield held, found


def page(command: str) -> str:
    """The page of all that is kept."""
    text = [PAGE.format(command=command)]
    for held, found in records():
        text.append(
            SECTION.format(
                title=held.title, n=found[0].judged, network=held.network, calibration=held.calibration
            ).rstrip("\n")
        )
        text += [line for record in found for line in lines(record, held.defenses[record.defense])]
    return "\n".join(text) + "\n"


def tried() -> list[Tried]:
    """What an audit's advice is drawn from: all attacks of a radius together."""
    return [
        Tried(
            data=held.title,
            defense=record.defense,
            attack="the worst of the attacks",
            norm=worst.threat.partition(":")[0],
            **worst.model_dump(),
        )
        for held, found in records()
        for record in found
        for worst in record.worst
    ]


def main() -> None:
    """Measure, and with --write make the page and the map."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defenses", description=__doc__)
    parser.add_argument("fields", nargs="*", metavar="FIELD", help=f"of {', '.join(FIELDS)}")
    parser.add_argument("-n", "--images", type=int, default=100)
    parser.add_argument("--only", action="append", help="this defense alone; repeatable")
    parser.add_argument("--keep", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--write", action="store_true", help="make docs/defenses.md and the map of all records")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.fields:
        for folder in (given.keep, KEPT):
            (folder / name).mkdir(parents=True, exist_ok=True)
        measure(name, given.images, given.only or (), given.keep / name)
    if given.write:
        DOCS.write_text(page("python -m benchmarks.defenses mnist cifar10 --keep FOLDER --write"))
        MAP.write_text(TypeAdapter(list[Tried]).dump_json(tried(), indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
