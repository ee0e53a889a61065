"""Parquet files with pictures, as Hugging Face lays them out: a column of encoded images and one of labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besiege.core.errors import BadInput
from besiege.core.extra import extra
from besiege.core.images import Images
from besiege.data.classes import label_of
from besiege.data.files import Held, read_files
from besiege.data.wanted import Wanted

if TYPE_CHECKING:
    import pyarrow

IMAGE = ("image", "img", "picture", "images")
LABEL = ("label", "labels", "class", "target", "y", "fine_label")
METADATA = b"huggingface"


def read(path: Path, wanted: Wanted) -> Images:
    """Encoded pictures (binary, or a struct with ``bytes``) and labels: whole numbers from 0, or names of classes.

    A folder's files are one set and must be parts of one split. The names of the classes are those in the metadata.

    Raises:
        BadInput: pyarrow is missing, no such file or columns, a row without a picture or a label, or as in
            `besiege.data.files.read_files` and `besiege.data.classes.label_of`.
    """
    table = _table(path)
    image, label = _column(IMAGE, table, path), _column(LABEL, table, path)
    labels, names, notes = _labels(table, label, path, wanted.names)
    pictures = [(Held(f"row {row}", fetch), labels[row]) for row, fetch in enumerate(_contents(table, image, path))]
    return read_files(pictures, wanted, str(path), names=names, notes=notes)


def column(path: Path, name: str) -> list[Any] | None:
    """What a column holds, row by row; None where there is none of that name.

    Raises:
        BadInput: as `read`.
    """
    table = _table(path)
    return table[name].to_pylist() if name in table.column_names else None


def _table(path: Path) -> pyarrow.Table:
    with extra("parquet"):
        import pyarrow as pa
        from pyarrow import parquet
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    splits = sorted({file.name.split("-")[0] for file in files}) if len(files) > 1 else []
    if not files or not files[0].is_file():
        raise BadInput(f"{path}: there is no such file" if files else f"{path}: holds no .parquet file")
    if len(splits) > 1:
        raise BadInput(f"{path}: holds files of several splits ({', '.join(splits[:5])}); name one of the files")
    try:
        return pa.concat_tables([parquet.read_table(file) for file in files])
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: unreadable or no Parquet file ({error})") from None


def _column(among: tuple[str, ...], table: pyarrow.Table, path: Path) -> str:
    for name in among:
        if name in table.column_names:
            return name
    raise BadInput(f"{path}: has no column {among[0]!r}, only {', '.join(table.column_names) or 'none'}")


def _contents(table: pyarrow.Table, name: str, path: Path) -> list[Callable[[], bytes | None]]:
    """A function a row that fetches the encoded picture."""
    import pyarrow as pa

    cells, kind = table[name], table.schema.field(name).type
    if pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind):
        return [partial(_inner, cells, row) for row in range(len(cells))]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [partial(_plain, cells, row) for row in range(len(cells))]
    raise BadInput(f"{path}: column {name!r} must hold encoded pictures, not {kind}")


def _inner(cells: pyarrow.ChunkedArray, row: int) -> bytes | None:
    held = cells[row].as_py()
    return None if held is None else held["bytes"]


def _plain(cells: pyarrow.ChunkedArray, row: int) -> bytes | None:
    content: bytes | None = cells[row].as_py()
    return content


def _labels(
    table: pyarrow.Table, name: str, path: Path, wanted: Sequence[str] | None
) -> tuple[list[int], Sequence[str] | None, list[str]]:
    """The label of each row, the classes' names where there are any, and what there is to say."""
    import pyarrow as pa

    found, kind = table[name].to_pylist(), table.schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadInput(f"{path}: column {name!r} must hold whole numbers or names of classes, not {kind}")
    empty = [row for row, label in enumerate(found) if label is None or label == "" or label == -1]
    if empty:
        raise BadInput(f"{path}: {len(empty)} rows lack a label, the first is row {empty[0]}")
    own = _names(table, name)
    if pa.types.is_integer(kind):
        if own is None:
            return found, wanted, []
        beyond = [label for label in found if not 0 <= label < len(own)]
        if beyond:
            raise BadInput(f"{path}: label {beyond[0]} is none of the {len(own)} classes that the file names")
        if wanted is None or list(wanted) == own:
            return found, own, []
        found = [own[label] for label in found]
    labels, names, notes = label_of(found, path.parent, wanted)
    return [labels[label] for label in found], names, notes


def _names(table: pyarrow.Table, name: str) -> list[str] | None:
    """The classes in label order, as Hugging Face's metadata names them."""
    try:
        said = json.loads((table.schema.metadata or {})[METADATA])["info"]["features"][name]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(part) for part in said] if isinstance(said, list) else None
