"""What inference learns where the answer is known: Gaussians, linear models, their optima; and the command."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from besiege.attacks.inference.membership_inference import confidence, likelihood_ratio
from besiege.attacks.inference.model_inversion import _bell, _rolled, _roughness_slope
from besiege.cli import run
from besiege.cli.infer import _through
from besiege.core.errors import BadInput
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.lens import Votes
from besiege.core.meter import Meter
from besiege.core.method import Attack, configured, method
from besiege.core.reference import Reference
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal
from besiege.embedded.linear import optimum
from besiege.engine import roc
from besiege.engine.inference import Through, infer_membership, invert, reconstruct
from besiege.report.roc import svg

SHAPE = (1, 6, 6)
BIG = Fit(
    lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, classes)),
    "big",
    epochs=40,
    batch=16,
    lr=0.2,
    decay=0.0,
)
"""Learns any labels by heart."""


def make(name: str, **options: object) -> Attack:
    return configured(method(name), **options)


def noise(n: int, seed: int = 0, classes: int = 3) -> Images:
    """Images and labels that have nothing to do with each other: what is known of them was learned by heart."""
    draw = torch.Generator().manual_seed(seed)
    return Images.of(torch.rand(n, *SHAPE, generator=draw), torch.randint(0, classes, (n,), generator=draw))


def blobs(n: int, seed: int = 0) -> Images:
    """Three classes, a bright third of the image each, as bright as drawn for each image."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.02 * torch.rand(n, *SHAPE, generator=draw)
    bright = 0.3 + 0.6 * torch.rand(n, generator=draw)
    for label in range(3):
        rows = (y == label).nonzero().squeeze(1)
        x[rows, :, 2 * label : 2 * label + 2] += bright[rows, None, None, None]
    return Images.of(x.clamp(0, 1), y)


def linear(weights: Tensor, bias: Tensor | None = None, shape: tuple[int, int, int] = SHAPE) -> Target:
    """A target whose scores are ``weights @ x + bias``."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(weights.shape[1], len(weights), dtype=weights.dtype))
    with torch.no_grad():
        module[1].weight.copy_(weights)
        module[1].bias.copy_(torch.zeros(len(weights)) if bias is None else bias)
    return Target.of(module.eval(), classes=len(weights), shape=shape)


@pytest.mark.parametrize("digits", [1, 6])
def test_the_curve_and_its_area_are_those_of_sklearn(digits):
    draw = np.random.default_rng(0)
    members, others = (np.round(draw.normal(shift, 1, n), digits) for shift, n in ((0.5, 300), (0.0, 400)))
    truth, scores = np.r_[np.ones(300), np.zeros(400)], np.r_[members, others]
    false, true = roc.curve(torch.tensor(members), torch.tensor(others))
    expected = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(false, expected[0])
    assert np.allclose(true, expected[1])
    area, (low, high) = roc.auc(torch.tensor(members), torch.tensor(others))
    assert area == pytest.approx(roc_auc_score(truth, scores))
    assert low < area < high
    for rate in (0.0, 0.001, 0.01, 0.5):
        assert roc.at(false, true, rate) == pytest.approx(expected[1][expected[0] <= rate].max())
    assert roc.balanced_accuracy(false, true) == pytest.approx(((expected[1] + 1 - expected[0]) / 2).max())
    points = roc.thinned(false, true)
    assert points[0][0] == 0
    assert points[-1] == (1.0, 1.0)
    assert all(roc.at(false, true, rate) == share for rate, share in points)


def test_the_picture_has_a_decade_in_the_same_space_everywhere():
    drawn = ElementTree.fromstring(svg([(0.0, 0.001), (0.01, 0.1), (1.0, 1.0)]))
    (line,) = drawn.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert points == [(44, 44 + 240), (44 + 160, 44 + 80), (44 + 320, 44)]


def test_the_interval_of_the_area_covers_the_truth_as_often_as_it_says():
    draw, truth = torch.Generator().manual_seed(0), norm.cdf(0.8 / math.sqrt(2))
    covered = 0
    for _ in range(400):
        low, high = roc.auc(torch.randn(60, generator=draw) + 0.8, torch.randn(90, generator=draw))[1]
        covered += low <= truth <= high
    assert 0.91 < covered / 400 < 0.98


def test_the_loss_threshold_tells_two_gaussians_apart_as_far_as_they_are():
    """The target's confidence in an image is its one pixel, drawn around 0.6 for members and 0.5 for others."""
    n, spread, gap = 4000, 0.1, 0.1
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2 * n, 1, 1, 1, generator=draw).clamp(-3.9, 3.9) * spread + 0.5
    x[:n] += gap
    images = Images(x, torch.zeros(2 * n, dtype=torch.int64), torch.arange(2 * n))
    target = linear(torch.tensor([[1.0], [0.0]]), shape=(1, 1, 1))
    _, record = infer_membership(
        make("membership-inference", mode="loss"), target, images[:n], images[n:], Reference((1, 1, 1))
    )
    truth = norm.cdf(gap / spread / math.sqrt(2))
    assert record.auc == pytest.approx(truth, abs=0.02)
    assert record.auc_interval[0] < truth < record.auc_interval[1]
    for rate in ("0.001", "0.01"):
        low, high = record.tpr_at_fpr_interval[rate]
        expected = norm.cdf(gap / spread - norm.isf(float(rate)))
        assert record.tpr_at_fpr[rate] == pytest.approx(expected, rel=0.5)
        assert low < record.tpr_at_fpr[rate] < high
    assert record.balanced_accuracy == pytest.approx(norm.cdf(gap / spread / 2), abs=0.02)
    assert (record.queries, record.backward, record.unseen) == (2 * n, 0, None)


def test_confidences_are_the_logits_of_probabilities_and_stay_finite():
    draw = torch.Generator().manual_seed(0)
    scores, y = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    p = scores.softmax(-1)[:, torch.arange(5), y]
    assert torch.allclose(confidence(scores, y), (p / (1 - p)).log())
    assert confidence(torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(200 - math.log(2))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_the_likelihood_ratio_is_that_of_the_fitted_gaussians(online, each):
    draw = np.random.default_rng(3)
    said, shadow = draw.normal(size=(2, 5)), draw.normal(size=(8, 2, 5))
    inside = np.array([draw.permutation(8) < 4 for _ in range(5)]).T
    shadow += 2.0 * inside[:, None]

    def spread(which: np.ndarray, view: int, image: int) -> float:
        if each:
            return float(np.std(shadow[which[:, image], view, image], ddof=1))
        groups = [shadow[which[:, k], view, k] for k in range(5)]
        return math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / sum(len(g) - 1 for g in groups))

    expected = np.zeros(5)
    for k in range(5):
        for v in range(2):
            outer = norm(shadow[~inside[:, k], v, k].mean(), spread(~inside, v, k))
            inner = norm(shadow[inside[:, k], v, k].mean(), spread(inside, v, k))
            value = said[v, k]
            if online:
                expected[k] += (inner.logpdf(value) - outer.logpdf(value)) / 2
            else:
                expected[k] += norm.ppf(outer.cdf(value)) / 2
    found = likelihood_ratio(*map(torch.tensor, (said, shadow, inside)), online=online, each=each)
    assert np.allclose(found, expected)


@pytest.mark.parametrize("mode", ["lira", "lira-offline", "rmia", "shadow", "loss"])
def test_who_learned_by_heart_is_found_out_and_who_never_saw_them_is_not(mode, tmp_path):
    members, others = noise(60, 1), noise(60, 2)
    victim = BIG(members, 5, classes=3)
    knows = Reference(SHAPE, fit=BIG, folder=tmp_path)
    attack = make("membership-inference", mode=mode, shadows=6)
    scores, record = infer_membership(attack, victim, members, others, knows)
    assert scores.shape == (120,)
    assert record.auc > {"shadow": 0.75, "loss": 0.85}.get(mode, 0.9)
    assert record.unseen is not None
    low, high = record.unseen.auc_interval
    assert low < 0.5 < high
    assert record.queries == 120


def test_every_image_is_in_half_of_the_shadow_models_and_the_population_too():
    counts: dict[float, int] = {}

    def watch(module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        for image in x:
            counts[float(image.sum())] = counts.get(float(image.sum()), 0) + 1
        return module(x).square().mean()

    images, fit = noise(20), replace(BIG, epochs=1, loss=watch)
    knows = Reference(SHAPE, images=noise(9, 4), fit=fit)
    target = linear(torch.ones(3, 36))
    meter = Meter(target, images.x, Goal(images.y), Ball(INF, INF), seeks="optimum")
    make("membership-inference", shadows=6).bound()(meter, images, knows, Rng.of(0, images.index, "m"))
    assert sorted(counts.values()) == [3] * 29
    assert meter.forward.eq(1).all()


def test_where_the_fit_mirrors_images_so_do_the_questions():
    images = noise(8)
    meter = Meter(linear(torch.ones(3, 36)), images.x, Goal(images.y), Ball(INF, INF), seeks="optimum")
    knows = Reference(SHAPE, fit=replace(BIG, epochs=1, flip=True))
    make("membership-inference", shadows=4).bound()(meter, images, knows, Rng.of(0, images.index, "m"))
    assert meter.forward.eq(2).all()


def test_shadow_models_that_are_there_are_not_trained_again(tmp_path):
    images, target = noise(20), linear(torch.ones(3, 36))

    def asked(fit: Fit, seed: int = 0) -> Tensor:
        meter = Meter(target, images.x, Goal(images.y), Ball(INF, INF), seeks="optimum")
        knows = Reference(SHAPE, fit=fit, folder=tmp_path)
        return make("membership-inference", shadows=4).bound()(meter, images, knows, Rng.of(seed, images.index, "m"))

    def never(module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        raise AssertionError("it was trained again")

    fit = replace(BIG, epochs=2)
    first = asked(fit)
    assert torch.equal(asked(replace(fit, loss=never)), first)
    with pytest.raises(AssertionError):
        asked(replace(fit, loss=never), seed=1)
    with pytest.raises(AssertionError):
        asked(replace(fit, loss=never, lr=0.1))


def test_too_few_shadows_or_no_recipe_are_refused():
    members = noise(10)
    for options, fit, word in (({"shadows": 3}, BIG, "shadows"), ({}, None, "recipe")):
        with pytest.raises(BadInput, match=word):
            infer_membership(
                make("membership-inference", **options),
                linear(torch.ones(3, 36)),
                members,
                noise(10, 1),
                Reference(SHAPE, fit=fit),
            )


def inverted(target: Target, classes: Tensor, through: Through | None = None, **options: object) -> Tensor:
    evaluator, judged = linear(torch.ones(target.classes, 36)), noise(4, classes=2)
    return invert(make("model-inversion", **options), target, classes, evaluator, judged, None, lens=through)[0]


def test_the_inversion_of_a_linear_model_ends_in_the_corner_of_the_box_that_is_best():
    weights = torch.randn(2, 36, generator=torch.Generator().manual_seed(0)) / 20
    found = inverted(linear(weights), torch.arange(2), prior="none", lr=20, enough=1.0, steps=600)
    best = (weights[0] > weights[1]).float().view(SHAPE)
    assert torch.equal(found[0], best)
    assert torch.equal(found[1], 1 - best)


def test_with_the_prior_it_is_the_best_corner_of_the_smoothed_weights():
    weights = torch.randn(2, 36, generator=torch.Generator().manual_seed(0)) / 20
    found = inverted(linear(weights), torch.tensor([0]), stride=1.0, variation=0, brightness=0, shake=0)
    gap = (weights[0] - weights[1]).view(1, *SHAPE)
    smoothed = torch.nn.functional.conv2d(gap, _bell(gap), padding="same")
    assert torch.equal(found, (smoothed > 0).float())
    rough = inverted(linear(weights), torch.tensor([0]), variation=100.0, brightness=0, shake=0)
    assert _roughness(rough) < 0.5 * _roughness(found)
    dark = inverted(linear(weights), torch.tensor([0]), variation=0, brightness=3.0, shake=0)
    assert dark.mean() < 0.5 * found.mean()


def test_one_class_alone_is_what_it_is_among_others():
    target = BIG(noise(40), 1, classes=3)
    for prior in ("none", "smooth"):
        every = inverted(target, torch.arange(3), prior=prior, steps=30)
        alone = inverted(target, torch.tensor([2]), prior=prior, steps=30)
        assert torch.allclose(every[2], alone[0], atol=1e-5)


@dataclass
class Told:
    """An oracle whose costs are given beforehand; it counts how often each image is asked about."""

    costs: list[list[float]]

    def __post_init__(self) -> None:
        self.asked = [0] * len(self.costs)
        self.seen: list[list[Tensor]] = [[] for _ in self.costs]

    def toward(self, classes: Tensor) -> Told:
        return self

    def gradient(self, x: Tensor, loss: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert loss == "probability"
        values = []
        for image, row in zip(x, rows.tolist(), strict=True):
            values.append(self.costs[row][self.asked[row]])
            self.asked[row] += 1
            self.seen[row].append(image.clone())
        return torch.tensor(values), -torch.ones_like(x)


def test_an_image_stops_as_the_paper_says_and_is_the_best_that_it_was():
    falling = [0.9 - 0.01 * k for k in range(40)]
    oracle = Told(
        [
            [0.9, 0.5, 0.3, 0.009, *[0.5] * 40],
            [0.9, 0.5, 0.5, 0.5, 0.5, *[0.4] * 40],
            [0.9, 0.2, 0.4, 0.6, 0.5, 0.59, 0.7, 0.1, *[0.1] * 40],
            falling,
        ]
    )
    attack = make("model-inversion", prior="none", steps=30, patience=3, lr=0.01)
    made = attack.bound()(oracle, torch.arange(4), Reference((1, 2, 2)), Rng.of(0, torch.arange(4), "m"))
    assert oracle.asked == [4, 5, 7, 30]
    for row, best in enumerate((3, 1, 1, 29)):
        assert torch.equal(made[row], oracle.seen[row][best])


def _roughness(x: Tensor) -> float:
    return float(sum(x.diff(dim=dim).square().mean() for dim in (2, 3)))


def test_the_slope_of_the_roughness_is_that_of_autograd():
    leaf = torch.rand(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(sum(leaf.diff(dim=dim).square().mean() for dim in (2, 3)), leaf)
    assert torch.allclose(_roughness_slope(leaf.detach()), expected)


def test_each_image_is_rolled_by_its_own_draw():
    x = torch.rand(3, 2, 5, 4)
    down, right = torch.tensor([1, -2, 0]), torch.tensor([3, 0, -1])
    moved = _rolled(x, down, right)
    for k in range(3):
        assert torch.equal(moved[k], x[k].roll((int(down[k]), int(right[k])), (1, 2)))


def test_votes_slope_as_the_share_under_noise_does():
    """Labels of a linear model: the share of its class under noise is a normal distribution of the distance."""
    weights = torch.randn(1, 36, generator=torch.Generator().manual_seed(0))
    target = linear(torch.cat([weights, 0 * weights]), torch.tensor([-0.5 * float(weights.sum()) + 0.3, 0.0]))
    x = torch.full((1, *SHAPE), 0.5)
    meter = Meter(target, x, Goal(torch.tensor([0]), True), Ball(INF, INF), seeks="optimum", access=Access.LABELS)
    lens = Votes(meter, Rng.of(0, torch.arange(1), "v"), samples=20_000, sigma=0.1)
    value, slope = lens.gradient(x)
    length = float(weights.norm())
    assert float(value) == pytest.approx(1 - norm.cdf(0.3 / (0.1 * length)), abs=0.02)
    expected = -weights[0] / (0.1 * length) * norm.pdf(0.3 / (0.1 * length))
    assert torch.cosine_similarity(slope.flatten(), expected, 0) > 0.97
    assert float(slope.norm() / expected.norm()) == pytest.approx(1, abs=0.1)
    assert int(meter.forward[0]) == 20_000


@pytest.mark.parametrize("lens", ["nes", "votes"])
def test_inversion_through_a_lens_asks_for_no_gradient(lens):
    training = blobs(60)
    target = optimum(training, classes=3, decay=0.001).granting(_through(lens).access)
    target = replace(target, dtype=torch.float64)
    made, record = invert(
        make("model-inversion", steps=40, shake=0),
        target,
        torch.arange(3),
        target,
        training,
        training,
        lens=_through(lens),
    )
    assert record.recognized == 3
    assert record.backward == 0
    assert record.queries == 3 * 40 * (51 if lens == "nes" else 200)
    nearest = torch.cdist(made.flatten(1), training.x.flatten(1)).gather(1, torch.arange(60)[None].expand(3, -1))
    for row in record.classes:
        own = nearest[row.label][training.y == row.label]
        assert row.distance_to_nearest == pytest.approx(float(own.min()), rel=1e-4)
        mean = training.x[training.y == row.label].mean(0)
        assert row.distance_to_mean == pytest.approx(float((made[row.label] - mean).norm()), rel=1e-4)


@pytest.mark.parametrize("link", ["softmax", "identity"])
def test_an_informed_adversary_finds_the_training_row_that_it_lacks(link):
    rows = noise(30)
    target = optimum(rows, classes=3, link=link, decay=0.05)
    found, record = reconstruct(make("reconstruction", mode="informed", link=link), target, rows, Reference(SHAPE))
    assert record.label_accuracy == 1
    assert record.relative_error_max < 0.05
    assert torch.allclose(found.x.float(), rows.x, atol=1e-3)
    assert torch.equal(found.y, rows.y)
    assert record.ratio < 1e-3
    told, _ = reconstruct(
        make("reconstruction", mode="informed", link=link, decay=0.05), target, rows, Reference(SHAPE)
    )
    assert torch.allclose(told.x, found.x, atol=1e-5)
    wrong, _ = reconstruct(
        make("reconstruction", mode="informed", link=link, decay=0.5), target, rows, Reference(SHAPE)
    )
    assert not torch.allclose(wrong.x, found.x, atol=1e-2)


def test_the_optimum_is_one():
    rows = noise(30)
    x, truth = rows.x.flatten(1).double(), torch.eye(3, dtype=torch.float64)[rows.y]
    for link in ("softmax", "identity"):
        layer = optimum(rows, classes=3, link=link, decay=0.05).module[1]
        scores = layer(x)
        residual = (scores.softmax(1) if link == "softmax" else scores) - truth
        assert float(residual.sum(0).abs().max()) < 1e-6
        assert float((residual.T @ x / 30 + 0.05 * layer.weight).abs().max()) < 1e-7


def test_an_informed_adversary_refuses_a_model_that_is_not_linear():
    rows = noise(20)
    with pytest.raises(BadInput, match="not linear"):
        reconstruct(make("reconstruction", mode="informed"), BIG(rows, classes=3), rows, Reference(SHAPE))


def test_a_decoder_tells_more_of_an_image_than_its_class():
    victim = optimum(blobs(60, 1), classes=3, decay=0.001)
    victim = replace(victim, dtype=torch.float64)
    ratios = []
    for top in (0, 1):
        attack = make("reconstruction", epochs=40, batch=32, top=top)
        found, record = reconstruct(attack, victim, blobs(60, 2), Reference(SHAPE, images=blobs(180, 3)))
        assert record.queries == 180
        assert record.mse == pytest.approx(float((found.x - blobs(60, 2).x).square().mean()), rel=1e-4)
        ratios.append(record.ratio)
    assert ratios[0] < 0.3
    assert ratios[0] < ratios[1] < 1.2


def test_what_the_decoder_learns_from_and_what_it_undoes_must_be_given():
    with pytest.raises(BadInput, match="answers of 3 scores"):
        reconstruct(make("reconstruction"), linear(torch.ones(3, 36)), noise(9), Reference(SHAPE))
    with pytest.raises(BadInput, match="given none"):
        make("reconstruction").bound()(None, torch.zeros(2, 3), Reference(SHAPE), Rng.of(0, torch.arange(2), "r"))


TINY = """
from torch import nn
from besiege.core.fit import Fit

def fit():
    def build(shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, classes))
    return Fit(build, "tiny", epochs=40, batch=16, lr=0.2)

def odd():
    return Fit(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), "odd")

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
"""

KNOWN = ["membership-inference", "tiny.py:net", "--members"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images and the recipe of a small network."""
    (tmp_path / "tiny.py").write_text(TINY)
    for name, images in {
        "noise": noise(80),
        "blobs": blobs(120),
        "members": noise(40, 1),
        "others": noise(40, 2),
        "ones": Images.of(noise(40).x, torch.ones(40, dtype=torch.int64)),
        "many": Images.of(noise(60, 3).x, torch.arange(60)),
    }.items():
        np.savez(tmp_path / f"{name}.npz", x=images.x.numpy(), y=images.y.numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


FIT = ["--fit", "tiny.py:fit", "--trust-code", "--json"]


def test_membership_on_a_model_of_the_commands_own(place, capsys):
    arguments = ["infer", "membership-inference", "--data", "noise.npz", "-o", "shadows=4", "--out", "out", *FIT]
    assert run(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["auc"] > 0.8
    assert set(said["tpr_at_fpr"]) == {"0.001", "0.01"}
    assert (said["members"], said["nonmembers"], said["queries"]) == (40, 40, 80)
    assert any("trained here on 40 images" in note for note in said["notes"])
    kept = load_file(place / "out" / "scores.safetensors")
    assert roc_auc_score(kept["member"], kept["scores"]) == pytest.approx(said["auc"])
    assert json.loads((place / "out" / "record.json").read_text()) == said
    assert ElementTree.parse(place / "out" / "roc.svg").getroot().tag.endswith("svg")
    assert len(list((place / "out" / "shadows").glob("*.pt"))) == 4 + 1
    assert run(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["auc"] == said["auc"]


def test_membership_of_a_target_whose_training_images_are_known(place, capsys):
    victim = BIG(noise(40, 1), 3, classes=3)
    torch.save(victim.module, place / "victim.pt")
    arguments = ["infer", "membership-inference", "victim.pt", "--members", "members.npz", "--nonmembers", "others.npz"]
    assert run([*arguments, "-o", "shadows=4", *FIT]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["auc"] > 0.8
    assert said["member_accuracy"] == 1
    assert said["unseen"]["nonmembers"] == 20
    assert run([*arguments, "-o", "mode=loss", "--trust-code"]) == 0
    assert "found at FPR 0.1%" in capsys.readouterr().out


def test_inversion_shows_every_class(place, capsys):
    arguments = ["infer", "model-inversion", "embedded:digits-softmax", "--fit", "softmax", "-n", "600", "--out", "out"]
    assert run([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recognized"] >= 8
    assert said["evaluator_accuracy"] > 0.8
    assert [row["label"] for row in said["classes"]] == list(range(10))
    assert sum(row["queries"] for row in said["classes"]) == said["queries"] == 3000
    assert len(list((place / "out" / "pictures").glob("class-*.png"))) == 10
    assert run([*arguments, "--lens", "votes", "-o", "steps=2"]) == 0
    assert "recognized" in capsys.readouterr().out


def test_reconstruction_of_what_was_asked_and_of_what_was_learned(place, capsys):
    arguments = ["infer", "reconstruction", "embedded:digits-softmax", "-o", "epochs=10", "-n", "300", "--out", "out"]
    assert run([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["queries"] == 300
    assert said["mse"] < said["mse_mean_image"]
    assert len(list((place / "out" / "pictures").glob("rebuilt-*.png"))) == 20
    assert run(["infer", "reconstruction", "-o", "mode=informed", "--data", "noise.npz", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["n"], said["label_accuracy"]) == (50, 1)
    assert said["relative_error_max"] < 0.05
    assert run(["infer", "reconstruction", "-o", "mode=informed", "--data", "noise.npz"]) == 0
    assert "relative error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["membership-inference", "embedded:digits-cnn"], "--members"),
        (["membership-inference", "--members", "members.npz"], "go together"),
        (["membership-inference", "--lens", "nes"], "--lens"),
        (["model-inversion", "--lens", "eot"], "votes"),
        (["model-inversion", "--members", "members.npz"], "--members"),
        (["reconstruction", "embedded:digits-cnn", "-o", "mode=informed"], "--members"),
        (["pgd"], "besiege attack pgd"),
        (["model-inversion", "-o", "prior=rough"], "prior"),
        ([*KNOWN, "others.npz", "--nonmembers", "others.npz"], "40 of the 40 non-members are members too"),
        ([*KNOWN, "members.npz", "--nonmembers", "others.npz", "-n", "5"], "5 members and 5 non-members are too few"),
        ([*KNOWN, "members.npz", "--nonmembers", "others.npz", "--fit", "small-cnn"], "does not suit images of 1x6x6"),
        ([*KNOWN, "members.npz", "--nonmembers", "others.npz", "--fit", "tiny.py:odd"], "with shape (2, 5); expected"),
        ([*KNOWN, "members.npz", "--nonmembers", "others.npz", "--data", "many.npz"], "label 59 is out of range"),
        ([*KNOWN, "members.npz", "--nonmembers", "others.npz", "--out", "tiny.py/deep"], "tiny.py is a file"),
        (["membership-inference", "--test", "others.npz"], "leave --test out"),
        (["membership-inference", "--data", "ones.npz"], "all images are of class 1"),
        (["membership-inference", "--data", "noise.npz", "--device", "cuda:99"], "is not to be had"),
        (["model-inversion", "tiny.py:net", "--data", "ones.npz"], "all images are of class 1"),
        (["model-inversion", "tiny.py:net", "--data", "noise.npz", "--fit", "small-cnn"], "does not suit images of"),
        (["reconstruction", "--members", "members.npz"], "mode=informed alone"),
        (["reconstruction", "-o", "mode=informed", "--data", "ones.npz"], "all images are of class 1"),
        (["reconstruction", "tiny.py:net", "--data", "noise.npz", "-o", "epochs=0"], "epochs must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(place, capsys, arguments, word):
    assert run(["infer", *arguments, "--trust-code"]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
