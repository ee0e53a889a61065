"""Any Python function as a target: queried, never differentiated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from besiege.core.target import Target
from besiege.core.threat import Access
from besiege.targets.module import ordinary
from besiege.targets.preprocessing import Front, Preprocessing
from besiege.targets.probe import Unpack, probe, settled


def from_callable(
    function: Callable[[Tensor], Any],
    classes: int | None,
    shape: tuple[int, int, int],
    *,
    name: str = "function",
    preprocessing: Preprocessing | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    images: Tensor | None = None,
) -> Target:
    """A function of images (n, c, h, w), float32 in [0, 1], that answers with a tensor or an array.

    Scores (n, classes), logits or probabilities, grant `Access.SCORES`; whole-number labels (n,) grant
    `Access.LABELS`, and ``classes`` must be given then. ``images`` are a few to ask about (random ones otherwise).

    Raises:
        BadInput: it fails, or its answers are neither.
    """
    parts: list[nn.Module] = [_Function(function)]
    if preprocessing is not None and preprocessing != Preprocessing():
        parts.insert(0, Front(preprocessing, shape[0]).to(device))
    x = ordinary(images, shape).to(device)
    found = probe(nn.Sequential(*parts), x, name=name, classes=classes, access=Access.SCORES)
    call = nn.Sequential(*parts, *found.tail)
    target = Target(
        call=call,
        access=found.access,
        classes=found.classes,
        shape=shape,
        name=name,
        fingerprint="" if found.stochastic else _digest(call, x),
        batch=batch,
        device=torch.device(device),
    )
    return settled(target, found)


class _Function(nn.Module):
    """The function, handed images without their graph; its answer comes back on their device."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function, self.unpack = function, Unpack()

    def forward(self, x: Tensor) -> Any:
        said = self.unpack(self.function(x.detach()))
        return said.detach().to(x.device) if isinstance(said, Tensor) else said


def _digest(call: nn.Module, x: Tensor) -> str:
    """A digest of what a function answers, since what it is cannot be read."""
    with torch.no_grad():
        said = (call(x).double() * 1e3).round().long().cpu()
    return hashlib.blake2b(said.numpy().tobytes(), digest_size=8).hexdigest()
