"""A spec string becomes a training recipe."""

from __future__ import annotations

import torch
from torch import nn

from besiege.core.errors import BadInput
from besiege.core.fit import Fit, Shape
from besiege.embedded.recipes import FITS, recipe
from besiege.targets.factory import FACTORY, make
from besiege.targets.probe import first_line


def open_fit(spec: str, *, trust_code: bool = False) -> Fit:
    """One of the recipes by its name, or ``pkg.module:factory`` that makes a `Fit` or a torch module.

    A module that a factory makes is trained as the recipe ``cnn`` trains.

    Raises:
        BadInput: there is none of that name, or the factory makes something else.
    """
    match = FACTORY.fullmatch(spec)
    if match is None:
        return recipe(spec)
    where, name = match["where"], match["name"]
    made, _ = make(where, name, trust_code=trust_code)
    if isinstance(made, Fit):
        return made
    if not isinstance(made, nn.Module):
        raise BadInput(f"--fit {spec} makes a {type(made).__name__}, not a Fit or a torch module")

    def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
        module, _ = make(where, name, trust_code=trust_code)
        assert isinstance(module, nn.Module)
        return module

    like = FITS["cnn"]
    return Fit(build, spec, epochs=like.epochs, lr=like.lr, shift=like.shift)


def suits(fit: Fit, shape: Shape, classes: int) -> Fit:
    """``fit``, whose network has answered black images (c, h, w) with a score for each class.

    Raises:
        BadInput: it cannot.
    """
    size = "x".join(map(str, shape))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            said = fit.build(shape, classes).eval()(torch.zeros(2, *shape))
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"--fit {fit.name} does not suit images of {size} (channels, height, width): {first_line(error)}"
        ) from None
    if not isinstance(said, torch.Tensor) or said.shape != (2, classes):
        answered = f"shape {tuple(said.shape)}" if isinstance(said, torch.Tensor) else f"a {type(said).__name__}"
        raise BadInput(f"--fit {fit.name} answers 2 images with {answered}; expected (2, {classes})")
    return fit
