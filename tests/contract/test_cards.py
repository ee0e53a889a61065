"""What every registered method says of itself, and the arguments that it refuses."""

from __future__ import annotations

import inspect
import json
import math
import re
import typing

import pytest
from toys import CARDS, NAMES

from besiege.core.errors import BadInput
from besiege.core.method import SUPPLIED, make, registry
from besiege.core.threat import LOSSES, NORM_NAMES, Access, Loss

OPTIONS = [
    pytest.param(name, key, option, id=f"{name}-{key}")
    for name, card in CARDS.items()
    for key, option in card.options.items()
]


def test_there_are_methods_of_every_kind_and_access():
    assert {card.kind for card in CARDS.values()} >= {"evasion", "search", "ensemble"}
    assert {card.access for card in CARDS.values()} >= {Access.LABELS, Access.SCORES, Access.GRADIENTS}


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_well_formed(name):
    card = CARDS[name]
    assert 0 < len(card.summary) < 100
    assert "\n" not in card.summary
    assert card.summary.endswith(".")
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|arXiv:\d{4}\.\d{4}|doi:10\.\S+", card.paper)
    assert card.title
    assert set(card.norms) <= set(NORM_NAMES)
    assert list(card.norms) == [norm for norm in NORM_NAMES if norm in card.norms]
    assert len(card.norms) > 0


@pytest.mark.parametrize("name", NAMES)
def test_function_file_and_name_are_one_word(name):
    function = registry()[name].function
    *_, family, file = function.__module__.split(".")
    assert (function.__name__, file) == (name.replace("-", "_"),) * 2
    assert CARDS[name].name == name
    assert CARDS[name].family == family


@pytest.mark.parametrize("name", NAMES)
def test_the_function_says_what_its_options_do(name):
    function = registry()[name].function
    signature = inspect.signature(function)
    by_place = [p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    supplied = {"evasion": 4, "universal": 4, "search": 3, "ensemble": 0}[CARDS[name].kind]
    assert len(by_place) == supplied
    assert "eps" not in CARDS[name].options
    assert "targeted" not in CARDS[name].options
    assert len((inspect.getdoc(function) or "").splitlines()[0]) > 0


@pytest.mark.parametrize(("name", "key", "option"), OPTIONS)
def test_an_option_is_typed_and_its_default_fits_in_a_record(name, key, option):
    if key in SUPPLIED:
        pytest.fail(f"`{key}` is what the engine supplies: it is no option")
    assert option.annotation is not option.empty
    assert option.default is not option.empty
    assert json.loads(json.dumps(option.default)) == option.default
    assert make(name, **{key: option.default}) == make(name)
    if key == "loss":
        assert option.annotation == Loss


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_is_a_value(name):
    attack = make(name)
    assert attack == make(name)
    assert hash(attack) == hash(make(name))
    assert str(attack) == f"{name}()"
    assert set(attack.arguments) == set(CARDS[name].options)
    json.dumps(dict(attack.arguments))


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_is_not_there_is_refused(name):
    with pytest.raises(BadInput, match=name):
        make(name, stepz=3)
    with pytest.raises(BadInput, match="by name"):
        registry()[name](3)


@pytest.mark.parametrize(("name", "key", "option"), OPTIONS)
def test_a_value_that_cannot_be_is_refused(name, key, option):
    kind = option.annotation
    wrong: list[object] = ["many", [1], -1, math.nan, math.inf, -math.inf]
    if kind is bool:
        wrong = ["maybe", 2, [True]]
    elif typing.get_origin(kind) is typing.Literal:
        wrong = ["nonsense", 3]
    elif kind is not float and kind != float | None:
        wrong.append(2.5)
    if type(None) not in typing.get_args(kind):
        wrong.append(None)
    for value in wrong:
        with pytest.raises(BadInput, match=key):
            make(name, **{key: value})
        with pytest.raises(BadInput, match=key):
            registry()[name](**{key: value})


@pytest.mark.parametrize(("name", "key", "option"), OPTIONS)
def test_options_are_read_from_text(name, key, option):
    kind = option.annotation
    texts = {int: ("7", 7), float: ("1/4", 0.25), bool: ("no", False), Loss: (LOSSES[-1], LOSSES[-1])}
    for known, (text, value) in texts.items():
        if kind == known or kind == known | None:
            assert make(name, **{key: text}).arguments[key] == value
            break
    else:
        assert typing.get_origin(kind) is typing.Literal
