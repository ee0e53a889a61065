"""`besiege infer`: what a classifier gives away of its training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besiege.cli import options as o
from besiege.core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from besiege.core.fit import Fit
    from besiege.core.images import Images
    from besiege.core.method import Attack
    from besiege.core.target import Target
    from besiege.engine.inference import Through
    from besiege.results.inference import Inference

ROWS = 50
"""How many training images the model has of which an informed adversary lacks one."""

DECAY = 0.01
"""The weight decay of that model."""

SHOWN = 20
"""So many images are written as pictures."""

SPENT: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "membership-inference": {"quick": {"shadows": 8}, "thorough": {"shadows": 64}},
    "reconstruction": {"thorough": {"epochs": 200}},
}
"""What a budget changes of a method's defaults, which are what standard takes."""

DEFAULTS = {"model-inversion": "embedded:digits-softmax", "reconstruction": "embedded:digits-cnn"}
"""What a method is run on where no target is named."""

Found = tuple["Inference", dict[str, "Tensor"], dict[str, "Tensor"]]
"""The facts, the tensors that are kept, and the pictures by name."""


@dataclass(frozen=True)
class Given:
    """What the command line says, and how to open it."""

    target: str | None
    data: str | None
    members: str | None
    nonmembers: str | None
    seed: int
    out: Path | None
    fit: Fit
    images: Callable[..., Images]
    victim: Callable[..., Target]
    split: Callable[..., tuple[Images, Images]]
    seen: Callable[[int], None]


@o.opening
def infer(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="membership-inference, model-inversion or reconstruction.")
    ],
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    test: o.TestSpec = None,
    members: o.MembersSpec = None,
    nonmembers: o.OthersSpec = None,
    limit: o.Limit = None,
    fit: o.FitSpec = None,
    lens: Annotated[
        str | None,
        typer.Option(metavar="LENS", help="Where gradients come from: nes or spsa (scores), votes (labels)."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="A method's own option.")] = None,
    budget: o.Effort = o.Budget.quick,
    json: o.Json = False,
    out: o.Out = None,
    *,
    how: o.How,
) -> None:
    """Learn from a classifier what it was trained on, and measure how much that was.

    membership-inference tells --members from --nonmembers of TARGET; without them a model is trained by --fit on one
    half of --data, and the other half are the non-members. model-inversion makes a picture of each class, which a
    model trained by --fit on --data has to recognize. reconstruction rebuilds images from the answers to them; with
    -o mode=informed, training images of a linear model, each from all the others.

    With --out the record, pictures and tensors are written to a folder. Shadow models are kept there too: the same
    command goes on after an interruption.
    """
    from besiege.cli import terminal
    from besiege.core.method import configured, method
    from besiege.targets.recipe import open_fit

    card = method(name, ("inference",)).card
    chosen = configured(method(name), **{**SPENT.get(card.name, {}).get(budget, {}), **o.chosen(option or [])})
    if lens and card.gives != "images":
        raise BadInput(f"{name} asks for no gradients; leave --lens out")
    if (members or nonmembers) and card.gives == "images":
        raise BadInput(f"{name} is not about single images; leave --members and --nonmembers out")
    if test and card.gives == "membership":
        raise BadInput(f"{name} is judged by --members and --nonmembers; leave --test out")
    if card.gives == "inputs" and (nonmembers or (members and chosen.arguments["mode"] != "informed")):
        raise BadInput(f"{name} takes --members with -o mode=informed alone, and --nonmembers never")

    def images(spec: str, like: Images | None = None) -> Images:
        size, channels = (None, None) if like is None else (like.shape[1:], like.shape[0])
        return how.images(spec, limit=limit, size=size, channels=channels)

    def split(data: str | None, test: str | None) -> tuple[Images, Images]:
        return o.trained_and_judged_on(data, test, limit=limit, seed=how.seed, device=how.device, on_bad=how.on_bad)

    with terminal.progress() as bar:
        task = bar.add_task(str(chosen), total=None)
        given = Given(
            target=target,
            data=data,
            members=members,
            nonmembers=nonmembers,
            seed=how.seed,
            out=out,
            fit=open_fit(fit or "cnn", trust_code=how.trust_code),
            images=images,
            victim=how.target,
            split=lambda: split(*_pair(target or DEFAULTS.get(card.name), data, test)),
            seen=lambda rows: bar.advance(task, rows),
        )
        if card.gives == "membership":
            record, tensors, pictures = _membership(chosen, given)
        elif card.gives == "images":
            record, tensors, pictures = _inversion(chosen, given, _through(lens) if lens else None)
        else:
            record, tensors, pictures = _reconstruction(chosen, given)
    if out is not None:
        _write(out, record, tensors, pictures)
    if json:
        typer.echo(record.model_dump_json())
    else:
        _print(record, out)


def _pair(target: str | None, data: str | None, test: str | None) -> tuple[str, str | None]:
    """The images to learn from and those to judge by; the embedded ones that fit the target, for want of others."""
    from besiege.targets import expects

    if data is not None:
        return data, test
    embedded = expects(target).data
    return f"{embedded}-train", test or embedded


def _membership(attack: Attack, given: Given) -> Found:
    """Of the images that the user names, or of a model of the command's own."""
    import torch

    from besiege.core.reference import Reference
    from besiege.engine.inference import infer_membership
    from besiege.targets.recipe import suits

    more, notes = None, []
    if given.members is not None and given.nonmembers is not None:
        inside = given.images(given.members)
        outside = given.images(given.nonmembers, inside)
        more = None if given.data is None else given.images(given.data, inside)
        victim = given.victim(given.target, inside)
    elif given.members or given.nonmembers:
        raise BadInput("--members and --nonmembers go together: give both, or neither")
    elif given.target is not None:
        raise BadInput(f"what {given.target} was trained on is not known: give --members and --nonmembers")
    else:
        every = given.images(given.data or "embedded:digits-train")
        if len(every) < 20:
            raise BadInput(f"{every.name}: {len(every)} images are too few to train on half of them")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(given.seed)).to(every.x.device)
        half, count = len(every) // 2, o.several(every)
        suits(given.fit, every.shape, count)
        inside, outside = every[order[:half].sort().values], every[order[half : 2 * half].sort().values]
        victim = given.fit(inside, given.seed, classes=count, progress=given.seen)
        notes.append(
            f"no members were given: the target is {given.fit.name}, trained here on {half} images of {every.name}, "
            f"and the non-members are {half} others"
        )
    shadowed = attack.arguments["mode"] != "loss"
    knows = Reference(
        victim.shape,
        images=more,
        fit=suits(given.fit, victim.shape, victim.classes) if shadowed else None,
        folder=None if given.out is None else given.out / "shadows",
        progress=given.seen,
    )
    scores, record = infer_membership(attack, victim, inside, outside, knows, seed=given.seed)
    told = torch.arange(len(scores)) < len(inside)
    record = record.model_copy(update={"notes": [*victim.notes, *inside.notes, *notes, *record.notes]})
    return record, {"scores": scores, "member": told}, {}


def _inversion(attack: Attack, given: Given, through: Through | None) -> Found:
    """A picture of every class, recognized by a model that is trained here on the images."""
    import torch

    from besiege.engine.inference import invert
    from besiege.targets.recipe import suits

    training, judged = given.split()
    o.several(training)
    victim = given.victim(given.target or DEFAULTS[attack.name], judged)
    suits(given.fit, victim.shape, victim.classes)
    evaluator = given.fit(training, given.seed + 1, classes=victim.classes, progress=given.seen)
    every = torch.arange(victim.classes, device=judged.x.device)
    made, record = invert(
        attack, victim, every, evaluator, judged, training, seed=given.seed, lens=through, progress=given.seen
    )
    notes = [
        *victim.notes,
        *training.notes,
        f"recognized by {evaluator.name}, trained here on {len(training)} images of {training.name}; distances are to "
        "these, the training images if the target was trained on them",
    ]
    unknown = sorted(set(every.tolist()) - set(training.y.tolist()))
    if unknown:
        notes.append(f"{training.name} has no images of {', '.join(map(str, unknown))}, which so cannot be recognized")
    pictures = {f"class-{label}": image for label, image in zip(every.tolist(), made, strict=True)}
    return record.model_copy(update={"notes": notes}), {"images": made, "classes": every}, pictures


def _reconstruction(attack: Attack, given: Given) -> Found:
    """The images that judge, by a decoder learned on the others; or each training row of a linear model."""
    from besiege.core.reference import Reference
    from besiege.embedded.linear import optimum
    from besiege.engine.inference import reconstruct

    notes: list[str] = []
    if attack.arguments["mode"] == "decoder":
        own, images = given.split()
        victim = given.victim(given.target or DEFAULTS[attack.name], images)
        knows = Reference(victim.shape, own, progress=given.seen)
        notes.append(f"the decoder learned from {len(own)} images of {own.name}; the rebuilt are {len(images)} others")
    else:
        if given.target is not None and given.members is None:
            raise BadInput(
                f"what {given.target} was trained on is not known: give all its training images as --members"
            )
        images = given.images(given.members or given.data or "embedded:digits-train")
        if given.target is not None:
            victim = given.victim(given.target, images)
        else:
            images = images.sample(ROWS, given.seed)
            link, decay = attack.arguments["link"], attack.arguments["decay"] or DECAY
            victim = optimum(images, classes=o.several(images), link=link, decay=decay)
            notes.append(
                f"the target is {victim.name} with weight decay {decay:g}, trained here on {len(images)} images"
            )
        knows = Reference(victim.shape)
    found, record = reconstruct(attack, victim, images, knows, seed=given.seed)
    record = record.model_copy(update={"notes": [*victim.notes, *images.notes, *notes]})
    tensors = {"images": found.x.float(), "labels": found.y, "index": images.index}
    shown = list(zip(images.index.tolist(), images.x, found.x, strict=True))[:SHOWN]
    pictures = {
        f"{what}-{index}": image for index, true, made in shown for what, image in (("true", true), ("rebuilt", made))
    }
    return record, tensors, pictures


def _through(lens: str) -> Through:
    """Where gradients come from, and what that needs of the target."""
    from besiege.core.lens import Nes, Spsa, Votes
    from besiege.core.threat import Access
    from besiege.engine.inference import Through

    known = {
        "nes": Through("nes", lambda meter, x, rng: Nes(meter, rng), Access.SCORES),
        "spsa": Through("spsa", lambda meter, x, rng: Spsa(meter, rng), Access.SCORES),
        "votes": Through("votes", lambda meter, x, rng: Votes(meter, rng), Access.LABELS),
    }
    if lens not in known:
        raise BadInput(f"--lens {lens!r} is unknown; use nes, spsa or votes")
    return known[lens]


def _write(folder: Path, record: Inference, tensors: dict[str, Tensor], pictures: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    from besiege.report import roc
    from besiege.report.pictures import png
    from besiege.results import files
    from besiege.results.inference import Membership

    if isinstance(record, Membership):
        files.write(folder / "roc.svg", roc.svg(record.roc))
    for name, image in pictures.items():
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        files.write(folder / "pictures" / f"{name}.png", png(pixels))
    kind = "scores" if isinstance(record, Membership) else "images"
    files.write(folder / f"{kind}.safetensors", save({k: v.cpu().contiguous() for k, v in tensors.items()}))
    files.write(folder / "record.json", record.json_text())


def _print(record: Inference, out: Path | None) -> None:
    from besiege.cli.terminal import facts

    pairs = [
        ("target", f"{record.target} ({record.fingerprint})" if record.fingerprint else record.target),
        ("data", record.data),
        *_figures(record),
        ("queries", f"{record.queries:,} forward, {record.backward:,} backward, all together"),
        ("time", f"{record.seconds:.1f} s"),
        *(("note", note) for note in record.notes),
    ]
    if out is not None:
        pairs.append(("written to", str(out)))
    facts(f"{record.title} on {record.target}", pairs)


def _figures(record: Inference) -> list[tuple[str, str]]:
    """What was learned, by the kind of it."""
    from besiege.cli.terminal import between, figure, percent
    from besiege.results.inference import Inversion, Membership, Reconstruction

    if isinstance(record, Membership):
        pairs = [
            ("images", f"{record.members} members, {record.nonmembers} others"),
            (
                "accuracy",
                f"{percent(record.member_accuracy)} of members, {percent(record.nonmember_accuracy)} of others",
            ),
            ("AUC", f"{record.auc:.3f}  ({_span(record.auc_interval)})"),
            ("balanced accuracy", percent(record.balanced_accuracy)),
        ]
        for rate, share in record.tpr_at_fpr.items():
            interval = between(record.tpr_at_fpr_interval[rate])
            pairs.append((f"found at FPR {float(rate):.1%}", f"{percent(share)}  ({interval})"))
        if record.unseen is not None:
            unseen = record.unseen
            pairs.append(("unseen by the model", f"AUC {unseen.auc:.3f}  ({_span(unseen.auc_interval)})"))
        return pairs
    if isinstance(record, Inversion):
        return [
            ("recognized", f"{record.recognized} of {record.n}  ({between(record.recognition_interval)})"),
            ("by", f"{record.evaluator}, which is right in {percent(record.evaluator_accuracy)}"),
            ("confidence", f"{percent(record.confidence)} (mean)"),
            (
                "distance",
                f"{figure(record.distance_to_mean)} to the class mean, "
                f"{figure(record.distance_to_nearest)} to the nearest image (L2, mean)",
            ),
            *(
                (
                    f"class {row.label}",
                    f"{percent(row.confidence)}, recognized as {row.recognized_as} "
                    f"({percent(row.evaluator_confidence)})",
                )
                for row in record.classes
            ),
        ]
    assert isinstance(record, Reconstruction)
    return [
        ("images", str(record.n)),
        (
            "mean squared error",
            f"{figure(record.mse)}; {figure(record.ratio)} of the class mean's "
            f"{figure(record.mse_baseline)}; the mean image's is {figure(record.mse_mean_image)}",
        ),
        ("PSNR", f"{record.psnr:.1f} dB (mean)"),
        ("labels right", percent(record.label_accuracy)),
        (
            "relative error",
            f"median {percent(record.relative_error_median)}, most {percent(record.relative_error_max)}",
        ),
    ]


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"
