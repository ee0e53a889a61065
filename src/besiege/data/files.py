"""Many picture files become one set; the bad ones are named and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data.picture import BadPicture, decode
from besiege.data.wanted import Wanted, fit

NAMED = 5
"""So many bad files are named; the rest is counted."""


def read_files(
    files: Sequence[tuple[Path, int]],
    wanted: Wanted,
    name: str,
    *,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Images:
    """Pictures with their labels. With a limit, bad ones that are skipped are made up for by others.

    Raises:
        BadInput: a file is bad and bad ones are refused; sizes differ and none is asked for; none is left.
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
            picture = decode(path, alpha=wanted.channels == 4)
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
    return replace(images, index=torch.tensor(rows), notes=tuple(said))


def _one_size(pictures: Sequence[tuple[Path, Tensor]], name: str) -> None:
    first, like = pictures[0]
    for path, picture in pictures:
        if picture.shape != like.shape:
            (h, w), (other_h, other_w) = like.shape[1:], picture.shape[1:]
            raise BadInput(
                f"{name}: pictures have different sizes ({first.name} is {h}x{w}, {path.name} {other_h}x{other_w}); "
                "say which size (height and width) they are to be scaled to"
            )
