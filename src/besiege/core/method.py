"""How a method declares itself, and the registry of those that did."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.meter import Seeks
from besiege.core.oracle import Oracle
from besiege.core.poisoned import Knowledge, Poisoned
from besiege.core.rng import Rng, Stream
from besiege.core.shield import Shield
from besiege.core.suspicion import Suspicion
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Norm, number
from besiege.core.trigger import Trigger

P = ParamSpec("P")
Within = TypeVar("Within", bound=Ball)
Search = Iterator[Tensor] | typing.Generator[Tensor, Tensor, None]
Asks = Literal["labels", "probability", "margin"]
Evasive = Literal["evasion", "search", "universal", "ensemble", "chain"]
"""How an evasion attack works."""

Guards = Literal["input", "training", "data", "model"]
"""What a defense acts on: what enters the target, how it is trained, what it is trained on, its weights."""

Needs = Literal["surrogates", "victims", "validation"]
"""What a poisoner asks of its `Knowledge` beyond the classes and the recipe."""

Victim = Literal["scratch", "frozen", "end-to-end"]
"""How the victim of a poisoner learns: a fresh network, a new last layer on a given one, or all of that one further."""

Kind = Evasive | Literal["poisoning", "inference", "extraction"] | Guards
EVASIVE: tuple[str, ...] = typing.get_args(Evasive)
GUARDS: tuple[str, ...] = typing.get_args(Guards)

SUPPLIED = ("start", "maps")
"""Keyword-only arguments that the engine gives to those whose card says so."""

UNITED = "parts"
"""The argument of a union: its attacks."""


@dataclass(frozen=True)
class Card:
    """The facts about a method, stated once, by the method.

    ``access`` is what an attack asks of its oracle; those who train a model hold its weights, and a poisoner
    ``changes`` labels, images ("data") or the training itself; it ``needs`` parts of its knowledge, is meant for a
    ``victim`` that learns so, and for images of a ``pair`` of classes or a ``learner`` that is no recipe. An ``exact``
    extraction asks in float64. A defense ``counters`` methods by its authors' claim, and ``adaptive`` names the attack
    by someone who knows it.
    """

    name: str
    title: str
    family: str
    kind: Kind
    paper: str
    summary: str
    access: Access = Access.WEIGHTS
    norms: tuple[Norm, ...] = ()
    seeks: Seeks = "optimum"
    asks: Asks | None = None
    start: bool = False
    maps: bool = False
    targeted: bool = True
    channels: int | None = None
    transfers: bool = False
    after: tuple[Norm, ...] = ()
    changes: Literal["labels", "data", "training"] = "data"
    needs: tuple[Needs, ...] = ()
    victim: Victim = "scratch"
    pair: tuple[int, int] | None = None
    learner: Callable[..., Target] | None = field(default=None, repr=False, compare=False)
    gives: str = ""
    exact: bool = False
    counters: tuple[str, ...] = ()
    adaptive: str = ""
    shield: type[Shield] | None = field(default=None, repr=False, compare=False)
    suspects: Callable[[Target, Images], Suspicion] | None = field(default=None, repr=False, compare=False)
    options: Mapping[str, inspect.Parameter] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Method(Generic[P]):
    """A registered function. Called with hyper-parameters it gives the `Attack` that has them chosen."""

    card: Card
    function: Callable[..., Any] = field(repr=False)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Attack:
        """Choose hyper-parameters, by keyword only."""
        if args:
            raise BadInput(f"{self.card.name} takes its options by name")
        return Attack(self, _checked(self.card, kwargs))


@dataclass(frozen=True)
class Attack:
    """A method with its hyper-parameters chosen: printable, comparable, recordable. A defense is one too."""

    method: Method[Any]
    arguments: Mapping[str, Any]

    @property
    def card(self) -> Card:
        """The method's facts."""
        return self.method.card

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return self.card.name

    def __or__(self, other: Attack) -> Attack:
        """Both as one attack; see `union`."""
        return union(self, other)

    def __str__(self) -> str:
        if UNITED in self.arguments:
            return " | ".join(map(str, self.arguments[UNITED]))
        chosen = {k: v for k, v in self.arguments.items() if v != self.card.options[k].default}
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in chosen.items())})"

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted((k, repr(v)) for k, v in self.arguments.items()))))

    def bound(self) -> Callable[..., Any]:
        """The function with its options filled in."""
        return functools.partial(self.method.function, **self.arguments)

    def recorded(self) -> dict[str, Any]:
        """Every argument as a record holds it; those of a union by part, under its place and name."""
        if UNITED in self.arguments:
            return {f"{k} {part.name}": part.recorded() for k, part in enumerate(self.arguments[UNITED], 1)}
        return dict(self.arguments)


_REGISTRY: dict[str, Method[Any]] = {}


def _declare(kind: Kind, title: str, function: Callable[..., Any], **facts: Any) -> Method[Any]:
    name = function.__name__.replace("_", "-")
    options = {
        p.name: p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in SUPPLIED
    }
    card = Card(
        name=name,
        title=title,
        family="defense" if kind in GUARDS else function.__module__.split(".")[-2],
        kind=kind,
        summary=(inspect.getmodule(function).__doc__ or "").strip().splitlines()[0],
        options=options,
        **facts,
    )
    method: Method[Any] = Method(card, function)
    _REGISTRY[name] = method
    return method


def evasion(
    title: str,
    *,
    paper: str,
    norms: tuple[Norm, ...],
    access: Access = Access.GRADIENTS,
    seeks: Seeks = "success",
    start: bool = False,
    maps: bool = False,
    targeted: bool = True,
    channels: int | None = None,
) -> Callable[[Callable[Concatenate[Oracle, Tensor, Within, Rng, P], Tensor | None]], Method[P]]:
    """Declare a method that works on a whole batch through an oracle; what it returns is its last try.

    With ``channels`` it takes images of so many channels alone.

    With ``start`` the engine finds adversarial images first and hands them over as ``start`` (n, c, h, w; keyword);
    where it finds none, that is the image itself. With ``maps`` it hands over those of the images' regions, or None.
    """

    def declare(function: Callable[Concatenate[Oracle, Tensor, Within, Rng, P], Tensor | None]) -> Method[P]:
        return _declare(
            "evasion",
            title,
            function,
            paper=paper,
            norms=norms,
            access=access,
            seeks=seeks,
            start=start,
            maps=maps,
            targeted=targeted,
            channels=channels,
        )

    return declare


def search(
    title: str,
    *,
    paper: str,
    norms: tuple[Norm, ...],
    asks: Asks,
    seeks: Seeks = "success",
    start: bool = False,
    targeted: bool = True,
) -> Callable[[Callable[Concatenate[Tensor, Ball, Stream, P], Search]], Method[P]]:
    """Declare a generator for one image (c, h, w) that yields candidates (m, c, h, w) and is sent m answers.

    With ``start`` the engine finds an adversarial image first and hands it over as ``start`` (keyword).
    """

    def declare(function: Callable[Concatenate[Tensor, Ball, Stream, P], Search]) -> Method[P]:
        return _declare(
            "search",
            title,
            function,
            paper=paper,
            norms=norms,
            access=Access.LABELS if asks == "labels" else Access.SCORES,
            seeks=seeks,
            asks=asks,
            start=start,
            targeted=targeted,
        )

    return declare


def universal(
    title: str,
    *,
    paper: str,
    norms: tuple[Norm, ...],
    access: Access = Access.GRADIENTS,
    targeted: bool = False,
    transfers: bool = False,
) -> Callable[[Callable[Concatenate[Oracle, Tensor, Ball, Rng, P], Trigger]], Method[P]]:
    """Declare a method that fits one change for all images, on training images (m, c, h, w).

    It is judged on others. One image's result depends on the training images, never on its neighbours. One that
    ``transfers`` makes its change on a model of its own: whether the target follows is not in its hands.
    """

    def declare(function: Callable[Concatenate[Oracle, Tensor, Ball, Rng, P], Trigger]) -> Method[P]:
        return _declare(
            "universal",
            title,
            function,
            paper=paper,
            norms=norms,
            access=access,
            seeks="success",
            targeted=targeted,
            transfers=transfers,
        )

    return declare


def ensemble(
    title: str, *, paper: str, norms: tuple[Norm, ...], access: Access, targeted: bool = True
) -> Callable[[Callable[P, tuple[Attack, ...]]], Method[P]]:
    """Declare a function that names the attacks of an ensemble; each meets only the images still standing."""

    def declare(function: Callable[P, tuple[Attack, ...]]) -> Method[P]:
        return _declare(
            "ensemble", title, function, paper=paper, norms=norms, access=access, seeks="success", targeted=targeted
        )

    return declare


def poisoning(
    title: str,
    *,
    paper: str,
    changes: Literal["labels", "data", "training"] = "data",
    needs: tuple[Needs, ...] = (),
    victim: Victim = "scratch",
    pair: tuple[int, int] | None = None,
    learner: Callable[..., Target] | None = None,
) -> Callable[[Callable[Concatenate[Images, Knowledge, Rng, P], Poisoned]], Method[P]]:
    """Declare a method that tampers with training images; ``rng`` has a stream for each of them.

    It changes labels alone, the data, or the training, of which it hands over the model. What it ``needs`` the engine
    puts into its `Knowledge`. Where it attacks no network, ``learner(images, classes=…, …) -> Target`` is what learns,
    given those of the method's options that it names; a method for two classes alone names a ``pair`` of them.
    """

    def declare(function: Callable[Concatenate[Images, Knowledge, Rng, P], Poisoned]) -> Method[P]:
        return _declare(
            "poisoning",
            title,
            function,
            paper=paper,
            changes=changes,
            needs=needs,
            victim=victim,
            pair=pair,
            learner=learner,
        )

    return declare


def inference(
    title: str, *, paper: str, access: Access, gives: Literal["images", "membership", "inputs"]
) -> Callable[[Callable[..., Any]], Method[Any]]:
    """Declare a method that learns something of the training data, or of what was asked, through an oracle.

    By what it gives:

    - images: ``(Oracle, classes (k,), Reference, Rng, *, …) -> (k, c, h, w)``, one of each class;
    - membership: ``(Oracle, Images, Reference, Rng, *, …) -> (n,)``, higher for what is more likely a member;
    - inputs: ``(Oracle, seen (k, classes), Reference, Rng, *, …) -> Images``, those behind k answers seen; (1, 0)
      stands for a training image of which nothing was seen.
    """

    def declare(function: Callable[..., Any]) -> Method[Any]:
        return _declare("inference", title, function, paper=paper, access=access, gives=gives)

    return declare


def extraction(
    title: str, *, paper: str, access: Access, exact: bool = False
) -> Callable[[Callable[Concatenate[Oracle, Images, Fit, Rng, P], nn.Module]], Method[P]]:
    """Declare a method that rebuilds a classifier from its answers; images are what it may ask about.

    ``fit`` says what it builds and how that is trained. Its option ``queries`` is the most that it asks in all, and
    the oracle stands for one image, so that every question has ``rows`` of zeros. An ``exact`` one asks in float64
    and beyond [0, 1].
    """

    def declare(function: Callable[Concatenate[Oracle, Images, Fit, Rng, P], nn.Module]) -> Method[P]:
        return _declare("extraction", title, function, paper=paper, access=access, exact=exact)

    return declare


def defense(
    title: str,
    *,
    paper: str,
    kind: Guards,
    counters: tuple[str, ...],
    adaptive: str,
    shield: type[Shield] | None = None,
    suspects: Callable[[Target, Images], Suspicion] | None = None,
) -> Callable[[Callable[..., Any]], Method[Any]]:
    """Declare a defense, a function that returns the kind of thing that it takes.

    By what it acts on:

    - input: ``(Target, Images, Rng, *, …) -> Target``, the images being clean calibration data;
    - training: ``(Fit, *, …) -> Fit``;
    - data: ``(Images, Probe, Rng, *, …) -> Suspicion`` of each training image;
    - model: ``(Target, Images, Rng, *, …) -> Target``, with other weights.

    ``shield(inner target, **options)`` is what a defense of the input puts around a target, not yet calibrated: from
    it and a saved state the defended target is made again. ``suspects`` is how a defense of the model looks for poison
    in the images that it was trained on.
    """

    def declare(function: Callable[..., Any]) -> Method[Any]:
        return _declare(
            kind,
            title,
            function,
            paper=paper,
            counters=counters,
            adaptive=adaptive,
            shield=shield,
            suspects=suspects,
        )

    return declare


def union(*attacks: Attack) -> Attack:
    """One attack after another, as one: ``pgd() | square()``. Each meets only the images that still stand.

    Where all of them seek the minimum, each meets every image and the nearest success is kept. One alone is itself.

    Where the first works in a region that the others do not know, they are a chain: ``spatial() | pgd()`` moves an
    image within the one region (``after`` of the threat model) and then searches the ball around where that has led.

    Raises:
        BadInput: they share no norm, or one of them fits a universal perturbation.
    """
    if len(attacks) == 1:
        return attacks[0]
    parts = tuple(part for attack in attacks for part in attack.arguments.get(UNITED, (attack,)))
    cards = [part.card for part in parts]
    names = "|".join(card.name for card in cards)
    norms = tuple(norm for norm in cards[0].norms if all(norm in card.norms for card in cards))
    chained = not norms and all(isinstance(norm, str) for norm in cards[0].norms) and cards[0].kind == "evasion"
    if chained:
        parts = (parts[0], union(*parts[1:]))
        norms = parts[1].card.norms
    if not norms:
        raise BadInput(f"{names}: there is no norm that all of them work in")
    if any(card.kind == "universal" for card in cards):
        raise BadInput(f"{names}: a universal perturbation is fitted beforehand and joins no other attack")
    card = Card(
        name=names,
        title=" | ".join(card.title for card in cards),
        family=cards[0].family,
        kind="chain" if chained else "ensemble",
        paper=", ".join(dict.fromkeys(card.paper for card in cards)),
        access=max(card.access for card in cards),
        norms=norms,
        seeks="minimum" if all(card.seeks == "minimum" for card in cards) else "success",
        summary=f"{len(parts)} attacks, one after another.",
        targeted=all(card.targeted for card in cards),
        channels=next((card.channels for card in cards if card.channels), None),
        after=cards[0].norms if chained else (),
    )
    return Attack(Method(card, _in_turn), {UNITED: parts})


def _in_turn(*, parts: tuple[Attack, ...]) -> tuple[Attack, ...]:
    return parts


@cache
def registry() -> Mapping[str, Method[Any]]:
    """Every method of `besiege.attacks` and `besiege.defenses`, by name."""
    for root in ("besiege.attacks", "besiege.defenses"):
        for info in pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}."):
            importlib.import_module(info.name)
    return dict(sorted(_REGISTRY.items()))


def of_kind(*kinds: str) -> Mapping[str, Method[Any]]:
    """The methods of some kinds, by name."""
    return {name: method for name, method in registry().items() if method.card.kind in kinds}


VERBS = {"poisoning": "poison", "inference": "infer", "extraction": "steal", "data": "scan"}
"""The command that runs a method, by kind; evasion attacks have `attack`, the other defenses `defend`."""


def method(name: str, kinds: tuple[str, ...] = ()) -> Method[Any]:
    """The method of that name, one of ``kinds`` if they are given.

    Raises:
        BadInput: no such method; the nearest name is suggested. Or it is of another kind; its command is named.
    """
    every = registry()
    if kinds and name in every and every[name].card.kind not in kinds:
        kind = every[name].card.kind
        verb = "attack" if kind in EVASIVE else VERBS.get(kind, "defend")
        raise BadInput(f"{name} is run by another command: besiege {verb} {name}")
    known = of_kind(*kinds) if kinds else every
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`besiege list` shows them all"
        raise BadInput(f"there is no method {name!r}; {hint}")
    return known[name]


def configured(found: Method[Any], **options: Any) -> Attack:
    """A method with those options; strings, as from a command line, are read by the option's type."""
    return found(**{key: _read(found.card, key, value) for key, value in options.items()})


def make(name: str, **options: Any) -> Attack:
    """The attack with those options; strings, as from a command line, are read by the option's type.

    ``a|b`` names a `union`; each part takes the options that it has.
    """
    return union(*(configured(part, **own) for part, own in parts_of(name, options)))


def parts_of(name: str, options: Mapping[str, Any]) -> list[tuple[Method[Any], dict[str, Any]]]:
    """The methods that ``a|b`` names, each with those of ``options`` that it has; one alone gets all.

    Raises:
        BadInput: no such method, or none of several has an option.
    """
    parts = [method(part.strip(), EVASIVE) for part in name.split("|")]
    if len(parts) == 1:
        return [(parts[0], dict(options))]
    for key in options:
        if not any(key in part.card.options for part in parts):
            raise BadInput(f"none of {name} has an option {key!r}")
    return [(part, {k: v for k, v in options.items() if k in part.card.options}) for part in parts]


def _read(card: Card, key: str, value: Any) -> Any:
    """A string as the option's type; what cannot be read stays as it is, to be refused."""
    if not isinstance(value, str) or key not in card.options:
        return value
    kinds = _kinds(card.options[key])
    if NoneType in kinds and value.lower() == "none":
        return None
    if bool in kinds:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower(), value)
    try:
        return int(value) if int in kinds else number(value) if float in kinds else value
    except ValueError:
        return value


def _kinds(option: inspect.Parameter) -> tuple[Any, ...]:
    return typing.get_args(option.annotation) or (option.annotation,)


def _checked(card: Card, options: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        if key not in card.options:
            near = difflib.get_close_matches(key, card.options, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(card.options) or 'none'}"
            raise BadInput(f"{card.name} has no option {key!r}; {hint}")
        kinds = _kinds(card.options[key])
        if typing.get_origin(card.options[key].annotation) is Literal:
            if value not in kinds:
                raise BadInput(f"{card.name}: {key} must be one of {', '.join(map(str, kinds))}, not {value!r}")
        elif not _fits(kinds, value):
            raise BadInput(f"{card.name}: {key} must be {' or '.join(map(_said, kinds))}, not {value!r}")
        if isinstance(value, int | float) and not 0 <= value < INF:
            raise BadInput(f"{card.name}: {key} must not be negative or infinite, but is {value}")
        if (
            key in ("steps", "restarts", "samples", "searches", "clusters", "batch", "own", "rounds", "lines", "spare")
            and value is not None
            and value < 1
        ):
            raise BadInput(f"{card.name}: {key} must be at least 1, not {value}")
    return {key: options.get(key, option.default) for key, option in card.options.items()}


def _fits(kinds: tuple[Any, ...], value: Any) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def _said(kind: Any) -> str:
    known = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "none"}
    return known.get(kind, str(kind))
