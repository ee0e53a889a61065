"""A torch module as a target."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.target import Target
from besiege.core.threat import Access
from besiege.targets.preprocessing import Front, Preprocessing
from besiege.targets.probe import FEW, probe, settled
from besiege.targets.weights import refuse_nan


def from_module(
    module: nn.Module,
    shape: tuple[int, int, int],
    classes: int | None = None,
    *,
    name: str = "module",
    preprocessing: Preprocessing | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    images: Tensor | None = None,
) -> Target:
    """A module that maps images to logits, probabilities or labels, asked once whether it does.

    ``shape`` is (c, h, w) of the images, before ``preprocessing``; ``images`` (n, c, h, w) are a few to ask about
    (random ones otherwise). What is found out stands in the target's ``notes``; half precision stays half.

    Raises:
        BadInput: weights are NaN, it fails, or its answers are no scores of ``classes`` classes.
    """
    refuse_nan(module.state_dict(), name)
    module = module.to(device)
    first = next(module.parameters(), None)
    dtype = torch.float32 if first is None else first.dtype
    parts = [module]
    if preprocessing is not None and preprocessing != Preprocessing():
        parts.insert(0, Front(preprocessing, shape[0]).to(device, dtype))
    x = ordinary(images, shape).to(device, dtype)
    found = probe(_chain(parts), x, name=name, classes=classes, access=Access.WEIGHTS)
    whole = _chain([*parts, *found.tail])
    target = Target.of(whole, classes=found.classes, shape=shape, name=name, batch=batch)
    return settled(replace(target, device=torch.device(device), dtype=dtype), found)


def ordinary(images: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """A few images to ask about: the first of those given, or noise that is the same each time."""
    if images is None:
        return torch.rand(FEW, *shape, generator=torch.Generator().manual_seed(0))
    if tuple(images.shape[1:]) != shape:
        raise BadInput(f"images of shape {tuple(images.shape[1:])} are not {shape}")
    return images[:FEW]


def _chain(parts: list[nn.Module]) -> nn.Module:
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
