"""Measures a defense: each attack before it, by someone who does not know it, and by someone who does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.lens import Bpda, Eot
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.shield import Shield
from besiege.core.target import Target
from besiege.core.threat import Access, ThreatModel, rowwise
from besiege.engine.evasion import Lensing, Outcome
from besiege.engine.judge import judge
from besiege.engine.roc import auc
from besiege.engine.summary import siege, summarize
from besiege.results.defense import Defense, Detection, Row, verdict
from besiege.results.interval import wilson
from besiege.results.record import Record

FITTED = 200
NOTHING: Mapping[str, Row] = {}


@dataclass(frozen=True, eq=False)
class Hardened:
    """A target without and with a defense, and how long the defense took to make."""

    undefended: Target
    defended: Target
    seconds: float


def trained(
    defense: Attack,
    fit: Fit,
    images: Images,
    seed: int,
    *,
    classes: int,
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Hardened:
    """The same recipe, seed and images without and with a defense of the training.

    In ``folder`` both leave checkpoints, from which an interrupted training goes on.
    """
    first, second = (None, None) if folder is None else (folder / "undefended.ckpt", folder / "defended.ckpt")
    undefended = fit(images, seed, classes=classes, checkpoint=first, progress=progress)
    began = time.monotonic()
    defended = defense.bound()(fit)(images, seed, classes=classes, checkpoint=second, progress=progress)
    return Hardened(undefended, defended, time.monotonic() - began)


def wrapped(defense: Attack, target: Target, images: Images, seed: int) -> Hardened:
    """A target behind a defense that was calibrated on clean ``images``.

    Raises:
        BadInput: the images do not fit the target.
    """
    target.takes(images)
    began = time.monotonic()
    defended = defense.bound()(target, images, Rng.of(seed, images.index, defense.name))
    return Hardened(target, defended, time.monotonic() - began)


def measured(
    defense: Attack,
    hardened: Hardened,
    images: Images,
    attacks: Sequence[tuple[Attack, ThreatModel]],
    strongest: Attack,
    *,
    calibration: Images,
    seed: int = 0,
    target_class: int | None = None,
    starts: Tensor | None = None,
    known: Mapping[str, Row] = NOTHING,
    keep: Callable[[str, Row], None] | None = None,
    progress: Callable[[str], None] | None = None,
    passed: Callable[[int], None] | None = None,
) -> Defense:
    """Send ``attacks`` three times each at the same images, but for those whose rows are ``known`` already.

    ``keep`` is handed each row as it is done, by the name that it goes by in ``known``; ``progress`` hears what is
    sent, and ``passed`` how many images went through a target.

    Whoever knows a shield attacks through what it looks like softened; a network that was only trained otherwise
    is attacked by ``strongest`` in place of an attack at a radius. Universal perturbations are fitted on up to
    `FITTED` of the images of the ``calibration``, on which the defense was made.
    """
    before, after = hardened.undefended, hardened.defended
    shield = after.module if isinstance(after.module, Shield) else None
    clean, defended, suspicion = _answers(before, images)[0], *_answers(after, images)
    kept = torch.ones_like(defended, dtype=torch.bool) if suspicion is None else suspicion <= 0
    right = int(((defended == images.y) & kept).sum())
    meeting = _Field(
        hardened,
        shield,
        images,
        calibration,
        strongest,
        suspicion,
        seed,
        target_class,
        starts,
        progress,
        passed,
    )
    rows = []
    for attack, threat in attacks:
        name = f"{attack} {threat.ball.norm} {float(threat.ball.eps):.6g}"
        row = known.get(name) or meeting.row(attack, threat)
        if keep is not None and name not in known:
            keep(name, row)
        rows.append(row)
    return Defense(
        defense=defense.name,
        title=defense.card.title,
        paper=defense.card.paper,
        kind=defense.card.kind,
        options=defense.recorded(),
        target=before.name,
        data=images.name,
        calibrated=len(calibration),
        judged=len(images),
        seed=seed,
        clean_accuracy=float((clean == images.y).float().mean()),
        clean_accuracy_defended=right / len(images),
        clean_interval=wilson(right, len(images)),
        fpr=None if suspicion is None else float((~kept).float().mean()),
        latency_ratio=_clock(after, images.x) / _clock(before, images.x),
        setup_seconds=hardened.seconds,
        rows=rows,
    )


def knowing(shield: Shield) -> Lensing:
    """The gradients of someone who knows the shield; of a random one, their mean over several answers."""

    def through(meter: Meter, x: Tensor, rng: Rng) -> Oracle:
        lens: Oracle = Bpda(meter, shield.softened)
        return Eot(lens, rng, samples=shield.draws) if meter.target.stochastic else lens

    return through


def shown(outcome: Outcome, target: Target, images: Images) -> Outcome:
    """What an attack made elsewhere is worth on ``target``: its images, one question each."""
    clean = target.labels(images.x)
    answers = [target.answer(part) for part in torch.split(outcome.adv, target.batch)]
    said = torch.cat([answer.scores.argmax(1) for answer in answers])
    passed = torch.cat(
        [torch.ones(len(a.scores), dtype=torch.bool) if a.excess is None else a.excess.cpu() <= 0 for a in answers]
    ).to(said.device)
    attacked = outcome.attacked & (clean == images.y)
    hit = said == outcome.goal if outcome.threat.targeted else said != images.y
    success = outcome.success & attacked & hit & passed
    none = torch.full_like(outcome.needed, -1)
    return replace(
        outcome,
        clean=clean,
        attacked=attacked,
        adv=torch.where(rowwise(success, images.x), outcome.adv, images.x),
        success=success,
        distance=torch.where(success, outcome.distance, math.inf),
        forward=attacked.long(),
        backward=torch.zeros_like(none),
        needed=torch.where(success, 1, none),
    )


@dataclass(frozen=True, eq=False)
class _Field:
    """Where the attacks on a defense meet: what is attacked, and what has been sent there before."""

    hardened: Hardened
    shield: Shield | None
    images: Images
    calibration: Images
    strongest: Attack
    suspicion: Tensor | None
    seed: int
    target_class: int | None
    starts: Tensor | None
    progress: Callable[[str], None] | None
    passed: Callable[[int], None] | None
    held: dict[tuple[str, str, str], tuple[Outcome, Record]] = field(default_factory=dict)

    def row(self, attack: Attack, threat: ThreatModel) -> Row:
        """One attack, three times."""
        before, after, shield = self.hardened.undefended, self.hardened.defended, self.shield
        plain, undefended = self.sent(attack, threat, before, None, "on the undefended target")
        held, knows = plain, attack
        if shield is None:
            _, defended = self.sent(attack, threat, after, None, "on the defended target")
            bounded = math.isfinite(float(threat.ball.eps)) and threat.ball.norm in self.strongest.card.norms
            knows = self.strongest if bounded else attack
            sent = replace(threat, access=knows.card.access, queries=threat.queries if knows is attack else None)
            found, adaptive = self.sent(knows, sent, after, None, "on the defended target")
        elif shield.inner is not before and type(shield).softened is not Shield.softened:
            _, defended = self.sent(attack, threat, after, None, "on the defended target")
            found, adaptive = self.sent(attack, threat, after, knowing(shield), "by someone who knows")
        else:
            if shield.inner is not before:
                held, _ = self.sent(attack, threat, shield.inner, None, "on the network inside")
            blind = shown(held, after, self.images)
            told = replace(threat, targeted=self.target_class is not None)
            seen = judge(blind, after, self.images)
            defended = summarize(attack, blind, seen, after, self.images, told, self.target_class)
            found, adaptive = self.sent(attack, threat, after, knowing(shield), "by someone who knows")
        return self.judged(held, undefended, defended, found, adaptive, knows)

    def judged(
        self, held: Outcome, undefended: Record, defended: Record, found: Outcome, adaptive: Record, knows: Attack
    ) -> Row:
        """The row of an attack whose three records are known."""
        near, far = undefended.median_distance, adaptive.median_distance
        return Row(
            undefended=undefended,
            defended=defended,
            adaptive=adaptive,
            adaptive_attack=str(knows) + ("" if self.shield is None else " through the defense"),
            l2_ratio=None if not near or far is None else far / near,
            detected=_detected(held, self.hardened.defended, self.suspicion),
            detected_adaptive=_detected(found, self.hardened.defended, self.suspicion),
            verdict=verdict(undefended, defended, adaptive),
        )

    def sent(
        self, attack: Attack, threat: ThreatModel, target: Target, lens: Lensing | None, where: str
    ) -> tuple[Outcome, Record]:
        """An attack there; what was sent before is not sent again."""
        key = str(attack), repr(threat), where
        if key not in self.held:
            if self.progress is not None:
                self.progress(f"{attack} {where}")
            softened = lens is not None and target.access < Access.GRADIENTS
            outcome, _, record = siege(
                attack,
                target,
                self.images,
                replace(threat, access=Access.SCORES) if softened else threat,
                seed=self.seed,
                target_class=self.target_class,
                lens=lens,
                starts=self.starts,
                progress=self.passed,
                training=self.calibration.sample(FITTED, self.seed) if attack.card.kind == "universal" else None,
            )
            self.held[key] = outcome, record
        return self.held[key]


def _detected(outcome: Outcome, target: Target, clean: Tensor | None) -> Detection | None:
    """How the target's detector tells the images that mislead the network from the clean ones."""
    rows = outcome.success.nonzero().squeeze(1)
    if clean is None or not len(rows):
        return None
    _, excess = _answers(target, Images.of(outcome.adv[rows], outcome.label[rows]))
    assert excess is not None
    caught = int((excess > 0).sum())
    return Detection(
        n=len(rows), tpr=caught / len(rows), tpr_interval=wilson(caught, len(rows)), auc=auc(excess, clean)[0]
    )


def _answers(target: Target, images: Images) -> tuple[Tensor, Tensor | None]:
    """The labels (n,) and, where a detector stands, the excess (n,)."""
    with torch.no_grad(), target.ready():
        answers = [target.answer(part) for part in torch.split(images.x, target.batch)]
    excess = [answer.excess for answer in answers if answer.excess is not None]
    return torch.cat([answer.scores.argmax(1) for answer in answers]), torch.cat(excess) if excess else None


def _clock(target: Target, x: Tensor) -> float:
    """CPU seconds of an answer to up to a batch of images, the best of three."""
    x = x[: target.batch]
    least = math.inf
    for _ in range(3):
        began = time.perf_counter()
        target.scores(x)
        least = min(least, time.perf_counter() - began)
    return least
