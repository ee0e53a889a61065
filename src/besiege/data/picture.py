"""One picture file becomes pixels in [0, 1]; every mode that a file can have is handled by name.

Choices, made once: a rotation noted by the camera (EXIF) is applied; transparency is dropped, as the usual loaders
do; of an animation the first frame is taken; 16-bit grey is divided by 65535; a palette and CMYK become RGB.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

GREY = ("1", "L", "LA")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
COLOUR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")


class BadPicture(Exception):
    """Why a file is no picture, in a few words."""


def decode(file: Path | IO[bytes], *, alpha: bool = False) -> Tensor:
    """Pixels (c, h, w) float32 in [0, 1]: 1 channel of a grey picture, 3 of a colour one, 4 if ``alpha``.

    Raises:
        BadPicture: the file is missing, damaged, no picture or of an unknown mode.
    """
    picture = _opened(file)
    pixels = _pixels(picture, alpha)
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise BadPicture(f"of mode {picture.mode} with values outside its range")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def decode_map(path: Path) -> Tensor:
    """The numbers (h, w) int64 of a grey or palette picture of 8 bits: which region each pixel belongs to.

    Raises:
        BadPicture: as `decode`, or the picture is in colour or deeper.
    """
    picture = _opened(path)
    if picture.mode not in ("L", "P"):
        raise BadPicture(f"of mode {picture.mode}, where a map is grey or has a palette")
    return torch.from_numpy(np.asarray(picture, np.int64).copy())


def _opened(path: Path | IO[bytes]) -> Image.Image:
    """The picture, turned upright, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                picture.load()
                return picture
    except FileNotFoundError:
        raise BadPicture("missing") from None
    except UnidentifiedImageError:
        raise BadPicture("no picture") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture("larger than any honest picture") from None
    except Exception as error:
        raise BadPicture(f"damaged: {error}") from None


def _pixels(picture: Image.Image, alpha: bool) -> np.ndarray[Any, Any]:
    """(h, w) or (h, w, c) float32."""
    mode = picture.mode
    if mode == "F":
        return np.asarray(picture, np.float32)
    if mode in DEEP:
        return np.asarray(picture, np.float32) / 65535
    if mode not in GREY + COLOUR:
        raise BadPicture(f"of the unknown mode {mode}")
    wanted = "RGBA" if alpha else "L" if mode in GREY else "RGB"
    return np.asarray(picture.convert(wanted), np.float32) / 255
