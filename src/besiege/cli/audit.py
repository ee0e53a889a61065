"""`besiege audit`: the siege."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from besiege.results.audit import Audit


def audit(
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    limit: o.Limit = None,
    threat: Annotated[
        str | None, typer.Option(help="Radii, for example linf:8/255,l2:0.5; else what is customary for the images.")
    ] = None,
    budget: o.Effort = o.Budget.quick,
    attacks: Annotated[str | None, typer.Option(help="Send only these, for example pgd,square.")] = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    json: o.Json = False,
    trust_code: o.Trust = False,
    weights: o.Weights = None,
    mean: o.Mean = None,
    std: o.Std = None,
    classes: o.Classes = None,
    batch: o.Batch = None,
    on_bad: o.OnBadFile = o.OnBad.refuse,
    out: o.Out = None,
) -> None:
    """Send a plan of attacks and write a report: what held, per attack and in the worst case per image.

    The run folder (by default runs/TARGET-DATA-BUDGET) gets audit.json, report.html and the pictures.
    """
    from besiege.audit import plan as p
    from besiege.audit import run as r
    from besiege.cli import terminal
    from besiege.core.errors import BadInput
    from besiege.core.method import method, registry
    from besiege.core.threat import Ball
    from besiege.report.html import page
    from besiege.results import files
    from besiege.results.audit import slug

    only = [method(name.strip()).card.name for name in (attacks or "").split(",") if name.strip()]
    threats = [Ball.parse(text) for text in (threat or "").split(",") if text.strip()]
    victim, images = o.opened(
        target,
        data,
        limit=limit or p.IMAGES[budget],
        seed=seed,
        device=device,
        trust_code=trust_code,
        weights=weights,
        mean=mean,
        std=std,
        classes=classes,
        batch=batch,
        on_bad=on_bad,
    )
    plan = p.plan(registry(), victim.access, threats or p.customary(victim.shape), budget.value, only)
    folder = out or Path("runs") / slug(victim.name, images.name, budget.value)
    warnings = o.warned(victim, images)
    with terminal.progress() as bar:
        ahead = [cell.passes(len(images)) for cell in plan.cells]
        task = bar.add_task("", total=sum(ahead))
        done = 0

        def tell(event: r.Event) -> None:
            nonlocal done
            if isinstance(event, r.Passed):
                bar.advance(task, event.rows)
            elif isinstance(event, r.Began):
                bar.update(task, description=f"{done + 1}/{len(plan.cells)} {event.cell}, {event.images} images")
            else:
                done += 1
                bar.update(task, completed=sum(ahead[:done]))
                bar.console.print(_line(event), markup=False, highlight=False, soft_wrap=True)

        found = r.audit(
            victim,
            images,
            plan,
            folder,
            budget=budget.value,
            seed=seed,
            command=shlex.join(["besiege", *sys.argv[1:]]),
            warnings=warnings,
            tell=tell,
        )
    if not found.records and found.complete:
        raise BadInput(f"no attack could be run: {found.left_out[-1].why}")
    path = folder / "report.html"
    files.write(path, page(found, folder))
    if json:
        typer.echo(found.model_dump_json())
    else:
        _print(found, path)
    if not found.complete:
        raise KeyboardInterrupt


def _line(event: object) -> str:
    from besiege.audit.run import Ended, Failed
    from besiege.cli.terminal import percent

    if isinstance(event, Ended):
        record = event.record
        robust = f"robust accuracy {percent(record.robust_accuracy):>7} of {record.n}"
        return f"{record.attack:<12} {record.threat!s:<12} {robust}  {record.seconds:6.1f} s"
    return f"{event.cell} left out: {event.why}" if isinstance(event, Failed) else ""


def _print(audit: Audit, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from besiege.cli.terminal import between, percent

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("attack", "threat", "images", "robust accuracy", "95 %", "passes", "time"):
        table.add_column(column, justify="left" if column in ("attack", "threat") else "right")
    clean = (str(audit.n), percent(audit.clean_accuracy), between(audit.clean_interval))
    table.add_row("none (clean)", "", *clean, "", "")
    for record in audit.records:
        table.add_row(
            record.attack,
            str(record.threat),
            str(record.n),
            percent(record.robust_accuracy),
            between(record.robust_interval),
            f"{record.forward_per_image + record.backward_per_image:.0f}",
            f"{record.seconds:.1f} s",
        )
    for worst in audit.worst:
        row = ("worst case", str(worst), "", percent(worst.robust_accuracy), between(worst.robust_interval), "", "")
        table.add_row(*row, style="bold")
    console = Console()
    console.print(Text(f"{audit.target} on {audit.data}"))
    console.print(table)
    console.print(Text(f"report: {path}"), soft_wrap=True)
