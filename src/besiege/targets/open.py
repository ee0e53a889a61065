"""A spec string becomes a target."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from besiege.core.errors import BadInput, nearest
from besiege.core.images import Images
from besiege.core.target import Target
from besiege.embedded.networks import NETWORKS
from besiege.targets import embedded
from besiege.targets.callable import from_callable
from besiege.targets.factory import make
from besiege.targets.module import from_module
from besiege.targets.preprocessing import Preprocessing
from besiege.targets.stored import exported, pickled, weights_alone
from besiege.targets.weights import fill

DEFAULT = "embedded:digits-cnn"
FACTORY = re.compile(r"(?P<where>.+?):(?P<name>[A-Za-z_][\w.]*)(@(?P<weights>.+))?")
PICKLES = (".pt", ".pth", ".pkl", ".bin", ".ckpt")


def open_target(
    spec: str | None = None,
    *,
    data: Images | None = None,
    device: torch.device | str = "cpu",
    trust_code: bool = False,
    preprocessing: Preprocessing | None = None,
    classes: int | None = None,
    batch: int | None = None,
    weights: str | None = None,
) -> Target:
    """The classifier that ``spec`` names, asked with a few images of ``data`` whether it is one.

    ``embedded:digits-cnn`` (the default), ``embedded:digits-mlp``, ``-softmax`` or ``-rgb``;
    ``pkg.module:factory`` or ``file.py:factory``, ``@weights.safetensors`` after it or in ``weights``: called
    without arguments, it returns a torch module, a function of images, or a `Target`; ``file.pt2`` of
    ``torch.export``; a whole module pickled as ``file.pt``. The last two and ``file.py`` run code, which
    ``trust_code`` must allow. ``preprocessing`` is otherwise read from ``NAME.toml`` or ``model.toml`` beside the
    weights or the code. What was found out on the way stands in the target's ``notes``.

    Raises:
        BadInput: nothing of that name, code that is not trusted or raises, weights that do not fit, answers that
            are no scores, classes or images that do not fit ``data``.
    """
    spec = spec or DEFAULT
    where, size = _device(device), 64 if batch is None else batch
    if size < 1:
        raise BadInput(f"the batch must be at least 1 image, not {size}")
    kind, _, name = spec.partition(":")
    if kind == "embedded":
        _nothing_else(spec, preprocessing, weights)
        target = embedded.read(name, where, size)
    else:
        found = _find(spec, weights, trust_code)
        if isinstance(found.made, Target):
            _nothing_else(spec, preprocessing, None)
            target = found.made if batch is None else replace(found.made, batch=batch)
        else:
            target = _wrap(spec, found, data, where, preprocessing, classes, size)
    if classes is not None and target.classes != classes:
        raise BadInput(f"{spec} has {target.classes} classes, not {classes}")
    if data is not None:
        _fits(target, data)
    return target


class Expected(NamedTuple):
    """What images a target takes, as far as that shows before it is opened."""

    size: tuple[int, int] | None
    channels: int | None
    data: str


def expects(spec: str | None, *, preprocessing: Preprocessing | None = None, weights: str | None = None) -> Expected:
    """The size and channels to open images in, and the embedded images for want of others.

    Nothing is executed: what shows is an embedded target's shape and what a declaration beside the files says.
    """
    spec = spec or DEFAULT
    kind, _, name = spec.partition(":")
    if kind == "embedded":
        channels, *size = embedded.shape(name)
        return Expected((size[0], size[1]), channels, "embedded:digits-rgb" if channels == 3 else "embedded:digits")
    if preprocessing is None:
        match = FACTORY.fullmatch(spec)
        files = [Path(spec)] if match is None else _files(weights or match["weights"], _code(match["where"]))
        declared = Preprocessing.beside(files)
        preprocessing = declared[0] if declared else Preprocessing()
    coloured = 3 in (len(preprocessing.mean), len(preprocessing.std)) or preprocessing.channels == "bgr"
    return Expected(preprocessing.size, 3 if coloured else None, f"embedded:digits{'-rgb' if coloured else ''}")


class _Found(NamedTuple):
    """What a spec led to: a module, function or target; the files it came from; the shape it is known to take."""

    made: Any
    files: list[Path]
    shape: tuple[int, ...] | None = None


def _find(spec: str, weights: str | None, trust_code: bool) -> _Found:
    match = FACTORY.fullmatch(spec)
    if match is not None:
        if weights is not None and match["weights"] is not None:
            raise BadInput(f"{spec}: weights are named twice, {match['weights']} and {weights}")
        weights = weights or match["weights"]
        made, code = make(match["where"], match["name"], trust_code=trust_code)
        if weights is not None:
            if not isinstance(made, nn.Module):
                raise BadInput(
                    f"{spec} makes a {type(made).__name__}, which takes no weights; only a torch module does"
                )
            fill(made, Path(weights).expanduser())
        return _Found(made, _files(weights, code))
    path = Path(spec).expanduser()
    if weights is not None:
        raise BadInput(f"{spec}: weights need the code that builds the network, as pkg.module:factory")
    if path.suffix == ".pt2":
        made, shape = exported(path, trust_code=trust_code)
        return _Found(made, [path], shape)
    if path.suffix in PICKLES:
        return _Found(pickled(path, trust_code=trust_code), [path])
    if path.suffix == ".safetensors" and path.is_file():
        raise weights_alone(path)
    if path.suffix == ".py" and path.is_file():
        raise BadInput(f"{spec}: name the factory in it too, as {spec}:factory")
    known = [f"embedded:{name}" for name in NETWORKS]
    raise BadInput(f"there is no target {spec!r}; {nearest(spec, known)}; your own is pkg.module:factory or a file")


def _wrap(
    spec: str,
    found: _Found,
    data: Images | None,
    device: torch.device,
    preprocessing: Preprocessing | None,
    classes: int | None,
    batch: int,
) -> Target:
    """A module or function as a target, fed as it is declared to be."""
    notes: tuple[str, ...] = ()
    if preprocessing is None:
        declared = Preprocessing.beside(found.files)
        if declared is not None:
            preprocessing = declared[0]
            notes = (f"it is fed as {declared[1]} says",)
    if not callable(found.made):
        raise BadInput(f"{spec} makes a {type(found.made).__name__}, not a torch module, a function or a Target")
    wrap: Callable[..., Target] = from_module if isinstance(found.made, nn.Module) else from_callable
    target = wrap(
        found.made,
        classes=classes,
        shape=_shape(spec, found, preprocessing or Preprocessing()) if data is None else data.shape,
        name=spec,
        preprocessing=preprocessing,
        batch=batch,
        device=device,
        images=None if data is None else data.x,
    )
    return replace(target, notes=(*notes, *target.notes))


def _shape(spec: str, found: _Found, how: Preprocessing) -> tuple[int, int, int]:
    """Of which shape images are to be, where none are given."""
    if found.shape is not None:
        first, second, third = found.shape
        return (third, first, second) if how.layout == "nhwc" else (first, second, third)
    if how.size is None:
        raise BadInput(f"{spec}: what images it takes does not show; give images, or declare a size beside it")
    layers = found.made.modules() if isinstance(found.made, nn.Module) else ()
    depths = [layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)] + [len(how.mean), len(how.std)]
    return (next((depth for depth in depths if depth in (1, 3, 4)), 3), *how.size)


def _files(weights: str | None, code: Path | None) -> list[Path]:
    """Beside which files a declaration may lie, the weights first."""
    return [path for path in (None if weights is None else Path(weights).expanduser(), code) if path is not None]


def _code(where: str) -> Path:
    """Where the code of ``pkg.module`` or ``file.py`` lies, seen from here."""
    return Path(where) if where.endswith(".py") else Path(f"{where.replace('.', '/')}.py")


def _device(device: torch.device | str) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"device {str(device)!r} is not to be had ({str(error).splitlines()[0][:100]})") from None
    return chosen


def _nothing_else(spec: str, preprocessing: Preprocessing | None, weights: str | None) -> None:
    if preprocessing is not None or weights is not None:
        what = "weights" if preprocessing is None else "preprocessing"
        raise BadInput(f"{spec} is a whole target and takes no {what}")


def _fits(target: Target, data: Images) -> None:
    if data.shape != target.shape:
        given, taken = ("x".join(map(str, shape)) for shape in (data.shape, target.shape))
        raise BadInput(f"{target.name} takes images of {taken} (channels, height, width), but {data.name} has {given}")
    if int(data.y.max()) >= target.classes:
        raise BadInput(
            f"{target.name} answers with {target.classes} classes, but the labels of {data.name} go up to "
            f"{int(data.y.max())}"
        )
