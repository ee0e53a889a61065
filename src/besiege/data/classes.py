"""Which label a class has: by its name, never by its position among those that happen to be there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from besiege.core.errors import BadInput

NUMBER = re.compile(r"-?[0-9]{1,9}(\.0*)?")


def label_of(
    found: Iterable[str], folder: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, int], list[str] | None, list[str]]:
    """The label of each class in ``found``, all names in label order, and what there is to say about it.

    ``names`` are the classes in label order. Without them they are read from ``classes.txt`` (one a line) or
    ``labels.json`` (a list, name → label or label → name) in ``folder``; without those, classes that are
    all numbers are their own labels; anything else is numbered alphabetically, which is said.

    Raises:
        BadInput: a class is not among the names, or the file is none of these.
    """
    found = sorted(set(found))
    known: dict[str, int] | None = None
    source = "the names given"
    if names is not None:
        known = {name: label for label, name in enumerate(names)}
    elif (folder / "classes.txt").is_file():
        source = str(folder / "classes.txt")
        lines = (line.strip() for line in _text(folder / "classes.txt").splitlines())
        known = {name: label for label, name in enumerate(line for line in lines if line)}
    elif (folder / "labels.json").is_file():
        source = str(folder / "labels.json")
        known = _json(folder / "labels.json")
    strangers = [name for name in found if known is not None and name not in known]
    if known is not None and not strangers:
        return known, _in_order(known), []
    if all(NUMBER.fullmatch(name) for name in found):
        return {name: int(float(name)) for name in found}, None if known is None else _in_order(known), []
    if strangers:
        raise BadInput(f"{folder}: class {', '.join(strangers[:5])} is not in {source}")
    note = (
        f"labels 0 to {len(found) - 1} are the classes found in alphabetical order ({', '.join(found[:5])}"
        f"{', …' if len(found) > 5 else ''}); if the classifier's order differs, write it to {folder / 'classes.txt'}"
    )
    return {name: label for label, name in enumerate(found)}, found, [note]


def _json(path: Path) -> dict[str, int]:
    try:
        said = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: is no JSON ({error})") from None
    if isinstance(said, list) and all(isinstance(name, str) for name in said):
        return {name: label for label, name in enumerate(said)}
    if isinstance(said, dict) and all(type(label) is int for label in said.values()):
        return said
    if isinstance(said, dict) and all(k.isdigit() and isinstance(v, str) for k, v in said.items()):
        return {name: int(label) for label, name in said.items()}
    raise BadInput(f"{path}: must be a list of names, name → label or label → name")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: unreadable ({error})") from None


def _in_order(known: dict[str, int]) -> list[str] | None:
    """The names in label order, where every label has one."""
    ordered = sorted(known, key=lambda name: known[name])
    return ordered if [known[name] for name in ordered] == list(range(len(ordered))) else None
