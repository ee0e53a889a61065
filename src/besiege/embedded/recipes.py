"""Networks of any input size, and the recipes that train them in minutes on two cores."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from besiege.core.errors import BadInput, nearest
from besiege.core.fit import Fit, Shape


def softmax(shape: Shape, classes: int) -> nn.Module:
    """Softmax regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(shape), classes))


def mlp(shape: Shape, classes: int, *, hidden: int = 64) -> nn.Module:
    """A dense network of two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(shape), hidden), nn.ReLU(), nn.Linear(hidden, classes))


def cnn(shape: Shape, classes: int, *, width: int = 16, hidden: int = 128) -> nn.Module:
    """Two convolutions, each with a pool behind it, and two dense layers."""
    channels, height, width_px = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (width_px // 4), hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def small_cnn(shape: Shape, classes: int) -> nn.Module:
    """The SmallCNN of TRADES: four convolutions without padding, three dense layers (arXiv:1901.08573)."""
    channels, height, width = shape
    flat = 64 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, classes),
    )


class Residual(nn.Module):
    """What ``body`` adds to its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """``x + body(x)``."""
        added: Tensor = x + self.body(x)
        return added


def resnet9(shape: Shape, classes: int, *, width: int = 16) -> nn.Module:
    """Eight convolutions with batch normalization, two of the pairs residual, and a dense layer."""

    def block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))

    return nn.Sequential(
        block(shape[0], width),
        block(width, 2 * width, pool=True),
        Residual(nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))),
        block(2 * width, 4 * width, pool=True),
        block(4 * width, 8 * width, pool=True),
        Residual(nn.Sequential(block(8 * width, 8 * width), block(8 * width, 8 * width))),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


FITS = {
    "softmax": Fit(softmax, "softmax", epochs=20, lr=0.05),
    "mlp": Fit(mlp, "mlp", epochs=20, lr=0.05),
    "cnn": Fit(cnn, "cnn", epochs=15, lr=0.05, shift=1),
    "small-cnn": Fit(small_cnn, "small-cnn", epochs=8, lr=0.05, batch=128),
    "resnet9": Fit(resnet9, "resnet9", epochs=12, lr=0.05, batch=128, shift=4, flip=True),
    "resnet9-24": Fit(partial(resnet9, width=24), "resnet9-24", epochs=15, lr=0.2, batch=128, shift=4, flip=True),
}
"""The recipes by the name that ``--fit`` takes."""


def recipe(name: str) -> Fit:
    """The recipe of that name.

    Raises:
        BadInput: there is none; the nearest name is suggested.
    """
    if name not in FITS:
        raise BadInput(f"there is no training recipe {name!r}; {nearest(name, FITS)}")
    return FITS[name]


def _size(shape: Shape) -> int:
    channels, height, width = shape
    return channels * height * width
