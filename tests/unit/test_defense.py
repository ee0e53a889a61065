"""Defenses measured: before, against who does not know them, and against who does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import EVASIVE, GUARDS, configured, make, method, of_kind, registry
from besiege.core.shield import Shield
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, ThreatModel, rowwise
from besiege.defenses.training.adversarial_training import climbed, wrong
from besiege.engine.defense import Hardened, knowing, measured, trained
from besiege.engine.evasion import evade
from besiege.results.defense import Defense, verdict
from besiege.results.record import Record, figures

BALL = Ball(INF, 0.1)


def images(n: int = 40, seed: int = 0) -> Images:
    """Two classes: the left or the right half is brighter by 0.1, under noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.4 + 0.1 * torch.rand(n, 1, 4, 4, generator=draw)
    x[y == 0, :, :, :2] += 0.1
    x[y == 1, :, :, 2:] += 0.1
    return Images.of(x, y)


def linear() -> Target:
    """The brighter half, told exactly."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4)
    with torch.no_grad():
        module[1].weight.copy_(torch.stack([weight, -weight]))
    return Target.of(module, classes=2, shape=(1, 4, 4), name="linear")


class Steps(Shield):
    """Rounds to tenths, which hides the gradient."""

    def forward(self, x: Tensor) -> Answer:
        return self.inner.answer((x * 10).round() / 10)

    def softened(self, x: Tensor) -> Answer:
        return self.inner.answer(x + ((x * 10).round() / 10 - x).detach())


class Corner(Shield):
    """Rejects what is bright in its corner, which an attack need not make it."""

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.inner.answer(x).scores, (x[:, 0, 0, 0] - 0.45) * 20)


def measure(shield: Shield, target: Target, attack: str = "pgd") -> Defense:
    hardened = Hardened(target, shield.target("shield"), 0.0)
    fake = configured(method("adversarial-training"))
    return measured(
        fake,
        hardened,
        images(),
        [(make(attack), ThreatModel(Access.GRADIENTS, BALL))],
        make("autoattack", queries=50),
        calibration=images(8, 1),
    )


def test_a_hidden_gradient_stops_nobody_who_knows():
    target = linear()
    record = measure(Steps(target), target)
    (row,) = record.rows
    assert row.undefended.success_rate == 1
    assert row.adaptive.success_rate == 1
    assert row.verdict == record.verdict == "fallen"
    assert row.detected is None and record.fpr is None
    blind = evade(make("pgd"), Steps(target).target("s"), images(), ThreatModel(Access.GRADIENTS, BALL))
    assert blind.success.float().mean() < 0.5


def test_a_detector_rejects_whom_it_knows_and_not_whom_knows_it():
    target = linear()
    x = images()
    bright = replace(x, x=torch.where(torch.arange(16).view(1, 1, 4, 4) == 0, 0.4, x.x))
    hardened = Hardened(target, Corner(target).target("corner"), 0.0)
    fake = configured(method("adversarial-training"))
    toward = [(make("pgd"), ThreatModel(Access.GRADIENTS, BALL))]
    record = measured(fake, hardened, bright, toward, make("autoattack"), calibration=images(8, 1))
    (row,) = record.rows
    assert record.fpr == 0
    assert row.detected is not None and row.detected_adaptive is not None
    blind = evade(make("pgd"), target, bright, ThreatModel(Access.GRADIENTS, BALL))
    caught = float((blind.adv[:, 0, 0, 0] > 0.45).float().mean())
    assert 0.2 < caught < 0.8
    assert row.detected.tpr == pytest.approx(caught)
    assert row.detected_adaptive.tpr == 0
    assert row.adaptive.success_rate == 1
    assert row.defended.success_rate == pytest.approx(1 - caught)
    assert row.verdict == "fallen"


def test_clean_images_that_are_rejected_are_lost():
    target = linear()
    record = measure(Corner(target), target)
    said = images().x[:, 0, 0, 0] > 0.45
    assert record.fpr == pytest.approx(float(said.float().mean()))
    assert record.clean_accuracy == 1
    assert record.clean_accuracy_defended == pytest.approx(1 - record.fpr)


def told(record: Record, fell: int, distance: float | None = None, eps: float | None = 0.1) -> Record:
    """The record, had the first ``fell`` images fallen."""
    rows = record.images.model_copy(update={"success": [k < fell for k in range(40)]})
    return record.model_copy(
        update={
            "images": rows,
            **figures(rows, 0),
            "median_distance": distance,
            "threat": record.threat.model_copy(update={"eps": eps}),
        }
    )


@pytest.mark.parametrize(
    ("before", "after", "knowing", "said"),
    [(40, 2, 40, "fallen"), (40, 2, 36, "fallen"), (40, 2, 20, "weakened"), (40, 2, 3, "not refuted")],
)
def test_a_verdict_follows_the_images_that_fell(before, after, knowing, said):
    target = linear()
    record = measure(Steps(target), target).rows[0].undefended
    assert verdict(told(record, before), told(record, after), told(record, knowing)) == said


def test_a_few_images_do_not_show_that_a_defense_helps():
    target = linear()
    record = measure(Steps(target), target).rows[0].undefended
    assert verdict(told(record, 6), told(record, 0), told(record, 3)) == "fallen"
    assert verdict(told(record, 8), told(record, 0), told(record, 2)) != "fallen"
    assert verdict(told(record, 1), told(record, 0), told(record, 0)) == "not refuted"


def test_falling_only_far_away_is_not_falling():
    target = linear()
    record = measure(Steps(target), target).rows[0].undefended
    near, far = told(record, 40, 1.0, None), told(record, 40, 2.1, None)
    assert verdict(near, near, far) != "fallen"
    assert verdict(near, near, told(record, 40, 1.9, None)) == "fallen"


def test_who_knows_asks_through_the_softened_shield():
    shield = Steps(linear())
    x = images()
    found = evade(make("pgd"), shield.target("s"), x, ThreatModel(Access.GRADIENTS, BALL), lens=knowing(shield))
    assert found.success.all()


TINY = Fit(
    lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes)),
    "tiny",
    epochs=10,
    batch=16,
    lr=0.1,
)


def torn(n: int = 160) -> Images:
    """Two classes with a strong sign that is sometimes missing, and a weak one that is always there."""
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 2
    sign = rowwise(1.0 - 2 * y.float(), torch.zeros(n, 1, 4, 4))
    x = 0.425 + 0.15 * torch.rand(n, 1, 4, 4, generator=draw)
    x[:, :, :2] += 0.1 * sign * (torch.rand(n, 1, 2, 4, generator=draw) > 0.15)
    x[:, :, 2:] += 0.04 * sign
    return Images.of(x, y)


@pytest.mark.parametrize(
    ("name", "options"),
    [("adversarial-training", {"mode": mode}) for mode in ("fast", "pgd", "fgsm")] + [("trades", {})],
)
def test_adversarial_training_moves_the_boundary_away(name, options):
    x = torn()
    hardened = trained(configured(method(name), eps=0.05, **options), TINY, x, 0, classes=2)
    both = (hardened.undefended, hardened.defended)
    near = [evade(make("deepfool"), t, x, ThreatModel(Access.GRADIENTS, Ball(INF, INF))).distance for t in both]
    fell = [evade(make("pgd"), t, x, ThreatModel(Access.GRADIENTS, Ball(INF, 0.05))).success.sum() for t in both]
    assert near[1][near[1].isfinite()].mean() > 1.2 * near[0][near[0].isfinite()].mean()
    assert fell[1] < 0.7 * fell[0]
    assert (hardened.defended.labels(x.x) == x.y).float().mean() > 0.95


def test_a_static_set_teaches_its_own_images_and_no_others():
    x = torn()
    hardened = trained(configured(method("adversarial-training"), mode="static", eps=0.05), TINY, x, 0, classes=2)
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, 0.05))
    old = evade(make("pgd"), hardened.undefended, x, threat)
    fooled = old.success.nonzero().squeeze(1)
    assert len(fooled) > 20
    assert (hardened.defended.labels(old.adv[fooled]) == x.y[fooled]).float().mean() > 0.7
    assert evade(make("pgd"), hardened.defended, x, threat).success.sum() > 0.5 * len(fooled)


def test_the_inner_attack_reaches_the_corner_of_the_ball_on_a_linear_network():
    target, x = linear(), images()
    assert target.module is not None
    start = BALL.sample(x.x, _Fixed())
    adv = climbed(target.module, x.x, wrong(x.y), BALL, start, 10)
    up = rowwise(1.0 - 2 * x.y.float(), x.x)
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4).view(1, 1, 4, 4)
    assert torch.allclose(adv, (x.x - 0.1 * up * weight).clamp(0, 1), atol=1e-6)


class _Fixed:
    def rand(self, *shape: int) -> Tensor:
        return torch.rand(40, *shape, generator=torch.Generator().manual_seed(0))


def test_distilled_networks_hide_their_gradient_and_only_that():
    x = images(200)
    hardened = trained(configured(method("defensive-distillation"), temperature=1000.0), TINY, x, 0, classes=2)
    shield = hardened.defended.module
    assert isinstance(shield, Shield)
    assert torch.equal(hardened.defended.labels(x.x), shield.softened(x.x).scores.argmax(1))
    leaf = x.x.clone().requires_grad_()
    hidden = torch.autograd.grad(hardened.defended.answer(leaf).scores.sum(), leaf)[0]
    open_ = torch.autograd.grad(shield.softened(leaf).scores[:, 0].sum(), leaf)[0]
    assert (hidden.flatten(1).abs().sum(1) == 0).float().mean() > 0.5
    assert (open_.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", of_kind(*GUARDS))
def test_a_defense_says_what_it_counters_and_what_knows_it(name):
    card = registry()[name].card
    assert card.family == "defense"
    assert card.adaptive
    assert card.counters
    assert set(card.counters) <= set(registry())
    assert not set(card.counters) & set(of_kind(*GUARDS))


def test_no_evasion_is_a_defense():
    assert not set(of_kind(*EVASIVE)) & set(of_kind(*GUARDS))
