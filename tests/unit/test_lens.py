"""Oracles that an adversary builds on another oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from besiege.core.errors import AccessDenied
from besiege.core.images import Images
from besiege.core.lens import Bpda, Eot, Lens, Nes, Spsa, Surrogate, Transfer, straight_through
from besiege.core.meter import Meter
from besiege.core.method import make
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.evasion import evade
from besiege.engine.judge import judge

SHAPE = (1, 4, 4)
WEIGHT = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def smooth(x: Tensor) -> Tensor:
    hidden = x.flatten(1) @ WEIGHT.to(x).T
    return torch.stack([hidden[:, 0].square(), hidden[:, 1], (hidden[:, 2]).sin()], 1)


def target(call=smooth, access: Access = Access.GRADIENTS, **other: object) -> Target:
    return Target(call, access, 3, SHAPE, dtype=torch.float64, **other)


def images(n: int = 6) -> Images:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Images.of(x, smooth(x).argmax(1))


def meter(of: Target, n: int = 6, **other: object) -> Meter:
    toy = images(n)
    return Meter(of, toy.x, Goal(toy.y), Ball(INF, 0.1), **other)


def streams(n: int = 6) -> Rng:
    return Rng.of(0, torch.arange(n), "lens")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


@pytest.mark.parametrize("lens", [Nes, Spsa])
def test_scores_alone_give_the_gradient(lens):
    exact_value, exact = meter(target()).gradient(images().x)
    scores_only = meter(target(access=Access.SCORES))
    value, estimate = lens(scores_only, streams(), samples=600).gradient(images().x)
    assert bool((cosine(estimate, exact) >= 0.9).all())
    assert torch.allclose(estimate, exact, atol=0.5 * float(exact.abs().max()))
    assert torch.equal(value, exact_value)
    assert scores_only.forward.tolist() == [601] * 6
    assert scores_only.backward.tolist() == [0] * 6


@pytest.mark.parametrize("lens", [Nes, Spsa])
def test_an_image_that_has_fallen_is_asked_about_once(lens):
    x, m = images().x, meter(target(access=Access.SCORES))
    x[:2] = images().x.flip(0)[:2]
    m.outer = m.aim = Goal(torch.cat([(smooth(x[:2]).argmax(1) + 1) % 3, smooth(x[2:]).argmax(1)]))
    m.x = x
    value, estimate = lens(m, streams(), samples=600).gradient(x)
    assert m.forward.tolist() == [1, 1] + [601] * 4
    assert bool((value[:2] < 0).all()) and bool((estimate[:2] == 0).all())


@pytest.mark.parametrize("lens", [Nes, Spsa])
def test_an_estimate_of_a_linear_slope_is_unbiased(lens):
    straight = target(lambda x: x.flatten(1) @ WEIGHT.T, Access.SCORES)
    exact = meter(replace(straight, access=Access.GRADIENTS)).gradient(images().x)[1]
    m = meter(straight, seeks="optimum")
    tool = lens(m, streams(), samples=50)
    mean = torch.stack([tool.gradient(images().x)[1] for _ in range(100)]).mean(0)
    assert bool((cosine(mean, exact) > 0.98).all())
    assert torch.allclose(mean.flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1), rtol=0.1)


@pytest.mark.parametrize("lens", [Nes, Spsa])
def test_an_estimate_of_a_row_is_that_of_the_row_alone(lens):
    together = lens(meter(target(), seeks="optimum"), streams(), samples=10)
    first, second = (together.gradient(images().x)[1] for _ in range(2))
    assert not torch.equal(first, second)
    toy = images()
    alone = Meter(target(), toy.x[3:4], Goal(toy.y[3:4]), Ball(INF, 0.1), seeks="optimum")
    again = lens(alone, Rng.of(0, torch.tensor([3]), "lens"), samples=10)
    assert torch.allclose(again.gradient(toy.x[3:4])[1], first[3:4])
    some = lens(meter(target(), seeks="optimum"), streams(), samples=10)
    assert torch.allclose(some.gradient(toy.x[[3, 1]], rows=torch.tensor([3, 1]))[1], first[[3, 1]])


@pytest.mark.parametrize("lens", [Nes, Spsa])
def test_a_white_box_attack_runs_where_only_scores_are_granted(lens):
    toy = images(20)
    narrow = target(access=Access.SCORES)

    def through(oracle: Meter, x: Tensor, rng: Rng) -> Oracle:
        return lens(oracle, rng, samples=100)

    threat = ThreatModel(Access.SCORES, Ball(INF, 0.2))
    white = evade(make("pgd", steps=10), target(), toy, replace(threat, access=Access.GRADIENTS))
    attack = make("pgd", steps=10)
    black = evade(attack, narrow, toy, threat, lens=through)
    assert judge(black, narrow, toy).success.sum() >= 0.75 * white.success.sum() > 5
    assert int(black.backward.sum()) == 0
    alone = evade(attack, narrow, toy[7:8], threat, lens=through)
    assert torch.allclose(alone.adv, black.adv[7:8], atol=1e-6)


def test_rounding_hides_the_gradient_and_bpda_brings_it_back():
    def coarse(x: Tensor) -> Tensor:
        return (x * 32).round() / 32

    defended = target(lambda x: smooth(coarse(x)))
    m = meter(defended)
    assert float(m.gradient(images().x)[1].abs().max()) == 0
    lens = Bpda(m, lambda x: smooth(straight_through(coarse)(x)))
    value, grad = lens.gradient(images().x)
    expected = meter(target()).gradient(coarse(images().x))
    assert torch.allclose(value, expected[0])
    assert torch.allclose(grad, expected[1])
    assert m.forward.tolist() == [2] * 6
    assert m.backward.tolist() == [2] * 6
    assert torch.equal(lens.labels(images().x), m.labels(images().x))


def test_through_bpda_the_last_try_stands_for_the_images_that_are_left():
    toy, of = images(24), target()
    sizes = (0.005, 0.02, 0.2)
    fell = []
    for eps in sizes:
        threat = ThreatModel(Access.GRADIENTS, Ball(INF, eps))
        plain = evade(make("bim"), of, toy, threat)
        through = evade(make("bim"), of, toy, threat, lens=lambda m, x, rng: Bpda(m, smooth))
        assert torch.equal(through.adv, plain.adv) and torch.equal(through.forward, plain.forward)
        fell.append(float(plain.success.double().mean()))
    assert fell[0] < 0.3 < fell[-1] < 1


def test_straight_through_steps_forwards_and_is_smooth_backwards():
    x = torch.tensor([0.2, 0.7], requires_grad=True)
    y = straight_through(torch.round, lambda t: 3 * t)(x)
    assert y.tolist() == pytest.approx([0, 1])
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [3, 3]


def test_eot_averages_the_gradient_over_a_random_shift():
    def shift(x: Tensor, rng: Rng) -> Tensor:
        moves = rng.below(2)
        return torch.stack([torch.roll(image, int(k), -1) for image, k in zip(x, moves, strict=True)])

    m = meter(target(), seeks="optimum")
    value, grad = Eot(m, streams(), shift, samples=100).gradient(images().x)
    still = meter(target(), seeks="optimum")
    stay, stay_grad = still.gradient(images().x)
    rolled, rolled_grad = still.gradient(images().x.roll(1, -1))
    share = (value - stay) / (rolled - stay)  # how often each image was shifted
    assert bool(((share - 0.5).abs() < 0.15).all())
    expected = stay_grad + share[:, None, None, None] * (rolled_grad.roll(-1, -1) - stay_grad)
    assert torch.allclose(grad, expected)
    assert m.forward.tolist() == [100] * 6


def test_eot_without_a_transformation_is_the_gradient_itself():
    exact = meter(target()).gradient(images().x)
    averaged = Eot(meter(target(), seeks="optimum"), streams(), samples=3).gradient(images().x)
    assert torch.allclose(averaged[0], exact[0])
    assert torch.allclose(averaged[1], exact[1])


def test_a_surrogate_costs_the_target_nothing():
    labels_only = target(access=Access.LABELS)
    m = meter(labels_only)
    lens = Surrogate(m, target(lambda x: 2 * smooth(x)), images().x)
    value, grad = lens.gradient(images().x)
    expected = meter(target()).gradient(images().x)
    assert torch.allclose(grad, 2 * expected[1])
    assert torch.allclose(value, 2 * expected[0])
    assert m.forward.tolist() == [0] * 6
    assert lens.is_adversarial(images().x).tolist() == [False] * 6
    assert m.forward.tolist() == [1] * 6


def test_a_surrogate_aims_where_the_goal_does():
    m, x = meter(target(access=Access.LABELS)), images().x
    aim = torch.full((6,), 2)
    aimed = Surrogate(m, target(), x).toward(aim)
    expected = meter(target()).toward(aim).gradient(x)
    assert torch.equal(aimed.gradient(x)[1], expected[1])
    assert torch.equal(aimed.gradient(x)[0], expected[0])
    assert not torch.equal(expected[1], meter(target()).gradient(x)[1])


def test_a_transfer_has_the_surrogates_slope_and_the_targets_word():
    """The surrogate knows no class but 0, so its margin alone would never fall."""
    m, x = (
        meter(target(access=Access.LABELS)),
        torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(9)).double(),
    )
    known = target(lambda x: smooth(x) + torch.tensor([50.0, 0, 0], dtype=torch.float64))
    lens = Transfer(m, known, images().x)
    value, slope = lens.gradient(x)
    hit = smooth(x).argmax(1) != images().y
    assert 0 < int(hit.sum()) < 6
    assert torch.equal(value < 0, hit)
    assert torch.equal(slope, Surrogate(m, known, images().x).gradient(x)[1])
    assert m.forward.tolist() == [1] * 6
    assert m.backward.tolist() == [0] * 6


def test_a_start_found_by_transfer_begins_a_search_by_labels():
    toy, narrow = images(12), target(access=Access.LABELS)
    near = target(lambda x: smooth(x) * 1.3 + 0.1)
    threat = ThreatModel(Access.LABELS, Ball(2, INF), queries=300)
    both = make("ddn|hopskipjump", opening=0.0, steps=30)
    led = evade(both, narrow, toy, threat, lens=lambda oracle, x, rng: Transfer(oracle, near, x))
    alone = evade(make("hopskipjump"), narrow, toy, threat)
    assert bool((led.forward <= 300).all())
    assert int(led.backward.sum()) == 0
    assert torch.equal(judge(led, narrow, toy).success, led.success)
    assert bool(led.success[alone.success].all())
    least = evade(make("fmn"), target(), toy, ThreatModel(Access.GRADIENTS, Ball(2, INF))).distance
    assert float((led.distance / least).median()) < 1.1


@pytest.mark.parametrize("lens", [Nes, Spsa, Eot])
def test_a_lens_gets_no_more_than_the_target_grants(lens):
    with pytest.raises(AccessDenied, match="grants labels"):
        evade(
            make("pgd", steps=2),
            target(access=Access.LABELS),
            images(),
            ThreatModel(Access.WEIGHTS, Ball(INF, 0.1)),
            lens=lambda oracle, x, rng: lens(oracle, rng),
        )


def test_a_surrogate_attack_spends_one_query_an_image():
    toy = images(20)
    narrow = target(access=Access.LABELS)
    out = evade(
        make("fgsm"),
        narrow,
        toy,
        ThreatModel(Access.LABELS, Ball(INF, 0.3)),
        lens=lambda oracle, x, rng: Surrogate(oracle, target(), x),
    )
    white = evade(make("fgsm"), target(), toy, ThreatModel(Access.GRADIENTS, Ball(INF, 0.3)))
    assert torch.equal(out.success, white.success)
    assert int(out.success.sum()) >= 3
    assert int(out.forward.max()) <= 2  # the last try, and its confirmation
    assert judge(out, narrow, toy).success.sum() == out.success.sum()


@pytest.mark.parametrize("lens", ["nes", "eot", "surrogate"])
def test_a_lens_follows_when_rows_are_dropped(lens):
    m = meter(target())
    tool = {
        "nes": lambda: Nes(m, streams(), samples=10),
        "eot": lambda: Eot(m, streams(), samples=2),
        "surrogate": lambda: Surrogate(m, target(), m.x),
    }[lens]()
    reference = {
        "nes": lambda o: Nes(o, streams(), samples=10),
        "eot": lambda o: Eot(o, streams(), samples=2),
        "surrogate": lambda o: Surrogate(o, target(), m.x),
    }[lens](meter(target()))
    expected = reference.gradient(images().x)[1]
    m.retire(torch.tensor([1, 2, 5]))
    (x,) = tool.live(images().x)
    assert len(x) == 3
    assert torch.allclose(tool.gradient(x)[1], expected[[0, 3, 4]])


def test_a_lens_passes_every_other_question_on():
    m, x = meter(target(), seeks="optimum"), images().x
    lens = Lens(m)
    assert torch.equal(lens.loss(x), m.loss(x))
    assert torch.equal(lens.scores(x), m.scores(x))
    assert torch.equal(lens.gradient(x)[1], m.gradient(x)[1])
    classes = torch.zeros(6, 1).long()
    assert torch.equal(lens.jacobian(x, classes)[1], m.jacobian(x, classes)[1])
    assert lens.classes == 3
    toward = lens.toward(torch.full((6,), 2))
    assert toward.goal.targeted
    assert not lens.goal.targeted
