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
    md = "md"
    junit = "junit"


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that an audit wrote.")],
    format: Annotated[Format, typer.Option(help="A page beside the run; the others on stdout.")] = Format.html,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write in place of that.")] = None,
) -> None:
    """Write the report of a run."""
    from besiege.report import junit, markdown
    from besiege.report.html import page
    from besiege.results import files
    from besiege.results.audit import load

    audit = load(run)
    folder = run if run.is_dir() else run.parent
    text = {
        Format.html: lambda: page(audit, folder),
        Format.json: audit.json_text,
        Format.md: lambda: markdown.render(audit),
        Format.junit: lambda: junit.render(audit),
    }[format]()
    if out is None and format is not Format.html:
        typer.echo(text, nl=False)
        return
    path = out or folder / "report.html"
    files.write(path, text)
    typer.echo(str(path))
