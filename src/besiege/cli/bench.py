"""`besiege bench`: what an attack costs beside the bare model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from besiege.bench.measure import Figures
    from besiege.core.method import Attack
    from besiege.core.threat import Ball


@o.opening
def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method; left out, the table of all and their peers.")
    ] = None,
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    limit: o.Limit = 100,
    threat: Annotated[
        str | None, typer.Option(help="The radius, for example linf:8/255; else what is customary for the images.")
    ] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="At most this many forward passes an image.")] = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="A method's own option.")] = None,
    repeat: Annotated[int, typer.Option(min=1, metavar="LAPS", help="Give medians of this many runs.")] = 3,
    json: o.Json = False,
    *,
    how: o.How,
) -> None:
    """Time an attack on one thread against the floor: the same passes of the bare model.

    Without NAME, in a checkout of the repository, the attacks are raced against those of the peer libraries, all of
    which must be installed (extra `peers`), and docs/benchmarks.md is written; `make bench` does it in one command.
    """
    if name is None:
        typer.echo(_table(limit or 100, repeat), nl=False)
        return
    import torch

    from besiege.bench.measure import Figures, contender, race
    from besiege.core.errors import BadInput
    from besiege.core.method import make
    from besiege.core.threat import ThreatModel
    from besiege.regions import parse

    attack = make(name, **o.chosen(option or []))
    victim, images = how.both(target, data, limit)
    if victim.module is None or victim.call is not victim.module:
        raise BadInput(f"{victim.name} is no plain torch module, so there is no bare model to time it against")
    torch.set_num_threads(1)
    ball = _usual(attack, victim.shape) if threat is None else parse(threat)
    model = ThreatModel(attack.card.access, ball, queries)
    found = race(
        {name: contender(attack, victim, model)},
        victim.module,
        images,
        ball,
        repeat=repeat,
        seeds=(how.seed,),
        tell=lambda line: typer.echo(line, err=True),
    )[name]
    if not isinstance(found, Figures):
        raise BadInput(f"{name} cannot be timed: {found.why}")
    if json:
        from json import dumps

        about = {
            "attack": str(attack),
            "target": victim.name,
            "data": images.name,
            "seed": how.seed,
            "threat": str(ball),
        }
        typer.echo(dumps({**about, "repeat": repeat, **asdict(found)}))
    else:
        _print(f"{attack.card.title} on {victim.name}, {ball}", found)


def _table(images: int, repeat: int) -> str:
    """What the checkout's benchmarks folder measures."""
    from importlib import import_module

    from besiege.core.errors import BadInput

    if not Path("benchmarks/table.py").is_file():
        raise BadInput("the table is measured in a checkout of the repository: go there, or name one attack")
    sys.path.insert(0, str(Path.cwd()))
    command = shlex.join(["besiege", *sys.argv[1:]])
    page: str = import_module("benchmarks.table").table(images=images, repeat=repeat, command=command)
    return page


def _usual(attack: Attack, shape: tuple[int, int, int]) -> Ball:
    from besiege.audit.plan import radius
    from besiege.core.threat import INF
    from besiege.regions import within

    norms = attack.card.norms
    norm = next((p for p in (INF, 2.0) if p in norms), norms[0])
    return within(norm, INF if attack.card.seeks == "minimum" else radius(norm, shape))


def _print(title: str, found: Figures) -> None:
    from besiege.cli.terminal import facts, figure, percent

    best = f"{found.best_floor_ms:.3g} ms at the best batch size, {found.best_batch}"
    facts(
        title,
        [
            ("images", str(found.images)),
            ("time an image", f"{found.cpu_ms:.3g} ms of one thread, {found.wall_ms:.3g} ms by the clock"),
            ("floor", f"{found.floor_ms:.3g} ms for the same passes of the bare model; {best}"),
            ("time / floor", f"{found.overhead:.2f}"),
            ("passes an image", f"{found.forward:.1f} forward, {found.backward:.1f} backward"),
            ("robust accuracy", percent(found.robust_accuracy)),
            ("distance", f"median {figure(found.median_distance)}, mean {figure(found.mean_distance)}"),
        ],
    )
