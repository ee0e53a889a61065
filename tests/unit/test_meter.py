"""The oracle that counts."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from besiege.core.errors import AccessDenied
from besiege.core.meter import Meter
from besiege.core.oracle import Finished
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal


class Sum:
    """Three classes: 0, the sum of the pixels minus 1, and minus 9. Remembers every row that it computed."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def __call__(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1)
        self.seen.append([round(v, 4) for v in total.tolist()])
        return torch.stack([0 * total, total - 1, 0 * total - 9], 1)


def meter(n: int = 4, *, access: Access = Access.WEIGHTS, batch: int = 64, **other: object) -> tuple[Meter, Sum]:
    """Black images of two pixels: label 0, adversarial once their sum is above 1."""
    model = Sum()
    target = Target(model, access, 3, (1, 1, 2), batch=batch)
    goal = Goal(torch.zeros(n, dtype=torch.int64))
    return Meter(target, torch.zeros(n, 1, 1, 2), goal, Ball(2, INF), **other), model


def rows_of(*sums: float) -> Tensor:
    return torch.tensor(sums)[:, None, None, None].expand(-1, 1, 1, 2) / 2


def test_passes_are_counted_by_image():
    m, model = meter(3)
    m.loss(rows_of(0.1, 0.2, 0.3))
    m.scores(rows_of(0.1, 0.2), torch.tensor([1, 1]))
    m.gradient(rows_of(0.1, 0.2, 0.3), "margin")
    m.jacobian(rows_of(0.1), torch.tensor([[0, 2]]), torch.tensor([2]))
    m.labels(rows_of(0.4), torch.tensor([0]))
    assert m.forward.tolist() == [3, 4, 3]
    assert m.backward.tolist() == [1, 1, 3]
    assert m.sent == [(3, 0), (2, 0), (3, 1), (1, 2), (1, 0)]
    assert sum(len(call) for call in model.seen) == 10
    assert m.needed.tolist() == [-1] * 3


def test_answers_are_right():
    m, _ = meter(3)
    value, grad = m.gradient(rows_of(0.0, 0.4, 0.8), "margin")
    assert value.tolist() == pytest.approx([1, 0.6, 0.2])
    assert grad.flatten(1).tolist() == [[-1, -1]] * 3
    scores, slopes = m.jacobian(rows_of(0.0, 0.4, 0.8), torch.tensor([[0, 1], [1, 2], [1, 0]]))
    assert scores[:, 1].tolist() == pytest.approx([-1, -0.6, -0.2])
    assert slopes[:, :, 0, 0, 0].tolist() == [[0, 1], [1, 0], [1, 0]]
    assert m.classes == 3


def test_a_finished_row_is_never_computed_again():
    m, model = meter(3)
    assert m.is_adversarial(rows_of(0.5, 1.5, 0.5)).tolist() == [False, True, False]
    assert m.is_adversarial(rows_of(0.6, 0.7, 0.8)).tolist() == [False, True, False]
    assert m.loss(rows_of(0.6, 0.7, 0.8))[1] == INF
    value, grad = m.gradient(rows_of(0.1, 0.2, 0.3))
    assert value[1] == INF
    assert float(grad[1].abs().sum()) == 0
    assert m.scores(rows_of(0.1, 0.2, 0.3))[1].tolist() == [0, 0, 0]
    assert m.jacobian(rows_of(0.1, 0.2, 0.3), torch.ones(3, 2).long())[1][1].abs().sum() == 0
    assert model.seen == [[0.5, 1.5, 0.5], [0.6, 0.8], [0.6, 0.8], [0.1, 0.3], [0.1, 0.3], [0.1, 0.3]]
    assert m.forward.tolist() == [6, 1, 6]
    assert m.needed.tolist() == [-1, 1, -1]
    m.retire(torch.tensor([0]))
    m.is_adversarial(rows_of(1.1, 1.2, 1.3))
    with pytest.raises(Finished):
        m.is_adversarial(rows_of(0.1, 0.2, 0.3))
    assert m.found.tolist() == [False, True, True]


def test_an_image_whose_rows_are_all_done_does_not_end_the_others():
    m, model = meter(2)
    m.is_adversarial(rows_of(1.5), torch.tensor([0]))
    assert m.loss(rows_of(0.1, 0.2), rows=torch.tensor([0, 0])).tolist() == [INF, INF]
    assert len(model.seen) == 1


def test_a_call_is_cut_to_what_the_budget_leaves():
    m, model = meter(2, queries=3)
    rows = torch.tensor([0, 1, 0, 0, 0, 1])
    answers = m.loss(rows_of(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), rows=rows)
    assert model.seen == [[0.1, 0.2, 0.3, 0.4, 0.6]]
    assert answers.isinf().tolist() == [False, False, False, False, True, False]
    assert m.forward.tolist() == [3, 2]
    assert m.done.tolist() == [True, False]
    m.loss(rows_of(0.1, 0.1))
    assert m.forward.tolist() == [3, 3]
    with pytest.raises(Finished):
        m.loss(rows_of(0.1, 0.1))


def test_batches_are_as_large_as_the_target_likes():
    m, model = meter(7, batch=3)
    values = m.loss(rows_of(*(k / 10 for k in range(7))))
    assert [len(call) for call in model.seen] == [3, 3, 1]
    assert values.tolist() == pytest.approx([1 - k / 10 for k in range(7)])
    _, slopes = m.jacobian(rows_of(*(k / 10 for k in range(7))), torch.arange(7)[:, None] % 2)
    assert slopes[:, 0, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_the_nearest_success_is_kept():
    m, _ = meter(2, seeks="minimum")
    m.is_adversarial(rows_of(1.9, 1.2, 1.5, 1.2), torch.tensor([0, 0, 0, 1]))
    assert m.best[0].sum() == pytest.approx(1.2)
    assert m.distance.tolist() == pytest.approx([1.2 / 2**0.5] * 2)
    m.is_adversarial(rows_of(1.4, 1.1))
    assert m.best.flatten(1).sum(1).tolist() == pytest.approx([1.2, 1.1])
    assert m.needed.tolist() == [3, 1]
    m.is_adversarial(rows_of(0.5, 0.5))
    assert m.found.tolist() == [True, True]
    assert not bool(m.done.any())


def test_of_two_equally_near_the_first_is_kept():
    m, _ = meter(1, seeks="minimum")
    both = torch.tensor([[[[0.9, 0.3]]], [[[0.3, 0.9]]]])
    m.is_adversarial(both, torch.tensor([0, 0]))
    assert torch.equal(m.best, both[:1])


def test_what_lies_outside_the_ball_or_the_box_is_not_kept():
    model = Sum()
    target = Target(model, Access.WEIGHTS, 3, (1, 1, 2))
    goal = Goal(torch.zeros(1, dtype=torch.int64))
    for seeks in ("success", "minimum"):
        m = Meter(target, torch.zeros(1, 1, 1, 2), goal, Ball(INF, 0.6), seeks=seeks)
        assert m.is_adversarial(torch.tensor([[[[1.2, 0.0]]]])).tolist() == [True]
        assert m.found.tolist() == [False]
        m.is_adversarial(torch.tensor([[[[0.9, 0.2]]]]))
        assert m.found.tolist() == [seeks == "minimum"]
        m.is_adversarial(torch.tensor([[[[0.6, 0.5]]]]))
        assert m.distance.tolist() == pytest.approx([0.6])


def test_an_optimum_is_not_stopped_by_success_or_budget():
    m, model = meter(1, seeks="optimum", queries=10)
    m.loss(rows_of(1.5))
    m.loss(rows_of(1.6))
    assert len(model.seen) == 2
    assert m.found.tolist() == [True]
    assert m.done.tolist() == [False]


def test_time_that_has_passed_ends_it():
    m, model = meter(2, deadline=time.monotonic() - 1)
    with pytest.raises(Finished):
        m.loss(rows_of(0.1, 0.2))
    assert model.seen == []


def test_finished_rows_are_dropped_once_they_are_a_quarter():
    m, model = meter(8)
    state = torch.arange(8)
    m.is_adversarial(rows_of(1.5), torch.tensor([2]))
    (same,) = m.live(state)
    assert torch.equal(same, state)
    m.is_adversarial(rows_of(1.5), torch.tensor([5]))
    x, left = m.live(rows_of(*(k / 100 for k in range(8))), state)
    assert left.tolist() == [0, 1, 3, 4, 6, 7]
    m.loss(x)
    assert model.seen[-1] == [0.0, 0.01, 0.03, 0.04, 0.06, 0.07]
    m.is_adversarial(rows_of(1.5), torch.tensor([3]))  # the row that is image 4 now
    assert m.found.nonzero().squeeze(1).tolist() == [2, 4, 5]
    assert m.goal.labels.shape == (6,)
    m.retire(torch.arange(8))
    with pytest.raises(Finished):
        m.live(left)


def test_a_sub_goal_leads_and_the_outer_goal_decides():
    m, _ = meter(2)
    toward = m.toward(torch.tensor([2, 1]))
    value, grad = toward.gradient(rows_of(0.0, 0.0), "margin")
    assert value.tolist() == pytest.approx([9, 1])
    assert toward.goal.targeted
    assert not m.goal.targeted
    assert grad.flatten(1).tolist() == [[0, 0], [-1, -1]]
    assert toward.is_adversarial(rows_of(1.5, 0.5)).tolist() == [True, False]  # class 1, not the 2 aimed at
    assert m.done.tolist() == [True, False]
    assert m.forward.tolist() == [2, 2]


@pytest.mark.parametrize("access", list(Access))
def test_no_more_is_answered_than_is_granted(access):
    m, model = meter(1, access=access)
    x = rows_of(0.1)
    asks = [
        (Access.LABELS, lambda: m.is_adversarial(x)),
        (Access.LABELS, lambda: m.labels(x)),
        (Access.SCORES, lambda: m.loss(x)),
        (Access.SCORES, lambda: m.scores(x)),
        (Access.GRADIENTS, lambda: m.gradient(x)),
        (Access.GRADIENTS, lambda: m.jacobian(x, torch.zeros(1, 1).long())),
    ]
    for need, ask in asks:
        before = len(model.seen)
        if need <= access:
            ask()
            assert len(model.seen) == before + 1
        else:
            with pytest.raises(AccessDenied, match=f"asks for {need.name.lower()}"):
                ask()
            assert len(model.seen) == before


def test_an_oracle_may_be_narrower_than_its_target_never_wider():
    m, _ = meter(1, access=Access.WEIGHTS)
    narrow = Meter(m.target, m.x, m.outer, m.ball, access=Access.LABELS)
    assert narrow.access == Access.LABELS
    wide = Meter(m.target.granting(Access.LABELS), m.x, m.outer, m.ball, access=Access.WEIGHTS)
    assert wide.access == Access.LABELS


def test_progress_is_told_of_every_row():
    told: list[int] = []
    m, _ = meter(5, batch=2, progress=told.append)
    m.loss(rows_of(0.1, 0.2, 0.3, 0.4, 0.5))
    assert told == [2, 2, 1]
