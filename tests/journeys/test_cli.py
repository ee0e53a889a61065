from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from besiege.cli import run
from besiege.core.method import Attack

FIGURES = """attack target data n seed threat clean_accuracy success_rate success_interval robust_accuracy
median_distance mean_distance success_rate_8bit forward_per_image backward_per_image queries_median seconds verified
noise_success_rate""".split()
NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
        for k in range(3):
            net[1].weight[k, 16 * k : 16 * (k + 1)] = 1.0
    return net

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network that answers with the brightest of three channels, and images it gets right."""
    torch.set_num_threads(1)
    (tmp_path / "siege_net.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = rng.uniform(0.3, 0.5, (30, 3, 4, 4)).astype(np.float32)
    x[np.arange(30), y] += 0.05 + 0.1 * rng.random((30, 1, 1)).astype(np.float32)
    y[0] = 1
    np.savez(tmp_path / "images.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "siege_net", raising=False)
    return tmp_path


NET = ["siege_net:network", "--data", "images.npz"]


def test_help_and_report_load_no_torch(tmp_path: Path) -> None:
    for arguments in (["--help"], ["attack", "--help"], ["report", str(tmp_path)]):
        code = f"import sys; from besiege.cli import run; run({arguments!r}); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr)


def test_a_real_process_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from besiege.cli import main; main()", "attack", "pdg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: there is no method 'pdg'; did you mean 'pgd'?"]


def test_list_is_one_array(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json"]) == 0
    methods = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    facts = "name title family kind access norms seeks paper counters broken_by atlas".split()
    assert all(list(method) == facts for method in methods.values())
    assert methods["pgd"]["norms"] == ["l1", "l2", "linf"] and "AML.T0043.000" in methods["pgd"]["atlas"]


def test_show_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "pgd"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("arXiv:1706.06083", "steps=40", "restarts=1", "random starts"))


def test_attack_prints_one_object(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attack", "fgsm", *NET, "-n", "30", "--eps", "16/255", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(FIGURES) <= set(said)
    assert (said["n"], said["attacked"], said["clean_accuracy"]) == (30, 29, pytest.approx(29 / 30))
    x, y = (np.load(place / "images.npz")[key] for key in "xy")
    means = np.sort(x.mean((2, 3)), 1)
    falls = (means[:, 2] - means[:, 1] < 2 * 16 / 255) & (y == x.mean((2, 3)).argmax(1))
    assert 0 < falls.sum() < 29
    assert said["images"]["success"] == falls.tolist()
    assert said["success_rate"] == pytest.approx(falls.sum() / 29) and said["verified"]
    assert said["robust_accuracy"] == pytest.approx((29 - falls.sum()) / 30)
    assert said["threat"]["norm"] == "linf" and said["threat"]["eps"] == pytest.approx(16 / 255)


def test_attack_reads_options_and_writes_what_it_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    options = ["--norm", "l2", "--eps", "0.5", "--target-class", "2", "-o", "steps=7", "--seed", "3", "--out", "found"]
    assert run(["attack", "pgd", *NET, "-n", "30", *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((place / "found" / "record.json").read_text())
    assert (said["options"]["steps"], said["seed"], said["threat"]["target_class"]) == (7, 3, 2)
    found = load_file(place / "found" / "adversarial.safetensors")
    assert found["adv"].shape == (30, 3, 4, 4) and found["label"].tolist() == said["images"]["label"]
    assert all(said["images"]["adversarial_label"][i] == 2 for i, hit in enumerate(said["images"]["success"]) if hit)


def test_a_minimum_is_sought_at_any_distance_and_judged_at_eps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attack", "deepfool", *NET, "-n", "30", "--norm", "2", "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert run(["attack", "deepfool", *NET, "-n", "30", "--norm", "2", "--eps", "0.3", "--json"]) == 0
    near = json.loads(capsys.readouterr().out)
    assert free["threat"]["eps"] is None and free["success_rate"] == 1
    assert near["images"]["distance"] == free["images"]["distance"]
    within = [d is not None and d <= 0.3 for d in free["images"]["distance"]]
    assert near["images"]["success"] == within and 0 < sum(within) < 29


def test_audit_writes_a_run_and_report_renders_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", *NET, "-n", "30", "--threat", "linf:16/255,l2:0.3", "--attacks", "fgsm,bim", "--out", "run"]
    assert run([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((place / "run" / "audit.json").read_text())
    assert [(r["attack"], r["threat"]["norm"]) for r in said["records"]] == [
        ("fgsm", "linf"),
        ("fgsm", "l2"),
        ("bim", "linf"),
    ]
    assert [(left["attack"], left["why"]) for left in said["left_out"]] == [("bim", "bim works in linf")]
    stands = [not any(fell) for fell in zip(*(r["images"]["success"] for r in said["records"][::2]), strict=True)]
    assert said["worst"][0]["robust_accuracy"] == pytest.approx((sum(stands) - 1) / 30)
    page = (place / "run" / "report.html").read_text()
    assert page.count("<img") == 9 and "data:image/png;base64," in page
    assert run(["report", "run", "--out", "again.html"]) == 0
    assert (place / "again.html").read_text() == page
    capsys.readouterr()
    assert run(["report", "run", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == said
    assert run(["report", "run", "--format", "md"]) == 0
    assert "| fgsm | linf:16/255 | 30 |" in capsys.readouterr().out
    assert run(["report", "run", "--format", "junit", "--out", "run.xml"]) == 0
    assert ElementTree.parse(place / "run.xml").getroot().tag == "testsuite"


def test_ctrl_c_leaves_what_is_done(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from besiege.audit import run as runner

    cells: list[str] = []
    original = runner.siege

    def impatient(attack: Attack, *rest: Any, **named: Any) -> Any:
        cells.append(attack.name)
        if len(cells) == 2:
            raise KeyboardInterrupt
        return original(attack, *rest, **named)

    monkeypatch.setattr(runner, "siege", impatient)
    arguments = ["audit", *NET, "-n", "30", "--threat", "linf:16/255", "--attacks", "fgsm,bim,pgd", "--out", "run"]
    assert run(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    kept = json.loads((place / "run" / "audit.json").read_text())
    assert [record["attack"] for record in kept["records"]] == ["fgsm"] and not kept["complete"]
    assert [left["attack"] for left in kept["left_out"]] == ["bim", "pgd"]
    assert "cut short" in (place / "run" / "report.html").read_text()


def test_check_says_what_it_sees(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", *NET, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["clean_accuracy"] == pytest.approx(29 / 30) and said["parameters"] == 147
    assert (said["answers"], said["deterministic"], said["shape"], said["classes"]) == ("logits", True, [3, 4, 4], 3)
    assert [check["name"] for check in said["checks"] if check["passed"]][:2] == ["repeatable", "batch-independent"]
    assert run(["check", *NET]) == 0
    assert "96.7 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["atack", "pgd"], "Did you mean 'attack'"),
        (["attack"], "NAME"),
        (["attack", "pgd", "--limit", "0"], "--limit"),
        (["attack", "pgd", "--budget", "free"], "free"),
        (["attack", "pgd", "--nonsense"], "--nonsense"),
        (["show", "squarre"], "squarre"),
        (["attack", "pgd", *NET, "--eps", "0"], "above 0"),
        (["attack", "pgd", *NET, "--eps", "-1/255"], "above 0"),
        (["attack", "pgd", *NET, "--eps", "much"], "'much'"),
        (["attack", "pgd", *NET, "--norm", "7"], "'7'"),
        (["attack", "bim", *NET, "--norm", "2"], "bim works in linf"),
        (["attack", "pgd", *NET, "--target-class", "3"], "0 to 2|3 classes"),
        (["attack", "pgd", *NET, "-o", "step=3"], "'steps'"),
        (["attack", "pgd", *NET, "-o", "steps"], "key=value"),
        (["attack", "pgd", *NET, "-o", "steps=many"], "'many'"),
        (["attack", "pgd", "siege_net:netwrk", "--data", "images.npz"], "netwrk"),
        (["attack", "pgd", "siege_net:broken", "--data", "images.npz"], "no weights here"),
        (["attack", "pgd", "siege_net:network", "--data", "nowhere.npz"], "nowhere.npz"),
        (["attack", "pgd", *NET, "--mean", "x"], "'x'"),
        (["attack", "pgd", *NET, "--device", "abacus"], "abacus"),
        (["audit", *NET, "--threat", "l9:1"], "l9:1"),
        (["audit", *NET, "--attacks", "pdg"], "'pgd'"),
        (["audit", *NET, "--attacks", "bim", "--threat", "l2:1"], "bim works in linf"),
        (["audit", *NET, "--attacks", "fgsm", "--out", "images.npz/run"], "cannot write"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    before = sorted(place.iterdir())
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert any(word in err for word in says.split("|"))
    assert [path for path in sorted(place.iterdir()) if path.name != "__pycache__"] == before


def test_a_defect_is_told_from_bad_input(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from besiege.engine import summary

    def defect(*rest: object, **named: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(summary, "evade", defect)
    assert run(["attack", "pgd", *NET]) == 70
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "RuntimeError: two lines" in err and "BESIEGE_DEBUG=1" in err
    monkeypatch.setenv("BESIEGE_DEBUG", "1")
    with pytest.raises(RuntimeError):
        run(["attack", "pgd", *NET])


def test_the_bare_verbs_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attack", "fgsm", "-n", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 5
    assert run([]) == 0
    assert "audit" in capsys.readouterr().out
    assert run(["--version"]) == 0
