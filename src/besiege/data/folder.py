"""An image folder: one subfolder a class."""

from __future__ import annotations

from pathlib import Path

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data.classes import label_of
from besiege.data.files import MAP, read_files
from besiege.data.wanted import Wanted


def read(folder: Path, wanted: Wanted) -> Images:
    """Every file below a class's folder, hidden ones and maps of regions left out; labels as in `besiege.data.classes`.

    Raises:
        BadInput: there are no class folders, or as in `besiege.data.files.read_files`.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder")
    groups = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not groups:
        raise BadInput(f"{folder}: holds no folders, one for each class")
    labels, names, notes = label_of(groups, folder, wanted.names)
    files = [
        (path, labels[name])
        for name, group in groups.items()
        for path in sorted(group.rglob("*"))
        if path.is_file()
        and not path.name.endswith(MAP)
        and not any(part.startswith(".") for part in path.relative_to(group).parts)
    ]
    return read_files(files, wanted, str(folder), names=names, notes=notes)
