"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from besiege.core.errors import BadInput

PARTS = ".*.part"
"""The names of files that are being written; a kill leaves one behind."""


def write(path: Path, content: str | bytes) -> None:
    """Write ``content`` in one step: whoever reads ``path`` sees the old file or the new one.

    Raises:
        BadInput: it cannot be written; nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(beside).chmod(0o644)
        Path(beside).replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if beside:
            Path(beside).unlink(missing_ok=True)


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
