"""A row is alone: what happens to an image depends on nothing but that image, the seed and the method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import CARDS, EPS, Watch, cases, curved, differences, fire, names_in, pairs, shape_for, sure

from besiege.core.rng import Rng, Stream
from besiege.core.threat import NORM_NAMES, Access
from besiege.engine import evasion
from besiege.engine.judge import judge
from besiege.regions import within


def test_the_toy_itself_computes_each_row_alone():
    toy = curved(n=17)
    x = toy.images.x.double().requires_grad_()
    scores = toy.model(x)
    (grad,) = torch.autograd.grad(scores.square().sum(), x)
    for i in range(17):
        alone = toy.images.x[i : i + 1].double().requires_grad_()
        assert torch.equal(toy.model(alone), scores[i : i + 1])
        assert torch.equal(torch.autograd.grad(toy.model(alone).square().sum(), alone)[0], grad[i : i + 1])


@pytest.mark.parametrize(("name", "norm"), cases())
def test_alone_and_in_a_batch_are_equal(name, norm):
    toy = curved(shape_for(norm), n=5)
    together = fire(name, norm, toy)
    for i in range(5):
        assert differences(fire(name, norm, toy, toy.images[i : i + 1]), together, slice(i, i + 1)) == []


@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.kind == "universal"))
def test_alone_and_in_a_batch_are_equal_in_double_precision_too(name, norm):
    toy = curved((3, 7, 5), n=24, images=torch.float64)
    together = fire(name, norm, toy, eps=3 * EPS[norm])
    for i in range(24):
        assert (
            differences(fire(name, norm, toy, toy.images[i : i + 1], eps=3 * EPS[norm]), together, slice(i, i + 1))
            == []
        )


@pytest.mark.parametrize(("name", "norm"), cases())
def test_order_batch_size_and_shards_do_not_matter(name, norm, monkeypatch):
    toy = curved(shape_for(norm), n=5)
    whole = fire(name, norm, toy)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert differences(fire(name, norm, toy, toy.images[order]), whole, order.tolist()) == []
    monkeypatch.setattr(evasion, "SHARD_PIXELS", 1)
    assert differences(fire(name, norm, toy, batch=2), whole) == []


@pytest.mark.parametrize(("name", "norm"), cases())
def test_how_the_images_lie_in_memory_does_not_matter(name, norm):
    toy = curved(shape_for(norm), n=5)
    turned = replace(toy.images, x=toy.images.x.transpose(2, 3).contiguous().transpose(2, 3))
    assert not turned.x.is_contiguous()
    assert differences(fire(name, norm, toy, turned), fire(name, norm, toy)) == []


@pytest.mark.parametrize(("name", "norm"), cases())
def test_a_seed_decides_every_draw(name, norm, monkeypatch):
    toy, drawn = curved(shape_for(norm), n=5), []

    def spied(method):
        def call(self, *shape):
            drawn.append(method)
            return method(self, *shape)

        return call

    for owner, draw in [(Rng, "bits"), *((Stream, d) for d in ("rand", "randn", "signs", "below"))]:
        monkeypatch.setattr(owner, draw, spied(getattr(owner, draw)))
    torch.manual_seed(1)
    one = fire(name, norm, toy, seed=3)
    random = bool(drawn)
    torch.manual_seed(2)
    assert differences(fire(name, norm, toy, seed=3), one) == []
    equal = torch.equal(fire(name, norm, toy, seed=4).adv, one.adv)
    spare = CARDS[name].start and CARDS[name].access == Access.GRADIENTS  # a start is drawn, and seldom needed
    assert equal != random or spare


@pytest.mark.parametrize(("name", "norm"), cases())
def test_nothing_that_was_handed_over_changes(name, norm):
    toy = curved(shape_for(norm), n=5)
    x, y, fitted = toy.images.x.clone(), toy.images.y.clone(), toy.training.x.clone()
    weights = [w.clone() for w in toy.model.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        without = fire(name, norm, toy)
        assert not torch.is_grad_enabled()
    assert differences(fire(name, norm, toy), without) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(toy.images.x, x)
    assert torch.equal(toy.images.y, y)
    assert torch.equal(toy.training.x, fitted)
    assert all(torch.equal(a, b) for a, b in zip(toy.model.parameters(), weights, strict=True))


@pytest.mark.parametrize(("name", "norm"), cases())
def test_what_is_found_lies_in_the_ball_and_is_confirmed(name, norm):
    toy = curved(shape_for(norm), n=5)
    watch = Watch(toy.model)
    outcome = fire(name, norm, toy, model=watch, eps=EPS[norm])
    verdict = judge(outcome, toy.target(), toy.images)
    assert torch.equal(verdict.success, outcome.success)
    assert watch.low >= 0
    assert watch.high <= 1
    won = outcome.success
    size, slack = sizes(norm, outcome.adv, toy.images.x), 0.02 if isinstance(norm, str) else 1e-6
    assert bool((size[won] <= EPS[norm] * (1 + slack) + 1e-7).all())
    assert torch.allclose(outcome.distance[won].double(), size[won].double(), rtol=1e-5)
    assert bool((outcome.needed[won] > 0).all())
    assert bool((outcome.needed <= outcome.forward).all())
    if CARDS[name].seeks == "success":
        assert torch.equal(outcome.adv[~won], toy.images.x[~won])
        assert bool(outcome.distance[~won].isinf().all())
        assert bool((outcome.needed[~won] == -1).all())


def sizes(norm, adv, x):
    if isinstance(norm, str):
        return within(norm, 1.0).distance(adv, x)
    delta = (adv - x).double().flatten(1)
    return (delta.view(5, 1, -1).abs().amax(1) > 0).sum(1) if norm == 0 else torch.linalg.vector_norm(delta, norm, 1)


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_no_two_methods_find_the_same(norm):
    """But for an ensemble, which finds what its parts find."""
    toy = curved(shape_for(norm), n=5)
    found = {name: fire(name, norm, toy).adv for name in names_in(norm, lambda card: card.kind != "ensemble")}
    assert [f"{a} = {b}" for a, b in pairs(list(found)) if torch.equal(found[a], found[b])] == []


@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.targeted and sure(card)))
def test_a_class_can_be_the_goal(name, norm):
    toy = curved(shape_for(norm), n=8)
    outcome = fire(name, norm, toy, target_class=2, eps=None if CARDS[name].seeks == "minimum" else 4 * EPS[norm])
    assert torch.equal(outcome.attacked, toy.images.y != 2)
    assert bool((toy.target().labels(outcome.adv[outcome.success]) == 2).all())
    assert float(outcome.success[outcome.attacked].double().mean()) >= 0.6
