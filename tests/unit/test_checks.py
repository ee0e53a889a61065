"""Each check of an audit fires on a model built to trigger it and is silent on a plain network."""

import pytest
import torch
from torch import Tensor, nn

from besiege.audit.checks import check_target
from besiege.core.target import Target
from besiege.core.threat import INF, Ball
from besiege.data import open_images
from besiege.targets import open_target

IMAGES = open_images("embedded:digits", limit=24)
PLAIN = open_target("embedded:digits-cnn", data=IMAGES)


class Saturated(nn.Module):
    """Gradients masked by a softmax at T = 1/100."""

    def forward(self, x: Tensor) -> Tensor:
        return (PLAIN.call(x) * 100).softmax(1).clamp_min(1e-30).log()


class Rounded(nn.Module):
    """Gradients shattered by rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return PLAIN.call((x * 8).round() / 8)


class Random(nn.Module):
    """Every pass differs."""

    def forward(self, x: Tensor) -> Tensor:
        return PLAIN.call(x + 0.1 * torch.randn_like(x))


class Detached(nn.Module):
    """The gradient is exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        return PLAIN.call(x.detach()) + 0 * x.sum()


class Batched(nn.Module):
    """Scores are normalized over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        scores = PLAIN.call(x)
        return 3 * (scores - scores.mean(0)) / (scores.std(0, unbiased=False) + 0.1)


def failed(module: nn.Module) -> set[str]:
    """The names of the checks that fire."""
    torch.manual_seed(0)
    target = Target.of(module, classes=10, shape=(1, 28, 28))
    right = IMAGES[(target.labels(IMAGES.x) == IMAGES.y).nonzero().squeeze(1)]
    return {check.name for check in check_target(target, right, Ball(INF, 0.1)) if not check.passed}


def test_the_plain_network_raises_nothing() -> None:
    right = IMAGES[(PLAIN.labels(IMAGES.x) == IMAGES.y).nonzero().squeeze(1)]
    checks = check_target(PLAIN, right, Ball(INF, 0.1))
    assert len(checks) >= 7
    assert [check.name for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Saturated(), "gradients"),
        (Rounded(), "gradients"),
        (Rounded(), "unbounded attack"),
        (Random(), "repeatable"),
        (Detached(), "gradients"),
        (Detached(), "unbounded attack"),
        (Batched(), "batch-independent"),
    ],
)
def test_a_check_fires(module: nn.Module, expected: str) -> None:
    assert expected in failed(module)
