from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers, table
from benchmarks.cases import CASES, CLAIMS, MODEL_BOUND, Case, Result, overhead
from besiege.bench import measure
from besiege.bench.measure import (
    Call,
    Contender,
    Failure,
    Figures,
    Recorder,
    best_floor,
    contender,
    fallen,
    race,
    replay,
)
from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST", 0.0)


class Linear(nn.Module):
    """Class 1 where the pixels sum to more than half of what they can, else class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight - 2
        return torch.stack([-score, score], 1)


def pixels(*values: float) -> Images:
    x = torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return Images.of(x, (x.flatten(1).sum(1) > 2).long())


def calls_of(recorder: Recorder) -> list[tuple[int, int]]:
    return [(call.rows, call.columns) for call in recorder.calls]


def test_a_recorder_counts_rows_and_backward_passes_and_changes_nothing() -> None:
    images, net = pixels(0.1, 0.7, 0.9), Linear()
    recorder = Recorder(net)
    leaf = images.x.clone().requires_grad_()
    scores = recorder(leaf)
    assert torch.equal(scores, net(images.x))
    (grad,) = torch.autograd.grad(scores[:, 0].sum(), leaf, retain_graph=True)
    assert torch.equal(grad, -torch.ones_like(images.x))
    torch.autograd.grad(scores[:, 1].sum(), leaf)
    with torch.no_grad():
        recorder(leaf[:2])
    copy.deepcopy(recorder)(images.x[:1])
    assert calls_of(recorder) == [(3, 2), (2, 0), (1, 0)]


def test_the_floor_makes_the_same_calls_for_the_input_gradient_alone() -> None:
    net = Linear()
    book = Recorder(net)
    replay([Call(book, 5, 0), Call(book, 2, 3), Call(book, 4, 1)], pixels(0.1, 0.7).x)
    assert calls_of(book) == [(5, 0), (2, 3), (4, 1)]
    assert net.weight.requires_grad and net.weight.grad is None


def test_a_race_counts_every_pass_that_the_attack_makes() -> None:
    net, images = Linear(), pixels(0.1, 0.45, 0.55, 0.9)
    target = Target.of(net, classes=2, shape=images.shape)
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, 0.1))
    outcome = evade(make("pgd", steps=5), target, images, threat)
    found = race({"pgd": contender(make("pgd", steps=5), target, threat)}, net, images, threat.ball, repeat=1)["pgd"]
    assert isinstance(found, Figures)
    assert found.backward == outcome.backward.double().mean()
    assert found.forward == 1 + outcome.forward.double().mean()  # the clean pass
    assert found.robust_accuracy == 0.5


def test_what_fell_is_measured_afresh() -> None:
    images = pixels(0.4, 0.4, 0.4, 0.4, 0.4)
    adv = images.x.clone()
    adv[0] += 0.2  # crosses
    adv[1] += 0.3  # too far
    adv[2] += 0.05  # does not cross
    adv[3] = torch.nan
    adv[4] = torch.tensor([1.2, 0.4, 0.4, 0.4]).reshape(1, 2, 2)  # once clamped, 0.6 away and across
    assert torch.allclose(
        fallen(Linear(), images, adv, Ball(INF, 0.2)), torch.tensor([0.2, INF, INF, INF, INF]).double()
    )
    far = fallen(Linear(), images, adv, Ball(2, INF))
    assert torch.allclose(far, torch.tensor([0.4, 0.6, INF, INF, 0.6]).double())


def test_time_over_floor_is_what_the_attack_adds_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "process_time", lambda: now)

    class Slow(Linear):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal now
            now += 3 + len(x)
            return super().forward(x)

    def attack(module: nn.Module, images: Images, seed: int) -> Tensor:
        nonlocal now
        module(images.x)
        module(images.x[:2])
        now += 6
        return images.x

    found = race({"it": attack}, Slow(), pixels(*[0.1] * 10), Ball(INF, 0.1), repeat=2)["it"]
    assert isinstance(found, Figures)
    assert found.floor_ms == pytest.approx(1000 * 18 / 10)
    assert found.given_ms == pytest.approx(1000 * 18 / 10)
    assert found.cpu_ms == pytest.approx(1000 * 24 / 10)
    assert found.overhead == pytest.approx(24 / 18)
    assert found.best_batch == 256
    assert found.best_floor_ms == pytest.approx(1000 * 12 * (259 / 256) / 10)
    assert found.median_distance is None


def test_no_call_has_no_floor() -> None:
    assert best_floor([], pixels(0.1).x) == (0.0, 0)


def test_contenders_take_turns_and_a_failure_stops_only_itself() -> None:
    order: list[str] = []

    def attack(name: str) -> Contender:
        def run(module: nn.Module, images: Images, seed: int) -> Tensor:
            if len(images) > 2:
                order.append(name)
            if name == "broken":
                raise RuntimeError("no such luck")
            module(images.x)
            return images.x + 0.1 * (1 + seed)

        return run

    images = pixels(0.45, 0.45, 0.45)
    names = {name: attack(name) for name in ("one", "broken", "two")}
    found = race(names, Linear(), images, Ball(INF, INF), repeat=2, seeds=(0, 2))
    assert order == ["one", "two", "one", "two"]
    assert found["broken"] == Failure("RuntimeError: no such luck")
    one = found["one"]
    assert isinstance(one, Figures)
    assert one.mean_distance == pytest.approx(0.2)  # over both seeds
    with pytest.raises(BadInput, match="at least 1 lap"):
        race(names, Linear(), images, Ball(INF, INF), repeat=0)


def figures(**changed: float) -> Figures:
    usual = dict.fromkeys(Figures.__dataclass_fields__, 1.0)
    return Figures(**{**usual, "images": 2, "best_batch": 8, **changed})


def test_the_page_says_of_every_bar_whether_it_was_met() -> None:
    fast = figures(cpu_ms=14.0, robust_accuracy=0.2, overhead=1.05)
    slow = figures(cpu_ms=90.0, robust_accuracy=0.1)
    case = next(case for case in CASES if case.name == "pgd")
    page = table.render([Result(case, {"besiege": fast, "foolbox": slow, "ART": Failure("a | b")})])
    assert "| pgd | CPU ms an image | 14 | 15 | met |" in page
    assert "| pgd | robust accuracy, against the best peer's | 0.2 | 0.1 | **missed** |" in page
    said = f"CPU time over the floor on the ResNet-20, median over {', '.join(MODEL_BOUND)}"
    assert f"| all | {said} | 1.05 | 1.1 | met |" in page
    said = f"CPU time over the floor on the digits CNNs, which take 0.05 ms an image, median over {MODEL_BOUND[0]}"
    assert f"| all | {said}" in page and page.count("| not measured: none of the attacks") == 9
    assert "| ART | does not run: a / b |" in page
    assert "pgd on B, linf:8/255; steps 40; 2 images" in page


def test_a_race_is_kept_and_replaces_what_it_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FIGURES", tmp_path / "figures.json")
    assert table.kept() == []
    pgd, bim = (next(case for case in CASES if case.name == name) for name in ("pgd", "bim"))
    table.keep(Result(pgd, {"besiege": figures(cpu_ms=9.0), "ART": Failure("no")}, {"date": "2026-01-01"}))
    table.keep(Result(bim, {"besiege": figures()}))
    table.keep(Result(pgd, {"besiege": figures(cpu_ms=7.0), "ART": Failure("no")}, {"date": "2026-01-02"}))
    first, second = table.kept()
    assert (first.case, second.case) == (bim, pgd)
    assert second.ours == figures(cpu_ms=7.0) and second.figures["ART"] == Failure("no")
    assert "date: 2026-01-02." in table.render([second])


def test_a_bar_without_its_peer_is_not_measured() -> None:
    case = next(case for case in CASES if case.name == "deepfool")
    page = table.render([Result(case, {"besiege": figures()})])
    assert "not measured: adv-lib has no figures for deepfool" in page


def test_the_best_peer_is_among_those_that_make_most_images_fall() -> None:
    weak, near, strong = (
        figures(mean_distance=0.1, robust_accuracy=0.5),
        figures(mean_distance=0.9, robust_accuracy=0.0),
        figures(mean_distance=1.0, robust_accuracy=0.0),
    )
    result = Result(Case("fmn", "A", "l2:inf"), {"a": weak, "b": strong, "c": near})
    assert result.best(lambda peer: peer.mean_distance) == 0.9


def test_every_claim_belongs_to_a_case_and_every_case_can_be_made() -> None:
    names = {name for case in CASES for name in (case.name, case.key, case.place)}
    assert {claim.name for claim in CLAIMS} <= names
    for case in CASES:
        assert case.attack.name == case.name
        assert (case.published is None) == (not case.paper)
        assert case.model.ball.norm in case.attack.card.norms


def test_the_whole_table_wants_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.Library, "installed", property(lambda library: library.module != "foolbox"))
    with pytest.raises(BadInput, match="needs all peers, but foolbox cannot be imported: run `make bench`"):
        table.table()
    with pytest.raises(BadInput, match="no benchmark of 'pdg'; did you mean 'pgd'"):
        table.table(["pdg"])


def test_a_peer_gets_of_the_options_what_it_takes() -> None:
    def attack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        return x + eps + torch.rand(()) * 0

    run = peers.contender(attack, {"eps": 0.25, "steps": 7})
    images = pixels(0.5)
    assert torch.equal(run(Linear(), images, 0), images.x + 0.25)


def test_the_overhead_is_the_median_on_a_network_and_of_two_races_the_larger_counts() -> None:
    ran = [
        Result(Case("fmn", "A", "l2:inf"), {"besiege": figures(images=50, overhead=1.5)}),
        Result(Case("fmn", "A", "l2:inf", alone=True), {"besiege": figures(images=100, overhead=1.1)}),
        Result(Case("ddn", "R", "l2:inf"), {"besiege": figures(overhead=1.2)}),
        Result(Case("pgd", "B", "linf:0.1"), {"besiege": figures(overhead=1.0)}),
        Result(Case("jsma", "A", "l0:inf"), {"besiege": figures(overhead=9.0)}),
    ]
    assert overhead(ran, "AR") == pytest.approx(1.15)
    assert overhead(ran, "B") == 1.0
    with pytest.raises(BadInput, match="none of the attacks"):
        overhead(ran[-1:], "A")
    assert str(ran[1].case) != str(ran[0].case)


def test_a_race_alone_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def contenders(name: str, options: object) -> dict[str, Contender]:
        asked.append(name)
        return {}

    monkeypatch.setattr(peers, "contenders", contenders)
    monkeypatch.setattr(table, "race", lambda contenders, *_, **__: {name: figures() for name in contenders})
    monkeypatch.setattr(
        table, "bench", lambda network, n: (Target.of(Linear(), classes=2, shape=(1, 2, 2)), pixels(0.1))
    )
    for alone in (True, False):
        found = table.measure(Case("fmn", "A", "l2:inf", alone=alone), 2, 1, "", lambda line: None)
        assert list(found.figures) == ["besiege"]
    assert asked == ["fmn"]
