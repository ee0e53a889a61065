"""`besiege audit` beyond evasion: defenses, inference, extraction and poisoning in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from besiege.audit import fronts
from besiege.cli import run

NETWORK = """
import torch
from torch import nn

def network():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        rows = torch.zeros(3, 8, 8)
        for label in range(3):
            rows[label, 2 * label : 2 * label + 2] = 1.0
        net[1].weight.copy_(rows.flatten(1))
        net[1].bias.zero_()
    return net
"""
ALL = ["audit", "front_net:network", "--data", "judged.npz", "--fit", "mlp", "--attacks", "fgsm", "--out", "run"]
GIVEN = ["--train", "train.npz", "--members", "train.npz", "--nonmembers", "judged.npz"]


def stripes(n: int, seed: int) -> dict[str, Any]:
    draw = np.random.RandomState(seed)
    y = np.arange(n) % 3
    x = draw.rand(n, 8, 8) * 0.4
    for label in range(3):
        x[y == label, 2 * label : 2 * label + 2] += 0.15
    return {"x": (x.clip(0, 1) * 255).astype(np.uint8), "y": y}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    np.savez(tmp_path / "train.npz", **stripes(120, 1))
    np.savez(tmp_path / "judged.npz", **stripes(60, 2))
    (tmp_path / "front_net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "front_net", raising=False)
    return tmp_path


def test_five_fronts_a_defense_and_advice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families = ["--families", "poisoning,inference,extraction", "--defend", "feature-squeezing"]
    assert run([*ALL, *GIVEN, *families, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((place / "run" / "audit.json").read_text())
    (defense,) = said["defenses"]
    assert [(row["undefended"]["attack"], row["undefended"]["threat"]["norm"]) for row in defense["rows"]] == [
        ("fgsm", "linf"),
        ("fgsm", "l2"),
    ]
    assert (defense["calibrated"], defense["judged"]) == (120, 20)
    (member,), (pictured,), (theft,), (poisoned,) = (
        said[name] for name in ("memberships", "inversions", "thefts", "poisonings")
    )
    assert (member["members"], member["nonmembers"]) == (120, 60)
    assert pictured["n"] == 3 and theft["asked_of"] == "train.npz" and theft["queries"] == 120
    assert poisoned["n_train"] == 120 and "two networks of the recipe mlp" in poisoned["notes"][-1]
    shown = [(one["front"], (place / "run" / one["file"]).is_file()) for one in said["exhibits"]]
    assert ("model-inversion", True) in shown and ("badnets", True) in shown and (shown[0][0], False) not in shown
    assert {left["attack"] for left in said["left_out"]} >= {"blended", "reconstruction"}
    page = (place / "run" / "report.html").read_text()
    linked = [figure for advice in said["advice"] for figure in advice["figures"]]
    assert linked and "What to do" in page
    from besiege.results.audit import slug

    assert all(f'id="{slug(figure)}"' in page and f'href="#{slug(figure)}"' in page for figure in linked)
    for format in ("md", "junit"):
        assert run(["report", "run", "--format", format]) == 0
        assert "copycat" in capsys.readouterr().out


def test_a_run_that_is_cut_off_on_a_front_goes_on_there(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*ALL, *GIVEN, "--families", "inference,extraction", "--defend", "feature-squeezing"]
    original, begun = fronts.fight, []

    def impatient(front: fronts.Front, scene: fronts.Scene, known: Any, keep: Any) -> Any:
        begun.append((str(front), len(known)))

        def once(key: str, row: Any) -> None:
            keep(key, row)
            raise KeyboardInterrupt

        return original(front, scene, known, once if len(begun) == 1 else keep)

    monkeypatch.setattr("besiege.audit.run.fight", impatient)
    assert run(line) == 130
    held = json.loads((place / "run" / "audit.json").read_text())
    assert not held["complete"] and held["defenses"] == []
    reasons = {left["attack"]: left["why"] for left in held["left_out"]}
    assert "interrupted" in reasons["defense feature-squeezing"] and "interrupted" in reasons["copycat"]
    capsys.readouterr()
    assert run([*line, "--json"]) == 0
    went = json.loads(capsys.readouterr().out)
    assert begun[:2] == [("defense feature-squeezing", 0), ("defense feature-squeezing", 1)]
    assert went["complete"] and len(went["defenses"][0]["rows"]) == 2


def test_other_material_is_another_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*ALL, "--families", "extraction"]
    assert run([*line, "--train", "train.npz"]) == 0
    assert "images under attack" not in capsys.readouterr().err
    assert run([*line, "--train", "judged.npz"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_images_that_are_learned_from_and_attacked_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ALL, "--families", "extraction", "--train", "judged.npz", "--json"]) == 0
    said = capsys.readouterr()
    assert "60 of the 60 images under attack are in --train too" in said.err
    assert any("--train too" in warning for warning in json.loads(said.out)["warnings"])


def test_what_it_has_no_material_for_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ALL, "--families", "inference,extraction", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    why = {left["attack"]: left["why"] for left in said["left_out"]}
    assert "--members and --nonmembers" in why["membership-inference"] and "--train DATA" in why["copycat"]
    assert "--families" in why["poisoning"] and said["complete"]
    assert "copycat: it needs other images" in (place / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--families", "whitebx"], "whitebox"),
        (["--defend", "feature-squeezing"], "--train DATA"),
        (["--defend", "pgd", "--train", "train.npz"], "besiege attack pgd"),
        (["--members", "train.npz"], "--nonmembers"),
        (["--train", "nowhere.npz"], "nowhere.npz"),
        (["--fit", "nonsense"], "nonsense"),
    ],
)
def test_mistakes_are_told(place: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert run([*ALL, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not (place / "run").exists()


def test_inference_alone_needs_no_attack(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["audit", "front_net:network", "--data", "judged.npz", "--families", "inference", "--out", "run", *GIVEN]
    assert run([*line, "--fit", "mlp", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["records"] == [] and len(said["memberships"]) == 1
