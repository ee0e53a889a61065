"""JSMA against double loops over all pairs, and on classifiers whose fewest pixels are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.whitebox import jsma as module
from besiege.attacks.whitebox.jsma import best_pair, jsma
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.evasion import Outcome, evade

SIX = (1, 6, 6)


class Seen(nn.Module):
    """A network, and every batch that it was asked about."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.asked = inner, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        scores: Tensor = self.inner(x)
        return scores


def curved(shape: tuple[int, int, int] = SIX, classes: int = 4, n: int = 6) -> tuple[Seen, Target, Images]:
    """Two layers in double precision, and images of which some pixels are 0 or 1."""
    draws, size = torch.Generator().manual_seed(3), math.prod(shape)
    first, second = (nn.Linear(*sides, dtype=torch.float64) for sides in ((size, 20), (20, classes)))
    for layer in (first, second):
        layer.weight.data = torch.randn(layer.weight.shape, generator=draws, dtype=torch.float64) / 2
        layer.bias.data.zero_()
    net = Seen(nn.Sequential(nn.Flatten(), first, nn.Tanh(), second))
    x = (torch.rand(n, *shape, generator=draws, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    target = Target(net, Access.WEIGHTS, classes, shape, dtype=torch.float64)
    images = Images.of(x, target.labels(x))
    net.asked.clear()
    return net, target, images


def siege(attack: Attack, target: Target, images: Images, **options: Any) -> Outcome:
    threat = ThreatModel(Access.GRADIENTS, Ball(0, INF), targeted="target_class" in options)
    return evade(attack, target, images, threat, execution="plain", **options)


def slow_pair(gain: list[float], fall: list[float]) -> tuple[float, set[int]]:
    """The best score over all pairs, and the pair; 0 where none fits."""
    best, found = 0.0, set[int]()
    for p, q in combinations(range(len(gain)), 2):
        up, down = gain[p] + gain[q], fall[p] + fall[q]
        if up > 0 and down > 0 and up * down > best:
            best, found = up * down, {p, q}
    return best, found


def maps() -> Iterator[tuple[str, Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    gain, fall = torch.randn(2, 40, 36, generator=draws, dtype=torch.float64)
    yield "independent", gain, fall
    yield "opposed", gain, -gain + 0.3 * fall
    yield "alike", gain, gain
    yield "ties", gain.round(), fall.round()
    yield "hopeless", -gain.abs(), fall
    shut = torch.rand(40, 36, generator=draws) < 0.9
    yield "mostly shut", gain.masked_fill(shut, -INF), fall.masked_fill(shut, -INF)


@pytest.mark.parametrize("room", [1 << 22, 1])
@pytest.mark.parametrize(("name", "gain", "fall"), list(maps()), ids=[name for name, *_ in maps()])
def test_the_best_pair_is_that_of_a_double_loop(
    name: str, gain: Tensor, fall: Tensor, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAIRS", room)
    pairs, good = best_pair(gain, fall)
    for ups, downs, pair, fits in zip(gain.tolist(), fall.tolist(), pairs.tolist(), good.tolist(), strict=True):
        best, _ = slow_pair(ups, downs)
        assert fits == (best > 0)
        if fits:
            p, q = pair
            assert p != q
            assert (ups[p] + ups[q]) * (downs[p] + downs[q]) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_the_first_pair_is_that_of_the_papers_map_on_the_whole_jacobian(output: str, direction: str) -> None:
    net, target, images = curved()
    siege(jsma(output=output, direction=direction, restore=False), target, images[:1], target_class=3)
    x = images.x[:1]
    read = {"probabilities": lambda v: net.inner(v).softmax(1), "logits": net.inner}[output]
    slopes = torch.autograd.functional.jacobian(read, x)[0, :, 0].flatten(1)
    sign = 1 if direction == "up" else -1
    room = (x < 0.99 if direction == "up" else x > 0.01).flatten()
    gain = (sign * slopes[3]).masked_fill(~room, -INF).tolist()
    fall = (-sign * (slopes.sum(0) - slopes[3])).masked_fill(~room, -INF).tolist()
    _, pair = slow_pair(gain, fall)
    # the clean prediction comes first, then the image itself, then one after the first step
    moved = next(asked for asked in net.asked if not torch.equal(asked, x))
    assert set((moved != x).flatten().nonzero().squeeze(1).tolist()) == pair
    assert set(moved[moved != x].tolist()) == {float(direction == "up")}


def test_logits_take_two_backward_passes_a_step_and_probabilities_one() -> None:
    _, target, images = curved()
    logits = siege(jsma(output="logits", restore=False), target, images, target_class=3)
    assert bool((logits.backward <= 2 * logits.forward).all())
    assert int(logits.backward.max()) > 2
    probabilities = siege(jsma(restore=False), target, images, target_class=3)
    assert bool((probabilities.backward <= probabilities.forward).all())


def test_one_class_beyond_the_last_is_the_sum_of_all_scores() -> None:
    net, target, images = curved()
    meter = Meter(target, images.x, Goal(images.y), Ball(0, INF), seeks="minimum")
    _, (slope,) = meter.jacobian(images.x[:1], torch.tensor([[4]]), torch.tensor([0]))
    whole = torch.autograd.functional.jacobian(lambda v: net.inner(v).sum(), images.x[:1])
    assert torch.allclose(slope, whole, rtol=1e-12)


@pytest.mark.parametrize("direction", ["up", "down", "both"])
@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_steps_keep_to_theta_to_their_direction_and_to_gamma(output: str, direction: str) -> None:
    net, target, images = curved((3, 4, 5))
    x = images.x[:1]
    siege(jsma(output=output, direction=direction, theta=0.3, gamma=0.5), target, images[:1])
    delta = torch.cat(net.asked) - x
    assert float(delta.abs().max()) <= 0.3 + 1e-9
    assert direction != "up" or float(delta.min()) >= 0
    assert direction != "down" or float(delta.max()) <= 0
    changed = (delta != 0).any(1).flatten(1).sum(1)
    assert 2 <= int(changed.max()) <= 10


def two_classes() -> tuple[Target, Images, Tensor]:
    """A linear classifier of two classes, and (n,) the fewest pixels across its plane."""
    draws = torch.Generator().manual_seed(1)
    weight = 0.2 * torch.randn(2, 192, generator=draws, dtype=torch.float64)
    layer = nn.Linear(192, 2, dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight, -0.5 * weight.sum(1)
    target = Target(nn.Sequential(nn.Flatten(), layer), Access.WEIGHTS, 2, (3, 8, 8), dtype=torch.float64)
    x = torch.rand(30, 3, 8, 8, generator=draws, dtype=torch.float64)
    x = torch.where((weight[0] > weight[1]).view_as(x[0]), 0.4 + 0.6 * x, 0.6 * x)
    images = Images.of(x, target.labels(x))
    slope = (weight[1 - images.y] - weight[images.y]).view_as(x)
    gains = torch.maximum(slope * (1 - x), -slope * x).sum(1).flatten(1).sort(1, descending=True).values
    scores = target.scores(x)
    gap = scores.gather(1, images.y[:, None]) - scores.gather(1, 1 - images.y[:, None])
    return target, images, (gains.cumsum(1) <= gap).sum(1) + 1


def test_on_a_linear_classifier_the_fewest_pixels_are_found() -> None:
    target, images, fewest = two_classes()
    assert int(fewest.min()) > 2
    assert set((fewest % 2).tolist()) == {0, 1}
    assert torch.equal(siege(jsma(gamma=1), target, images).distance.long(), fewest)
    pairs = siege(jsma(gamma=1, restore=False), target, images).distance.long()
    assert torch.equal(pairs, fewest + fewest % 2)


def test_more_classes_in_view_never_need_more_pixels() -> None:
    _, target, images = curved(classes=6, n=20)
    one, all_ = (siege(jsma(targets=k, restore=False, gamma=1), target, images) for k in (1, 5))
    assert bool((all_.distance <= one.distance).all())
    assert bool((all_.distance < one.distance).any())
