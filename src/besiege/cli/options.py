"""The options that commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from besiege.core.errors import BadInput

if TYPE_CHECKING:
    from besiege.core.images import Images
    from besiege.core.target import Target
    from besiege.core.threat import Norm
    from besiege.targets import Preprocessing
    from besiege.targets.open import Expected

Result = TypeVar("Result")


class Budget(StrEnum):
    """How much effort to spend."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


class OnBad(StrEnum):
    """What to do with files that are no pictures."""

    refuse = "refuse"
    skip = "skip"


def there(device: str) -> str:
    """A device that can be computed on."""
    if device != "cpu":
        from besiege.targets.open import device_of

        device_of(device)
    return device


def writable(folder: Path | None) -> Path | None:
    """A folder that can be written to, or made; said before the work is done."""
    at = folder
    while at is not None and not at.exists() and at != at.parent:
        at = at.parent
    if at is not None and not at.is_dir():
        raise BadInput(f"cannot write to {folder}: {at} is a file, not a folder")
    if at is not None and not os.access(at, os.W_OK):
        raise BadInput(f"cannot write to {folder}: it is not allowed in {at}")
    return folder


TargetSpec = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET", help="The classifier: pkg.module:factory, an ONNX file, hf:NAME, an address; else embedded."
    ),
]
DataSpec = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help="The images: .npz, idx files, a folder; embedded digits.")
]
Limit = Annotated[int | None, typer.Option("-n", "--limit", min=1, help="Take this many images.")]
Seed = Annotated[int, typer.Option(min=0, help="Where all random draws start.")]
Device = Annotated[str, typer.Option(callback=there, help="cpu, cuda or cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Trust = Annotated[bool, typer.Option("--trust-code", help="Allow files that run code when they are opened.")]
Weights = Annotated[str | None, typer.Option(metavar="FILE", help="Weights to put into what the factory builds.")]
Classes = Annotated[int | None, typer.Option(min=2, help="How many classes it tells apart, where that does not show.")]
OnBadFile = Annotated[OnBad, typer.Option("--on-bad", help="What to do with images that cannot be read.")]
Mean = Annotated[
    str | None, typer.Option(metavar="M[,M,M]", help="What the classifier subtracts from pixels in [0, 1].")
]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="What it divides them by afterwards.")]
Batch = Annotated[int | None, typer.Option(min=1, help="How many images the classifier takes at once.")]
FitSpec = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="FIT",
        help="How models are trained: softmax, mlp, cnn, small-cnn, resnet9, or pkg.module:factory of a Fit.",
    ),
]
TestSpec = Annotated[
    str | None, typer.Option("--test", metavar="DATA", help="Images to judge on; else a fifth of --data.")
]
MembersSpec = Annotated[
    str | None, typer.Option("--members", metavar="DATA", help="Images that the target was trained on.")
]
OthersSpec = Annotated[
    str | None, typer.Option("--nonmembers", metavar="DATA", help="Images of the same kind that it was not trained on.")
]
Out = Annotated[Path | None, typer.Option(metavar="FOLDER", callback=writable, help="Where to write.")]
Effort = Annotated[Budget, typer.Option(help="How much effort to spend.")]


@dataclass(frozen=True)
class How:
    """How a TARGET and images are opened: the options of every command that takes one."""

    seed: Seed = 0
    device: Device = "cpu"
    trust_code: Trust = False
    weights: Weights = None
    mean: Mean = None
    std: Std = None
    classes: Classes = None
    batch: Batch = None
    on_bad: OnBadFile = OnBad.refuse

    def preprocessing(self) -> Preprocessing | None:
        """What --mean and --std say; None where they say nothing."""
        if self.mean is None and self.std is None:
            return None
        from besiege.targets import Preprocessing

        return Preprocessing(mean=_numbers(self.mean), std=_numbers(self.std))

    def expects(self, target: str | None) -> Expected:
        """The images that a TARGET takes, as far as its spec says so."""
        from besiege.targets import expects

        return expects(target, preprocessing=self.preprocessing(), weights=self.weights)

    def images(
        self, data: str, *, limit: int | None = None, size: Sequence[int] | None = None, channels: int | None = None
    ) -> Images:
        """The images of a spec, in a size and number of channels where these are given."""
        from besiege.data import open_images

        size = None if size is None else (size[0], size[1])
        found = open_images(data, limit=limit, seed=self.seed, size=size, channels=channels, on_bad=self.on_bad.value)
        return found.to(self.device)

    def target(self, target: str | None, images: Images) -> Target:
        """The classifier of a spec, to be fed with ``images``."""
        from besiege.targets import open_target

        return open_target(
            target,
            data=images,
            device=self.device,
            trust_code=self.trust_code,
            preprocessing=self.preprocessing(),
            classes=self.classes,
            batch=self.batch,
            weights=self.weights,
        )

    def both(self, target: str | None, data: str | None, limit: int | None) -> tuple[Target, Images]:
        """The classifier and the images that the specs name, on one device and fitting each other."""
        wanted = self.expects(target)
        images = self.images(data or wanted.data, limit=limit, size=wanted.size, channels=wanted.channels)
        found = self.target(target, images)
        return found, images.to(found.device)


def opening(command: Callable[..., Result]) -> Callable[..., Result]:
    """``command`` with the options of `How` on the command line, in the place of its parameter ``how``."""
    hints, own = get_type_hints(command, include_extras=True), get_type_hints(How, include_extras=True)
    parameters = []
    for parameter in signature(command).parameters.values():
        if parameter.name == "how":
            parameters += [
                Parameter(part.name, Parameter.KEYWORD_ONLY, default=part.default, annotation=own[part.name])
                for part in fields(How)
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**given: Any) -> Result:
        how = How(**{part.name: given.pop(part.name) for part in fields(How)})
        return command(**given, how=how)

    run.__annotations__ = {part.name: part.annotation for part in parameters}
    run.__dict__["__signature__"] = Signature(parameters)
    return run


def trained_and_judged_on(
    data: str | None, test: str | None, *, limit: int | None, seed: int, device: str, on_bad: OnBad
) -> tuple[Images, Images]:
    """Images to train on and others to judge by: of two sets, or of one of which a fifth, drawn by the seed, judges.

    Without any they are the training and the test part of the embedded digits; ``limit`` is for the first.
    """
    from besiege.data import open_images

    if data is None:
        data, test = "embedded:digits-train", test or "embedded:digits"
    images = open_images(data, limit=limit, seed=seed, on_bad=on_bad.value).to(device)
    if test is not None:
        return images, open_images(test, size=images.shape[1:], channels=images.shape[0], seed=seed).to(device)
    return held_out(images, seed)


def held_out(images: Images, seed: int) -> tuple[Images, Images]:
    """Four fifths of a set, and the fifth that was drawn by the seed to judge by."""
    import torch

    if len(images) < 10:
        raise BadInput(f"{images.name}: {len(images)} images are too few to train on and to judge by")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.x.device)
    held = len(images) // 5
    return images[order[held:].sort().values], images[order[:held].sort().values]


def several(images: Images) -> int:
    """How many classes there are in a set to train on.

    Raises:
        BadInput: one alone.
    """
    if int(images.y.min()) == int(images.y.max()):
        raise BadInput(f"{images.name}: all images are of class {int(images.y.max())}; to train takes two classes")
    return int(images.y.max()) + 1


def warned(target: Target, images: Images) -> list[str]:
    """What should be known before hours are spent; said on stderr as well."""
    from besiege.targets.check import feeding_warning

    warning = feeding_warning(target, images)
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    return [warning] if warning else []


def _numbers(text: str | None) -> tuple[float, ...]:
    from besiege.core.threat import number

    return () if text is None else tuple(number(part) for part in text.split(","))


def norm(text: str) -> Norm:
    """``inf``, ``linf``, ``2``, ``l2``, …: the norm as a number; a region by its name."""
    from besiege.core.threat import NORM_NAMES

    wanted = text.strip().lower()
    for value, name in NORM_NAMES.items():
        if wanted in (name, name.removeprefix("l")):
            return value
    raise BadInput(f"--norm {text!r} is unknown; use one of inf, 2, 1, 0, wasserstein, spatial, color")


def chosen(options: Sequence[str]) -> dict[str, str]:
    """``key=value`` pairs as a dictionary."""
    pairs = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"-o takes key=value, not {option!r}")
        pairs[key.strip().replace("-", "_")] = value.strip()
    return pairs
