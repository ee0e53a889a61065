"""Is the audit's own result to be trusted? The checks for gradient masking and for attacks that failed.

After Athalye et al. 2018 (arXiv:1802.00420), Carlini et al. 2019 (arXiv:1902.06705), the flags of AutoAttack
(Croce & Hein 2020, arXiv:2003.01690) and the indicators of attack failure of Pintor et al. 2022
(arXiv:2106.09947). Each check returns one line: what was measured and whether it is as it should be.

Of these, `blackbox_is_weaker` and `larger_eps_is_stronger` need what an audit measured; that noise fails and that
every claim is confirmed is checked on its records (`besiege.results.checks`). A silent success (the attack passed
an adversarial example and returned another image) cannot happen here: the meter keeps the best image that it saw.
Whether images made on another model transfer is not asked.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from besiege.attacks.whitebox.fgsm import fgsm
from besiege.attacks.whitebox.pgd import pgd
from besiege.core.images import Images
from besiege.core.lens import Lens
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, Loss, ThreatModel
from besiege.engine.evasion import evade
from besiege.results.checks import Check

STABLE = 1e-4
"""Two passes over the same images may differ by this much, relative to the scores' spread."""

BACKWARD = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}
"""What every pass back goes through."""


def check_passes(target: Target, images: Images, ball: Ball, seed: int = 0) -> list[Check]:
    """What a few passes tell of how a target answers and of the slope of its loss; no attack is run."""
    with target.ready():
        checks = [repeatable(target, images)]
        if checks[0].passed:
            checks.append(batch_independent(target, images))
        checks.append(plain_forward(target, images))
        if target.access >= Access.SCORES:
            checks.append(logits(target, images))
        if target.access >= Access.GRADIENTS:
            checks += [gradients_alive(target, images), smooth(target, images, ball, seed)]
    return checks


def check_target(target: Target, images: Images, ball: Ball, seed: int = 0) -> list[Check]:
    """Every check that needs nothing but the model and a few images that it classifies correctly."""
    checks = check_passes(target, images, ball, seed)
    if target.access >= Access.GRADIENTS:
        with target.ready():
            checks += [
                iterating_helps(target, images, ball, seed),
                unbounded_succeeds(target, images, seed),
                converged(target, images, ball, seed),
            ]
    return checks


def repeatable(target: Target, images: Images) -> Check:
    """A randomized target moves under the attack: its gradients must be averaged (the lens ``eot``)."""
    first = target.scores(images.x)
    change = max(float((target.scores(images.x) - first).abs().max()) for _ in range(4))
    return _check(
        "repeatable",
        change <= STABLE * _spread(first),
        f"five passes over the same {len(images)} images differ by at most {change:.2g} in a score",
        "the target is random: its figures hold for one draw only; average gradients with eot",
    )


def batch_independent(target: Target, images: Images) -> Check:
    """An image's scores may not depend on its neighbours (batch normalization left in training mode)."""
    few = images.x[:8]
    together = target.scores(few)
    alone = torch.cat([target.scores(image[None]) for image in few])
    change = float((together - alone).abs().max())
    return _check(
        "batch-independent",
        change <= 1e-3 * _spread(together),
        f"{len(few)} images alone and together differ by at most {change:.2g} in a score",
        "an image's scores depend on its neighbours; put the model's normalization in evaluation mode",
    )


def plain_forward(target: Target, images: Images) -> Check:
    """A target that optimizes while it answers purifies its input or adapts to it, and misleads gradients."""
    with _calls() as seen:
        target.scores(images.x[:2])
    back = len(BACKWARD & seen)
    return _check(
        "plain forward",
        not back,
        "a forward pass takes no gradient of its own" if not back else "the forward pass calls autograd itself",
        "the target optimizes at test time: attack it end to end (bpda, or queries), not through its last pass",
    )


def logits(target: Target, images: Images) -> Check:
    """The losses expect logits (log-probabilities are as good), not probabilities."""
    scores = target.scores(images.x)
    total = bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() <= 1e-3).all())
    return _check(
        "logits",
        not total,
        f"the answers to {len(images)} images are {'probabilities' if total else 'no probabilities'}",
        "probabilities round to 0 and 1 where logits still differ: let the target answer before its softmax",
    )


def gradients_alive(target: Target, images: Images) -> Check:
    """The share of images whose gradient vanishes, or is no number, in the target's precision."""
    meter = _meter(target, images)
    losses: tuple[Loss, ...] = ("ce", "margin")
    dead = [float((_size(meter.gradient(images.x, loss)[1]) < 1e-20).double().mean()) for loss in losses]
    return _check(
        "gradients",
        max(dead) <= 0.05,
        f"of {len(images)} images {dead[0]:.0%} have a zero or non-finite gradient of the cross-entropy, "
        f"{dead[1]:.0%} of the margin",
        "gradients are masked: "
        + ("attack the logits (loss margin or dlr)" if dead[1] <= 0.05 else "use bpda, or trust query attacks"),
    )


def smooth(target: Target, images: Images, ball: Ball, seed: int, points: int = 20) -> Check:
    """How well the gradient foretells the loss over an eighth of the radius; a shattered one says nothing.

    A step that reaches the goal is a good one, whatever was foretold.
    """
    x, meter = images.x, _meter(target, images)
    value, grad = meter.gradient(x, "margin")
    step = (x - ball.eps / 8 * ball.steepest(grad)).clamp(0, 1) - x
    foretold = -(grad * step).flatten(1).sum(1)
    alive = (_size(grad) > 1e-20) & (foretold > 0)
    if not bool(alive.any()):
        return _check("smooth", False, "no image has a gradient to follow", "gradients are masked: use bpda or queries")
    after = meter.loss(x + step, "margin")
    ratio = (value - after) / foretold.clamp_min(1e-20)
    good = float((((ratio > 0.2) & (ratio < 5)) | (after < 0))[alive].double().mean())
    noise = Rng.of(seed, images.index, "check")
    spread = torch.stack(
        [
            meter.loss((x + (2 * noise.rand(*x.shape[1:]).to(x) - 1) * 4 / 255).clamp(0, 1), "margin")
            for _ in range(points)
        ]
    )
    jump = float(((spread - value).abs().mean(0) / value.abs().clamp_min(1e-6)).clamp_max(1).mean())
    return _check(
        "smooth",
        good >= 0.5 and jump <= 0.5,
        f"a step down the gradient lowers the margin as foretold for {good:.0%} of the images; random points "
        f"within 4/255 change it by {jump:.0%}",
        "the loss is shattered or unstable: use bpda or eot, or trust score- and label-based attacks",
    )


def iterating_helps(target: Target, images: Images, ball: Ball, seed: int) -> Check:
    """A single step must not do better than many."""
    once = _broken(target, images, ball, seed, fgsm())
    many = _broken(target, images, ball, seed, pgd(steps=20))
    return _check(
        "iterating helps",
        once - many <= max(0.02, 1 / len(images)),
        f"one step breaks {once:.0%} of the images, twenty break {many:.0%}",
        "one step beats many: the gradient misleads further out (masking)",
    )


def unbounded_succeeds(target: Target, images: Images, seed: int) -> Check:
    """With no bound but [0, 1] a working attack breaks everything."""
    share = max(_broken(target, images, Ball(INF, 1.0), seed, pgd(steps=50, loss=loss)) for loss in ("ce", "margin"))
    return _check(
        "unbounded attack",
        share >= 0.95,
        f"PGD without a bound breaks {share:.0%} of the images",
        "even unbounded the attack fails: its gradients do not lead out of the class",
    )


def converged(target: Target, images: Images, ball: Ball, seed: int, steps: int = 100) -> Check:
    """The best loss so far must have stopped falling at the attack's end (incomplete optimization).

    Once an image's class has less than half of the probability, more is no gain.
    """
    trace = _Trace(_meter(target, images, ball))
    pgd.function(trace, images.x, ball, Rng.of(seed, images.index, "pgd"), steps=steps)
    best = torch.stack(trace.losses).clamp_min(-math.log(2)).cummin(0).values
    drop = best[0] - best[-1]
    late = (best[-11] - best[-1]) / drop.clamp_min(1e-12)
    share = float((late[drop > 1e-6] > 0.05).double().mean()) if bool((drop > 1e-6).any()) else 0.0
    return _check(
        "converged",
        share <= 0.5,
        f"in its last 10 of {steps} steps PGD still gains over 5 % of its progress on {share:.0%} of the images",
        "the attack had not converged: take more steps",
    )


def blackbox_is_weaker(white: Tensor, black: Tensor) -> Check:
    """Attacks without gradients must not break images (n,) bool that those with gradients leave standing."""
    excess = float((black & ~white).double().mean())
    return _check(
        "black-box is weaker",
        excess <= 0.002,
        f"query attacks break {excess:.1%} of the images that the white-box attacks leave standing",
        "queries beat gradients: the white-box attacks are masked, and their robust accuracy is too high",
    )


def larger_eps_is_stronger(eps: list[float], broken: list[float]) -> Check:
    """Success may only rise with the radius."""
    fall = max([0.0, *(a - b for a, b in itertools.pairwise(broken))])
    return _check(
        "larger eps is stronger",
        fall <= 0.02,
        f"over {len(eps)} radii the success never falls by more than {fall:.1%}",
        "success falls as the radius grows: the attack fails to use its room",
    )


@dataclass
class _Trace(Lens):
    """Notes the margin at every step and stops nothing."""

    losses: list[Tensor] = field(default_factory=list)

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, grad = self.oracle.gradient(x, loss, rows)
        self.losses.append(value)
        return value, grad


@contextmanager
def _calls() -> Iterator[set[Any]]:
    """The code of every Python function that is called while inside."""
    seen: set[Any] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        seen.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def _size(grad: Tensor) -> Tensor:
    """The largest entry of each image's gradient."""
    return grad.flatten(1).abs().amax(1)


def _meter(target: Target, images: Images, ball: Ball | None = None) -> Meter:
    return Meter(target, images.x, Goal(images.y), ball or Ball(INF, 1.0), seeks="optimum")


def _broken(target: Target, images: Images, ball: Ball, seed: int, attack: Attack) -> float:
    outcome = evade(attack, target, images, ThreatModel(Access.GRADIENTS, ball), seed=seed)
    return float(outcome.success.sum()) / max(1, int(outcome.attacked.sum()))


def _spread(scores: Tensor) -> float:
    return max(float(scores.std()), 1e-6)


def _check(name: str, fine: bool, evidence: str, advice: str) -> Check:
    return Check(name=name, passed=fine, evidence=evidence, advice="" if fine else advice)
