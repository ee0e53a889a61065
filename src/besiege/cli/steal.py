"""`besiege steal`: rebuild a classifier from its answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from besiege.core.images import Images
    from besiege.core.target import Target
    from besiege.results.extraction import Theft

POOL = "embedded:digits-rgb-train"
"""Asked about for want of others: digits on photographs, in the size and the colours that the target takes."""


@o.opening
def steal(
    name: Annotated[str, typer.Argument(metavar="NAME", help="copycat or functionally-equivalent.")],
    target: o.TargetSpec = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="The images to ask about; their labels do not matter.")
    ] = None,
    test: o.TestSpec = None,
    limit: o.Limit = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Ask about at most this many images in all.")] = None,
    fit: o.FitSpec = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="A method's own option.")] = None,
    budget: o.Effort = o.Budget.quick,
    json: o.Json = False,
    out: o.Out = None,
    *,
    how: o.How,
) -> None:
    """Steal a classifier by its answers and say how close the stolen model comes.

    The images of --data are what may be asked about, those of --test judge: accuracy of both models, agreement, how far
    their scores differ, and whether attacks made on the stolen model fool the target. A query monitor watches.

    With --out the record and the stolen model are written to a folder; stolen:FOLDER is then a target, for example
    besiege attack pgd --lens surrogate:stolen:FOLDER.
    """
    from besiege.audit.fronts import QUERIES
    from besiege.audit.plan import radius
    from besiege.cli import terminal
    from besiege.core.method import configured, make, method
    from besiege.core.threat import INF, Ball
    from besiege.engine.extraction import steal as run
    from besiege.targets.recipe import open_fit, suits

    found = method(name, ("extraction",))
    given = o.chosen(option or [])
    if queries is not None:
        given["queries"] = str(queries)
    elif not found.card.exact:
        given.setdefault("queries", str(QUERIES[budget]))
    chosen = configured(found, **given)
    if target is None and found.card.exact:
        target = "embedded:digits-mlp"
    spec = fit or "cnn"
    recipe = open_fit(spec, trust_code=how.trust_code)
    victim, pool, judged = _opened(how, target, data, test, limit)
    if not found.card.exact:
        suits(recipe, victim.shape, victim.classes)
    o.warned(victim, judged)
    with terminal.progress() as bar:
        task = bar.add_task(str(chosen), total=int(chosen.arguments["queries"]))
        stolen, theft = run(
            chosen,
            victim,
            pool,
            judged,
            recipe,
            seed=how.seed,
            probe=make("pgd"),
            ball=Ball(INF, radius(INF, victim.shape)),
            progress=lambda rows: bar.advance(task, rows),
        )
    if out is not None:
        from besiege.results import files
        from besiege.targets.stolen import Layout, keep

        layers = None if theft.layers is None else tuple(theft.layers)
        built = Layout(shape=victim.shape, classes=victim.classes, recipe="" if layers else spec, layers=layers)
        keep(stolen.module, built, out)
        files.write(out / "record.json", theft.json_text())
    if json:
        typer.echo(theft.model_dump_json())
    else:
        _print(theft, out)


def _opened(
    how: o.How, target: str | None, data: str | None, test: str | None, limit: int | None
) -> tuple[Target, Images, Images]:
    """The classifier, the images to ask about and those to judge by, a fifth of the former where none are named.

    Labels of a pool are not looked at: it may hold other classes than the target knows.
    """
    wanted = how.expects(target)
    if data is None:
        data, test = POOL, test or wanted.data
    pool = how.images(data, limit=limit, size=wanted.size, channels=wanted.channels)
    if test is None:
        pool, judged = o.held_out(pool, how.seed)
    else:
        judged = how.images(test, size=pool.shape[1:], channels=pool.shape[0])
    victim = how.target(target, judged)
    return victim, pool.to(victim.device), judged.to(victim.device)


def _print(theft: Theft, out: Path | None) -> None:
    from besiege.cli.terminal import between, facts, figure, percent

    pairs = [
        ("target", f"{theft.target} ({theft.fingerprint})" if theft.fingerprint else theft.target),
        ("asked about", theft.asked_of),
        ("judged on", f"{theft.data}, {theft.n} images"),
        ("queries", f"{theft.queries:,}"),
        ("stolen", f"dense, {'-'.join(map(str, theft.layers))}" if theft.layers else theft.fit),
        (
            "accuracy",
            f"{percent(theft.accuracy)} of the stolen model ({between(theft.accuracy_interval)}), "
            f"{percent(theft.target_accuracy)} of the target; ratio {percent(theft.accuracy_ratio)}",
        ),
        ("agreement", f"{percent(theft.agreement)}  ({between(theft.agreement_interval)})"),
        ("largest difference", f"{figure(theft.max_difference)} standard deviations of the scores"),
        *([("transfer", _transfer(theft))] if theft.transfer_eps is not None else []),
        ("query monitor", _monitor(theft)),
        ("time", f"{theft.seconds:.1f} s"),
        *(("note", note) for note in theft.notes),
    ]
    if out is not None:
        pairs.append(("written to", f"{out}; attack with --lens surrogate:stolen:{out}"))
    facts(f"{theft.title} of {theft.target}", pairs)


def _transfer(theft: Theft) -> str:
    """What attacks made on the stolen model do to the target."""
    from besiege.cli.terminal import between, percent
    from besiege.results.record import ball_text

    held = "" if theft.transfer_interval is None else f" ({between(theft.transfer_interval)})"
    return (
        f"{percent(theft.transfer_success)}{held} of the target's images fall to PGD on the stolen model at "
        f"{ball_text('linf', theft.transfer_eps)}; to noise {percent(theft.transfer_noise)}"
    )


def _monitor(theft: Theft) -> str:
    from besiege.cli.terminal import percent

    first = "no alarm" if theft.first_alarm is None else f"the first alarm at query {theft.first_alarm:,}"
    return (
        f"alarm in {percent(theft.alarm_rate)} of its tests over {theft.watched:,} queries, {first}; on the images "
        f"to judge by {percent(theft.alarm_rate_benign)}"
    )
