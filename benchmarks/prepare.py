"""Write the mosaics of `shared/data` as npz files that `--data` reads: ``python -m benchmarks.prepare cifar10 OUT``."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.networks import folder

SIDE, COLUMNS = 32, 40


def mosaics(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, 32, 32, 3) uint8 of ``test`` or ``train`` and their labels (n,)."""
    sheets = []
    for path in sorted((folder() / name).glob(f"{part}_*.webp")):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        rows = sheet.shape[0] // SIDE
        tiles = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2)
        sheets.append(tiles.reshape(rows * COLUMNS, SIDE, SIDE, 3))
    x = np.concatenate(sheets)
    y = np.load(folder() / name / "labels.npz")[f"y_{part}"][: len(x)]
    return x[: len(y)], y.astype(np.int64)


def tiny(part: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiny ImageNet at 32 pixels, (n, 32, 32, 3) uint8 of ``train100`` or ``val``, its first classes, and labels."""
    file = np.load(folder() / "tinyimagenet32" / f"{part}.npz")
    y, offsets, data = file["y"].astype(np.int64), file["offsets"], file["jpeg"]
    rows = [k for k in range(len(y)) if y[k] < classes]
    pictures = [Image.open(io.BytesIO(data[offsets[k] : offsets[k + 1]].tobytes())).convert("RGB") for k in rows]
    return np.stack([np.asarray(picture) for picture in pictures]), y[rows]


def main(name: str, out: str) -> None:
    """Write ``OUT/NAME_test.npz`` and ``OUT/NAME_train.npz``."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for part in ("test", "train"):
        x, y = mosaics(name, part)
        np.savez_compressed(Path(out) / f"{name}_{part}.npz", x=x, y=y)
        print(f"{name}_{part}.npz: {len(x)} images")


if __name__ == "__main__":
    main(*sys.argv[1:3])
