"""What a person sees: tables on stdout, progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Rate(ProgressColumn):
    """Forward passes a second."""

    def render(self, task: Task) -> Text:
        """Of one task."""
        return Text(f"{task.speed:,.0f} passes/s" if task.speed else "", style="dim")


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr while inside, with rate and time left; none where stderr is no terminal.

    What counts is forward passes. Images fall early, so the time left is an upper bound.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Rate(),
        TextColumn("at most"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def facts(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    table = Table(title=Text(title), show_header=False, box=None, title_justify="left", padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    Console().print(table)


def percent(value: float | None) -> str:
    """``43.2 %``; a dash where there is no value."""
    return "–" if value is None else f"{100 * value:.1f} %"


def between(interval: tuple[float, float]) -> str:
    """``35.1–51.7 %``."""
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f} %"


def figure(value: float | None) -> str:
    """Four digits; a dash where there is no value."""
    return "–" if value is None else f"{value:.4g}"


def spell(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
