"""Budgets, counts and access, checked against the books of the model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import CARDS, Watch, cases, curved, fire, flat, quick, shape_for

from besiege.core.errors import AccessDenied, BadInput
from besiege.core.threat import INF, NORM_NAMES, Access, ThreatModel
from besiege.engine import evasion
from besiege.engine.evasion import evade
from besiege.regions import within


@pytest.mark.parametrize("budget", [1, 7, 37, 100])
@pytest.mark.parametrize(("name", "norm"), cases())
def test_a_budget_is_never_exceeded_and_every_row_is_counted(name, norm, budget):
    toy = curved(shape_for(norm), n=3)
    clean = toy.images.y
    watch = Watch(toy.model)
    together = fire(name, norm, toy, model=watch, queries=budget, clean=clean)
    assert bool((together.forward <= budget).all())
    assert watch.forward == int(together.forward.sum()) + together.setup_forward
    assert watch.backward == int(together.backward.sum()) + together.setup_backward
    alone = Watch(toy.model)
    one = fire(name, norm, toy, toy.images[:1], model=alone, queries=budget, clean=clean[:1])
    assert alone.forward - one.setup_forward == int(one.forward) <= budget


@pytest.mark.parametrize(("name", "norm"), cases())
def test_without_a_budget_every_row_is_counted(name, norm):
    toy = curved(shape_for(norm), n=3)
    watch = Watch(toy.model)
    outcome = fire(name, norm, toy, model=watch, clean=toy.images.y)
    assert watch.forward == int(outcome.forward.sum()) + outcome.setup_forward
    assert watch.backward == int(outcome.backward.sum()) + outcome.setup_backward
    if CARDS[name].access < Access.GRADIENTS:
        assert watch.backward == 0


@pytest.mark.parametrize(("name", "norm"), cases(first=True))
def test_the_declared_access_is_enough_and_less_is_refused(name, norm, monkeypatch):
    toy, card = curved(shape_for(norm), n=3), CARDS[name]
    narrow = toy.target().granting(card.access)
    fire(name, norm, toy, target=narrow)
    if card.access == Access.LABELS:
        return
    less = Access(card.access - 1)
    with pytest.raises(BadInput, match=f"needs {card.access.name.lower()}.*grants {less.name.lower()}"):
        fire(name, norm, toy, access=less)
    with pytest.raises(BadInput, match=f"grants {less.name.lower()}"):
        fire(name, norm, toy, target=narrow.granting(less))
    monkeypatch.setattr(evasion, "_fits", lambda *anything: None)
    with pytest.raises(AccessDenied):
        fire(name, norm, toy, access=less)


@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.kind != "search"))
def test_a_batch_costs_no_more_calls_than_one_image(name, norm):
    toy = curved(shape_for(norm), n=64)
    fixed = toy.model[-1].bias.clone()
    try:
        toy.model[-1].bias[0] = 1e6  # no way out, so nothing stops early
        images = replace(toy.images, y=torch.zeros_like(toy.images.y))
        one, many = Watch(toy.model), Watch(toy.model)
        fire(name, norm, toy, images[:1], model=one, clean=images.y[:1])
        fire(name, norm, toy, images, model=many, clean=images.y)
    finally:
        toy.model[-1].bias.copy_(fixed)
    assert many.calls <= 1.5 * one.calls


@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.kind == "search", first=True))
def test_a_search_asks_about_many_images_in_one_call(name, norm):
    toy = curved(shape_for(norm), n=32)
    one, many = Watch(toy.model), Watch(toy.model)
    fire(name, norm, toy, toy.images[:1], model=one, queries=100)
    fire(name, norm, toy, model=many, queries=100)
    assert many.forward > 16 * one.forward
    assert many.calls < 4 * one.calls


@pytest.mark.parametrize(("name", "norm"), cases(first=True))
def test_images_that_are_wrong_already_are_left_out_and_cost_nothing(name, norm):
    toy = curved(shape_for(norm), n=5)
    wrong = torch.tensor([False, True, False, False, True])
    images = replace(toy.images, y=torch.where(wrong, (toy.images.y + 1) % 3, toy.images.y))
    outcome = fire(name, norm, toy, images)
    assert torch.equal(outcome.attacked, ~wrong)
    assert torch.equal(outcome.clean, toy.images.y)
    assert int(outcome.forward[wrong].sum() + outcome.backward[wrong].sum()) == 0
    assert not bool(outcome.success[wrong].any())
    assert torch.equal(outcome.adv[wrong], images.x[wrong])
    whole = fire(name, norm, toy)
    assert torch.equal(outcome.adv[~wrong], whole.adv[~wrong])
    none = fire(name, norm, toy, replace(images, y=(toy.images.y + 1) % 3))
    assert not bool(none.attacked.any() or none.success.any())


@pytest.mark.parametrize(("name", "norm"), cases(first=True))
def test_what_does_not_fit_is_refused(name, norm):
    toy, card = curved(shape_for(norm), n=3), CARDS[name]
    good = ThreatModel(Access.WEIGHTS, within(norm, 0.1))
    for bad in set(NORM_NAMES) - set(card.norms):
        with pytest.raises(BadInput, match="works in"):
            evade(quick(name), toy.target(), toy.images, replace(good, ball=within(bad, 0.1)))
    with pytest.raises(BadInput, match="takes"):
        evade(quick(name), toy.target(), flat(3).images, good)
    with pytest.raises(BadInput, match="out of range"):
        evade(quick(name), toy.target(), replace(toy.images, y=toy.images.y + 9), good)
    with pytest.raises(BadInput, match="target class 3" if card.targeted else "untargeted"):
        evade(quick(name), toy.target(), toy.images, good, target_class=3)
    if card.seeks == "success":
        with pytest.raises(BadInput, match="radius"):
            evade(quick(name), toy.target(), toy.images, replace(good, ball=within(norm, INF)))
    if card.channels:
        other = curved((card.channels + 1, 8, 8), n=3)
        with pytest.raises(BadInput, match=f"takes images of {card.channels} channels"):
            evade(quick(name), other.target(), other.images, good)
    if card.kind == "universal":
        with pytest.raises(BadInput, match="give some"):
            evade(quick(name), toy.target(), toy.images, good)
