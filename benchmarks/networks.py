"""The networks and images of `shared/data` that the benchmarks measure on (see its README.md).

Every function is a factory for the command line: ``besiege attack pgd benchmarks.networks:digits_cnn``. The
folder is read from ``BESIEGE_DATA``, by default ``../shared/data``.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.target import Target
from besiege.embedded.recipes import resnet9


def folder() -> Path:
    """Where the shared data lies."""
    path = Path(os.environ.get("BESIEGE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        raise BadInput(f"the benchmark data is not at {path}; set BESIEGE_DATA to the folder that holds it")
    return path


class Normalize(nn.Module):
    """``(x - m) / s`` a channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("m", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("s", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.m) / self.s


class DigitsCNN(nn.Module):
    """Networks A and R: two convolutions, two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Normalize([0.0], [1.0])
        self.c1 = nn.Conv2d(1, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 32, 3, padding=1)
        self.f1 = nn.Linear(1568, 100)
        self.f2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(self.norm(x))), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(x.flatten(1))))


class Block(nn.Module):
    """A residual block; where the shape changes the shortcut subsamples and pads with zeros (option A)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = width // 4 if stride != 1 or inside != width else 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x))


class ResNet(nn.Module):
    """He et al.'s CIFAR ResNet; network B is the one with 3 blocks a stage."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.norm = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            inside, width = widths[stage - 1], widths[stage]
            stack = [Block(inside if b == 0 else width, width, 2 if b == 0 and stage > 1 else 1) for b in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*stack))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.norm(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _load(module: nn.Module, path: str) -> nn.Module:
    missing, extra = module.load_state_dict(load_file(folder() / path), strict=False)
    wrong = [k for k in missing if not k.startswith("norm.") and not k.endswith("num_batches_tracked")] + extra
    if wrong:
        raise BadInput(f"{path} does not fit the network: {', '.join(wrong[:5])}")
    return module.eval()


def digits_cnn() -> nn.Module:
    """Network A."""
    return _load(DigitsCNN(), "bench/digits_cnn.safetensors")


def digits_cnn_robust() -> nn.Module:
    """Network R: trained adversarially at L∞ 0.2."""
    return _load(DigitsCNN(), "bench/digits_cnn_robust.safetensors")


def cifar10_resnet20() -> nn.Module:
    """Network B."""
    return _load(ResNet(3), "bench/cifar10_resnet20.safetensors")


def resnet20() -> nn.Module:
    """CIFAR-10 ResNet-20, 91.73 %."""
    return _load(ResNet(3), "cifar10_resnets/resnet20.safetensors")


def resnet32() -> nn.Module:
    """CIFAR-10 ResNet-32, 92.63 %."""
    return _load(ResNet(5), "cifar10_resnets/resnet32.safetensors")


def bench(network: str, n: int) -> tuple[Target, Images]:
    """Network ``A``, ``R`` or ``B`` with the first ``n`` of its 200 correctly classified images; it takes 128 at once.

    All 100 of a race go in one batch, as they do with the peers.
    """
    build = {"A": digits_cnn, "R": digits_cnn_robust, "B": cifar10_resnet20}[network]
    file = np.load(folder() / "bench" / ("cifar10_200.npz" if network == "B" else "digits_200.npz"))
    x = torch.from_numpy(file["x"])
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    images = Images.of(x, torch.from_numpy(file["y"]), name=f"bench-{network}")[:n]
    return Target.of(build(), classes=10, shape=images.shape, name=network, batch=128), images


def cifar10_fast_at() -> nn.Module:
    """The ResNet-9 that ``python -m benchmarks.defenses cifar10`` trained by fast adversarial training, at 8/255."""
    module = resnet9((3, 32, 32), 10, width=24)
    module.load_state_dict(load_file(Path(__file__).parent / "weights" / "cifar10_fast_at.safetensors"))
    return module.eval()


class SmallCNN(nn.Module):
    """The network that TRADES (Zhang et al. 2019) trains on MNIST."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"conv1": (1, 32), "conv2": (32, 32), "conv3": (32, 64), "conv4": (64, 64)}
        self.feature_extractor = nn.ModuleDict({k: nn.Conv2d(*w, 3) for k, w in widths.items()})
        widths = {"fc1": (1024, 200), "fc2": (200, 200), "fc3": (200, 10)}
        self.classifier = nn.ModuleDict({k: nn.Linear(*w) for k, w in widths.items()})

    def forward(self, x: Tensor) -> Tensor:
        conv, dense = self.feature_extractor, self.classifier
        x = F.max_pool2d(F.relu(conv["conv2"](F.relu(conv["conv1"](x)))), 2)
        x = F.max_pool2d(F.relu(conv["conv4"](F.relu(conv["conv3"](x)))), 2)
        return dense["fc3"](F.relu(dense["fc2"](F.relu(dense["fc1"](x.flatten(1))))))


def strided_cnn() -> nn.Module:
    """Wong & Kolter's network: two convolutions of stride 2, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def robust_net(name: str) -> nn.Module:
    """A network of `robust_nets` that was trained on MNIST against attacks, such as ``fast_mnist_pgd``."""
    empty = SmallCNN() if name == "trades_mnist_smallcnn" else strided_cnn()
    return _load(empty, f"robust_nets/{name}.safetensors")


def mnist(n: int, part: Literal["t10k", "train"] = "t10k") -> Images:
    """The first ``n`` test images of MNIST, or training images."""
    with gzip.open(folder() / "mnist" / f"{part}-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(16 + 784 * n), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder() / "mnist" / f"{part}-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(8 + n), np.uint8, offset=8)
    return Images.of(torch.from_numpy(x / np.float32(255)), torch.from_numpy(y.astype(np.int64)), name="mnist")
