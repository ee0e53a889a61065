"""Whole networks in a file, ``torch.export`` programs and pickled modules: opening either runs code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.targets.factory import needs_trust
from besiege.targets.probe import first_line
from besiege.targets.weights import CodeInside, load_plain


class Chunked(nn.Module):
    """A network exported for batches of one size: fed in such batches, the last one filled up."""

    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x: Tensor) -> Tensor:
        """The answers (n, ...) to any number of images."""
        return in_batches(self.module, x, self.size)


def in_batches(call: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """What ``call`` answers about images (n, ...) when it takes exactly ``size`` of them at a time."""
    missing = -len(x) % size
    full = x if not missing else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
    return torch.cat([call(part) for part in torch.split(full, size)])[: len(x)]


def exported(path: Path, *, trust_code: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """The network in a ``.pt2`` file, and the shape of the one input it takes, without the batch.

    Raises:
        BadInput: code is not trusted, the file is unreadable, or it takes no single batch of images.
    """
    _there(path)
    if not trust_code:
        raise needs_trust(str(path))
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise BadInput(f"{path}: unreadable or truncated ({first_line(error)})") from None
    users = set(program.graph_signature.user_inputs)
    inputs = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    if len(inputs) != 1 or len(inputs[0]) != 4:
        raise BadInput(f"{path}: must take one batch of images, but takes {len(inputs)} inputs: {inputs}")
    size, *shape = inputs[0]
    module = program.module()
    return (Chunked(module, size) if isinstance(size, int) else module), tuple(int(axis) for axis in shape)


def pickled(path: Path, *, trust_code: bool) -> nn.Module:
    """The module that was pickled whole into ``path``.

    Raises:
        BadInput: code is not trusted, the file is unreadable, or it holds weights alone.
    """
    _there(path)
    try:
        said = load_plain(path)
    except CodeInside:
        if not trust_code:
            raise needs_trust(str(path)) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise BadInput(f"{path}: unreadable ({first_line(error)})") from None
    if not isinstance(said, nn.Module):
        raise weights_alone(path)
    return said


def weights_alone(path: Path) -> BadInput:
    """A weight file where a network is wanted."""
    return BadInput(f"{path}: holds weights alone; name the code that builds the network, as pkg.module:factory@{path}")


def _there(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
