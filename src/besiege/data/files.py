"""Many picture files become one set; the bad ones are named and counted."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data.picture import BadPicture, decode, decode_map
from besiege.data.wanted import Wanted, fit, fit_maps

NAMED = 5
"""So many bad files are named; the rest is counted."""

MAP = ".map.png"
"""The map of regions of `dog.jpg` is `dog.map.png` beside it."""


@dataclass(frozen=True)
class Held:
    """A picture that lies within a larger file: what it is called there, and its content, None where it is missing."""

    name: str
    fetch: Callable[[], bytes | None]


def read_files(
    files: Sequence[tuple[Path | Held, int]],
    wanted: Wanted,
    name: str,
    *,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Images:
    """Pictures with their labels. With a limit, bad ones that are skipped are made up for by others.

    Where a picture has a map of its regions beside it, all have to have one.

    Raises:
        BadInput: a file is bad and bad ones are refused; sizes differ and none is asked for; none is left; a map is
            missing or no grey picture of the picture's size.
    """
    good: dict[int, Tensor] = {}
    bad: list[str] = []
    said = list(notes)
    order = wanted.order(len(files))
    for row in order if wanted.on_bad == "skip" else order[: wanted.limit]:
        if len(good) == wanted.limit:
            break
        path, _ = files[row]
        try:
            picture = decode(_stream(path), alpha=wanted.channels == 4)
            good[row] = fit(picture[None], wanted.size, wanted.channels)[0]
        except BadPicture as reason:
            bad.append(f"{path.name} ({reason})")
    if bad:
        count = f"{len(bad)} of {len(good) + len(bad)} files are bad: {', '.join(bad[:NAMED])}"
        count += f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        if wanted.on_bad == "refuse":
            raise BadInput(f"{name}: {count}; repair them, or choose to skip what is bad")
        said.append(f"skipped: {count}")
    if not good:
        raise BadInput(f"{name}: no picture is left" if bad else f"{name}: there are no pictures")
    rows = sorted(good)
    depths = {len(good[row]) for row in rows}
    if len(depths) > 1:
        good = {row: fit(good[row][None], None, 3)[0] for row in rows}
        said.append("grey pictures among the coloured are read as colour")
    _one_size([(files[row][0], good[row]) for row in rows], name)
    labels = torch.tensor([files[row][1] for row in rows])
    images = Images.of(torch.stack([good[row] for row in rows]), labels, name=name, names=names)
    images = replace(images, index=torch.tensor(rows), notes=tuple(said))
    paths = [path for row in rows if isinstance(path := files[row][0], Path)]
    maps = [path.with_name(path.stem + MAP) for path in paths]
    return images.mapped(_maps(maps, wanted, name)) if any(path.exists() for path in maps) else images


def _stream(picture: Path | Held) -> Path | io.BytesIO:
    if isinstance(picture, Path):
        return picture
    content = picture.fetch()
    if content is None:
        raise BadPicture("missing")
    return io.BytesIO(content)


def _maps(paths: Sequence[Path], wanted: Wanted, name: str) -> Tensor:
    """(n, h, w) the regions of each picture."""
    maps = []
    for path in paths:
        try:
            maps.append(fit_maps(decode_map(path)[None], wanted.size))
        except BadPicture as reason:
            raise BadInput(
                f"{name}: {path.name} is {reason}; give each picture a map of its regions, or none"
            ) from None
    if len({part.shape for part in maps}) > 1:
        raise BadInput(f"{name}: the maps of regions have different sizes")
    return torch.cat(maps)


def _one_size(pictures: Sequence[tuple[Path | Held, Tensor]], name: str) -> None:
    first, like = pictures[0]
    for path, picture in pictures:
        if picture.shape != like.shape:
            (h, w), (other_h, other_w) = like.shape[1:], picture.shape[1:]
            raise BadInput(
                f"{name}: pictures have different sizes ({first.name} is {h}x{w}, {path.name} {other_h}x{other_w}); "
                "say which size (height and width) they are to be scaled to"
            )
