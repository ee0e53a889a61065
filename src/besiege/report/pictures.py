"""Lossless pictures."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from besiege.core.errors import BadInput


def png(pixels: NDArray[np.uint8]) -> bytes:
    """``pixels`` (h, w, c), grey, RGB or RGBA, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(path: Path) -> str:
    """A PNG file as a ``data:`` address.

    Raises:
        BadInput: it is missing, or no PNG.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read the picture {path}: {error.strerror}") from None
    if not content.startswith(b"\x89PNG\r\n"):
        raise BadInput(f"{path} is no PNG picture")
    return "data:image/png;base64," + b64encode(content).decode()
