"""From what a search claims and the judge confirms to the plain facts that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.target import Execution, Target
from besiege.core.threat import INF, NORM_NAMES, ThreatModel
from besiege.engine.evasion import Lensing, Outcome, evade
from besiege.engine.judge import Verdict, judge
from besiege.results.record import AccessName, Norm, Record, Rows, Threat, figures


def siege(
    attack: Attack,
    target: Target,
    images: Images,
    threat: ThreatModel,
    *,
    seed: int = 0,
    target_class: int | None = None,
    lens: Lensing | None = None,
    starts: Tensor | None = None,
    training: Images | None = None,
    clean: Tensor | None = None,
    execution: Execution = "auto",
    progress: Callable[[int], None] | None = None,
) -> tuple[Outcome, Verdict, Record]:
    """Attack, verify, sum up; see `besiege.engine.evasion.evade` for the arguments.

    A method that seeks the minimum searches without a radius: what it finds beyond eps is no success, but
    its distance is kept. With ``target_class`` the threat is a targeted one.

    Raises:
        BadInput: the attack does not fit the threat model or the target.
        BadOutcome: the judge refuses what the search claims.
    """
    threat = replace(threat, targeted=target_class is not None)
    free = replace(threat, ball=threat.ball.sized(INF)) if attack.card.seeks == "minimum" else threat
    outcome = evade(
        attack,
        target,
        images,
        free,
        seed=seed,
        target_class=target_class,
        lens=lens,
        starts=starts,
        training=training,
        clean=clean,
        execution=execution,
        progress=progress,
    )
    verdict = judge(outcome, target, images)
    return outcome, verdict, summarize(attack, outcome, verdict, target, images, threat, target_class)


def summarize(
    attack: Attack,
    outcome: Outcome,
    verdict: Verdict,
    target: Target,
    images: Images,
    threat: ThreatModel | None = None,
    target_class: int | None = None,
) -> Record:
    """The facts of one cell; ``threat`` is the radius to be judged by, by default the outcome's own."""
    threat = threat or outcome.threat
    eps = float(threat.ball.eps)
    success = verdict.success & (verdict.distance <= threat.ball.reach)
    rows = Rows(
        index=images.index.tolist(),
        label=outcome.label.tolist(),
        clean_label=outcome.clean.tolist(),
        adversarial_label=verdict.label.tolist(),
        attacked=outcome.attacked.tolist(),
        success=success.tolist(),
        success_8bit=(success & verdict.success_8bit).tolist(),
        distance=[d if math.isfinite(d) else None for d in verdict.distance.tolist()],
        forward=outcome.forward.tolist(),
        backward=outcome.backward.tolist(),
        needed=outcome.needed.tolist(),
    )
    figured = figures(rows, int(verdict.noise.sum()))
    return Record(
        attack=attack.name,
        options=attack.recorded(),
        title=attack.card.title,
        family=attack.card.family,
        paper=attack.card.paper,
        seeks=attack.card.seeks,
        target=target.name,
        fingerprint=target.fingerprint,
        data=images.name,
        seed=outcome.seed,
        threat=Threat(
            norm=cast(Norm, NORM_NAMES[threat.ball.norm]),
            eps=eps if math.isfinite(eps) else None,
            access=cast(AccessName, threat.access.name.lower()),
            queries=threat.queries,
            seconds=threat.seconds,
            targeted=threat.targeted,
            target_class=target_class,
            after=None if threat.after is None else str(threat.after),
        ),
        setup_forward=outcome.setup_forward,
        setup_backward=outcome.setup_backward,
        setup_seconds=outcome.setup_seconds,
        fooling_rate=figured["success_rate"] if attack.card.kind == "universal" else None,
        seconds=outcome.seconds,
        cpu_seconds=outcome.cpu_seconds,
        verified=torch.equal(verdict.success, outcome.success),
        notes=list(outcome.notes),
        images=rows,
        **figured,
    )
