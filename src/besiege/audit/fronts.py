"""What an audit does beyond evasion: defenses, what the model gives away, its theft, and poison in its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from besiege.audit.pictures import hang, label_name
from besiege.audit.plan import Plan, radius, share
from besiege.core.errors import BadInput
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import GUARDS, Attack, configured, make, method
from besiege.core.reference import Reference
from besiege.core.target import Target
from besiege.core.threat import INF, Ball, ThreatModel
from besiege.engine import defense as defenses
from besiege.engine.extraction import steal
from besiege.engine.inference import infer_membership, invert, reconstruct
from besiege.engine.poisoning import Ground, poison
from besiege.results.audit import Exhibit, LeftOut
from besiege.results.defense import Row
from besiege.results.record import Facts

FAMILIES = ("whitebox", "blackbox", "poisoning", "inference", "extraction")
ATTACKED: Mapping[str, int] = {"quick": 20, "standard": 100, "thorough": 500}
"""So many images are attacked before, behind and through a defense."""
QUERIES: Mapping[str, int] = {"quick": 1000, "standard": 5000, "thorough": 50_000}
"""How many images a thief asks about where nobody says."""
INVERTED = 20
"""Pictures are made of at most so many classes."""
SHOWN = 4
STARTS = 50

SENT: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "badnets": {"quick": {}, "standard": {}, "thorough": {}},
    "blended": {"standard": {}, "thorough": {}},
    "label-consistent": {"thorough": {}},
    "membership-inference": {"quick": {"mode": "loss"}, "standard": {"mode": "lira"}, "thorough": {"mode": "lira"}},
    "model-inversion": {"quick": {}, "standard": {}, "thorough": {}},
    "reconstruction": {"standard": {}, "thorough": {}},
    "copycat": {budget: {"queries": queries} for budget, queries in QUERIES.items()},
    "functionally-equivalent": {"standard": {}, "thorough": {}},
}
"""The attacks that are no evasion in the order they are sent, and each one's options by the budgets it is part of."""


@dataclass(frozen=True, eq=False)
class Material:
    """What an audit has beside the target and the images under attack.

    ``train`` are other images of the same kind: defenses and recognizers learn from them, a thief asks about them, and
    poison is put among them. ``members`` were learned from by the target, ``others`` were not. ``fit`` is the recipe of
    whatever is trained; ``same`` where it is known to be the target's own.
    """

    fit: Fit
    train: Images | None = None
    members: Images | None = None
    others: Images | None = None
    same: bool = False


@dataclass(frozen=True, eq=False)
class Front:
    """One attack that is no evasion, or one defense."""

    attack: Attack

    def __str__(self) -> str:
        return f"defense {self.attack.name}" if self.attack.card.family == "defense" else self.attack.name


@dataclass(frozen=True, eq=False)
class Beyond:
    """What an audit does beyond evasion, with what, and what it cannot."""

    material: Material
    fronts: tuple[Front, ...]
    lacking: tuple[LeftOut, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What is done, as a manifest states it."""
        material = self.material
        parts = (material.train, material.members, material.others) if self.fronts else ()
        return {
            "fronts": {str(front): dict(front.attack.arguments) for front in self.fronts},
            "material": [None if part is None else part.digest for part in parts],
            "fit": material.fit.name if self.fronts else "",
        }


@dataclass(frozen=True, eq=False)
class Scene:
    """Where a front is fought: the target, the images under attack, the material, and the run's folder and seed."""

    target: Target
    images: Images
    plan: Plan
    material: Material
    folder: Path
    seed: int
    passed: Callable[[int], None]

    def probe(self) -> Ball:
        """The first L∞ radius of the plan."""
        return Ball(INF, radius_of([(cell.attack, cell.threat) for cell in self.plan.cells], self.target.shape))


def beyond(target: Target, material: Material, families: Sequence[str], guards: Sequence[str], plan: Plan) -> Beyond:
    """The fronts of an audit with the material at hand, and what is left out for want of what.

    Raises:
        BadInput: a defense cannot be measured so.
    """
    found, left_out = [], []
    for name in guards:
        attack = configured(method(name, tuple(kind for kind in GUARDS if kind != "data")))
        if material.train is None:
            raise BadInput(
                f"--defend {name} needs images apart from those that are attacked: give them as --train DATA"
            )
        if not plan.cells:
            raise BadInput(f"--defend {name} needs attacks to be measured by: add whitebox or blackbox to --families")
        found.append(Front(attack))
    unasked = [family for family in FAMILIES[2:] if family not in families]
    if len(unasked) < len(FAMILIES[2:]):
        told = "it was not asked for; --families says what is sent"
        left_out += [LeftOut(attack=family, threat="", why=told) for family in unasked]
    for name, budgets in SENT.items():
        if method(name).card.family not in families:
            continue
        if plan.budget not in budgets:
            left_out.append(LeftOut(attack=name, threat="", why=f"it is part of the {next(iter(budgets))} budget"))
            continue
        options = dict(budgets[plan.budget])
        if options.get("mode") == "lira" and not material.same:
            options["mode"] = "loss"
        front = Front(configured(method(name), **options))
        why = _lacks(front, target, material)
        if why:
            left_out.append(LeftOut(attack=name, threat="", why=why))
        else:
            found.append(front)
    return Beyond(material, tuple(found), tuple(left_out))


def _lacks(front: Front, target: Target, material: Material) -> str | None:
    """Why a front cannot be opened; None where it can."""
    card = front.attack.card
    if card.access > target.access:
        return f"it needs {card.access.name.lower()}, and the target grants {target.access.name.lower()}"
    if card.name == "membership-inference":
        missing = material.members is None or material.others is None
        return "it needs images that the target learned from and others: give --members and --nonmembers" * missing
    if card.name == "functionally-equivalent" and not _dense(target.module):
        return "it rebuilds dense ReLU networks alone"
    if material.train is None:
        return "it needs other images of the same kind: give them as --train DATA"
    return None


def _dense(module: nn.Module | None) -> bool:
    """Is it a dense ReLU network?"""
    leaves = [] if module is None else [part for part in module.modules() if not list(part.children())]
    return any(isinstance(part, nn.Linear) for part in leaves) and all(
        isinstance(part, nn.Linear | nn.ReLU | nn.Flatten | nn.Identity) for part in leaves
    )


def fight(
    front: Front, scene: Scene, known: Mapping[str, Row], keep: Callable[[str, Row], None]
) -> tuple[Facts, list[Exhibit]]:
    """Open a front: its facts, and the pictures that it left in the run's folder.

    Raises:
        BesiegeError: it cannot be fought to its end.
    """
    if front.attack.card.family == "defense":
        return _defended(front.attack, scene, known, keep), []
    run = {
        "membership": _membership,
        "images": _inversion,
        "inputs": _reconstruction,
    }.get(front.attack.card.gives or "", _theft if front.attack.card.family == "extraction" else _poison)
    return run(front.attack, scene)


def radius_of(sent: Sequence[tuple[Attack, ThreatModel]], shape: tuple[int, int, int]) -> float:
    """The first radius of the attacks in L∞, by which a defense with a radius of its own is trained."""
    known = [float(threat.ball.eps) for _, threat in sent if threat.ball.norm == INF]
    return next((eps for eps in known if math.isfinite(eps)), radius(INF, shape))


def _defended(attack: Attack, scene: Scene, known: Mapping[str, Row], keep: Callable[[str, Row], None]) -> Facts:
    """Every attack of the plan, before, behind and through a defense."""
    train = scene.material.train
    assert train is not None
    sent = [(cell.attack, cell.threat) for cell in scene.plan.cells]
    if "eps" in attack.card.options:
        attack = configured(method(attack.name), **{**attack.arguments, "eps": radius_of(sent, train.shape)})
    if attack.card.kind == "training":
        made = defenses.trained(
            attack,
            scene.material.fit,
            train,
            scene.seed,
            classes=scene.target.classes,
            folder=scene.folder / "defenses" / attack.name,
            progress=scene.passed,
        )
    else:
        made = defenses.wrapped(attack, scene.target, train, scene.seed)
    strongest = method("autoattack")
    return defenses.measured(
        attack,
        made,
        scene.images.sample(ATTACKED[scene.plan.budget], scene.seed),
        sent,
        configured(strongest, **share(strongest.card, scene.plan.budget).options),
        calibration=train,
        seed=scene.seed,
        starts=train.sample(STARTS, scene.seed).x,
        known=known,
        keep=keep,
        passed=scene.passed,
    )


def _membership(attack: Attack, scene: Scene) -> tuple[Facts, list[Exhibit]]:
    material = scene.material
    assert material.members is not None and material.others is not None
    knows = Reference(
        scene.target.shape,
        images=material.train,
        fit=material.fit if attack.arguments["mode"] != "loss" else None,
        folder=scene.folder / "shadows",
        progress=scene.passed,
    )
    _, record = infer_membership(attack, scene.target, material.members, material.others, knows, seed=scene.seed)
    if attack.arguments["mode"] == "loss":
        note = (
            "by the loss alone: shadow models, which find more, need --fit, the recipe that the target was trained by"
        )
        record = record.model_copy(update={"notes": [*record.notes, note]})
    return record, []


def _inversion(attack: Attack, scene: Scene) -> tuple[Facts, list[Exhibit]]:
    train = scene.material.train
    assert train is not None
    evaluator = scene.material.fit(train, scene.seed + 1, classes=scene.target.classes, progress=scene.passed)
    every = torch.arange(min(scene.target.classes, INVERTED), device=scene.images.x.device)
    made, record = invert(
        attack, scene.target, every, evaluator, scene.images, train, seed=scene.seed, progress=scene.passed
    )
    captions = [
        f"class {label_name(train, row.label)}, recognized as {label_name(train, row.recognized_as)}"
        for row in record.classes
    ]
    note = f"recognized by {evaluator.name}, trained here on {len(train)} images of {train.name}"
    return record.model_copy(update={"notes": [*record.notes, note]}), hang(scene.folder, attack.name, made, captions)


def _reconstruction(attack: Attack, scene: Scene) -> tuple[Facts, list[Exhibit]]:
    knows = Reference(scene.target.shape, scene.material.train, progress=scene.passed)
    few = scene.images.sample(ATTACKED[scene.plan.budget], scene.seed)
    found, record = reconstruct(attack, scene.target, few, knows, seed=scene.seed)
    both = torch.stack([few.x[:SHOWN], found.x[:SHOWN].to(few.x)], 1).flatten(0, 1)
    return record, hang(scene.folder, attack.name, both, ["image", "rebuilt from the answer"] * (len(both) // 2))


def _theft(attack: Attack, scene: Scene) -> tuple[Facts, list[Exhibit]]:
    train = scene.material.train
    pool = scene.images if train is None else train
    _, theft = steal(
        attack,
        scene.target,
        pool,
        scene.images,
        scene.material.fit,
        seed=scene.seed,
        probe=make("pgd"),
        ball=scene.probe(),
        progress=scene.passed,
    )
    return theft, []


def _poison(attack: Attack, scene: Scene) -> tuple[Facts, list[Exhibit]]:
    train = scene.material.train
    assert train is not None
    ground = Ground(train, scene.images, scene.material.fit, scene.target.classes, seed=scene.seed)
    record, sample = poison(attack, ground.watched(scene.passed))
    note = f"two networks of the recipe {scene.material.fit.name}, trained here: the target itself is not touched"
    changed = sample.poisoned.truth.nonzero().squeeze(1)[:SHOWN]
    captions = [f"poisoned, taught as {label_name(train, int(sample.poisoned.images.y[row]))}" for row in changed]
    made = sample.poisoned.images.x[changed]
    return record.model_copy(update={"notes": [*record.notes, note]}), hang(scene.folder, attack.name, made, captions)
