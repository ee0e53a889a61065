"""Colours against known values, and what ColorFool may and may not do."""

from __future__ import annotations

import pytest
import torch

from besiege.attacks.blackbox.colorfool import colorfool
from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, ThreatModel
from besiege.engine.evasion import evade
from besiege.engine.judge import judge
from besiege.regions import Color, parse
from besiege.regions.color import shifted, to_lab
from besiege.regions.segments import by_colors, segmented

KNOWN = {
    (1, 1, 1): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (1, 0, 0): (53.2408, 80.0925, 67.2032),
    (0, 1, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 1): (32.2970, 79.1875, -107.8602),
    (0.5, 0.5, 0.5): (53.3890, 0.0, 0.0),
    (0.02, 0.02, 0.02): (1.3983, 0.0, 0.0),
}
"""CIE Lab of sRGB colours under D65, as colour tables print them; the greys by L* = 116 Y^(1/3) - 16 or 903.3 Y."""


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def deaf(shape: tuple[int, int, int]) -> Target:
    """Always of class 0."""
    return Target(lambda x: x.flatten(1)[:, :1] * 0 + torch.tensor([1.0, 0.0]), Access.LABELS, 2, shape)


@pytest.mark.parametrize("rgb", KNOWN)
def test_lab_is_the_one_of_the_tables(rgb):
    lab = to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)).flatten()
    assert lab.tolist() == pytest.approx(KNOWN[rgb], abs=0.02)


def test_there_and_back_is_the_same_image():
    x = noise(4, 3, 9, 7).double()
    lab = to_lab(x)
    assert torch.allclose(shifted(lab, torch.zeros_like(lab[:, 1:])), x, atol=1e-6)


def test_a_move_within_what_srgb_has_is_made_in_full_and_one_beyond_as_far_as_it_goes():
    grey = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    lab = to_lab(grey)
    near = to_lab(shifted(lab, torch.tensor([10.0, -5.0], dtype=torch.float64).view(1, 2, 1, 1))) - lab
    assert near.flatten().tolist() == pytest.approx([0, 10, -5], abs=1e-3)
    far = to_lab(shifted(lab, torch.tensor([200.0, -100.0], dtype=torch.float64).view(1, 2, 1, 1))) - lab
    light, a, b = far.flatten().tolist()
    assert abs(light) < 1e-3
    assert a == pytest.approx(-2 * b, rel=1e-3)
    one = shifted(lab, far[:, 1:] * 1.02)
    assert torch.allclose(one, shifted(lab, far[:, 1:]), atol=0.01)  # the edge, to 1 in 256
    assert 60 < a < 100
    edge = shifted(lab, far[:, 1:]).flatten()
    assert float(torch.minimum(edge, 1 - edge).min()) < 0.01


@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_the_region_keeps_lightness_and_holds_its_draws(eps):
    x, ball = noise(6, 3, 8, 8), Color(eps)
    drawn = ball.sample(x, Rng.of(0, torch.arange(6), "draw"))
    away = (to_lab(drawn.double()) - to_lab(x.double())).abs()
    assert float(away[:, 0].max()) < 1e-2
    assert float(away[:, 1:].max()) <= 127 * eps * 1.001
    assert bool(ball.holds(drawn, x).all())
    assert torch.allclose(ball.distance(drawn, x).double(), away[:, 1:].flatten(1).amax(1) / 127, rtol=1e-4)
    assert bool((ball.distance((x + 0.02).clamp(0, 1), x) == INF).all())
    assert not bool(ball.holds(Color(4 * eps).farthest(x, noise(6, 3, 8, 8, seed=1) - 0.5), x).all())


def test_a_projection_takes_the_colours_of_another_image_and_the_lightness_of_its_own():
    x, other = noise(5, 3, 6, 6).double(), noise(5, 3, 6, 6, seed=3).double()
    moved = to_lab(Color(0.2).project(other, x)) - to_lab(x)
    wanted = (to_lab(other) - to_lab(x))[:, 1:].clamp(-25.4, 25.4)
    assert float(moved[:, 0].abs().max()) < 1e-3
    share = moved[:, 1:] / wanted
    assert bool(((share > -1e-3) & (share < 1 + 1e-3)).all())
    assert float(((share > 0.999).float()).mean()) > 0.3


def test_sky_plants_and_skin_are_told_by_their_colours():
    image = torch.zeros(1, 3, 64, 64)
    for (rows, columns), rgb in {
        (0, 0): (0.35, 0.55, 0.9),
        (0, 1): (0.2, 0.55, 0.2),
        (1, 0): (0.85, 0.65, 0.52),
        (1, 1): (0.6, 0.1, 0.5),
    }.items():
        image[0, :, 32 * rows : 32 * rows + 32, 32 * columns : 32 * columns + 32] = torch.tensor(rgb).view(3, 1, 1)
    lab = to_lab(image)
    masks, least, most = segmented(lab, by_colors(lab, 8))
    middle = masks[0, :, [16, 16, 48, 48], [16, 48, 16, 48]].T
    assert middle.round().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert 0 < float(masks[0, 1, 16, 32]) < 1
    blue, green = lab[0, :, 16, 16], lab[0, :, 16, 48]
    assert most[0, 1].tolist() == pytest.approx((-blue[1:]).clamp_min(0).tolist(), abs=0.1)
    assert float(most[0, 2, 0]) == pytest.approx(-float(green[1]), abs=0.1)
    assert float(least[0, 2, 1]) == pytest.approx(-float(green[2]), abs=0.1)
    assert bool(torch.isinf(most[0, 0]).all())
    assert int(torch.isinf(least).sum()) == 5


def test_a_person_stays_as_it_is_and_the_sky_blue():
    image = torch.tensor([0.85, 0.65, 0.52]).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    image[:, :, :, 32:] = torch.tensor([0.35, 0.55, 0.9]).view(1, 3, 1, 1)
    seen: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1)[:, :1] * 0 + torch.tensor([1.0, 0.0])

    images = Images.of(image, torch.zeros(1, dtype=torch.int64))
    threat = ThreatModel(Access.LABELS, Color(1.0), queries=None)
    evade(colorfool(trials=100), Target(watch, Access.LABELS, 2, (3, 64, 64)), images, threat)
    tried = torch.cat(seen[1:])
    assert len(tried) == 100
    assert torch.allclose(tried[:, :, :, :24], image[:, :, :, :24].expand(100, -1, -1, -1), atol=1e-5)
    sky = to_lab(tried)[:, 1:, :, 40:]
    assert float(sky.amax()) < to_lab(image)[0, 1, 0, 40].clamp_min(0) + 1
    assert float((tried - image).abs()[:, :, :, 40:].amax((1, 2, 3)).max()) > 0.1
    moved = (to_lab(tried) - to_lab(image))[:, 1:].abs().flatten(1).amax(1)
    assert bool((moved <= 1.27 * torch.arange(1, 101) * 1.001 + 0.01).all())


def test_the_users_regions_change_each_on_its_own_and_people_not_at_all():
    """Grey would be one region by its colours: its quarters are all else, sky, a person and a region of their own."""
    image = torch.full((1, 3, 64, 64), 0.5)
    maps = torch.zeros(1, 64, 64, dtype=torch.uint8)
    maps[:, :32, 32:], maps[:, 32:, :32], maps[:, 32:, 32:] = 1, 3, 7
    seen: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1)[:, :1] * 0 + torch.tensor([1.0, 0.0])

    images = Images.of(image, torch.zeros(1, dtype=torch.int64)).mapped(maps)
    threat = ThreatModel(Access.LABELS, Color(1.0), queries=None)
    evade(colorfool(trials=100), Target(watch, Access.LABELS, 2, (3, 64, 64)), images, threat)
    rest, sky, person, own = (
        (to_lab(torch.cat(seen[1:])) - to_lab(image))[:, 1:, a, b] for a, b in ((8, 8), (8, 56), (56, 8), (56, 56))
    )
    assert float(person.abs().max()) < 0.01
    assert float(sky.max()) < 0.01  # neither redder nor yellower
    assert float(sky.min()) < -20
    for free in (rest, own):
        assert float(free.max()) > 20
        assert float(free.min()) < -20
    assert abs(float(torch.corrcoef(torch.stack([rest[:, 0], own[:, 0]]))[0, 1])) < 0.5


def test_more_regions_elsewhere_change_nothing_of_an_image():
    x = noise(2, 3, 16, 16)
    maps = torch.zeros(2, 16, 16, dtype=torch.int64)
    maps[0, :8], maps[1, :, 8:] = 2, 9
    images = Images.of(x, torch.zeros(2, dtype=torch.int64)).mapped(maps)
    seen: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1)[:, :1] * 0 + torch.tensor([1.0, 0.0])

    threat, target = ThreatModel(Access.LABELS, Color(1.0), queries=None), Target(watch, Access.LABELS, 2, (3, 16, 16))
    evade(colorfool(trials=5), target, images, threat)
    together = torch.stack(seen[1:])
    seen.clear()
    evade(colorfool(trials=5), target, images[:1], threat)
    assert torch.equal(torch.stack(seen[1:])[:, 0], together[:, 0])


def test_maps_that_do_not_fit_are_refused():
    images = Images.of(noise(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadInput, match=r"the maps are \(2, 8, 9\), the images \(2, 8, 8\)"):
        images.mapped(torch.zeros(2, 8, 9, dtype=torch.int64))
    for wrong in (torch.zeros(2, 8, 8), torch.full((2, 8, 8), -1), torch.full((2, 8, 8), 256)):
        with pytest.raises(BadInput, match="whole numbers from 0 to 255"):
            images.mapped(wrong)


def test_the_smallest_change_of_hue_that_tells_is_found_and_confirmed():
    """The class is told by whether red outweighs green; lightness says nothing."""
    x = noise(8, 3, 8, 8) * 0.5 + 0.25
    x[:, 0] = (x[:, 1] + 0.1).clamp(0, 1)

    def call(x: torch.Tensor) -> torch.Tensor:
        gap = (x[:, 0] - x[:, 1]).flatten(1).mean(1)
        return torch.stack([gap, -gap], 1)

    target = Target(call, Access.SCORES, 2, (3, 8, 8))
    images = Images.of(x, torch.zeros(8, dtype=torch.int64))
    outcome = evade(colorfool(), target, images, ThreatModel(Access.LABELS, Color(1.0), queries=1000))
    verdict = judge(outcome, target, images)
    assert bool(verdict.success.all())
    assert float(verdict.distance.max()) < 0.3
    assert bool((outcome.forward < 400).all())


def test_colors_then_noise_is_a_chain():
    x = noise(4, 3, 8, 8) * 0.2 + 0.4
    target = Target(
        lambda x: torch.stack([x.flatten(1).mean(1) * 0 + 0.55, x.flatten(1).mean(1)], 1), Access.SCORES, 2, (3, 8, 8)
    )
    images = Images.of(x, torch.zeros(4, dtype=torch.int64))
    both = make("colorfool|square", trials=20, iterations=200)
    threat = ThreatModel(Access.SCORES, parse("linf:0.1"), queries=400, after=Color(1.0))
    outcome = evade(both, target, images, threat)
    assert bool(judge(outcome, target, images).success.all())


def test_grey_images_are_refused_in_one_sentence():
    images = Images.of(noise(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    threat = ThreatModel(Access.LABELS, Color(1.0), queries=10)
    with pytest.raises(BadInput, match="colorfool takes images of 3 channels, but these have 1"):
        evade(colorfool(), deaf((1, 8, 8)), images, threat)
    with pytest.raises(BadInput, match="3 channels"):
        to_lab(images.x)
