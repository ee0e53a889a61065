"""Answers that were paid for once, by image, in a file: what is asked again costs no query."""

from __future__ import annotations

import hashlib
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from besiege.core.errors import BadInput

SCHEMA = """
CREATE TABLE IF NOT EXISTS cached (of TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answer (image BLOB PRIMARY KEY, label INTEGER, scores BLOB) WITHOUT ROWID;
"""
Stream = Callable[[Tensor], Iterator[tuple[slice, Tensor]]]
"""Answers about images (n, ...) piece by piece as they come in, each with the rows that it is about."""


def collected(stream: Stream, x: Tensor) -> Tensor:
    """All pieces of what ``stream`` answers about images (n, ...), in order: labels (n,) or scores (n, classes)."""
    pieces = sorted(((rows.start, said) for rows, said in stream(x)), key=lambda piece: piece[0])
    return torch.cat([said for _, said in pieces])


class Cached:
    """A function of images (n, ...) that asks ``stream`` about those alone that are not in the file at ``path``.

    An answer is stored as it comes in, so that a process that is killed has lost none. ``of`` says whose answers
    these are. Images are told apart by the digest of their numbers.

    Raises:
        BadInput: the file holds answers of another classifier, or cannot be used.
    """

    def __init__(self, stream: Stream, path: Path, of: str) -> None:
        self.stream, self.path = stream, path
        with self._readable():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whichever thread lets go of the target last closes the file.
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
            weakref.finalize(self, self._db.close)
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + SCHEMA)
            self._db.execute("INSERT INTO cached SELECT ? WHERE NOT EXISTS (SELECT 1 FROM cached)", (of,))
            (held,) = self._db.execute("SELECT of FROM cached").fetchone()
        if held != of:
            raise BadInput(f"{path} holds the answers of another classifier; name another file to keep these in")

    def __call__(self, x: Tensor) -> Tensor:
        """Labels (n,) or scores (n, classes); an image that is there twice is asked about once."""
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in x.cpu().contiguous().numpy()]
        known = self._known(keys)
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        if first:
            asked = list(first)
            for rows, said in self.stream(x[torch.tensor([first[key] for key in asked], device=x.device)]):
                known |= self._keep(asked[rows], said)
        return torch.stack([known[key] for key in keys])

    def _known(self, keys: list[bytes]) -> dict[bytes, Tensor]:
        found = {}
        with self._readable():
            for key in set(keys):
                row = self._db.execute("SELECT label, scores FROM answer WHERE image = ?", (key,)).fetchone()
                if row is not None:
                    label, scores = row
                    found[key] = torch.from_numpy(np.frombuffer(scores).copy()) if scores else torch.tensor(label)
        return found

    def _keep(self, keys: list[bytes], said: Tensor) -> dict[bytes, Tensor]:
        said = said.cpu().double() if said.is_floating_point() else said.cpu().long()
        rows = [
            (key, None, row.numpy().tobytes()) if row.dim() else (key, int(row), None)
            for key, row in zip(keys, said, strict=True)
        ]
        with self._readable():
            self._db.executemany("INSERT OR REPLACE INTO answer VALUES (?, ?, ?)", rows)
        return dict(zip(keys, said, strict=True))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Errors of the disk and the database as one sentence."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise BadInput(f"{self.path} cannot keep answers: {error}") from None
