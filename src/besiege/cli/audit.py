"""`besiege audit`: the siege."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besiege.cli import options as o
from besiege.core.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table

    from besiege.audit.fronts import Beyond, Material
    from besiege.audit.plan import Plan, Speed
    from besiege.audit.run import Event
    from besiege.core.images import Images
    from besiege.core.target import Target
    from besiege.core.threat import Ball
    from besiege.results.audit import Audit, Gate
    from besiege.results.store import Store

BELOW, CUT, INTERRUPTED = 1, 3, 130
SPARE = 0.02
"""The share of --time that starting and the report may take."""
UNITS = {"s": 1, "m": 60, "h": 3600}


class Format(StrEnum):
    """What an audit prints at its end."""

    table = "table"
    json = "json"
    md = "md"
    junit = "junit"
    html = "html"


@o.opening
def audit(
    context: typer.Context,
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    limit: o.Limit = None,
    threat: Annotated[
        str | None, typer.Option(help="Radii, for example linf:8/255,l2:0.5; else what is customary for the images.")
    ] = None,
    budget: o.Effort = o.Budget.quick,
    attacks: Annotated[str | None, typer.Option(help="Send only these, for example pgd,square.")] = None,
    families: Annotated[
        str | None,
        typer.Option(
            help="Of whitebox,blackbox,poisoning,inference,extraction; else those that --train and so on let."
        ),
    ] = None,
    defend: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Try this defense and attack it again. Repeatable.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Other images of the same kind: what defenses, thieves and poison work with."
        ),
    ] = None,
    members: o.MembersSpec = None,
    nonmembers: o.OthersSpec = None,
    fit: o.FitSpec = None,
    time: Annotated[
        str | None, typer.Option(metavar="TIME", help="End within 90s, 10m or 1h; say what is left.")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="THREAT=SHARE", help="Exit with 1 if less is sure to stand: linf:8/255=0.4. Repeatable."),
    ] = None,
    format: Annotated[Format, typer.Option(help="What to print at the end.")] = Format.table,
    json: o.Json = False,
    out: o.Out = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it costs; send nothing.")] = False,
    *,
    how: o.How,
) -> int:
    """Send a plan of attacks and write a report: what held, per attack and in the worst case per image.

    With --train, and with --members and --nonmembers, it goes on to poisoning, inference and extraction; with --defend
    to a defense, which is attacked by someone who does not know it and by someone who does. The report ends with what
    to do. The embedded classifier has all of that at hand.

    The run folder (by default runs/TARGET-DATA-BUDGET) gets run.sqlite, the adversarial images, audit.json and
    report.html. The same command again goes on where it stopped.
    """
    began = monotonic()
    from besiege.audit import fronts as f
    from besiege.audit import plan as p
    from besiege.audit import run as r
    from besiege.core.method import EVASIVE, method, of_kind
    from besiege.regions import parse
    from besiege.report.html import page
    from besiege.results import files
    from besiege.results.audit import slug
    from besiege.results.store import Store

    seconds, gates = None if time is None else _seconds(time), _thresholds(fail_under or [])
    request = {name: context.params[name] for name in REQUEST}
    if resume is not None:
        request = _requested(context, resume)
    budget = o.Budget(request["budget"])
    only = [method(name.strip()).card.name for name in (request["attacks"] or "").split(",") if name.strip()]
    threats = [parse(text) for text in (request["threat"] or "").split(",") if text.strip()]
    how = replace(how, **{name: request[name] for name in FEEDING}, on_bad=o.OnBad(request["on_bad"]))
    victim, images = how.both(request["target"], request["data"], request["limit"] or p.IMAGES[budget])
    sent = threats or p.customary(victim.shape, budget.value)
    chosen = _families(request["families"]) or (f.FAMILIES[:2] if only else f.FAMILIES)
    evasive = {name: one for name, one in of_kind(*EVASIVE).items() if one.card.family in chosen or name in only}
    plan = p.Plan((), (), budget.value)
    if evasive:
        plan = p.plan(evasive, victim.access, sent, budget.value, only, victim.shape[0])
    _sent(gates, plan)
    if dry_run:
        _dry(plan, r.measured(victim, images, seconds), len(images), seconds, json or format is Format.json)
        return 0
    material = _material(request, images, how)
    beyond = f.beyond(victim, material, chosen, request["defend"] or [], plan)
    folder = resume or out or Path("runs") / slug(victim.name, images.name, budget.value)
    known = r.manifest(victim, images, plan, budget=budget.value, seed=request["seed"], beyond=beyond)
    with Store(folder, known) as store:
        store.note(request=request)
        found = _run(victim, images, plan, store, request["seed"], seconds, began, beyond)
        if not found.records and not found.fronts and found.complete:
            raise BadInput(f"no attack could be run: {found.left_out[-1].why}")
        found = found.model_copy(update={"gates": _gates(gates, found)})
        found.save(folder)
        path = folder / "report.html"
        files.write(path, page(found, folder))
    _show(found, path, Format.json if json else format)
    return _verdict(found)


FEEDING = ("seed", "device", "weights", "mean", "std", "classes", "batch")
REQUEST = (
    "target",
    "data",
    "limit",
    "threat",
    "budget",
    "attacks",
    "families",
    "defend",
    "train",
    "members",
    "nonmembers",
    "fit",
    *FEEDING,
    "on_bad",
)
"""What --resume takes from the run. What executes a stranger's code is asked for anew."""


def _requested(context: typer.Context, run: Path) -> dict[str, Any]:
    """What the run in a folder was asked to do.

    Raises:
        BadInput: there is none, or the command line says it again.
    """
    from besiege.results import store

    for name in (*REQUEST, "out"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            said = name.upper() if name == "target" else f"--{name.replace('_', '-')}"
            raise BadInput(f"--resume takes everything from the run; leave {said} out")
    if not (run / store.FILE).exists():
        raise BadInput(f"there is no run in {run}")
    with store.Store(run) as held:
        request: dict[str, Any] | None = held.manifest.get("request")
    if request is None:
        raise BadInput(f"{run} does not say what it was asked to do; run the first command again")
    return request


def _families(text: str | None) -> tuple[str, ...]:
    """The families that --families names."""
    from besiege.audit.fronts import FAMILIES
    from besiege.core.errors import nearest

    chosen = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in chosen:
        if name not in FAMILIES:
            raise BadInput(f"--families {name!r} is unknown; {nearest(name, FAMILIES)}")
    return chosen


def _material(request: dict[str, Any], images: Images, how: o.How) -> Material:
    """What the command line names beside the target; the embedded classifiers have their own at hand."""
    from besiege.audit.fronts import Material
    from besiege.data import open_images
    from besiege.targets import expects
    from besiege.targets.open import DEFAULT
    from besiege.targets.recipe import open_fit

    train, members, others = request["train"], request["members"], request["nonmembers"]
    if (members is None) != (others is None):
        raise BadInput("--members and --nonmembers go together: give both, or neither")
    target = request["target"] or DEFAULT
    if target.startswith("embedded:") and request["data"] is None:
        own = expects(target).data
        train = train or f"{own}-train"
        members, others = (f"{own}-train", own) if members is None else (members, others)

    def opened(spec: str | None) -> Images | None:
        if spec is None:
            return None
        found = open_images(spec, size=images.shape[1:], channels=images.shape[0], seed=0, on_bad=how.on_bad.value)
        return found.to(images.x.device)

    fit = open_fit(request["fit"] or "cnn", trust_code=how.trust_code)
    return Material(fit, opened(train), opened(members), opened(others), same=request["fit"] is not None)


def _overlap(images: Images, beyond: Beyond) -> list[str]:
    """What is wrong with --train where it holds images that are attacked; said on stderr as well."""
    train = beyond.material.train
    both = 0 if train is None or not beyond.fronts else images.shared(train)
    if not both:
        return []
    warning = (
        f"{both} of the {len(images)} images under attack are in --train too: what learned from them looks better than "
        "it is; give --train and --data without common images"
    )
    typer.echo(f"warning: {warning}", err=True)
    return [warning]


def _run(
    target: Target,
    images: Images,
    plan: Plan,
    store: Store,
    seed: int,
    seconds: float | None,
    began: float,
    beyond: Beyond,
) -> Audit:
    """The audit, with its plan, its progress and each shard's figures on stderr; its time has run since ``began``."""
    from rich.console import Console

    from besiege.audit import run as r
    from besiege.cli import terminal

    warnings, n = o.warned(target, images) + _overlap(images, beyond), len(images)
    speed = r.measured(target, images, seconds)
    seconds = None if seconds is None else (1 - SPARE) * seconds - (monotonic() - began)
    Console(stderr=True).print(_table(plan, speed, n, seconds))
    with terminal.progress() as bar:
        task = bar.add_task("", total=sum(cell.passes(n) for cell in plan.cells))

        def tell(event: Event) -> None:
            if isinstance(event, r.Passed):
                bar.advance(task, event.rows)
            elif isinstance(event, r.Began):
                bar.update(task, description=f"{event.cell}, {event.images} images")
            elif isinstance(event, r.Opened):
                bar.update(task, description=str(event.front), total=None)
            else:
                bar.console.print(_line(event), markup=False, highlight=False, soft_wrap=True)

        return r.audit(
            target,
            images,
            plan,
            store,
            seed=seed,
            seconds=seconds,
            speed=speed,
            command=shlex.join(["besiege", *sys.argv[1:]]),
            warnings=warnings,
            tell=tell,
            beyond=beyond,
        )


def _table(plan: Plan, speed: Speed, n: int, seconds: float | None) -> Table:
    """The plan: what each cell costs at most, and under a time how many images fit for sure."""
    from rich.table import Table

    from besiege.audit.plan import allot, threat_text
    from besiege.cli.terminal import spell

    fit = [cell.count(n) for cell in plan.cells]
    if seconds is not None:
        fit = allot([(k, cell.seconds(1, speed)) for k, cell in zip(fit, plan.cells, strict=True)], seconds)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = ("attack", "threat", "images", "passes, at most", "time, at most")
    for column in columns if seconds is None else (*columns, "sure to fit"):
        table.add_column(column, justify="left" if column in ("attack", "threat") else "right")
    for cell, sure in zip(plan.cells, fit, strict=True):
        row = (cell.attack.name, threat_text(cell.threat.ball), str(cell.count(n)), f"{cell.passes(n):,}")
        table.add_row(*row, spell(cell.seconds(n, speed)), *(() if seconds is None else (str(sure),)))
    table.add_row("all", "", "", f"{sum(cell.passes(n) for cell in plan.cells):,}", spell(plan.seconds(n, speed)))
    return table


def _dry(plan: Plan, speed: Speed, n: int, seconds: float | None, json: bool) -> None:
    from json import dumps

    from rich.console import Console

    from besiege.audit.plan import threat_text

    if not json:
        Console().print(_table(plan, speed, n, seconds))
        return
    cells = [
        {
            "attack": cell.attack.name,
            "options": dict(cell.attack.arguments),
            "threat": threat_text(cell.threat.ball),
            "images": cell.count(n),
            "passes": cell.passes(n),
            "seconds": cell.seconds(n, speed),
        }
        for cell in plan.cells
    ]
    left_out = [dict(zip(("attack", "threat", "why"), left, strict=True)) for left in plan.left_out]
    typer.echo(dumps({"cells": cells, "left_out": left_out, "seconds": plan.seconds(n, speed)}))


def _seconds(text: str) -> float:
    """``90s``, ``10m``, ``1h30m``; a bare number counts seconds."""
    parts = re.findall(
        r"(\d+(?:\.\d+)?)\s*([smh])", text.strip().lower() + ("s" if text.strip()[-1:].isdigit() else "")
    )
    seconds = sum(float(value) * UNITS[unit] for value, unit in parts)
    if not re.fullmatch(r"(\s*\d+(\.\d+)?\s*[smh]?)+\s*", text.lower()) or not seconds:
        raise BadInput(f"--time {text!r} is no time; write for example 90s, 10m or 1h")
    return seconds


def _thresholds(texts: list[str]) -> list[tuple[Ball, float]]:
    """The threat and the least share that shall stand, of each --fail-under."""
    from besiege.core.threat import number
    from besiege.regions import parse

    found = []
    for text in texts:
        threat, equals, share = text.rpartition("=")
        if not equals or not 0 <= number(share) <= 1:
            raise BadInput(f"--fail-under {text!r} names no threat and share; write for example linf:8/255=0.4")
        found.append((parse(threat), number(share)))
    return found


def _sent(gates: list[tuple[Ball, float]], plan: Plan) -> None:
    """Refuse a threshold on a threat that no attack is sent under."""
    from besiege.audit.plan import threat_text

    known = list(dict.fromkeys(threat_text(cell.threat.ball) for cell in plan.cells))
    for ball, _ in gates:
        if threat_text(ball) not in known:
            raise BadInput(f"--fail-under {threat_text(ball)} is not among the threats; there are {', '.join(known)}")


def _gates(gates: list[tuple[Ball, float]], found: Audit) -> list[Gate]:
    from besiege.audit.plan import threat_text
    from besiege.results.audit import Gate

    low = {str(worst): worst.robust_interval[0] for worst in found.worst}
    return [Gate(threat=(name := threat_text(ball)), at_least=share, low=low.get(name)) for ball, share in gates]


def _show(found: Audit, path: Path, format: Format) -> None:
    from besiege.report import junit, markdown
    from besiege.results import files

    if format is Format.table:
        _print(found, path)
    elif format is Format.html:
        typer.echo(files.read(path), nl=False)
    elif format is Format.json:
        typer.echo(found.model_dump_json())
    else:
        typer.echo((markdown if format is Format.md else junit).render(found), nl=False)


def _verdict(found: Audit) -> int:
    """The exit code, and on stderr the sentence that explains it."""
    from besiege.audit import run as r

    for gate in found.gates:
        if not gate.passed:
            typer.echo(f"failed: {gate}", err=True)
    if not found.complete:
        missing = [left for left in found.left_out if left.why.startswith(r.NO_TIME)]
        if not missing:
            return INTERRUPTED
        cells = (f"{left.why.removeprefix(r.NO_TIME)} of {left.attack} {left.threat}" for left in missing)
        typer.echo(f"cut short by --time, the same command goes on; {r.NO_TIME}{', '.join(cells)}", err=True)
        return CUT
    return 0 if all(gate.passed for gate in found.gates) else BELOW


def _line(event: Event) -> str:
    from besiege.audit.run import Ended, Failed, Fought
    from besiege.cli.terminal import percent

    if isinstance(event, Fought):
        return f"{event.front} is done"
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
    from besiege.report import summary

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
    for line in summary.lines(audit):
        console.print(Text(line), soft_wrap=True)
    for check in audit.checks:
        if not check.passed:
            console.print(Text(f"warning: {check.name}: {check.evidence}; {check.advice}"), soft_wrap=True)
    for advice in audit.advice:
        console.print(Text(f"advice: {advice.text}"), soft_wrap=True)
    console.print(Text(f"report: {path}"), soft_wrap=True)
