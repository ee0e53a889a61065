"""The engine of poisoning: twins, proofs, figures, and what is written for other tools."""

from __future__ import annotations

import csv
import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from besiege.cli import run
from besiege.core.errors import BadInput, BadOutcome
from besiege.core.features import all_features, last_layer
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Card, Method, configured, method
from besiege.core.poisoned import Knowledge, Poisoned, eight_bits
from besiege.core.target import Target
from besiege.data import open_images
from besiege.data.write import archive, pictures
from besiege.engine.poisoning import Ground, poison, proven, with_new_head
from besiege.results.interval import wilson
from besiege.results.poisoning import Measured, PoisonRecord, Run, cell

FIT = Fit(
    lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes)),
    "tiny",
    epochs=6,
    batch=16,
    lr=0.1,
)


def stripes(n: int, seed: int = 0) -> Images:
    """Three classes, each bright in columns of its own."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.rand(n, 1, 8, 8, generator=draw) * 0.4
    for label in range(3):
        x[y == label, :, :, 2 * label : 2 * label + 2] += 0.5
    return Images.of(x, y, name="stripes")


def ground(**changes: object) -> Ground:
    return replace(Ground(stripes(240), stripes(90, 1), FIT, 3, probes=3), **changes)


def custom(function, **facts: object) -> Method:
    """A method that is in no registry."""
    card = Card("custom", "Custom", "poisoning", "poisoning", "doi:10.0", "A test.", **facts)
    return Method(card, function)


def test_a_backdoor_is_in_the_poisoned_model_and_not_in_its_twin():
    record, sample = poison(configured(method("badnets"), rate=0.2), ground(seeds=2))
    assert record.seeds == [0, 1] and len(record.cells) == 1 and len(record.cells[0].runs) == 2
    assert record.means == "trigger"
    assert record.poison_count == 48 and record.poison_rate == pytest.approx(0.2)
    assert record.attack_success > 0.9 > 0.2 > record.attack_success_twin
    assert record.clean_accuracy > 0.9 and record.clean_accuracy_twin > 0.9
    trigger = sample.poisoned.trigger
    assert trigger is not None
    test = stripes(90, 1)
    others = eight_bits(test.x)[test.y != 0]
    for model, said in ((sample.target, record.cells[0].runs[0].poisoned), (sample.twin, record.cells[0].runs[0].twin)):
        assert said.success == int((model.labels(eight_bits(trigger(others))) == 0).sum())
        assert said.judged == 60
        assert said.right == int((model.labels(eight_bits(test.x)) == test.y).sum())
        assert said.fingerprint == model.fingerprint


def test_the_twin_learned_from_all_but_the_poisoned_rows_and_alike():
    record, sample = poison(configured(method("badnets"), rate=0.1), ground())
    (one,) = record.cells[0].runs
    kept = ~sample.poisoned.truth
    assert one.untouched == sample.clean[kept].digest == sample.poisoned.images[kept].digest
    assert one.data != one.data_twin == sample.clean.digest
    assert one.twin.fingerprint == FIT(replace(stripes(240), x=eight_bits(stripes(240).x)), 0, classes=3).fingerprint
    assert one.poisoned.fingerprint == FIT(sample.poisoned.images, 0, classes=3).fingerprint


def test_without_an_effect_both_models_are_the_same():
    def idle(images, knows, rng):
        return Poisoned(images, torch.zeros_like(images.y, dtype=torch.bool), target_class=0)

    record, _ = poison(custom(idle)(), ground())
    (one,) = record.cells[0].runs
    assert one.poisoned == one.twin
    assert record.poison_count == 0
    assert set(record.cells[0].boundary_change) == {0.0} and set(record.cells[0].class_change) == {0.0}


def test_twins_are_trained_once():
    trained: list[int] = []

    def build(shape, classes):
        trained.append(1)
        return FIT.build(shape, classes)

    held = ground(fit=replace(FIT, build=build, epochs=1), rates=(0.05, 0.1), seeds=2, probes=0)
    poison(configured(method("badnets")), held)
    assert len(trained) == 2 * (1 + 2)
    poison(configured(method("blended")), held)
    assert len(trained) == 2 * (1 + 2) + 2 * 2
    poison(configured(method("badnets")), replace(held, training=stripes(240, 5), rates=(0.1,), seeds=1))
    assert len(trained) == 10 + 2


def _silently(images: Images, made: Poisoned) -> Poisoned:
    x = made.images.x.clone()
    x[(~made.truth).nonzero()[0]] = 0
    return replace(made, images=replace(made.images, x=x))


def _relabelled(images: Images, made: Poisoned) -> Poisoned:
    y = made.images.y.clone()
    y[(~made.truth).nonzero()[0]] += 1
    return replace(made, images=replace(made.images, y=y))


def _bright(images: Images, made: Poisoned) -> Poisoned:
    return replace(made, images=replace(made.images, x=made.images.x + made.truth.view(-1, 1, 1, 1)))


def _shorter(images: Images, made: Poisoned) -> Poisoned:
    return replace(made, images=made.images[:100], truth=made.truth[:100])


def _renumbered(images: Images, made: Poisoned) -> Poisoned:
    return replace(made, images=replace(made.images, index=made.images.index.flip(0)))


def _longer(images: Images, made: Poisoned) -> Poisoned:
    every = replace(images, **{k: torch.cat([getattr(images, k)] * 2) for k in ("x", "y", "index")})
    return Poisoned(every, torch.arange(480) >= 240)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_silently, "does not name"),
        (_relabelled, "does not name"),
        (_bright, "leaves"),
        (_shorter, "were given|was given"),
        (_renumbered, "numbered"),
        (_longer, "numbered"),
    ],
)
def test_who_changes_more_than_it_says_is_refused(spoil, said):
    images = stripes(240)
    made = method("badnets")().bound()(images, Knowledge(3), _streams(images))
    proven(images, made, "badnets")
    with pytest.raises(BadOutcome, match=said):
        proven(images, spoil(images, made), "custom")


def _streams(images: Images):
    from besiege.core.rng import Rng

    return Rng.of(0, images.index, "test")


def test_added_images_are_learned_from_and_counted():
    def add(images, knows, rng):
        more = {"x": images.x[:30] * 0.999, "y": (images.y[:30] + 1) % 3, "index": 1000 + torch.arange(30)}
        every = replace(images, **{key: torch.cat([getattr(images, key), part]) for key, part in more.items()})
        return Poisoned(every, torch.arange(270) >= 240)

    record, sample = poison(custom(add)(), ground())
    assert record.means == "errors" and record.target_class is None
    assert record.poison_count == 30 and record.poison_rate == pytest.approx(30 / 240)
    assert len(sample.poisoned.images) == 270
    assert torch.equal(eight_bits(sample.poisoned.images.x), sample.poisoned.images.x)
    (one,) = record.cells[0].runs
    assert one.labels_changed == 0
    assert one.poisoned.success == one.poisoned.n - one.poisoned.right


def test_flipped_labels_are_judged_by_what_they_are_for():
    random, _ = poison(configured(method("label-flip"), rate=0.3), ground())
    assert random.means == "errors"
    assert random.attack_success == pytest.approx(1 - random.clean_accuracy)
    assert random.attack_success_twin == pytest.approx(1 - random.clean_accuracy_twin)
    aimed, sample = poison(configured(method("label-flip"), mode="targeted", source=2, rate=0.3), ground())
    assert aimed.means == "plain" and aimed.target_class == 0
    test = stripes(90, 1)
    said = sample.target.labels(eight_bits(test.x[test.y == 2]))
    assert aimed.cells[0].runs[0].poisoned.judged == 30
    assert aimed.attack_success == pytest.approx(float((said == 0).float().mean()))
    assert aimed.attack_success > 0.8
    assert aimed.cells[0].class_change[2] == pytest.approx(float((said == 2).float().mean()) - 1, abs=0.05)


def test_all_to_all_wants_the_next_class_of_every_image():
    record, _ = poison(configured(method("badnets"), mode="all-to-all", rate=0.3), ground())
    assert record.target_class is None and record.means == "trigger"
    assert record.cells[0].runs[0].poisoned.judged == 90
    assert record.attack_success_twin < 0.2


def test_who_means_one_image_gets_one_that_the_twin_gets_right():
    seen: list[Images] = []

    def aim(images, knows, rng):
        assert knows.surrogates and all(s.module is not None for s in knows.surrogates)
        assert knows.validation is not None and not set(knows.validation.index.tolist()) & set(images.index.tolist())
        seen.append(knows.victims)
        x = images.x.clone()
        rows = (images.y == 0).nonzero().squeeze(1)[:24]
        x[rows] = knows.victims.x
        return Poisoned.at(images, rows, x=x[rows], target_class=knows.target_class)

    aiming = custom(aim, needs=("surrogates", "victims", "validation"), victim="frozen")
    record, _ = poison(aiming(), ground(trials=3, seeds=2))
    assert record.means == "victims" and record.victim == "frozen"
    assert len(record.cells[0].runs) == 6 and len(seen) == 6
    assert len({int(v.index) for v in seen[:3]}) == 3
    assert all(len(v) == 1 and int(v.y) != 0 for v in seen)
    assert record.attack_success_twin == 0
    assert record.n_train == 96
    assert record.attack_success > 0
    assert record.success_interval == wilson(round(6 * record.attack_success), 6)


@pytest.mark.parametrize("how", ["frozen", "end-to-end"])
def test_a_transferring_victim_starts_from_the_public_network(how):
    known: list[Target] = []

    def look(images, knows, rng):
        known.extend(knows.surrogates)
        return Poisoned.at(images, torch.arange(3), y=0, target_class=0)

    record, sample = poison(custom(look, needs=("surrogates",))(), ground(victim=how))
    public = known[0]
    assert record.n_train == 120
    same = torch.allclose(all_features(sample.target, stripes(9).x), all_features(public, stripes(9).x))
    assert same == (how == "frozen")
    assert public.fingerprint not in (sample.target.fingerprint, sample.twin.fingerprint)
    assert record.clean_accuracy_twin > 0.9


def test_a_new_head_is_the_recipe_on_the_features():
    public = FIT(stripes(240), 5, classes=3)
    made = with_new_head(public, FIT, stripes(120, 2), 0)
    seen = all_features(public, stripes(30, 3).x)
    assert torch.equal(all_features(made, stripes(30, 3).x), seen)
    assert torch.allclose(made.scores(stripes(30, 3).x), last_layer(made)(seen), atol=1e-5)
    assert not torch.equal(last_layer(made).weight, last_layer(public).weight)
    assert (made.labels(stripes(30, 3).x) == stripes(30, 3).y).float().mean() > 0.9


def test_a_learner_gets_the_options_that_it_names_and_a_pair_its_classes():
    asked: list[dict[str, object]] = []

    def learner(images, *, classes, gamma):
        assert set(images.y.tolist()) == {1, 2}
        asked.append({"classes": classes, "gamma": gamma})
        return FIT(images, 0, classes=classes)

    def add(images, knows, rng, *, gamma: float = 2.0, points: int = 1):
        assert knows.target_class == 2
        return Poisoned.at(images, torch.arange(1), y=2)

    options = {k: p for k, p in inspect.signature(add, eval_str=True).parameters.items() if p.kind is p.KEYWORD_ONLY}
    card = {"pair": (2, 1), "learner": learner, "options": options}
    record, _ = poison(custom(add, **card)(gamma=3), ground(target_class=2))
    assert asked == [{"classes": 3, "gamma": 3}] * 2
    assert record.n_test == 60
    assert record.cells[0].class_change[0] is None
    with pytest.raises(BadInput, match="no images of the classes"):
        poison(custom(add, **{**card, "pair": (2, 7)})(), ground(target_class=2))


def test_rates_are_tried_in_turn_and_must_be_shares():
    record, _ = poison(configured(method("badnets")), ground(rates=(0.05, 0.2), probes=0))
    assert [part.poison_count for part in record.cells] == [12, 48]
    assert record.poison_count == 12 and record.options["rate"] == 0.05
    assert record.cells[0].boundary_change == [None] * 3
    for wrong in (0.0, 1.5):
        with pytest.raises(BadInput, match="rate"):
            poison(configured(method("badnets")), ground(rates=(wrong,)))

    def without(images, knows, rng):
        raise AssertionError

    with pytest.raises(BadInput, match="--rates"):
        poison(custom(without)(), ground(rates=(0.1,)))
    with pytest.raises(BadInput, match="target class 3"):
        poison(configured(method("badnets")), ground(target_class=3))


def test_the_boundary_moves_by_what_its_distances_do():
    def distances(*values: float | None) -> Measured:
        return Measured(
            fingerprint="", right=9, n=10, success=1, judged=4, class_accuracy=[0.5, None], class_distance=list(values)
        )

    def one(seed: int, before: Measured, after: Measured) -> Run:
        digests = {"untouched": "", "data": "", "data_twin": ""}
        return Run(seed=seed, count=2, labels_changed=2, poisoned=after, twin=before, seconds=0, **digests)

    found = cell(
        [one(0, distances(2.0, None), distances(1.0, 3.0)), one(1, distances(1.0, None), distances(2.0, 3.0))], 20
    )
    assert found.boundary_change == [pytest.approx(0.25), None]
    assert found.class_change == [0, None]
    assert found.poison_rate == 0.1
    assert found.clean_interval == wilson(9, 10)
    assert found.success_interval == wilson(1, 4)


def test_a_method_that_trains_hands_over_its_model():
    record, sample = poison(configured(method("input-model-cooptimization"), rate=0.2), ground())
    assert record.changes == "training"
    assert sample.target.module is sample.poisoned.module
    assert record.attack_success > 0.9 > record.attack_success_twin


def test_a_victim_is_judged_as_the_attacker_moved_it():
    """With the model left alone, whoever moves far enough reaches the class in both models, though neither errs."""
    record, sample = poison(configured(method("evil-twins"), eps=1.0, tuned=0, rounds=20), ground(trials=3))
    assert record.means == "victims" and record.poison_count == 0
    assert record.attack_success == record.attack_success_twin == 1
    assert sample.target.fingerprint == sample.twin.fingerprint
    assert all(run.data == run.data_twin for run in record.cells[0].runs)


def test_every_level_survives_a_file(tmp_path):
    x = (torch.arange(256).float() / 255).view(1, 1, 16, 16).repeat(3, 3, 1, 1)
    images = Images.of(x, torch.tensor([10, 2, 2]))
    (tmp_path / "a.npz").write_bytes(archive(images, truth=torch.tensor([True, False, True])))
    back = open_images(str(tmp_path / "a.npz"))
    assert torch.equal(back.x, x) and torch.equal(back.y, images.y)
    assert np.load(tmp_path / "a.npz")["truth"].tolist() == [True, False, True]
    for path, content in pictures(images):
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    back = open_images(f"imagefolder:{tmp_path / 'folder'}")
    assert torch.equal(back.x, x)
    assert back.y.tolist() == [10, 2, 2] or sorted(back.y.tolist()) == [2, 2, 10]


def saved(tmp_path: Path) -> tuple[str, str]:
    for name, seed, n in (("train", 0, 120), ("test", 1, 60)):
        (tmp_path / f"{name}.npz").write_bytes(archive(stripes(n, seed)))
    return str(tmp_path / "train.npz"), str(tmp_path / "test.npz")


@pytest.mark.parametrize("layout", ["npz", "imagefolder", "parquet"])
def test_a_person_poisons_a_set_and_gets_it_on_disk(tmp_path, capsys, layout):
    train, test = saved(tmp_path)
    out = tmp_path / "out"
    words = f"poison badnets --data {train} --test {test} --fit softmax --target-class 1 -o rate=0.2 --seeds 2".split()
    assert run([*words, "--rates", "0.2,0.1", "--json", "--out", str(out), "--format", layout]) == 0
    said = json.loads(capsys.readouterr().out)
    assert PoisonRecord.model_validate(said) == PoisonRecord.model_validate_json((out / "record.json").read_text())
    assert (said["poison_count"], said["poison_rate"], said["seeds"]) == (24, 0.2, [0, 1])
    assert [part["poison_count"] for part in said["cells"]] == [24, 12]
    assert {"clean_accuracy", "clean_accuracy_twin", "attack_success", "attack_success_twin"} <= set(said)
    written = out / ("poisoned" if layout == "imagefolder" else f"poisoned.{layout}")
    back = open_images(str(written))
    rows = list(csv.DictReader((out / "truth.csv").read_text().splitlines()))
    assert len(back) == len(rows) == 120
    bad = [row for row in rows if row["poisoned"] == "1"]
    assert len(bad) == 24
    assert all(row["label"] == "1" != row["label_before"] for row in bad)
    corner = back.x[:, 0, 4:7, 4:7]
    checkered = (corner == torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])).flatten(1).all(1)
    assert checkered.sum() == 24 and (back.y[checkered] == 1).all()
    assert set(load_file(out / "model.safetensors")) == {"1.weight", "1.bias"}
    page = (out / "report.html").read_text()
    assert page.count("poisoned, taught as 1") == 2 * 6 and page.count("with the trigger, answered") == 2 * 6
    assert "20.00% poison" in page and "10.00% poison" in page and "<script" not in page
    if layout != "imagefolder":
        assert run(["scan", str(written), "--detector", "spectral-signatures", "--fit", "softmax", "--json"]) == 0
        searched = json.loads(capsys.readouterr().out)["detectors"][0]
        assert searched["tpr"] is not None and searched["auc"] is not None


def test_a_person_reads_what_came_of_it(tmp_path, capsys):
    train, _ = saved(tmp_path)
    assert run(["poison", "label-flip", "--data", train, "--fit", "softmax", "-o", "rate=0.2"]) == 0
    said = capsys.readouterr().out
    for part in ("Label flipping", "19 images", "clean accuracy", "of the clean twin", "errors", "distance to the"):
        assert part in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["badnetz"], "badnets"),
        (["pgd"], "besiege attack pgd"),
        (["badnets", "-o", "rates=1"], "did you mean 'rate'"),
        (["badnets", "--rates", "0.1,x"], "'x'"),
        (["badnets", "-o", "rate=2"], "rate"),
        (["badnets", "--fit", "cnnn"], "cnn"),
        (["badnets", "--data", "nothing.npz"], "nothing.npz"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, words, said):
    assert run(["poison", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
