"""Copycat: a network of one's own learns the labels that the target gives to images of any kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.features import all_features
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import extraction
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng, Stream
from besiege.core.target import Target
from besiege.core.threat import Access


@extraction("Copycat CNN", paper="arXiv:1806.05476", access=Access.LABELS)
def copycat(
    oracle: Oracle,
    images: Images,
    fit: Fit,
    rng: Rng,
    *,
    queries: int = 5000,
    pool: Literal["images", "textures", "both"] = "images",
    sampling: Literal["random", "uncertainty", "kcentre"] = "random",
    rounds: int = 5,
    spare: int = 4,
    balance: bool = True,
) -> nn.Module:
    """Ask for the labels of ``queries`` images and train ``fit`` on them (Correia-Silva et al. 2018).

    They are taken from the ``images`` (whose labels are not looked at), from ``textures`` that are drawn (`textures`),
    or half and half from both. With ``balance`` the images of rarer classes are repeated until every class has as many.

    Departs from the paper where ``sampling`` is not random: in each of ``rounds`` the network learns what is known so
    far, in a third of the epochs, and the next share of the queries goes where it is unsure, by the gap between its two
    likeliest classes, or to the ``kcentre``, one after another what lies farthest in its features from all that was
    asked about (Pal et al. 2020, doi:10.1609/aaai.v34i01.5432). ``spare`` times as many textures are drawn to choose
    from. The paper fine-tunes a pretrained network; here what ``fit`` builds begins with fresh weights.

    Raises:
        BadInput: there is nothing to ask, or ``fit`` makes no torch module.
    """
    if queries < 1:
        raise BadInput("copycat: queries must be at least 1, not 0")
    stream, device = rng.stream(0), images.x.device
    wanted = queries * (spare if sampling != "random" else 1)
    parts = [images.x[rng.rand().argsort()]] if pool != "textures" else []
    if pool != "images":
        parts.append(textures(wanted, images.shape, stream).to(images.x))
    candidates = torch.cat([part[:wanted] for part in parts] if pool == "both" else parts)
    if pool == "both":
        candidates = candidates[torch.randperm(len(candidates), generator=stream.generator).to(device)]
    total, turns = min(queries, len(candidates)), 1 if sampling == "random" else rounds
    asked = torch.zeros(len(candidates), dtype=torch.bool, device=device)
    known, labels = candidates[:0], torch.zeros(0, dtype=torch.int64, device=device)
    seed, copy = stream.below(1 << 31), None
    for turn in range(turns):
        share = total * (turn + 1) // turns - len(known)
        left = (~asked).nonzero().squeeze(1)
        if not share:
            continue
        rows = left[:share] if copy is None else left[CHOICES[sampling](copy, candidates[left], known, share)]
        asked[rows] = True
        said = oracle.labels(candidates[rows], torch.zeros_like(rows))
        known, labels = torch.cat([known, candidates[rows]]), torch.cat([labels, said])
        learned = repeated(labels, oracle.classes) if balance else torch.arange(len(labels), device=device)
        lesson = Images(known[learned], labels[learned], torch.arange(len(learned), device=device))
        how = fit if turn == turns - 1 else replace(fit, epochs=-(-fit.epochs // 3))
        copy = how(lesson, seed, classes=oracle.classes)
    if copy is None or copy.module is None:
        raise BadInput(f"copycat trains a torch module, but the recipe {fit.name} made none of {total} images")
    return copy.module


def repeated(labels: Tensor, classes: int) -> Tensor:
    """Rows in which every class that there is comes as often as the commonest, its images in turn."""
    counts = torch.bincount(labels, minlength=classes)
    most = torch.arange(int(counts.max()), device=labels.device)
    order = labels.argsort(stable=True)
    groups = torch.split(order, counts.tolist())
    return torch.cat([group[most % len(group)] for group in groups if len(group)]).sort().values


def uncertain(copy: Target, candidates: Tensor, known: Tensor, count: int) -> Tensor:
    """The ``count`` rows whose two likeliest classes lie closest together."""
    top = copy.scores(candidates).softmax(1).topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).argsort(stable=True)[:count]


def kcentre(copy: Target, candidates: Tensor, known: Tensor, count: int) -> Tensor:
    """``count`` rows, each farthest from what is ``known`` and from the rows before it (Sener & Savarese 2018)."""
    there, here = all_features(copy, candidates), all_features(copy, known)
    away = torch.cat([torch.cdist(part, here).amin(1) for part in torch.split(there, 1024)])
    rows = []
    for _ in range(min(count, len(candidates))):
        rows.append(away.argmax())
        away = torch.minimum(away, (there - there[rows[-1]]).norm(dim=1))
        away[rows[-1]] = -1
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.int64, device=candidates.device)


CHOICES: dict[str, Callable[[Target, Tensor, Tensor, int], Tensor]] = {"uncertainty": uncertain, "kcentre": kcentre}
"""How the next images are chosen: the copy so far, the candidates, what is known, how many → rows."""


def textures(count: int, shape: tuple[int, int, int], stream: Stream) -> Tensor:
    """(count, *shape) random textures in [0, 1], every second one inside a random outline on black.

    A texture is noise on a grid of random fineness, enlarged smoothly and stretched to the full range.
    """
    c, h, w = shape

    def noise(channels: int, finest: int) -> Tensor:
        drawn = torch.empty(count, channels, h, w)
        sizes = torch.randint(2, max(3, finest + 1), (count,), generator=stream.generator)
        for size in sizes.unique().tolist():
            rows = (sizes == size).nonzero().squeeze(1)
            coarse = torch.rand(len(rows), channels, size, size, generator=stream.generator)
            drawn[rows] = F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)
        low, high = drawn.flatten(1).amin(1), drawn.flatten(1).amax(1)
        return (drawn - low.view(-1, 1, 1, 1)) / (high - low).clamp_min(1e-6).view(-1, 1, 1, 1)

    surface, outline = noise(c, max(h, w) // 2), noise(1, 6)
    bound = torch.rand(count, 1, 1, 1, generator=stream.generator) * 0.5 + 0.25
    shown = torch.where(outline > bound, surface, 0)
    shown[::2] = surface[::2]
    return shown.clamp(0, 1)
