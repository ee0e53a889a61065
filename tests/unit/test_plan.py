from __future__ import annotations

import pytest

from besiege.audit.plan import BUDGETS, SIEGE, customary, paced, passes, plan, threat_text
from besiege.core.errors import BadInput
from besiege.core.method import make, registry
from besiege.core.threat import INF, Access, Ball


def test_the_plan_of_a_budget_is_made_of_methods_and_options_that_exist() -> None:
    known = registry()
    for budget in BUDGETS:
        cells = plan(known, Access.WEIGHTS, customary((1, 28, 28)), budget).cells
        assert {cell.attack.name for cell in cells} == set(SIEGE) & set(known)


def test_what_does_not_apply_is_left_out_with_its_reason() -> None:
    made = plan(registry(), Access.WEIGHTS, [Ball(2, 0.5)], only=["pgd", "bim"])
    assert [str(cell) for cell in made.cells] == ["pgd l2:0.5"]
    assert made.left_out == (("bim", "l2:0.5", "bim works in linf"),)


def test_a_target_that_grants_labels_meets_no_gradient_attack() -> None:
    with pytest.raises(BadInput, match="pgd needs gradients, the target grants labels"):
        plan(registry(), Access.LABELS, [Ball(INF, 0.1)], only=["pgd"])


def test_an_attack_gets_the_access_that_it_needs_and_no_more() -> None:
    cells = plan(registry(), Access.WEIGHTS, [Ball(INF, 0.1)], "standard").cells
    assert all(cell.threat.access == cell.attack.card.access for cell in cells)


@pytest.mark.parametrize(
    ("shape", "threats"),
    [
        ((1, 28, 28), ["linf:0.1", "l2:1.5"]),
        ((3, 32, 32), ["linf:8/255", "l2:0.5"]),
        ((3, 224, 224), ["linf:4/255", "l2:3"]),
    ],
)
def test_radii_are_customary(shape: tuple[int, int, int], threats: list[str]) -> None:
    assert [threat_text(ball) for ball in customary(shape)] == threats


def test_costs_multiply_loops_and_images() -> None:
    assert passes(make("pgd", steps=7, restarts=3)) == 21
    (cell,) = plan(registry(), Access.WEIGHTS, [Ball(INF, 0.1)], only=["pgd"]).cells
    assert cell.passes(50) == 50 * 40


def test_a_schedule_ends_with_the_queries() -> None:
    square = registry()["square"].card
    assert paced(square, {}, 300) == {"iterations": 300}
    assert paced(square, {"iterations": 9}, 300) == {"iterations": 9}
    assert paced(registry()["pgd"].card, {}, 300) == {}
