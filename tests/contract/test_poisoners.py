"""What every poisoning method keeps to."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache

import pytest
import torch
from torch import nn

from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Method, of_kind, registry
from besiege.core.poisoned import Knowledge, Poisoned, eight_bits
from besiege.core.rng import Rng
from besiege.engine.poisoning import proven

NAMES = list(of_kind("poisoning"))
RATED = [name for name in NAMES if "rate" in registry()[name].card.options]
QUICK = {"steps": 5, "restarts": 2}

FIT = Fit(
    lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, classes)),
    "tiny",
    epochs=3,
    batch=16,
    lr=0.1,
)


def stripes(n: int, classes: int, seed: int = 0) -> Images:
    """Each class is bright in rows of its own."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.rand(n, 1, 12, 12, generator=draw) * 0.5
    for label in range(classes):
        x[y == label, :, 4 * label : 4 * label + 4] += 0.5
    return Images.of(eight_bits(x), y)


@cache
def ground(classes: int) -> tuple[Images, Knowledge]:
    images, others = stripes(120, classes), stripes(30, classes, 1)
    surrogates = tuple(FIT(images, seed, classes=classes) for seed in (7, 8))
    one = others[others.y == 1][:1]
    return images, Knowledge(classes, 0, FIT, 3, surrogates, one, others)


def made(name: str, seed: int = 0, **options: object) -> tuple[Images, Poisoned]:
    method: Method = registry()[name]
    images, knows = ground(2 if method.card.pair else 3)
    options = {**{key: value for key, value in QUICK.items() if key in method.card.options}, **options}
    return images, method(**options).bound()(images, knows, Rng.of(seed, images.index, name))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_well_formed(name):
    card, function = registry()[name].card, registry()[name].function
    assert len(card.summary) < 100 and card.summary.endswith(".")
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|arXiv:\d{4}\.\d{4}|doi:10\.\S+", card.paper)
    assert (card.family, card.name) == ("poisoning", name)
    assert function.__module__.split(".")[-2:] == ["poisoning", name.replace("-", "_")]
    assert function.__name__ == name.replace("-", "_")
    by_place = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in by_place] == ["images", "knows", "rng"]
    for option in card.options.values():
        assert option.annotation is not option.empty
        assert json.loads(json.dumps(option.default)) == option.default


@pytest.mark.parametrize("name", NAMES)
def test_what_it_does_not_name_is_as_it_was(name):
    images, poisoned = made(name)
    card = registry()[name].card
    spoils_the_model_alone = card.changes == "training" and "victims" in card.needs
    assert bool(poisoned.truth.any()) != spoils_the_model_alone
    proven(images, poisoned, name)
    changed = (poisoned.images.x[:120] != images.x).flatten(1).any(1) | (poisoned.images.y[:120] != images.y)
    assert not changed[~poisoned.truth[:120]].any()
    if not spoils_the_model_alone:
        assert changed[poisoned.truth[:120]].float().mean() > 0.9 or len(poisoned.images) > 120


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_labels_are_those_of_images(name):
    _, poisoned = made(name)
    Images.of(poisoned.images.x, poisoned.images.y)
    assert 0 <= float(poisoned.images.x.min()) and float(poisoned.images.x.max()) <= 1
    assert int(poisoned.images.y.max()) < 3


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_what_its_card_says(name):
    images, poisoned = made(name)
    card = registry()[name].card
    if card.changes == "labels":
        assert torch.equal(poisoned.images.x, images.x)
        assert (poisoned.images.y != images.y).any()
    if "surrogates" in card.needs:
        assert torch.equal(poisoned.images.y[:120], images.y)
        assert (poisoned.images.y[poisoned.truth] == 0).all()
    assert (poisoned.module is not None) == (card.changes == "training")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_poison(name):
    first, again, other = (made(name, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.images.x, again.images.x)
    assert torch.equal(first.images.y, again.images.y)
    assert torch.equal(first.truth, again.truth)
    if name in RATED:
        assert not torch.equal(first.truth, other.truth)
    if first.module is not None and again.module is not None:
        for one, two in zip(first.module.parameters(), again.module.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", RATED)
def test_the_count_follows_the_rate_and_more_contains_less(name):
    few, many = made(name, rate=0.05)[1], made(name, rate=0.1)[1]
    covered = 1 + registry()[name].card.options["cover"].default if name.startswith("adap") else 1
    assert few.truth.sum() == 6 * covered
    assert many.truth.sum() == 12 * covered
    if covered == 1:
        assert not (few.truth & ~many.truth).any()


@pytest.mark.parametrize("name", RATED)
def test_a_triggered_image_stays_an_image_and_is_changed(name):
    images, poisoned = made(name)
    if poisoned.trigger is None:
        assert registry()[name].card.changes == "labels"
        return
    before = images.x.clone()
    shown = poisoned.trigger(images.x)
    assert torch.equal(images.x, before)
    assert 0 <= float(shown.min()) and float(shown.max()) <= 1
    assert (shown != images.x).flatten(1).any(1).all()
    assert torch.allclose(poisoned.trigger(images.x[3:5]), shown[3:5], atol=1e-7)
