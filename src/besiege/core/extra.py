"""Packages that only some targets and files need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from besiege.core.errors import BadInput


@contextmanager
def extra(name: str) -> Iterator[None]:
    """While what the extra ``name`` brings is imported: a package that is not there is said in one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is not installed; python -m pip install 'besiege[{name}]' brings it") from None
