"""Reconstruction: the image behind an answer, or the one training image that an informed adversary lacks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import inference
from besiege.core.oracle import Oracle
from besiege.core.reference import Reference
from besiege.core.rng import Rng
from besiege.core.threat import Access


@inference("Reconstruction", paper="arXiv:1902.08552", access=Access.SCORES, gives="inputs")
def reconstruction(
    oracle: Oracle,
    seen: Tensor,
    knows: Reference,
    rng: Rng,
    *,
    mode: Literal["decoder", "informed"] = "decoder",
    top: int = 0,
    epochs: int = 60,
    batch: int = 128,
    lr: float = 1e-3,
    link: Literal["softmax", "identity"] = "softmax",
    decay: float | None = None,
) -> Images:
    """Rebuild the images behind the scores ``seen`` (k, classes), with the labels that they must have had.

    ``decoder`` asks the target about ``knows.images`` and trains a network, in ``epochs`` of batches of ``batch`` at
    the rate ``lr``, to undo the answers, of which it takes the ``top`` largest probabilities (0: all), as logarithms
    (Yang et al. 2019).

    ``informed`` needs no answers but a model that is linear in the pixels, trained to its optimum, and all training
    images but one as ``knows.images`` (Balle et al. 2022, arXiv:2201.04845): its weights, which its gradients give,
    satisfy first-order conditions of which the unknown image is the rest. ``link`` says what makes its scores
    probabilities: softmax for logistic regression, nothing for ridge regression on one-hot labels. ``decay`` is the
    weight decay of the mean loss, of the weights but not of the intercept; None finds it out, for the rest must be the
    outer product of a residual and an image.

    Raises:
        BadInput: there are no ``knows.images``, no answers to undo, no epochs to learn in, or (``informed``) the scores
            are not linear in the pixels.
    """
    if knows.images is None:
        raise BadInput("reconstruction works from images of the adversary's own and was given none")
    if epochs < 1:
        raise BadInput("reconstruction: epochs must be at least 1, not 0")
    if mode == "informed":
        return _left_out(oracle, knows.images, link, decay)
    if seen.shape[1:] != (oracle.classes,):
        raise BadInput(f"mode=decoder undoes answers of {oracle.classes} scores each and was given {tuple(seen.shape)}")
    asked = knows.images
    given = _kept(oracle.scores(asked.x), top)
    centre, scale = given.mean(0), given.std(0) + 1e-6
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(rng.below(1 << 31)[0]))
        network = _decoder(seen.shape[1], asked.shape).to(given)
        optimizer = torch.optim.Adam(network.parameters(), lr)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * lr, epochs * -(-len(asked) // batch))
        for part in (part for _ in range(epochs) for part in torch.randperm(len(asked)).split(batch)):
            optimizer.zero_grad()
            F.mse_loss(network((given[part] - centre) / scale), asked.x[part].to(given)).backward()
            optimizer.step()
            rate.step()
            if knows.progress is not None:
                knows.progress(len(part))
    with torch.no_grad():
        made = network.eval()((_kept(seen.to(given), top) - centre) / scale)
    return _numbered(made, seen.argmax(1))


def _kept(scores: Tensor, top: int) -> Tensor:
    """(n, classes) log-probabilities; those below the ``top`` largest become the least that float32 tells from none."""
    kept = F.log_softmax(scores, 1)
    if top:
        least = kept.topk(min(top, kept.shape[1]), 1).values[:, -1:]
        kept = torch.where(kept >= least, kept, -torch.inf)
    return kept.clamp_min(-100)


def _decoder(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Scores (n, classes) → images (n, *shape): three dense layers, with layer normalization between them."""
    c, h, w = shape
    return nn.Sequential(
        *(nn.Linear(classes, 256), nn.LayerNorm(256), nn.GELU()),
        *(nn.Linear(256, 512), nn.LayerNorm(512), nn.GELU()),
        *(nn.Linear(512, c * h * w), nn.Sigmoid(), nn.Unflatten(1, shape)),
    )


def _left_out(oracle: Oracle, known: Images, link: str, decay: float | None) -> Images:
    """The image that the first-order conditions of the weights lack.

    With residuals r_i = p_i - onehot(y_i) they say that Σ r_i = 0 and Σ r_i x_iᵀ + n·decay·W = 0, over all n images.
    """
    weights, bias = _linear(oracle, known)
    x = known.x.flatten(1).to(weights)
    residual = _probability(x @ weights.T + bias, link) - F.one_hot(known.y, len(bias))
    missing = -residual.sum(0)
    length = missing.square().sum()
    if not length > 0:
        raise BadInput("the weights leave no residual for an unknown training image; the model is not at its optimum")
    rest = -residual.T @ x
    if decay is None:
        across, along = (part - missing.outer(missing @ part) / length for part in (rest, weights))
        total = (across * along).sum() / along.square().sum()
    else:
        total = weights.new_tensor((len(known) + 1) * decay)
    found = missing @ (rest - total * weights) / length
    label = (_probability(weights @ found + bias, link) - missing).argmax()
    return _numbered(found.clamp(0, 1).view(1, *known.shape), label[None])


def _linear(oracle: Oracle, known: Images) -> tuple[Tensor, Tensor]:
    """The weights (classes, pixels) and the intercept (classes,) of a model whose scores are linear.

    Raises:
        BadInput: they are not.
    """
    every = torch.arange(oracle.classes, device=known.x.device)[None]
    row = torch.zeros(1, dtype=torch.int64, device=known.x.device)
    bias, slope = oracle.jacobian(torch.zeros_like(known.x[:1]), every, row)
    weights, bias = slope[0].flatten(1), bias[0]
    value = oracle.scores(known.x[:1], row)[0]
    expected = weights @ known.x[0].flatten() + bias
    if not torch.allclose(value, expected, rtol=1e-3, atol=1e-3 * float(value.abs().max())):
        raise BadInput("mode=informed rebuilds a row of a linear model, but the scores are not linear in the pixels")
    return weights, bias


def _probability(scores: Tensor, link: str) -> Tensor:
    return scores.softmax(-1) if link == "softmax" else scores


def _numbered(x: Tensor, y: Tensor) -> Images:
    return Images(x, y, torch.arange(len(x), device=x.device), "reconstruction")
