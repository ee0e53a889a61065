"""A spec string becomes images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from besiege.core.errors import BadInput, nearest
from besiege.core.images import Images
from besiege.data import builtin, folder, idx, npz, parquet, table
from besiege.data.wanted import OnBad, Wanted

KINDS: dict[str, Callable[[Path, Wanted], Images]] = {
    "npz": npz.read,
    "idx": idx.read,
    "imagefolder": folder.read,
    "csv": table.read,
    "parquet": parquet.read,
}


def open_images(
    spec: str | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    on_bad: OnBad = "refuse",
    names: Sequence[str] | None = None,
) -> Images:
    """Images and labels from ``embedded:digits`` (the default; ``-train``: its training part), or files.

    ``npz:FILE``, ``idx:FILE`` or ``idx:FOLDER``, ``imagefolder:FOLDER``, ``csv:FILE`` or ``csv:FOLDER``,
    ``parquet:FILE`` or ``parquet:FOLDER``, or the path alone, whose kind shows. ``limit`` images are drawn by ``seed``;
    they are scaled to ``size`` (height, width) and brought to ``channels`` if asked for. Picture files that are bad are
    refused or, ``on_bad="skip"``, left out and
    named in the set's ``notes``. ``names`` are the classifier's classes in label order.

    Raises:
        BadInput: nothing is there, it is not what the spec says, or it cannot be read.
    """
    wanted = Wanted(limit, seed, size, channels, on_bad, names)
    spec = spec or "embedded:digits"
    kind, colon, rest = spec.partition(":")
    if colon and kind == "embedded":
        return builtin.read(rest, wanted)
    if colon and kind in KINDS:
        return KINDS[kind](Path(rest).expanduser(), wanted)
    path = Path(spec).expanduser()
    if not path.exists():
        if colon:
            raise BadInput(f"data of kind {kind!r} is unknown; {nearest(kind, ['embedded', *KINDS])}")
        raise BadInput(f"{path}: there is no such file or folder")
    return KINDS[_kind(path)](path, wanted)


def shows_images(spec: str) -> bool:
    """Whether a spec is one of images, by its kind or by its name, there or not."""
    kind, colon, rest = spec.partition(":")
    if colon and kind == "embedded":
        return rest in builtin.SETS
    if colon and kind in KINDS:
        return True
    try:
        _kind(Path(spec).expanduser())
    except BadInput:
        return False
    return True


def _kind(path: Path) -> str:
    """What a path is, by its name or by what lies in it."""
    if path.is_dir():
        if (path / "labels.csv").is_file():
            return "csv"
        if any(path.glob("*.parquet")):
            return "parquet"
        return "idx" if idx.candidates(path) else "imagefolder"
    name = path.name.lower().removesuffix(".gz")
    if path.suffix.lower() in (".npz", ".csv", ".parquet"):
        return path.suffix.lower()[1:]
    if "idx" in name or "ubyte" in name:
        return "idx"
    raise BadInput(f"{path}: its kind does not show; write one of {', '.join(f'{kind}:' for kind in KINDS)} before it")
