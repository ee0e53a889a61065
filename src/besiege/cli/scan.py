"""`besiege scan`: look for poison in training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besiege.cli import options as o
from besiege.core.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from markupsafe import Markup

    from besiege.core.images import Images
    from besiege.core.method import Attack
    from besiege.core.suspicion import Suspicion
    from besiege.engine.scan import Suspected
    from besiege.results.scan import Scan, Suspects

ALL = ("spectral-signatures", "activation-clustering", "activation-patterns", "strip")
OF_A_MODEL = ("activation-patterns", "strip", "sentinet")
TRUTH = "truth"
SHOWN, BINS, DOTS = 12, 40, 1000
"""So many pictures, bars and points are drawn for a detector."""


@o.opening
def scan(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA|TARGET", help="The images to search, or a trained network alone; else embedded."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="TARGET", help="A network that was trained on them; else --fit trains one.")
    ] = None,
    detector: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A detector of `besiege list`, several if repeated.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", metavar="DATA", help="Clean images to calibrate and judge by; else a fifth.")
    ] = None,
    poison: Annotated[
        str | None, typer.Option(metavar="NAME", help="Poison the images first by this method, so the truth is known.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="The poisoner's option.")] = None,
    detect: Annotated[
        list[str] | None, typer.Option("-d", metavar="KEY=VALUE", help="An option of every detector that has it.")
    ] = None,
    target_class: Annotated[int, typer.Option(min=0, help="What the poisoner wants said.")] = 0,
    limit: o.Limit = None,
    fit: o.FitSpec = None,
    clean: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what no detector suspects, as an .npz.")
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again without the suspects and judge that.")
    ] = False,
    json: o.Json = False,
    out: o.Out = None,
    *,
    how: o.How,
) -> None:
    """Search training images, or a trained network alone, for poison and name the suspects.

    Without DATA the embedded digits are poisoned by badnets first, so that it shows what the detectors are worth. An
    .npz or .parquet that `besiege poison --out` wrote brings its truth along. With --out the record and a page with
    pictures of the suspects are written to a folder.

    Of a TARGET alone, clean images (--test) calibrate the detectors that need no training data, and tell their false
    alarms; with --poison badnets or blended, they say what the detectors make of that trigger. Activation patterns
    prune what clean images do not use.
    """
    from besiege.cli import terminal
    from besiege.core.method import configured, method
    from besiege.data.open import shows_images
    from besiege.engine.scan import Suspected, at_the_door, planted
    from besiege.engine.scan import scan as run
    from besiege.results import files
    from besiege.targets.recipe import open_fit

    alone = data is not None and not shows_images(data)
    if alone and (model is not None or clean is not None or retrain):
        raise BadInput("a TARGET alone is searched without --model, --clean and --retrain, which are for training data")
    if data is None and poison is None:
        poison = "badnets"
    if option and poison is None:
        raise BadInput("-o is for the poisoner: name one by --poison, or give detectors their options by -d")
    names, wanted = detector or list(OF_A_MODEL if alone else ALL), o.chosen(detect or [])
    detectors = _detectors(names, wanted, alone)
    recipe = open_fit(fit or "cnn", trust_code=how.trust_code)
    if alone:
        probe, held = how.both(data, test, limit)
        if len(held) < 10:
            raise BadInput(f"{held.name}: {len(held)} images are too few to calibrate and to judge by")
        if "sentinet" in names and "samples" not in wanted and len(held) < 200:
            detectors = _detectors(names, {**wanted, "samples": str(len(held) // 4)}, alone)
        images, count = held, probe.classes
    else:
        images, held = o.trained_and_judged_on(
            data, test, limit=limit, seed=how.seed, device=how.device, on_bad=how.on_bad
        )
        probe, count = (
            None,
            how.classes
            or max(len(images.names or ()), int(images.y.max()) + 1, int(held.y.max()) + 1, target_class + 1),
        )
        if model is not None:
            probe = how.target(model, held)
    attack = None if poison is None else configured(method(poison, ("poisoning",)), **o.chosen(option or []))
    if probe is not None and alone:
        suspected = at_the_door(attack, probe, held, count, target_class, how.seed)
    elif attack is not None:
        suspected = planted(attack, images, held, count, target_class, how.seed)
    else:
        suspected = Suspected(images, held, count, _truth(data, images))
    trainings = (probe is None) + (suspected.clean is not None) + (len(detectors) if retrain else 0)
    with terminal.progress() as bar:
        task = bar.add_task(f"scanning {images.name}", total=max(1, trainings) * recipe.epochs * len(images))
        record, found = run(
            detectors,
            suspected,
            recipe,
            model=probe,
            seed=how.seed,
            retrain=retrain,
            progress=lambda rows: bar.advance(task, rows),
        )
    record = record.model_copy(update={"poison": None if attack is None else str(attack)})
    if clean is not None:
        from besiege.data import write

        kept = ~sum((said.suspect.int() for said in found[1:]), found[0].suspect.int()).bool()
        files.write(clean, write.archive(suspected.images[kept]))
    if out is not None:
        files.write(out / "record.json", record.json_text())
        files.write(out / "report.html", _page(record, found, suspected))
    if json:
        typer.echo(record.model_dump_json())
    else:
        _print(record)
        if out is not None:
            typer.echo(f"report: {out / 'report.html'}")


def _detectors(names: list[str], options: dict[str, str], alone: bool) -> list[Attack]:
    """The detectors, each with those of the options that it has; for a network ``alone``, none of training data."""
    from besiege.core.method import configured, method

    found = [method(name, ("data", "input", "model")) for name in dict.fromkeys(names)]
    for key in options:
        if not any(key in part.card.options for part in found):
            raise BadInput(f"-d {key}: none of {', '.join(names)} has that option")
    for part in found:
        if alone and part.card.kind == "data":
            raise BadInput(f"{part.card.name} searches training images; of a TARGET alone use {', '.join(OF_A_MODEL)}")
    own: dict[str, str] = {"mode": "fine-pruning"} if alone else {}
    return [configured(part, **{k: v for k, v in (own | options).items() if k in part.card.options}) for part in found]


def _truth(data: str | None, images: Images) -> torch.Tensor | None:
    """What a file says of its images, where it is one that `besiege poison` wrote."""
    import numpy as np
    import torch

    from besiege.data import parquet

    path = Path((data or "").removeprefix("npz:").removeprefix("parquet:")).expanduser()
    if not path.is_file():
        return None
    told = None
    if path.suffix == ".npz":
        with np.load(path) as archive:
            told = archive[TRUTH] if TRUTH in archive else None
    elif path.suffix == ".parquet":
        told = parquet.column(path, TRUTH)
    if told is None:
        return None
    return torch.as_tensor(np.asarray(told, bool))[images.index.cpu()].to(images.x.device)


def _page(record: Scan, found: Sequence[Suspicion], suspected: Suspected) -> str:
    """Each detector's figures, what it suspects most, and how its scores and the classes lie."""
    import shlex
    import sys

    from besiege.report.sheet import Section, page

    sections = [
        Section(part.title, _found(part)[1:], _pictures(part, suspected), _drawings(part, said, suspected))
        for part, said in zip(record.detectors, found, strict=True)
    ]
    lead = f"{record.n} images and {record.model}, which learned from them: what {len(found)} detectors suspect."
    every = Section("What was searched", [*_about(record), *(("note", note) for note in record.notes)])
    command = shlex.join(["besiege", *sys.argv[1:]])
    return page(f"Poison in {record.data}", lead, [every, *sections], command=command)


def _pictures(part: Suspects, suspected: Suspected) -> list[tuple[bytes, str]]:
    """The most suspect images."""
    from besiege.audit.pictures import as_png, label_name

    place = {number: row for row, number in enumerate(suspected.images.index.tolist())}
    shown = []
    for number in part.suspects[:SHOWN]:
        row = place[number]
        told = "" if suspected.truth is None else ", poisoned" if bool(suspected.truth[row]) else ", clean"
        name = label_name(suspected.images, int(suspected.images.y[row]))
        shown.append((as_png(suspected.images.x[row]), f"image {number}, {name}{told}"))
    return shown


def _drawings(part: Suspects, said: Suspicion, suspected: Suspected) -> list[tuple[Markup, str]]:
    """The scores of all images, and where those of the most suspect class lie."""
    from besiege.report.sheet import histogram, scatter

    bad = said.suspect if suspected.truth is None else suspected.truth
    names = ("not suspect", "suspect") if suspected.truth is None else ("clean", "poisoned")
    score = said.score.cpu().double()
    low, high = float(score.min()), float(score.max())
    groups = [(name, score[rows.cpu()]) for name, rows in zip(names, (~bad, bad), strict=True) if bool(rows.any())]
    counts = [(name, values.histc(BINS, low, high).int().tolist()) for name, values in groups]
    least = float(score[said.suspect.cpu()].min()) if bool(said.suspect.any()) else None
    told = f"Scores of {' (green) and '.join(names)} (red) images, each to its own height; dashed: the least suspect."
    drawn = [(histogram(counts, low, high, least), told)] if high > low else []
    if said.plane is not None and any(part.by_class):
        label = max(range(len(part.by_class)), key=part.by_class.__getitem__)
        own = suspected.images.y == label
        points = [
            (name, [(x, y) for x, y in said.plane[own & rows][:DOTS].tolist()])
            for name, rows in zip(names, (~bad, bad), strict=True)
        ]
        drawn.append(
            (scatter(points), f"The most suspect class, {label}, in the first two directions of its features.")
        )
    return drawn


def _about(record: Scan) -> list[tuple[str, str]]:
    from besiege.cli.terminal import percent

    return [
        ("model", f"{record.model}, clean accuracy {percent(record.clean_accuracy)}"),
        *([("poison", f"{record.poison}, {record.poison_count} of {record.n} images")] if record.poison else []),
        *([("attack success", percent(record.attack_success))] if record.attack_success is not None else []),
    ]


def _print(record: Scan) -> None:
    from besiege.cli.terminal import facts

    pairs = _about(record)
    for part in record.detectors:
        pairs += _found(part)
    pairs += [("note", note) for note in record.notes]
    facts(f"Poison in {record.data}", pairs)


def _found(part: Suspects) -> list[tuple[str, str]]:
    """What one detector says, and what that is worth where it is known."""
    from besiege.cli.terminal import between, figure, percent

    classes = ", ".join(f"{count} in {label}" for label, count in enumerate(part.by_class) if count)
    pairs = [("", ""), (part.detector, f"{part.suspected} of {part.n} images are suspect: {classes or 'none'}")]
    if part.suspects:
        pairs.append(("most suspect", ", ".join(map(str, part.suspects[:12]))))
    if part.tpr is not None and part.tpr_interval is not None and part.tpr_at is not None:
        rates = ", ".join(f"{percent(found)} at {100 * float(rate):g} %" for rate, found in part.tpr_at.items())
        pairs += [
            ("poison found", f"{percent(part.tpr)}  ({between(part.tpr_interval)}), F1 {figure(part.f1)}"),
            ("clean suspected", percent(part.fpr)),
            ("by the score alone", f"AUC {figure(part.auc)}; finds {rates} false alarms"),
        ]
    if part.fpr_clean is not None:
        pairs.append(("of clean data", f"{percent(part.fpr_clean)} are suspect"))
    if part.clean_accuracy_pruned is not None:
        still = "" if part.attack_success_pruned is None else f"; attack success {percent(part.attack_success_pruned)}"
        pairs.append(("pruned", f"clean accuracy {percent(part.clean_accuracy_pruned)}{still}"))
    if part.clean_accuracy_after is not None:
        still = "" if part.attack_success_after is None else f"; attack success {percent(part.attack_success_after)}"
        pairs.append(("trained without them", f"clean accuracy {percent(part.clean_accuracy_after)}{still}"))
    return pairs
