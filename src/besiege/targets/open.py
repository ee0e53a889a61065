"""A spec string becomes a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from besiege.core.errors import BadInput, nearest
from besiege.core.extra import extra
from besiege.core.images import Images
from besiege.core.target import Target, fingerprint
from besiege.core.threat import Access
from besiege.embedded.networks import NETWORKS
from besiege.targets import defended, embedded, huggingface, onnx, stolen
from besiege.targets.callable import from_callable
from besiege.targets.factory import FACTORY, make
from besiege.targets.http import Service, is_url, open_service
from besiege.targets.module import from_module, ordinary
from besiege.targets.preprocessing import Front, Preprocessing
from besiege.targets.sklearn import Estimator, is_estimator
from besiege.targets.stored import exported, pickled, weights_alone
from besiege.targets.weights import fill

DEFAULT = "embedded:digits-cnn"
HUB = "hf"
DEFENDED = "defended"
STOLEN = "stolen"
WITH_GRADIENTS = "@gradients"
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
    without arguments, it returns a torch module, a function of images, a fitted scikit-learn classifier or a
    `Target`; ``file.onnx``, or ``file.onnx@gradients`` to differentiate it; ``hf:folder`` or ``hf:name`` on the hub
    of Hugging Face; an address, or the ``file.toml`` of a `besiege.targets.http.Service`; ``file.pt2`` of
    ``torch.export``; a whole module pickled as ``file.pt``. The last two and ``file.py`` run code, which
    ``trust_code`` must allow. ``defended:FOLDER`` and ``stolen:FOLDER`` are what `besiege defend` and `besiege steal`
    wrote. ``preprocessing`` is otherwise read from ``NAME.toml`` or ``model.toml`` beside the weights or the code, or
    the model's own config. What was found out on the way stands in the target's ``notes``.

    Raises:
        BadInput: nothing of that name, code that is not trusted or raises, weights that do not fit, answers that
            are no scores, classes or images that do not fit ``data``.
    """
    spec = spec or DEFAULT
    where, size = device_of(device), 64 if batch is None else batch
    if size < 1:
        raise BadInput(f"the batch must be at least 1 image, not {size}")
    kind, _, name = spec.partition(":")
    if kind == "embedded":
        _nothing_else(spec, preprocessing, weights)
        target = embedded.read(name, where, size)
    elif kind == DEFENDED:
        _nothing_else(spec, preprocessing, weights)

        def inside(layout: defended.Layout) -> Target:
            fed = layout.mean is not None or layout.std is not None
            how = Preprocessing(mean=layout.mean or (), std=layout.std or ()) if fed else None
            return open_target(
                layout.target,
                device=device,
                trust_code=trust_code,
                preprocessing=how,
                classes=layout.classes,
                batch=batch,
                weights=layout.weights,
                data=data,
            )

        target = defended.read(Path(name).expanduser(), inside, trust_code=trust_code, device=where)
    elif _is_service(spec):
        if weights is not None:
            raise BadInput(f"{spec} is asked over HTTP and takes no weights")
        with extra("http"):
            target = open_service(
                spec,
                preprocessing=preprocessing,
                classes=classes,
                batch=batch,
                device=where,
                images=None if data is None else data.x,
            )
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

    Nothing is executed: what shows is an embedded target's shape, what an ONNX file or a model's config says, and
    what a declaration beside the files does.
    """
    spec = spec or DEFAULT
    kind, _, name = spec.partition(":")
    if kind == "embedded":
        channels, *size = embedded.shape(name)
        return _expected((size[0], size[1]), channels)
    if kind == DEFENDED:
        channels, *size = defended.described(Path(name).expanduser()).shape
        return _expected((size[0], size[1]), channels)
    shape = stolen.Layout.read(Path(name).expanduser()).shape if kind == STOLEN else _declared_shape(spec)
    if preprocessing is None and kind == HUB:
        with extra("hf"):
            preprocessing = huggingface.declared(name)
    elif preprocessing is None and _is_service(spec):
        preprocessing = Service.read(spec).how(spec) or Preprocessing()
    elif preprocessing is None:
        match = FACTORY.fullmatch(spec)
        files = [Path(_plain(spec))] if match is None else _files(weights or match["weights"], _code(match["where"]))
        declared = Preprocessing.beside(files)
        preprocessing = declared[0] if declared else Preprocessing()
    coloured = 3 in (len(preprocessing.mean), len(preprocessing.std)) or preprocessing.channels == "bgr"
    if shape is not None:
        return _expected(preprocessing.size or (shape[1], shape[2]), shape[0])
    return _expected(preprocessing.size, 3 if coloured else None)


def _expected(size: tuple[int, int] | None, channels: int | None) -> Expected:
    return Expected(size, channels, f"embedded:digits{'-rgb' if channels == 3 else ''}")


def _declared_shape(spec: str) -> tuple[int, int, int] | None:
    """The (c, h, w) that an ONNX file or the description of a service declares."""
    if _is_service(spec):
        return Service.read(spec).shape
    path = Path(_plain(spec)).expanduser()
    if path.suffix != ".onnx":
        return None
    with extra("onnx"):
        return onnx.Graph(path).shape


def _is_service(spec: str) -> bool:
    return is_url(spec) or spec.endswith(".toml")


def _plain(spec: str) -> str:
    """The file in the spec of one."""
    return spec.removesuffix(WITH_GRADIENTS) if spec.endswith(f".onnx{WITH_GRADIENTS}") else spec


class _Found(NamedTuple):
    """What a spec led to: a module, function or target; the files it came from; the shape it is known to take.

    ``how`` is what its own config declares, ``access`` the most that it grants.
    """

    made: Any
    files: list[Path]
    shape: tuple[int, ...] | None = None
    how: Preprocessing | None = None
    access: Access = Access.WEIGHTS


def _find(spec: str, weights: str | None, trust_code: bool) -> _Found:
    kind, _, name = spec.partition(":")
    if kind == HUB:
        if weights is not None:
            raise BadInput(f"{spec} brings its own weights and takes no others")
        with extra("hf"):
            made, how = huggingface.load(name), huggingface.declared(name)
        size = how.size
        return _Found(made, [], None if size is None else (huggingface.depth(made), *size), how)
    if kind == STOLEN:
        if weights is not None:
            raise BadInput(f"{spec} brings its own weights and takes no others")
        made, layout = stolen.read(Path(name).expanduser(), trust_code=trust_code)
        return _Found(made, [], layout.shape)
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
    plain = Path(_plain(spec)).expanduser()
    if plain.suffix == ".onnx":
        with extra("onnx"):
            graph = onnx.Graph(plain)
            if plain == path:
                return _Found(graph, [plain], graph.shape, access=Access.SCORES)
            return _Found(onnx.Differentiable(graph), [plain], graph.shape, access=Access.GRADIENTS)
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
    if preprocessing is None and found.how is not None:
        preprocessing, notes = found.how, ("it is fed as its own config says",)
    elif preprocessing is None:
        declared = Preprocessing.beside(found.files)
        if declared is not None:
            preprocessing = declared[0]
            notes = (f"it is fed as {declared[1]} says",)
    made = Estimator(found.made, spec) if is_estimator(found.made) else found.made
    if not callable(made):
        raise BadInput(f"{spec} makes a {type(made).__name__}, not a torch module, a function or a Target")
    if isinstance(made, (onnx.Graph, onnx.Differentiable)):
        preprocessing = replace(preprocessing or Preprocessing(), layout="nchw")  # the file's own is followed
    shape = _shape(spec, found, preprocessing or Preprocessing()) if data is None else data.shape
    if isinstance(made, onnx.Differentiable):
        x = ordinary(None if data is None else data.x, shape)
        made.check(Front(preprocessing or Preprocessing(), shape[0])(x))
    if found.how is not None and data is not None:
        huggingface.agree(found.made, data, spec)
    whole = isinstance(made, nn.Module) and not isinstance(made, onnx.Graph)
    wrap: Callable[..., Target] = from_module if whole else from_callable
    target = wrap(
        made,
        classes=made.classes if isinstance(made, Estimator) and classes is None else classes,
        shape=shape,
        name=spec,
        preprocessing=preprocessing,
        batch=batch,
        device=device,
        images=None if data is None else data.x,
    )
    if isinstance(made, onnx.Graph):
        target = replace(
            target, fingerprint=fingerprint(nn.Sequential(Front(preprocessing or Preprocessing(), shape[0]), made))
        )
    return replace(target, access=min(target.access, found.access), notes=(*notes, *target.notes))


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


def device_of(device: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        BadInput: it is not there.
    """
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
