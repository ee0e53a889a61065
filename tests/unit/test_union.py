"""Attacks in turn as one attack: what the whole is, and which images each part meets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from besiege.attacks.blackbox.hopskipjump import hopskipjump
from besiege.attacks.blackbox.square import square
from besiege.attacks.whitebox.autoattack import autoattack
from besiege.attacks.whitebox.cw_l2 import cw_l2
from besiege.attacks.whitebox.deepfool import deepfool
from besiege.attacks.whitebox.fgsm import fgsm
from besiege.attacks.whitebox.fmn import fmn
from besiege.attacks.whitebox.newtonfool import newtonfool
from besiege.attacks.whitebox.pgd import pgd
from besiege.attacks.whitebox.uap import uap
from besiege.cli import app
from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.method import Attack, make, union
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.evasion import Outcome, evade, find_starts
from besiege.engine.judge import judge
from besiege.engine.summary import siege


def victim(n: int = 24) -> tuple[Target, Images]:
    """A small curved network in double precision, whose rows do not depend on the batch."""
    draws = torch.Generator().manual_seed(5)
    first, second = nn.Linear(48, 16, dtype=torch.float64), nn.Linear(16, 4, dtype=torch.float64)
    for layer in (first, second):
        layer.weight.data = torch.randn(layer.weight.shape, generator=draws, dtype=torch.float64) / 3
        layer.bias.data.zero_()
    net = nn.Sequential(nn.Flatten(), first, nn.Tanh(), second)
    x = torch.rand(n, 3, 4, 4, generator=draws)
    target = Target(net, Access.WEIGHTS, 4, (3, 4, 4), module=net, dtype=torch.float64)
    return target, Images.of(x, target.labels(x))


def fire(attack: Attack, norm: float, eps: float = INF, **options: Any) -> Outcome:
    target, images = victim()
    outcome = evade(attack, target, images, ThreatModel(Access.GRADIENTS, Ball(norm, eps), **options))
    assert torch.equal(judge(outcome, target, images).success, outcome.success)
    return outcome


def test_a_union_is_a_value() -> None:
    both = newtonfool(steps=20) | fmn()
    assert both == make("newtonfool", steps=20) | make("fmn")
    assert both != newtonfool() | fmn()
    assert hash(both) == hash(newtonfool(steps=20) | fmn())
    assert str(both) == "newtonfool(steps=20) | fmn()"
    assert both.name == "newtonfool|fmn"
    assert (fgsm() | pgd()) | square() == fgsm() | (pgd() | square()) == union(fgsm(), pgd(), square())
    assert union(pgd()) == pgd()
    assert json.loads(json.dumps(both.recorded())) == {
        "1 newtonfool": newtonfool(steps=20).recorded(),
        "2 fmn": fmn().recorded(),
    }


def test_its_card_says_what_all_parts_can() -> None:
    both = (hopskipjump() | fmn()).card
    assert both.kind == "ensemble"
    assert both.norms == tuple(norm for norm in hopskipjump.card.norms if norm in fmn.card.norms)
    assert both.access == Access.GRADIENTS
    assert both.seeks == "minimum"
    assert both.targeted
    assert not (deepfool() | fmn()).card.targeted
    assert (fgsm() | fmn()).card.seeks == "success"
    assert both.paper == "arXiv:1904.02144, arXiv:2102.12827"


def test_what_cannot_join_is_refused() -> None:
    with pytest.raises(BadInput, match=r"cw-l2\|jsma: there is no norm"):
        cw_l2() | make("jsma")
    with pytest.raises(BadInput, match="universal"):
        fgsm() | uap()
    with pytest.raises(BadInput, match="untargeted"):
        evade(deepfool() | fmn(), *victim(), ThreatModel(Access.GRADIENTS, Ball(2, INF)), target_class=1)


def test_names_joined_by_bars_make_one_and_each_part_takes_its_options() -> None:
    assert make("newtonfool|fmn") == newtonfool() | fmn()
    assert make(" fgsm | pgd|square ", loss="margin") == fgsm(loss="margin") | pgd(loss="margin") | square()
    assert make("newtonfool|fmn", steps="7", eta="1/50") == newtonfool(steps=7, eta=0.02) | fmn(steps=7)
    with pytest.raises(BadInput, match=r"none of fgsm\|pgd has an option 'eta'"):
        make("fgsm|pgd", eta=1)
    with pytest.raises(BadInput, match="did you mean 'pgd'"):
        make("fgsm|pdg")
    with pytest.raises(BadInput, match="steps must be at least 1"):
        make("newtonfool|fmn", steps=0)


def test_where_all_seek_the_minimum_each_meets_every_image_and_the_nearest_is_kept() -> None:
    first, second = fire(newtonfool(returns=0), 2), fire(fmn(steps=20), 2)
    both = fire(newtonfool(returns=0) | fmn(steps=20), 2)
    assert torch.equal(both.distance, torch.minimum(first.distance, second.distance))
    assert bool((first.distance < second.distance).any()) and bool((second.distance < first.distance).any())
    assert torch.equal(both.backward, first.backward + second.backward)


def test_where_success_is_sought_only_what_still_stands_goes_on() -> None:
    first, second = fire(fgsm(), INF, 0.05), fire(pgd(), INF, 0.05)
    both = fire(fgsm() | pgd(), INF, 0.05)
    fell = first.success
    assert 0 < int(fell.sum()) < len(fell)
    assert torch.equal(both.success, fell | second.success)
    assert torch.equal(both.adv[fell], first.adv[fell])
    assert torch.equal(both.adv[~fell], second.adv[~fell])
    assert torch.equal(both.forward[fell], first.forward[fell])
    assert bool((both.backward[~fell] > 1).all())


def test_a_search_that_ends_by_itself_leaves_its_images_to_the_next() -> None:
    alone, both = fire(hopskipjump(), 2, queries=50), fire(hopskipjump() | deepfool(), 2, queries=100)
    assert bool((alone.distance > both.distance).any())
    short = fire(square(iterations=3), INF, 0.05)
    assert not bool(short.success.all())
    assert int(fire(square(iterations=3) | pgd(), INF, 0.05).success.sum()) > int(short.success.sum())
    assert int(fire(pgd(steps=2) | square(iterations=200), INF, 0.05).success.sum()) >= int(short.success.sum())


def test_what_one_part_has_found_is_where_the_next_begins() -> None:
    target, images = victim(6)
    meter = Meter(target, images.x, Goal(images.y), Ball(2, INF), seeks="minimum")
    first = evade(deepfool(), target, images, ThreatModel(Access.GRADIENTS, Ball(2, INF)))
    meter.is_adversarial(first.adv[:4], torch.arange(4))
    begun, lost = find_starts(meter, Rng.of(0, images.index, "noise"), None)
    assert torch.equal(begun[:4], first.adv[:4]) and meter.forward[:4].tolist() == [1] * 4
    assert bool((meter.forward[4:] >= 1).all()) and len(lost) == 0
    alone, both = fire(hopskipjump(), 2, queries=80), fire(deepfool() | hopskipjump(), 2, queries=80)
    assert float(both.distance.median()) < 0.8 * float(alone.distance.median())


@pytest.mark.parametrize("queries", [1, 7, 60])
@pytest.mark.parametrize(
    ("attack", "norm", "eps"),
    [
        (newtonfool() | fmn(), 2, INF),
        (square(iterations=3) | fgsm() | pgd(), INF, 0.02),
        (hopskipjump() | deepfool() | hopskipjump(), 2, INF),
        (autoattack(steps=5) | pgd(), 2, 0.1),
    ],
    ids=str,
)
def test_one_budget_serves_all_parts(attack: Attack, norm: float, eps: float, queries: int) -> None:
    assert bool((fire(attack, norm, eps, queries=queries).forward <= queries).all())


def test_a_record_of_a_union_names_every_argument() -> None:
    target, images = victim(4)
    _, _, record = siege(fgsm() | pgd(), target, images, ThreatModel(Access.GRADIENTS, Ball(INF, 0.05)))
    assert record.attack == "fgsm|pgd"
    assert record.title == "FGSM | PGD"
    assert record.options == {"1 fgsm": {"loss": "ce"}, "2 pgd": dict(pgd().arguments)}
    assert type(record).model_validate_json(record.model_dump_json()).options == record.options


def test_on_the_command_line_each_part_has_its_share_of_the_budget() -> None:
    result = CliRunner().invoke(app, ["attack", "fgsm|square", "-n", "4", "-o", "area=0.3", "--json"])
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["options"]["2 square"]["iterations"] == 500
    assert record["options"]["2 square"]["area"] == 0.3
    assert record["threat"]["queries"] == 501
    refused = CliRunner().invoke(app, ["attack", "fgsm|uap", "-n", "4"])
    assert isinstance(refused.exception, BadInput) or refused.exit_code == 2
