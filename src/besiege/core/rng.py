"""Random draws of one image depend on the seed, that image and the method alone.

A batch draws from a counter-based stream: draw number k of image i is a hash (splitmix64, Steele et al.
2014) of (seed, i, method, k), so rows can be dropped, split or reordered and every image keeps its numbers.
A search over one image draws from a generator seeded by the same key.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from besiege.core.threat import Uniform

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (z >> bits) & (_MASK >> bits)


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finalizer: 64 well-mixed bits of each counter."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


class Rng(Uniform):
    """The streams of n images: each draw has shape (n, *shape).

    Rows taken from a stream go on counting with it, so whoever draws next, no number is drawn twice.
    """

    def __init__(self, keys: Tensor, draws: int = 0) -> None:
        self.keys = keys
        self._count = [draws]

    @property
    def draws(self) -> int:
        """How often was drawn so far."""
        return self._count[0]

    @classmethod
    def of(cls, seed: int, images: Tensor, method: str) -> Rng:
        """Streams for the images numbered ``images`` (n,) under one method."""
        digest = hashlib.blake2b(f"{seed}/{method}".encode(), digest_size=8).digest()
        base = _signed(int.from_bytes(digest, "little"))
        return cls(_mix(images.long() * _signed(_GOLDEN) + base))

    def __getitem__(self, rows: Tensor) -> Rng:
        part = Rng(self.keys[rows])
        part._count = self._count
        return part

    def __len__(self) -> int:
        return len(self.keys)

    def bits(self, *shape: int) -> Tensor:
        """64 random bits each, int64 (n, *shape)."""
        count = math.prod(shape)
        self._count[0] += 1
        start = _mix(self.keys + _signed(self.draws * _GOLDEN))
        counter = torch.arange(1, count + 1, device=self.keys.device) * _signed(_GOLDEN)
        return _mix(start[:, None] + counter).view(len(self.keys), *shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32."""
        return _shift(self.bits(*shape), 40).float() * 2.0**-24

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, float32 (Box-Muller, both halves used)."""
        count = math.prod(shape)
        bits = self.bits((count + 1) // 2)
        radius = ((_shift(bits, 40).float() + 1) * 2.0**-24).log_().mul_(-2).sqrt_()
        angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return both[:, :count].reshape(len(self.keys), *shape)

    def signs(self, *shape: int) -> Tensor:
        """-1 or 1, float32."""
        return 1 - 2 * _shift(self.bits(*shape), 63).float()

    def below(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), int64."""
        return _shift(_shift(self.bits(*shape), 32) * high, 32)

    def stream(self, row: int) -> Stream:
        """The generator of one image, for a method that branches per image."""
        return Stream(int(self.keys[row]), self.keys.device)


class Stream:
    """The draws of one image: shapes have no batch dimension."""

    def __init__(self, key: int, device: torch.device | None = None) -> None:
        self.generator = torch.Generator().manual_seed(key)
        self.device = device

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def signs(self, *shape: int) -> Tensor:
        """-1 or 1."""
        return (torch.randint(0, 2, shape, generator=self.generator) * 2.0 - 1).to(self.device)

    def below(self, high: int) -> int:
        """A uniform integer in [0, high)."""
        return int(torch.randint(0, high, (), generator=self.generator))
