"""`besiege report`: a run as a page. Loads no torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """What a report can be."""

    html = "html"
    json = "json"


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that an audit wrote.")],
    format: Annotated[Format, typer.Option(help="A page beside the run, or JSON on stdout.")] = Format.html,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write in place of that.")] = None,
) -> None:
    """Write the report of a run."""
    from besiege.report.html import page
    from besiege.results import files
    from besiege.results.audit import load

    audit = load(run)
    folder = run if run.is_dir() else run.parent
    if format is Format.json and out is None:
        typer.echo(audit.json_text(), nl=False)
        return
    path = out or folder / "report.html"
    files.write(path, page(audit, folder) if format is Format.html else audit.json_text())
    typer.echo(str(path))
