"""`besiege list`: every method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from besiege.cli.options import Json

if TYPE_CHECKING:
    from besiege.core.method import Card


def listing(json: Json = False) -> None:
    """List every method with what it needs and where it works."""
    from besiege.core.method import registry

    cards = [method.card for method in registry().values()]
    if json:
        import json as j

        typer.echo(j.dumps([entry(card) for card in cards], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    for family in dict.fromkeys(card.family for card in cards):
        table = Table(title=family, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("name", "needs", "norms", "seeks", "what it is"):
            table.add_column(column, no_wrap=column == "name", header_style="dim")
        for card in (card for card in cards if card.family == family):
            table.add_row(card.name, card.access.name.lower(), " ".join(norms(card)), card.seeks, card.summary)
        Console().print(table)


def entry(card: Card) -> dict[str, Any]:
    """A method's facts as JSON holds them."""
    from besiege.report import atlas

    return {
        "name": card.name,
        "title": card.title,
        "family": card.family,
        "kind": card.kind,
        "access": card.access.name.lower(),
        "norms": norms(card),
        "seeks": card.seeks,
        "paper": card.paper,
        "counters": [],
        "broken_by": [],
        "atlas": list(atlas.entry(card.family).atlas),
    }


def norms(card: Card) -> list[str]:
    """The norms that a method works in."""
    from besiege.core.threat import NORM_NAMES

    return [NORM_NAMES[norm] for norm in card.norms]
