"""Square and HopSkipJump: driven by hand, and on models whose answer is known."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from besiege.attacks.blackbox.hopskipjump import REACH, _bands, _orthogonal, hopskipjump
from besiege.attacks.blackbox.square import HALVINGS, square
from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.rng import Rng, Stream
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.evasion import Outcome, evade

Score = Callable[[Tensor], Tensor]


class Model:
    """Logits (score, 0) in float64: class 1 where ``score`` is below zero. Keeps every image it is asked about."""

    def __init__(self, score: Score) -> None:
        self.score, self.asked = score, []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.float())
        score = self.score(x)
        return torch.stack([score, torch.zeros_like(score)], 1)


def fire(
    attack: Attack,
    score: Score,
    x: Tensor,
    ball: Ball,
    *,
    queries: int | None = None,
    seed: int = 0,
    starts: Tensor | None = None,
    rows: slice = slice(None),
    labels: Tensor | None = None,
) -> tuple[Outcome, Model]:
    model = Model(score)
    target = Target(model, Access.SCORES, 2, tuple(x.shape[1:]), dtype=torch.float64, batch=32)
    images = Images.of(x, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)[rows]
    threat = ThreatModel(attack.card.access, ball, queries=queries)
    outcome = evade(attack, target, images, threat, seed=seed, starts=starts, clean=images.y)
    return outcome, model


def pixels(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def half_space(shape: tuple[int, int, int], seed: int = 1) -> tuple[Tensor, Score, Callable[[float], Tensor]]:
    """A direction w (d,) of unit norm, ``w (x - 1/2)`` as a score, and images that lie at a distance from it."""
    d = math.prod(shape)
    w = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w /= w.norm()

    def image(distance: float) -> Tensor:
        side = torch.randn(d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) / d
        side -= (side @ w) * w
        return (0.5 + side + distance * w).view(1, *shape).float()

    return w, lambda x: (x.double().flatten(1) - 0.5) @ w, image


def changed(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Height and width of the smallest window that holds all pixels (c, h, w) in which the two differ."""
    differs = ((a - b).abs() > 1e-6).any(0)
    down, across = (differs.any(k).nonzero().squeeze(1) for k in (1, 0))
    return int(down[-1] - down[0]) + 1, int(across[-1] - across[0]) + 1


SHAPES = [(1, 5, 7), (2, 8, 8), (3, 9, 9), (4, 11, 6), (1, 2, 2), (3, 1, 1), (1, 1, 4)]


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("shape", SHAPES)
def test_square_asks_only_about_the_ball_and_the_box(shape, norm):
    x = pixels(4, shape)
    x[1] = x[1].round()
    ball = Ball(norm, 0.3 if norm == INF else 1.5)
    _, model = fire(square(iterations=120), lambda z: z.flatten(1).sum(1) + 1, x, ball)
    asked = torch.cat(model.asked)
    assert len(asked) == 4 * 120
    nearest = torch.stack([ball.distance(asked, one[None]) for one in x]).min(0).values
    assert bool((nearest <= ball.eps * (1 + 1e-6) + 1e-7).all())
    assert float(asked.min()) >= 0
    assert float(asked.max()) <= 1


@pytest.mark.parametrize("iterations", [1, 7, 37])
def test_square_spends_its_iterations_the_first_image_included(iterations):
    outcome, model = fire(
        square(iterations=iterations), lambda z: 1 + 0 * z.sum((1, 2, 3)), pixels(3, (1, 6, 6)), Ball(INF, 0.1)
    )
    assert outcome.forward.tolist() == [iterations] * 3
    assert sum(map(len, model.asked)) == 3 * iterations


def test_square_starts_from_stripes():
    x = torch.full((8, 3, 6, 6), 0.5)
    _, model = fire(square(iterations=1), lambda z: 1 + 0 * z.sum((1, 2, 3)), x, Ball(INF, 0.25))
    delta = model.asked[0] - 0.5
    assert set(delta.unique().tolist()) == {-0.25, 0.25}
    assert bool((delta == delta[:, :, :1]).all())
    assert 0.4 < float((delta > 0).float().mean()) < 0.6
    assert len({tuple(row.flatten().tolist()) for row in delta}) == 8


@pytest.mark.parametrize("rescale", [True, False])
def test_square_halves_its_area_as_the_paper_says(rescale):
    """Where nothing is ever better, every image differs from the first in one square, of one sign a channel."""
    iterations, edge, area = 400, 20, 0.8
    x = torch.full((6, 2, edge, edge), 0.5)
    _, model = fire(
        square(iterations=iterations, area=area, rescale=rescale),
        lambda z: 1 + 0 * z.sum((1, 2, 3)),
        x,
        Ball(INF, 0.25),
    )
    first, seen = model.asked[0], 0.0
    for i, asked in enumerate(model.asked[1:], 1):
        at = i * 10_000 / iterations if rescale else i
        side = max(1, round(math.sqrt(area / 2 ** sum(at > h for h in HALVINGS) * edge * edge)))
        for a, b in zip(asked, first, strict=True):
            tall, wide = changed(a, b)
            assert tall <= side
            assert wide <= side
        seen = max(seen, max(max(changed(a, b)) / side for a, b in zip(asked, first, strict=True)))
    assert seen == 1
    assert bool((model.asked[1][0] - first[0] != model.asked[1][1] - first[1]).any())


def test_square_never_asks_the_same_again():
    """On one channel a square of the other sign always changes something."""
    x = torch.full((4, 1, 6, 6), 0.5)
    _, model = fire(square(iterations=200), lambda z: 1 + 0 * z.sum((1, 2, 3)), x, Ball(INF, 0.25))
    for asked in model.asked[1:]:
        assert bool((asked != model.asked[0]).flatten(1).any(1).all())


def test_square_keeps_what_is_strictly_better_and_nothing_else():
    """The score is the mean in coarse steps, so that ties abound; each image differs in one square from the best."""
    x = torch.full((1, 1, 40, 40), 0.5)

    def score(z: Tensor) -> Tensor:
        return 5 + (z.double().mean((1, 2, 3)) * 40).round()

    _, model = fire(square(iterations=300, area=0.1, rescale=False), score, x, Ball(INF, 0.25))
    asked = torch.cat(model.asked)
    scores, kept, ties = score(asked), 0, 0
    for i in range(1, len(asked)):
        assert max(changed(asked[i], asked[kept])) <= round(math.sqrt(0.1 * 1600))
        ties += int(scores[i] == scores[kept])
        kept = i if scores[i] < scores[kept] else kept
    assert ties > 50
    assert scores[kept] < scores[0]


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 9, 9), (2, 12, 8), (4, 20, 20)])
def test_square_in_l2_stays_on_the_sphere(shape):
    x = torch.full((3, *shape), 0.5)
    _, model = fire(square(iterations=100), lambda z: z.flatten(1).sum(1) + 1, x, Ball(2, 0.4))
    size = (torch.cat(model.asked) - 0.5).flatten(1).norm(dim=1)
    assert torch.allclose(size, torch.full_like(size, 0.4), atol=1e-5)


def test_square_in_l2_moves_the_energy_of_one_window_into_another():
    """Where nothing is ever better, all but two windows are as they were, up to the size of the whole."""
    x = torch.full((5, 1, 15, 15), 0.5)
    _, model = fire(square(iterations=300), lambda z: 1 + 0 * z.sum((1, 2, 3)), x, Ball(2, 0.4))
    first = (model.asked[0] - 0.5).flatten(1)
    emptied = 0
    for asked in model.asked[200:]:
        delta = (asked - 0.5).flatten(1)
        ratio = (delta / first).nanmedian(1, keepdim=True).values
        differs = (delta - ratio * first).abs() > 1e-5
        assert bool((differs.sum(1) <= 2 * 9).all())
        emptied += int((differs & (delta.abs() < 1e-6)).any(1).sum())
    assert emptied > 0.8 * 5 * 100


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 7)])
@pytest.mark.parametrize(("norm", "share"), [(2, 0.35), (INF, 0.8)])
def test_square_finds_what_a_linear_model_guarantees(shape, norm, share):
    """Along any direction ``share`` of what the ball allows is found, and more than it allows never."""
    w, along, _ = half_space(shape)
    x = torch.full((6, *shape), 0.5)
    ball = Ball(norm, 0.2)
    most = 0.2 * float(w.abs().sum()) if norm == INF else 0.2

    outcome, _ = fire(square(iterations=1000), lambda z: share * most + along(z), x, ball)
    assert bool(outcome.success.all())
    assert bool((outcome.distance <= ball.eps * (1 + 1e-6) + 1e-7).all())
    assert not bool(fire(square(iterations=100), lambda z: 1.01 * most + along(z), x, ball)[0].success.any())


class Noted:
    """An oracle that answers with one and notes which losses it was asked for."""

    def __init__(self, targeted: bool) -> None:
        self.goal, self.losses = Goal(torch.zeros(2, dtype=torch.int64), targeted), set()

    def loss(self, x: Tensor, loss: str, rows: Tensor | None = None) -> Tensor:
        self.losses.add(loss)
        return torch.ones(len(x))

    def live(self, *state: object) -> tuple[object, ...]:
        return state


@pytest.mark.parametrize("norm", [2, INF])
def test_square_follows_the_margin_and_toward_a_class_cross_entropy(norm):
    for targeted, loss in ((False, {"margin"}), (True, {"ce"})):
        oracle = Noted(targeted)
        square.function(
            oracle, torch.full((2, 1, 5, 5), 0.5), Ball(norm, 0.2), Rng.of(0, torch.arange(2), "square"), iterations=5
        )
        assert oracle.losses == loss


ATTACKS = [
    pytest.param(attack, norm, id=f"{attack.name}-{norm}")
    for attack in (square(iterations=150), hopskipjump(steps=6, probes=20))
    for norm in (2, INF)
]


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_a_row_alone_is_the_row_in_the_batch(attack, norm):
    """Images at growing distances from a half-space: some fall early, some late, some never."""
    w, score, image = half_space((1, 5, 7))
    ball = Ball(norm, 0.2 if norm == 2 else 0.1)
    reach = ball.eps * (0.6 if norm == 2 else float(w.abs().sum()))
    x = torch.cat([image(reach * share) for share in (0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.8, 1.2)])
    attack_ball = Ball(norm, INF) if attack.name == "hopskipjump" else ball
    together, _ = fire(attack, score, x, attack_ball, queries=400)
    if attack.name == "square":
        assert 1 < int(together.success.sum()) < 8
        assert len(set(together.needed.tolist())) > 2
    for row in (0, 3, 7):
        alone, _ = fire(attack, score, x, attack_ball, queries=400, rows=slice(row, row + 1))
        assert torch.equal(alone.adv[0], together.adv[row])
        assert int(alone.forward) == int(together.forward[row])
        assert int(alone.needed) == int(together.needed[row])


@pytest.mark.parametrize("queries", [1, 7, 37])
@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_no_image_is_asked_about_more_often_than_it_may_be(attack, norm, queries):
    x = 0.8 + 0.1 * pixels(5, (1, 5, 7))
    ball = Ball(norm, INF if attack.name == "hopskipjump" else 0.05 if norm == INF else 0.2)
    outcome, model = fire(attack, lambda z: z.double().mean((1, 2, 3)) - 0.6, x, ball, queries=queries)
    assert bool((outcome.forward <= queries).all())
    assert sum(map(len, model.asked)) == int(outcome.forward.sum())


def drive(
    x: Tensor, start: Tensor, ball: Ball, adversarial: Callable[[Tensor], Tensor], **options: object
) -> list[Tensor]:
    """Run HopSkipJump without a pool; every question it asked."""
    generator = hopskipjump.function(x, ball, Stream(5), start=start, **{"starts": 0, **options})
    asked = []
    try:
        question = next(generator)
        while True:
            asked.append(question.clone())
            question = generator.send(adversarial(question))
    except StopIteration:
        return asked


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("norm", [2, INF])
def test_hopskipjump_asks_as_the_paper_says(norm, orthogonal):
    """By hand, on a half-space: bisection, sqrt(t) * probes points at the paper's radius, a step, bisection."""
    shape, d = (1, 7, 7), 49
    w, score, image = half_space(shape)
    x, start = image(0.3)[0], torch.where(w.view(shape) > 0, 0.0, 1.0).float()
    ball = Ball(norm, INF)
    options = {"steps": 3, "probes": 30, "bands": 1, "circle": False, "orthogonal": orthogonal}
    asked = drive(x, start, ball, lambda z: score(z) < 0, **options)
    many = [k for k, question in enumerate(asked) if len(question) > 1]
    assert [len(asked[k]) for k in many] == [30, 42, 49 if orthogonal else 51]
    assert asked[0].shape == (1, *shape)
    half = (
        (start - x) / 2 if norm == 2 else (start - x).clamp(*(s * float((start - x).abs().max()) / 2 for s in (-1, 1)))
    )
    assert torch.allclose(asked[0][0], x + half, atol=1e-6)
    theta = 1 / (d * math.sqrt(d)) if norm == 2 else 1 / d**2
    scale = 1.0 if norm == 2 else float((start - x).abs().max())
    assert many[0] == math.ceil(math.log2(scale / theta))
    first = asked[many[0]] - asked[many[0]].mean(0)
    assert torch.allclose(first.flatten(1).norm(dim=1), torch.tensor(0.1), rtol=0.2)
    ahead = next(q[0] for q in asked[many[0] + 1 :] if len(q) == 1 and bool(score(q) < 0))
    far = float(ball.distance(ahead[None], x[None]))
    radius = (math.sqrt(d) if norm == 2 else d) * theta * far
    second = asked[many[1]] - asked[many[1]].mean(0)
    assert torch.allclose(second.flatten(1).norm(dim=1), torch.tensor(radius), rtol=0.3)
    assert all(bool((q >= 0).all()) and bool((q <= 1).all()) for q in asked)


def test_hopskipjump_splits_a_large_question(monkeypatch):
    """Points in several questions give the same normal as in one: the answers are centred over all of them."""
    monkeypatch.setattr(importlib.import_module("besiege.attacks.blackbox.hopskipjump"), "QUESTION", 1)
    w, score, image = half_space((1, 10, 10))
    x, start = image(0.1)[0], torch.where(w.view(1, 10, 10) > 0, 0.0, 1.0).float()
    asked = drive(x, start, Ball(2, INF), lambda z: score(z) < 0, steps=1, probes=120, bands=1)
    assert [len(q) for q in asked if len(q) > 1] == [64, 36]


def test_hopskipjump_on_the_circle_asks_across_the_way_and_steps_in_the_plane_of_what_it_learned():
    """By hand, on a half-space: points at right angles to the way to the image, then one circle, then that way."""
    shape = (1, 7, 7)
    w, score, image = half_space(shape)
    x, start = image(0.3)[0], torch.where(w.view(shape) > 0, 0.0, 1.0).float()
    asked = drive(x, start, Ball(2, INF), lambda z: score(z) < 0, steps=1, probes=49, bands=1)
    (many,) = (k for k, question in enumerate(asked) if len(question) > 1)
    fallen = [question[0] for question in asked[:many] if bool(score(question) < 0)]
    way = (fallen[-1] - x).double()
    aside = (asked[many] - fallen[-1]).double()
    assert float((aside * way).sum((1, 2, 3)).abs().max()) < 1e-5
    assert torch.allclose(aside.flatten(1).norm(dim=1), REACH * way.norm(), rtol=1e-4)
    side = torch.where(score(asked[many]) < 0, 1.0, -1.0)
    learned = ((side - side.mean()).view(-1, 1, 1, 1) * aside).sum(0)
    learned /= learned.norm()
    later = torch.cat(asked[many + 1 :]).double()
    circle = later[((later - x) * (later - fallen[-1])).sum((1, 2, 3)).abs() < 1e-5]  # by Thales
    assert len(circle) >= 3
    beside = circle - x
    for each in (way / way.norm(), learned):
        beside = beside - (beside * each).sum((1, 2, 3), keepdim=True) * each
    assert float(beside.abs().max()) < 1e-4
    assert float(((circle - x) * learned).sum((1, 2, 3)).min()) > 0
    best = min(float((z - x).norm()) for z in later if bool(score(z[None]) < 0))
    assert best < 0.9 * float(way.norm())


@pytest.mark.parametrize("norm", [2, INF])
def test_hopskipjump_keeps_to_the_band_that_gains(norm):
    """A half-space of the lowest frequencies: the points have those, then more, then all, and then mostly those."""
    shape, ball = (1, 16, 16), Ball(norm, INF)
    bands = _bands(torch.zeros(shape), 4)
    assert [band.size for band in bands] == [16, 64, 256]
    for band in bands:
        rows = band.down @ band.down.T
        assert torch.allclose(rows, torch.eye(len(rows)), atol=1e-5)
    w = (bands[0].down.T @ torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) @ bands[0].across)[None]
    w = (w / w.norm()).double()
    x, start = torch.full(shape, 0.5), 0.5 - 0.5 * w.sign().float() * (pixels(1, shape)[0] > 0.4)

    def fallen(z: Tensor) -> Tensor:
        return ((z.double() - 0.5) * w).sum((1, 2, 3)) < -0.1

    shares = []
    for question in drive(x, start, ball, fallen, steps=12, probes=16):
        if len(question) > 1:
            noise = (question - question.mean(0))[:, 0]
            inside = bands[0].down @ noise @ bands[0].across.T
            shares.append(float(inside.square().sum() / noise.square().sum()))
    first, second, third, *others = shares
    assert first > 0.8 > 0.5 > second > 0.15 > third
    assert sum(share > 0.8 for share in others) > 0.5 * len(others)


@pytest.mark.parametrize("norm", [2, INF])
def test_hopskipjump_begins_at_the_nearest_of_many_starts(norm):
    """Only one corner of the image counts; each start is followed by hand, the slow way."""
    x, ball, start = torch.full((3, 9, 12), 0.5), Ball(norm, INF), torch.zeros(3, 9, 12)

    def fallen(z: Tensor) -> Tensor:
        return z[:, 0, :2, :2].amax((1, 2)) < 0.4

    asked = drive(x, start, ball, fallen, starts=60, steps=1, probes=2)
    assert len(asked[0]) == 61
    assert torch.equal(asked[0][0], start)
    assert all(bool((q >= 0).all()) and bool((q <= 1).all()) for q in asked)
    before = asked[: max(k for k, question in enumerate(asked) if len(question) == 2)]
    distance = min(float(ball.distance(z[None], x[None])) for q in before for z in q[fallen(q)])
    least = INF
    for z in asked[0][fallen(asked[0])]:
        for radius in torch.linspace(0, float(ball.distance(z[None], x[None])), 2000):
            way = (z - x) * radius / ball.distance(z[None], x[None]) if norm == 2 else (z - x).clamp(-radius, radius)
            if bool(fallen((x + way)[None])):
                least = min(least, float(radius))
                break
    assert distance == pytest.approx(least, rel=0.03)


def test_orthogonal_directions_are_orthogonal_and_random():
    for d in (1, 4, 49, 784):
        directions = _orthogonal(min(d, 60), d, Stream(3)).double()
        directions /= directions.norm(dim=1, keepdim=True)
        assert torch.allclose(directions @ directions.T, torch.eye(len(directions)).double(), atol=1e-5)
    again = _orthogonal(60, 784, Stream(4))
    assert float((again - _orthogonal(60, 784, Stream(3))).abs().max()) > 0.5


PAPERS = {"starts": 0, "steps": 64, "probes": 100, "orthogonal": False, "bands": 1, "circle": False}


@pytest.mark.parametrize("options", [{}, PAPERS], ids=["", "as in the paper"])
@pytest.mark.parametrize("norm", [2, INF])
def test_hopskipjump_reaches_the_boundary_of_a_half_space(norm, options):
    w, score, image = half_space((1, 7, 7))
    x = torch.cat([image(distance) for distance in (0.3, 0.6, 0.9)])
    starts = torch.where(w.view(1, 1, 7, 7) > 0, 0.0, 1.0).float()
    outcome, _ = fire(
        hopskipjump(**options), score, x, Ball(norm, INF), queries=2000 if norm == 2 else 5000, starts=starts
    )
    least = score(x) / (1 if norm == 2 else float(w.abs().sum()))
    assert bool(outcome.success.all())
    assert bool((outcome.distance.double() >= least - 1e-6).all())
    assert bool((outcome.distance.double() <= (1.2 if norm == INF and options else 1.1) * least).all())


@pytest.mark.parametrize("norm", [2, INF])
def test_hopskipjump_ends_its_searches_where_float32_resolves_no_more(norm):
    x = pixels(1, (3, 16, 16))[0]
    for start, answer in ((1 - x, False), (1 - x, True), (x + 1e-6, False), (x, True)):
        asked = drive(x, start, Ball(norm, INF), lambda z, a=answer: torch.full((len(z),), a), steps=3, probes=5)
        assert sum(len(question) == 1 for question in asked) <= 24 + 3 * (24 + 24)
        assert all(bool(question.isfinite().all()) for question in asked)


def test_an_image_without_a_start_does_not_stop_the_others():
    """Class 0 is all that lies near images 0 and 2; noise is never that, and image 1 would have to get there."""
    x = pixels(3, (1, 8, 8))
    attack, labels = hopskipjump(probes=30), torch.tensor([0, 1, 0])

    def score(z: Tensor) -> Tensor:
        return 0.2 - torch.cdist(z.double().flatten(1), x[[0, 2]].double().flatten(1)).amin(1)

    outcome, _ = fire(attack, score, x, Ball(2, INF), queries=500, labels=labels)
    assert outcome.success.tolist() == [True, False, True]
    assert outcome.distance[[0, 2]].tolist() == pytest.approx([0.2, 0.2], rel=0.1)
    assert outcome.notes == ("1 images have no starting point",)
