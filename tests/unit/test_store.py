"""A run folder survives being cut off, refuses what it is not, and loses nothing."""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from test_results import record

from besiege.results.store import COLUMNS, RunError, Store

MANIFEST = {"target": "embedded:digits-cnn", "seed": 0}


def cell(n: int = 5, value: int = 1) -> tuple[dict, list, dict, dict]:
    outcome = {name: [value] * n for name in COLUMNS}
    return {"n": n, "value": value}, list(range(n)), outcome, {"adv": np.full((n, 1, 4, 4), value, np.float32)}


def test_what_is_committed_is_read_back(tmp_path: Path) -> None:
    with Store(tmp_path / "run", MANIFEST) as store:
        store.commit("pgd|linf", *cell(value=3))
    with Store(tmp_path / "run", MANIFEST) as store:
        assert store.keys() == ["pgd|linf"]
        assert store.record("pgd|linf") == {"n": 5, "value": 3}
        assert store.record("other") is None
        assert store.outcome("pgd|linf")["distance"] == [3.0] * 5
        assert store.images("pgd|linf")["adv"].shape == (5, 1, 4, 4)
        assert store.manifest == MANIFEST


def test_a_cell_is_stored_once(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        store.commit("a", *cell())
        with pytest.raises(RunError, match="already"):
            store.commit("a", *cell(value=2))
        assert store.outcome("a")["label"] == [1] * 5
        assert (store.images("a")["adv"] == 1).all()


def test_another_run_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "run", MANIFEST).close()
    with pytest.raises(RunError, match="with seed 0, not 1"):
        Store(tmp_path / "run", {**MANIFEST, "seed": 1})
    Store(tmp_path / "run", MANIFEST).close()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with Store(tmp_path / "run"), pytest.raises(RunError, match="in use by another process"):
        Store(tmp_path / "run")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_bytes(b"this is not a database, and long enough to look like one" * 20)
    with pytest.raises(RunError, match="no run of besiege"):
        Store(tmp_path)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        store.commit("small", *cell())
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(RunError, match="no space is left"):
            store.commit("large", *cell(n=20_000))
        assert store.keys() == ["small"]
    with Store(tmp_path / "run") as store:
        store.commit("large", *cell(n=20_000))
        assert store.keys() == ["small", "large"]


def test_a_large_run_opens_in_under_a_second(tmp_path: Path) -> None:
    one = record(index=tuple(range(100)), fell=tuple(range(40)))
    facts = {"record": one.model_dump(mode="json", exclude={"images"}), "pictures": [], "wall": 1.0}
    rows = one.images.model_dump()
    del rows["index"]
    with Store(tmp_path / "run", {**MANIFEST, "label": [0] * 10_000, "clean_label": [0] * 10_000}) as store:
        store._db.execute("PRAGMA synchronous = OFF")
        for attack, shard in itertools.product(range(10), range(100)):
            image = range(100 * shard, 100 * shard + 100)
            store.commit(f"attack-{attack} linf:8/255|{image.start}-{image.stop}", facts, image, rows, {})
    began = time.process_time()
    with Store(tmp_path / "run", MANIFEST) as store:
        assert len(store.keys()) == 1000 and len(store.manifest["label"]) == 10_000
        assert store.record("attack-9 linf:8/255|9900-10000") == facts
    assert time.process_time() - began < 1


def _fill(folder: Path) -> None:
    with Store(folder) as store:
        for k in range(40):
            if store.record(f"cell {k}") is None:
                store.commit(f"cell {k}", *cell(n=300, value=k))
        store.note(ended=True)


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    for attempt in range(20):
        worker = spawn.Process(target=_fill, args=(tmp_path / "run",))
        worker.start()
        time.sleep(0.004 + 0.0007 * attempt)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    _fill(tmp_path / "run")
    with Store(tmp_path / "run") as store:
        assert store.keys() == [f"cell {k}" for k in range(40)]
        for k in range(40):
            assert store.outcome(f"cell {k}")["label"] == [k] * 300
            assert (store.images(f"cell {k}")["adv"] == k).all()
    assert not list((tmp_path / "run" / "shards").glob("*.part"))
