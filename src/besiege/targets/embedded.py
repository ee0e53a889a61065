"""The targets that the package brings along."""

from __future__ import annotations

import torch

from besiege.core.errors import BadInput, nearest
from besiege.core.target import Target
from besiege.embedded.networks import NETWORKS, load


def shape(name: str) -> tuple[int, int, int]:
    """What images an embedded network takes.

    Raises:
        BadInput: there is no such network; the nearest name is suggested.
    """
    if name not in NETWORKS:
        raise BadInput(f"there is no embedded target {name!r}; {nearest(name, NETWORKS)}")
    return (3, 32, 32) if name == "digits-rgb" else (1, 28, 28)


def read(name: str, device: torch.device, batch: int) -> Target:
    """``digits-cnn``, ``digits-mlp``, ``digits-softmax`` or ``digits-rgb`` (see `besiege.embedded.networks`)."""
    takes = shape(name)
    return Target.of(load(name).to(device), classes=10, shape=takes, name=f"embedded:{name}", batch=batch)
