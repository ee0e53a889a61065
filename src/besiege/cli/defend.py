"""`besiege defend`: harden or wrap, then attack again, plainly and by someone who knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besiege.cli import options as o
from besiege.core.errors import BadInput

if TYPE_CHECKING:
    from besiege.audit.plan import Budget as Effort
    from besiege.core.images import Images
    from besiege.core.method import Attack, Card
    from besiege.core.target import Target
    from besiege.core.threat import ThreatModel
    from besiege.engine.defense import Hardened
    from besiege.results.defense import Defense, Row

SENT = {"quick": "pgd,cw-l2", "standard": "pgd,cw-l2,square", "thorough": "fgsm,pgd,apgd,deepfool,cw-l2,ead,square"}
RECIPE = "cnn"


@o.opening
def defend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A defense of `besiege list`.")],
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    test: o.TestSpec = None,
    fit: o.FitSpec = None,
    limit: o.Limit = None,
    attacks: Annotated[str | None, typer.Option(metavar="A,B", help="The attacks; each is sent three times.")] = None,
    eps: Annotated[str | None, typer.Option(help="The radius in pixels of [0, 1], for example 8/255.")] = None,
    norm: Annotated[str | None, typer.Option(help="The norm of the radius: inf, 2, 1 or 0.")] = None,
    target_class: Annotated[int | None, typer.Option(min=0, help="Reach this class, not just any other.")] = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="A defense's own option.")] = None,
    budget: o.Effort = o.Budget.quick,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="Ask this network whether it is the one in --out FOLDER, by its trapdoors."
        ),
    ] = None,
    json: o.Json = False,
    out: o.Out = None,
    *,
    how: o.How,
) -> None:
    """Defend a classifier, then attack it three times: before, without and with knowledge of the defense.

    A defense of the training trains two networks by --fit on --data, without and with it; the others stand before
    TARGET and are calibrated on --data. --limit images of --test, or of a fifth of --data, are attacked.

    With --out the record and the defense are written to a folder, which `defended:FOLDER` opens as a target.
    """
    from besiege.audit.fronts import ATTACKED, radius_of
    from besiege.core.method import GUARDS, configured, method
    from besiege.results import files
    from besiege.targets.defended import Layout, keep

    if verify is not None:
        _verify(name, verify, data, out, json, how)
        return
    found = method(name, tuple(kind for kind in GUARDS if kind != "data"))
    own = o.chosen(option or [])
    trains = found.card.kind == "training"
    if trains and (target or how.weights or how.mean or how.std):
        raise BadInput(f"{name} is in the training: leave TARGET and what belongs to it out and say --fit and --data")
    if not trains and fit is not None:
        raise BadInput(f"{name} trains no classifier: leave --fit out and name a TARGET")
    if trains:
        images, judged = o.trained_and_judged_on(
            data, test, limit=None, seed=how.seed, device=how.device, on_bad=how.on_bad
        )
    else:
        victim, images = how.both(target, data, None)
        o.warned(victim, images)
        images, judged = _apart(images, test, how.seed)
    judged = judged.sample(limit or ATTACKED[budget], how.seed)
    sent = _sent(attacks or _customary(found.card, budget), eps, norm, images.shape, budget.value)
    if "eps" in found.card.options and "eps" not in own:
        own["eps"] = str(radius_of(sent, images.shape))
    defense = configured(found, **own)
    if trains:
        names = images.names
        count = how.classes or (len(names) if names else int(images.y.max()) + 1)
        hardened = _trained(defense, fit or RECIPE, images, how.seed, count, how.trust_code, out)
        layout = Layout(
            defense=name, options=dict(defense.arguments), shape=images.shape, classes=count, fit=fit or RECIPE
        )
    else:
        hardened, fed = _wrapped(defense, victim, images, how.seed), how.preprocessing()
        layout = Layout(
            defense=name,
            options=dict(defense.arguments),
            shape=images.shape,
            classes=victim.classes,
            target=target or victim.name,
            weights=how.weights,
            mean=None if fed is None else fed.mean,
            std=None if fed is None else fed.std,
        )
    record = _measured(defense, hardened, judged, sent, images, how.seed, target_class, budget.value)
    if out is not None:
        files.write(out / "record.json", record.json_text())
        keep(hardened.defended, layout, out)
    if json:
        typer.echo(_json(record))
    else:
        _print(record, out)


def _verify(name: str, deployed: str, data: str | None, out: Path | None, json: bool, how: o.How) -> None:
    """Whether a network that is in use is still the one that was trained."""
    from json import dumps

    from besiege.audit.fronts import ATTACKED
    from besiege.cli.terminal import facts, percent
    from besiege.data import open_images
    from besiege.defenses.training.trapdoor import verify
    from besiege.targets import expects, open_target

    if name != "trapdoor" or out is None:
        raise BadInput(
            "--verify is for trapdoors: besiege defend trapdoor --verify TARGET --out FOLDER, trained before"
        )
    wanted = expects(f"defended:{out}")
    images = open_images(data or wanted.data, limit=ATTACKED["standard"], seed=how.seed, size=wanted.size).to(
        how.device
    )
    kept = open_target(f"defended:{out}", data=images, device=how.device, trust_code=how.trust_code)
    asked = open_target(deployed, data=images, device=how.device, trust_code=how.trust_code)
    found = verify(kept, images, deployed=asked)
    answered, expected = float(found.answered.mean()), float(found.expected.mean())
    if json:
        typer.echo(dumps({"target": asked.name, "intact": found.intact, "answered": answered, "expected": expected}))
    else:
        said = "yes, its trapdoors answer" if found.intact else "no: it was replaced, or trained on until it forgot"
        facts(
            f"Is {asked.name} the network of {out}?",
            [
                ("intact", said),
                ("trapdoors that answer", percent(answered)),
                ("… when it was trained", percent(expected)),
            ],
        )
    if not found.intact:
        raise typer.Exit(1)


def _apart(images: Images, test: str | None, seed: int) -> tuple[Images, Images]:
    """What a defense is calibrated on, and what is attacked."""
    from besiege.data import open_images

    if test is None:
        return o.held_out(images, seed)
    return images, open_images(test, size=images.shape[1:], channels=images.shape[0], seed=seed).to(images.x.device)


def _customary(card: Card, budget: str) -> str:
    """What is sent where the user names nothing: first the universal attacks that a defense is there for."""
    own = [name for name in card.counters if name in ("uap", "targeted-uap")]
    universal = own if not set(card.counters) & set(SENT["thorough"].split(",")) else []
    return ",".join([*universal, SENT[budget]])


def _sent(
    names: str, eps: str | None, norm: str | None, shape: tuple[int, int, int], budget: Effort
) -> list[tuple[Attack, ThreatModel]]:
    """The attacks, each with the radius that the command line says, or the customary one, or none."""
    from besiege.audit.plan import paced, radius, share
    from besiege.core.method import configured, method
    from besiege.core.threat import INF, ThreatModel, number
    from besiege.regions import within

    sent = []
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        found = method(name, ("evasion", "search", "ensemble", "universal"))
        works = found.card.norms
        p = o.norm(norm) if norm is not None else next((p for p in (INF, 2.0) if p in works), works[0])
        if p not in works:
            raise BadInput(f"{name} does not work in --norm {norm}; leave one of them out")
        size = number(eps) if eps is not None else INF if found.card.seeks == "minimum" else radius(p, shape)
        given = share(found.card, budget)
        chosen = configured(found, **paced(found.card, given.options, given.queries))
        sent.append((chosen, ThreatModel(found.card.access, within(p, size), given.queries)))
    if not sent:
        raise BadInput("--attacks names no attack; write for example pgd,cw-l2")
    return sent


def _trained(
    defense: Attack, fit: str, images: Images, seed: int, classes: int, trust_code: bool, out: Path | None
) -> Hardened:
    """Two networks, and how far they are on stderr."""
    from besiege.cli import terminal
    from besiege.engine.defense import trained
    from besiege.targets.recipe import open_fit

    recipe = open_fit(fit, trust_code=trust_code)
    with terminal.progress() as bar:
        task = bar.add_task(f"training {recipe.name} without and with {defense}", total=3 * recipe.epochs * len(images))
        return trained(
            defense,
            recipe,
            images,
            seed,
            classes=classes,
            folder=None if out is None else out / "checkpoints",
            progress=lambda rows: bar.advance(task, rows),
        )


def _wrapped(defense: Attack, victim: Target, images: Images, seed: int) -> Hardened:
    from besiege.cli import terminal
    from besiege.engine.defense import wrapped

    with terminal.progress() as bar:
        bar.add_task(f"calibrating {defense} on {len(images)} images", total=None)
        return wrapped(defense, victim, images, seed)


def _measured(
    defense: Attack,
    hardened: Hardened,
    judged: Images,
    sent: list[tuple[Attack, ThreatModel]],
    calibrated: Images,
    seed: int,
    target_class: int | None,
    budget: Effort,
) -> Defense:
    """All attacks, and which one runs on stderr."""
    from besiege.audit.plan import share
    from besiege.audit.run import STARTS
    from besiege.cli import terminal
    from besiege.core.method import configured, method
    from besiege.engine.defense import measured

    strongest = method("autoattack")
    with terminal.progress() as bar:
        task = bar.add_task("attacking", total=3 * len(sent))

        def tell(what: str) -> None:
            bar.update(task, description=what, advance=1)

        return measured(
            defense,
            hardened,
            judged,
            sent,
            configured(strongest, **share(strongest.card, budget).options),
            calibration=calibrated,
            seed=seed,
            target_class=target_class,
            starts=calibrated.sample(STARTS, seed).x,
            progress=tell,
        )


def _json(record: Defense) -> str:
    """The record, and beside it what the first attack found, as one object."""
    import json

    first, facts = record.rows[0], record.model_dump(mode="json")
    parts = {part: getattr(first, part).model_dump(mode="json") for part in ("undefended", "defended", "adaptive")}
    detected = {} if first.detected is None else {"tpr": first.detected.tpr, "auc": first.detected.auc}
    return json.dumps({**facts, **parts, **detected, "verdict": record.verdict})


def _print(record: Defense, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from besiege.cli.terminal import facts, figure, percent

    table = Table(title=f"{record.title} of {record.target}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("attack", "threat", "before", "after", "by one who knows", "95 %", "rejected", "verdict"):
        table.add_column(column, header_style="dim")
    for row in record.rows:
        table.add_row(*_cells(row))
    Console().print(table)
    pairs = [
        ("data", f"{record.data}: {record.calibrated} to train or calibrate on, {record.judged} others attacked"),
        ("clean accuracy", f"{percent(record.clean_accuracy)} before, {percent(record.clean_accuracy_defended)} after"),
        *([("clean images rejected", percent(record.fpr))] if record.fpr is not None else []),
        ("time of an answer", f"{figure(record.latency_ratio)} times that without"),
        ("setting up", f"{record.setup_seconds:.1f} s"),
        ("verdict", f"{record.verdict}, by {', '.join(dict.fromkeys(row.adaptive_attack for row in record.rows))}"),
        *(("note", note) for note in record.notes),
        *([("written to", f"{out}; open it as defended:{out}")] if out else []),
    ]
    facts("", pairs)


def _cells(row: Row) -> tuple[str, ...]:
    from besiege.cli.terminal import between, percent

    caught = "–" if row.detected is None else percent(row.detected.tpr)
    later = "" if row.detected_adaptive is None else f", then {percent(row.detected_adaptive.tpr)}"
    return (
        row.undefended.attack,
        str(row.undefended.threat),
        percent(row.undefended.success_rate),
        percent(row.defended.success_rate),
        percent(row.adaptive.success_rate),
        between(row.adaptive.success_interval),
        caught + later,
        row.verdict,
    )
