"""Evolution strategies: against a slow version for one image, and on functions whose minimum is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from besiege.attacks.blackbox.evolution import adapt, evolve
from besiege.core.rng import Rng


class Function:
    """An oracle whose loss is a function of the image, which never falls. Keeps every image it is asked about."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def loss(self, x, loss="margin", rows=None):
        self.asked.append(x.clone())
        return self.function(x)

    def live(self, *state):
        return state


def as_image(x, genes):
    return genes.view_as(x)


def streams(n):
    return Rng.of(0, torch.arange(n), "evolution")


def slow(noises, function, mean, spread, population):
    """CMA-ES with the covariance matrix written out, its entries off the diagonal forgotten; yields each draw."""
    d, mu = len(mean), population // 2
    w = np.array([math.log((population + 1) / 2) - math.log(i) for i in range(1, mu + 1)])
    w /= w.sum()
    mueff = 1 / sum(w**2)
    cs, cc = (mueff + 2) / (d + mueff + 3), 4 / (d + 4)
    ds = 1 + 2 * max(0, math.sqrt((mueff - 1) / (d + 1)) - 1) + cs
    ccov = 1 / mueff * 2 / (d + math.sqrt(2)) ** 2
    ccov += (1 - 1 / mueff) * min(1, (2 * mueff - 1) / ((d + 2) ** 2 + mueff))
    ccov = min(1, ccov * (d + 2) / 3)
    chi = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
    m, sigma, cov, ps, pc = np.array(mean), 1.0, np.diag(np.array(spread) ** 2), np.zeros(d), np.zeros(d)
    for g, noise in enumerate(noises, 1):
        root = np.sqrt(cov)
        y = [root @ z for z in noise]
        xs = [m + sigma * step for step in y]
        yield xs
        best = np.argsort([function(v) for v in xs], kind="stable")[:mu]
        yw = sum(w[i] * y[k] for i, k in enumerate(best))
        m = m + sigma * yw
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * mueff) * np.linalg.inv(root) @ yw
        hs = np.linalg.norm(ps) / math.sqrt(1 - (1 - cs) ** (2 * g)) < (1.4 + 2 / (d + 1)) * chi
        pc = (1 - cc) * pc + hs * math.sqrt(cc * (2 - cc) * mueff) * yw
        rank_one = np.outer(pc, pc) + (1 - hs) * cc * (2 - cc) * cov
        rank_mu = sum(w[i] * np.outer(y[k], y[k]) for i, k in enumerate(best))
        cov = np.diag(np.diag((1 - ccov) * cov + ccov / mueff * rank_one + ccov * (1 - 1 / mueff) * rank_mu))
        sigma *= math.exp(cs / ds * (np.linalg.norm(ps) / chi - 1))


@pytest.mark.parametrize("population", [6, 25])
def test_each_image_follows_the_slow_version(population):
    spread = torch.tensor([0.3, 0.1, 0.5, 0.2, 1.0], dtype=torch.float64)
    mean = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centres = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)
    scales = torch.tensor([1.0, 9.0, 0.2, 30.0, 4.0], dtype=torch.float64)

    def ellipsoid(z):
        return ((z.flatten(1) - centres[:, None]).square() * scales).sum(1)

    oracle = Function(ellipsoid)
    adapt(oracle, mean.view(3, 1, 1, 5), streams(3), mean, spread, as_image, population=population, generations=30)
    asked = torch.stack(oracle.asked).view(30, population, 3, 5)
    rng = streams(3)
    noise = [rng.randn(population, 5).double().numpy() for _ in range(30)]
    for i in range(3):
        one = slow(
            [z[i] for z in noise],
            lambda v, i=i: (((v - float(centres[i])) ** 2) * scales.numpy()).sum(),
            mean[i].numpy(),
            spread.numpy(),
            population,
        )
        for generation, expected in enumerate(one):
            assert np.allclose(asked[generation, :, i], np.stack(expected), rtol=1e-7, atol=1e-9)


def test_cma_es_finds_the_bottom_of_a_bowl_and_runs_down_a_slope():
    x = torch.full((2, 1, 2, 5), 0.9, dtype=torch.float64)
    stretch = torch.logspace(0, 3, 10, dtype=torch.float64)
    bowl = Function(lambda z: ((z.flatten(1) - 0.3).square() * stretch).sum(1))
    adapt(bowl, x, streams(2), x.flatten(1), x.new_full((10,), 0.2), as_image, population=10, generations=250)
    assert float((bowl.asked[-1] - 0.3).abs().max()) < 1e-6
    slope = Function(lambda z: z.flatten(1).sum(1))
    adapt(slope, x, streams(2), x.flatten(1), x.new_full((10,), 0.01), as_image, population=10, generations=60)
    assert float(slope.asked[-1].flatten(1).sum(1).max()) < -100


@pytest.mark.parametrize("options", [{}, {"most": 1.0, "redraw": True}, {"crossover": 0.3, "together": 2}])
@pytest.mark.parametrize("best", [False, True])
def test_differential_evolution_finds_the_bottom_of_a_bowl(options, best):
    x = torch.zeros(2, 1, 2, 3)
    bowl = Function(lambda z: (z.flatten(1) - 0.3).square().sum(1))
    evolve(bowl, x, streams(2), streams(2).rand(30, 6), as_image, generations=150, factor=0.8, best=best, **options)
    assert float((torch.stack(bowl.asked[-30:]) - 0.3).square().flatten(2).sum(2).min(0).values.max()) < 3e-3
    asked = torch.cat(bowl.asked)
    assert float(asked.min()) >= 0
    assert float(asked.max()) <= 1


def test_a_child_takes_whole_groups_from_its_parent_and_changes_one_at_least():
    """Nothing is ever better than the parents, so every child is compared with the first generation."""
    x = torch.zeros(2, 1, 4, 3)
    genes = streams(2).rand(8, 12)
    oracle = Function(lambda z: (z.flatten(1)[:, None] != genes.flatten(0, 1)).any(2).all(1).to(z))
    evolve(oracle, x, streams(2), genes, as_image, generations=50, factor=0.5, best=False, crossover=0.25, together=3)
    children = torch.stack(oracle.asked[8:]).view(50, 8, 2, 4, 3)
    new = (children != genes.transpose(0, 1).reshape(1, 8, 2, 4, 3)).any(4)
    assert int(new.sum(3).min()) >= 1
    # a quarter of the groups by chance, and one where chance left none: (1 - 3/4^4) ... of four
    assert float(new.double().mean()) == pytest.approx(0.25 + 0.75**4 / 4, abs=0.03)
