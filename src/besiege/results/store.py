"""A run folder: what was measured, cell by cell, safe against being cut off at any moment.

``run.sqlite`` holds the manifest, the cells and their outcomes, one row an image; ``shards/`` the adversarial
images. A cell is committed in one transaction after its shard lies in place, so after a kill it is either
there in full or not at all, and is done again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from besiege.core.errors import BadInput
from besiege.results import files
from besiege.results.record import Rows

SCHEMA = """
CREATE TABLE IF NOT EXISTS manifest (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cell (key TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outcome (
    cell TEXT NOT NULL REFERENCES cell (key), image INTEGER NOT NULL, label INTEGER, clean_label INTEGER,
    adversarial_label INTEGER, attacked INTEGER, success INTEGER, success_8bit INTEGER, distance REAL,
    forward INTEGER, backward INTEGER, needed INTEGER, PRIMARY KEY (cell, image)
) WITHOUT ROWID;
"""
COLUMNS = tuple(name for name in Rows.model_fields if name != "index")
FILE = "run.sqlite"


class RunError(BadInput):
    """The run folder cannot be used or written; what it held is as it was."""


class Store:
    """One run folder, open for one process at a time; a context manager.

    Raises:
        RunError: another process has it open, it holds another run than ``manifest`` says, or it cannot be
            written.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        with ExitStack() as opened, _readable(folder):
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{folder} is in use by another process; wait for it or choose another --out") from None
            for part in (part for place in (".", "shards", "pictures") for part in (folder / place).glob(files.PARTS)):
                part.unlink()
            self._db = opened.enter_context(closing(sqlite3.connect(folder / FILE, isolation_level=None)))
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + SCHEMA)
            if manifest is not None:
                self._agree(manifest)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the folder go."""
        self._opened.close()

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run is of: specs, seed, versions."""
        return {key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM manifest")}

    def note(self, **facts: Any) -> None:
        """Add facts about the run to the manifest, all or none."""
        with _readable(self.folder), self._transaction():
            rows = [(key, json.dumps(value)) for key, value in facts.items()]
            self._db.executemany("INSERT OR REPLACE INTO manifest VALUES (?, ?)", rows)

    def keys(self) -> list[str]:
        """The cells that are done, in the order they were."""
        return [key for (key,) in self._db.execute("SELECT key FROM cell ORDER BY rowid")]

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a cell, None where it is not done."""
        row = self._db.execute("SELECT record FROM cell WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def outcome(self, key: str) -> dict[str, list[Any]]:
        """The outcomes of a cell, one list a column, with ``image`` numbering the rows."""
        names = ("image", *COLUMNS)
        rows = self._db.execute(f"SELECT {', '.join(names)} FROM outcome WHERE cell = ? ORDER BY image", (key,))
        return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=False)}

    def images(self, key: str) -> dict[str, NDArray[Any]]:
        """The tensors that were stored with a cell."""
        path = self._shard(key)
        return load_file(path) if path.exists() else {}

    def commit(
        self,
        key: str,
        record: Mapping[str, Any],
        image: Sequence[int],
        outcome: Mapping[str, Sequence[Any]],
        tensors: Mapping[str, NDArray[Any]],
    ) -> None:
        """Store a finished cell: all of it or nothing.

        Raises:
            RunError: it is stored already, or there is no room.
        """
        if self.record(key) is not None:
            raise RunError(f"{self.folder} has the cell {key!r} already")
        rows = list(zip([key] * len(image), image, *(outcome[name] for name in COLUMNS), strict=True))
        marks = ", ".join("?" * (2 + len(COLUMNS)))
        with _readable(self.folder):
            if tensors:
                whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
                files.write(self._shard(key), save(whole))
            with self._transaction():
                self._db.execute("INSERT INTO cell VALUES (?, ?)", (key, json.dumps(record)))
                self._db.executemany(f"INSERT INTO outcome VALUES ({marks})", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is written inside, or nothing of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _agree(self, manifest: Mapping[str, Any]) -> None:
        """A new folder takes the manifest; an old one must have the same, or it is another run."""
        held, wanted = self.manifest, json.loads(json.dumps(manifest))
        if not held:
            self.note(**wanted)
        for key in wanted if held else ():
            if held.get(key) != wanted[key]:
                differs = f"{key} {_short(held.get(key))}, not {_short(wanted[key])}"
                raise RunError(f"{self.folder} holds another run, with {differs}; choose another --out")

    def _shard(self, key: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)
        return self.folder / "shards" / f"{safe}.safetensors"


def _short(value: Any) -> str:
    """A value in a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Errors of the disk and the database as one sentence."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise RunError(f"no space is left for {folder}; free some and run the same command again") from None
        raise RunError(f"{folder} cannot be used: {error}") from None
    except sqlite3.DatabaseError as error:
        raise RunError(f"{folder}/run.sqlite is no run of besiege or is damaged: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"no space is left for {folder}; free some and run the same command again") from None
        raise RunError(f"cannot write {folder}: {error.strerror}") from None
