"""The embedded networks: what they are and their weights, trained by ``benchmarks/train_embedded.py``.

Accuracy on the 500 embedded test images that belong to each (the test suite asserts it):

=============== ============================================ ========
digits-cnn      two convolutions, two dense layers, 28x28    98.6 %
digits-mlp      784-32-10 with ReLU, 28x28                   95.6 %
digits-softmax  softmax regression, 28x28                    94.6 %
digits-rgb      three convolutions, two dense layers, 32x32  97.0 %
=============== ============================================ ========

The weights are stored in half precision and run in float32.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class DigitsCNN(nn.Module):
    """Two convolutions and two dense layers on 1x28x28."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 32, 3, padding=1)
        self.f1 = nn.Linear(1568, 64)
        self.f2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        logits: Tensor = self.f2(F.relu(self.f1(x.flatten(1))))
        return logits


class DigitsRGB(nn.Module):
    """Three convolutions and two dense layers on 3x32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 32, 3, padding=1)
        self.c3 = nn.Conv2d(32, 48, 3, padding=1)
        self.f1 = nn.Linear(768, 64)
        self.f2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 3, 32, 32)."""
        for layer in (self.c1, self.c2, self.c3):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        logits: Tensor = self.f2(F.relu(self.f1(x.flatten(1))))
        return logits


def mlp() -> nn.Module:
    """A dense network of two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def softmax() -> nn.Module:
    """Softmax regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


NETWORKS = {"digits-cnn": DigitsCNN, "digits-mlp": mlp, "digits-softmax": softmax, "digits-rgb": DigitsRGB}


def weights(name: str) -> Path:
    """Where the weights of a network lie."""
    return Path(__file__).with_name(f"{name}.safetensors")


def load(name: str) -> nn.Module:
    """A trained network, in evaluation mode."""
    module = NETWORKS[name]()
    module.load_state_dict(load_file(weights(name)))
    return module.eval()


def save(module: nn.Module, name: str) -> None:
    """Store a network's weights in half precision; from then on `load` gives it back."""
    save_file({key: value.detach().half().contiguous() for key, value in module.state_dict().items()}, weights(name))
