"""Activation patterns: neurons that the trigger alone drives stand out by how their inputs spread."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.features import last_layer
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.suspicion import Suspicion
from besiege.core.target import Target, fingerprint

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
STEP = 0.1
"""The histograms behind the entropies have bins of so many standard deviations."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What enters the nonlinearity behind the layer ``name``: (n, neurons), the largest over an image's map."""

    name: str
    inputs: Tensor

    @property
    def standard(self) -> Tensor:
        """(n, neurons) float64 with mean 0 and deviation 1 a neuron; 0 where a neuron never changes."""
        inputs = self.inputs.double()
        centred = inputs - inputs.mean(0)
        spread = centred.square().mean(0).sqrt()
        return torch.where(spread > 1e-6, centred / spread.clamp_min(1e-6), 0)


def suspicion(target: Target, images: Images, *, deviations: float = 4.0) -> Suspicion:
    """Which training ``images`` (n of them) drive a neuron as no others of their class do, and none of other classes.

    Within each class the inputs of every neuron are cut into two heaps. A class is suspect where, in some layer, the
    clearest cut among its neurons is clearer than in the other classes: above their median by more than ``deviations``
    times 1.48 median absolute deviations. Suspect are the images in that neuron's heap which lies farther from the
    other classes' images. A score is how far out an image lies in its class's clearest neuron, times how odd its class
    is. It takes three classes to tell an odd one.

    Where the network convolves, only its convolutions count: kinds of clean images (two ways to write a 1) make heaps
    in the dense layers. A trigger blended with the whole image is not found so. Departs from the paper, whose entropy
    is over all classes, which make heaps themselves.

    Raises:
        BadInput: see `activation_patterns`.
    """
    score, suspect = torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool)
    layers, labels = convolutional(target, patterns(target, images.x)), torch.unique(images.y)
    rows = [(images.y == label).nonzero().squeeze(1) for label in labels]
    peaks = [[clearest(layer.inputs[own]) for own in rows] for layer in layers]
    clear = torch.tensor([[clarity for clarity, *_ in row] for row in peaks], dtype=torch.float64)
    middle = clear.median(1, keepdim=True).values
    spread = 1.4826 * (clear - middle).abs().median(1, keepdim=True).values
    odd = (clear - middle) / spread.clamp_min(0.01)
    for k, own in enumerate(rows):
        best = int(odd[:, k].argmax())
        _, neuron, cut = peaks[best][k]
        inputs = layers[best].inputs[:, neuron].double()
        ours, usual = inputs[own], inputs[images.y != labels[k]].median()
        above, below = (ours[part].mean() for part in (ours > cut, ours <= cut))
        sign = 1.0 if (above - usual).abs() >= (below - usual).abs() else -1.0
        out = sign * (ours - cut) / ours.std(correction=0).clamp_min(1e-6)
        score[own] = (odd[best, k].clamp_min(0) * out.clamp_min(0)).float().cpu()
        suspect[own] = ((out > 0) & (odd[best, k] > deviations)).cpu()
    return Suspicion(score.to(images.x.device), suspect.to(images.x.device))


@defense(
    "Activation patterns",
    paper="arXiv:1805.12185",
    kind="model",
    counters=("badnets", "blended"),
    adaptive="a backdoor trained to look like the clean images inside the network",
    suspects=suspicion,
)
def activation_patterns(
    target: Target,
    images: Images,
    rng: Rng,
    *,
    mode: Literal["entropy", "fine-pruning"] = "entropy",
    deviations: float = 3.0,
    drop: float = 0.04,
    epochs: int = 0,
    lr: float = 0.01,
) -> Target:
    """Prune the neurons that a backdoor lives in, found by ``mode``, and train on for ``epochs`` at ``lr``.

    - entropy: those whose inputs over the suspect ``images`` (a training set) have an entropy of less than their
      layer's mean by more than ``deviations`` standard deviations (Zheng et al., NeurIPS 2022): images with a trigger
      form a heap of their own, and two heaps are less disordered than one; ``epochs`` above 0 trains on with the images
      that `suspicion` does not name;
    - fine-pruning: those of the last convolution that clean ``images`` drive least, one after another until the
      accuracy on a held-out fifth of them would fall by more than ``drop`` (Liu et al. 2018). Its authors train on
      afterwards, which ``epochs`` above 0 does, on the other images.

    A pruned neuron's input is 0, the shift of a batch normalization included. The last layer is left alone.

    Raises:
        BadInput: the target is no plain torch module, or has no neurons but those of its last layer.
    """
    twin = copy.deepcopy(_module(target))
    pruned = replace(target, call=twin, module=twin)
    held = torch.arange(len(images), device=images.x.device) % 5 == 0
    if mode == "entropy":
        for name, doomed in backdoor_neurons(target, images.x, deviations).items():
            prune(twin.get_submodule(name), doomed)
    else:
        _fine_prune(pruned, images[~held], images[held], drop)
    if epochs:
        fit = Fit(lambda shape, classes: twin, target.name, epochs=epochs, lr=lr)
        kept = ~held if mode == "fine-pruning" else ~suspicion(target, images).suspect
        fit(images[kept], int(rng.keys[0]) & 0xFFFF, classes=target.classes, start=twin)
    return replace(pruned, name=f"pruned {target.name}", fingerprint=fingerprint(twin))


def backdoor_neurons(target: Target, x: Tensor, deviations: float) -> dict[str, Tensor]:
    """By layer, (neurons,) bool: which have an entropy that is too low for their layer over ``x`` (n, c, h, w)."""
    return {layer.name: outliers(entropy(layer.standard), deviations) for layer in patterns(target, x)}


def patterns(target: Target, x: Tensor) -> list[Layer]:
    """What enters the nonlinearity behind each layer but the last, for all of ``x`` (n, c, h, w).

    Where a batch normalization follows a layer, its output counts in place of the layer's own.

    Raises:
        BadInput: see `activation_patterns`.
    """
    module = _module(target)
    last = last_layer(target)
    kinds = (nn.Conv2d, nn.Linear, *NORMS)
    layers: dict[nn.Module, str] = {m: n for n, m in module.named_modules() if isinstance(m, kinds) and m is not last}
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    passes: list[dict[nn.Module, Tensor]] = []

    def catch(layer: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
        if isinstance(layer, NORMS):
            for normalized in [other for other, (out, _) in found.items() if out is given[0]]:
                del found[normalized]
        found[layer] = made, made.flatten(2).amax(2) if made.dim() > 2 else made.clone()

    handles = [layer.register_forward_hook(catch) for layer in layers]
    try:
        with torch.no_grad(), target.ready():
            for part in torch.split(x, target.batch):
                found.clear()
                target.answer(part)
                passes.append({layer: inputs for layer, (_, inputs) in found.items()})
    finally:
        for handle in handles:
            handle.remove()
    if not passes[0]:
        raise BadInput(f"activation-patterns: {target.name} has no neurons but those of its last layer")
    return [Layer(layers[layer], torch.cat([seen[layer] for seen in passes])) for layer in passes[0]]


def convolutional(target: Target, layers: list[Layer]) -> list[Layer]:
    """Those of the layers that give maps; all, where none does."""
    module = _module(target)
    maps = [layer for layer in layers if isinstance(module.get_submodule(layer.name), nn.Conv2d | nn.BatchNorm2d)]
    return maps or layers


def entropy(standard: Tensor) -> Tensor:
    """(neurons,) differential entropy of each column of (n, neurons), in nats, by a histogram of bins of `STEP`.

    That of a normal distribution, the most there is at deviation 1, is 1.42.
    """
    bins = (standard / STEP).floor().long()
    bins -= bins.amin(0)
    columns = torch.arange(bins.shape[1], device=bins.device)
    width = int(bins.max()) + 1
    share = torch.bincount((columns * width + bins).flatten(), minlength=width * bins.shape[1]).double() / len(bins)
    nats: Tensor = torch.special.entr(share.reshape(-1, width)).sum(1)
    return nats + math.log(STEP)


def outliers(entropies: Tensor, deviations: float) -> Tensor:
    """Which of a layer's entropies (neurons,) lie below its mean by more than ``deviations`` deviations.

    Neurons whose input never changes, at the histogram's least, neither count nor stand out.
    """
    alive = entropies > math.log(STEP) + 1e-9
    if alive.sum() < 2:
        return torch.zeros_like(alive)
    known = entropies[alive]
    return alive & (entropies < known.mean() - deviations * known.std())


def clearest(inputs: Tensor) -> tuple[float, int, float]:
    """Of (n, neurons) the neuron whose values fall into two heaps most clearly, and where they are cut.

    Clarity is the share of the variance between the heaps at Otsu's cut: 0.64 for a normal distribution, 1 for two
    points (doi:10.1109/TSMC.1979.4310076).
    """
    ordered = inputs.double().sort(0).values
    n, centred = len(ordered), ordered - ordered.mean(0)
    total = centred.square().sum(0)
    if n < 3 or not (total > 1e-9).any():
        return 0.0, 0, float(ordered[-1, 0])
    below = torch.arange(1, n, device=inputs.device, dtype=torch.float64)[:, None]
    between = centred.cumsum(0)[:-1].square() * n / (below * (n - below))
    share = torch.where(total > 1e-9, between / total.clamp_min(1e-9), 0)
    clarity, at = share.max(0)
    neuron = int(clarity.argmax())
    k = int(at[neuron])
    return float(clarity[neuron]), neuron, float(ordered[k : k + 2, neuron].mean())


def prune(layer: nn.Module, doomed: Tensor) -> None:
    """Make the output of the neurons ``doomed`` (neurons,) 0, in place."""
    with torch.no_grad():
        for weight in (layer.weight, layer.bias):
            if isinstance(weight, Tensor):
                weight[doomed] = 0


def _fine_prune(target: Target, clean: Images, held: Images, drop: float) -> None:
    """Prune the last convolution's neurons, the least driven first, while the held-out accuracy stands."""
    module = _module(target)
    chosen = convolutional(target, patterns(target, clean.x))[-1]
    layer = module.get_submodule(chosen.name)
    before = _accuracy(target, held)
    for neuron in chosen.inputs.clamp_min(0).mean(0).argsort()[:-1].tolist():
        state = copy.deepcopy(layer.state_dict())
        prune(layer, torch.arange(chosen.inputs.shape[1], device=chosen.inputs.device) == neuron)
        if _accuracy(target, held) < before - drop - 1e-9:
            layer.load_state_dict(state)
            return


def _accuracy(target: Target, images: Images) -> float:
    return float((target.labels(images.x) == images.y).float().mean())


def _module(target: Target) -> nn.Module:
    """The target as a plain torch module.

    Raises:
        BadInput: it is none.
    """
    if target.module is None or target.module is not target.call:
        raise BadInput(f"activation-patterns: {target.name} is no plain torch module whose neurons could be pruned")
    return target.module
