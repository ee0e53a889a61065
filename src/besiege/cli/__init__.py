"""The command line: renders what the library does, one command a file. Nothing imports it."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from besiege import __version__
from besiege.cli.attack import attack
from besiege.cli.audit import audit
from besiege.cli.bench import bench
from besiege.cli.check import check
from besiege.cli.compare import compare
from besiege.cli.defend import defend
from besiege.cli.infer import infer
from besiege.cli.listing import listing
from besiege.cli.poison import poison
from besiege.cli.report import report
from besiege.cli.scan import scan
from besiege.cli.show import show
from besiege.cli.steal import steal
from besiege.core.errors import AccessDenied, BadInput

DONE, BELOW, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 70, 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for command in (check, audit, attack, defend, steal, poison, scan, infer, report, compare, listing, show, bench):
    # typer would keep the line breaks within a paragraph
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)
    app.command("list" if command is listing else None, help=text)(command)


@app.callback(invoke_without_command=True)
def besiege(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Lays siege to an image classifier before somebody else does."""
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors become one sentence on stderr.

    Torch's threads are told to sleep while they wait: spinning costs up to 25 times the time on a busy machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
        sys.stdout.flush()
    except (BadInput, AccessDenied) as error:
        return _fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if hasattr(error, "format_message"):
            return _fail(str(error.format_message()), BAD_INPUT)
        if os.environ.get("BESIEGE_DEBUG"):
            raise
        return _fail(
            f"besiege failed, which is a defect of its own: {type(error).__name__}: {error}; "
            "set BESIEGE_DEBUG=1 to see where",
            INTERNAL,
        )
    if code == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else DONE


def main() -> None:
    """The console script."""
    sys.exit(run())


def _fail(sentence: str, code: int) -> int:
    typer.echo(f"error: {' '.join(sentence.split())}", err=True)
    return code
