"""A CSV file that names picture files and their labels."""

from __future__ import annotations

import csv
from pathlib import Path

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data.classes import label_of
from besiege.data.files import read_files
from besiege.data.wanted import Wanted

FILE = ("file", "filename", "file_name", "path", "image")
LABEL = ("label", "class", "target", "y")


def read(path: Path, wanted: Wanted) -> Images:
    """Columns ``file`` (relative to the CSV) and ``label``: a number, or a name as in `besiege.data.classes`.

    Raises:
        BadInput: no such file or columns, a row without a label, or as in `besiege.data.files.read_files`.
    """
    path = path / "labels.csv" if path.is_dir() else path
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream, strict=True)
            heads = {str(head).strip().lower(): head for head in rows.fieldnames or ()}
            file, label = _column(FILE, heads, path), _column(LABEL, heads, path)
            pairs = [((row[file] or "").strip(), (row[label] or "").strip()) for row in rows]
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: unreadable ({error})") from None
    empty = [number for number, pair in enumerate(pairs, 2) if not all(pair)]
    if empty:
        raise BadInput(f"{path}: {len(empty)} rows lack a file or a label, the first is line {empty[0]}")
    labels, names, notes = label_of((label for _, label in pairs), path.parent, wanted.names)
    files = [(path.parent / file, labels[label]) for file, label in pairs]
    return read_files(files, wanted, str(path), names=names, notes=notes)


def _column(among: tuple[str, ...], heads: dict[str, str], path: Path) -> str:
    for name in among:
        if name in heads:
            return heads[name]
    raise BadInput(f"{path}: has no column {among[0]!r} in its first line, only {', '.join(heads) or 'nothing'}")
