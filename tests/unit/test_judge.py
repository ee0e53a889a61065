"""The judge believes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from besiege.core.errors import BadOutcome
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, ThreatModel
from besiege.engine.evasion import Outcome, evade
from besiege.engine.judge import eight_bits, judge

EPS = 0.1


class Brighter(nn.Module):
    """Class 1 where the mean is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1) * 20


TARGET = Target.of(Brighter(), classes=2, shape=(1, 4, 4))
IMAGES = Images.of(
    torch.linspace(0.42, 0.55, 6)[:, None, None, None].expand(6, 1, 4, 4).contiguous(),
    torch.tensor([0, 0, 0, 0, 1, 1]),
)


def outcome(norm: float = INF, eps: float = EPS) -> Outcome:
    return evade(make("pgd", steps=5), TARGET, IMAGES, ThreatModel(Access.GRADIENTS, Ball(norm, eps)))


def test_an_honest_outcome_is_confirmed():
    claimed = outcome()
    verdict = judge(claimed, TARGET, IMAGES)
    assert claimed.success.tolist() == [True] * 6
    assert torch.equal(verdict.success, claimed.success)
    assert verdict.label.tolist() == [1, 1, 1, 1, 0, 0]
    assert torch.allclose(verdict.distance, claimed.distance.double(), atol=1e-6)
    assert bool((verdict.confidence > 0.5).all())


def moved_beyond(o):
    return replace(o, adv=(o.adv + 0.05).clamp(0, 1) * (o.adv > IMAGES.x) + o.adv * (o.adv <= IMAGES.x))


def out_of_the_box(o):
    adv = o.adv.clone()
    adv[2, 0, 0, 0] = -0.01
    return replace(o, adv=adv, threat=replace(o.threat, ball=Ball(INF, 5.0)))


def above_one(o):
    adv = o.adv.clone()
    adv[0, 0, 3, 3] = 1.0001
    return replace(o, adv=adv, threat=replace(o.threat, ball=Ball(INF, 5.0)))


def not_a_number(o):
    adv = o.adv.clone()
    adv[1, 0, 1, 1] = float("nan")
    return replace(o, adv=adv)


CORRUPTIONS = {
    "beyond eps": moved_beyond,
    r"leaves \[0, 1\]": out_of_the_box,
    r" \[0, 1\]": above_one,
    "not finite": not_a_number,
    "does not belong": lambda o: replace(o, adv=o.adv[:5]),
    "not belong": lambda o: replace(o, index=o.index.flip(0)),
    "images": lambda o: replace(o, adv=o.adv.expand(6, 3, 4, 4)),
}


@pytest.mark.parametrize("says", CORRUPTIONS)
def test_a_corrupted_outcome_is_refused(says):
    with pytest.raises(BadOutcome, match=says):
        judge(CORRUPTIONS[says](outcome()), TARGET, IMAGES)


@pytest.mark.parametrize(("norm", "eps"), [(0.0, 3.0), (1.0, 1.0), (2.0, 0.5)])
def test_every_norm_is_measured_again(norm, eps):
    honest = outcome()
    far = replace(honest, threat=replace(honest.threat, ball=Ball(norm, eps)), adv=(IMAGES.x + 0.4).clamp(0, 1))
    with pytest.raises(BadOutcome, match="beyond eps"):
        judge(far, TARGET, IMAGES)


def test_a_claim_that_the_target_does_not_confirm_is_no_success():
    claimed = replace(outcome(), adv=IMAGES.x.clone())
    verdict = judge(claimed, TARGET, IMAGES)
    assert verdict.success.tolist() == [False] * 6
    assert not bool(verdict.success_8bit.any())
    assert bool(verdict.distance.isinf().all())


def test_what_is_not_claimed_is_not_looked_at():
    honest = outcome()
    adv = honest.adv.clone()
    adv[3] = float("nan")
    verdict = judge(replace(honest, adv=adv, success=torch.arange(6) != 3), TARGET, IMAGES)
    assert verdict.success.tolist() == [True, True, True, False, True, True]


def test_a_targeted_claim_must_bear_its_class():
    honest = outcome()
    aimed = replace(honest, threat=replace(honest.threat, targeted=True), goal=torch.ones(6, dtype=torch.int64))
    assert judge(aimed, TARGET, IMAGES).success.tolist() == [True] * 4 + [False] * 2


def test_a_claim_that_a_detector_rejects_is_no_success():
    def rejecting(x: Tensor) -> Answer:
        return Answer(TARGET.call(x), excess=torch.tensor([1.0, -1.0]).repeat(3)[: len(x)])

    verdict = judge(outcome(), replace(TARGET, call=rejecting, module=None), IMAGES)
    assert verdict.success.tolist() == [False, True] * 3


def test_a_random_target_must_fall_most_of_the_time():
    calls = iter(range(10_000))

    def fickle(x: Tensor) -> Tensor:
        return TARGET.call(x if next(calls) % 3 else 1 - x)

    verdict = judge(outcome(), replace(TARGET, call=fickle, module=None, stochastic=True), IMAGES)
    assert verdict.success.tolist() == [True] * 6
    calls = iter(range(10_000))
    rarely = replace(TARGET, call=lambda x: fickle(1 - x), module=None, stochastic=True)
    assert judge(outcome(), rarely, IMAGES).success.tolist() == [False] * 6


def test_rounding_to_eight_bits_goes_toward_the_original():
    x = torch.tensor([[[[0.5, 0.5, 0.2, 100 / 255]]]])
    adv = torch.tensor([[[[0.5049, 0.4951, 0.2, 101 / 255]]]])
    assert (eight_bits(adv, x) * 255).flatten().tolist() == pytest.approx([128, 127, 51, 101])
    rounded = eight_bits(outcome().adv, IMAGES.x)
    grid = (rounded * 255).double()
    assert torch.allclose(grid, grid.round(), atol=1e-3)
    assert bool(
        ((rounded - IMAGES.x).abs() <= (outcome().adv - IMAGES.x).abs() + 1e-6)
        .logical_or(outcome().adv == IMAGES.x)
        .all()
    )


def test_a_success_that_rounding_undoes_is_told_apart():
    grey = Images.of(torch.full((1, 1, 4, 4), 127 / 255), torch.tensor([0]))
    honest = evade(make("pgd", steps=5), TARGET, grey, ThreatModel(Access.GRADIENTS, Ball(INF, 0.8 / 255)))
    verdict = judge(honest, TARGET, grey)
    assert verdict.success.tolist() == [True]
    assert verdict.success_8bit.tolist() == [False]
    wider = evade(make("pgd", steps=5), TARGET, grey, ThreatModel(Access.GRADIENTS, Ball(INF, 2 / 255)))
    assert judge(wider, TARGET, grey).success_8bit.tolist() == [True]


@pytest.mark.parametrize("norm", [0.0, 1.0, 2.0, INF])
def test_noise_of_the_same_size_is_tried_beside(norm):
    x = torch.full((40, 1, 4, 4), 0.5) - 1e-4
    near = Images.of(x, torch.zeros(40, dtype=torch.int64))
    shift = torch.full_like(x, 0.05)
    size = {0.0: 16.0, 1.0: 0.8, 2.0: 0.2, INF: 0.05}[norm]
    claimed = Outcome(
        "toy", ThreatModel(Access.LABELS, Ball(norm, size + 1e-5)), 0, near.index, near.y, near.y, near.y,
        torch.ones(40, dtype=torch.bool), x + shift, torch.ones(40, dtype=torch.bool), torch.full((40,), size),
        *(torch.zeros(40, dtype=torch.int64),) * 3, 0.0, 0.0, (),
    )  # fmt: skip
    verdict = judge(claimed, TARGET, near)
    assert bool(verdict.success.all())
    assert 8 <= int(verdict.noise.sum()) <= 32  # an even chance on either side of the boundary
    tiny = replace(
        claimed, success=torch.zeros(40, dtype=torch.bool), threat=replace(claimed.threat, ball=Ball(2, 1e-6))
    )
    assert not bool(judge(tiny, TARGET, near).noise.any())
