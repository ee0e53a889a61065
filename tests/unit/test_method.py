"""Methods by name, their options, and what each is printed as."""

from __future__ import annotations

import pytest

from besiege.attacks.whitebox.pgd import pgd
from besiege.core.errors import BadInput
from besiege.core.method import Attack, make, method, registry


def test_a_method_is_found_by_name():
    assert method("pgd") is pgd
    assert registry()["pgd"] is pgd
    assert list(registry()) == sorted(registry())


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(BadInput, match="did you mean 'pgd'"):
        method("pdg")
    with pytest.raises(BadInput, match="list"):
        make("zzzzzz")


def test_an_attack_holds_every_argument_and_prints_those_that_differ():
    attack = pgd(steps=7, loss="dlr")
    assert isinstance(attack, Attack)
    assert attack.arguments == {"steps": 7, "stride": 2.5, "restarts": 1, "loss": "dlr"}
    assert str(attack) == "pgd(steps=7, loss='dlr')"
    assert attack == make("pgd", steps="7", loss="dlr")
    assert attack != pgd(steps=8, loss="dlr")
    assert len({attack, pgd(steps=7, loss="dlr"), pgd()}) == 2
    assert attack.name == "pgd"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stepz": 3}, "pgd has no option 'stepz'; did you mean 'steps'"),
        ({"qqqqq": 3}, "it has steps, stride, restarts, loss"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": -3}, "steps must not be negative"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"steps": "many"}, "steps must be a whole number, not 'many'"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"steps": None}, "steps must be a whole number, not None"),
        ({"stride": float("nan")}, "stride must not be negative or infinite, but is nan"),
        ({"stride": "inf"}, "stride must not be negative or infinite, but is inf"),
        ({"stride": "x"}, "stride must be a number, not 'x'"),
        ({"loss": "cross-entropy"}, "loss must be one of ce, margin, dlr, probability, houdini, not 'cross-entropy'"),
    ],
)
def test_a_bad_option_gets_one_sentence(options, says):
    with pytest.raises(BadInput) as error:
        make("pgd", **options)
    assert says in str(error.value)


def test_options_that_may_be_left_open():
    assert make("bim").arguments["steps"] is None
    assert make("bim", steps="none").arguments["steps"] is None
    assert make("bim", steps="12").arguments["steps"] == 12
    with pytest.raises(BadInput, match="steps must be a whole number or none, not 'few'"):
        make("bim", steps="few")
