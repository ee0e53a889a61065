"""How a classifier is fed: declared once, differentiable, part of the target, so that attacks see [0, 1] pixels."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput, nearest
from besiege.core.threat import number


@dataclass(frozen=True)
class Preprocessing:
    """What happens to images (n, c, h, w) in [0, 1], RGB, before the classifier sees them, in this order.

    They are scaled to ``size`` (height, width), bilinearly with antialias; their ``channels`` are put in order,
    their values brought to [0, ``range``]; ``mean`` is subtracted and what remains divided by ``std``, each one
    number or one a channel, in the classifier's order and range; ``layout`` puts the axes in order.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    range: Literal[1, 255] = 1
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        if self.mean and self.std and len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise BadInput(f"mean has {len(self.mean)} numbers and std {len(self.std)}; give one a channel to both")
        if not all(s > 0 for s in self.std):
            raise BadInput(f"std must be above 0, not {', '.join(f'{s:g}' for s in self.std)}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise BadInput(f"size must be (height, width) from 1, not {self.size}")
        for key, allowed in (("channels", ("rgb", "bgr")), ("range", (1, 255)), ("layout", ("nchw", "nhwc"))):
            if getattr(self, key) not in allowed:
                raise BadInput(f"{key} must be {' or '.join(map(str, allowed))}, not {getattr(self, key)!r}")

    @classmethod
    def read(cls, path: Path) -> Preprocessing:
        """From a TOML file with these fields; a size may be one number, and numbers fractions such as "1/255".

        Raises:
            BadInput: it is no TOML, or holds anything else.
        """
        try:
            said = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadInput(f"{path}: unreadable ({error})") from None
        return cls.of(said, path)

    @classmethod
    def of(cls, said: Mapping[str, Any], where: Path | str) -> Preprocessing:
        """From what was read at ``where``.

        Raises:
            BadInput: a field is unknown or has a wrong value.
        """
        known = [field.name for field in fields(cls)]
        for key in said:
            if key not in known:
                raise BadInput(f"{where}: {key!r} is unknown; {nearest(key, known)}")
        try:
            return cls(**{key: _value(key, value) for key, value in said.items()})
        except (BadInput, TypeError, ValueError) as error:
            raise BadInput(f"{where}: {error}") from None

    @classmethod
    def beside(cls, files: Iterable[Path]) -> tuple[Preprocessing, Path] | None:
        """The declaration that lies beside one of the ``files``: ``NAME.toml`` or ``model.toml``; and where."""
        for file in files:
            for path in (file.with_suffix(".toml"), file.with_name("model.toml")):
                if path.is_file():
                    return cls.read(path), path
        return None


def _value(key: str, value: Any) -> Any:
    if key in ("mean", "std"):
        return tuple(number(v) for v in (value if isinstance(value, list) else [value]))
    if key == "size":
        return tuple(int(v) for v in (value if isinstance(value, list) else [value, value]))
    return value.lower() if isinstance(value, str) else value


class Front(nn.Module):
    """`Preprocessing` as the first layer of a network that takes images of ``depth`` channels.

    Raises:
        BadInput: the declaration does not fit that many channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, how: Preprocessing, depth: int) -> None:
        super().__init__()
        for key, values in (("mean", how.mean), ("std", how.std)):
            if len(values) > 1 and len(values) != depth:
                raise BadInput(f"the preprocessing has a {key} of {len(values)} channels, but the images have {depth}")
        if how.channels == "bgr" and depth != 3:
            raise BadInput(f"the preprocessing puts channels in the order bgr, but the images have {depth}")
        self.how = how
        self.register_buffer("mean", torch.tensor(how.mean or (0.0,)).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(how.std or (1.0,)).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w) in [0, 1] as the network wants them."""
        if self.how.size is not None and tuple(x.shape[2:]) != self.how.size:
            x = F.interpolate(x, self.how.size, mode="bilinear", antialias=True)
        if self.how.channels == "bgr":
            x = x.flip(1)
        x = (x * self.how.range - self.mean) / self.std
        return x if self.how.layout == "nchw" else x.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """What a fingerprint is taken of, beside the weights."""
        return str(self.how)
