"""A run that is cut off, by whatever, goes on where it stopped and ends with the same figures."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import NETWORK

from besiege.audit import run as runner
from besiege.audit.plan import Speed
from besiege.cli import run
from besiege.results import audit as audits
from besiege.results import files, store
from besiege.results.store import Store

SLOW = """
import time
from siege_net import network as quick

def network():
    net = quick()
    net.register_forward_hook(lambda module, given, out: time.sleep(0.003 * len(out)))
    return net
"""
AUDIT = ["audit", "siege_net:network", "--data", "images.npz", "-n", "30", "--threat", "linf:16/255,l2:0.3"]
ATTACKS = ["--attacks", "fgsm,pgd,fmn,square,hopskipjump"]
TIMES = {"name", "started", "seconds", "cpu_seconds", "setup_seconds", "command", "git", "gates"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network and thirty images; shards of eight images and no probe, so that a run is short."""
    torch.set_num_threads(1)
    (tmp_path / "siege_net.py").write_text(NETWORK)
    (tmp_path / "slow_net.py").write_text(SLOW)
    rng = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = rng.uniform(0.3, 0.5, (30, 3, 4, 4)).astype(np.float32)
    x[np.arange(30), y] += 0.05 + 0.1 * rng.random((30, 1, 1)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("siege_net", "slow_net"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(runner, "SHARD", 8)
    monkeypatch.setattr(runner, "CHECKED", 2)
    monkeypatch.setattr(runner, "throughput", lambda *rest: Speed(0.01, 0.02))
    return tmp_path


def figures(folder: Path) -> Any:
    """What an audit found, without times and names."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(part) for key, part in value.items() if key not in TIMES}
        return [timeless(part) for part in value] if isinstance(value, list) else value

    return timeless(json.loads((folder / "audit.json").read_text()))


def whole(folder: Path) -> list[str]:
    """The cells of a run, after a look at every file."""
    with Store(folder) as held:
        keys = held.keys()
        for key in keys:
            found, outcome = held.images(key), held.outcome(key)
            assert len(outcome["image"]) == (held.record(key) or {})["record"]["n"]
            assert set(found["index"].tolist()) >= {
                image for image, hit in zip(outcome["image"], outcome["success"], strict=True) if hit
            }
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
    return keys


def test_twenty_kills_change_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SHARD", 4)
    arguments = [*AUDIT, *ATTACKS]
    assert run([*arguments, "--out", "calm"]) == 0
    begun, ended, commit = place / "begun", place / "ended", Store.commit

    def told(self: Store, key: str, *rest: Any) -> None:
        _add(begun, key)
        commit(self, key, *rest)
        _add(ended, key)

    monkeypatch.setattr(Store, "commit", told)
    draw, fork = random.Random(0), multiprocessing.get_context("fork")
    for attempt in range(20):
        before, wanted = _lines(begun), draw.randrange(5) if attempt % 4 else 0
        worker = fork.Process(target=run, args=([*arguments, "--out", "stormy"],))
        worker.start()
        while worker.is_alive() and len(_lines(begun)) < len(before) + wanted:
            time.sleep(0.0005)
        time.sleep(draw.random() * (0.005 if attempt % 2 else 0.05 if wanted else 0.3))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
    assert run([*arguments, "--out", "stormy"]) == 0
    keys = whole(place / "stormy")
    assert keys == whole(place / "calm") and len(keys) == 70
    done = _lines(ended)
    assert len(done) == len(set(done)) > 60
    assert figures(place / "stormy") == figures(place / "calm")


def _add(path: Path, key: str) -> None:
    with path.open("a") as file:
        file.write(f"{key}\n")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_shards_and_order_do_not_matter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run([*AUDIT, *ATTACKS, "--out", "small"]) == 0
    monkeypatch.setattr(runner, "SHARD", 100)
    assert run([*AUDIT, *ATTACKS, "--out", "large"]) == 0
    assert len(whole(place / "large")) == 10
    small, large = figures(place / "small"), figures(place / "large")
    for one, two in zip(small["records"], large["records"], strict=True):
        assert one["images"]["success"] == two["images"]["success"]
        for near, far in zip(one["images"]["distance"], two["images"]["distance"], strict=True):
            assert near == pytest.approx(far, abs=1e-5) if near is not None else far is None


def test_ctrl_c_and_the_same_command_again(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*AUDIT, "--attacks", "fgsm,pgd,fmn"]
    assert run([*arguments, "--out", "calm"]) == 0
    left, original = [5], runner.siege

    def impatient(*rest: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(*rest, **named)

    monkeypatch.setattr(runner, "siege", impatient)
    assert run([*arguments, "--out", "cut"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    kept = audits.load(place / "cut")
    assert not kept.complete and len(whole(place / "cut")) == 4
    assert kept.left_out[-1].why == "the run was interrupted before 30 of 30 images"
    assert run(["audit", "--resume", "cut"]) == 0
    assert figures(place / "cut") == figures(place / "calm")
    assert run(["audit", "--resume", "cut"]) == 0
    assert len(whole(place / "cut")) == 24


def test_a_killed_run_can_be_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run([*AUDIT, "--attacks", "fgsm", "--out", "cut"]) == 0
    (place / "cut" / "audit.json").unlink()
    assert run(["report", "cut", "--format", "json", "--out", "again.json"]) == 0
    assert [record["attack"] for record in json.loads((place / "again.json").read_text())["records"]] == ["fgsm"] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--attacks", "fgsm", "--seed", "1"], "another run, with seed 0, not 1"),
        (["--attacks", "fgsm,pgd"], "attacks ['fgsm'], not ['fgsm', 'pgd']"),
        (["--attacks", "fgsm", "--budget", "standard"], "budget 'quick', not 'standard'"),
        (["--attacks", "fgsm", "--data", "other.npz"], "with data"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run([*AUDIT, "--attacks", "fgsm", "--out", "run"]) == 0
    with np.load("images.npz") as held:
        np.savez("other.npz", x=held["x"][::-1], y=held["y"][::-1])
    capsys.readouterr()
    before = figures(place / "run")
    assert run([*AUDIT, *arguments, "--out", "run"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and says in err[0] and "--out" in err[0]
    assert figures(place / "run") == before


def test_two_processes_do_not_share_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(place / "run"):
        assert run([*AUDIT, "--attacks", "fgsm", "--out", "run"]) == 2
    assert "in use by another process" in capsys.readouterr().err
    assert run([*AUDIT, "--attacks", "fgsm", "--out", "run"]) == 0


@pytest.mark.parametrize("full", ["shard", "database"])
def test_a_full_disk_loses_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    arguments = [*AUDIT, "--attacks", "fgsm,pgd"]
    assert run([*arguments, "--out", "calm"]) == 0
    with monkeypatch.context() as small:
        if full == "database":
            small.setattr(store, "SCHEMA", store.SCHEMA + "PRAGMA max_page_count = 11;")
        else:
            sync = files.os.fsync
            left = [12]

            def filling(handle: int) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                sync(handle)

            small.setattr(files.os, "fsync", filling)
        capsys.readouterr()
        assert run([*arguments, "--out", "full"]) == 2
    last = capsys.readouterr().err.splitlines()[-1].lower()
    assert last.startswith("error: ") and ("no space left" in last or "no space is left" in last)
    done = whole(place / "full")
    assert 0 < len(done) < 16
    assert run([*arguments, "--out", "full"]) == 0
    assert whole(place / "full")[: len(done)] == done
    assert figures(place / "full") == figures(place / "calm")


def test_an_audit_ends_in_its_time_and_says_what_it_left(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "throughput", lambda *rest: Speed(3.0, 3.0))
    arguments = ["audit", "slow_net:network", *AUDIT[2:], "--attacks", "fgsm,pgd,square"]
    began = time.monotonic()
    assert run([*arguments, "--time", "5s", "--out", "cut"]) == 3
    assert time.monotonic() - began < 5.5
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cut short by --time" in last and "of 30 images of square linf:16/255" in last
    kept = audits.load(place / "cut")
    assert not kept.complete and {record.attack for record in kept.records} >= {"fgsm", "pgd"}
    met = sum(record.n for record in kept.records)
    assert run(["audit", "--resume", "cut", "--time", "3s"]) == 3
    assert sum(record.n for record in audits.load(place / "cut").records) > met


def test_what_the_clock_cut_counts_until_it_is_done_in_full(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*AUDIT[:-1], "linf:8/255", "--attacks", "pgd"]
    assert run([*arguments, "--out", "calm"]) == 0
    original = runner.siege

    def tired(attack: Any, target: Any, images: Any, threat: Any, **named: Any) -> Any:
        outcome, verdict, record = original(attack, target, images, threat, **named)
        object.__setattr__(outcome, "seconds", threat.seconds)
        return outcome, verdict, record

    with monkeypatch.context() as clock:
        clock.setattr(runner, "siege", tired)
        assert run([*arguments, "--out", "cut", "--time", "60s"]) == 3
    (record,) = audits.load(place / "cut").records
    assert record.n == 10 and "time cut it short" in record.notes[-1]
    assert run(["audit", "--resume", "cut"]) == 0
    assert figures(place / "cut") == figures(place / "calm")


def test_thresholds_set_the_exit_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*AUDIT, "--attacks", "fgsm", "--out", "run", "--fail-under"]
    assert run([*arguments, "linf:16/255=0.01", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    low = said["worst"][0]["robust_interval"][0]
    assert said["gates"] == [{"threat": "linf:16/255", "at_least": 0.01, "low": low}]
    assert 0.01 < low < said["worst"][0]["robust_accuracy"] < 1
    assert run([*arguments, "linf:16/255=0.01", "--fail-under", f"linf:16/255={low + 0.001}"]) == 1
    err = capsys.readouterr().err
    assert err.count("failed: ") == 1 and "robust accuracy within linf:16/255 is at least" in err
    for wrong in ("linf:16/255", "linf:16/255=40", "linf:0.5=0.1", "0.4"):
        assert run([*arguments, wrong]) == 2


def test_the_plan_comes_with_its_cost(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*AUDIT, "--attacks", "pgd,bim", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(cell["attack"], cell["images"], cell["passes"]) for cell in said["cells"]] == [
        ("pgd", 30, 1200),
        ("pgd", 30, 1200),
        ("bim", 30, said["cells"][2]["passes"]),
    ]
    assert said["cells"][0]["seconds"] == pytest.approx(1200 * 0.02 / 1000)
    assert said["left_out"][0]["why"] == "bim works in linf"
    assert run([*AUDIT, "--attacks", "pgd", "--dry-run", "--time", "1s"]) == 0
    assert "sure to fit" in capsys.readouterr().out
    assert not (place / "runs").exists()


@pytest.mark.parametrize("format", ["json", "md", "junit", "html"])
def test_formats_are_alone_on_stdout(place: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    from xml.etree import ElementTree

    arguments = [*AUDIT, "--attacks", "fgsm", "--out", "run", "--fail-under", "l2:0.3=1"]
    assert run([*arguments, "--format", format]) == 1
    out = capsys.readouterr().out
    if format == "json":
        assert json.loads(out)["records"][0]["attack"] == "fgsm"
    elif format == "junit":
        suite = ElementTree.fromstring(out)
        assert (suite.get("failures"), suite.get("tests")) == ("1", str(len(suite.findall("testcase"))))
    else:
        assert out.startswith({"md": "# siege\\_net:network", "html": "<!doctype html>"}[format])


@pytest.mark.parametrize("arguments", [["--time", "soon"], ["--time", "0s"], ["--resume", "nowhere"]])
def test_what_cannot_be_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(["audit", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (place / "nowhere").exists()


def test_resume_takes_everything_from_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*AUDIT, "--attacks", "fgsm", "--out", "run"]) == 0
    assert run(["audit", "--resume", "run", "--seed", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --resume takes everything from the run; leave --seed out"
