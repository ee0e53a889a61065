"""`besiege attack`: one method on one target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from besiege.audit.plan import Budget
    from besiege.core.images import Images
    from besiege.core.method import Attack
    from besiege.core.threat import Access, ThreatModel
    from besiege.engine.evasion import Lensing, Outcome
    from besiege.results.record import Record

IMAGES = {"quick": 20, "standard": 100, "thorough": 1000}


@o.opening
def attack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method of `besiege list`, or several in turn: a|b.")],
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    limit: o.Limit = None,
    eps: Annotated[str | None, typer.Option(help="The radius in pixels of [0, 1], for example 8/255.")] = None,
    after: Annotated[
        str | None, typer.Option(metavar="REGION", help="How far the first of a chain goes: spatial:1 for spatial|pgd.")
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="The norm of the radius: inf, 2, 1, 0, wasserstein, spatial or color.")
    ] = None,
    target_class: Annotated[int | None, typer.Option(min=0, help="Reach this class, not just any other.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="At most this many forward passes an image.")] = None,
    lens: Annotated[
        str | None,
        typer.Option(
            metavar="LENS",
            help="Where gradients come from: nes or spsa (scores), eot (a mean of 10), surrogate:TARGET, "
            "transfer:TARGET (asks the victim at every step).",
        ),
    ] = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="A method's own option.")] = None,
    budget: o.Effort = o.Budget.quick,
    json: o.Json = False,
    out: o.Out = None,
    *,
    how: o.How,
) -> None:
    """Attack a classifier with one method and say how many images fell.

    With --out the record and the adversarial images are written to a folder.

    Methods that seek the nearest adversarial image need no --eps: what they find counts at any distance then.
    """
    import torch

    from besiege.audit.plan import passes
    from besiege.audit.run import STARTS, TRAINING, sample
    from besiege.cli import terminal
    from besiege.engine.summary import siege

    chosen, asked = _chosen(name, o.chosen(option or []), budget.value, queries)
    n, fitted = limit or IMAGES[budget], TRAINING if chosen.card.kind == "universal" else 0
    victim, images = how.both(target, data, n + fitted)
    o.warned(victim, images)
    training = None
    if fitted:
        rows = sample(len(images), n, how.seed).to(images.x.device)
        rest = torch.ones(len(images), dtype=torch.bool, device=images.x.device).index_fill(0, rows, False)
        images, training = images[rows], images[rest]
    threat = replace(_threat(chosen, eps, norm, after, victim.shape), queries=asked)
    through, access = _through(lens, chosen, images, how.device) if lens else (None, threat.access)
    threat = replace(threat, access=access)
    with terminal.progress() as bar:
        total = len(images) * (threat.queries or passes(chosen))
        task = bar.add_task(str(chosen), total=total)
        outcome, _, record = siege(
            chosen,
            victim,
            images,
            threat,
            seed=how.seed,
            target_class=target_class,
            lens=through,
            training=training,
            starts=images.sample(STARTS, how.seed).x,
            progress=lambda rows: bar.advance(task, rows),
        )
    record = record.model_copy(update={"notes": [*victim.notes, *images.notes, *record.notes]})
    if lens:
        record = record.model_copy(
            update={"title": f"{record.title} through {lens}", "options": {**record.options, "lens": lens}}
        )
    if out is not None:
        _write(out, record, outcome)
    if json:
        typer.echo(record.model_dump_json())
    else:
        _print(record, out)


def _chosen(name: str, options: dict[str, str], budget: Budget, queries: int | None) -> tuple[Attack, int | None]:
    """The attack, each part of a union with its share of the budget, and how many queries an image it may spend.

    Where the queries of one part are limited, so are those of the whole: the others get what they need. The two
    halves of a chain have as many each.
    """
    from besiege.audit.plan import paced, passes, share
    from besiege.core.method import make, parts_of, union

    parts, limits = [], []
    for found, own in parts_of(name, options):
        given = share(found.card, budget)
        parts.append(make(found.card.name, **{**paced(found.card, given.options, queries or given.queries), **own}))
        limits.append(given.queries)
    needs, whole = [limit or passes(part) for limit, part in zip(limits, parts, strict=True)], union(*parts)
    total = 2 * max(needs) if whole.card.kind == "chain" else sum(needs)
    return whole, queries or (total if any(limits) else None)


def _through(lens: str, attack: Attack, images: Images, device: str) -> tuple[Lensing, Access]:
    """How an attack's gradients are found, and what that needs of the target."""
    from besiege.core.errors import BadInput
    from besiege.core.lens import Eot, Nes, Spsa, Surrogate, Transfer
    from besiege.core.threat import Access
    from besiege.targets import open_target

    if attack.card.access < Access.GRADIENTS:
        raise BadInput(f"{attack.name} asks for no gradients; leave --lens out")
    name, _, spec = lens.partition(":")
    if name in ("surrogate", "transfer") and spec:
        other = open_target(spec, data=images, device=device)
        if other.access < Access.GRADIENTS:
            raise BadInput(f"--lens {lens!r}: {other.name} gives no gradients")
        kind = Surrogate if name == "surrogate" else Transfer
        return lambda meter, x, rng: kind(meter, other, x), Access.LABELS
    if lens == "nes":
        return lambda meter, x, rng: Nes(meter, rng), Access.SCORES
    if lens == "spsa":
        return lambda meter, x, rng: Spsa(meter, rng), Access.SCORES
    if lens == "eot":
        return lambda meter, x, rng: Eot(meter, rng), Access.GRADIENTS
    raise BadInput(f"--lens {lens!r} is unknown; use nes, spsa, eot, surrogate:TARGET or transfer:TARGET")


def _threat(
    attack: Attack, eps: str | None, norm: str | None, after: str | None, shape: tuple[int, int, int]
) -> ThreatModel:
    """What the command line says, and custom where it says nothing."""
    from besiege.audit.plan import radius
    from besiege.core.errors import BadInput
    from besiege.core.threat import INF, ThreatModel, number
    from besiege.regions import parse, within

    works = attack.card.norms
    p = o.norm(norm) if norm is not None else next((p for p in (INF, 2.0) if p in works), works[0])
    if eps is not None:
        size = number(eps)
        if not 0 < size < INF:
            raise BadInput(f"--eps must be above 0 and finite, not {eps}")
    else:
        size = INF if attack.card.seeks == "minimum" else radius(p, shape)
    first = None
    if attack.card.after:
        first = parse(after) if after else within(attack.card.after[0], radius(attack.card.after[0], shape))
        if first.norm not in attack.card.after:
            raise BadInput(f"--after {after!r} is no region that {attack.name} begins in")
    elif after:
        raise BadInput(f"{attack.name} is no chain; leave --after out")
    return ThreatModel(attack.card.access, within(p, size), after=first)


def _write(folder: Path, record: Record, outcome: Outcome) -> None:
    from safetensors.torch import save

    from besiege.results import files

    tensors: dict[str, Any] = {"adv": outcome.adv, "index": outcome.index, "label": outcome.label}
    files.write(folder / "adversarial.safetensors", save({k: v.cpu().contiguous() for k, v in tensors.items()}))
    files.write(folder / "record.json", record.json_text())


def _fitting(record: Record) -> str:
    """What was spent before the first image was attacked."""
    passes = f"{record.setup_forward:,} forward, {record.setup_backward:,} backward"
    return f"{passes} in all; {record.setup_seconds:.1f} s"


def _print(record: Record, out: Path | None) -> None:
    from besiege.cli.terminal import between, facts, figure, percent

    pairs = [
        ("target", f"{record.target} ({record.fingerprint})" if record.fingerprint else record.target),
        ("data", f"{record.data}, {record.n} images, {record.attacked} attacked"),
        ("threat", str(record.threat) + (f", {record.threat.queries} queries" if record.threat.queries else "")),
        ("clean accuracy", percent(record.clean_accuracy)),
        ("success", f"{percent(record.success_rate)}  ({between(record.success_interval)})"),
        ("robust accuracy", f"{percent(record.robust_accuracy)}  ({between(record.robust_interval)})"),
        ("success in 8 bits", percent(record.success_rate_8bit)),
        ("noise as large", percent(record.noise_success_rate)),
        ("distance", f"median {figure(record.median_distance)}, mean {figure(record.mean_distance)}"),
        (
            "passes an image",
            f"{record.forward_per_image:.1f} forward, {record.backward_per_image:.1f} backward"
            + (f"; {record.queries_median:g} to fall (median)" if record.queries_median is not None else ""),
        ),
        ("time", f"{record.seconds:.1f} s"),
        *([("fitting", _fitting(record))] if record.setup_seconds else []),
        ("verified", "every success" if record.verified else "NOT every success; see the record"),
        *(("note", note) for note in record.notes),
    ]
    if out is not None:
        pairs.append(("written to", str(out)))
    facts(f"{record.title} on {record.target}", pairs)
