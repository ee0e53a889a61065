"""Trains on poisoned images and, alike, on clean ones, and measures what the poison has done."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput, BadOutcome
from besiege.core.features import all_features, last_layer
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Attack, Card, Victim, make
from besiege.core.poisoned import Knowledge, Poisoned, eight_bits
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade
from besiege.results.poisoning import Cell, Measured, PoisonRecord, Run, cell

SURROGATES = 2
"""How many networks of its own an attacker has that asks for them; beside the one that a transferring victim has."""

APART = 10_000
"""How far the seeds of networks that are not the victim lie from the victim's."""

NORM = 5.0
"""The mean norm of the features that a new last layer learns from."""

Means = Literal["trigger", "plain", "victims", "errors"]
Twins = dict[tuple[str, str, int, str], Target]
"""Clean models by the digest of what they learned from, the recipe, the seed and how the victim learns."""

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """The first run of all: what was learned from, what of it the attacker made, and both models."""

    clean: Images
    poisoned: Poisoned
    target: Target
    twin: Target


@dataclass(frozen=True, eq=False)
class Ground:
    """What a poisoner is measured on.

    ``rates`` are tried in turn, with the seeds ``seed`` to ``seed + seeds - 1`` each; where a method means a single
    image, ``trials`` of them a seed. ``probes`` test images a class say where the decision boundary lies.
    """

    training: Images
    test: Images
    fit: Fit
    classes: int
    target_class: int = 0
    victim: Victim | None = None
    rates: tuple[float, ...] = ()
    seeds: int = 1
    seed: int = 0
    trials: int = 4
    probes: int = 5
    twins: Twins = field(default_factory=dict, repr=False)
    progress: Progress | None = field(default=None, repr=False)

    def workload(self, card: Card) -> int:
        """How many images all trainings together learn from, about: what ``progress`` is told in the end."""
        others = (SURROGATES if "surrogates" in card.needs else 0) + (self._how(card) != "scratch")
        runs = max(1, len(self.rates)) * (self.trials if "victims" in card.needs else 1)
        return self.seeds * (1 + others + runs) * self.fit.epochs * len(self.training)

    def watched(self, progress: Progress) -> Ground:
        """The same, with somebody who is told how many images were learned from."""
        return replace(self, progress=progress)

    def _how(self, card: Card) -> Victim:
        return card.victim if self.victim is None else self.victim


def poison(attack: Attack, ground: Ground) -> tuple[PoisonRecord, Sample]:
    """Poison, train and measure at every rate and seed, beside clean twins.

    All images are rounded to 8 bits before anybody sees them, and again whatever the poisoner has changed and every
    image that bears its trigger: an attacker has to hand over files.

    Raises:
        BadInput: the method does not fit the images.
        BadOutcome: the method has changed training images that it does not own up to, or left [0, 1].
    """
    began, card = time.monotonic(), attack.card
    attacks = _at_rates(attack, ground.rates)
    ground = replace(ground, training=_eight(ground.training), test=_eight(ground.test))
    if card.pair is not None:
        ground = replace(ground, training=_only(ground.training, card.pair), test=_only(ground.test, card.pair))
    if not 0 <= ground.target_class < ground.classes:
        raise BadInput(f"target class {ground.target_class} is not among the {ground.classes} classes from 0")
    runs: list[list[Run]] = [[] for _ in attacks]
    sample: Sample | None = None
    n_train = 0
    for seed in range(ground.seed, ground.seed + ground.seeds):
        scene = _Scene(attack, ground, seed)
        n_train = len(scene.images)
        for row, chosen in enumerate(attacks):
            for trial, victim in enumerate(scene.victims(ground.trials)):
                run, made = scene.run(chosen, trial, victim)
                runs[row].append(run)
                sample = sample or made
    assert sample is not None
    cells = [cell(at_rate, n_train) for at_rate in runs]
    headline = {name: getattr(cells[0], name) for name in Cell.model_fields if name in PoisonRecord.model_fields}
    means = means_of(card, sample.poisoned)
    record = PoisonRecord(
        attack=attack.name,
        options=attacks[0].recorded(),
        title=card.title,
        paper=card.paper,
        changes=card.changes,
        means=means,
        data=ground.training.name,
        test=ground.test.name,
        n_train=n_train,
        n_test=len(ground.test),
        fit=ground.fit.name if card.learner is None else sample.twin.name,
        victim=ground._how(card),
        classes=ground.classes,
        target_class=None if means == "errors" else sample.poisoned.target_class,
        seeds=list(range(ground.seed, ground.seed + ground.seeds)),
        cells=cells,
        seconds=time.monotonic() - began,
        **headline,
    )
    return record, sample


def means_of(card: Card, poisoned: Poisoned) -> Means:
    """What of the test images an attacker is judged by; see `PoisonRecord`."""
    if "victims" in card.needs:
        return "victims"
    if poisoned.trigger is not None:
        return "trigger"
    return "errors" if poisoned.target_class is None else "plain"


class _Scene:
    """One seed: the images that are poisoned, what the attacker knows, and how victims learn."""

    def __init__(self, attack: Attack, ground: Ground, seed: int) -> None:
        self.attack, self.ground, self.seed = attack, ground, seed
        self.card, self.how = attack.card, ground._how(attack.card)
        draw = torch.Generator().manual_seed(seed)
        self.images, self.validation, self.public = ground.training, None, None
        if "validation" in self.card.needs:
            self.images, self.validation = _parted(self.images, 4 / 5, draw)
        surrogates: list[Target] = []
        learned = self.images
        if self.how != "scratch":
            self.images, learned = _parted(self.images, 1 / 2, draw)
            self.public = self._network(learned, 0)
            surrogates.append(self.public)
        if "surrogates" in self.card.needs:
            surrogates += [self._network(learned, k) for k in range(1, SURROGATES + 1)]
        self.surrogates = tuple(surrogates) if "surrogates" in self.card.needs else ()
        self.twin = self._twin()
        self.twin_labels = self.twin.labels(ground.test.x)
        self.near: dict[str, Tensor] = {}

    def victims(self, trials: int) -> list[Images | None]:
        """One image a trial that the twin gets right and that is not of the target class; none where none is meant.

        Raises:
            BadInput: there are too few.
        """
        if "victims" not in self.card.needs:
            return [None]
        test = self.ground.test
        rows = ((self.twin_labels == test.y) & (test.y != self.ground.target_class)).nonzero().squeeze(1)
        if len(rows) < trials:
            raise BadInput(
                f"{test.name}: {trials} victims are needed, but only {len(rows)} images are of other classes "
                f"than {self.ground.target_class} and classified as such"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).to(rows.device)
        return [test[rows[order[k : k + 1]]] for k in range(trials)]

    def run(self, attack: Attack, trial: int, victim: Images | None) -> tuple[Run, Sample]:
        """Poison, train and measure."""
        began = time.monotonic()
        knows = Knowledge(
            self.ground.classes,
            self.ground.target_class,
            self.ground.fit,
            self.seed,
            self.surrogates,
            victim,
            self.validation,
            self.ground.progress if self.card.changes == "training" else None,
        )
        made = attack.bound()(self.images, knows, Rng.of(self.seed, self.images.index, attack.name))
        untouched = proven(self.images, made, attack.name)
        x = made.images.x.clone()
        x[made.truth] = eight_bits(x[made.truth])
        made = replace(made, images=replace(made.images, x=x))
        target = self._learned(made.images) if made.module is None else self._handed(made.module)
        judged, wanted = self._judged(made, victim)
        labels = made.images.y[: len(self.images)] != self.images.y
        run = Run(
            seed=self.seed,
            trial=trial,
            victim=None if victim is None else int(victim.index[0]),
            count=int(made.truth.sum()),
            labels_changed=int(labels.sum()),
            untouched=untouched,
            data=made.images.digest,
            data_twin=self.images.digest,
            poisoned=self._measured(target, judged, wanted),
            twin=self._measured(self.twin, judged, wanted),
            seconds=time.monotonic() - began,
        )
        return run, Sample(self.images, made, target, self.twin)

    def _judged(self, made: Poisoned, victim: Images | None) -> tuple[Tensor, Tensor]:
        """(n, c, h, w) the images that are meant, and (n,) what shall be said of them; -1 stands for any other class.

        Of images to which a label is given, those that bear it anyway are left out.
        """
        test, means = self.ground.test, means_of(self.card, made)
        if victim is not None and means == "victims":
            x = victim.x if made.trigger is None else eight_bits(made.trigger(victim.x))
            return x, torch.full_like(victim.y, self.ground.target_class)
        wanted = torch.full_like(test.y, -1) if means == "errors" else made.wanted(test.y, self.ground.classes)
        rows = wanted != test.y
        if made.source is not None:
            rows &= test.y == made.source
        x = test.x[rows]
        if made.trigger is not None:
            x = eight_bits(torch.cat([made.trigger(part) for part in torch.split(x, 1000)])) if len(x) else x
        return x, torch.where(wanted[rows] < 0, -1 - test.y[rows], wanted[rows])

    def _measured(self, target: Target, judged: Tensor, wanted: Tensor) -> Measured:
        test, classes = self.ground.test, self.ground.classes
        said = self.twin_labels if target is self.twin else target.labels(test.x)
        right = said == test.y
        answers = target.labels(judged) if len(judged) else wanted
        hit = torch.where(wanted < 0, answers != -1 - wanted, answers == wanted)
        return Measured(
            fingerprint=target.fingerprint,
            right=int(right.sum()),
            n=len(test),
            success=int(hit.sum()),
            judged=len(judged),
            class_accuracy=[_share(right[test.y == k]) for k in range(classes)],
            class_distance=self._distances(target),
        )

    def _distances(self, target: Target) -> list[float | None]:
        """The median distance to the decision boundary, a class: of its first test images that the twin gets right."""
        test, seen = self.ground.test, self.near.get(target.fingerprint)
        rows = torch.cat(
            [
                ((test.y == k) & (self.twin_labels == k)).nonzero().squeeze(1)[: self.ground.probes]
                for k in range(self.ground.classes)
            ]
        )
        if not len(rows):
            return [None] * self.ground.classes
        if seen is None:
            threat = ThreatModel(Access.GRADIENTS, Ball(2, INF))
            found = evade(make("deepfool"), target, test[rows], threat, seed=self.seed)
            seen = self.near[target.fingerprint] = torch.where(found.attacked, found.distance, torch.nan)
        return [_median(seen[test.y[rows] == k]) for k in range(self.ground.classes)]

    def _twin(self) -> Target:
        key = (
            self.images.digest,
            f"{self.ground.fit}{self.attack if self.card.learner else ''}",
            self.seed,
            self.how,
        )
        if key not in self.ground.twins:
            self.ground.twins[key] = self._learned(self.images)
        return self.ground.twins[key]

    def _network(self, images: Images, k: int) -> Target:
        """A network that is not the victim: the attacker's, or the public one that the victim starts from."""
        seed = self.seed + APART * (k + 1)
        return self.ground.fit(images, seed, classes=self.ground.classes, progress=self.ground.progress)

    def _handed(self, module: nn.Module) -> Target:
        fit, shape = self.ground.fit, self.images.shape
        return Target.of(module.eval(), classes=self.ground.classes, shape=shape, name=fit.name, batch=256)

    def _learned(self, images: Images) -> Target:
        """The victim, poisoned or not."""
        ground, fit = self.ground, self.ground.fit
        if self.card.learner is not None:
            known = inspect.signature(self.card.learner).parameters
            given = {key: value for key, value in self.attack.arguments.items() if key in known}
            return self.card.learner(images, classes=ground.classes, **given)
        if self.public is None:
            return fit(images, self.seed, classes=ground.classes, progress=ground.progress)
        if self.how == "frozen":
            return with_new_head(self.public, fit, images, self.seed)
        start = _copied(self.public)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            last_layer(start).reset_parameters()
        slower = replace(fit, lr=fit.lr / 10)
        return slower(images, self.seed, classes=ground.classes, start=start.module, progress=ground.progress)


def with_new_head(public: Target, fit: Fit, images: Images, seed: int) -> Target:
    """``public`` with another last layer, learned from the features of ``images`` until it fits them.

    ADAM at 0.1 for 60 epochs, on features of a mean norm of ``NORM`` (Zhu et al. 2019, arXiv:1905.05897).
    """
    seen = all_features(public, images.x)
    size = seen.norm(dim=1).mean().clamp_min(1e-12) / NORM
    draw = torch.Generator().manual_seed(seed)
    target = _copied(public)
    layer = last_layer(target)
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    layer.requires_grad_()
    adam = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(60):
        for rows in torch.split(torch.randperm(len(images), generator=draw).to(seen.device), fit.batch):
            adam.zero_grad()
            nn.functional.cross_entropy(layer(seen[rows] / size), images.y[rows]).backward()
            adam.step()
    with torch.no_grad():
        layer.weight.div_(size)
    assert target.module is not None
    return Target.of(target.module, classes=public.classes, shape=public.shape, name=fit.name, batch=256)


def proven(clean: Images, made: Poisoned, name: str) -> str:
    """The digest of the images that the attacker left alone, found to be the same before and after.

    Raises:
        BadOutcome: they are not, or something is missing, or pixels leave [0, 1].
    """
    n, after = len(clean), made.images
    if len(after) < n or made.truth.shape != after.y.shape or not bool(made.truth[n:].all()):
        raise BadOutcome(f"{name}: what it hands over are not the images it was given with others after them")
    if len(torch.unique(after.index)) != len(after) or not torch.equal(after.index[:n], clean.index):
        raise BadOutcome(f"{name}: the images that it hands over are not numbered one by one as they were")
    if not bool(after.x.isfinite().all()) or float(after.x.min()) < 0 or float(after.x.max()) > 1:
        raise BadOutcome(f"{name}: a poisoned image leaves [0, 1]")
    kept = ~made.truth[:n]
    before, left = clean[kept].digest, after[:n][kept].digest
    if before != left:
        raise BadOutcome(f"{name}: it has changed training images that it does not name")
    return left


def _copied(target: Target) -> Target:
    module = copy.deepcopy(target.module)
    assert module is not None
    return replace(target, module=module, call=module)


def _at_rates(attack: Attack, rates: Sequence[float]) -> list[Attack]:
    """The attack, once for each rate.

    Raises:
        BadInput: it has no rate, or one lies outside (0, 1].
    """
    if rates and "rate" not in attack.arguments:
        raise BadInput(f"{attack.name} has no rate; leave --rates out")
    made = [attack.method(**{**attack.arguments, "rate": rate}) for rate in rates] or [attack]
    for one in made:
        if not 0 < one.arguments.get("rate", 1) <= 1:
            raise BadInput(f"{attack.name}: rate must lie above 0 and at most at 1, not {one.arguments['rate']}")
    return made


def _parted(images: Images, share: float, draw: torch.Generator) -> tuple[Images, Images]:
    """A random ``share`` of the images, and the others."""
    order = torch.randperm(len(images), generator=draw).to(images.x.device)
    cut = round(share * len(images))
    return images[order[:cut].sort().values], images[order[cut:].sort().values]


def _only(images: Images, pair: tuple[int, int]) -> Images:
    """The images of two classes.

    Raises:
        BadInput: one has none.
    """
    rows = (images.y == pair[0]) | (images.y == pair[1])
    if len(torch.unique(images.y[rows])) < 2:
        raise BadInput(f"{images.name}: there are no images of the classes {pair[0]} and {pair[1]}")
    return images[rows]


def _eight(images: Images) -> Images:
    return replace(images, x=eight_bits(images.x))


def _share(right: Tensor) -> float | None:
    return float(right.float().mean()) if len(right) else None


def _median(distance: Tensor) -> float | None:
    known = distance[distance.isfinite()]
    return float(known.median()) if len(known) else None
