"""Images become files that other tools read, and that `open_images` reads back as they were."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from besiege.core.extra import extra
from besiege.core.images import Images


def archive(images: Images, **columns: Tensor) -> bytes:
    """An npz file: ``x`` uint8 (n, c, h, w), ``y``, ``index``, and further ``columns`` (n, ...) by name."""
    held = io.BytesIO()
    parts: dict[str, Any] = {
        "x": levels(images.x),
        **{name: part.cpu().numpy() for name, part in {"y": images.y, "index": images.index, **columns}.items()},
    }
    np.savez_compressed(held, **parts)
    return held.getvalue()


def parquet(images: Images, **columns: Tensor) -> bytes:
    """A Parquet file as Hugging Face lays it out: PNG files and labels, and further ``columns`` (n,) by name.

    Raises:
        BadInput: pyarrow is missing.
    """
    with extra("parquet"):
        import pyarrow as pa
        from pyarrow import parquet as files
    label = {"names": list(images.names), "_type": "ClassLabel"} if images.names else {"dtype": "int64"}
    features = {"image": {"_type": "Image"}, "label": {"_type": "Value", **label}}
    features |= {
        name: {"dtype": str(part.dtype).removeprefix("torch."), "_type": "Value"} for name, part in columns.items()
    }
    held = {
        "image": pa.array(
            [{"bytes": png(x), "path": None} for x in images.x],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "label": pa.array(images.y.tolist(), pa.int64()),
        **{name: pa.array(part.cpu().numpy()) for name, part in columns.items()},
    }
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    stream = io.BytesIO()
    files.write_table(pa.table(held).replace_schema_metadata(told), stream)
    return stream.getvalue()


def pictures(images: Images) -> list[tuple[str, bytes]]:
    """The paths and the contents of a folder of lossless PNG files: one subfolder a class, named by its number."""
    return [(place(row, label), png(x)) for row, (x, label) in enumerate(zip(images.x, images.y.tolist(), strict=True))]


def place(row: int, label: int) -> str:
    """Where in such a folder the image of that row and label lies."""
    return f"{label}/{row:07d}.png"


def table(**columns: list[object]) -> str:
    """Columns of equal length as CSV text."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return held.getvalue()


def png(x: Tensor) -> bytes:
    """One image (c, h, w) of 1 or 3 channels as a PNG file."""
    pixels = levels(x)
    held = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(held, "PNG")
    return held.getvalue()


def levels(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Pixels in [0, 1] as whole numbers from 0 to 255."""
    rounded: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = (x.cpu().double() * 255).round().to(torch.uint8).numpy()
    return rounded
