"""The ball in every norm against slow solvers that are obviously right."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, number

NORMS = [0.0, 1.0, 2.0, INF]
SHAPE = (2, 2, 3)

pixels = st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12)
anywhere = st.lists(st.floats(-3, 4, width=32), min_size=12, max_size=12)
radius = st.floats(0.01, 5)


def image(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, *SHAPE)


def slow_projection(norm: float, adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """By bisection on the one multiplier of the problem; norm 0 by trying every choice of pixels."""
    delta, low, high = adv - x, -x, 1 - x
    inside = delta.clamp(low, high)
    if norm == INF:
        return x + delta.clamp(low.clamp_min(-eps), high.clamp_max(eps))
    if norm == 0:
        best = x
        spots = list(itertools.product(range(SHAPE[1]), range(SHAPE[2])))
        for some in itertools.combinations(spots, min(int(eps), len(spots))):
            tried = x.clone()
            for i, j in some:
                tried[..., i, j] = adv[..., i, j].clamp(0, 1)
            best = tried if (tried - adv).norm() < (best - adv).norm() else best
        return best

    def at(t: float) -> Tensor:
        """The minimum of |z - delta|^2 / 2 + t |z|_1, or + t |z|_2^2 / 2, within the box."""
        shrunk = delta.sign() * (delta.abs() - t).clamp_min(0) if norm == 1 else delta / (1 + t)
        return shrunk.clamp(low, high)

    def size(z: Tensor) -> float:
        return float(torch.linalg.vector_norm(z.flatten(), norm))

    if size(inside) <= eps:
        return x + inside
    small, large = 0.0, 1e9
    for _ in range(200):
        middle = (small + large) / 2
        small, large = (middle, large) if size(at(middle)) > eps else (small, middle)
    return x + at(large)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(x=pixels, adv=anywhere, eps=radius)
def test_the_projection_is_the_nearest_point(norm, x, adv, eps):
    x, adv = image(x), image(adv)
    ball = Ball(norm, eps)
    near, slow = ball.project(adv, x), slow_projection(norm, adv, x, eps)
    assert bool(ball.holds(near, x).all())
    assert float((near - adv).norm()) <= float((slow - adv).norm()) + 1e-5 * (1 + float((slow - adv).norm()))
    if norm:
        assert torch.allclose(near, slow, atol=2e-5)
    assert torch.allclose(ball.project(near, x), near, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(x=pixels, direction=anywhere, eps=radius)
def test_the_farthest_point_is_the_best_vertex(norm, x, direction, eps):
    """The largest inner product over the ball and the box, by a greedy choice or bisection that is plainly right."""
    x = image(x)
    direction = torch.where(image(direction).abs() < 1e-2, 0, image(direction))
    ball = Ball(norm, eps)
    far = ball.farthest(x, direction)
    assert bool(ball.holds(far, x).all())
    gain = float(((far - x) * direction).sum())
    room = torch.where(direction > 0, 1 - x, x)
    height = direction.abs()
    if norm == INF:
        most = float((height * room.clamp_max(eps)).sum())
    elif norm == 0:
        most = float((height * room).sum(1).flatten().sort(descending=True).values[: int(eps)].sum())
        # the point nearest to a far target: pixels by squared gain, not by product; at least half as good
        most = most / 2
    elif norm == 1:
        order = height.flatten().argsort(descending=True)
        ends = room.flatten()[order].cumsum(0).clamp_max(eps)
        most = float((height.flatten()[order] * ends.diff(prepend=ends.new_zeros(1))).sum())
    else:
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float((height * middle).minimum(room).norm()) <= eps else (low, middle)
        most = float((height * (height * low).minimum(room)).sum())
    assert gain >= most * (1 - 2e-3) - 1e-6


def test_each_row_has_its_own_radius():
    g = torch.Generator().manual_seed(0)
    x, adv = torch.rand(4, *SHAPE, generator=g), torch.randn(4, *SHAPE, generator=g)
    eps = torch.tensor([0.1, 1.0, 2.0, 3.5])
    for norm in NORMS:
        together = Ball(norm, eps).project(adv, x)
        drawn = Ball(norm, eps).sample(x, Rng.of(0, torch.arange(4), "m"))
        for i in range(4):
            alone = Ball(norm, float(eps[i])).project(adv[i : i + 1], x[i : i + 1])
            assert torch.equal(together[i : i + 1], alone)
            single = Ball(norm, float(eps[i])).sample(x[i : i + 1], Rng.of(0, torch.tensor([i]), "m"))
            assert torch.equal(drawn[i : i + 1], single)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_radius_only_the_box_is_left(norm):
    g = torch.Generator().manual_seed(0)
    x, adv = torch.rand(3, *SHAPE, generator=g), 3 * torch.randn(3, *SHAPE, generator=g)
    ball = Ball(norm, INF)
    assert torch.allclose(ball.project(adv, x), adv.clamp(0, 1), atol=1e-6)
    assert ball.holds(adv.clamp(0, 1), x).tolist() == [True] * 3
    assert not bool(ball.holds(adv, x).any())


@pytest.mark.parametrize("norm", NORMS)
def test_a_projection_at_full_size_fits_in_single_precision(norm):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, 3, 32, 32, generator=g)
    x[:, :, ::3] = x[:, :, ::3].round()
    eps = {0: 50.0, 1: 12.0, 2: 0.5, INF: 8 / 255}[norm]
    for scale in (1e-4, 0.1, 10, 1e4):
        adv = x + scale * torch.randn(x.shape, generator=g)
        near = Ball(norm, eps).project(adv, x)
        assert bool(Ball(norm, eps).holds(near, x).all())
        size = torch.linalg.vector_norm((near - x).double().flatten(1), norm, dim=1) if norm else None
        assert size is None or bool((size <= eps * (1 + 1e-6) + 1e-7).all())
        assert near.dtype == torch.float32


def test_the_size_of_a_change():
    delta = torch.tensor([[[[3.0, 0.0]], [[-4.0, 0.0]]], [[[0.0, 1.0]], [[1.0, 0.0]]]])
    assert Ball(0, 1).size(delta).tolist() == [1, 2]
    assert Ball(1, 1).size(delta).tolist() == [7, 2]
    assert Ball(2, 1).size(delta).tolist() == pytest.approx([5, 2**0.5])
    assert Ball(INF, 1).size(delta).tolist() == [4, 1]
    assert Ball(2, 1).distance(delta + 1, torch.ones(2, 2, 1, 2)).tolist() == pytest.approx([5, 2**0.5])


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_the_steepest_direction(norm):
    grad = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    grad[4] = 0
    way = Ball(norm, 0.3).steepest(grad)
    assert Ball(norm, 1).size(way).tolist() == pytest.approx([1, 1, 1, 1, 0], abs=1e-5)
    gain = (way * grad).flatten(1).sum(1)
    best = torch.linalg.vector_norm(grad.flatten(1), {1: INF, 2: 2, INF: 1}[norm], dim=1)
    if norm == 1:  # shared by the largest twentieth
        share = grad.flatten(1).abs().topk(192 // 20).values.mean(1)
        assert torch.allclose(gain, share)
    else:
        assert torch.allclose(gain, best)


def test_the_steepest_pixel_is_the_one_with_the_longest_gradient():
    grad = torch.zeros(1, 2, 2, 2)
    grad[0, :, 1, 0] = torch.tensor([3.0, 4.0])
    grad[0, 0, 0, 0] = 4.5
    way = Ball(0, 1).steepest(grad)
    assert (way != 0).nonzero().tolist() == [[0, 0, 1, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_lies_in_the_ball_and_fills_it(norm):
    n, shape = 400, (1, 3, 4)
    x = torch.full((n, *shape), 0.5)
    ball = Ball(norm, {0: 4.0}.get(norm, 0.4))
    drawn = ball.sample(x, Rng.of(1, torch.arange(n), "m"))
    assert bool(ball.holds(drawn, x).all())
    size = ball.distance(drawn, x)
    if norm == 0:
        assert float(size.min()) >= 3
    else:  # the radius to the power of the dimension is uniform in a uniform draw
        assert kstest(((size / 0.4) ** 12).numpy(), "uniform").pvalue > 1e-3
        assert float((drawn - x).mean(0).abs().max()) < 0.4 * (0.12 if norm == INF else 0.1)
    edge = ball.sample(torch.ones(n, *shape), Rng.of(1, torch.arange(n), "m"))
    assert bool(ball.holds(edge, torch.ones(n, *shape)).all())


def test_a_ball_is_read_from_text():
    assert (Ball.parse("linf:8/255").norm, Ball.parse("linf:8/255").eps) == (INF, 8 / 255)
    assert str(Ball.parse("L2: 0.5")) == "l2:0.5"
    assert Ball.parse("l0:3").eps == 3
    assert number("1 / 4") == 0.25
    for bad in ("l3:1", "0.5", "l2:", "l2:x", "l2:0", "l2:-1", "l2:nan", "l2:1/0"):
        with pytest.raises(BadInput):
            Ball.parse(bad)
    with pytest.raises(BadInput, match="norm 3"):
        Ball(3, 0.1)


@pytest.mark.parametrize("norm", [1, 2, INF])
def test_a_point_is_shortened_to_where_its_line_leaves_the_ball(norm):
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 4, 5, generator=draws, dtype=torch.float64)
    adv = x + torch.randn(6, 3, 4, 5, generator=draws, dtype=torch.float64)
    eps = torch.linspace(0.1, 60, 6, dtype=torch.float64)
    ball, boxed = Ball(norm, eps), adv.clamp(0, 1)
    short = ball.shorten(adv, x)
    share = (eps / ball.distance(boxed, x)).clamp_max(1)
    assert bool((share[1:] > share[:-1]).any()) and float(share[0]) < 1 == float(share[-1])
    assert torch.allclose(short, x + share[:, None, None, None] * (boxed - x))
    assert bool(ball.holds(short, x).all())
