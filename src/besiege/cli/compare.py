"""`besiege compare`: two runs on the same images. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from besiege.results.compare import Comparison


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that an audit wrote: the one before.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another on the same images: the one after.")],
    json: o.Json = False,
) -> None:
    """Say how two runs differ, image by image, with an interval for each difference."""
    from besiege.results.audit import load
    from besiege.results.compare import compare as compared

    found = compared(load(first), load(second))
    if json:
        typer.echo(found.model_dump_json())
    else:
        _print(found)


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from besiege.cli.terminal import percent

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("attack", "threat", "images", "first", "second", "difference", "95 %", "p"):
        table.add_column(column, justify="left" if column in ("attack", "threat") else "right")
    for pair in found.pairs:
        low, high = pair.interval
        row = (pair.attack, pair.threat, str(pair.n), percent(pair.first), percent(pair.second))
        spread = f"{100 * low:+.1f} to {100 * high:+.1f}"
        sure = "" if low <= 0 <= high else "bold"
        table.add_row(*row, f"{100 * pair.difference:+.1f}", spread, f"{pair.p:.2g}", style=sure)
    console = Console()
    console.print(Text(f"first: {found.first}\nsecond: {found.second}\non {found.data}; differences in points"))
    console.print(table)
    for note in found.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
