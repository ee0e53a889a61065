"""The solver of the L-BFGS attack against scipy's L-BFGS-B, which takes one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from besiege.attacks.whitebox.lbfgs import _descend, lbfgs
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.evasion import evade

N, SHAPE = 6, (1, 4, 5)


def network() -> tuple[nn.Module, Images]:
    """Two tanh layers in float64, and images some of whose pixels are 0 or 1."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    module = module.double()
    for layer in (1, 3, 5):
        module[layer].weight.data *= 4
    x = (0.5 + 0.5 * torch.randn(N, *SHAPE, dtype=torch.float64)).clamp(0, 1)
    return module, Images.of(x, module(x).argmax(1))


def solved(module: nn.Module, x: Tensor, label: Tensor, c: float) -> tuple[float, Tensor]:
    """The least objective that scipy finds from the image itself, and where."""

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        at = torch.from_numpy(flat.copy()).view_as(x).requires_grad_()
        loss = value(module, at[None], x[None], label[None], c).squeeze()
        loss.backward()
        assert at.grad is not None
        return loss.item(), at.grad.flatten().numpy()

    found = minimize(objective, x.flatten().numpy(), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * x.numel())
    return float(found.fun), torch.from_numpy(found.x).view_as(x)


def value(module: nn.Module, adv: Tensor, x: Tensor, labels: Tensor, c: float) -> Tensor:
    """(n,) distance squared minus c times the logarithm of the probability to leave the class."""
    p = module(adv).softmax(1).gather(1, labels[:, None]).squeeze(1)
    return (adv - x).square().flatten(1).sum(1) - c * torch.log1p(-p)


@pytest.mark.parametrize("c", [0.01, 0.3, 3.0])
def test_a_search_ends_where_scipys_does(c: float) -> None:
    module, images = network()
    target = Target.of(module, classes=3, shape=SHAPE)
    meter = Meter(target, images.x, Goal(images.y), Ball(2, INF), seeks="minimum")
    distance, end = _descend(
        meter, images.x, images.x, torch.full((N,), c, dtype=torch.float64), torch.arange(N), 300, 10
    )
    ours = value(module, end, images.x, images.y, c)
    scipys = torch.tensor([solved(module, x, y, c)[0] for x, y in zip(images.x, images.y, strict=True)])
    assert bool((ours <= scipys * 1.001 + 1e-6).all())
    fell = module(end).argmax(1) != images.y
    assert torch.equal(distance.isfinite(), fell)
    assert torch.allclose(distance[fell], (end - images.x).flatten(1).norm(dim=1)[fell])
    assert int(meter.backward.max()) <= 60


def test_rows_do_not_change_one_another() -> None:
    module, images = network()
    target = Target.of(module, classes=3, shape=SHAPE)
    threat = ThreatModel(Access.GRADIENTS, Ball(2, INF))
    together = evade(lbfgs(), target, images, threat)
    for row in range(N):
        alone = evade(lbfgs(), target, images[[row]], threat)
        assert torch.allclose(alone.adv[0], together.adv[row], atol=1e-6)
        assert int(alone.backward) == int(together.backward[row])
