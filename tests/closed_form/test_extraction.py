"""Extraction: networks rebuilt exactly, copies of separable targets, exact counts, failures that say so."""

from __future__ import annotations

import inspect
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from scipy.stats import shapiro
from torch import Tensor, nn

from besiege.attacks.extraction._pieces import Line
from besiege.attacks.extraction.copycat import copycat, kcentre, repeated, textures, uncertain
from besiege.attacks.extraction.functionally_equivalent import functionally_equivalent
from besiege.cli import run
from besiege.core.errors import BadInput, NotRebuilt
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import configured, make, of_kind
from besiege.core.rng import Stream
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.embedded.recipes import mlp, softmax
from besiege.engine.evasion import evade
from besiege.engine.extraction import extract, steal
from besiege.engine.prada import FEWEST, Prada
from besiege.targets import open_target

SHAPE = (1, 5, 5)
SOFTMAX = Fit(softmax, "softmax", epochs=20, lr=0.1)
EXACT = functionally_equivalent()


def dense(*widths: int, seed: int = 0) -> nn.Sequential:
    """A random network with ReLU in float64."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def target(net: nn.Module, classes: int = 4, shape: tuple[int, int, int] = SHAPE) -> Target:
    return Target.of(net, classes=classes, shape=shape, name="net")


def noise(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    return Images.of(torch.rand(n, *shape, generator=generator), torch.zeros(n, dtype=torch.int64))


class Counting(nn.Module):
    """A network that counts the images it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        said: Tensor = self.net(x)
        return said


@pytest.mark.parametrize(("hidden", "seed"), [(1, 0), (3, 1), (8, 2), (8, 3), (16, 4), (40, 5)])
def test_a_two_layer_network_is_rebuilt_everywhere(hidden: int, seed: int) -> None:
    net = dense(25, hidden, 4, seed=seed)
    stolen = extract(EXACT, target(net), noise(20), SOFTMAX, seed=seed)
    assert [tuple(p.shape) for p in stolen.module.parameters()] == [(hidden, 25), (hidden,), (4, hidden), (4,)]
    x = 10 * torch.randn(2000, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = net(x), stolen.module(x)
    assert float((theirs - ours).abs().max() / theirs.std()) < 1e-6
    assert stolen.queries < 500 + 28 * (hidden + 1) + 100 * hidden


@pytest.mark.parametrize(("widths", "seed"), [((8, 4), 0), ((10, 8), 1), ((12, 20), 2)])
def test_two_hidden_layers_are_rebuilt_too(widths: tuple[int, int], seed: int) -> None:
    net = dense(25, *widths, 5, seed=seed)
    stolen = extract(EXACT, target(net, 5), noise(20), SOFTMAX, seed=seed)
    assert [layer.out_features for layer in stolen.module if isinstance(layer, nn.Linear)] == [*widths, 5]
    x = 10 * torch.randn(2000, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = net(x), stolen.module(x)
    assert float((theirs - ours).abs().max() / theirs.std()) < 1e-6


def test_three_hidden_layers_are_a_failure_not_a_network() -> None:
    with pytest.raises(NotRebuilt, match="third hidden layer"):
        extract(functionally_equivalent(lines=2), target(dense(25, 8, 6, 6, 4)), noise(20), SOFTMAX)


def test_its_rows_are_the_networks_up_to_scale() -> None:
    net = dense(25, 6, 4, seed=7)
    module = extract(EXACT, target(net), noise(20), SOFTMAX).module
    (theirs, bias), (ours, own) = ((m[1].weight.detach(), m[1].bias.detach()) for m in (net, module))
    match = (ours @ (theirs / theirs.norm(dim=1, keepdim=True)).T).max(1)
    assert match.indices.sort().values.tolist() == list(range(6))
    assert torch.allclose(match.values, torch.ones(6, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(own, (bias / theirs.norm(dim=1))[match.indices], atol=1e-8)


def test_a_linear_model_is_rebuilt_as_one() -> None:
    net = dense(25, 4)
    stolen = extract(EXACT, target(net), noise(20), SOFTMAX)
    (linear,) = (layer for layer in stolen.module if isinstance(layer, nn.Linear))
    assert torch.allclose(linear.weight, net[1].weight, atol=1e-12)
    assert torch.allclose(linear.bias, net[1].bias, atol=1e-11)


def test_a_neuron_that_nothing_follows_leaves_no_trace() -> None:
    net = dense(25, 5, 4, seed=1)
    with torch.no_grad():
        net[3].weight[:, 2] = 0
    stolen = extract(EXACT, target(net), noise(20), SOFTMAX)
    assert stolen.module[1].out_features == 4
    x = noise(100, seed=5).x.double()
    assert torch.allclose(net(x), stolen.module(x), atol=1e-9)


def test_every_kink_of_a_line_is_found() -> None:
    net, d = dense(25, 30, 4, seed=3), 25
    weight, bias = net[1].weight.detach(), net[1].bias.detach()
    stream = Stream(5)
    origin, way = stream.rand(d).double(), stream.randn(d).double()
    with torch.no_grad():
        line = Line(lambda x: net(x.view(-1, *SHAPE)), origin, way)
        kinks = line.kinks(-line.reach(), line.reach())
    assert torch.allclose(kinks, (-(weight @ origin + bias) / (weight @ way)).sort().values, rtol=1e-7, atol=1e-9)


def test_what_is_counted_is_what_the_model_saw() -> None:
    for attack, net in ((EXACT, dense(25, 4, 4)), (copycat(queries=77), dense(25, 4, 4).float())):
        counting = Counting(net)
        assert extract(attack, target(counting), noise(90), SOFTMAX).queries == counting.images
    assert counting.images == 77


def test_a_float32_module_is_asked_in_float64_and_left_as_it_was() -> None:
    net = dense(25, 4, 4).float()
    stolen = extract(EXACT, target(net), noise(20), SOFTMAX)
    assert "float64" in " ".join(stolen.notes)
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in net.parameters())
    x = noise(100, seed=5).x
    assert torch.allclose(net(x), stolen.module(x.double()).float(), atol=1e-5)


def test_a_function_that_takes_float64_is_rebuilt() -> None:
    net = dense(25, 6, 4)
    victim = Target(lambda x: net(x).detach(), Access.SCORES, 4, SHAPE, "function")
    x = noise(100, seed=5).x.double()
    assert torch.allclose(net(x), extract(EXACT, victim, noise(20), SOFTMAX).module(x), atol=1e-9)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT])
def test_an_onnx_file_is_rebuilt_where_it_is_in_float64(kind: int, tmp_path: Path) -> None:
    net, dtype = dense(25, 6, 4), helper.tensor_dtype_to_np_dtype(kind)
    names = ("1.weight", "1.bias", "3.weight", "3.bias")
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", *names[:2]], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", *names[2:]], ["y"], transB=1),
    ]
    weights = [numpy_helper.from_array(net.state_dict()[name].numpy().astype(dtype), name) for name in names]
    ends = [helper.make_tensor_value_info(n, kind, s) for n, s in (("x", ["n", *SHAPE]), ("y", ["n", 4]))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    victim = open_target(str(path))
    if kind == TensorProto.FLOAT:
        with pytest.raises(NotRebuilt, match="rounded"):
            extract(EXACT, victim, noise(20), SOFTMAX)
        return
    x = noise(100, seed=5).x.double()
    assert torch.allclose(net(x), extract(EXACT, victim, noise(20), SOFTMAX).module(x), atol=1e-9)


class Rounded(nn.Module):
    """Float64 on the outside, float32 within."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.unused = net, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.net(x)
        return said.float().double()


def deep(x: Tensor) -> Tensor:
    return torch.tanh(x.flatten(1) @ torch.linspace(-1, 1, 100, dtype=torch.float64).view(25, 4))


@pytest.mark.parametrize(
    ("victim", "why"),
    [
        (target(Rounded(dense(25, 4, 4))), "rounded"),
        (target(nn.Sequential(dense(25, 4, 4), nn.LogSoftmax(1))), "not piecewise linear"),
        (target(nn.Sequential(dense(25, 4, 4), nn.Softmax(1))), "not piecewise linear"),
        (Target(deep, Access.SCORES, 4, SHAPE, "net", dtype=torch.float64), "not piecewise linear"),
        (Target(dense(25, 4, 4).float(), Access.SCORES, 4, SHAPE, "net"), "takes no images in float64"),
        (Target(lambda x: dense(25, 4, 4)(x).float(), Access.SCORES, 4, SHAPE, "net"), "rounded"),
        (target(dense(25, 4, 4)).granting(Access.LABELS), "labels alone"),
    ],
    ids=["rounded", "log-softmax", "softmax", "smooth", "float32", "float32 behind", "labels"],
)
def test_what_cannot_be_rebuilt_is_refused_in_a_sentence(victim: Target, why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        extract(EXACT, victim, noise(20), SOFTMAX)
    assert "\n" not in str(refused.value)


def test_too_few_queries_are_a_failure_not_a_network() -> None:
    for queries in (100, 250, 600):
        with pytest.raises(NotRebuilt, match=f"its {queries} queries were used up"):
            extract(functionally_equivalent(queries=queries), target(dense(25, 8, 4)), noise(20), SOFTMAX)


def test_a_network_that_is_something_else_is_never_returned() -> None:
    class Odd(nn.Module):
        """Two layers, but for a far corner."""

        def __init__(self) -> None:
            super().__init__()
            self.net = dense(25, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            said: Tensor = self.net(x) + 0.1 * (x.flatten(1).amax(1, keepdim=True) - 4).relu()
            return said

    with pytest.raises(NotRebuilt, match="functionally-equivalent failed"):
        extract(EXACT, target(Odd()), noise(20), SOFTMAX)


def test_a_measured_theft_says_how_close_it_is() -> None:
    net = dense(25, 6, 4)
    judged = noise(300, seed=9)
    judged = Images.of(judged.x, target(net).labels(judged.x))
    stolen, theft = steal(
        EXACT, target(net), noise(20), judged, SOFTMAX, probe=make("pgd", steps=5), ball=Ball(INF, 0.3)
    )
    assert (theft.accuracy, theft.target_accuracy, theft.agreement, theft.layers) == (1, 1, 1, [25, 6, 4])
    assert theft.max_difference is not None and theft.max_difference < 1e-8
    assert theft.queries == stolen.queries
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, 0.3))
    own = evade(make("pgd", steps=5), target(net), judged[:200], threat, clean=judged.y[:200])
    assert theft.transfer_success == pytest.approx(float(own.success.float().mean()), abs=0.03)


@pytest.fixture
def blobs() -> tuple[Target, Images]:
    """Three classes by which third of the pixels is brightest, and 300 unlabelled images."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 3, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        for k in range(3):
            net[1].weight[k, 9 * k : 9 * (k + 1)] = 1
    x = 0.5 * torch.rand(600, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    x[torch.arange(600), torch.arange(600) % 3] += 0.3
    return target(net, 3, (3, 3, 3)), Images.of(x, torch.zeros(600, dtype=torch.int64))


@pytest.mark.parametrize("sampling", ["random", "uncertainty", "kcentre"])
def test_copycat_learns_a_separable_target_from_labels(sampling: str, blobs: tuple[Target, Images]) -> None:
    victim, pool = blobs
    victim = victim.granting(Access.LABELS)
    judged = Images.of(pool.x[300:], victim.labels(pool.x[300:]))
    attack = copycat(queries=150, sampling=sampling)
    stolen, theft = steal(attack, victim, pool[:300], judged, SOFTMAX, seed=3)
    assert theft.queries == stolen.queries == 150
    assert theft.agreement > 0.95
    assert theft.max_difference is None


def test_copycat_never_looks_at_the_pools_labels(blobs: tuple[Target, Images]) -> None:
    victim, pool = blobs
    wrong = Images.of(pool.x[:100], torch.randint(0, 90, (100,), generator=torch.Generator().manual_seed(1)))
    first, second = (extract(copycat(queries=60), victim, p, SOFTMAX, seed=1) for p in (pool[:100], wrong))
    assert torch.equal(first.module[1].weight, second.module[1].weight)


def test_copycat_asks_no_more_than_there_is(blobs: tuple[Target, Images]) -> None:
    victim, pool = blobs
    assert extract(copycat(queries=500), victim, pool[:100], SOFTMAX).queries == 100
    assert extract(copycat(queries=120, pool="textures"), victim, pool[:10], SOFTMAX).queries == 120
    assert extract(copycat(queries=120, pool="both", sampling="kcentre"), victim, pool[:10], SOFTMAX).queries == 120


@pytest.mark.parametrize("name", list(of_kind("extraction")))
def test_an_extraction_says_what_it_is(name: str) -> None:
    card, function = of_kind("extraction")[name].card, of_kind("extraction")[name].function
    assert (function.__name__, function.__module__.split(".")[-1]) == (name.replace("-", "_"),) * 2
    assert card.family == "extraction" and card.summary.endswith(".") and len(card.summary) < 100
    supplied = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert len(supplied) == 4 and "queries" in card.options
    for key, option in card.options.items():
        assert json.loads(json.dumps(option.default)) == option.default
        for wrong in ([1], -1, "nonsense"):
            with pytest.raises(BadInput, match=key):
                configured(of_kind("extraction")[name], **{key: wrong})


def test_repeating_makes_classes_equally_common() -> None:
    labels = torch.tensor([2, 0, 0, 0, 0, 2, 0, 5])
    rows = repeated(labels, 10)
    assert torch.bincount(labels[rows], minlength=10).tolist() == [5, 0, 5, 0, 0, 5, 0, 0, 0, 0]
    assert set(rows.tolist()) == set(range(8))
    assert sorted(torch.bincount(rows, minlength=8)[[0, 5]].tolist()) == [2, 3]


def known() -> Target:
    """Two inputs through a layer that leaves them as they are."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(2))
        net[1].bias.zero_()
    return target(net, 2, (1, 1, 2))


def test_the_uncertain_lie_at_the_boundary() -> None:
    points = torch.tensor([[0.0, 1.0], [0.5, 0.55], [0.9, 0.1], [0.3, 0.3]]).view(4, 1, 1, 2)
    assert uncertain(known(), points, points[:0], 2).tolist() == [3, 1]


def test_centres_are_the_farthest_one_after_another() -> None:
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.random((40, 2)).astype(np.float32))
    seen = torch.from_numpy(rng.random((3, 2)).astype(np.float32))
    chosen: list[int] = []
    for _ in range(6):
        there = torch.cat([seen, points[chosen]])
        chosen.append(int((points[:, None] - there).norm(dim=2).amin(1).argmax()))
    found = kcentre(known(), points.view(-1, 1, 1, 2), seen.view(-1, 1, 1, 2), 6)
    assert found.tolist() == chosen


def test_textures_fill_the_range_and_differ() -> None:
    drawn = textures(60, (3, 12, 10), Stream(3))
    assert drawn.shape == (60, 3, 12, 10)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    assert torch.equal(drawn, textures(60, (3, 12, 10), Stream(3)))
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 60
    assert (drawn[1::2] == 0).any(1).flatten(1).float().mean(1).min() > 0.01
    assert (drawn.flatten(1).amax(1) > 0.5).float().mean() > 0.9


def test_the_monitor_lets_normal_distances_pass_and_catches_constructed_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    benign, thief = Prada(), Prada()
    points = torch.randn(600, 1, 10, 10, generator=generator)
    labels = torch.randint(0, 3, (600,), generator=generator)
    benign.see(points, labels)
    assert benign.seen == 600 and benign.tests > 0 and benign.alarms == 0 and benign.first is None
    steps = points[:200].repeat_interleave(3, 0)
    steps[1::3] += 1e-3
    steps[2::3] += 2e-3
    thief.see(steps, labels[:200].repeat_interleave(3))
    assert thief.rate is not None and thief.rate > 0.9
    assert thief.first is not None and FEWEST < thief.first < 200


def test_the_monitors_distances_are_those_of_the_paper_done_slowly() -> None:
    generator = torch.Generator().manual_seed(1)
    points, labels = torch.rand(150, 2, generator=generator), torch.randint(0, 2, (150,), generator=generator)
    groups: dict[int, list[Tensor]] = {}
    own: dict[int, list[float]] = {}
    least: dict[int, float] = {}
    distances: list[float] = []
    for point, label in zip(points, labels.tolist(), strict=True):
        if label not in groups:
            groups[label], own[label], least[label] = [point], [0.0], 0.0
            continue
        nearest = min(float((point - other).norm()) for other in groups[label])
        distances.append(nearest)
        if nearest > least[label]:
            groups[label].append(point)
            own[label].append(nearest)
            least[label] = max(least[label], float(np.mean(own[label]) - np.std(own[label])))
    monitor = Prada(every=1)
    monitor.see(points.view(-1, 1, 1, 2), labels)
    assert monitor.distances == pytest.approx(distances, abs=1e-6)
    kept = np.array(distances)
    kept = kept[abs(kept - kept.mean()) <= 3 * kept.std(ddof=1)]
    last = Prada(delta=float(shapiro(kept).statistic) + 1e-6, every=len(distances))
    last.see(points.view(-1, 1, 1, 2), labels)
    assert (last.tests, last.alarms) == (1, 1)


def test_steal_from_the_command_line_and_use_what_was_stolen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    net = mlp((1, 6, 6), 3, hidden=5)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "victim_steal.py").write_text(
        "from besiege.embedded.recipes import mlp\n\ndef net():\n    return mlp((1, 6, 6), 3, hidden=5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.rand(300, 1, 6, 6)
    np.savez(tmp_path / "pool.npz", x=x[:200].numpy(), y=np.arange(200))
    np.savez(tmp_path / "test.npz", x=x[200:].numpy(), y=net(x[200:]).argmax(1).numpy())
    shared = ["victim_steal:net", "--weights", "net.safetensors", "--data", "pool.npz", "--test", "test.npz", "--json"]
    assert run(["steal", "functionally-equivalent", *shared, "--out", "twin"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["agreement"], said["accuracy"], said["target_accuracy"]) == (1, 1, 1)
    assert said["max_difference"] < 1e-8 and said["queries"] > 100
    twin = open_target("stolen:twin")
    assert twin.shape == (1, 6, 6) and torch.allclose(twin.scores(x.double()).float(), net(x), atol=1e-5)

    assert run(["steal", "copycat", *shared, "--fit", "softmax", "--queries", "120", "--out", "copy"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["queries"] == 120 and said == json.loads((tmp_path / "copy" / "record.json").read_text())
    attack = ["attack", "pgd", *shared[:3], "--data", "test.npz", "--eps", "0.3", "-n", "20", "--json"]
    assert run([*attack, "--lens", "surrogate:stolen:copy"]) == 0
    through = json.loads(capsys.readouterr().out)
    assert through["backward_per_image"] == 0 and through["verified"]

    assert run(["steal", "copycat", *shared, "--queries", "9", "--fit", "nonsense"]) == 2
    assert "there is no training recipe 'nonsense'" in capsys.readouterr().err
    assert run(["attack", "pgd", "stolen:nowhere", "--data", "test.npz"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["pgd"], "besiege attack pgd"),
        (["copycat", "--fit", "small-cnn"], "--fit small-cnn does not suit images of 1x6x6"),
        (["copycat", "--out", "pool.npz"], "cannot write to pool.npz: pool.npz is a file"),
        (["copycat", "-o", "queries=0"], "queries must be at least 1"),
        (["copycat", "-o", "sampling=best"], "sampling must be one of random, uncertainty, kcentre"),
        (["copycat", "--test", "many.npz"], "the labels of many.npz go up to 39"),
        (["copycat", "--data", "nowhere"], "there is no such file or folder"),
        (["copycat", "--data", "empty"], "holds no folders, one for each class"),
        (["functionally-equivalent", "--queries", "10"], "its 10 queries were used up"),
        (["functionally-equivalent", "--device", "cuda:99"], "is not to be had"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "victim.py").write_text(
        "from besiege.embedded.recipes import mlp\n\ndef net():\n    return mlp((1, 6, 6), 3, hidden=5)\n"
    )
    for name, classes in (("pool", 3), ("many", 40)):
        np.savez(tmp_path / f"{name}.npz", x=torch.rand(40, 1, 6, 6).numpy(), y=np.arange(40) % classes)
    given = ["steal", arguments[0], "victim.py:net", "--data", "pool.npz", "--test", "pool.npz", "--trust-code"]
    assert run([*given, *arguments[1:]]) == 2
    said = capsys.readouterr().err.splitlines()
    assert why in said[-1]
    assert [line for line in said if not line.startswith("warning: ")] == said[-1:]


def test_who_judges_by_what_was_asked_about_is_told(blobs: tuple[Target, Images]) -> None:
    victim, pool = blobs
    apart, both = (
        steal(copycat(queries=40), victim, pool[:100], Images.of(x, victim.labels(x)), SOFTMAX)[1].notes
        for x in (pool.x[100:200], pool.x[70:170])
    )
    assert not apart
    assert both == ["30 of the 100 images that judge are among those that it may ask about"]
