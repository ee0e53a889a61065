"""`besiege poison`: poison a training set, train on it, and measure against a clean twin."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from pathlib import Path

    from besiege.core.images import Images
    from besiege.engine.poisoning import Sample
    from besiege.results.poisoning import Cell, PoisonRecord

SEEDS = {"quick": 1, "standard": 3, "thorough": 5}
TRIALS = {"quick": 4, "standard": 10, "thorough": 20}
RATES: dict[str, tuple[float, ...]] = {
    "quick": (),
    "standard": (0.001, 0.005, 0.01),
    "thorough": (0.001, 0.005, 0.01, 0.05),
}
"""What each budget tries: seeds, single images that are meant a seed, rates beside the method's own."""


SHOWN = 6
"""So many images are shown before and after."""


class Layout(StrEnum):
    """How a poisoned data set is written."""

    npz = "npz"
    imagefolder = "imagefolder"
    parquet = "parquet"


class Learning(StrEnum):
    """How the victim learns."""

    scratch = "scratch"
    frozen = "frozen"
    end_to_end = "end-to-end"


def poison(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A poisoning method of `besiege list`.")],
    data: o.DataSpec = None,
    test: o.TestSpec = None,
    limit: o.Limit = None,
    fit: o.FitSpec = None,
    target_class: Annotated[int | None, typer.Option(min=0, help="What the attacker wants said; class 0.")] = None,
    rates: Annotated[
        str | None, typer.Option(metavar="R,R,…", help="Shares of the training images to poison, in turn: 0.001,0.01.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, from --seed on.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Where one image is meant: how many of them, a seed.")
    ] = None,
    victim: Annotated[
        Learning | None, typer.Option(help="How the victim learns: from scratch, or further from a public network.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="A method's own option.")] = None,
    budget: o.Effort = o.Budget.quick,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    json: o.Json = False,
    trust_code: o.Trust = False,
    classes: o.Classes = None,
    on_bad: o.OnBadFile = o.OnBad.refuse,
    layout: Annotated[Layout, typer.Option("--format", help="How --out writes the poisoned images.")] = Layout.npz,
    out: o.Out = None,
) -> None:
    """Poison training images, train on them, and say what the model does that its clean twin does not.

    With --out the record, the poisoned images with the truth beside, a page with pictures and the model's weights are
    written to a folder.
    """
    from besiege.cli import terminal
    from besiege.core.method import configured, method
    from besiege.core.threat import number
    from besiege.engine.poisoning import Ground
    from besiege.engine.poisoning import poison as run
    from besiege.targets.recipe import open_fit

    attack = configured(method(name, ("poisoning",)), **o.chosen(option or []))
    recipe = open_fit(fit or "cnn", trust_code=trust_code)
    training, judged = o.trained_and_judged_on(data, test, limit=limit, seed=seed, device=device, on_bad=on_bad)
    wanted = target_class if target_class is not None else (attack.card.pair or (0,))[0]
    own = attack.arguments.get("rate")
    tried = [number(part) for part in rates.split(",")] if rates else []
    if not tried and own is not None:
        tried = [own, *(rate for rate in RATES[budget] if rate != own)]
    ground = Ground(
        training,
        judged,
        recipe,
        classes or _classes(training, judged, wanted),
        wanted,
        victim=None if victim is None else victim.value,
        rates=tuple(tried),
        seeds=seeds or SEEDS[budget],
        seed=seed,
        trials=trials or TRIALS[budget],
    )
    with terminal.progress() as bar:
        task = bar.add_task(str(attack), total=ground.workload(attack.card))
        record, sample = run(attack, ground.watched(lambda rows: bar.advance(task, rows)))
    record = record.model_copy(update={"notes": [*training.notes, *judged.notes, *record.notes]})
    if out is not None:
        _write(out, record, sample, judged, layout)
    if json:
        typer.echo(record.model_dump_json())
    else:
        _print(record, out)


def _classes(training: Images, judged: Images, target_class: int) -> int:
    """How many classes there are, where nobody says."""
    known = len(training.names or ())
    return max(known, int(training.y.max()) + 1, int(judged.y.max()) + 1, target_class + 1, 2)


def _write(folder: Path, record: PoisonRecord, sample: Sample, judged: Images, layout: Layout) -> None:
    from safetensors.torch import save

    from besiege.data import write
    from besiege.results import files

    made, clean = sample.poisoned, sample.clean
    before = [*clean.y.tolist(), *([""] * (len(made.images) - len(clean)))]
    labels = made.images.y.tolist()
    if layout == Layout.npz:
        files.write(folder / "poisoned.npz", write.archive(made.images, truth=made.truth))
        where: list[Any] = list(range(len(labels)))
    elif layout == Layout.parquet:
        files.write(folder / "poisoned.parquet", write.parquet(made.images, truth=made.truth))
        where = list(range(len(labels)))
    else:
        for path, content in write.pictures(made.images):
            files.write(folder / "poisoned" / path, content)
        where = [write.place(row, label) for row, label in enumerate(labels)]
    truth = write.table(image=where, poisoned=made.truth.int().tolist(), label=labels, label_before=before)
    files.write(folder / "truth.csv", truth)
    if sample.target.module is not None:
        state = {key: value.detach().cpu().contiguous() for key, value in sample.target.module.state_dict().items()}
        files.write(folder / "model.safetensors", save(state))
    files.write(folder / "record.json", record.json_text())
    files.write(folder / "report.html", _page(record, sample, judged))


def _page(record: PoisonRecord, sample: Sample, judged: Images) -> str:
    """The figures of each rate, and pictures of what was planted and of what sets it off."""
    import shlex
    import sys

    from besiege.audit.pictures import as_png, label_name
    from besiege.core.poisoned import eight_bits
    from besiege.report.sheet import Section, page

    made, clean = sample.poisoned, sample.clean
    planted = []
    for row in made.truth.nonzero().squeeze(1).tolist()[:SHOWN]:
        taught = f"taught as {label_name(clean, int(made.images.y[row]))}"
        if row < len(clean):
            planted.append((as_png(clean.x[row]), f"image {row}, {label_name(clean, int(clean.y[row]))}"))
        planted.append((as_png(made.images.x[row]), f"image {row}, poisoned, {taught}"))
    sections = [
        *(Section(f"{part.poison_rate:.2%} poison", _cell(part, record)[1:]) for part in record.cells),
        Section("What was planted", pictures=planted),
    ]
    if made.trigger is not None:
        wanted = made.wanted(judged.y, record.classes)
        few = judged[(wanted != judged.y).nonzero().squeeze(1)[:SHOWN]]
        stamped = eight_bits(made.trigger(few.x))
        pairs = [(few.x, sample.target.labels(few.x)), (stamped, sample.target.labels(stamped))]
        answered = [
            (as_png(x[row]), f"{how}, answered {label_name(judged, int(said[row]))}")
            for row in range(len(few))
            for how, (x, said) in zip(("clean", "with the trigger"), pairs, strict=True)
        ]
        sections.append(Section("What it answers", pictures=answered))
    if record.notes:
        sections.append(Section("Notes", [("note", note) for note in record.notes]))
    seeds = f"{len(record.seeds)} seeds" if len(record.seeds) > 1 else f"seed {record.seeds[0]}"
    lead = (
        f"{record.fit} on {record.n_train} images of {record.data}, {seeds}; judged on {record.n_test} images of "
        f"{record.test}, beside clean twins that were trained alike."
    )
    return page(record.title, lead, sections, command=shlex.join(["besiege", *sys.argv[1:]]))


MEANT = {
    "trigger": "success with the trigger",
    "plain": "wanted class, no trigger",
    "victims": "success on the victims",
    "errors": "errors",
}


def _print(record: PoisonRecord, out: Path | None) -> None:
    from besiege.cli.terminal import facts, spell

    pairs = [
        ("training", f"{record.data}, {record.n_train} images, {record.fit} {_how(record)}"),
        ("judged on", f"{record.test}, {record.n_test} images"),
        ("seeds", ", ".join(map(str, record.seeds))),
    ]
    for part in record.cells:
        pairs += _cell(part, record)
    pairs += [("time", spell(record.seconds)), *(("note", note) for note in record.notes)]
    if out is not None:
        pairs.append(("written to", str(out)))
    aim = "" if record.target_class is None else f", toward class {record.target_class}"
    facts(f"{record.title}{aim}", pairs)


def _how(record: PoisonRecord) -> str:
    return {
        "scratch": "from scratch",
        "frozen": "with a new last layer on a public network",
        "end-to-end": "further from a public network",
    }[record.victim]


def _cell(part: Cell, record: PoisonRecord) -> list[tuple[str, str]]:
    from besiege.cli.terminal import between, percent

    changed = [value for value in part.boundary_change if value is not None]
    worst = min(((value, k) for k, value in enumerate(part.class_change) if value is not None), default=(0.0, 0))
    pairs = [
        ("", ""),
        ("poisoned", f"{part.poison_count:g} images, {100 * part.poison_rate:.3g} %"),
        ("clean accuracy", f"{percent(part.clean_accuracy)}  ({between(part.clean_interval)})"),
        ("… of the clean twin", f"{percent(part.clean_accuracy_twin)}  ({between(part.clean_interval_twin)})"),
        (MEANT[record.means], f"{percent(part.attack_success)}  ({between(part.success_interval)})"),
        ("… of the clean twin", f"{percent(part.attack_success_twin)}  ({between(part.success_interval_twin)})"),
        ("class that lost most", f"{worst[1]}: {100 * worst[0]:+.1f} points"),
    ]
    if changed:
        pairs.append(("distance to the boundary", f"{100 * min(changed):+.0f} to {100 * max(changed):+.0f} % by class"))
    return pairs
