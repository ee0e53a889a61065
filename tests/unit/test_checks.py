"""Each check of an audit fires on a model built to trigger it and is silent on a plain network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from besiege.audit.checks import (
    blackbox_is_weaker,
    check_passes,
    check_target,
    converged,
    iterating_helps,
    larger_eps_is_stronger,
    smooth,
)
from besiege.core.images import Images
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball
from besiege.data import open_images
from besiege.targets import open_target

IMAGES = open_images("embedded:digits", limit=16)
IMAGES = replace(IMAGES, x=(IMAGES.x * 255).round() / 255)
PLAIN = open_target("embedded:digits-cnn", data=IMAGES)
BALL = Ball(INF, 0.1)
NAMES = [
    "repeatable",
    "batch-independent",
    "plain forward",
    "logits",
    "gradients",
    "smooth",
    "iterating helps",
    "unbounded attack",
    "converged",
]


class Of(nn.Module):
    """The plain network behind, or before, something."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


def steep(x: Tensor) -> Tensor:
    """Logits a hundred times as large: the softmax saturates, the margin keeps its slope."""
    return 100 * PLAIN.call(x)


def saturated(x: Tensor) -> Tensor:
    """A softmax at a hundredth of the temperature: the gradient underflows."""
    return steep(x).softmax(1).clamp_min(1e-30).log()


def probabilities(x: Tensor) -> Tensor:
    return PLAIN.call(x).softmax(1)


def rounded(x: Tensor) -> Tensor:
    """Shattered: flat everywhere but at the steps."""
    return PLAIN.call((x * 8).round() / 8)


def wavy(x: Tensor) -> Tensor:
    """Shattered: the slope is that of a ripple which the classifier hardly feels."""
    return PLAIN.call(x + 0.05 * torch.sin(400 * x))


def jagged(x: Tensor) -> Tensor:
    """Unstable: neighbours that differ by less than a grey level have other scores."""
    return PLAIN.call(x) * (1 + (1e5 * x.flatten(1).sum(1, keepdim=True)).sin())


def random(x: Tensor) -> Tensor:
    return PLAIN.call(x + 0.1 * torch.randn_like(x))


def detached(x: Tensor) -> Tensor:
    """The gradient is zero."""
    return PLAIN.call(x.detach()) + 0 * x.sum()


def endless(x: Tensor) -> Tensor:
    """The gradient is no number."""
    return PLAIN.call(x) + (0 * x.flatten(1).sum(1, keepdim=True)).sqrt() * 0


def batched(x: Tensor) -> Tensor:
    """Scores are normalized over the batch."""
    scores = PLAIN.call(x)
    return 3 * (scores - scores.mean(0)) / (scores.std(0, unbiased=False) + 0.1)


def deceptive(x: Tensor) -> Tensor:
    """The gradient is right at images of 8-bit pixels alone and points uphill everywhere else."""
    levels = (x.detach() * 255).round() / 255
    right = (x.detach() - levels).flatten(1).abs().amax(1) < 1e-6
    sign = torch.where(right, 1.0, -1.0).reshape(-1, 1, 1, 1)
    return PLAIN.call(x.detach() + sign * (x - x.detach()))


def purified(x: Tensor) -> Tensor:
    """Takes a step of its own before it answers."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(PLAIN.call(leaf).logsumexp(1).sum(), leaf)
    return PLAIN.call(x + 1e-3 * grad)


def target(how: Callable[[Tensor], Tensor]) -> Target:
    return Target.of(Of(how), classes=10, shape=(1, 28, 28))


def right(victim: Target) -> Images:
    return IMAGES[(victim.labels(IMAGES.x) == IMAGES.y).nonzero().squeeze(1)]


def fired(how: Callable[[Tensor], Tensor]) -> set[str]:
    torch.manual_seed(0)
    victim = target(how)
    checks = check_target(victim, right(victim), BALL)
    assert all(check.evidence and bool(check.advice) != check.passed for check in checks)
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("ball", [BALL, Ball(2.0, 1.5)])
def test_the_plain_network_raises_nothing(ball: Ball) -> None:
    checks = check_target(PLAIN, right(PLAIN), ball)
    assert [check.name for check in checks] == NAMES
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (steep, {"gradients"}),
        (saturated, {"gradients", "smooth", "unbounded attack"}),
        (probabilities, {"logits"}),
        (rounded, {"gradients", "smooth", "unbounded attack"}),
        (wavy, {"smooth"}),
        (jagged, {"smooth"}),
        (random, {"repeatable"}),
        (detached, {"gradients", "smooth", "unbounded attack"}),
        (endless, {"gradients", "smooth", "unbounded attack"}),
        (batched, {"batch-independent"}),
        (deceptive, {"iterating helps", "unbounded attack"}),
        (purified, {"plain forward"}),
    ],
)
def test_a_check_fires(how: Callable[[Tensor], Tensor], expected: set[str]) -> None:
    assert expected <= fired(how)


def test_masked_logits_are_told_from_lost_ones() -> None:
    said = {how: check_passes(target(how), right(PLAIN), BALL)[4] for how in (steep, detached)}
    assert "100% have" in said[steep].evidence and "0% of the margin" in said[steep].evidence
    assert "attack the logits" in said[steep].advice
    assert "100% of the margin" in said[detached].evidence and "bpda" in said[detached].advice


def test_a_narrow_door_is_asked_no_gradient() -> None:
    shut = {access: PLAIN.granting(access) for access in (Access.LABELS, Access.SCORES)}
    assert [check.name for check in check_target(shut[Access.SCORES], right(PLAIN), BALL)] == NAMES[:4]
    assert [check.name for check in check_target(shut[Access.LABELS], right(PLAIN), BALL)] == NAMES[:3]


def test_the_profiler_of_the_process_is_left_as_it_was() -> None:
    before = sys.getprofile()
    check_passes(PLAIN, right(PLAIN), BALL)
    assert sys.getprofile() is before


def test_one_step_that_beats_many_is_told() -> None:
    check = iterating_helps(target(deceptive), right(PLAIN), BALL, seed=0)
    assert not check.passed and "twenty break 0%" in check.evidence


def test_the_ripple_shows_over_a_step_and_not_in_noise() -> None:
    check = smooth(target(wavy), right(PLAIN), BALL, seed=0)
    assert not check.passed and "as foretold for 0%" in check.evidence
    check = smooth(target(jagged), right(PLAIN), BALL, seed=0)
    assert not check.passed and int(check.evidence.split("by ")[-1].rstrip("%")) > 50


def test_an_attack_that_still_gains_has_not_converged() -> None:
    assert not converged(PLAIN, right(PLAIN), BALL, seed=0, steps=12).passed
    assert converged(PLAIN, right(PLAIN), BALL, seed=0, steps=100).passed


def test_queries_that_beat_gradients_are_told() -> None:
    white = torch.tensor([True] * 400 + [False] * 100)
    black = torch.zeros(500, dtype=torch.bool)
    assert blackbox_is_weaker(white, white).passed
    assert blackbox_is_weaker(white, black.clone().index_fill(0, torch.tensor([499]), True)).passed
    few = blackbox_is_weaker(white, black.clone().index_fill(0, torch.tensor([498, 499]), True))
    assert not few.passed and "0.4%" in few.evidence


def test_a_radius_that_helps_less_is_told() -> None:
    assert larger_eps_is_stronger([0.1, 0.2, 0.4], [0.2, 0.5, 0.49]).passed
    assert not larger_eps_is_stronger([0.1, 0.2, 0.4], [0.2, 0.5, 0.4]).passed
