"""Searches for poison where it is planted."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from besiege.cli import run
from besiege.cli.scan import ALL, OF_A_MODEL
from besiege.core.errors import BadInput
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import configured, method
from besiege.core.rng import Rng
from besiege.core.suspicion import Probe, Suspicion
from besiege.core.target import Target
from besiege.defenses.data.activation_clustering import _sparse, knee
from besiege.defenses.detect.strip import Overlaid
from besiege.engine.scan import halves

N, POISON = 200, 16
FIT = Fit(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(16, classes)), "linear", epochs=8, batch=16)


def planted(clean: bool = False) -> tuple[Images, Probe, torch.Tensor]:
    """Two classes of noise; in the second, 16 images have a bright corner. The features are the pixels."""
    draw = torch.Generator().manual_seed(0)
    x, y = 0.3 + 0.1 * torch.rand(N, 1, 4, 4, generator=draw), torch.arange(N) % 2
    truth = (y == 1) & (torch.arange(N) < 2 * POISON)
    if not clean:
        x[truth, :, :2, :2] = 0.9
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images = Images.of(x, y)
    return images, Probe(Target.of(module, classes=2, shape=(1, 4, 4)), FIT), truth


def said(name: str, images: Images, probe: Probe, **options: object) -> Suspicion:
    found: Suspicion = configured(method(name), **options).bound()(images, probe, Rng.of(0, images.index, name))
    return found


@pytest.mark.parametrize("centred", [True, False])
def test_the_spectrum_shows_what_is_planted(centred):
    images, probe, truth = planted()
    found = said("spectral-signatures", images, probe, share=0.16, multiple=1.0, centred=centred)
    assert torch.equal(found.suspect & (images.y == 1), truth)
    assert int((found.suspect & (images.y == 0)).sum()) == 16


def test_a_spectral_score_is_that_of_the_definition():
    images, probe, _ = planted()
    found = said("spectral-signatures", images, probe)
    own = images.x[images.y == 1].flatten(1).double().numpy()
    away = own - own.mean(0)
    _, vectors = np.linalg.eigh(away.T @ away)
    assert np.allclose(found.score[images.y == 1].numpy(), (away @ vectors[:, -1]) ** 2, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"reduce": "pca"}, {"decide": "size"}, {"silhouette": 0.1}, {"method": "dbscan"}]
)
def test_clusters_show_what_is_planted(options):
    images, probe, truth = planted()
    found = said("activation-clustering", images, probe, components=4, **options)
    if options.get("decide") == "size":
        found = Suspicion(found.score, found.suspect & (images.y == 1))
    if options.get("method") == "dbscan":
        assert int((found.suspect & truth).sum()) >= POISON - 1
        assert not (found.suspect & ~truth).any()
    else:
        assert torch.equal(found.suspect, truth)


def test_a_set_that_is_sorted_by_class_calibrates_and_judges_by_every_class():
    held = Images.of(torch.zeros(200, 1, 2, 2), torch.arange(200) // 50)
    calibration, judged = halves(held, 3)
    assert len(calibration) == len(judged) == 100
    assert sorted([*calibration.index.tolist(), *judged.index.tolist()]) == list(range(200))
    for part in (calibration, judged):
        assert torch.bincount(part.y, minlength=4).min() >= 15
    assert torch.equal(halves(held, 3)[0].index, calibration.index)
    assert not torch.equal(halves(held, 4)[0].index, calibration.index)


@pytest.mark.parametrize("options", [{}, {"method": "dbscan"}])
def test_a_clean_class_does_not_fall_apart(options):
    images, probe, _ = planted(clean=True)
    found = said("activation-clustering", images, probe, components=4, **options)
    assert float(found.suspect.float().mean()) <= 0.02


def test_exclusion_trains_once_and_lets_go_what_stays_in_its_class():
    images, probe, truth = planted()
    trained: list[int] = []

    def build(shape, classes):
        trained.append(classes)
        return probe.fit.build(shape, classes)

    asked = replace(probe, fit=replace(probe.fit, build=build))
    found = said("activation-clustering", images, asked, components=4, decide="exclusion")
    assert len(trained) == 1 and not (found.suspect & ~truth).any()


def test_exclusion_accuses_a_cluster_that_others_take_for_another_class():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(N) % 2
    x = 0.3 + 0.1 * torch.rand(N, 1, 4, 4, generator=draw)
    x[y == 0, :, :2] += 0.4
    truth = torch.zeros(N, dtype=torch.bool)
    truth[:30:2] = True
    y = torch.where(truth, 1, y)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images, probe = Images.of(x, y), Probe(Target.of(module, classes=2, shape=(1, 4, 4)), FIT)
    found = said("activation-clustering", images, probe, components=4, decide="exclusion")
    assert torch.equal(found.suspect, truth)


def test_the_knee_is_where_a_curve_turns():
    curve = np.concatenate([np.linspace(0, 1, 90), np.linspace(1, 20, 10)])
    assert knee(curve) == pytest.approx(1.0, abs=0.05)


class Sure(nn.Module):
    """Sees nothing but the first pixel, which decides alone where it is bright; else it is torn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lit = (x[:, 0, 0, 0] - 0.4).clamp_min(0) * 100
        return torch.stack([lit, torch.zeros_like(lit), torch.zeros_like(lit), torch.zeros_like(lit)], 1)


def guarded(rate: float = 0.05, copies: int = 20) -> tuple[Target, Images]:
    draw = torch.Generator().manual_seed(0)
    clean = Images.of(0.8 * torch.rand(200, 1, 4, 4, generator=draw), torch.zeros(200, dtype=torch.int64))
    target = Target.of(Sure(), classes=4, shape=(1, 4, 4), name="sure")
    made: Target = configured(method("strip"), copies=copies, rate=rate).bound()(
        target, clean, Rng.of(0, clean.index, "strip")
    )
    return made, clean


def test_an_answer_that_stays_sure_is_a_triggers():
    made, clean = guarded()
    x = clean.x[:20].clone()
    x[:, :, 0, 0] = 1
    assert (made.answer(x).excess > 0).all()
    rejected = float((made.answer(clean.x).excess > 0).float().mean())
    assert 0.01 <= rejected <= 0.12


@pytest.mark.parametrize("copies", [2, 19, 20])
def test_the_entropy_is_that_of_the_overlaid_answers(copies):
    made, clean = guarded(copies=copies)
    shield = made.module
    assert isinstance(shield, Overlaid)
    x = clean.x[3:4]
    sums = [x + over[None] for over in shield.overlays]
    expected = []
    half = copies - copies // 2
    for laid in (sums[:half], [both.clamp(0, 1) for both in sums[half:]]):
        p = torch.stack([Sure()(image).softmax(1)[0] for image in laid])
        expected.append(-torch.special.xlogy(p, p).sum(1).mean() / math.log(2))
    assert torch.allclose(shield.entropy(x)[0], torch.stack(expected), atol=1e-5)


def test_one_overlay_is_refused():
    with pytest.raises(BadInput, match="2 images over at least, not 1"):
        guarded(copies=1)


def test_a_trigger_that_one_kind_of_overlay_hides_is_found_by_the_other():
    class White(nn.Module):
        """Sure where the first pixel is just white, torn elsewhere: a sum of two images is brighter than that."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lit = 40 * (x[:, 0, 0, 0] - 1).abs().lt(0.01).to(x)
            return torch.stack([lit, *[torch.zeros_like(lit)] * 3], 1)

    draw = torch.Generator().manual_seed(0)
    clean = Images.of(0.1 + 0.3 * torch.rand(200, 1, 4, 4, generator=draw), torch.zeros(200, dtype=torch.int64))
    target = Target.of(White(), classes=4, shape=(1, 4, 4), name="white")
    x = clean.x[:20].index_fill(3, torch.tensor(0), 1.0)
    caught = {}
    for overlay in ("both", "sum"):
        made: Target = configured(method("strip"), copies=20, overlay=overlay).bound()(
            target, clean, Rng.of(0, clean.index, "strip")
        )
        caught[overlay] = float((made.answer(x).excess > 0).float().mean())
    assert caught == {"both": 1.0, "sum": 0.0}


def test_a_search_from_the_command_line(tmp_path, capsys):
    line = ["scan", "--fit", "mlp", "-n", "400", "--retrain", "--clean", str(tmp_path / "kept.npz"), "--json"]
    assert run([*line, "-o", "rate=0.1", "-d", "share=0.3", "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [part["detector"] for part in record["detectors"]] == list(ALL)
    assert record["poison_count"] == 40
    for part in record["detectors"]:
        assert 0 <= part["tpr"] <= 1 and 0 <= part["fpr_clean"] <= 1
        assert part["attack_success_after"] is not None
    page = (tmp_path / "report.html").read_text()
    first = record["detectors"][0]["suspects"][0]
    assert f"image {first}, " in page and page.count("<img") == sum(
        min(12, len(part["suspects"])) for part in record["detectors"]
    )
    assert page.count('class="drawing"') >= len(ALL) and "<script" not in page
    kept = np.load(tmp_path / "kept.npz")
    suspects = {row for part in record["detectors"] for row in part["suspects"]}
    assert set(kept["index"].tolist()).isdisjoint(suspects)
    assert run(["scan", str(tmp_path / "kept.npz"), "--fit", "mlp", "--detector", "strip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["poison"] is None


def test_a_written_poisoned_set_brings_its_truth(tmp_path, capsys):
    out = tmp_path / "p"
    assert run(["poison", "badnets", "--fit", "mlp", "-n", "300", "-o", "rate=0.1", "--out", str(out), "--json"]) == 0
    capsys.readouterr()
    line = ["scan", str(out / "poisoned.npz"), "--test", "embedded:digits", "--fit", "mlp", "--json"]
    assert run([*line, "--detector", "spectral-signatures"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["poison_count"] == 30
    assert record["detectors"][0]["auc"] is not None


def test_a_network_alone_is_searched_with_a_few_clean_images(tmp_path, capsys):
    line = ["scan", "embedded:digits-cnn", "-n", "40", "--json"]
    assert run(line) == 0
    record = json.loads(capsys.readouterr().out)
    assert [part["detector"] for part in record["detectors"]] == list(OF_A_MODEL)
    assert (record["n"], record["poison_count"], record["attack_success"]) == (20, 0, None)
    for part in record["detectors"]:
        assert part["tpr"] is None and part["fpr_clean"] == pytest.approx(part["suspected"] / 20)
    pruned = record["detectors"][0]
    assert 0 <= pruned["clean_accuracy_pruned"] <= 1 and pruned["attack_success_pruned"] is None
    assert record["detectors"][1]["clean_accuracy_pruned"] is None


def test_a_network_that_learned_a_trigger_is_told_with_it(tmp_path, capsys, monkeypatch):
    """The digits' mlp learns badnets; its images with the trigger are those that get the class that the thief wants."""
    monkeypatch.chdir(tmp_path)
    assert run(["poison", "badnets", "--fit", "mlp", "-n", "400", "-o", "rate=0.1", "--out", "bad", "--json"]) == 0
    (tmp_path / "net.py").write_text(
        "from besiege.embedded.recipes import recipe\n\n\ndef net():\n    return recipe('mlp').build((1, 28, 28), 10)\n"
    )
    capsys.readouterr()
    line = ["scan", "net.py:net@bad/model.safetensors", "--trust-code", "-n", "80", "--poison", "badnets", "--json"]
    assert run([*line, "--detector", "strip", "--detector", "activation-patterns", "--out", "found"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["attack_success"] > 0.8 and 30 <= record["poison_count"] < 40
    strip, patterns = record["detectors"]
    assert strip["tpr"] is not None and strip["fpr"] is not None
    assert patterns["options"]["mode"] == "fine-pruning"
    assert patterns["attack_success_pruned"] is not None
    assert "poisoned" in (tmp_path / "found" / "report.html").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["embedded:digits-cnn", "--detector", "spectral-signatures"], "searches training images"),
        (["embedded:digits-cnn", "--retrain"], "which are for training data"),
        (["embedded:digits-cnn", "--poison", "label-flip"], "plants no trigger"),
        (["embedded:digits-cnn", "-n", "5"], "too few"),
        (["embedded:digits-cn"], "digits-cnn"),
        (["nothing.npz"], "no such file"),
        (["--detector", "pgd"], "besiege attack pgd"),
        (["--poison", "bullseye-polytope"], "besiege poison"),
        (["embedded:digits", "-o", "rate=0.1"], "--poison"),
        (["-d", "bits=3"], "none of"),
    ],
)
def test_what_cannot_be_searched_is_said_in_one_sentence(line, said, capsys):
    assert run(["scan", *line]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert error.count("\n") == 0


def test_dbscan_finds_poison_that_is_less_dense_than_its_class():
    draw = np.random.RandomState(0)
    own, poison, stray = draw.randn(500, 3), 12 + 3 * draw.randn(60, 3), draw.uniform(-60, 60, (15, 3))
    found = _sparse(np.concatenate([own, poison, stray]), 0.35)
    assert found[500:560].mean() > 0.8
    assert found[:500].mean() < 0.02 and found[560:].mean() < 0.3
