"""Attacks whose regions differ, one after the other: where the second begins, what is counted, what is believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from besiege.attacks.blackbox.spatial import spatial
from besiege.attacks.blackbox.square import square
from besiege.attacks.whitebox.fmn import fmn
from besiege.attacks.whitebox.pgd import pgd
from besiege.cli import app
from besiege.core.errors import BadInput, BadOutcome
from besiege.core.images import Images
from besiege.core.lens import Surrogate
from besiege.core.meter import Meter
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.chain import Lowest
from besiege.engine.evasion import evade
from besiege.engine.judge import judge
from besiege.regions import Spatial
from besiege.regions.spatial import grid, limits, warped


class Upright(nn.Module):
    """Class 0 while the bar down the middle column is bright enough; the fourth image never falls."""

    def __init__(self) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        side = x[:, 0, :, 4].mean(1) - self.least + 5 * x[:, 0, 0, 0]
        return 10 * torch.stack([side, -side], 1)


def bars() -> tuple[Target, Images]:
    x = torch.zeros(4, 1, 9, 9)
    x[..., 4] = torch.tensor([1.0, 0.98, 0.8, 1.0])[:, None, None]
    x[3, 0] = 1
    return Target.of(Upright(), classes=2, shape=(1, 9, 9)), Images.of(x, torch.zeros(4, dtype=torch.int64))


THREAT = ThreatModel(Access.GRADIENTS, Ball(INF, 0.2), after=Spatial(0.1))
CHAIN = spatial(shifts=3, turns=9) | pgd(steps=10)


def test_both_together_find_what_neither_finds_alone() -> None:
    target, images = bars()
    turned = evade(spatial(shifts=3, turns=9), target, images, ThreatModel(Access.LABELS, Spatial(0.1)))
    nudged = evade(pgd(steps=10), target, images, replace(THREAT, after=None))
    both = evade(CHAIN, target, images, THREAT)
    assert turned.success.tolist() == [False, False, True, False]
    assert nudged.success.tolist() == [False, False, True, False]
    assert both.success.tolist() == [True, True, True, False]
    assert both.distance[2] == 0 and both.distance[3] == INF
    verdict = judge(both, target, images)
    assert verdict.success.tolist() == both.success.tolist()
    assert torch.equal(both.adv[3], images.x[3]) and both.needed[3] == -1
    assert bool((both.needed[:3] > 0).all()) and bool((both.needed[:3] <= both.forward[:3]).all())


def test_a_lens_is_the_second_attacks() -> None:
    target, images = bars()
    narrow = target.granting(Access.SCORES)
    threat = replace(THREAT, access=Access.SCORES)
    with pytest.raises(BadInput, match="pgd needs gradients"):
        evade(CHAIN, narrow, images, threat)
    guessed = evade(CHAIN, narrow, images, threat, lens=lambda meter, x, rng: Surrogate(meter, target, x))
    assert int(guessed.backward.sum()) == 0
    assert guessed.success.tolist() == [True, True, True, False]
    assert torch.equal(judge(guessed, target, images).success, guessed.success)


def test_the_second_begins_at_the_lowest_margin_of_the_first() -> None:
    target, images = bars()
    both = evade(CHAIN, target, images, THREAT)
    assert both.via is not None
    begun = target.scores(both.via[:1])
    every = warped(images.x[:1].expand(81, -1, -1, -1), grid(3, 9) * limits(images.x) * 0.1)
    scores = target.scores(every)
    assert float(begun[0, 0] - begun[0, 1]) == pytest.approx(float((scores[:, 0] - scores[:, 1]).min()), abs=1e-5)


def test_the_memory_follows_rows_that_are_dropped() -> None:
    target, images = bars()
    meter = Meter(target, images.x, Goal(images.y), Ball(INF, 1.0))
    memory = Lowest(meter, images.x)
    dim = images.x * torch.tensor([0.9, 0.5, 0.5, 1.0]).view(4, 1, 1, 1)
    memory.is_adversarial(dim)
    (rows,) = memory.live(torch.arange(4))
    assert rows.tolist() == [0, 3]
    darker, lighter = images.x[rows] * 0.8, images.x[rows] * 0.95
    memory.is_adversarial(torch.cat([lighter, darker, darker]), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert torch.equal(memory.x[0], darker[0]) and torch.equal(memory.x[1], dim[1])


@pytest.mark.parametrize("queries", [2, 9, 50])
def test_a_budget_serves_both(queries: int) -> None:
    target, images = bars()
    for attack in (CHAIN, spatial(shifts=3, turns=9) | square(iterations=20)):
        found = evade(attack, target, images, replace(THREAT, queries=queries))
        assert int(found.forward.max()) <= queries
        assert torch.equal(judge(found, target, images).success, found.success)


def test_where_labels_are_all_there_is_the_second_begins_at_the_image() -> None:
    target, images = bars()
    found = evade(CHAIN | square(), target, images, replace(THREAT, queries=200))
    assert bool(found.success[:3].all())
    narrow = target.granting(Access.LABELS)
    with pytest.raises(BadInput, match="grants labels"):
        evade(CHAIN, narrow, images, THREAT)


def test_what_leaves_either_region_is_refused() -> None:
    target, images = bars()
    both = evade(CHAIN, target, images, THREAT)
    assert both.via is not None
    with pytest.raises(BadOutcome, match="beyond eps"):
        judge(replace(both, threat=replace(THREAT, after=Spatial(0.05))), target, images)
    with pytest.raises(BadOutcome, match="beyond eps"):
        judge(replace(both, threat=replace(THREAT, ball=Ball(INF, 0.05))), target, images)
    with pytest.raises(BadOutcome, match="beyond eps"):
        judge(replace(both, via=both.via.flip(3) * 0.9), target, images)
    with pytest.raises(BadOutcome, match="does not let it go"):
        judge(replace(both, threat=replace(THREAT, after=None)), target, images)


def test_a_chain_is_a_value_that_knows_its_regions() -> None:
    assert CHAIN.name == "spatial|pgd" and str(CHAIN) == "spatial(shifts=3, turns=9) | pgd(steps=10)"
    assert CHAIN.card.norms == pgd.card.norms and CHAIN.card.after == ("spatial",)
    three = spatial() | pgd() | square()
    assert three.name == "spatial|pgd|square" and three.card.norms == (2, INF)
    with pytest.raises(BadInput, match="no norm that all of them work in"):
        pgd() | spatial()
    target, images = bars()
    with pytest.raises(BadInput, match="must say in `after` how far spatial may go"):
        evade(CHAIN, target, images, replace(THREAT, after=None))


def test_on_the_command_line() -> None:
    run = CliRunner()
    found = run.invoke(
        app, ["attack", "spatial|fmn", "-n", "3", "--after", "spatial:0.1", "--eps", "0.01", "--norm", "inf"]
    )
    assert found.exit_code == 0 and "spatial:0.1, then linf:0.01" in found.stdout
    for name, region, said in (
        ("pgd", "spatial:1", "pgd is no chain; leave --after out"),
        ("spatial|pgd", "linf:0.1", "no region that spatial|pgd begins in"),
    ):
        refused = run.invoke(app, ["attack", name, "-n", "3", "--after", region])
        assert isinstance(refused.exception, BadInput) or said in refused.output
    assert fmn().card.after == ()
